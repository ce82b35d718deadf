"""Every way into a model that leads around its own ``__call__`` or ``generate``: edited, or refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import DynamicCache

from scr_runtime import SCR, SCRConfig, capture, describe_model, errors
from scr_runtime.families import generative_model
from tests.conftest import make_inputs, make_tiny_llava
from tests.scr_runtime.leftovers import snapshot
from tests.scr_runtime.reference import make_predictor, reference_greedy, reference_logits
from tests.scr_runtime.test_families import GENERATING, every
from tests.scr_runtime.tiny_families import TINY, Tiny

CONFIG = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 2), attention_layers=(2, 4))
SOME = [TINY[name] for name in ("llava", "llava-next", "qwen3-vl", "chameleon")]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Known:
    """A model, a prompt, and what the reference says of it."""

    def __init__(self, seed: int = 31, config: SCRConfig = CONFIG, layers: int = 6) -> None:
        self.model: Any = make_tiny_llava(seed, layers=layers)
        self.inputs = make_inputs(self.model, [1], seed=seed)
        with torch.no_grad():
            self.vanilla: Tensor = self.model(**self.inputs).logits
        self.logits, self.sources = reference_logits(self.model, self.inputs, config)
        self.tokens = reference_greedy(self.model, self.inputs, config, 4)
        self.before = snapshot(self.model)
        assert not torch.allclose(self.vanilla, self.logits, atol=1e-2)

    def same(self, logits: Tensor) -> bool:
        return torch.allclose(logits, self.logits, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def known() -> Known:
    return Known()


# -- wrappers --------------------------------------------------------------------------------------------------------


class Tuner(nn.Module):
    """What peft's LoraModel does: its forward calls the model's ``forward``, and the rest is passed on."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


class PeftLike(nn.Module):
    """What peft's PeftModel does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = Tuner(model)

    def get_base_model(self) -> Any:
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


class Direct(nn.Module):
    """A wrapper with a ``config`` and a ``generate`` that calls the class's functions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.config = model.config

    def forward(self, **kwargs: Any) -> Any:
        return type(self.inner).forward(self.inner, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return type(self.inner).generate(self.inner, **kwargs)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def forget_compilation(model: Any) -> None:
    """Removes what transformers, and Lightning where it was imported, write on a model that was compiled."""
    for name in ("_is_torch_compile", "_compile_kwargs"):
        vars(model).pop(name, None)


WRAPPERS: dict[str, Any] = {
    "peft": PeftLike,
    "tuner": Tuner,
    "direct": Direct,
    "peft in peft": lambda model: PeftLike(PeftLike(model)),
    "data parallel": nn.DataParallel,
    "sequential": nn.Sequential,
    "list": lambda model: nn.ModuleList([model]),
    "compiled": compiled,
    "compiled peft": lambda model: compiled(PeftLike(model)),
}


@pytest.mark.filterwarnings("ignore")  # dynamo's own
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(
            pytest.param(kind, "two-pass", marks=pytest.mark.slow if kind == "compiled peft" else ())
            for kind in WRAPPERS
        ),
        ("peft", "auto"),
        ("direct", "auto"),
    ],
)
def test_a_wrapped_model_is_edited_whatever_is_called(known: Known, kind: str, mode: Any) -> None:
    wrapper = WRAPPERS[kind](known.model)
    settings = {} if mode == "two-pass" else {"predictor": make_predictor(known.model), "threshold": 2.0}
    with torch.no_grad(), SCR(wrapper, config=CONFIG, mode=mode, **settings) as scr:
        assert scr.model is known.model
        calls = [known.model, known.model.forward, lambda **x: type(known.model).forward(known.model, **x)]
        if kind not in ("sequential", "list"):
            calls += [wrapper, wrapper.forward]
        for count, call in enumerate(calls, 1):
            output = call(**known.inputs)
            assert known.same(output.logits)
            assert (scr.stats.prefills, [report.sources for report in scr.reports]) == (count, known.sources)
        if hasattr(wrapper, "generate"):
            assert torch.equal(wrapper.generate(**known.inputs, **GREEDY), known.tokens)
        assert torch.equal(known.model.generate(**known.inputs, **GREEDY), known.tokens)
    torch._dynamo.reset()
    forget_compilation(known.model)
    assert snapshot(known.model) == known.before
    with torch.no_grad():
        assert torch.equal(known.model(**known.inputs).logits, known.vanilla)


