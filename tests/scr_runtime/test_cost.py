"""What SCR asks of the device, counted in operators: no syncs, few kernels, no attention matrix, nothing at decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from benchmarks import models
from benchmarks.counting import Count, accelerator_branches, counted
from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor, capture, errors

CONFIG = SCRConfig()  # the paper's for LLaVA-7B: 32 sources, blocks 0-11 edited, attention of blocks 8-16
HEADS = 1
TINY = SCRConfig(num_sources=5, edit_layers=(0, 2), attention_layers=(2, 4))


@pytest.fixture(scope="module")
def narrow() -> Any:
    """32 blocks, 24 x 24 patches, hidden size 64, bfloat16 as on a GPU."""
    return models.build_llava(models.NARROW, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def predictor() -> SourcePredictor:
    config = PredictorConfig(64, context="both")  # the costliest features
    predictor = SourcePredictor(config).eval().requires_grad_(False)
    predictor.set_drift(1.0, 1e9)
    return predictor


@pytest.fixture(autouse=True)
def _on_an_accelerator() -> Iterator[None]:
    with accelerator_branches():
        yield


def prefill(model: Any, scr: AbstractContextManager[Any], batch: int = 1) -> Count:
    inputs = models.llava_inputs(models.NARROW, batch, dtype=torch.bfloat16)
    with torch.no_grad(), scr:
        return counted(lambda: model(**inputs, logits_to_keep=1))


def test_one_pass_adds_few_kernels_and_no_sync(narrow: Any, predictor: SourcePredictor) -> None:
    vanilla = prefill(narrow, nullcontext())
    one_pass = prefill(narrow, SCR(narrow, config=CONFIG, mode="one-pass", predictor=predictor))
    assert one_pass.net(vanilla) <= 70
    assert one_pass.syncs == vanilla.syncs
    uniform = prefill(narrow, SCR(narrow, config=CONFIG, mode="uniform"))
    assert uniform.syncs == vanilla.syncs
    apart = SCRConfig(suppress_claimed=True)  # an ablation: a step per source, and still nothing that waits
    assert prefill(narrow, SCR(narrow, config=apart, mode="one-pass", predictor=predictor)).syncs == vanilla.syncs


def test_auto_waits_once_and_two_pass_never(narrow: Any, predictor: SourcePredictor) -> None:
    vanilla = prefill(narrow, nullcontext())
    for threshold in (0.0, 2.0):
        scr = SCR(narrow, config=CONFIG, mode="auto", predictor=predictor, threshold=threshold)
        assert (prefill(narrow, scr) - vanilla).syncs.total() == 1
    two_pass = prefill(narrow, SCR(narrow, config=CONFIG, mode="two-pass"))
    assert two_pass.syncs == vanilla.syncs


def test_online_adds_few_kernels_and_no_sync(narrow: Any) -> None:
    vanilla = prefill(narrow, nullcontext())
    online = prefill(narrow, SCR(narrow, config=CONFIG.behind_map(32), mode="online"))
    assert online.net(vanilla) <= 123  # eight for each of the nine blocks of the map
    assert online.syncs == vanilla.syncs


def test_the_counter_sees_what_waits() -> None:
    x = torch.arange(6.0)
    waits: list[Any] = [
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.nonzero(),
        lambda: x[x > 2],
        lambda: x.unique(),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.masked_select(x > 2),
        lambda: x.__setitem__(x > 9, torch.zeros(0)),
    ]
    for call in waits:
        assert counted(call).syncs.total() >= 1
    free = counted(lambda: x.view(2, 3).t()[0].expand(4, 2).detach())
    assert (free.kernels.total(), free.syncs.total()) == (0, 0)
    both = counted(lambda: torch.where(x > 2, x, 0).sort(stable=True))
    assert both.syncs.total() == 0
    assert both.kernels.total() >= 3


@pytest.mark.parametrize("mode", ["one-pass", "two-pass", "auto", "online"])
def test_decode_steps_are_those_of_the_model(narrow: Any, predictor: SourcePredictor, mode: Any) -> None:
    inputs = models.llava_inputs(models.NARROW, 1, dtype=torch.bfloat16)
    counts = []
    config = CONFIG.behind_map(32) if mode == "online" else CONFIG
    for scr in (nullcontext(), SCR(narrow, config=config, mode=mode, predictor=predictor)):
        with torch.no_grad(), scr:
            cache = narrow(**inputs, logits_to_keep=1).past_key_values
            token = torch.tensor([[7]])
            counts.append(counted(lambda cache=cache, token=token: narrow(input_ids=token, past_key_values=cache)))
    vanilla, attached = counts
    assert (attached.kernels, attached.syncs) == (vanilla.kernels, vanilla.syncs)


def test_no_attention_matrix_is_made(narrow: Any) -> None:
    vanilla = prefill(narrow, nullcontext())
    two_pass = prefill(narrow, SCR(narrow, config=CONFIG, mode="two-pass"))
    length = models.llava_inputs(models.NARROW)["input_ids"].shape[1]
    rows = length - 576
    new = two_pass.shapes - vanilla.shapes
    assert (1, HEADS, 1, rows, length) in two_pass.shapes  # text rows alone
    assert not [shape for shape in new if shape[-2:] == (length, length)]
    wide = [shape for shape in new if length in shape[-2:] and len(shape) > 3]
    assert max(torch.Size(shape).numel() for shape in wide) == HEADS * rows * length
    assert two_pass.largest == vanilla.largest


def test_non_finite_scores_raise_at_the_next_free_moment(tiny_llava: Any, llava_inputs: Any) -> None:
    model = tiny_llava(1)
    inputs = llava_inputs(model, [1, 1])
    predictor = SourcePredictor(PredictorConfig(32, rank=4)).requires_grad_(False)
    predictor.score.bias.fill_(float("nan"))
    with torch.no_grad():
        scr = SCR(model, config=TINY, mode="one-pass", predictor=predictor).attach()
        model(**inputs)  # returns: nothing has waited
        with pytest.raises(errors.NonFiniteScoresError, match="NaN"):
            model(input_ids=torch.tensor([[5]]))
        model(**inputs)
        with pytest.raises(errors.NonFiniteScoresError, match="NaN"):
            _ = scr.reports
        model(**inputs)
        with pytest.raises(errors.NonFiniteScoresError, match="NaN"):
            scr.detach()
        assert scr.stats.mean_confidence is None
    assert len(capture(model, TINY, inputs)) == 2  # detached all the same
