"""Lines for a user who watches a progress bar."""

from __future__ import annotations

from tqdm import tqdm

from scr_runtime.terminal import filled


def log(topic: str, message: str) -> None:
    """Prints a line above the progress bars."""
    tqdm.write(filled(f"{topic}: {message}", rest="  "))
