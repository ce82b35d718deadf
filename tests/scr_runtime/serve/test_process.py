"""The real process: how it starts, how it ends, and the lines of the guide."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
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


def test_killed_and_started_again_it_serves_and_told_to_end_it_finishes(folder: Path) -> None:
    arguments = [f"model={CHECKPOINT}", f"predictor={folder}", "name=scene-llava"]
    messages: Any = [turn("Describe the image.", data_url(picture()))]
    with process(*arguments, "port=0") as running:
        address = running.wait(r"ready: (http://127\.0\.0\.1:\d+/v1) model='scene-llava' mode=auto")[1]
        shown = Path(f"/proc/{running.child.pid}/cmdline").read_bytes()
        assert b"scr_runtime.serve" in shown and KEY.encode() not in shown
        with client(address) as caller:
            first = caller.chat.completions.create(model="scene-llava", messages=messages)
            stream = caller.chat.completions.create(model="scene-llava", messages=messages, stream=True)
            next(iter(stream))
            assert running.end(signal.SIGKILL) == -signal.SIGKILL
            with pytest.raises((openai.APIConnectionError, Exception)):
                list(stream)
    port = address.rpartition(":")[2].removesuffix("/v1")
    with process(*arguments, f"port={port}") as running, client(address) as caller, ThreadPoolExecutor(4) as pool:
        running.wait("ready: ")
        assert caller.chat.completions.create(model="scene-llava", messages=messages).choices == first.choices

        def one(_: int) -> bool:
            return caller.chat.completions.create(model="scene-llava", messages=messages).choices == first.choices

        answers = [pool.submit(one, number) for number in range(4)]
        stream = caller.chat.completions.create(model="scene-llava", messages=messages, stream=True)
        next(iter(stream))
        assert running.end(signal.SIGTERM) == 0
        said = [event.choices[0].delta.content for event in stream]
        assert "".join(filter(None, said)) == first.choices[0].message.content
        assert all(answer.result(PATIENCE) for answer in answers)
        assert "SIGTERM: requests in flight are answered" in "".join(running.lines)
        assert KEY not in "".join(running.lines)


def test_a_predictor_that_is_not_there_ends_it_with_a_sentence(tmp_path: Path) -> None:
    with process(f"model={CHECKPOINT}", f"predictor={tmp_path}/p", "port=0") as running:
        assert running.child.wait(PATIENCE) == 1
        running.wait("can't serve: PredictorNotFoundError")


def test_help_and_mistakes_start_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--help"]) == 0
    assert "python -m scr_runtime.serve model=" in capsys.readouterr().out
    assert main(["model=m", "prot=1"]) == 2
    assert "did you mean port=" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "scr_runtime.serve.process")
    assert main(["model=m"]) == 2
    assert "pip install 'scr-runtime[serve]'" in capsys.readouterr().err


def test_the_lines_of_the_guide_serve_the_fitted_model(folder: Path) -> None:
    """From `make train` on: the command as printed, where its predictor is, and the client's lines against it."""
    guide = (ROOT / "docs/deploy.md").read_text().partition("## A server")[2]
    shell, code = (re.search(rf"```{kind}\n(.*?)```", guide, re.DOTALL) for kind in ("bash", "python"))
    assert shell is not None and code is not None
    assert len((shell[1] + code[1]).strip().splitlines()) <= 15
    first, _, command = (line.partition("#")[0].split() for line in shell[1].splitlines())
    assert first == ["make", "train"] and command[:3] == [".venv/bin/python", "-m", "scr_runtime.serve"]
    (root,) = [place for place in folder.parents if (place / "runs/predictors/scene-llava") == folder]
    given = [word.replace("model=scenes", f"model={ROOT}/scenes") for word in command[3:]]
    with process(*given, "port=0", cwd=root) as running:
        address = running.wait(r"ready: (\S+) model='scene-llava'")[1]
        script = code[1].replace("http://127.0.0.1:8000/v1", address).replace("picture.png", "runs/picture.png")
        picture().save(root / "runs/picture.png")
        environment = os.environ | {"SCR_API_KEY": KEY}
        asked = subprocess.run(
            [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True
        )
        assert asked.returncode == 0, asked.stderr
        assert re.search(r"'provider': '(one|two)-pass'", asked.stdout), asked.stdout
