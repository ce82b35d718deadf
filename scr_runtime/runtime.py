"""SCR: attaches to a transformers model, finds each prefill, asks the provider, edits, and reports what it did."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from scr_runtime import sources as providers
from scr_runtime.artifact import load_predictor
from scr_runtime.attention import select_wrapper
from scr_runtime.config import Mode, SCRConfig
from scr_runtime.deferred import DeferredChecks
from scr_runtime.diagnostic import Decoder, StateLayerOutput, block_arguments, residual_stream
from scr_runtime.errors import (
    AttachError,
    ConfigurationError,
    EditNotFiredError,
    NonFiniteScoresError,
    PredictorError,
    PrefillError,
    UnsupportedModelError,
)
from scr_runtime.families import family_of
from scr_runtime.generate import Choice, GenerateShadow
from scr_runtime.identity import usable_predictor
from scr_runtime.layout import VisualLayout, count_mismatch, visual_layout
from scr_runtime.network import SourcePredictor
from scr_runtime.redistribute import EditPlan, apply_edit, merge_plans, plan_edit
from scr_runtime.reports import ImageReport, report_images
from scr_runtime.session import ImageSession, Question
from scr_runtime.sources import Fallback
from scr_runtime.stats import SCRStats, StatsCounter

logger = logging.getLogger("scr_runtime")

_OWNER = "_scr_attached"


@dataclass
class _Run:
    """One running prefill.

    Attributes:
        layout: Where its images are.
        decoder: The decoder that runs it.
        stack: Its hooks.
        continued: Whether it continues a filled cache.
        fresh: Whether its sources were chosen here, and not in an earlier step of the same ``generate``.
        fired: The blocks that have been edited.
        choice: Its sources, per group; ``None`` before the state layer.
        plan: The edit; ``None`` before the state layer.
    """

    layout: VisualLayout
    decoder: Decoder
    stack: ExitStack
    continued: bool
    fresh: bool = False
    fired: list[int] = field(default_factory=list[int])
    choice: list[Choice] | None = None
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
        self._warned: set[str] = set()  # kinds of fallback that the log has named
        self._family = family_of(model)
        self._blocks = self._family.blocks(model)
        self._predictor, reason = self._resolve_predictor(predictor, config, processor)
        self.config = self._settings(config, reason)
        if mode != "off":
            self.config.check_depth(len(self._blocks))
        if self._predictor is not None and threshold is None:
            threshold = self._predictor.threshold
        self._threshold = threshold or 0.0
        self._provide = providers.provider_of(mode, self._predictor, reason, self._threshold, seed)
        asked = self._predictor if mode in ("one-pass", "auto") else None
        self._reads_question = asked is not None and asked.config.reads_question
        self._detach: ExitStack | None = None
        self._generate = GenerateShadow(model, self._family)
        self._question: Question | None = None
        self._run: _Run | None = None
        self._last: _Run | None = None
        self._checks = DeferredChecks()
        self._counter = StatsCounter(self._predictor)
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
                stack.callback(self._generate.install())
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
        self._checks.raise_failed(wait=True)

    def __enter__(self) -> SCR:
        return self.attach()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._checks.drop()  # the body's exception outranks deferred checks
        self.detach()

    @property
    def reports(self) -> list[ImageReport]:
        """One report per image of the last prefill, in order of appearance. Waits for the device.

        Raises:
            NonFiniteScoresError: If the last prefill's scores were not finite.
            PrefillError: If its visual tokens did not fit the grids.
        """
        self._checks.raise_failed(wait=True)
        if self._last is None or self._last.choice is None:
            return []
        found: dict[int, ImageReport] = {}
        for group, choice in zip(self._last.layout.groups, self._last.choice, strict=True):
            reports = report_images(choice, self._predictor, tuple(self._last.fired))
            found |= zip(group.images, reports, strict=True)
        return [found[image] for image in sorted(found)]

    @property
    def stats(self) -> SCRStats:
        """What was done since this SCR was made, or since ``reset_stats``. Waits for the device.

        A prefill counts when its forward pass is over; one that raises doesn't.
        """
        return self._counter.snapshot()

    def reset_stats(self) -> None:
        """Sets ``stats`` back to zero."""
        self._counter.reset()

    # -- several questions about one image -----------------------------------------------------------------------

    def image(self, **inputs: Any) -> ImageSession:
        """Opens a session for several questions about one image, whose features and prefix are computed once.

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
        self._checks.raise_failed(wait=False)
        call = dict(zip(self._parameters, args, strict=False)) | kwargs
        if not self._family.brings_images(self.model, call):
            return
        if module.training:
            raise UnsupportedModelError("the model is in training mode; call model.eval() before using SCR")
        run = self._start(call)
        state, (first, last) = self.config.state_layer, self.config.edit_layers
        with run.stack as stack:
            stack.callback(run.decoder.keep_call(self.model))
            choose = functools.partial(self._after_state_layer, run)
            hook = self._blocks[state].register_forward_hook(choose, with_kwargs=True)
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
        generate = self._generate.running
        call_length = generate.prompt_length if generate is not None else None
        given = {key: value for key, value in call.items() if value is not None}
        images = self._family.image_grids(self.model, {**(generate.inputs if generate is not None else {}), **given})
        visual = self._family.visual_tokens(self.model, input_ids)
        layout = visual_layout(visual, call.get("attention_mask"), images, call_length)
        self._checks.require(layout.edge, layout.fits, lambda: count_mismatch(layout))
        cache, fresh_cache = call.get("past_key_values"), generate is not None and generate.fresh_cache
        continued = cache is not None and not fresh_cache and int(cache.get_seq_length()) > 0
        return _Run(layout, Decoder(self._family, self._blocks), ExitStack(), continued)

    def _after_state_layer(
        self, run: _Run, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        generate, hidden = self._generate.running, residual_stream(output)
        with torch.no_grad():
            run.choice = None if generate is None else generate.choice
            run.fresh = run.choice is None
            if run.choice is None:
                call = block_arguments(module, args, kwargs)
                asked, wide = self._question, self._reads_question
                state = StateLayerOutput(hidden, run.layout, self.config, run.decoder, call, asked, wide)
                run.choice = self._choose(state, run.continued)
            if generate is not None:
                generate.choice = run.choice
            plans = [
                plan_edit(choice.sources, group.grid, self.config, group.positions, hidden.dtype)
                for group, choice in zip(run.layout.groups, run.choice, strict=True)
            ]
            run.plan = merge_plans(plans)
        layer = self.config.state_layer
        if self.config.edit_layers[0] == layer:
            _EditHook(run, layer)(module, args, output)

    def _choose(self, state: StateLayerOutput, continued: bool) -> list[Choice]:
        if continued and self.mode in ("two-pass", "auto"):
            raise PrefillError(
                "an image in a prompt that continues a filled cache: the diagnostic run would not see the "
                "earlier turns. Start from an empty cache, or use mode='one-pass'."
            )
        groups = state.layout.groups
        norms = [torch.linalg.vector_norm(state.states(group), dim=-1, dtype=torch.float32) for group in groups]
        chosen: list[Choice] = []
        for scores, norm in zip(self._provide(state), norms, strict=True):
            k = scores.rule.k
            values, patches = scores.rule.rank(scores.scores)
            self._checks.require(values[:, :k], _all_finite, _not_finite)  # NaN ranks first, so the best K show it
            chosen.append(Choice(scores, patches[:, :k], norm))
        return chosen

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        run.stack.close()
        run.decoder.call.clear()
        self._last = run
        if output is None:
            return  # the forward raised, and its exception is on the way
        first, last = self.config.edit_layers
        expected = list(range(first, last + 1))
        if run.fired != expected:
            raise EditNotFiredError(
                f"blocks {expected} should have been edited in this prefill, but {run.fired} were. A language model "
                "that is compiled as a whole ignores hooks where an earlier call was traced without them: compile "
                "its blocks one by one."
            )
        self._count(run)

    def _count(self, run: _Run) -> None:
        """Statistics and log of a prefill that is over. Nothing here waits for the device."""
        assert run.choice is not None  # every edit fired
        scores = [choice.scores for choice in run.choice]
        chosen = scores if run.fresh else []
        self._counter.add(chosen, len(run.fired))
        for fallback in (fallback for group in chosen for fallback in group.fallbacks):
            self._log_once(fallback)
        if logger.isEnabledFor(logging.DEBUG):
            names = [name for group in scores for name in group.providers]
            counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
            logger.debug("prefill of %d images: %s; %d blocks edited", len(names), counts, len(run.fired))

    def _log_once(self, fallback: Fallback | None) -> None:
        """Logs each kind of fallback once; low confidence is expected and not logged."""
        if fallback is None or fallback.kind == providers.LOW_CONFIDENCE or fallback.kind in self._warned:
            return
        self._warned.add(fallback.kind)
        logger.warning("an image fell back to the diagnostic run (logged once): %s", fallback.reason)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _resolve_predictor(
        self, given: str | os.PathLike[str] | SourcePredictor | None, config: SCRConfig | None, processor: Any
    ) -> tuple[SourcePredictor | None, str | None]:
        """The predictor, or why there is none."""
        if self.mode == "off":
            return None, None
        if self.mode not in ("one-pass", "auto"):  # only what it was fitted with is of use
            return given if given is None or isinstance(given, SourcePredictor) else load_predictor(given), None
        try:
            return usable_predictor(given, self.model, processor, config), None
        except (PredictorError, ConfigurationError) as error:
            if self.mode == "one-pass":
                raise
            message = f"predictor not usable, every prefill runs two-pass: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            logger.warning(message)
            self._warned.add(providers.NO_PREDICTOR)
            return None, str(error)

    def _settings(self, given: SCRConfig | None, reason: str | None) -> SCRConfig:
        """The settings in force: those given, else the predictor's."""
        if given is not None:
            return given
        if self._predictor is not None and self._predictor.info:
            return SCRConfig.from_dict(self._predictor.info["scr"])
        if self.mode == "off":
            return SCRConfig()
        why = f" ({reason})" if reason else ""
        raise ConfigurationError(
            f"no settings: give config=SCRConfig(...), or a predictor folder that holds them{why}"
        )


class _EditHook:
    """Forward hook of one edited block."""

    def __init__(self, run: _Run, layer: int) -> None:
        self.run = run
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.run.plan is None:
            return  # the state layer was never seen: _after_forward raises
        apply_edit(residual_stream(output), self.run.plan)
        self.run.fired.append(self.layer)


def _all_finite(values: list[list[float]]) -> bool:
    return all(math.isfinite(value) for row in values for value in row)


def _not_finite() -> NonFiniteScoresError:
    return NonFiniteScoresError(
        "the source scores of a prefill hold NaN or infinity, so its output is not usable. Causes seen: no text "
        "after the image in the prompt, activations that overflow float16, a damaged predictor. mode='auto' runs "
        "two-pass instead of a failing predictor."
    )
