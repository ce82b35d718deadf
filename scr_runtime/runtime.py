"""SCR: attaches to a transformers model, finds each prefill, asks the provider, edits, and reports what it did."""

from __future__ import annotations

import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from scr_runtime import sources as providers
from scr_runtime.artifact import load_predictor
from scr_runtime.attention import select_wrapper
from scr_runtime.config import SCRConfig
from scr_runtime.errors import (
    AttachError,
    ConfigurationError,
    EditNotFiredError,
    NonFiniteScoresError,
    PredictorError,
    PredictorMismatchError,
    PrefillError,
    SCRError,
    UnsupportedModelError,
)
from scr_runtime.families import family_of, keep_decoder_call, model_differences
from scr_runtime.layout import VisualLayout, count_mismatch, visual_layout
from scr_runtime.network import SourcePredictor
from scr_runtime.redistribute import (
    EditPlan,
    Grid,
    apply_edit,
    claims_of,
    credit_entropy,
    effective_num_sources,
    eligible_patches,
    merge_plans,
    plan_edit,
    rank_patches,
)
from scr_runtime.session import ImageSession, Question
from scr_runtime.sources import Fallback, Prefill, Scores
from scr_runtime.stats import SCRStats, Tally
from scr_runtime.types import Mode

logger = logging.getLogger("scr_runtime")

_OWNER = "_scr_attached"


@dataclass(frozen=True)
class ImageReport:
    """What SCR did to one image of the last prefill.

    Attributes:
        provider: Who chose the sources: ``"one-pass"``, ``"two-pass"`` or ``"uniform"``.
        fallback_reason: Why the diagnostic run stood in for the predictor; ``None`` if it did not.
        sources: The chosen patches in row-major order of the grid, best first.
        confidence: Calibrated expected share of true sources among them; ``None`` if no predictor was asked.
        entropy: Credit entropy of the state layer's output before the edit, eq. (2), in nats.
        entropy_normalised: The same divided by ln N, comparable between grids.
        grid: Rows and columns of patches.
        layers_edited: The decoder blocks whose output was edited.
        drift: How many times wider or narrower the predictor's features reach than those of its fit; ``None`` if it
            was not asked or has no drift guard.
    """

    provider: str
    fallback_reason: str | None
    sources: list[int]
    confidence: float | None
    entropy: float
    entropy_normalised: float
    grid: Grid
    layers_edited: tuple[int, ...]
    drift: float | None = None


@dataclass
class _Choice:
    """Sources of one prefill, kept so that a ``generate`` without a cache uses them again at every step."""

    sources: list[Tensor]  # per group [I, K]
    scores: list[Scores]
    norms: list[Tensor]  # per group [I, N]


@dataclass
class _Generate:
    """One running ``generate`` call."""

    prompt_length: int | None
    fresh_cache: bool
    inputs: Mapping[str, Any]
    choice: _Choice | None = None


@dataclass
class _Run:
    """One running prefill."""

    layout: VisualLayout
    stack: ExitStack
    past: bool
    decoder_call: dict[str, Any] = field(default_factory=dict[str, Any])
    fresh: bool = False
    fired: list[int] = field(default_factory=list[int])
    choice: _Choice | None = None
    plan: EditPlan | None = None


