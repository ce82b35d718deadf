"""Decoders that ``model_type`` lets through, and whose blocks work otherwise: exact, or refused before any prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from scr_runtime import SCR, SCRConfig, capture, errors
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.leftovers import snapshot
from tests.scr_runtime.questions import ask
from tests.scr_runtime.reference import (
    IMAGE_TOKEN,
    make_predictor,
    reference_greedy,
    reference_logits,
    reference_maps,
)

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
TEXT: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED: dict[str, Any] = TEXT | {"num_key_value_heads": 2}
FULL = ["full_attention"] * 6
Make = Callable[[], Any]


def vlm(text: Any, attn: str = "sdpa", seed: int = 41, side: int = 6) -> Any:
    """A LLaVA of the real class with another language model."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "attn_implementation": attn}
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=4 * side,
        patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        **settings, vision_config=vision, text_config=text, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model: Any = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def gemma2(**changes: Any) -> Any:
    return transformers.Gemma2Config(
        **(GROUPED | {"head_dim": 8, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8, "layer_types": FULL}
           | changes)
    )  # fmt: skip


def gpt_oss(**changes: Any) -> Any:
    return transformers.GptOssConfig(
        **(GROUPED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": FULL} | changes)
    )


DECODERS: dict[str, Make] = {
    "soft-capping": gemma2,
    "sinks": gpt_oss,
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**TEXT, use_parallel_residual=True),
    "gpt-neox-serial": lambda: transformers.GPTNeoXConfig(**TEXT, use_parallel_residual=False),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gemma3-full": lambda: transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, layer_types=FULL, query_pre_attn_scalar=8
    ),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**GROUPED, sliding_window=12),
    "phi3": lambda: transformers.Phi3Config(**GROUPED, sliding_window=9),
    "phi": lambda: transformers.PhiConfig(**TEXT),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "olmo2": lambda: transformers.Olmo2Config(**GROUPED),
    "granite": lambda: transformers.GraniteConfig(**GROUPED, attention_multiplier=0.7),
    "cohere": lambda: transformers.CohereConfig(**GROUPED),
    "glm": lambda: transformers.GlmConfig(**GROUPED, head_dim=8),
    "starcoder2": lambda: transformers.Starcoder2Config(**GROUPED, sliding_window=11),
    "stablelm": lambda: transformers.StableLmConfig(**GROUPED),
    "nemotron": lambda: transformers.NemotronConfig(**GROUPED, head_dim=8),
    "smollm3": lambda: transformers.SmolLM3Config(**GROUPED),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1),
    "diffllama": lambda: transformers.DiffLlamaConfig(**GROUPED),
    "gemma2-mixed": lambda: gemma2(layer_types=["sliding_attention", "full_attention"] * 3, sliding_window=9),
    "gpt-oss-mixed": lambda: gpt_oss(layer_types=["sliding_attention", "full_attention"] * 3, sliding_window=9),
}  # fmt: skip
REFUSED = {"gemma2-mixed", "gpt-oss-mixed"}
"""Decoders that may be refused, by name; each with a sentence, when the SCR is made."""


PLAIN = {"gemma", "mistral", "phi", "qwen2", "qwen3", "olmo2", "cohere", "glm", "starcoder2", "nemotron", "smollm3",
         "mixtral", "stablelm", "gpt-neox-serial", "granite"}  # fmt: skip
"""Decoders without anything that the quick ones don't have."""
EVERY = [pytest.param(name, marks=pytest.mark.slow if name in PLAIN else ()) for name in DECODERS]


