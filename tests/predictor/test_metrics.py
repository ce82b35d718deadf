import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

from predictor.metrics import (
    METRICS,
    SourceMetrics,
    bootstrap_interval,
    group_ids,
    iou,
    mass_at_k,
    ndcg_at_k,
    recall_at_k,
    spearman,
    summarise_rows,
)
from scr_runtime.config import Connectivity, SCRConfig
from scr_runtime.redistribute import claim_neighbours
from scr_runtime.rule import SourceRule, source_rule

K = 5
GRID = (5, 6)


def _rows(rows: int = 7, seed: int = 0, k: int = K) -> tuple[Tensor, Tensor, SourceRule]:
    generator = torch.Generator().manual_seed(seed)
    eligible = torch.ones(30, dtype=torch.bool)
    eligible[::6] = False
    scores = torch.randn(rows, 30, generator=generator)
    scores[:, ~eligible] = 100.0
    attention = torch.rand(rows, 30, generator=generator).pow(4)
    attention[:, ~eligible] = 100.0
    return scores, attention, SourceRule(SCRConfig(), GRID, eligible, k, None)


def test_recall_and_mass_equal_a_loop() -> None:
    scores, attention, rule = _rows()
    kept = [i for i in range(30) if rule.eligible[i]]
    for row in range(len(scores)):
        chosen = sorted(kept, key=lambda i: -float(scores[row, i]))[:K]
        best = sorted(kept, key=lambda i: -float(attention[row, i]))[:K]
        mass = sum(float(attention[row, i]) for i in chosen) / sum(float(attention[row, i]) for i in best)
        assert float(recall_at_k(scores, attention, rule)[row]) == pytest.approx(len(set(chosen) & set(best)) / K)
        assert float(mass_at_k(scores, attention, rule)[row]) == pytest.approx(mass, rel=1e-5)


@pytest.mark.parametrize("k", [1, 5, 25])
def test_ndcg_equals_torchmetrics(k: int) -> None:
    scores, attention, rule = _rows(k=k)
    rows = zip(scores[:, rule.eligible], attention[:, rule.eligible], strict=True)
    wanted = torch.stack([retrieval_normalized_dcg(s, a, top_k=k) for s, a in rows])
    torch.testing.assert_close(ndcg_at_k(scores, attention, rule), wanted)


