"""Mode online: the map of the running pass's own attention, against one eager pass with loops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from scr_runtime import SCR, SCRConfig, errors
from scr_runtime.here import here
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.leftovers import snapshot
from tests.scr_runtime.questions import ask
from tests.scr_runtime.reference import (
    decoder_blocks,
    eager_copy,
    hook_count,
    kept,
    reference_edit,
    reference_images,
    reference_sources,
)
from tests.scr_runtime.test_families import GENERATING, compare_greedy_tokens, every
from tests.scr_runtime.test_interrupts import interrupt_a_prefill_before_any_line
from tests.scr_runtime.tiny_families import TINY, Prompt, Tiny

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(4, 5), attention_layers=(1, 3))


def attention_weights(block: Any, found: list[Tensor]) -> None:
    """Keeps the attention weights [B, heads, S, S] that a block computes."""
    if hasattr(block, "attn"):  # Qwen-VL, the first one: its attention is a method
        inner = block.attn._attn
        block.attn._attn = lambda *args: found.append(inner(*args)[1]) or inner(*args)
    else:
        block.self_attn.register_forward_hook(lambda module, args, output: found.append(output[1]))


def one_pass_with_loops(model: Any, prompt: Prompt) -> tuple[Tensor, list[list[int]]]:
    """One eager pass: weights are kept on the way, and what they choose is edited in the blocks behind."""
    eager, weights, sources = eager_copy(model), list[Tensor](), list[list[int]]()
    (first, last), blocks = CONFIG.attention_layers, decoder_blocks(eager)
    for layer in range(first, last + 1):
        attention_weights(blocks[layer], weights)

    def edit(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        mean = torch.stack(weights).mean((0, 2))  # [B, S, S]
        assert len(weights) == last - first + 1
        for n, (row, positions, grid) in enumerate(prompt.images):
            text = prompt.inputs["attention_mask"][row].bool() & ~prompt.visual[row]
            text[: positions[-1]] = False
            if n == len(sources):
                sources.append(reference_sources(mean[row][text][:, positions].mean(0), CONFIG, grid))
            reference_edit(hidden[row], prompt.images[n], sources[n], CONFIG)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for layer in range(CONFIG.edit_layers[0], CONFIG.edit_layers[1] + 1):
        blocks[layer].register_forward_hook(edit)
    with torch.no_grad():
        return eager(**prompt.inputs).logits, sources


def logits_of(model: Any, inputs: Any, mode: Any = "online", **kwargs: Any) -> tuple[Tensor, SCR]:
    with torch.no_grad(), SCR(model, config=CONFIG, mode=mode, **kwargs) as scr:
        return model(**inputs).logits, scr


# -- exactness -------------------------------------------------------------------------------------------------------


@every()
def test_online_equals_one_eager_pass_with_loops(tiny: Tiny) -> None:
    for attn in tiny.attentions:
        model = tiny.model(2, attn)
        prompt = tiny.prompt(model, [2, 1, 0], seed=2)
        expected, sources = one_pass_with_loops(model, prompt)
        logits, scr = logits_of(model, prompt.inputs)
        assert [report.sources for report in scr.reports] == sources
        assert torch.allclose(kept(prompt.inputs, logits), kept(prompt.inputs, expected), atol=1e-4, rtol=0)
        with torch.no_grad():
            moved = kept(prompt.inputs, model(**prompt.inputs).logits) - kept(prompt.inputs, logits)
        assert moved.abs().max() > 0.02
        two_pass, other = logits_of(model, prompt.inputs, "two-pass")  # the same map: no edit comes before it
        assert torch.equal(two_pass, logits)
        assert [report.entropy for report in scr.reports] == [report.entropy for report in other.reports]


@every(GENERATING)
@pytest.mark.parametrize("images", [[2], [1, 2, 1]], ids=["two-images", "padded-batch"])
def test_greedy_tokens_equal_the_reference(tiny: Tiny, images: list[int]) -> None:
    compare_greedy_tokens(tiny, images, CONFIG, "online")


@every(GENERATING)
def test_beams_and_rows_of_a_padded_batch(tiny: Tiny) -> None:
    model = tiny.model(8)
    prompt = tiny.prompt(model, [1, 2], seed=8)
    beams: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False, "suppress_tokens": [99]}
    with SCR(model, config=CONFIG, mode="online"):
        cached, uncached = (model.generate(**prompt.inputs, use_cache=use, **beams) for use in (True, False))
        assert torch.equal(cached, uncached)
        batch = model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        for row in range(2):
            single = model.generate(**prompt.row(row), max_new_tokens=4, do_sample=False)
            assert torch.equal(single[0, -4:], batch[row])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_prompt_that_continues_a_filled_cache(attn: str, static: bool) -> None:
    """The map is the running pass's, which sees the earlier turns: two-pass refuses such a prompt."""
    model: Any = make_tiny_llava(4, attn=attn)
    inputs = make_inputs(model, [1], seed=4)
    earlier = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(4))
    ids = torch.cat([earlier, inputs["input_ids"]], 1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected, scr = logits_of(model, whole)
    sources = [report.sources for report in scr.reports]
    settings: Any = model.config.get_text_config()
    cache: Any = StaticCache(settings, max_cache_len=ids.shape[1] + 5) if static else DynamicCache(config=settings)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="online") as scr:
        model(input_ids=earlier, past_key_values=cache)
        given = whole | {"input_ids": inputs["input_ids"], "past_key_values": cache}
        logits = model(**given).logits
    assert [report.sources for report in scr.reports] == sources
    assert torch.allclose(logits, expected[:, 7:], atol=1e-5, rtol=0)


