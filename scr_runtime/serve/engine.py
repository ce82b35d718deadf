"""The model that is served, with its processor and its predictor: one request in, one answer out, in one thread."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any, get_args

import PIL.Image
import torch
from jinja2 import TemplateError
from PIL.Image import Image as PILImage
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

from scr_runtime.artifact import load_predictor
from scr_runtime.config import Mode, SCRConfig
from scr_runtime.errors import EditNotFiredError, SCRError
from scr_runtime.families import blocks_of
from scr_runtime.identity import usable_predictor
from scr_runtime.network import SourcePredictor
from scr_runtime.reports import ImageReport
from scr_runtime.runtime import SCR
from scr_runtime.serve.pictures import decoded
from scr_runtime.serve.request import Asked, ChatRequest, ImagePart, RefusedError, TextPart
from scr_runtime.serve.settings import ServeSettings
from scr_runtime.stats import SCRStats

_PARTS = [{"type": "image_url", "image_url": {"url": "none"}}, {"type": "text", "text": "What is in the image?"}]
_SELF_TEST = {"model": "", "messages": [{"role": "user", "content": _PARTS}], "max_tokens": 2}


class StoppedError(Exception):
    """The request's client went away, or its time was over."""


@dataclass(frozen=True)
class Question:
    """A request, and its pictures in order of appearance, whose headers have been read."""

    asked: ChatRequest
    pictures: list[PILImage]


@dataclass(frozen=True)
class Answer:
    """What the model said, and what SCR did.

    Attributes:
        text: All of it.
        finish: `stop` or `length`.
        mode: In force.
        has_images: Whether there was something to edit.
        prompt_tokens: Visual ones among them.
        completion_tokens: The end token among them.
        prefill_seconds: From the call to its first token.
        reports: One per image.
        stats: Of this request.
    """

    text: str
    finish: str
    mode: Mode
    has_images: bool
    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    reports: list[ImageReport]
    stats: SCRStats

    @property
    def usage(self) -> dict[str, int]:
        """As OpenAI counts."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Engine:
    """One model and its predictor. An SCR is made for each request (1 to 2 ms), so that modes never meet.

    Args:
        model: Of a supported family, in eval mode.
        processor: Its processor.
        predictor: None leaves one-pass and auto out.
        settings: The server's.

    Attributes:
        unavailable: Modes that can't be asked for -> why.

    Raises:
        SCRError: The predictor is for another model, or the server's own mode can't run.
    """

    def __init__(self, model: Any, processor: Any, predictor: SourcePredictor | None, settings: ServeSettings) -> None:
        self._model, self._processor, self._settings = model, processor, settings
        self._predictor = None if predictor is None else usable_predictor(predictor, model, processor)
        self._config = SCRConfig.for_depth(len(blocks_of(model))) if predictor is None else None
        tokenizer = processor.tokenizer
        self._template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        special: list[str | None] = [*tokenizer.all_special_tokens, getattr(processor, "image_token", None)]
        self._special = {token for token in special if token}
        self._context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.unavailable: dict[Mode, str] = {}
        for mode in get_args(Mode):
            try:
                self._scr(mode, None)
            except SCRError as error:
                if mode == settings.default_mode:
                    raise
                self.unavailable[mode] = str(error)

    @property
    def modes(self) -> list[Mode]:
        """What may be asked for."""
        return [mode for mode in get_args(Mode) if mode not in self.unavailable]

    def check(self, asked: ChatRequest) -> None:
        """Checks what can be known before any work.

        Raises:
            RefusedError: If it can't be served.
        """
        name, scr, text = self._settings.served_name, asked.scr, asked.text
        if asked.model != name:
            raise RefusedError(404, "model_not_found", f"this server has one model, {name!r}", param="model")
        if scr.mode in self.unavailable:
            raise RefusedError(
                400, "mode_unavailable", f"mode {scr.mode!r}: {self.unavailable[scr.mode]}", param="scr.mode"
            )
        if scr.threshold is not None and self._mode(scr) != "auto":
            raise RefusedError(400, "invalid_request", "a threshold is mode auto's alone", param="scr.threshold")
        if len(text) > self._settings.max_characters:
            message = f"the texts have {len(text):,} characters; the most is {self._settings.max_characters:,}"
            raise RefusedError(413, "text_too_long", message, param="messages")
        found = next((token for token in self._special if token in text), None)
        if found is not None:
            message = f"a text holds {found!r}, which is no text to this model but a part of its prompts"
            raise RefusedError(400, "invalid_request", message, param="messages")
        most = self._settings.max_tokens
        if asked.limit is not None and asked.limit > most:
            raise RefusedError(400, "invalid_request", f"an answer has {most} tokens at most here", param="max_tokens")

    def answer(self, question: Question, say: Callable[[str], None], stop: Event) -> Answer:
        """Answers, in the calling thread, which has the model to itself.

        Args:
            question: Checked before.
            say: Gets the answer piece by piece.
            stop: Ends the generation at the next token.

        Raises:
            RefusedError: A picture is broken, or the prompt doesn't fit.
            StoppedError: If it was stopped.
        """
        asked, mode = question.asked, self._mode(question.asked.scr)
        inputs = self._inputs(question)
        length = int(inputs["input_ids"].shape[1])
        config = self._generation(asked, length)
        streamer = _Streamer(self._processor.tokenizer, say, stop)
        torch.manual_seed(secrets.randbits(63) if asked.seed is None else asked.seed)
        begun = time.monotonic()
        with self._scr(mode, asked.scr.threshold) as scr:
            self._model.generate(**inputs, generation_config=config, streamer=streamer)
            reports = [] if mode == "off" else scr.reports
        ends = config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return Answer(
            text="".join(streamer.said),
            finish="stop" if streamer.tokens[-1] in ends else "length",
            mode=mode,
            has_images=bool(question.pictures),
            prompt_tokens=length,
            completion_tokens=len(streamer.tokens),
            prefill_seconds=streamer.first - begun,
            reports=reports,
            stats=scr.stats,
        )

    def self_test(self) -> Answer:
        """Asks about a picture in the server's mode, and with the predictor if there is one.

        Raises:
            EditNotFiredError: If an edit that should have been made was not.
        """
        modes: list[Mode] = ["one-pass"] if self._predictor is not None else []
        return [self._tested(mode) for mode in (*modes, self._settings.default_mode)][-1]

    def _tested(self, mode: Mode) -> Answer:
        asked = ChatRequest.model_validate(_SELF_TEST | {"scr": {"mode": mode}})
        answer = self.answer(Question(asked, [PIL.Image.radial_gradient("L")]), lambda text: None, Event())
        if mode != "off" and not answer.stats.edits:
            raise EditNotFiredError(f"the self-test in mode {mode!r} edited nothing")
        return answer

    def _mode(self, scr: Asked) -> Mode:
        return scr.mode or self._settings.default_mode

    def _scr(self, mode: Mode, threshold: float | None) -> SCR:
        if mode == "auto":
            threshold = self._settings.threshold if threshold is None else threshold
        if mode == "auto" and self._predictor is None:
            mode = "one-pass"  # raises: auto alone would run two-pass
        return SCR(
            self._model, config=self._config, predictor=self._predictor, mode=mode, threshold=threshold,
            processor=self._processor,
        )  # fmt: skip

    def _inputs(self, question: Question) -> Any:
        pictures = iter(question.pictures)
        turns = [{"role": turn.role, "content": [_part(part, pictures) for part in turn.content]}
                 for turn in question.asked.messages]  # fmt: skip
        try:
            inputs = self._processor.apply_chat_template(
                turns, chat_template=self._template, add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
        except (TemplateError, ValueError) as error:  # roles that don't alternate, an image of 1 x 1000 pixels ...
            message = f"the model's chat template or processor takes no such messages: {error!s:.200}"
            raise RefusedError(400, "invalid_request", message, param="messages") from error
        return inputs.to(self._model.device, dtype=self._model.dtype)

    def _generation(self, asked: ChatRequest, length: int) -> Any:
        """The settings of a request for ``generate``; nothing of sampling is left to the model's own."""
        most, room = self._settings.max_tokens, None if self._context is None else self._context - length
        wanted = asked.limit
        if room is not None and room < (wanted or 1):
            message = f"{length} tokens of the prompt and {wanted or 1} of the answer; the model takes {self._context}"
            raise RefusedError(400, "context_length_exceeded", message, param="messages")
        sampled = asked.heat > 0
        config = copy.deepcopy(self._model.generation_config)
        config.update(
            max_new_tokens=wanted or min(most, most if room is None else room), max_length=None, num_beams=1,
            do_sample=sampled, temperature=asked.heat if sampled else None, top_k=0 if sampled else None,
            top_p=asked.top_p if sampled else None, num_return_sequences=1, return_dict_in_generate=False,
        )  # fmt: skip
        return config