def test_spearman_equals_scipy_with_ties() -> None:
    scores, attention, rule = _rows()
    scores = (scores * 2).round()
    wanted = [
        np.corrcoef(rankdata(s[rule.eligible].numpy()), rankdata(a[rule.eligible].numpy()))[0, 1]
        for s, a in zip(scores, attention, strict=True)
    ]
    np.testing.assert_allclose(spearman(scores, attention, rule).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_bounds(name: str) -> None:
    scores, attention, rule = _rows()
    metric = METRICS[name]
    torch.testing.assert_close(metric(attention * 3, attention, rule), torch.ones(7))
    assert (metric(scores, attention, rule) < 1).all()
    worst = metric(-attention, attention, rule)
    among_all = name in ("recall", "iou")  # of a map without attention they take the first patches for true
    assert (worst < metric(scores, attention, rule)).all() or among_all
    assert not metric(scores, torch.zeros_like(attention), rule).any() or among_all


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("exclude_border", [False, True])
def test_iou_is_that_of_what_the_runtime_edits(exclude_border: bool, connectivity: Connectivity) -> None:
    scores, attention, _ = _rows()
    rule = source_rule(SCRConfig(num_sources=K, exclude_border=exclude_border, connectivity=connectivity), GRID)
    edited: list[list[set[int]]] = []
    for values in (scores, attention):
        patches, owned = claim_neighbours(rule.choose(values), GRID, connectivity)
        rows = zip(patches.transpose(0, 1), owned.transpose(0, 1), strict=True)
        edited.append(
            [{int(p) % 30 for p in row[:1].flatten()} | {int(p) % 30 for p in row[own]} for row, own in rows]
        )
    wanted = [len(a & b) / len(a | b) for a, b in zip(*edited, strict=True)]
    assert iou(scores, attention, rule).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("name", METRICS)
def test_a_choice_that_keeps_apart_is_judged_by_its_own_rule(name: str) -> None:
    scores, attention, _ = _rows()
    rule = source_rule(SCRConfig(num_sources=K, suppress_claimed=True), GRID)
    torch.testing.assert_close(METRICS[name](attention * 3, attention, rule), torch.ones(7))
    if name == "recall":
        wanted = [
            len({*a} & {*b}) / rule.k
            for a, b in zip(rule.choose(scores).tolist(), rule.choose(attention).tolist(), strict=True)
        ]
        assert recall_at_k(scores, attention, rule).tolist() == pytest.approx(wanted)


def test_random_scores_recall_k_of_n() -> None:
    scores, attention, rule = _rows(rows=2000)
    recall = recall_at_k(scores, attention, rule).mean()
    assert float(recall) == pytest.approx(K / int(rule.eligible.sum()), abs=0.02)


def test_class_is_the_mean_of_rows_over_uneven_batches() -> None:
    scores, attention, rule = _rows(rows=10)
    keys = [f"{i // 2:012d}" for i in range(10)]
    metrics = SourceMetrics(keep_rows=True)
    for part in (slice(0, 6), slice(6, 7), slice(7, 10)):
        metrics.update(scores[part], attention[part], rule, keys[part])
    values, rows = metrics.compute(), metrics.rows()
    for name, metric in METRICS.items():
        wanted = metric(scores, attention, rule)
        torch.testing.assert_close(values[name], wanted.mean())
        np.testing.assert_array_equal(rows[name], wanted.numpy())
    assert len(set(rows["group"].tolist())) == 5
    metrics.reset()
    assert len(metrics.rows()["recall"]) == 0


def test_class_refuses_rows_without_keys() -> None:
    scores, attention, rule = _rows()
    with pytest.raises(ValueError, match="key"):
        SourceMetrics(keep_rows=True).update(scores, attention, rule)
    with pytest.raises(ValueError, match="keep_rows=True"):
        SourceMetrics().rows()


def test_group_ids_are_stable() -> None:
    ids = group_ids(["000000000007", "000000000008", "000000000007"])
    assert ids[0] == ids[2] != ids[1]
    assert ids.dtype == torch.long


def test_bootstrap_interval_covers_the_mean_and_repeats_itself() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(0.7, 0.1, 400)
    interval = bootstrap_interval(values, np.arange(400), repeats=2000, seed=3)
    assert interval == bootstrap_interval(values, np.arange(400), repeats=2000, seed=3)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_bootstrap_draws_whole_images() -> None:
    image = np.random.default_rng(0).normal(size=100)
    once = bootstrap_interval(image, np.arange(100))
    copied = bootstrap_interval(np.repeat(image, 4), np.repeat(np.arange(100), 4))
    np.testing.assert_allclose(copied, once)  # four equal rows of an image weigh as much as one


def test_bootstrap_weighs_images_by_their_rows() -> None:
    interval = bootstrap_interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert interval.mean == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)


@pytest.mark.parametrize(("values", "groups"), [([], []), ([1.0], [1, 2]), ([[1.0]], [[1]])])
def test_bootstrap_refuses_bad_rows(values: list[float], groups: list[int]) -> None:
    with pytest.raises(ValueError, match="shape"):
        bootstrap_interval(values, groups)


def test_summary_has_every_metric() -> None:
    scores, attention, rule = _rows()
    metrics = SourceMetrics(keep_rows=True)
    metrics.update(scores, attention, rule, [str(i) for i in range(7)])
    summary = summarise_rows(metrics.rows(), repeats=50)
    assert set(summary) == set(METRICS)
    assert all(low <= mean <= high for mean, low, high in summary.values())
