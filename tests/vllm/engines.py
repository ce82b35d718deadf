"""A checkpoint, predictors, prompts, and the same answers from the transformers runtime and from vLLM."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from scenes import CHECKPOINT
from scenes.world import render_scene
from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor, describe_model, save_predictor
from tests.families import models

NEW_TOKENS = 24
CONFIG = SCRConfig(num_sources=16, strength=1.5, edit_layers=(0, 5), attention_layers=(2, 4))
QUESTIONS = ("Is there a dog in the image?", "Describe the image.", "Is there a cup?", "Is there a car in the image?")


def write_checkpoint(folder: Path, source: Path = CHECKPOINT) -> Path:
    """A LLaVA checkpoint in float32, with the names of the vision tower that vLLM knows."""
    shutil.copytree(source, folder)
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): value.float()
        for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}))
    return folder


@dataclass(frozen=True)
class Question:
    """A prompt: scenes of the embedded world, perhaps in another size (width, height), and a text."""

    scenes: tuple[int, ...]
    text: str
    sizes: tuple[tuple[int, int], ...] = ()

    def content(self) -> list[dict[str, Any]]:
        pictures: list[dict[str, Any]] = [{"type": "image"} for _ in self.scenes]
        return [*pictures, {"type": "text", "text": self.text}]

    def images(self) -> list[Image.Image]:
        pictures = [Image.fromarray(render_scene(0, "val", scene).image) for scene in self.scenes]
        return (
            [picture.resize(size) for picture, size in zip(pictures, self.sizes, strict=True)]
            if self.sizes
            else pictures
        )


ALONE = [Question((scene,), QUESTIONS[scene % 4]) for scene in range(6)]
MIXED = [
    *ALONE,
    Question((7, 8), "Is there a dog in the image? Describe the image."),
    Question((), "Is there a dog?"),
    Question((9, 3), "Is there a cup?"),
    Question((), "Describe the image. Is there a car in the image? Is there a cup?"),
]
TILED = [
    Question((1,), QUESTIONS[0], ((96, 160),)),
    Question((2, 3), QUESTIONS[1], ((200, 130), (96, 96))),
    Question((), QUESTIONS[2]),
    Question((4,), QUESTIONS[3], ((300, 90),)),
    Question((5,), QUESTIONS[0], ((180, 190),)),
]
"""For models that cut images into tiles: other sizes, other grids."""


@dataclass(frozen=True)
class Answer:
    """Tokens, and the log-probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def distance(self, other: Answer) -> float:
        """Largest difference of the log-probabilities; infinite if the tokens differ."""
        if self.tokens != other.tokens:
            return float("inf")
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))


class Reference:
    """The transformers runtime; ``processor_settings`` are those of its processor."""

    def __init__(self, checkpoint: Path, **processor_settings: Any) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint, **processor_settings)
        self.model.generation_config.eos_token_id = self.processor.tokenizer.eos_token_id  # vLLM's, too

    def predictor(
        self, folder: Path, *, question: Any, config: SCRConfig = CONFIG, image_backend: str | None = None
    ) -> Path:
        """A random predictor, whose sources differ from image to image."""
        torch.manual_seed(0)
        size = self.model.config.text_config.hidden_size
        predictor = SourcePredictor(PredictorConfig(size, question=question))
        means, spreads = torch.randn(2, size) / 10, torch.rand(2, size) + 1
        predictor.set_statistics(means[0], spreads[0], means[1], spreads[1])
        predictor.set_calibration(torch.tensor([0.1, 0.9]), torch.tensor([0.1, 0.9]), 0.65)
        model = describe_model(self.model, self.processor)
        model["image_backend"] = image_backend or model["image_backend"]
        return save_predictor(folder, predictor, scr=config, model=model)

    def prompt(self, question: Question) -> str:
        message = [{"role": "user", "content": question.content()}]
        return self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)

    def answer(self, question: Question, predictor: Path | None, *, config: SCRConfig | None = CONFIG) -> Answer:
        """Edited by a predictor, under its own settings without a config; unedited without a predictor."""
        count = NEW_TOKENS
        images = question.images()
        inputs = self.processor(text=self.prompt(question), images=images or None, return_tensors="pt")
        settings: dict[str, Any] = {"mode": "off"} if predictor is None else {"mode": "one-pass", "config": config}
        with (
            torch.no_grad(),
            warnings.catch_warnings(action="ignore"),
            SCR(self.model, predictor=predictor, processor=self.processor, **settings),
        ):
            made = self.model.generate(
                **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        tokens = made.sequences[0, -count:]
        scores = torch.stack(made.logits)[:, 0].log_softmax(-1)
        return Answer(tuple(tokens.tolist()), tuple(scores.gather(1, tokens[:, None])[:, 0].tolist()))


def engine(checkpoint: Path, **settings: Any) -> Any:
    """An engine in this process."""
    from vllm import LLM

    given: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 512, "max_num_seqs": 16,
        "kv_cache_memory_bytes": 64 * 2**20, "limit_mm_per_prompt": {"image": 2}, "max_num_batched_tokens": 4096,
        "seed": 0,
    }  # fmt: skip
    return LLM(str(checkpoint), **(given | settings))