@every(GENERATING)
def test_wrappers_in_every_family(tiny: Tiny) -> None:
    """R16: ``SCR(PeftModel)`` was an AttributeError in all families; R3: other wrappers were not edited."""
    model = tiny.model(3)
    prompt = tiny.prompt(model, [1], seed=3)
    expected, sources = reference_logits(model, prompt.inputs, CONFIG, images=prompt.images, visual=prompt.visual)
    for wrap in (PeftLike, Direct):
        wrapper = wrap(model)
        with torch.no_grad(), SCR(wrapper, config=CONFIG, mode="two-pass") as scr:
            assert torch.allclose(wrapper(**prompt.inputs).logits, expected, atol=1e-4, rtol=0)
            assert [report.sources for report in scr.reports] == sources
            wrapper.generate(**prompt.inputs, **GREEDY)
            assert scr.stats.prefills == 2
    assert describe_model(PeftLike(model)) == describe_model(model)
    for one, other in zip(
        capture(model, CONFIG, prompt.inputs), capture(Direct(model), CONFIG, prompt.inputs), strict=True
    ):
        assert torch.equal(one.attention, other.attention)


@pytest.mark.filterwarnings("ignore")
def test_a_session_of_a_wrapped_model(known: Known) -> None:
    for wrapper in (PeftLike(known.model), compiled(known.model)):
        scr = SCR(wrapper, config=CONFIG, mode="two-pass")
        with torch.no_grad(), scr, scr.image(**known.inputs) as image:
            assert known.same(image(**known.inputs).logits)
            assert torch.equal(image.generate(**known.inputs, **GREEDY), known.tokens)
        torch._dynamo.reset()
    forget_compilation(known.model)


def test_what_holds_no_model_or_several_is_refused(known: Known) -> None:
    other = make_tiny_llava(32)
    for several in (nn.ModuleList([known.model, other]), PeftLike(nn.ModuleDict({"a": known.model, "b": other}))):
        with pytest.raises(errors.UnsupportedModelError, match=r"holds 2 models .*attach to one of them"):
            SCR(several, config=CONFIG, mode="two-pass")
    assert generative_model(nn.ModuleList([known.model, known.model])) is known.model  # one, twice
    pipeline: Any = SimpleNamespace(model=known.model, config=known.model.config, generate=known.model.generate)
    with pytest.raises(errors.UnsupportedModelError, match=r"not a torch module.*Pass the model in it: its \.model"):
        SCR(pipeline, config=CONFIG, mode="two-pass")
    hidden: Any = nn.Linear(2, 2)
    object.__setattr__(hidden, "config", known.model.config)
    hidden.__dict__["generate"] = known.model.generate
    nothing: Any = None
    others: tuple[Any, ...] = (
        hidden,
        nn.Sequential(),
        nn.Linear(2, 2),
        nothing,
        known.model.generate,
        "llava",
        {"model": 1},
    )
    for none in others:
        with pytest.raises(errors.UnsupportedModelError):
            SCR(none, config=CONFIG, mode="two-pass")
    for inner in (known.model.model, known.model.model.language_model):  # parts of a model
        with pytest.raises(errors.UnsupportedModelError):
            SCR(inner, config=CONFIG, mode="two-pass")


def test_one_model_is_one_model_in_all_wrappers(known: Known) -> None:
    with SCR(PeftLike(known.model), config=CONFIG, mode="uniform"):
        for again in (known.model, Direct(known.model), nn.DataParallel(known.model)):
            with pytest.raises(errors.AttachError, match=r"attached .* already"):
                SCR(again, config=CONFIG, mode="uniform").attach()
    assert snapshot(known.model) == known.before