def test_a_sessions_questions() -> None:
    model: Any = make_tiny_llava(9)
    inputs = make_inputs(model, [1], seed=9)
    questions = [ask(inputs, [count], seed) for seed, count in enumerate((5, 9, 2))]
    expected = [logits_of(model, question)[0] for question in questions]
    with torch.no_grad(), SCR(model, config=CONFIG, mode="online") as scr, scr.image(**inputs) as image:
        for question, logits in zip(questions, expected, strict=True):
            assert torch.allclose(image(**question).logits, logits, atol=1e-5, rtol=0)
            assert scr.reports[0].provider == "online"
        assert image._kept is not None and not image._kept.tensors  # no prefix: nothing is run twice


def test_decoders_that_mix_attention_of_different_reach_are_read() -> None:
    """Each block's own mask is at hand in the running pass; the nested run knows that of one."""
    model = TINY["qwen2-vl"].model(12)
    text = model.model.language_model
    text.config.layer_types = ["full_attention", "sliding_attention"] * 3
    text.config.sliding_window, text.has_sliding_layers = 9, True
    for layer, block in enumerate(text.layers):
        block.attention_type = text.config.layer_types[layer]
        block.self_attn.sliding_window = 9 if layer % 2 else None
    prompt = TINY["qwen2-vl"].prompt(model, [1, 1], seed=12)
    expected, sources = one_pass_with_loops(model, prompt)
    logits, scr = logits_of(model, prompt.inputs)
    assert [report.sources for report in scr.reports] == sources
    assert torch.allclose(kept(prompt.inputs, logits), kept(prompt.inputs, expected), atol=1e-4, rtol=0)
    with pytest.raises(errors.UnsupportedModelError, match="mix attention of different reach"):
        SCR(model, config=CONFIG, mode="two-pass")


# -- nothing left over -----------------------------------------------------------------------------------------------


class Case:
    """A model with an online SCR, and what it gives."""

    def __init__(self) -> None:
        self.model: Any = make_tiny_llava(16)
        self.inputs = make_inputs(self.model, [1, 1], seed=16)
        self.other = make_inputs(self.model, [2], seed=17)
        with torch.no_grad():
            self.vanilla = self.model(**self.inputs).logits
        self.before = snapshot(self.model)
        self.scr = SCR(self.model, config=CONFIG, mode="online")
        with torch.no_grad(), self.scr:
            self.edited = self.model(**self.inputs).logits
            self.other_edited = self.model(**self.other).logits

    def works(self) -> None:
        assert here.rows is None and here.prefill is None
        assert torch.equal(self.model(**self.inputs).logits, self.edited)

    def is_vanilla(self) -> None:
        assert snapshot(self.model) == self.before
        assert torch.equal(self.model(**self.inputs).logits, self.vanilla)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_an_interrupt_before_any_line_of_a_prefill(case: Case) -> None:
    interrupt_a_prefill_before_any_line(case)


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("thread", [False, True], ids=["re-entrant", "in-a-thread"])
def test_a_call_within_a_call(case: Case, layer: int, thread: bool) -> None:
    """Another image of the same model, started between any two blocks of a pass that reads its attention."""
    done: list[bool] = []

    def inner(*_: Any) -> None:
        if done:
            return
        done.append(True)
        call: Callable[[], Any] = lambda: results.append(case.model(**case.other).logits)  # noqa: E731
        if thread:
            other = threading.Thread(target=torch.no_grad()(call))
            other.start()
            other.join(60)
        else:
            call()

    results: list[Tensor] = []
    handle = case.model.model.language_model.layers[layer].register_forward_hook(inner)
    with torch.no_grad(), case.scr:
        assert torch.equal(case.model(**case.inputs).logits, case.edited)
    handle.remove()
    assert torch.equal(results[0], case.other_edited)


