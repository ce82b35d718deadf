"""SCR: attaches to a transformers model, and says what was done to its prefills."""

from __future__ import annotations

import logging
import os
import threading
import warnings
import weakref
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from scr_runtime import sources as providers
from scr_runtime.attention import hold, release
from scr_runtime.checks import attention_configs, check_arguments, check_decoder, check_grid, fewer_sources
from scr_runtime.config import Mode, SCRConfig
from scr_runtime.errors import AttachError, ConfigurationError
from scr_runtime.families import blocks_of, family_of, generative_model
from scr_runtime.here import Turns, here
from scr_runtime.identity import choose, fitted_settings, usable_predictor, warn_of_other_settings
from scr_runtime.network import SourcePredictor
from scr_runtime.passes import Asked, Passes
from scr_runtime.places import Place, local_folder
from scr_runtime.prefill import Prefill
from scr_runtime.prefix import Question
from scr_runtime.reports import ImageReport, report_prefill
from scr_runtime.session import ImageSession
from scr_runtime.shadows import Shadows
from scr_runtime.sources import Fallback
from scr_runtime.stats import SCRStats, StatsCounter

logger = logging.getLogger("scr_runtime")

_TURNS = Turns()
_FEWER = "fewer sources"
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[SCR]] = weakref.WeakKeyDictionary()  # by base model