def test_offloaded_weights(known: Known) -> None:
    """accelerate replaces each module's ``forward``: weights come when it is called, and go behind it."""
    model = copy.deepcopy(known.model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    before, predictor = snapshot(model), make_predictor(model)
    for mode in ("two-pass", "one-pass"):
        with torch.no_grad():
            with SCR(known.model, predictor=predictor, config=CONFIG, mode=mode):
                logits, tokens = known.model(**known.inputs).logits, known.model.generate(**known.inputs, **GREEDY)
            with SCR(model, predictor=predictor, config=CONFIG, mode=mode):
                assert torch.equal(model(**known.inputs).logits, logits)
                assert torch.equal(model.generate(**known.inputs, **GREEDY), tokens)
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(model(**known.inputs).logits, known.vanilla)


# -- compiled as a whole ---------------------------------------------------------------------------------------------


SHORT = SCRConfig(num_sources=5, strength=1.3, edit_layers=(0, 1), attention_layers=(1, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("part", "traced"), [("model", "images"), ("model", "text"), ("base", "images")])
def test_a_compiled_model_edits_or_raises(part: str, traced: str) -> None:
    """R3. Traced before SCR was attached: an answer is the reference's, or there is none."""
    known = Known(33, SHORT, 3)
    wrapper = known.model
    if part == "model":
        wrapper = compiled(known.model)
    else:
        known.model.model.compile(backend="eager")
    text = {"input_ids": torch.randint(3, 90, known.inputs["input_ids"].shape)}
    with torch.no_grad():
        wrapper(**(text if traced == "text" else known.inputs))
        with SCR(wrapper, config=SHORT, mode="two-pass") as scr:
            for call in (wrapper, known.model):
                edited = scr.stats.prefills
                try:
                    logits = call(**known.inputs).logits
                except errors.EditNotFiredError:
                    assert scr.stats.prefills == edited
                    continue
                assert known.same(logits)
                assert scr.stats.prefills == edited + 1
        assert torch.allclose(wrapper(**known.inputs).logits, known.vanilla, atol=1e-5)


# -- generate, looked up at another time -----------------------------------------------------------------------------


@every(SOME)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cached", "uncached", "beams"])
def test_a_generate_that_was_looked_up_before(tiny: Tiny, options: dict[str, Any]) -> None:
    """R19: before ``attach`` it chose anew at each step, or raised; bound while attached it is vanilla afterwards."""
    model = tiny.model(4)
    prompt = tiny.prompt(model, [1, 1], seed=4)
    options = options | {"bad_words_ids": [[99]]}  # a written placeholder has no image
    early, unbound = model.generate, type(model).generate
    vanilla = early(**prompt.inputs, **GREEDY, **options)
    with SCR(model, config=CONFIG, mode="two-pass") as scr:
        late = model.generate
        expected = late(**prompt.inputs, **GREEDY, **options)
        steps = 4 if options.get("use_cache") is False else 1
        images = len({image.row for image in prompt.images}) * len(prompt.images) // 2
        for number, call in enumerate((lambda **x: early(**x), lambda **x: unbound(model, **x)), 2):
            assert torch.equal(call(**prompt.inputs, **GREEDY, **options), expected)
            assert scr.stats.prefills == number * steps
            assert scr.stats.images == number * images
            assert len(scr.reports) == len(prompt.images)
    assert torch.equal(late(**prompt.inputs, **GREEDY, **options), vanilla)
    assert torch.equal(early(**prompt.inputs, **GREEDY, **options), vanilla)


@pytest.mark.parametrize("mode", ["uniform", "one-pass"])
def test_an_early_generate_chooses_once(known: Known, mode: Any) -> None:
    early = known.model.generate
    predictor = make_predictor(known.model) if mode == "one-pass" else None
    with SCR(known.model, config=CONFIG, mode=mode, predictor=predictor, seed=5) as scr:
        first = early(**known.inputs, **GREEDY, use_cache=False)
        assert (scr.stats.prefills, scr.stats.images) == (4, 1)
        again = early(**known.inputs, **GREEDY, use_cache=False)
        assert scr.stats.images == 2
    with SCR(known.model, config=CONFIG, mode=mode, predictor=predictor, seed=5) as scr:
        assert torch.equal(known.model.generate(**known.inputs, **GREEDY), first)
        assert torch.equal(known.model.generate(**known.inputs, **GREEDY), again)


def test_early_generates_are_refused_as_others_are(known: Known) -> None:
    early = known.model.generate
    with SCR(known.model, config=CONFIG, mode="two-pass"):
        with pytest.raises(errors.PrefillError, match="chunked prefill"):
            early(**known.inputs, **GREEDY, prefill_chunk_size=8)
        tokens = early(input_ids=known.inputs["input_ids"][:, :3], **GREEDY)
    assert torch.equal(tokens, early(input_ids=known.inputs["input_ids"][:, :3], **GREEDY))


# -- embeddings ------------------------------------------------------------------------------------------------------


def merged(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[1, S, d] token embeddings with the image's features in their places."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output)).reshape(-1, 32)
    return embeddings.masked_scatter((inputs["input_ids"] == 99)[..., None], features)


@pytest.mark.parametrize("mode", ["two-pass", "uniform", "one-pass", "auto"])
def test_merged_embeddings_are_refused(known: Known, mode: Any) -> None:
    """R5: forward and generate, the base model and the decoder, with and without the tokens beside them."""
    model, inputs = known.model, known.inputs
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        embeds = merged(model, inputs)
        assert torch.allclose(model(inputs_embeds=embeds).logits, known.vanilla, atol=1e-5)
        predictor = make_predictor(model) if mode in ("one-pass", "auto") else None
        calls: list[Any] = [
            lambda: model(inputs_embeds=embeds),
            lambda: model(inputs_embeds=embeds, attention_mask=mask),
            lambda: model(None, None, mask, None, None, embeds),
            lambda: model.forward(inputs_embeds=embeds),
            lambda: model.model(inputs_embeds=embeds),
            lambda: model.model.language_model(inputs_embeds=embeds),
            lambda: model.model.language_model.forward(inputs_embeds=embeds),
            lambda: model.generate(inputs_embeds=embeds, **GREEDY),
            lambda: model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, num_beams=2),
            lambda: model.generate(input_ids=ids, inputs_embeds=embeds, attention_mask=mask, **GREEDY),
            lambda: model.generate(ids, inputs_embeds=embeds, **GREEDY, use_cache=False),
            lambda: model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]),
        ]  # fmt: skip
        early = model.generate
        calls.append(lambda: early(inputs_embeds=embeds, **GREEDY))
        with SCR(model, config=CONFIG, mode=mode, predictor=predictor) as scr:
            for number, call in enumerate(calls):
                with pytest.raises(errors.PrefillError, match=r"input_ids with pixel_values"):
                    print(number, call())
                assert known.same(model(**inputs).logits) or mode != "two-pass"
            prefills = scr.stats.prefills
            # one position is a decode step: nothing is in it that SCR could have edited
            step = model(inputs_embeds=embeds[:, -1:], past_key_values=DynamicCache(config=model.config.text_config))
            assert (scr.stats.prefills, step.logits.shape[1]) == (prefills, 1)
    assert snapshot(model) == known.before


