from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.transfer import OnGrids, Some, halves, over_seeds
from configs import load_config

SMALL, MIDDLE, LARGE = (2, 3), (3, 3), (2, 6)


class Data:
    """Four rows of three grids, in batches of one grid each."""

    directory = "runs/harvest/x"

    def __init__(self) -> None:
        self.identity = {"seed": 0}

    def grids(self, split: str) -> list[Any]:
        return [LARGE, SMALL, MIDDLE, SMALL]

    def loader(self, split: str, shuffle: bool = False) -> Any:
        class Loader(list[Any]):
            sampler = batch_sampler = object()

        return Loader({"grid": list(grid), "split": split} for grid in (LARGE, SMALL, MIDDLE))


def test_grids_are_halved_by_their_patches() -> None:
    data: Any = Data()
    assert halves(data) == ([SMALL], [MIDDLE, LARGE])
    one: Any = SimpleNamespace(directory="d", grids=lambda _: [SMALL, SMALL])
    with pytest.raises(SystemExit, match=r"d has one grid, \(2, 3\)"):
        halves(one)


def test_only_batches_of_the_grids_are_read_and_counted() -> None:
    data: Any = Data()
    loader = data.loader("train")
    some = Some(loader, [SMALL, MIDDLE])
    assert [batch["grid"] for batch in some] == [[2, 3], [3, 3]] == [batch["grid"] for batch in some]
    assert len(some) == 2 and some.sampler is loader.sampler
    part = OnGrids(data, [SMALL])
    assert part.count("train") == 2 and [len(part.train_dataloader()), len(part.test_dataloader())] == [1, 1]
    assert part.identity == {"seed": 0, "grids": [SMALL]}


def test_seeds_are_summed_up() -> None:
    configs = [load_config([f"seed={seed}"]) for seed in (0, 1)]
    found = over_seeds(lambda config: [0.5 + config.seed / 10, float(np.sqrt(config.seed))], configs)
    assert found == ["0.550 (0.500 to 0.600)", "0.500 (0.000 to 1.000)"]
