"""Settings of this room: what is asked, under which methods, and how answers are read.

The configuration (configs/schema.py) has this very object as its section; a library caller makes it by hand. The
string under a field is its help text. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Benchmark = Literal["pope", "chair", "fidelity", "latency"]
MethodName = Literal[
    "vanilla", "vanilla-sampled", "two-pass", "one-pass", "auto", "uniform", "swapped", "dose-matched", "shift",
    "position", "norm", "least", "noise", "4-connected", "radius-2", "online",
]  # fmt: skip
DecodingName = Literal["greedy", "sampled", "margin"]
ParserName = Literal["official", "exact", "substring"]

PROMPTS = {
    "plain": "{question}",
    "one-word": "{question}\nAnswer the question using a single word or phrase.",
}
"""Named prompts of yes/no questions; one-word is LLaVA-1.5's own wording."""
DEFAULT_METHODS: tuple[MethodName, ...] = (
    "vanilla", "two-pass", "one-pass", "auto", "uniform", "swapped", "position", "shift",
)  # fmt: skip


class EvaluationSettings(BaseModel):
    """Comparing the methods on held-out images."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    benchmarks: list[str] = ["pope", "fidelity", "latency"]
    """What is measured: pope (yes/no questions), chair (captions), fidelity (how much of two-pass's edit a predictor
    keeps, and whether the model feels the edit at all), latency (cost of a prefill)."""
    methods: list[str] = list(DEFAULT_METHODS)
    """Methods to compare, or [all]: vanilla, vanilla-sampled, two-pass, one-pass, auto, and the controls uniform,
    swapped, dose-matched, shift, position, norm, least, noise, 4-connected, radius-2, and the rival online, which
    needs no predictor (docs/evaluation.md)."""
    predictors: list[str] = []
    """Predictor folders. train.py compares them beside its own; python -m evaluation compares them alone, and the
    newest run's where there are none."""
    thresholds: list[float] = []
    """Confidences under which further rows of auto fall back, beside the predictor's own threshold."""

    images: int = Field(default=300, ge=0)
    """Images asked about where questions are made from annotations; 0, without pope_files, compares no answers:
    train.py then ends with the fit's own metrics and, on pictures without annotations, fidelity and latency. The
    files of pope_files are asked whole."""
    questions_per_image: int = Field(default=6, ge=2)
    """Questions per image and strategy, half about present, half about absent objects, as POPE asks."""
    pope_files: list[str] = []
    """POPE's own files, or any of that form: JSON lines with question_id, image, text, label. Each is a split. Empty:
    questions are made from the annotations of data.eval_annotations, in the same form."""
    pope_labels: list[str] = []
    """Files of that form with other labels for the same questions, such as RePOPE's; questions that they leave out
    are left out and counted."""
    images_dir: str | None = None
    """Folder of the images that pope_files name; null takes data.eval_images."""
    annotations: str | None = None
    """instances_*.json for CHAIR and for the analysis by object; null takes data.eval_annotations."""
    captions: str | None = None
    """captions_*.json with reference captions, for CIDEr-D and CHAIR; null takes the file beside the annotations."""
    prompts: list[str] = []
    """Prompts of yes/no questions: plain, one-word, or templates with {question} in them; the first is the headline.
    Empty: plain and one-word for python -m evaluation, plain for train.py."""

    decoding: DecodingName | None = None
    """How POPE's answers are made: greedy generation, sampled generation, or margin: no text, the sign of the yes
    margin of the first token. null: greedy for python -m evaluation, margin for train.py."""
    sampling_seeds: list[int] = [0]
    """Seeds of sampled answers; each question is answered once per seed."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of sampled answers, without top-k and top-p."""
    max_new_tokens: int = Field(default=16, ge=1)
    """Longest answer to a yes/no question, in tokens."""
    parser: ParserName = "official"
    """How a text becomes yes or no: official (POPE's own: no if its first sentence has the word no or not), exact (the
    whole text), substring. An answer that is neither counts as wrong, and is counted."""

    chair_images: int = Field(default=500, ge=2)
    """Images that are captioned, at most; chosen by seed, listed in the result with a hash."""
    chair_prompt: str = "Describe the image."
    """What is asked for a caption; papers write "Please describe this image in detail."."""
    chair_tokens: list[int] = [64, 512]
    """Longest captions, in tokens; one generation of the longest serves all, each scored by itself."""
    chair_drop_unfinished: bool = False
    """Leave out the last sentence of a caption that the limit cut off, as OPERA's evaluation does."""
    synonyms: str | None = None
    """Words of each category, one line each, separated by commas, the category's name first (CHAIR's synonyms.txt);
    null takes the table of this project."""

    batch_size: int = Field(default=32, ge=1)
    """Questions per forward."""
    fidelity_images: int = Field(default=60, ge=2)
    """Images, one question each, on which hidden states are compared."""
    bootstrap: int = Field(default=2000, ge=1)
    """Resamples of the images behind each confidence interval."""
    latency_repeats: int = Field(default=20, ge=1)
    """Prefills timed per method."""
    seed: int = Field(default=0, ge=0)
    """Seed of the questions, the controls and the resamples."""

    tune_strengths: list[float] = [1.05, 1.1, 1.15]
    """Strengths that python -m evaluation tune tries."""
    tune_sources: list[int] = []
    """Numbers of sources K that it tries; empty keeps the model's."""
    tune_edit_ends: list[int] = []
    """Last edited blocks that it tries; empty keeps the model's."""
    tune_map_starts: list[int] = []
    """First blocks of the map that it tries, as many blocks as the model's; empty keeps the model's."""

    @field_validator("benchmarks")
    @classmethod
    def _known_benchmarks(cls, names: list[str]) -> list[str]:
        return _known(names, get_args(Benchmark))

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, names: list[str]) -> list[str]:
        known = get_args(MethodName)
        names = list(known) if names == ["all"] else _known(names, known)
        if "vanilla" not in names:
            reason = "lacks vanilla, which every method is compared with"
            raise PydanticCustomError("contradiction", "{reason}", {"reason": reason, "legal": "a list with vanilla"})
        return sorted(names, key=known.index)

    @field_validator("questions_per_image")
    @classmethod
    def _even(cls, count: int) -> int:
        if count % 2:
            legal = {"legal": "an even number"}
            raise PydanticCustomError("contradiction", "half of the questions are about absent objects", legal)
        return count

    @field_validator("prompts")
    @classmethod
    def _are_prompts(cls, prompts: list[str]) -> list[str]:
        legal = f"a list of {' | '.join(PROMPTS)} | texts with {{question}} in them"
        wrong = [text for text in prompts if text not in PROMPTS and "{question}" not in text]
        if wrong or len(set(prompts)) < len(prompts):
            reason = f"has {wrong[0]!r}" if wrong else "has one twice"
            raise PydanticCustomError("contradiction", "{reason}", {"reason": reason, "legal": legal})
        return prompts

    @field_validator("sampling_seeds", "chair_tokens")
    @classmethod
    def _are_counts(cls, values: list[int]) -> list[int]:
        if not values or min(values) < 0 or len(set(values)) < len(values):
            legal = {"legal": "a list of numbers from 0 on, each once"}
            raise PydanticCustomError("contradiction", "is empty, or has a negative number, or one twice", legal)
        return values

    @field_validator("chair_tokens")
    @classmethod
    def _are_lengths(cls, values: list[int]) -> list[int]:
        if min(values) < 1:
            raise PydanticCustomError(
                "contradiction", "a caption has 1 token at least", {"legal": "numbers from 1 on"}
            )
        return sorted(values)

    @field_validator("thresholds")
    @classmethod
    def _are_confidences(cls, values: list[float]) -> list[float]:
        if any(not 0 <= value <= 1 for value in values) or len(set(values)) < len(values):
            legal = {"legal": "numbers from 0 to 1, each once"}
            raise PydanticCustomError("contradiction", "a confidence lies between 0 and 1", legal)
        return values

    @property
    def for_command(self) -> EvaluationSettings:
        """As `python -m evaluation` takes them: both prompts and greedy generation, unless others are set."""
        return self._filled(["plain", "one-word"], "greedy")

    @property
    def asks(self) -> bool:
        """Whether answers are compared: there are questions from annotations, or from files."""
        return bool(self.images or self.pope_files)

    @property
    def for_training(self) -> EvaluationSettings:
        """As train.py takes them: the plain prompt and the margin of the first token, unless others are set."""
        return self._filled(["plain"], "margin")

    def _filled(self, prompts: list[str], decoding: DecodingName) -> EvaluationSettings:
        return self.model_copy(update={"prompts": self.prompts or prompts, "decoding": self.decoding or decoding})

    @property
    def templates(self) -> dict[str, str]:
        """Name of each prompt -> its template with {question} in it."""
        unnamed = [text for text in self.prompts if text not in PROMPTS]
        names = {text: "template" if len(unnamed) == 1 else f"template-{n}" for n, text in enumerate(unnamed, 1)}
        return {names.get(text, text): PROMPTS.get(text, text) for text in self.prompts}


def _known(names: list[str], known: tuple[str, ...]) -> list[str]:
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        reason = f"has {unknown[0]!r}, which there is not" if unknown else "is empty, or names one twice"
        near = difflib.get_close_matches(unknown[0], known, n=1) if unknown else []
        hint = f"Did you mean {near[0]}?" if near else ""
        details = {"reason": reason, "legal": "a list of " + " | ".join(known), "hint": hint}
        raise PydanticCustomError("contradiction", "{reason}", details)
    return names