@every(SOME)
def test_merged_embeddings_are_refused_in_every_family(tiny: Tiny) -> None:
    model = tiny.model(5)
    prompt = tiny.prompt(model, [1], seed=5)
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        embeds = model.get_input_embeddings()(prompt.inputs["input_ids"])
        for call in (model, model.model, model.base_model):
            with pytest.raises(errors.PrefillError):
                call(inputs_embeds=embeds, attention_mask=prompt.inputs["attention_mask"])
        with pytest.raises(errors.PrefillError):
            model.generate(inputs_embeds=embeds, attention_mask=prompt.inputs["attention_mask"], **GREEDY)
        assert scr.stats.prefills == 0


def test_an_image_that_never_reaches_the_base_is_an_error(known: Known) -> None:
    """Whoever replaces a forward gets an error, and not an unedited answer."""
    model = known.model
    with torch.no_grad(), SCR(model, config=CONFIG, mode="two-pass") as scr:
        shadowed = model.model.forward
        model.model.forward = lambda *args, **kwargs: type(model.model).forward(model.model, *args, **kwargs)
        for call in (lambda: model(**known.inputs), lambda: model.generate(**known.inputs, **GREEDY)):
            with pytest.raises(errors.EditNotFiredError, match="did not reach"):
                call()
        assert (scr.stats.prefills, scr.reports) == (0, [])
        model.model.forward = shadowed
        assert known.same(model(**known.inputs).logits)
        with pytest.raises(errors.EditNotFiredError, match="no prefill"):
            model.generate(**known.inputs, **GREEDY, custom_generate=_without_images)
    assert snapshot(model) == known.before


