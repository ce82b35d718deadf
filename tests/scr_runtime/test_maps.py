from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from scr_runtime import SCRConfig, capture
from scr_runtime.packing import pack
from tests.scr_runtime.tiny_families import TINY, Tiny

CONFIG = SCRConfig(num_sources=4, edit_layers=(0, 2), attention_layers=(2, 4))
PROMPTS = 3


def prompts_about_two_images(model: Any, llava_inputs: Callable[..., dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Three prompts of differing length about each of two images, left padded; pixels once per row."""
    inputs = llava_inputs(model, [1, 1])
    token = model.config.image_token_id
    rows = []
    for image in range(2):
        kept = inputs["input_ids"][image][inputs["attention_mask"][image].bool()].tolist()
        end = len(kept) - kept[::-1].index(token)
        rows += [kept[:end] + list(range(10 + 7 * prompt, 13 + 9 * prompt + image)) for prompt in range(PROMPTS)]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": inputs["pixel_values"].repeat_interleave(PROMPTS, 0),
    }


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_prompts_that_share_an_image_give_what_each_gives_alone(
    tiny_llava: Callable[..., Any],
    llava_inputs: Callable[..., dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    attn: str,
    strategy: str,
    packed: bool,
):
    model = tiny_llava(attn=attn, strategy=strategy)
    inputs = prompts_about_two_images(model, llava_inputs)
    lengths: list[torch.Size] = []
    model.model.language_model.layers[0].register_forward_hook(lambda _, args, __: lengths.append(args[0].shape))
    encoded: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    each = capture(model, CONFIG, inputs)
    shared = dict(inputs, pixel_values=inputs["pixel_values"][::PROMPTS])
    if not packed:
        shared["vision_feature_select_strategy"] = strategy  # an input that is not understood: no packing
    together = capture(model, CONFIG, shared, PROMPTS)
    assert encoded == [6, 2]
    assert lengths[1][0] == (2 if packed else 6)
    assert [one.row for one in together] == [one.row for one in each] == list(range(6))
    for one, other in zip(together, each, strict=True):
        assert one.grid == other.grid
        assert one.entropy == pytest.approx(other.entropy, abs=1e-5)
        torch.testing.assert_close(one.states, other.states, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(one.question, other.question, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(one.attention, other.attention, atol=1e-7, rtol=1e-5)


def prompts_of(tiny: Tiny, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Three prompts of differing length about each of two images: images once per row, and once in all."""
    prompt = tiny.prompt(model, [1, 1])
    rows = []
    for image in range(2):
        single = prompt.row(image)
        end = int(prompt.visual[image].nonzero().max()) - int(prompt.inputs["attention_mask"][image].argmax()) + 1
        head = single["input_ids"][0, :end].tolist()
        rows += [head + list(range(10 + 7 * ask, 13 + 9 * ask + image)) for ask in range(PROMPTS)]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    texts = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if tiny.token_types:
        texts["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    tensors = [pictures[0].tensors for pictures in prompt.pictures]
    once = {name: torch.cat([of_one[name] for of_one in tensors]) for name in tensors[0]}
    each = {name: torch.cat([of_one[name] for of_one in tensors for _ in range(PROMPTS)]) for name in tensors[0]}
    return texts | each, texts | once


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava-next", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_each_packed_prompt_gives_what_it_gives_alone(name: str, attn: str, packed: bool):
    """Also where images have other grids, several of them, or positions of three axes."""
    model = TINY[name].model(attn=attn)
    inputs, shared = prompts_of(TINY[name], model)
    lengths: list[torch.Size] = []
    model.model.language_model.layers[0].register_forward_hook(lambda _, args, __: lengths.append(args[0].shape))
    each = capture(model, CONFIG, inputs)
    if not packed:
        shared["output_attentions"] = False  # an input that is not understood: no packing
    together = capture(model, CONFIG, shared, PROMPTS)
    assert [shape[0] for shape in lengths] == [6, 2 if packed else 6]
    assert [(one.row, one.grid) for one in together] == [(one.row, one.grid) for one in each]
    assert len(each) == 6 * (2 if name == "llava-next" else 1) and len({one.grid for one in each}) > 1
    for one, other in zip(together, each, strict=True):
        assert one.entropy == pytest.approx(other.entropy, abs=1e-5)
        torch.testing.assert_close(one.states, other.states, atol=5e-6, rtol=1e-5)
        torch.testing.assert_close(one.question, other.question, atol=5e-6, rtol=1e-5)
        torch.testing.assert_close(one.attention, other.attention, atol=2e-7, rtol=1e-4)


def test_prompts_that_differ_before_the_image_are_not_packed(
    tiny_llava: Callable[..., Any], llava_inputs: Callable[..., dict[str, torch.Tensor]]
):
    model = tiny_llava()
    inputs = prompts_about_two_images(model, llava_inputs)
    shared = dict(inputs, pixel_values=inputs["pixel_values"][::PROMPTS])
    visual = inputs["input_ids"] == model.config.image_token_id

    def packed() -> bool:
        return pack(inputs["input_ids"], inputs["attention_mask"], visual, PROMPTS, torch.float32) is not None

    assert packed()
    first = int(inputs["attention_mask"][1].argmax())
    inputs["input_ids"][1, first] = 55
    assert not packed()
    each, together = capture(model, CONFIG, inputs), capture(model, CONFIG, shared, PROMPTS)
    for one, other in zip(together, each, strict=True):
        torch.testing.assert_close(one.attention, other.attention, atol=1e-7, rtol=1e-5)