class SCR:
    """Spatial Credit Redistribution around a model that is otherwise left as it is.

    Use it as a context manager, or call ``attach`` and ``detach``. While it is attached, each prefill that
    brings images is edited; text-only calls and decode steps run without any hook on the decoder. Calls may overlap,
    in threads or within one another: each is edited for itself. A call that ends in an exception, an interrupt among
    them, leaves nothing behind.

    Args:
        model: A transformers model of a supported family, in eval mode, or a module that wraps one.
        config: The method's settings. ``None`` takes those that the predictor was fitted with.
        predictor: A predictor folder; ``"models:/NAME@ALIAS"`` of MLflow's registry; ``"ORG/NAME"`` of the Hugging
            Face Hub (``scr_runtime.places.kind_of`` has the rules); or a loaded SourcePredictor. ``None`` where the
            mode needs none.
        mode: ``"one-pass"``: the predictor chooses. ``"two-pass"``: the nested diagnostic run chooses.
            ``"auto"``: the predictor, and the diagnostic run for images of low confidence; two-pass with a
            warning if the predictor can't be used. ``"online"``: the attention of the running pass chooses; the edits
            begin behind it. ``"uniform"``: seeded random sources, the paper's control. ``"off"``: nothing is touched.
        threshold: Confidence under which ``auto`` falls back. ``None`` takes the predictor's own.
        seed: Of the uniform draw.
        processor: The model's processor, to check that its image back end is the one that the predictor was fitted
            with. Without it that is not checked.
        revision: Commit, tag or branch of a predictor on the Hub.

    Attributes:
        model: The transformers model, without a wrapper.
        config: The settings in force.
        mode: As given.

    Raises:
        ConfigurationError: If an argument is of another type or out of range, the mode needs a predictor or a config
            that is not given, or the config doesn't fit the model.
        UnsupportedModelError: If the model's family is not supported, or, in two-pass, auto and online, its decoder.
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
        predictor: Place | SourcePredictor | None = None,
        mode: Mode = "auto",
        threshold: float | None = None,
        seed: int = 0,
        processor: Any = None,
        revision: str | None = None,
    ) -> None:
        check_arguments(config, predictor, mode, threshold, seed)
        self.model: Any = generative_model(model)
        self.mode: Mode = mode
        self._family = family_of(self.model)
        self._blocks = blocks_of(self.model)
        self._predictor, self.config, reason = choose(predictor, self.model, mode, processor, config, revision)
        self._reads_attention = mode in ("two-pass", "auto", "online")
        self._warned: dict[str, object] = {} if reason is None else {providers.NO_PREDICTOR: None}
        self._check_model()
        self._given_threshold, self._seed, self._processor = threshold, seed, processor
        self._threshold = self._threshold_of(self._predictor)
        asked = self._ask(self._predictor, reason)
        self._passes = Passes(self.model, self._family, self.config, mode, asked, self._finished)
        self._shadows = Shadows()
        self._owner = object()  # of the attention wrapper's selection: nobody's model is kept for it
        weakref.finalize(self, release, self._owner).atexit = False
        self._counter = StatsCounter()
        self._last_here = threading.local()
        self._last_anywhere: Prefill | None = None
        self._never_attached = True

    def __repr__(self) -> str:
        """Names model, mode and state."""
        return f"<SCR, {'attached to' if self._is_attached() else 'not attached to'} {self._described()}>"

    def _described(self) -> str:
        first, last = self.config.edit_layers
        known = "no predictor" if self._predictor is None else f"threshold {self._threshold:.3f}"
        return (
            f"{type(self.model).__name__} ({self._family.name}): mode {self.mode}, blocks {first}-{last}, "
            f"{self.config.sources_in_words}, strength {self.config.strength:g}, {known}"
        )

    def _threshold_of(self, predictor: SourcePredictor | None) -> float:
        given = self._given_threshold
        if given is None:
            given = 0.0 if predictor is None else predictor.threshold
        return float(given)

    def _ask(self, predictor: SourcePredictor | None, reason: str | None) -> Asked:
        provide = providers.provider_of(self.mode, predictor, reason, self._threshold_of(predictor), self._seed)
        asked = predictor if self.mode in ("one-pass", "auto") else None
        return Asked(provide, asked is not None and asked.config.reads_question)

    def load(self, predictor: Place | SourcePredictor, *, revision: str | None = None) -> None:
        """Puts another predictor in the place of the one in use, without detaching.

        A prefill asks either the former or the new one: those that have chosen their sources keep them, the next ones
        ask the new one. The settings in force stay; the threshold is the new predictor's, unless this SCR was given
        one. If anything is wrong with the new predictor, the former one stays in use.

        Args:
            predictor: As of ``SCR``.
            revision: Commit, tag or branch of a Hub repository.

        Raises:
            ConfigurationError: If this SCR's mode asks no predictor.
            PredictorError: If it is missing, corrupt or made for another model.
        """
        if self.mode not in ("one-pass", "auto"):
            raise ConfigurationError(f"mode {self.mode!r} asks no predictor, so none can be loaded")
        check_arguments(self.config, predictor, self.mode, self._given_threshold, self._seed)
        with ExitStack() as fetched:
            if isinstance(predictor, str | os.PathLike):
                predictor = fetched.enter_context(local_folder(predictor, revision))
            loaded = usable_predictor(predictor, self.model, self._processor, self.config)
        warn_of_other_settings(self.config, fitted_settings(loaded), stacklevel=3)
        asked = self._ask(loaded, None)
        self._replace(loaded, asked)
        logger.info("loaded another predictor: %r", loaded)

    @_TURNS
    def _replace(self, predictor: SourcePredictor, asked: Asked) -> None:
        self._passes.asked, self._predictor, self._threshold = asked, predictor, self._threshold_of(predictor)

    # -- attaching -----------------------------------------------------------------------------------------------

    def attach(self) -> SCR:
        """Starts to edit the model's prefills.

        Raises:
            AttachError: If an SCR is attached to this model already, or to one that shares its modules.
            UnsupportedModelError: If the attention implementation can't be wrapped.
        """
        attached = self._is_attached()
        try:
            self._install()
            self._never_attached = False
            logger.info("attached to %s", self._described())
            return self
        except BaseException:
            if not attached:
                self._restore()
            raise

    def detach(self) -> None:
        """Leaves the model as it was. Detaching twice does nothing.

        Raises:
            AttachError: If a prefill with images is running, in any thread.
            NonFiniteScoresError: If scores of an earlier prefill on an accelerator were not finite.
            PrefillError: If its visual tokens did not fit the grids.
        """
        self._leave()
        self._passes.checks.raise_failed(wait=True, everywhere=True)

    __enter__ = attach

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if error is None:
            self.detach()
            return
        self._passes.checks.drop(everywhere=True)  # the body's exception outranks deferred checks
        try:
            self._leave()
        except AttachError as refused:
            error.add_note(f"SCR stays attached: {refused}")

    @_TURNS
    def _install(self) -> None:
        if self._attached() is not None:
            raise AttachError(
                f"an SCR is attached to this {type(self.model).__name__} already; detach it first "
                "(two edits of one pass would stack)"
            )
        _ATTACHED[self._passes.base] = weakref.ref(self)
        if self.mode == "off":
            return
        self._check_model()
        if self._reads_attention and self._family.tap is None:
            for config in attention_configs(self.model, self._family):
                hold(config, self._owner)
        self._passes.shadow(self._shadows)
        self._passes.hooks.active = True  # from here on

    def _leave(self) -> None:
        try:
            if self._passes.generate.uncached() or not self._undo():
                raise AttachError("a forward pass is running; detach after it has returned")
        except AttachError:
            raise
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        """Undoes what of ``attach`` was done; once more if that is interrupted."""
        try:
            self._undo()
        except BaseException:
            self._undo()
            raise

    @_TURNS
    def _undo(self) -> bool:
        """Detaches, unless a prefill is running: ``False`` then. It may be called again after any interrupt."""
        if not self._passes.hooks.stop():
            return False
        self._shadows.remove()
        release(self._owner)
        if self._is_attached():
            _ATTACHED.pop(self._passes.base, None)
        return True

    def _attached(self) -> SCR | None:
        """The SCR that is attached to this model, whichever it is."""
        reference = _ATTACHED.get(self._passes.base)
        return None if reference is None else reference()

    def _is_attached(self) -> bool:
        return self._attached() is self

    def _check_model(self) -> None:
        """Checks what can be known before any prefill. Again at ``attach``: a model changes."""
        if self.mode == "off":
            return
        self.config.check_depth(len(self._blocks))
        grid = check_grid(self.model, self._family, self.config)
        fewer = None if grid is None else fewer_sources(grid, self.config)
        if fewer is not None and self._is_first(_FEWER):
            warnings.warn(fewer, RuntimeWarning, stacklevel=3)
        online = self.mode == "online"
        if online:
            self.config.check_online()
        if self._reads_attention:
            check_decoder(self.model, self._family, self.config, online=online)

    # -- what was done -------------------------------------------------------------------------------------------

    @property
    def reports(self) -> list[ImageReport]:
        """One report per image of the last prefill, in order of appearance. Waits for the device.

        The last prefill is the last that was finished in this thread; in a thread that has made none, the last that
        was finished anywhere. One that raised is none.

        Raises:
            NonFiniteScoresError: If the last prefill's scores were not finite.
            PrefillError: If its visual tokens did not fit the grids.
        """
        self._passes.checks.raise_failed(wait=True)
        last = self._last
        if self._never_attached:
            words = "this SCR was never attached: write `with SCR(...)`, or .attach()"
            warnings.warn(words, RuntimeWarning, stacklevel=2)
        if last is None or last.failed:
            return []
        return report_prefill(last.layout, last.counted(), tuple(last.fired), self._family.several_grids)

    @property
    def stats(self) -> SCRStats:
        """What was done since this SCR was made, or since ``reset_stats``, in all threads. Waits for the device.

        A prefill counts when its forward pass is over; one that raises doesn't.
        """
        return self._counter.snapshot()

    def reset_stats(self) -> None:
        """Sets ``stats`` back to zero."""
        self._counter.reset()

    @property
    def _last(self) -> Prefill | None:
        mine: Prefill | None = getattr(self._last_here, "prefill", None)
        return self._last_anywhere if mine is None else mine

    def _finished(self, prefill: Prefill) -> None:
        """Statistics and log of a prefill that is over. Nothing here waits for the device, but for beams."""
        self._last_here.prefill = self._last_anywhere = prefill
        scores = [choice.scores for choice in prefill.counted()]
        fresh = scores if prefill.fresh else []
        self._counter.add(fresh, len(prefill.fired))
        for group in fresh:
            fewer = fewer_sources(group.rule.grid, self.config)
            if fewer is not None and self._is_first(_FEWER):
                logger.warning("%s (logged once)", fewer)
            for fallback in group.fallbacks:
                self._log_once(fallback)
        if logger.isEnabledFor(logging.DEBUG):
            names = [name for group in scores for name in group.providers]
            counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
            logger.debug("prefill of %d images: %s; %d blocks edited", len(names), counts, len(prefill.fired))

    def _log_once(self, fallback: Fallback | None) -> None:
        """Logs each kind of fallback once; low confidence is expected and not logged."""
        if fallback is None or fallback.kind == providers.LOW_CONFIDENCE:
            return
        if self._is_first(fallback.kind):
            logger.warning("an image fell back to the diagnostic run (logged once): %s", fallback.reason)

    def _is_first(self, kind: str) -> bool:
        """Whether nothing of this kind has been said yet; of several threads, for one."""
        mark = object()
        return self._warned.setdefault(kind, mark) is mark

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
        if not self._is_attached():
            raise AttachError("the SCR of this image session is not attached to its model; attach it first")
        outer = here.question
        try:
            here.question = question
            yield
        finally:
            here.question = outer