class SCR:
    """Spatial Credit Redistribution around a model that is otherwise left as it is.

    Use it as a context manager, or call ``attach`` and ``detach``. While it is attached, each prefill that
    brings images is edited; text-only calls and decode steps run without any hook on the decoder.

    Args:
        model: A transformers model of a supported family, in eval mode.
        config: The method's settings. ``None`` takes those that the predictor was fitted with.
        predictor: A predictor folder, or a loaded SourcePredictor. ``None`` where the mode needs none.
        mode: ``"one-pass"``: the predictor chooses. ``"two-pass"``: the nested diagnostic run chooses.
            ``"auto"``: the predictor, and the diagnostic run for images of low confidence; two-pass with a
            warning if the predictor can't be used. ``"uniform"``: seeded random sources, the paper's control.
            ``"off"``: nothing is touched.
        threshold: Confidence under which ``auto`` falls back. ``None`` takes the predictor's own.
        seed: Of the uniform draw.
        processor: The model's processor, to check that its image back end is the one that the predictor was fitted
            with. Without it that is not checked.

    Attributes:
        config: The settings in force.
        mode: As given.

    Raises:
        ConfigurationError: If the mode is unknown, or it needs a predictor or a config that is not given, or
            the config doesn't fit the model's depth.
        UnsupportedModelError: If the model's family is not supported.
        PredictorError: In mode ``"one-pass"``, if the predictor is missing, corrupt or made for another model.

    Example:
        >>> with SCR(model, predictor="runs/predictors/scene-llava", mode="auto") as scr:  # doctest: +SKIP
        ...     tokens = model.generate(**inputs)
        >>> scr.reports[0].provider  # doctest: +SKIP
        'one-pass'
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        config: SCRConfig | None = None,
        predictor: str | os.PathLike[str] | SourcePredictor | None = None,
        mode: Mode = "auto",
        threshold: float | None = None,
        seed: int = 0,
        processor: Any = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ConfigurationError(f"mode={mode!r}: expected one of {list(get_args(Mode))}")
        self.model: Any = model
        self.mode: Mode = mode
        self._processor = processor
        self._warned: set[str] = set()  # kinds of fallback that the log has told of
        self._family = family_of(model)
        self._blocks = self._family.blocks(model)
        self._predictor, reason = self._resolve_predictor(predictor, config) if mode != "off" else (None, None)
        if config is None:
            if self._predictor is None or not self._predictor.info:
                if mode != "off":
                    raise ConfigurationError(
                        "no settings: give config=SCRConfig(...), or a predictor folder that holds them"
                        + (f" ({reason})" if reason else "")
                    )
                config = SCRConfig()
            else:
                config = SCRConfig.from_dict(self._predictor.info["scr"])
        if mode != "off":
            config.check_depth(len(self._blocks))
        self.config = config
        if self._predictor is not None and threshold is None:
            threshold = self._predictor.threshold
        self._threshold = threshold or 0.0
        self._provide = self._build_provider(reason, self._threshold, seed)
        asked = self._predictor if mode in ("one-pass", "auto") else None
        self._reads_question = asked is not None and asked.config.reads_question
        self._detach: ExitStack | None = None
        self._generate: _Generate | None = None
        self._question: Question | None = None
        self._run: _Run | None = None
        self._last: _Run | None = None
        self._pending: list[tuple[Tensor, Any, Callable[[Any], bool], Callable[[], SCRError]]] = []
        self._tally = Tally(self._judge)
        self._parameters = tuple(inspect.signature(self.model.forward).parameters)

    # -- attaching -----------------------------------------------------------------------------------------------

    def attach(self) -> SCR:
        """Starts to edit the model's prefills.

        Raises:
            AttachError: If an SCR is attached to this model already.
            UnsupportedModelError: If the attention implementation can't be wrapped.
        """
        if _OWNER in self.model.__dict__:
            raise AttachError(
                f"an SCR is attached to this {type(self.model).__name__} already; detach it first "
                "(two edits of one pass would stack)"
            )
        with ExitStack() as stack:
            self.model.__dict__[_OWNER] = self
            stack.callback(self.model.__dict__.pop, _OWNER, None)
            if self.mode != "off":
                if self._family.tap is None:
                    stack.callback(select_wrapper(self._family.text_config(self.model)))
                pre = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
                stack.callback(pre.remove)
                post = self.model.register_forward_hook(self._after_forward, always_call=True)
                stack.callback(post.remove)
                stack.callback(self._wrap_generate())
            self._detach = stack.pop_all()
        logger.info(
            "attached to %s (%s): mode %s, blocks %d-%d, %d sources, strength %g, %s",
            type(self.model).__name__,
            self._family.name,
            self.mode,
            *self.config.edit_layers,
            self.config.num_sources,
            self.config.strength,
            "no predictor" if self._predictor is None else f"threshold {self._threshold:.3f}",
        )
        return self

    def detach(self) -> None:
        """Leaves the model as it was. Detaching twice does nothing.

        Raises:
            AttachError: If a forward pass is running.
            NonFiniteScoresError: If scores of an earlier prefill on an accelerator were not finite.
            PrefillError: If its visual tokens did not fit the grids.
        """
        if self._run is not None:
            raise AttachError("a forward pass is running; detach after it has returned")
        if self._detach is not None:
            self._detach.close()
            self._detach = None
        self._raise_pending(wait=True)

    def __enter__(self) -> SCR:
        return self.attach()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._pending.clear()  # the body's own exception is the news
        self.detach()

    @property
    def reports(self) -> list[ImageReport]:
        """One report per image of the last prefill, in order of appearance. Waits for the device.

        Raises:
            NonFiniteScoresError: If the last prefill's scores were not finite.
            PrefillError: If its visual tokens did not fit the grids.
        """
        self._raise_pending(wait=True)
        if self._last is None or self._last.choice is None:
            return []
        choice, layers = self._last.choice, tuple(self._last.fired)
        reports: dict[int, ImageReport] = {}
        for group, chosen, scores, norms in zip(
            self._last.layout.groups, choice.sources, choice.scores, choice.norms, strict=True
        ):
            entropies = credit_entropy(norms)
            normalised = entropies / torch.log(torch.tensor(float(norms.shape[-1])))
            sure = drift = None
            if self._predictor is not None and scores.predicted is not None:
                sure = providers.confidence(self._predictor, scores.predicted, group.grid, self.config)
                drift = None if scores.spread is None else self._predictor.drift(scores.spread)
            for index, image in enumerate(group.images):
                fallback = scores.fallbacks[index]
                reports[image] = ImageReport(
                    provider=scores.providers[index],
                    fallback_reason=None if fallback is None else fallback.reason,
                    sources=chosen[index].tolist(),
                    confidence=None if sure is None else float(sure[index]),
                    entropy=float(entropies[index]),
                    entropy_normalised=float(normalised[index]),
                    grid=group.grid,
                    layers_edited=layers,
                    drift=None if drift is None else float(drift[index]),
                )
        return [reports[image] for image in sorted(reports)]

    @property
    def stats(self) -> SCRStats:
        """What was done since this SCR was made, or since ``reset_stats``. Waits for the device.

        A prefill counts when its forward pass is over; one that raises doesn't.
        """
        return self._tally.snapshot()

    def reset_stats(self) -> None:
        """Sets ``stats`` back to zero."""
        self._tally.reset()

    # -- several questions about one image -----------------------------------------------------------------------

    def image(self, **inputs: Any) -> ImageSession:
        """Opens a session for several questions about one image, whose features and prefix are worked out once.

        ``image.generate(**inputs)`` and ``image(**inputs)`` then stand for ``model.generate`` and ``model``. Sessions
        hold memory (``nbytes``) until they are closed; several may be open at a time.

        Args:
            **inputs: The processor's output for any of the questions.

        Returns:
            The session, open; use it as a context manager, or call its ``close``.

        Raises:
            SessionError: If the prompt has no image, a batch row has none, or rows differ in the length of what
                comes before the end of their last image.
            UnsupportedModelError: If the model can't take image features that were encoded before.
        """
        return ImageSession(self.model, self._family, inputs, self._asking)

    @contextmanager
    def _asking(self, question: Question) -> Generator[None]:
        if self.model.__dict__.get(_OWNER) is not self:
            raise AttachError("the SCR of this image session is not attached to its model; attach it first")
        self._question = question
        try:
            yield
        finally:
            self._question = None

    # -- the pass ------------------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._raise_pending(wait=False)
        call = dict(zip(self._parameters, args, strict=False)) | kwargs
        if not self._family.brings_images(self.model, call):
            return
        if module.training:
            raise UnsupportedModelError("the model is in training mode; call model.eval() before using SCR")
        run = self._start(call)
        state, (first, last) = self.config.state_layer, self.config.edit_layers
        with run.stack as stack:
            stack.callback(keep_decoder_call(self._family, self.model, run.decoder_call))
            hook = self._blocks[state].register_forward_hook(self._after_state_layer, with_kwargs=True)
            stack.callback(hook.remove)
            for layer in range(max(first, state + 1), last + 1):
                hook = self._blocks[layer].register_forward_hook(_EditHook(run, layer))
                stack.callback(hook.remove)
            run.stack = stack.pop_all()
        self._run = run

    def _start(self, call: Mapping[str, Any]) -> _Run:
        input_ids: Tensor | None = call.get("input_ids")
        if input_ids is None:
            raise PrefillError(
                "a prefill with images but without input_ids: the visual tokens can't be found in "
                "inputs_embeds. Pass input_ids with pixel_values, or with mm_encoder_outputs."
            )
        generate = self._generate
        call_length = generate.prompt_length if generate is not None else None
        given = {key: value for key, value in call.items() if value is not None}
        images = self._family.image_grids(self.model, {**(generate.inputs if generate is not None else {}), **given})
        visual = self._family.visual_tokens(self.model, input_ids)
        layout = visual_layout(visual, call.get("attention_mask"), images, call_length)
        self._require(layout.edge, layout.fits, lambda: count_mismatch(layout))
        past = self._has_past(call.get("past_key_values"))
        return _Run(layout, ExitStack(), past)

    def _has_past(self, cache: Any) -> bool:
        if cache is None or (self._generate is not None and self._generate.fresh_cache):
            return False
        return int(cache.get_seq_length()) > 0

    def _after_state_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        run = self._run
        assert run is not None  # the hook lives as long as the run
        hidden = _residual_stream(output)
        with torch.no_grad():
            frozen = self._generate.choice if self._generate is not None else None
            run.fresh = frozen is None
            if frozen is None:
                prefill = Prefill(
                    hidden,
                    run.layout,
                    self.config,
                    self._blocks,
                    args[1:],
                    kwargs,
                    self._family,
                    run.decoder_call,
                    self._question,
                    self._reads_question,
                )
                run.choice = self._choose(prefill)
            else:
                run.choice = frozen
            if self._generate is not None:
                self._generate.choice = run.choice
            plans = [
                plan_edit(chosen, group.grid, self.config, group.positions, hidden.dtype)
                for group, chosen in zip(run.layout.groups, run.choice.sources, strict=True)
            ]
            run.plan = merge_plans(plans)
        state = self.config.state_layer
        if self.config.edit_layers[0] == state:
            _EditHook(run, state)(module, args, output)

    def _choose(self, prefill: Prefill) -> _Choice:
        run = self._run
        assert run is not None
        if run.past and self.mode in ("two-pass", "auto"):
            raise PrefillError(
                "an image in a prompt that continues a filled cache: the diagnostic run would not see the "
                "earlier turns. Start from an empty cache, or use mode='one-pass'."
            )
        norms = [
            torch.linalg.vector_norm(prefill.states(group), dim=-1, dtype=torch.float32)
            for group in prefill.layout.groups
        ]
        results = self._provide(prefill)
        chosen: list[Tensor] = []
        for group, result in zip(prefill.layout.groups, results, strict=True):
            eligible = eligible_patches(group.grid, self.config.exclude_border, result.scores.device)
            k = effective_num_sources(group.grid, self.config)
            claims = claims_of(group.grid, self.config, result.scores.device)
            values, patches = rank_patches(result.scores, eligible, k, claims)
            self._require(values[:, :k], _all_finite, _not_finite)  # NaN ranks first, so the best K tell
            chosen.append(patches[:, :k])
        return _Choice(chosen, results, norms)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        run.stack.close()
        run.decoder_call.clear()
        self._last = run
        first, last = self.config.edit_layers
        expected = list(range(first, last + 1))
        # An output of None means that the forward raised: its own exception goes on.
        if output is not None and run.fired != expected:
            raise EditNotFiredError(
                f"blocks {expected} should have been edited in this prefill, but {run.fired} were. A language model "
                "that is compiled as a whole ignores hooks where an earlier call was traced without them: compile "
                "its blocks one by one."
            )
        if output is not None:
            self._note(run)

    def _note(self, run: _Run) -> None:
        """Statistics and log of a prefill that is over. Nothing here waits for the device."""
        assert run.choice is not None  # every edit fired
        chosen = list(zip((group.grid for group in run.layout.groups), run.choice.scores, strict=True))
        self._tally.add(chosen if run.fresh else [], len(run.fired))
        for _, scores in chosen if run.fresh else []:
            for fallback in scores.fallbacks:
                self._warn_once(fallback)
        if logger.isEnabledFor(logging.DEBUG):
            names = [name for _, scores in chosen for name in scores.providers]
            told = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
            logger.debug("prefill of %d images: %s; %d blocks edited", len(names), told, len(run.fired))

    def _warn_once(self, fallback: Fallback | None) -> None:
        """Low confidence is daily business; any other reason to fall back is told once."""
        if fallback is None or fallback.kind == providers.LOW_CONFIDENCE or fallback.kind in self._warned:
            return
        self._warned.add(fallback.kind)
        logger.warning("an image fell back to the diagnostic run (told once): %s", fallback.reason)

    def _judge(self, grid: Grid, scores: Scores) -> tuple[Tensor, Tensor]:
        """[I] confidence and [I] bool whether the drift guard tripped, for the statistics."""
        predictor, predicted = self._predictor, scores.predicted
        assert predictor is not None and predicted is not None  # only what a predictor said is judged
        sure = providers.confidence(predictor, predicted, grid, self.config)
        if scores.spread is None or predictor.drift_limit is None:
            return sure, torch.zeros_like(sure, dtype=torch.bool)
        return sure, predictor.drift(scores.spread) > predictor.drift_limit

    # -- parts ---------------------------------------------------------------------------------------------------

    def _resolve_predictor(
        self, given: str | os.PathLike[str] | SourcePredictor | None, config: SCRConfig | None
    ) -> tuple[SourcePredictor | None, str | None]:
        """The usable predictor, or why there is none."""
        if self.mode not in ("one-pass", "auto"):
            if isinstance(given, SourcePredictor):
                return given, None
            return (load_predictor(given), None) if given is not None else (None, None)
        try:
            if given is None:
                raise ConfigurationError("no predictor was given: pass predictor=FOLDER")
            predictor = given if isinstance(given, SourcePredictor) else load_predictor(given)
            problems = self._mismatches(predictor, config)
            if problems:
                raise PredictorMismatchError("the predictor is for another model: " + "; ".join(problems))
        except (PredictorError, ConfigurationError) as error:
            if self.mode == "one-pass":
                raise
            message = f"predictor not usable, every prefill runs two-pass: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            logger.warning(message)
            self._warned.add(providers.NO_PREDICTOR)
            return None, str(error)
        weight = self._blocks[0].parameters().__next__()
        return predictor.to(weight.device), None

    def _mismatches(self, predictor: SourcePredictor, config: SCRConfig | None) -> list[str]:
        if predictor.info:
            problems = model_differences(predictor.info["model"], self.model, self._processor)
            fitted = SCRConfig.from_dict(predictor.info["scr"]).state_layer
            if config is not None and config.state_layer != fitted:
                problems.append(f"state_layer is {config.state_layer}, the predictor reads block {fitted}")
            return problems
        size = self._family.text_config(self.model).hidden_size
        found = predictor.config.hidden_size
        return [] if found == size else [f"hidden_size is {size}, the predictor expects {found}"]

    def _build_provider(self, reason: str | None, threshold: float, seed: int) -> providers.Provider:
        if self.mode == "uniform":
            return providers.uniform(seed)
        if self.mode in ("two-pass", "off") or self._predictor is None:
            return providers.diagnosed(None if reason is None else Fallback(providers.NO_PREDICTOR, reason))
        if self.mode == "one-pass":
            return providers.predicted(self._predictor)
        return providers.auto(self._predictor, threshold)

    def _wrap_generate(self) -> Callable[[], None]:
        """Shadows ``model.generate``, so that a prompt's length and a call's end are known; returns the undo."""
        inner = self.model.generate
        shadowed = self.model.__dict__.get("generate")

        def generate(*args: Any, **kwargs: Any) -> Any:
            prompt = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            self._refuse_chunks(args, kwargs)
            outer = self._generate
            self._generate = _Generate(
                prompt_length=prompt.shape[-1] if isinstance(prompt, Tensor) else None,
                fresh_cache=kwargs.get("past_key_values") is None,
                inputs=kwargs,
            )
            try:
                return inner(*args, **kwargs)
            finally:
                self._generate = outer

        self.model.__dict__["generate"] = generate

        def restore() -> None:
            self.model.__dict__.pop("generate", None)
            if shadowed is not None:
                self.model.__dict__["generate"] = shadowed

        return restore

    def _refuse_chunks(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        settings: Any = self.model.generation_config if given is None else given
        size = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        if size is not None and self._family.brings_images(self.model, kwargs):
            raise PrefillError(
                f"a chunked prefill (of {size} tokens) parts sources from their neighbours and from the question: "
                "set prefill_chunk_size=None"
            )

    def _require(self, seen: Tensor, holds: Callable[[Any], bool], error: Callable[[], SCRError]) -> None:
        """Raises ``error`` unless ``holds(seen.tolist())``: at once where reading is free, else when it is."""
        if reading_is_free(seen.device):
            self._pending.append((seen, None, holds, error))
            self._raise_pending(wait=True)
            return
        copy = torch.empty(seen.shape, dtype=seen.dtype, pin_memory=seen.device.type == "cuda")
        copy.copy_(seen, non_blocking=True)
        event = torch.cuda.Event() if seen.device.type == "cuda" else None
        if event is not None:
            event.record()
        self._pending.append((copy, event, holds, error))

    def _raise_pending(self, *, wait: bool) -> None:
        while self._pending:
            seen, event, holds, error = self._pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._pending.pop(0)
            if not holds(seen.tolist()):
                self._pending.clear()
                raise error()


def reading_is_free(device: torch.device) -> bool:
    """Whether the host can read a tensor there without waiting for it. On accelerators it can't."""
    return device.type == "cpu"


def _all_finite(values: list[list[float]]) -> bool:
    return all(math.isfinite(value) for row in values for value in row)


def _not_finite() -> NonFiniteScoresError:
    return NonFiniteScoresError(
        "the source scores of a prefill hold NaN or infinity, so its output is not usable. Causes seen: no text "
        "after the image in the prompt, activations that overflow float16, a damaged predictor. mode='auto' runs "
        "two-pass instead of a failing predictor."
    )


class _EditHook:
    """Forward hook of one edited block."""

    def __init__(self, run: _Run, layer: int) -> None:
        self.run = run
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.run.plan is None:
            return  # the state layer was never seen: _after_forward tells
        apply_edit(_residual_stream(output), self.run.plan)
        self.run.fired.append(self.layer)


def _residual_stream(output: Any) -> Tensor:
    """[B, S, d] residual stream of a block's output, which is a tensor in some families and a tuple in others."""
    return output[0] if isinstance(output, tuple) else output
