from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from predictor.baselines import (
    OtherPrompts,
    PositionMean,
    RandomScores,
    evaluate,
    floors,
    negative_norm,
    norm,
)
from predictor.batch import SourceCount
from predictor.errors import FitError
from predictor.metrics import METRICS
from scr_runtime.config import SCRConfig
from scr_runtime.rule import source_rule

SCR = SCRConfig(num_sources=6)
OPEN = SCRConfig(num_sources=6, exclude_border=False)


def _batch(grid: tuple[int, int] = (4, 5), rows: int = 3, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    return {
        "states": torch.randn(rows, patches, 6, generator=generator).bfloat16(),
        "attention": torch.rand(rows, patches, generator=generator),
        "question": torch.randn(rows, 6, generator=generator),
        "grid": grid,
        "key": [f"{i:012d}" for i in range(rows)],
    }


def test_norms() -> None:
    batch = _batch()
    wanted = batch["states"].float().square().sum(dim=-1).sqrt()
    torch.testing.assert_close(norm(batch), wanted)
    torch.testing.assert_close(negative_norm(batch), -wanted)


def test_random_is_seeded() -> None:
    first, second, other = RandomScores(3), RandomScores(3), RandomScores(4)
    batch = _batch()
    assert first(batch).equal(second(batch))
    assert not first(batch).equal(other(batch))
    assert first(batch).shape == batch["attention"].shape


def test_position_mean_is_the_mean_of_normalised_maps() -> None:
    batches = [_batch(seed=1), _batch(seed=2, rows=1)]
    eligible = source_rule(SCR, (4, 5)).eligible
    maps = torch.cat([b["attention"] for b in batches])[:, eligible]
    wanted = (maps / maps.sum(dim=-1, keepdim=True)).mean(dim=0)
    scores = PositionMean.fit(batches, SCR)(_batch(seed=9))
    assert scores.shape == (3, 20)
    torch.testing.assert_close(scores[0, eligible], wanted)
    assert scores[0].equal(scores[2])


def test_position_mean_resamples_for_an_unknown_grid() -> None:
    ramp = _batch()
    ramp["attention"] = torch.arange(20.0).expand(3, 20)
    scores = PositionMean.fit([ramp], OPEN)(_batch(grid=(8, 10)))
    assert scores.shape == (3, 80)
    assert (scores[0].view(8, 10).diff(dim=0) >= 0).all()


def _bump(grid: tuple[int, int], rows: int) -> dict[str, Any]:
    """Maps whose inner patches follow the relative place, with a border that counts for nothing."""
    batch = _batch(grid=grid, rows=rows)
    row = torch.linspace(0, 1, grid[0] - 1)[1:, None] - 0.5 / (grid[0] - 2)
    column = torch.linspace(0, 1, grid[1] - 1)[None, 1:] - 0.5 / (grid[1] - 2)
    inner = 1 + 2 * row + column  # linear, so that bilinear resampling keeps it
    batch["attention"] = torch.nn.functional.pad(inner, [1] * 4, value=9.0).flatten().expand(rows, -1)
    return batch


@pytest.mark.parametrize("grid", [(8, 10), (12, 6), (5, 3), (3, 3)])
def test_position_mean_is_one_of_relative_places(grid: tuple[int, int]) -> None:
    prior = PositionMean.fit([_bump((6, 8), 5), _bump((10, 7), 3)], SCR)
    wanted = _bump(grid, 1)["attention"] * source_rule(SCR, grid).eligible
    scores = prior(_batch(grid=grid))[0]
    assert torch.equal(scores == 0, wanted[0] == 0)  # the border is not blurred in
    torch.testing.assert_close(scores, wanted[0] / wanted.sum(), atol=0.004, rtol=0.15)


def test_position_mean_weighs_a_grids_own_rows_against_the_others() -> None:
    def peculiar(rows: int) -> dict[str, Any]:
        batch = _batch(grid=(6, 8), rows=rows)
        batch["attention"] = torch.eye(48)[9].expand(rows, -1)
        return batch

    def own(rows: int) -> float:
        scores = PositionMean.fit([_bump((10, 7), 50), peculiar(rows)], SCR)(_batch(grid=(6, 8)))[0]
        assert scores.sum() == pytest.approx(1, abs=1e-5)
        return float(scores[9])

    assert own(1) < own(32) < own(1000) and own(1) < 0.1 and own(1000) > 0.95
    alone = PositionMean.fit([peculiar(3)], SCR)(_batch(grid=(6, 8)))[0]
    assert torch.equal(alone, torch.eye(48)[9])


def test_position_mean_needs_a_map() -> None:
    with pytest.raises(FitError, match="at least one"):
        PositionMean.fit([], SCR)


def test_other_prompts_leaves_the_own_map_out() -> None:
    batch = _batch(rows=3)
    batch["key"] = ["a"] * 3
    scores = OtherPrompts.fit([batch], OPEN)(batch)
    share = batch["attention"] / batch["attention"].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(scores[0], share[1] + share[2])


def test_other_prompts_are_those_of_the_same_grid() -> None:
    batch = _batch(rows=4)
    batch |= {"key": ["a"] * 4, "place": [0, 1, 0, 1]}
    scores = OtherPrompts.fit([batch], OPEN)(batch)
    share = batch["attention"] / batch["attention"].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(scores, share[[2, 3, 0, 1]])


def test_other_prompts_needs_two() -> None:
    batch = _batch()
    with pytest.raises(FitError, match="prompts_per_image"):
        OtherPrompts.fit([batch], SCR)(batch)


def test_evaluate_gives_every_floor_the_same_rows(make_loader: Callable[..., Any]) -> None:
    train, test = make_loader(images=30, seed=1), make_loader(images=20, seed=2)
    results = {name: evaluate(score, test, SCR) for name, score in floors(train, SCR).items()}
    assert set(results) == {"random", "position", "negative_norm", "norm"}
    for rows in results.values():
        assert {len(rows[name]) for name in METRICS} == {40}
        np.testing.assert_array_equal(rows["group"], results["random"]["group"])
    assert results["position"]["mass"].mean() > results["random"]["mass"].mean()
    ceiling = evaluate(OtherPrompts.fit(test, SCR), test, SCR)
    assert ceiling["mass"].mean() > results["position"]["mass"].mean()


def test_evaluate_caps_the_sources_of_a_small_grid() -> None:
    rows = evaluate(
        lambda batch: batch["attention"], [_batch()], SCRConfig(num_sources=32)
    )  # 6 interior patches: K = 3
    np.testing.assert_allclose(rows["recall"], 1.0)


def test_evaluate_counts_a_share_of_each_grid() -> None:
    scr = SCRConfig(source_fraction=0.25, exclude_border=False)
    batches = [_batch(), _batch(grid=(6, 6))]  # K = 5 and 9
    rows = evaluate(lambda batch: -batch["attention"], batches, scr)
    assert (rows["recall"] == 0).all()  # at most half of the patches are chosen
    rows = evaluate(norm, batches, scr)
    assert {round(float(value) * k, 4) % 1 for value, k in zip(rows["recall"], [5] * 3 + [9] * 3, strict=True)} == {0}


def test_the_sources_that_were_used_are_counted() -> None:
    same = SourceCount.of([(8, 8)] * 5, SCR)
    assert (same.fewest, same.mean, same.most) == (6, 6, 6) and str(same) == "6 (16.7% of the eligible patches)"
    mixed = SourceCount.of([(8, 8)] * 3 + [(4, 4), (3, 3)], SCR)  # K = 6 of 36, 2 of 4, 1 of 1
    assert (mixed.fewest, mixed.mean, mixed.most) == (1, 21 / 5, 6)
    assert mixed.share == pytest.approx((3 / 6 + 1 / 2 + 1) / 5)
    assert str(mixed) == "1 to 6 (mean 4.2, 40.0% of the eligible patches)"
    fraction = SourceCount.of([(8, 8), (4, 4)], SCRConfig(source_fraction=0.25, exclude_border=False))
    assert (fraction.fewest, fraction.most, fraction.share) == (4, 16, 0.25)
    assert mixed.metrics() == {"k_min": 1, "k_mean": 4.2, "k_max": 6, "k_share": mixed.share}


def test_random_scores_recall_what_the_share_says() -> None:
    batches = [_batch(grid=grid, rows=400, seed=seed) for seed, grid in enumerate([(8, 8), (4, 5), (3, 3)])]
    rows = evaluate(RandomScores(1), batches, SCR)
    grids = [batch["grid"] for batch in batches for _ in range(400)]
    assert rows["recall"].mean() == pytest.approx(SourceCount.of(grids, SCR).share, abs=0.02)
