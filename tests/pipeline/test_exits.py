"""What a command says when it is stopped: what the same command does next."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from pipeline.errors import RunError
from pipeline.exits import exit_code
from predictor.errors import Preempted


@pytest.fixture(autouse=True)
def _former_handler() -> Iterator[None]:
    former = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize(
    ("resumes", "words"),
    [
        (True, "run the same command again to resume."),
        (False, "run it with trainer.resume=true to resume; the same command begins the fit again "
                "(trainer.resume=false)."),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Preempted("SIGTERM in epoch 3"), 143)])
def test_a_stopped_command_says_how_it_goes_on(
    stop: BaseException, code: int, resumes: bool, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise stop

    assert exit_code(command, resumes) == code
    said = " ".join(capsys.readouterr().err.split())
    assert said.lower().endswith(words.lower())


def test_an_error_fits_the_terminal_line_by_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")

    def command() -> int:
        raise RunError("2 problems\n  " + "words " * 20 + "\n  short  and spaced")

    assert exit_code(command) == 1
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 60 and lines[0] == "error: 2 problems" and lines[-1] == "  short  and spaced"
    assert len(lines) == 5 and all(line.startswith("  words") for line in lines[1:-1])