@pytest.mark.filterwarnings("ignore")  # of odd configs
@pytest.mark.parametrize("name", EVERY)
def test_a_decoder_is_exact_or_refused(name: str) -> None:
    """R15: other cache names, soft-capping, sinks. What is refused is refused before any prefill."""
    for attn in ("eager", "sdpa"):
        try:
            model = vlm(DECODERS[name](), attn)
        except ValueError as error:  # the model itself has no such attention
            assert attn == "sdpa" or name in REFUSED, error
            continue
        inputs = make_inputs(model, [1, 2], seed=41)
        try:
            scr = SCR(model, config=CONFIG, mode="two-pass")
        except errors.UnsupportedModelError as error:
            assert name in REFUSED, error
            assert len(str(error)) > 40
            continue
        with torch.no_grad():
            vanilla = model(**inputs).logits
            before = snapshot(model)
            with scr:
                logits = model(**inputs).logits
        kept = inputs["attention_mask"].bool()
        expected, sources = reference_logits(model, inputs, CONFIG)
        assert [report.sources for report in scr.reports] == sources
        assert torch.allclose(logits[kept], expected[kept], atol=1e-4, rtol=0)
        for item, attention in zip(capture(model, CONFIG, inputs), reference_maps(model, inputs, CONFIG), strict=True):
            assert torch.allclose(item.attention, attention, atol=1e-6, rtol=0)
        assert snapshot(model) == before
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, vanilla)
        one = make_inputs(model, [1], seed=42)
        with scr:
            assert torch.equal(model.generate(**one, **GREEDY), reference_greedy(model, one, CONFIG, 4))
            cache = model(**one, use_cache=True).past_key_values
        assert cache.get_seq_length() == one["input_ids"].shape[1]  # the nested run wrote nothing into it


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["soft-capping", "sinks", "gpt-neox", "gemma2-mixed", "gpt-oss-mixed"])
def test_modes_without_a_diagnostic_run_take_any_decoder(name: str) -> None:
    model = vlm(DECODERS[name](), "eager")
    inputs = make_inputs(model, [1], seed=43)
    predictor = make_predictor(model)
    for mode in ("uniform", "one-pass"):
        kind: Any = mode
        with torch.no_grad(), SCR(model, config=CONFIG, mode=kind, predictor=predictor) as scr:
            logits = model(**inputs).logits
        sources = [report.sources for report in scr.reports]
        assert torch.allclose(logits, reference_logits(model, inputs, CONFIG, sources)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["soft-capping", "sinks", "gpt-neox", "mistral-window", "phi3"])
def test_sessions_of_other_decoders(name: str) -> None:
    model = vlm(DECODERS[name](), "eager" if name in ("soft-capping", "sinks") else "sdpa")
    inputs = make_inputs(model, [1], seed=44)
    scr = SCR(model, config=CONFIG, mode="two-pass")
    with torch.no_grad(), scr, scr.image(**inputs) as image:
        for seed, count in enumerate((5, 14, 3)):
            question = ask(inputs, [count], seed)
            expected, sources = reference_logits(model, question, CONFIG)
            assert torch.allclose(image(**question).logits, expected, atol=1e-4, rtol=0)
            assert [report.sources for report in scr.reports] == sources


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral-window", "phi3", "qwen2"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_windows_with_static_caches(name: str, attn: str) -> None:
    """R11: the last row of a static cache's mask hid early rows of a question longer than the window."""
    model = vlm(DECODERS[name](), attn, seed=45)
    inputs = make_inputs(model, [1, 1], seed=45, text=30)
    with SCR(model, config=CONFIG, mode="two-pass") as scr:
        dynamic = model.generate(**inputs, **GREEDY)
        expected = [report.sources for report in scr.reports]
        assert expected == reference_logits(model, inputs, CONFIG)[1]
        assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), dynamic)
        assert [report.sources for report in scr.reports] == expected


