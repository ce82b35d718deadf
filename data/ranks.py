"""Which part of a job this process has, when a launcher started several of them.

Ranks never exchange messages: rank r of n takes the shards r, r + n, r + 2n, ... of the plan. So a rank may start
hours after the others, die, or be started again with another n: whole shards are kept, whichever rank made them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from data.errors import RankError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Rank:
    """This process among the processes of one job.

    Attributes:
        number: 0 .. size - 1.
        size: processes of the job.
        local: number of this process on its machine; None if the launcher does not set it.
        variables: the environment variables that this was read from, for messages.
    """

    number: int = 0
    size: int = 1
    local: int | None = None
    variables: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.size:
            raise RankError(
                f"rank {self.number} of {self.size} ({self.variables or 'given'}): ranks are 0 to "
                f"{max(0, self.size - 1)}. Correct or unset these variables."
            )

    def share(self, items: Sequence[_T]) -> list[_T]:
        """Every size-th item, from this rank's number on: the shares of all ranks are the items, each once."""
        return list(items[self.number :: self.size])

    def owner(self, position: int) -> int:
        """The rank whose share the item at a position is in."""
        return position % self.size

    def device(self, device: str, count: int) -> str:
        """The device of this rank: `auto` and `cuda` become one of the machine's CUDA devices, in turn.

        Args:
            device: as configured.
            count: CUDA devices that this process sees (a launcher may show each process only its own).
        """
        if device not in ("auto", "cuda") or self.local is None or count == 0:
            return device
        return f"cuda:{self.local % count}"

    def __str__(self) -> str:
        return f"rank {self.number} of {self.size}"


def rank_of_this_process(environment: Mapping[str, str] = os.environ) -> Rank:
    """Reads what a launcher has set: torchrun, a Slurm job array, srun, or both of the latter; else rank 0 of 1.

    `RANK` and `WORLD_SIZE` (torchrun; or set by hand, for any other launcher) come before Slurm's variables. A Slurm
    array of n tasks with m processes each is n * m ranks. Array numbers may start anywhere and have any step.

    Raises:
        RankError: a variable is not a number, its counterpart is missing, or a rank is out of range.
    """

    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name)
        if text is None and default is not None:
            return default
        if text is None:
            raise RankError(f"{name} is missing: set it, or unset the variables that go with it.")
        try:
            return int(text)
        except ValueError:
            raise RankError(f"{name}={text!r} is not a whole number: correct or unset it.") from None

    def local(name: str) -> int | None:
        return number(name) if name in environment else None

    if "RANK" in environment or "WORLD_SIZE" in environment:
        return Rank(number("RANK"), number("WORLD_SIZE"), local("LOCAL_RANK"), "RANK, WORLD_SIZE")
    index, count, names = 0, 1, []
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        index, count = (number("SLURM_ARRAY_TASK_ID") - first) // max(1, step), number("SLURM_ARRAY_TASK_COUNT")
        names += ["SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"]
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        tasks = number("SLURM_NTASKS")
        index, count = index * tasks + number("SLURM_PROCID"), count * tasks
        names += ["SLURM_PROCID", "SLURM_NTASKS"]
    return Rank(index, count, local("SLURM_LOCALID"), ", ".join(names)) if names else Rank()
