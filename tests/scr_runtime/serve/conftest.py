"""A server on loopback with the embedded model and a predictor that was never fitted."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from scenes import CHECKPOINT
from scenes.world import render_scene
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, describe_model, load_predictor, save_predictor
from scr_runtime.serve.app import Service, application
from scr_runtime.serve.engine import Answer, Engine, Question
from scr_runtime.serve.process import Draining
from scr_runtime.serve.settings import ServeSettings

CONFIG = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
QUESTION = "Describe the image."
PATIENCE = 60.0


def picture(number: int = 3) -> Image.Image:
    return Image.fromarray(render_scene(0, "val", number).image)


def data_url(image: Image.Image | bytes, kind: str = "PNG") -> str:
    content = image
    if isinstance(content, Image.Image):
        stream = io.BytesIO()
        content.save(stream, kind)
        content = stream.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def turn(text: str, *urls: str) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


class Gate:
    """Holds generations after their first words, until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Semaphore(0)
        self.stopped = 0

    def pass_through(self, say: Callable[[str], None], stop: threading.Event) -> Callable[[str], None]:
        def held(text: str) -> None:
            say(text)
            if not self.open.is_set():
                self.reached.release()
                while not self.open.wait(0.005) and not stop.is_set():
                    pass

        return held


class HeldEngine(Engine):
    """An engine whose generations a test can hold."""

    gate: Gate | None = None
    fails: Exception | None = None

    def answer(self, question: Question, say: Callable[[str], None], stop: threading.Event) -> Answer:
        if self.fails is not None:
            raise self.fails
        if self.gate is None:
            return super().answer(question, say, stop)
        try:
            return super().answer(question, self.gate.pass_through(say, stop), stop)
        except BaseException:
            self.gate.stopped += 1
            raise


class Served:
    """A server that runs in a thread, and a client of it."""

    def __init__(self, service: Service, address: str) -> None:
        self.service, self.address = service, address
        self.client = openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0, timeout=PATIENCE)

    @property
    def engine(self) -> HeldEngine:
        assert isinstance(self.service.engine, HeldEngine)
        return self.service.engine

    def ask(self, text: str = QUESTION, *urls: str, scr: dict[str, Any] | None = None, **more: Any) -> Any:
        body = {} if scr is None else {"extra_body": {"scr": scr}}
        messages: Any = [turn(text, *(urls or (data_url(picture()),)))]
        return self.client.chat.completions.create(model="scene-llava", messages=messages, **body, **more)

    def idle(self) -> None:
        """Waits until every slot is free."""
        until = time.monotonic() + PATIENCE
        while self.service._admitted or self.service._waiting:
            assert time.monotonic() < until, "a slot was not freed"
            time.sleep(0.002)


@pytest.fixture(scope="session")
def loaded() -> tuple[Any, Any]:
    model: Any = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="session")
def folder(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(hidden_size=128)).eval()
    predictor.threshold = 0.6
    predictor.set_drift(0.5, 1.7)
    place = tmp_path_factory.mktemp("runs") / "runs/predictors/scene-llava"
    place.parent.mkdir(parents=True)
    return save_predictor(place, predictor, scr=CONFIG, model=describe_model(*loaded))


Serve = Callable[..., AbstractContextManager[Served]]


@pytest.fixture(scope="session")
def serve(loaded: tuple[Any, Any], folder: Path) -> Serve:
    """Serves with other settings than the defaults; ``load`` makes another engine."""

    def load(settings: ServeSettings) -> Engine:
        predictor = None if settings.predictor is None else load_predictor(settings.predictor)
        return HeldEngine(loaded[0], loaded[1], predictor, settings)

    @contextmanager
    def running(load: Callable[[ServeSettings], Engine] = load, wait: bool = True, **changes: Any) -> Iterator[Served]:
        given = {"model": str(CHECKPOINT), "predictor": str(folder), "name": "scene-llava", "port": 0}
        service = Service(ServeSettings.model_validate(given | changes), load)
        config = uvicorn.Config(application(service), http="h11", ws="none", log_config=None, access_log=False,
                                host="127.0.0.1", port=0, timeout_graceful_shutdown=1)  # fmt: skip
        listening, server = config.bind_socket(), Draining(config, service)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        served = Served(service, f"http://127.0.0.1:{listening.getsockname()[1]}")
        try:
            while wait and service.engine is None:
                assert thread.is_alive(), "the server has ended"
                time.sleep(0.005)
            yield served
        finally:
            served.client.close()
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()

    return running


@pytest.fixture(scope="module")
def served(serve: Serve) -> Iterator[Served]:
    """One server with the defaults for all tests of a file."""
    with serve() as running:
        yield running