@pytest.mark.parametrize("pads", [0, 1, 20, 44, 60])
@pytest.mark.parametrize("cached", ["dynamic", "static"])
def test_an_image_behind_a_padded_earlier_turn(pads: int, cached: str) -> None:
    """R12: the mask's last columns are this call's; the first ones are those of the cache."""
    model: Any = make_tiny_llava(46)
    predictor = make_predictor(model)
    inputs = make_inputs(model, [1], seed=46)
    past = 64
    mask = torch.cat([torch.zeros(1, pads), torch.ones(1, past - pads)], 1).long()
    earlier = {"input_ids": torch.randint(3, 90, (1, past)), "attention_mask": mask}
    length = past + inputs["input_ids"].shape[1]
    kinds: dict[str, Any] = {
        "dynamic": lambda: transformers.DynamicCache(config=model.config.text_config),
        "static": lambda: transformers.StaticCache(config=model.config.text_config, max_cache_len=length + 7),
    }
    both = torch.cat([mask, inputs["attention_mask"]], 1)
    with torch.no_grad():
        caches = [kinds[cached](), kinds[cached]()]
        for cache in caches:
            model(**earlier, past_key_values=cache)
        states: list[Tensor] = []
        hook = model.model.language_model.layers[0].register_forward_hook(
            lambda *rest: states.append(rest[-1].clone())
        )
        model(**inputs | {"attention_mask": both, "past_key_values": caches[0]})
        hook.remove()
        places = (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero().flatten()
        question = states[0][0, int(places[-1]) + 1 :].mean(0, keepdim=True)
        scores = predictor(states[0][:, places], (6, 6), question)
        with SCR(model, config=CONFIG, mode="one-pass", predictor=predictor) as scr:
            model(**inputs | {"attention_mask": both, "past_key_values": caches[1]})
        last = scr._last
    assert last is not None
    assert last.choice is not None
    predicted = last.choice[0].scores.predicted
    assert predicted is not None
    assert torch.allclose(predicted, scores, atol=1e-5)


# -- flex attention --------------------------------------------------------------------------------------------------


def test_flex_attention_is_refused_where_attention_has_to_be_read() -> None:
    """R16: in two-pass and auto, when the SCR is made and when it is attached, and in captures."""
    model: Any = make_tiny_llava(47)
    predictor = make_predictor(model)
    diagnosing: Any = ("two-pass", "auto")
    early = [SCR(model, config=CONFIG, mode=mode, predictor=predictor) for mode in diagnosing]
    model.set_attn_implementation({"text_config": "flex_attention"})
    assert model.model.language_model.config._attn_implementation == "flex_attention"
    before = snapshot(model)
    for mode in diagnosing:
        with pytest.raises(errors.UnsupportedModelError, match=r"flex_attention.*mode='one-pass' or 'uniform'"):
            SCR(model, config=CONFIG, mode=mode, predictor=predictor)
    for scr in early:
        with pytest.raises(errors.UnsupportedModelError, match="flex_attention"):
            scr.attach()
    with pytest.raises(errors.UnsupportedModelError, match="flex_attention"):
        capture(model, CONFIG, make_inputs(model, [1]))
    assert snapshot(model) == before


@pytest.mark.slow  # transformers compiles it
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_works_where_no_attention_is_read() -> None:
    model: Any = make_tiny_llava(47)
    predictor = make_predictor(model)
    inputs = make_inputs(model, [1], seed=47)
    modes: Any = ("one-pass", "uniform")
    plain: list[Tensor] = []
    for name in ("sdpa", "flex_attention"):
        model.set_attn_implementation({"text_config": name})
        before = snapshot(model)
        for place, mode in enumerate(modes):
            scr = SCR(model, config=CONFIG, mode=mode, predictor=predictor)
            with torch.no_grad(), scr:
                plain.append(model(**inputs).logits)
                assert torch.allclose(plain[-1], plain[place], atol=1e-4)
                with scr.image(**inputs) as image:
                    image(**inputs)
        assert snapshot(model)[:-2] == before[:-2] or name == "sdpa"


# -- another float type ----------------------------------------------------------------------------------------------


@pytest.fixture
def _float64_by_default() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("mode", ["two-pass", "one-pass", "auto", "uniform"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_float64_models(mode: Any, attn: str) -> None:
    model: Any = make_tiny_llava(48, attn=attn, dtype=torch.float64)
    predictor = None if mode in ("two-pass", "uniform") else make_predictor(model)
    inputs = make_inputs(model, [2], seed=48)  # no padding: transformers' eager attention makes NaN of it
    with torch.no_grad(), SCR(model, config=CONFIG, mode=mode, predictor=predictor, threshold=0.9) as scr:
        logits = model(**inputs).logits
        sources = [report.sources for report in scr.reports]
        tokens = model.generate(**inputs, **GREEDY)
        if mode == "two-pass":
            with scr.image(**inputs) as image:
                assert torch.allclose(image(**inputs).logits, logits)
                assert torch.equal(image.generate(**inputs, **GREEDY), tokens)
    expected, _ = reference_logits(model, inputs, CONFIG, sources)
    assert logits.dtype == torch.float64
    assert torch.allclose(logits, expected, atol=1e-4, rtol=0)  # eager softmax is float32 in any model
    if mode == "two-pass":
        assert sources == reference_logits(model, inputs, CONFIG)[1]
        (attention, _) = reference_maps(model, inputs, CONFIG)
        assert torch.allclose(capture(model, CONFIG, inputs)[0].attention, attention.float(), atol=1e-6)


@pytest.mark.parametrize("mode", ["two-pass", "one-pass", "auto", "uniform"])
@pytest.mark.parametrize("grid", [6, 7])
@pytest.mark.usefixtures("_float64_by_default")
def test_a_float64_default(mode: Any, grid: int) -> None:
    """R16: constants have float types of their own, on grids that nobody has seen before too."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model: Any = make_tiny_llava(49, side=grid, dtype=dtype)
        predictor = make_predictor(model)
        inputs = make_inputs(model, [1], seed=49)
        config = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4), state_layer=0)
        with torch.no_grad(), SCR(model, config=config, mode=mode, predictor=predictor) as scr:
            model(**inputs)
        assert len(scr.reports[0].sources) == 5
        assert scr.stats.prefills == 1


# -- one config object, shared modules, another attention meanwhile ---------------------------------------------------


def test_models_that_share_a_config_object() -> None:
    """R13: each is edited as long as it is attached, in whatever order they are detached."""
    one: Any = make_tiny_llava(50)
    other: Any = type(one)(one.config).eval()
    third: Any = type(one)(one.config).eval()
    models = [one, other, third]
    inputs = make_inputs(one, [1], seed=50)
    expected = [reference_logits(model, inputs, CONFIG)[0] for model in models]
    with torch.no_grad():
        for model in models:
            model(**inputs)
    before = [snapshot(model) for model in models]
    raw = one.model.language_model.config.__dict__["_attn_implementation_internal"]
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        scrs = [SCR(model, config=CONFIG, mode="two-pass").attach() for model in models]
        for place in order:
            with torch.no_grad():
                for model, scr, logits in zip(models, scrs, expected, strict=True):
                    if scr._is_attached():
                        assert torch.allclose(model(**inputs).logits, logits, atol=1e-4, rtol=0)
                capture(models[place], CONFIG, inputs)
            scrs[place].detach()
        assert [snapshot(model) for model in models] == before
        assert one.model.language_model.config.__dict__["_attn_implementation_internal"] is raw


def test_models_that_share_their_modules() -> None:
    """Two heads on one base: the second attach is refused, and calls of both are edited by the first."""
    one: Any = make_tiny_llava(51)
    other: Any = type(one)(one.config).eval()
    other.model, other.lm_head = one.model, one.lm_head
    inputs = make_inputs(one, [1], seed=51)
    expected, sources = reference_logits(one, inputs, CONFIG)
    with torch.no_grad(), SCR(one, config=CONFIG, mode="two-pass") as scr:
        with pytest.raises(errors.AttachError):
            SCR(other, config=CONFIG, mode="two-pass").attach()
        for model in (one, other):
            assert torch.allclose(model(**inputs).logits, expected, atol=1e-4, rtol=0)
            assert [report.sources for report in scr.reports] == sources
        edited = other.generate(**inputs, **GREEDY)
        assert torch.equal(edited, one.generate(**inputs, **GREEDY))
        assert scr.stats.prefills == 4
    with SCR(other, config=CONFIG, mode="two-pass"):
        assert torch.equal(one.generate(**inputs, **GREEDY), edited)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_another_attention_set_while_attached_is_kept(name: str) -> None:
    """R20: the user's choice is not undone at detach; until then two-pass says that it can't see the attention."""
    model: Any = make_tiny_llava(52)
    inputs = make_inputs(model, [1], seed=52)
    expected, _ = reference_logits(model, inputs, CONFIG)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass"):
        model(**inputs)
        model.set_attn_implementation(name)
        with pytest.raises(errors.UnsupportedModelError, match=r"was changed to .* detach, change it"):
            model(**inputs)
    config = model.model.language_model.config
    assert (config._attn_implementation, type(config._attn_implementation)) == (name, str)
    with torch.no_grad():
        model(**inputs)
        with SCR(model, config=CONFIG, mode="two-pass"):
            assert torch.allclose(model(**inputs).logits, expected, atol=1e-4, rtol=0)
        with SCR(model, config=CONFIG, mode="uniform") as scr:
            model.set_attn_implementation("eager")
            model(**inputs)
            assert scr.stats.prefills == 1
    assert config._attn_implementation == "eager"


# -- users' hooks ----------------------------------------------------------------------------------------------------


def _steer(scale: float) -> Any:
    """Adds a fixed direction to a block's output."""
    return lambda module, args, output: output + scale * torch.linspace(-1, 1, 32)


STEERING: dict[str, Callable[[Any], Any]] = {
    "output of block 1": lambda model: model.model.language_model.layers[1].register_forward_hook(_steer(0.7)),
    "output of block 3": lambda model: model.model.language_model.layers[3].register_forward_hook(_steer(0.7)),
    "input of block 2": lambda model: model.model.language_model.layers[2].register_forward_pre_hook(
        lambda module, args: (args[0] * 1.2, *args[1:])
    ),
    "keywords of block 2": lambda model: model.model.language_model.layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 0.8, *args[1:]), kwargs), with_kwargs=True
    ),
    "mlp of block 2": lambda model: model.model.language_model.layers[2].mlp.register_forward_hook(_steer(0.9)),
    "all blocks": lambda model: [
        block.register_forward_hook(_steer(0.2)) for block in model.model.language_model.layers
    ],
}  # fmt: skip


