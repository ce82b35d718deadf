"""A playground on the embedded model, with a predictor that was never fitted, served to real sockets."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image

from data.images import CocoImages
from data.settings import VLMSettings
from data.vlm import load_vlm
from pipeline.playground import bind
from playground.engine import Engine
from playground.gallery import read_gallery
from playground.server import Place, application
from scenes.world import render_scene
from scr_runtime import PredictorConfig, SCRConfig, SourcePredictor, describe_model, load_predictor, save_predictor

CONFIG = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
QUESTION = "Is there a dog in the image?"


def answer_line(method: str, image_id: int, sources: list[int], parsed: str = "yes", margin: float = 1.0) -> str:
    image = {"sources": sources, "grid": [12, 12], "entropy": 4.9 + image_id / 1000}
    return json.dumps({
        "benchmark": "pope", "seed": None, "method": method, "image_id": image_id, "text": QUESTION, "label": "no",
        "parsed": parsed, "margin": margin, "images": [image],
    })  # fmt: skip


@pytest.fixture(scope="session")
def loaded() -> tuple[Any, Any]:
    return load_vlm(VLMSettings(hub_id="scenes/checkpoint", dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def predictor_folder(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(hidden_size=128)).eval()
    predictor.threshold = 0.6
    folder = tmp_path_factory.mktemp("run") / "predictor"
    return save_predictor(folder, predictor, scr=CONFIG, model=describe_model(*loaded))


@pytest.fixture(scope="session")
def place(loaded: tuple[Any, Any], predictor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    pictures = tmp_path_factory.mktemp("scenes")
    for number in range(3):
        Image.fromarray(render_scene(0, "val", number).image).save(pictures / f"{number}.png")
    answers = predictor_folder.parent / "answers.jsonl"
    lines = [answer_line(method, image, [20 + image * (method == "one-pass"), 40]) for image in range(3)
             for method in ("vanilla", "two-pass", "one-pass")]  # fmt: skip
    answers.write_text("\n".join(lines))
    return Place(
        engine=Engine(*loaded, CONFIG, load_predictor(predictor_folder)),
        name="scene-llava",
        model="scenes/checkpoint",
        dtype="float32",
        predictor=str(predictor_folder),
        without="",
        images=CocoImages(pictures, None),
        entries=read_gallery(answers),
    )


@pytest.fixture
def address(served: tuple[uvicorn.Server, str]) -> Iterator[str]:
    """Where the page is served. Requests that a closed page left are waited for: they set filters of warnings."""
    server, url = served
    yield url
    while server.server_state.tasks:
        time.sleep(0.01)


@pytest.fixture(scope="session")
def served(place: Place) -> Iterator[tuple[uvicorn.Server, str]]:
    listening = bind(0)
    server = uvicorn.Server(uvicorn.Config(application(place), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server, f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listening.close()
