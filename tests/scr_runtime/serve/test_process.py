"""The real process: how it starts, how it ends, and the lines of the guide."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from scenes import CHECKPOINT
from scr_runtime.serve.__main__ import main
from tests.scr_runtime.serve.conftest import PATIENCE, data_url, picture, turn

ROOT = Path(__file__).parents[3]
KEY = "key-of-a-test"


class Process:
    """A server in a process of its own, and what it has said."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child, self.lines = child, list[str]()
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            with self._more:
                self.lines.append(line)
                self._more.notify_all()

    def wait(self, words: str) -> re.Match[str]:
        """The first line with these words."""
        with self._more:
            found = self._more.wait_for(lambda: re.search(words, "".join(self.lines)), PATIENCE)
        assert found, f"{words} is not in {''.join(self.lines)}"
        return found  # type: ignore[return-value]

    def end(self, number: int) -> int:
        self.child.send_signal(number)
        code = self.child.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code


@contextmanager
def process(*arguments: str, cwd: Path = ROOT) -> Iterator[Process]:
    command = [sys.executable, "-m", "scr_runtime.serve", *arguments]
    environment = os.environ | {"SCR_API_KEY": KEY, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        running = Process(child)
        try:
            yield running
        finally:
            if child.poll() is None:
                running.end(signal.SIGKILL)


def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key=KEY, max_retries=0, timeout=PATIENCE)


def guide() -> tuple[list[str], str]:
    """The arguments of the guide's command, and the client's lines."""
    text = (ROOT / "docs/deploy.md").read_text().partition("## A server")[2]
    shell, code = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("bash", "python"))
    assert shell is not None and code is not None
    assert len([line for line in (shell[1] + code[1]).splitlines() if line]) == 10
    first, _, command = (line.partition("#")[0].split() for line in shell[1].splitlines())
    assert first == ["make", "train"] and command[:3] == [".venv/bin/python", "-m", "scr_runtime.serve"]
    return command[3:], code[1]


def said(events: Any) -> str:
    return "".join(event.choices[0].delta.content or "" for event in events)


@pytest.mark.slow
def test_the_guide_serves_and_so_it_does_after_sigkill_and_told_to_end_it_finishes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code = guide()
    (root,) = [place for place in folder.parents if place / "runs/predictors/scene-llava" == folder]
    arguments = [word.replace("model=scenes", f"model={ROOT}/scenes") for word in arguments]
    asking: Any = {"model": "scene-llava", "messages": [turn("Describe the image.", data_url(picture()))]}
    with process(*arguments, "port=0", cwd=root) as running:
        address = running.wait(r"ready: (http://127\.0\.0\.1:\d+/v1) model='scene-llava' mode=auto")[1]
        shown = Path(f"/proc/{running.child.pid}/cmdline").read_bytes()
        assert b"scr_runtime.serve" in shown and KEY.encode() not in shown
        monkeypatch.chdir(root)
        picture().save("picture.png")
        script = code.replace("http://127.0.0.1:8000/v1", address).replace('"none"', f'"{KEY}"') + "client.close()"
        exec(compile(script, "deploy.md", "exec"), {})
        assert re.search(r"(yes|no) \[\{'provider': '(one|two)-pass'", capsys.readouterr().out)
        with client(address) as caller:
            first = said(caller.chat.completions.create(**asking, stream=True))
            stream = caller.chat.completions.create(**asking, stream=True)
            next(iter(stream))
            assert running.end(signal.SIGKILL) == -signal.SIGKILL and len(first.split()) > 4
            stream.close()
    port = address.rpartition(":")[2].removesuffix("/v1")
    with (
        process(*arguments, f"port={port}", cwd=root) as running,
        client(address) as caller,
        ThreadPoolExecutor(12) as pool,
    ):
        running.wait("ready: ")

        def one(stream: bool) -> str:
            try:
                answer: Any = caller.chat.completions.create(**asking, stream=stream)
                return said(answer) if stream else answer.choices[0].message.content
            except openai.InternalServerError as error:
                return str(error)

        answers = [pool.submit(one, number % 2 == 0) for number in range(12)]
        while not re.search(r"\nscr_queue_length ([4-9]|1\d)", caller.get(f"{address}/../metrics", cast_to=str)):
            assert not all(answer.done() for answer in answers)
        assert running.end(signal.SIGTERM) == 0
        found = Counter(answer.result(PATIENCE) for answer in answers)
        assert found[first] >= 5 and set(found) <= {first, "Error code: 503 - the server is stopping"}
        assert "SIGTERM: requests in flight are answered" in "".join(running.lines)
        assert KEY not in "".join(running.lines)


def test_a_server_that_cannot_serve_ends_with_a_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "scr_runtime")  # both are set back at the end
    caplog.set_level("INFO", "scr_runtime.serve")
    assert main([f"model={CHECKPOINT}", f"predictor={tmp_path}/p", "port=0"]) == 1
    assert "can't serve: PredictorNotFoundError" in caplog.text
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([f"model={CHECKPOINT}", f"port={taken.getsockname()[1]}"]) == 1
    assert "can't listen at 127.0.0.1 port" in caplog.text


def test_help_and_mistakes_start_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--help"]) == 0
    assert "python -m scr_runtime.serve model=" in capsys.readouterr().out
    assert main(["model=m", "prot=1"]) == 2
    assert "did you mean port=" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "scr_runtime.serve.process")
    assert main(["model=m"]) == 2
    assert "pip install 'scr-runtime[serve]'" in capsys.readouterr().err
