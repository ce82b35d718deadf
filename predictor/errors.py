"""What can go wrong with a fit. Each message names the key or the file, and the way out.

FitError                     the fit diverged, or its data cannot be fitted to
└── CheckpointMissingError   there is no checkpoint where one was expected

Preempted is not an error: SIGTERM came, and the fit was saved.
"""

from __future__ import annotations


class FitError(ValueError):
    """A user can mend it: scores that are not finite, an empty split, too few images, an unreadable checkpoint."""


class CheckpointMissingError(FitError, FileNotFoundError):
    """There is no checkpoint where one was expected."""


class Preempted(Exception):  # noqa: N818 - like KeyboardInterrupt, it is not an error
    """SIGTERM came; `last.ckpt` is on the disk, and `fit` with `resume` continues from it."""
