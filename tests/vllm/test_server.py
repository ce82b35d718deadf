"""The OpenAI server: the log-probabilities of the transformers runtime, the edit switched off, /metrics."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import ALONE, Question, Reference

ROOT = Path(__file__).parents[2]


class Server:
    """A server in a process of its own, and requests to it."""

    def __init__(self, checkpoint: Path, predictor: Path, folder: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "metrics").mkdir(parents=True)
        self.log = folder / "server.log"
        environment = os.environ | {
            "SCR_PREDICTOR": str(predictor), "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics"),
            "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint),
            "--port", str(self.port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager",
            "--block-size", "32", "--max-model-len", "512",
            "--max-num-batched-tokens", "4096", "--max-num-seqs", "16", "--served-model-name", "scene", *arguments,
            "--kv-cache-memory-bytes", str(64 * 2**20), "--seed", "0",
        ]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)

    def wait(self, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-4000:])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def open(self, question: Question, **extra: Any) -> Any:
        """A chat completion's answer, still to be read."""
        content: list[dict[str, Any]] = []
        for image in question.images():
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": question.text})
        body = {
            "model": "scene", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24,
            "min_tokens": 24, "logprobs": True, **extra,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        return urllib.request.urlopen(request, timeout=120)

    def chat(self, question: Question, **extra: Any) -> dict[str, Any]:
        with self.open(question, **extra) as answer:
            return json.loads(answer.read())

    def stream(self, question: Question) -> Any:
        """An answer that arrives token by token."""
        return self.open(question, stream=True)

    def logprobs(self, question: Question, **extra: Any) -> list[float]:
        (choice,) = self.chat(question, **extra)["choices"]
        return [token["logprob"] for token in choice["logprobs"]["content"]]

    def counter(self, name: str) -> float:
        return self.gauge(f"{name}_total")

    def gauge(self, name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.get("/metrics"), re.M))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def predictor(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.predictor(tmp_path_factory.mktemp("predictor"), question="none")


@pytest.fixture(scope="module")
def server(checkpoint: Path, predictor: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(checkpoint, predictor, tmp_path_factory.mktemp("server"))
    try:
        made.wait()
        yield made
    finally:
        made.close()


def test_chat_completions_are_edited(server: Server, reference: Reference, predictor: Path) -> None:
    for question in ALONE[:2]:
        assert server.logprobs(question) == pytest.approx(
            list(reference.answer(question, predictor).logprobs), abs=1e-4
        )


def test_the_log_says_that_answers_are_edited(server: Server) -> None:
    log = server.log.read_text()
    assert "one-pass SCR with" in log and "self-test: 6 blocks edited" in log


def test_a_request_switches_the_edit_off(server: Server, reference: Reference) -> None:
    wanted = list(reference.answer(ALONE[0], None).logprobs)
    assert server.logprobs(ALONE[0], vllm_xargs={"scr": "off"}) == pytest.approx(wanted, abs=1e-4)


def test_a_mistake_in_a_request_is_its_own(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.chat(ALONE[0], vllm_xargs={"scr": "of"})
    assert caught.value.code == 400 and "expected 'one-pass' or 'off'" in caught.value.read().decode()
    assert server.logprobs(ALONE[0])


def test_the_counts_are_on_metrics(server: Server) -> None:
    before = {name: server.counter(f"scr_{name}") for name in ("images", "edits", "switched_off")}
    for scene in (20, 21):
        server.chat(Question((scene,), "Is there a cup?"))
    server.chat(Question((22,), "Is there a cup?"), vllm_xargs={"scr": "off"})
    after = {name: server.counter(f"scr_{name}") for name in before}
    assert {name: after[name] - before[name] for name in after} == {"images": 2, "edits": 12, "switched_off": 1}


@pytest.mark.slow  # test_start.py has it without a server
def test_a_setting_that_would_drop_the_edit_stops_the_start(
    checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    asking = reference.predictor(tmp_path / "asking", question="bilinear")
    server = Server(checkpoint, asking, tmp_path / "server")
    try:
        assert server.process.wait(120) != 0
    finally:
        server.close()
    log = server.log.read_text()
    assert "--no-enable-prefix-caching" in log and "--no-enable-chunked-prefill" in log
