"""The random models have the sizes that they are named after, and run with their inputs."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks import prefill_gpu
from benchmarks.models import (
    SMALL,
    Shape,
    build_llava,
    build_predictor,
    build_qwen,
    llava_inputs,
    millions,
    qwen_inputs,
)


def test_the_real_shapes_can_be_built() -> None:
    sizes = {name: millions(build_llava(shape, "meta")) / 1e3 for name, shape in prefill_gpu.LLAVA.items()}
    qwen = build_qwen("meta", torch.bfloat16)
    sizes["qwen2-vl-7b"] = millions(qwen) / 1e3
    rounded = {name: round(size, 1) for name, size in sizes.items() if name != "tiny"}
    assert rounded == {"llava-1.5-7b": 7.1, "llava-1.5-13b": 13.4, "qwen2-vl-7b": 8.3}
    assert round(millions(build_llava(SMALL, "meta"))) == 224
    inputs = qwen_inputs(qwen, text=(10, 54), device="cpu", dtype=torch.float32)
    assert inputs["input_ids"].shape == (1, 640)
    assert inputs["mm_token_type_ids"].sum() == 576


@torch.no_grad()
def test_a_model_runs_on_its_inputs_and_is_the_same_each_time() -> None:
    shape = Shape(64, 128, 2, 2, (32, 64, 1, 2), side=4)
    inputs = llava_inputs(shape, 2, text=(3, 5), dtype=torch.bfloat16)
    assert inputs["input_ids"].shape == (2, 3 + 16 + 5)
    one, other = (build_llava(shape, dtype=torch.bfloat16)(**inputs).logits for _ in range(2))
    assert one.dtype == torch.bfloat16
    assert torch.equal(one, other)
    longer = llava_inputs(dataclasses.replace(shape, words=2000), text=(3, 5), first_word=11)
    assert longer["input_ids"][0, -5:].tolist() == [11, 12, 13, 14, 15]
    assert build_predictor(build_llava(shape)).config.hidden_size == 64