def test_a_model_of_the_same_config_object_is_not_read(case: Case) -> None:
    """Its attention passes through the same wrapper, in the middle of a pass that is read."""
    text = case.model.model.language_model
    plain: Any = LlamaForCausalLM(LlamaConfig(**text.config.to_dict())).eval()
    plain.config = plain.model.config = text.config
    for block in plain.model.layers:
        block.self_attn.config = text.config
    handle = text.layers[1].register_forward_pre_hook(lambda *_: plain(input_ids=torch.tensor([[5, 6, 7]])) and None)
    with torch.no_grad(), case.scr:
        assert torch.equal(case.model(**case.inputs).logits, case.edited)
    handle.remove()


def test_a_pass_with_gradients_keeps_none_of_the_map(case: Case) -> None:
    seen: list[bool] = []

    def look(*_: Any) -> None:
        assert here.rows is not None and here.rows.total is not None
        seen.append(here.rows.total.requires_grad)

    handle = case.model.model.language_model.layers[3].register_forward_hook(look)
    with case.scr:
        logits = case.model(**case.inputs).logits
    handle.remove()
    assert logits.requires_grad and seen == [False]
    assert torch.equal(logits.detach(), case.edited)
    last = case.scr._last
    assert last is not None and last.rows is None


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(0, 2), (3, 5), (2, 2)])
def test_edits_that_begin_before_the_map_is_known_are_refused(layers: tuple[int, int]) -> None:
    model = TINY["llava"].model(1)
    config = SCRConfig(num_sources=5, edit_layers=layers, attention_layers=(1, 3))
    hooks = hook_count(model)
    with pytest.raises(errors.ConfigurationError, match=r"edit_layers must start at block 4 or later.*behind_map"):
        SCR(model, config=config, mode="online")
    assert hook_count(model) == hooks
    with torch.no_grad(), SCR(model, config=config.behind_map(6), mode="online") as scr:
        model(**TINY["llava"].prompt(model, [1]).inputs)
    assert scr.reports[0].layers_edited == (4,)  # the last block's edit would reach no answer


@pytest.mark.parametrize(
    ("edits", "attention", "blocks", "expected"),
    [((0, 11), (8, 16), 32, (17, 28)), ((0, 15), (8, 16), 28, (17, 26)), ((0, 2), (2, 4), 8, (5, 6)),
     ((20, 31), (8, 16), 32, (20, 31)), ((0, 0), (1, 1), 4, (2, 2))],
)  # fmt: skip
def test_settings_are_moved_behind_the_map(edits: Any, attention: Any, blocks: int, expected: Any) -> None:
    config = SCRConfig(edit_layers=edits, attention_layers=attention)
    moved = config.behind_map(blocks)
    moved.check_online()
    moved.check_depth(blocks)
    assert moved.edit_layers == expected
    assert moved.behind_map(blocks) is moved
    with pytest.raises(errors.ConfigurationError, match="none is left behind them"):
        SCRConfig(edit_layers=(0, 1), attention_layers=(2, 4)).behind_map(6)


def test_online_needs_settings_and_no_predictor() -> None:
    model = TINY["llava"].model(1)
    with pytest.raises(errors.ConfigurationError, match="no settings"):
        SCR(model, mode="online")
    assert "mode online, blocks 4-5" in repr(SCR(model, config=CONFIG, mode="online"))


@pytest.mark.filterwarnings("ignore")  # dynamo's own, about what it can't trace
@pytest.mark.parametrize("layers", [(1,), (3,), (1, 2, 3)])
def test_compiled_blocks_in_the_map_are_refused(layers: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    model: Any = make_tiny_llava(1)
    inputs = make_inputs(model, [1])
    blocks: nn.ModuleList = model.model.language_model.layers
    for layer in layers:
        blocks[layer].compile(backend="eager")
    with torch.no_grad(), SCR(model, config=CONFIG, mode="online") as scr:
        with pytest.raises(errors.UnsupportedModelError, match="one-pass"):
            model(**inputs)
        assert scr.reports == []
    torch._dynamo.reset()


def test_no_text_behind_the_image() -> None:
    model: Any = make_tiny_llava(20)
    inputs = make_inputs(model, [1], seed=20)
    cut = {key: value[:, : 3 + 36] if value.ndim == 2 else value for key, value in inputs.items()}
    assert reference_images(model, cut)
    with pytest.raises(errors.NonFiniteScoresError, match="no text"):
        logits_of(model, cut)