def _without_images(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
    model(input_ids=torch.where(input_ids == 99, 5, input_ids))
    return input_ids


# -- copies ----------------------------------------------------------------------------------------------------------


@every(SOME)
@pytest.mark.parametrize("mode", ["two-pass", "uniform"])
def test_copies_of_an_attached_model_are_plain(tiny: Tiny, mode: Any, tmp_path: Any) -> None:
    """Deep copies, pickles, saved folders and state dicts are those of the model without SCR."""
    model = tiny.model(6)
    prompt = tiny.prompt(model, [1], seed=6)
    wrapper = nn.ModuleDict({"inner": model})
    with torch.no_grad():
        vanilla = model(**prompt.inputs).logits
        plain, keys = snapshot(copy.deepcopy(model)), list(model.state_dict())
        unused = tiny.model(6)  # after a first call, transformers' own hooks can't be pickled
        with SCR(model, config=CONFIG, mode=mode) as scr, SCR(unused, config=CONFIG, mode=mode):
            edited = model(**prompt.inputs).logits
            copies = [copy.deepcopy(model), copy.deepcopy(wrapper)["inner"], pickle.loads(pickle.dumps(unused))]
            assert list(model.state_dict()) == keys
            model.save_pretrained(tmp_path / "saved")
            torch.save(unused, tmp_path / "whole.pt")
            copies.append(torch.load(tmp_path / "whole.pt", weights_only=False))
            copies.append(type(model).from_pretrained(tmp_path / "saved").eval())
            for other in copies:
                raw = snapshot(other)
                assert [item for item in raw[:-2] if isinstance(item[0], type) and item[1] and "scr" in item[1]] == []
                assert torch.equal(other(**prompt.inputs).logits, vanilla)
            assert scr.stats.prefills == 1
            assert all("forward" not in vars(module) for other in copies for module in other.modules())
            if mode == "two-pass":
                with SCR(copies[0], config=CONFIG, mode=mode) as second:
                    assert torch.equal(copies[0](**prompt.inputs).logits, edited)
                assert second.stats.prefills == 1
            assert torch.equal(model(**prompt.inputs).logits, edited) or mode == "uniform"
        assert torch.equal(model(**prompt.inputs).logits, vanilla)
        assert len(snapshot(copies[0])) == len(plain)


def test_a_copy_made_in_the_middle_of_a_prefill_is_plain(known: Known) -> None:
    copies: list[Any] = []
    hook = known.model.model.language_model.layers[1].register_forward_pre_hook(
        lambda *_: copies.append(copy.deepcopy(known.model)) if not copies else None
    )
    with torch.no_grad(), SCR(known.model, config=CONFIG, mode="two-pass"):
        assert known.same(known.model(**known.inputs).logits)
    hook.remove()
    for layer in copies[0].model.language_model.layers:
        layer._forward_pre_hooks.clear()
    with torch.no_grad():
        assert torch.equal(copies[0](**known.inputs).logits, known.vanilla)
        with SCR(copies[0], config=CONFIG, mode="two-pass"):
            assert known.same(copies[0](**known.inputs).logits)
        assert torch.equal(copies[0](**known.inputs).logits, known.vanilla)
