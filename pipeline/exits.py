"""How a command ends: exit codes and last lines for errors that a user caused, signals, and full disks."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

from data.errors import DataError
from evaluation.errors import EvaluationError
from evaluation.tables import paragraph
from export.errors import ExportError, PublishError
from pipeline.errors import RunError
from predictor.errors import FitError, Preempted
from scr_runtime.errors import SCRError
from scr_runtime.terminal import columns, filled

USER_ERRORS = (DataError, SCRError, FitError, ExportError, PublishError, EvaluationError, RunError)
"""Errors that a user caused or can mend: their message is enough. Every other error keeps its traceback."""


class TerminatedError(BaseException):
    """SIGTERM came outside of a fit. Like KeyboardInterrupt, no library's `except Exception` takes it for an error."""


STOPS = (KeyboardInterrupt, SystemExit, Preempted, TerminatedError)
"""What ends a command, and with it a sweep, not one child alone."""


def way_on(resumes: bool) -> str:
    """What to do with a run that was stopped.

    Args:
        resumes: The run's `trainer.resume`.
    """
    if resumes:
        return "run the same command again to resume"
    return "run it with trainer.resume=true to resume; the same command begins the fit again (trainer.resume=false)"


def exit_code(command: Callable[[], int], resumes: bool = True) -> int:
    """Runs a command and turns what it raises into its last line and its exit code.

    Args:
        command: The command.
        resumes: Whether the same command resumes what is stopped.

    Returns:
        The command's own code; 1 for an error that a user caused; 130 after Ctrl-C, 143 after SIGTERM, as a shell
        reports a process that these signals ended.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)  # a fit sets a handler of its own while it runs
    try:
        return command()
    except USER_ERRORS as error:
        print(_told(error), file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: the disk is full ({error}). Free some space and run the same command again: finished shards and "
            "epochs are kept.",
            file=sys.stderr,
        )
        return 1
    except (Preempted, TerminatedError) as stop:
        print(f"\n{paragraph(str(stop))}\n{paragraph(_sentence(way_on(resumes)))}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        words = f"Stopped. Finished shards, epochs and answers are kept; {way_on(resumes)}."
        print(f"\n{paragraph(words)}", file=sys.stderr)
        return 130


def print_error(error: Exception) -> None:
    """Prints an error that does not end the command: one line for what a user caused, else the traceback."""
    if isinstance(error, USER_ERRORS):
        print(_told(error), file=sys.stderr)
    else:
        traceback.print_exception(error)


def quieten_libraries() -> None:
    """Silences advice about workers, and notices of libraries about each other.

    A command that fits or reads checkpoints calls it again once Lightning is imported, which sets its level anew.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.loggers.mlflow").setLevel(logging.ERROR)  # "experiment not found"
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*number of training batches.*smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)


def _told(error: Exception) -> str:
    """An error's message, each line that is wider than the terminal wrapped at its own indent."""
    lines = f"error: {error}".splitlines()
    indents = [line[: len(line) - len(line.lstrip())] for line in lines]
    return "\n".join(
        line if len(line) <= columns() else filled(line.lstrip(), indent, indent)
        for line, indent in zip(lines, indents, strict=True)
    )


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _on_sigterm(*_: object) -> None:
    raise TerminatedError("SIGTERM: what was finished is kept.")