def prompts(reference: Reference, questions: Sequence[Question], salt: str | None = None) -> list[Any]:
    """The prompts as vLLM takes them."""
    made: list[Any] = []
    for question in questions:
        prompt: dict[str, Any] = {"prompt": reference.prompt(question)}
        if question.scenes:
            prompt["multi_modal_data"] = {"image": question.images()}
        made.append(prompt if salt is None else prompt | {"cache_salt": salt})
    return made


def parameters(extra: Any = None) -> Any:
    """Greedy, and always of the same length. ``extra`` is a request's ``vllm_xargs``."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, logprobs=0, extra_args=extra)


def ask(
    llm: Any, reference: Reference, questions: Sequence[Question], *, one_by_one: bool = False, extra: Any = None,
    salt: str | None = None,
) -> list[Answer]:  # fmt: skip
    """vLLM's answers. ``extra`` is all requests' ``vllm_xargs``, or a list with that of each."""
    given = prompts(reference, questions, salt)
    settings = [parameters(own) for own in (extra if isinstance(extra, list) else [extra] * len(given))]
    batches = [[index] for index in range(len(given))] if one_by_one else [list(range(len(given)))]
    answers: list[Answer] = []
    for batch in batches:
        outputs = llm.generate([given[i] for i in batch], [settings[i] for i in batch], use_tqdm=False)
        answers += [answer_of(output) for output in outputs]
    return answers


def answer_of(output: Any) -> Answer:
    """What a request was answered."""
    made = output.outputs[0]
    chosen = [step[token].logprob for step, token in zip(made.logprobs, made.token_ids, strict=True)]
    return Answer(tuple(made.token_ids), tuple(chosen))


_WIDE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 8,
}  # fmt: skip
"""Sizes of a decoder that vLLM's attention has kernels for."""


def _save(model: Any, processor: Any, folder: Path) -> Path:
    """Writes a model of other sizes, with random weights."""
    torch.manual_seed(0)
    type(model)(model.config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_llava(folder: Path) -> Path:
    """A random tiny LLaVA with its processor."""
    small, processor = models.PLAIN["llava"]()
    small.config.text_config.update(_WIDE | {"head_dim": 32})
    raw = _save(small, processor, folder.parent / f"{folder.name}-as-saved")
    return write_checkpoint(folder, raw)


def write_qwen(kind: str, folder: Path) -> Path:
    """A random tiny Qwen-VL with its processor.

    Args:
        kind: ``"qwen2-vl"`` or ``"qwen2.5-vl"``.
        folder: Where to write.
    """
    small, processor = models.WITH_VIDEOS[kind]()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    small.config.text_config.update(_WIDE | {"rope_parameters": rope, "layer_types": ["full_attention"] * 8})
    setattr(small.config.vision_config, "hidden_size" if kind == "qwen2-vl" else "out_hidden_size", 128)
    return _save(small, processor, folder)