@pytest.mark.parametrize("place", STEERING)
def test_the_map_is_that_of_the_steered_model(place: str) -> None:
    """R14: a user's hooks run in the diagnostic run as in the pass, before ours and behind."""
    model: Any = make_tiny_llava(53)
    inputs = make_inputs(model, [1, 2], seed=53)
    plain = reference_maps(model, inputs, CONFIG)
    STEERING[place](model)
    maps = reference_maps(model, inputs, CONFIG)
    assert not torch.allclose(torch.stack(plain), torch.stack(maps), atol=1e-3)
    expected, sources = reference_logits(model, inputs, CONFIG)
    kept = inputs["attention_mask"].bool()
    for item, attention in zip(capture(model, CONFIG, inputs), maps, strict=True):
        assert torch.allclose(item.attention, attention, atol=1e-6, rtol=0)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        logits = model(**inputs).logits
        assert [report.sources for report in scr.reports] == sources
        assert torch.allclose(logits[kept], expected[kept], atol=1e-4, rtol=0)
        one = make_inputs(model, [1], seed=54)
        with scr.image(**one) as image:
            for seed in range(2):
                question = ask(one, [5 + seed], seed)
                expected = reference_logits(model, question, CONFIG)[0]
                assert torch.allclose(image(**question).logits, expected, atol=1e-4, rtol=0)