class _Streamer(TextStreamer):
    """Passes an answer on, word by word."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None], stop: Event) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say, self._stop = say, stop
        self.tokens: list[int] = []
        self.said: list[str] = []
        self.first = 0.0

    def put(self, value: Any) -> None:
        if self._stop.is_set():
            raise StoppedError
        if not self.next_tokens_are_prompt:
            self.first = self.first or time.monotonic()
            self.tokens += value.tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.said.append(text)
            self._say(text)


def _part(part: TextPart | ImagePart, pictures: Any) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": decoded(next(pictures))}


def open_engine(settings: ServeSettings) -> Engine:
    """Loads the model, its processor and its predictor, and checks the predictor's golden pair.

    Raises:
        SCRError: About the predictor, or the model's family.
        OSError, ValueError: As transformers raises them.
    """
    predictor = None
    if settings.predictor is not None:
        predictor = load_predictor(settings.predictor, revision=settings.revision, verify=True)
    device = torch.device(settings.device) if settings.device != "auto" else _accelerator()
    dtype: Any = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if settings.dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    given: dict[str, Any] = {"revision": settings.model_revision, "trust_remote_code": False}
    processor: Any = AutoProcessor.from_pretrained(settings.model, **given)
    load: Any = AutoModelForImageTextToText.from_pretrained
    model, info = load(settings.model, dtype=dtype, output_loading_info=True, **given)
    if info["missing_keys"]:  # transformers fills them at random, with a warning
        raise ValueError(f"{settings.model} lacks the weights {', '.join(sorted(info['missing_keys'])[:3])} ...")
    return Engine(model.to(device).eval(), processor, predictor, settings)


def _accelerator() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
