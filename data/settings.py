"""Settings of this room: how a model is loaded, what a harvest collects, how a fit reads it.

The configuration (configs/schema.py) has these very objects as its sections; a library caller makes them by hand. The
string under a field is its help text. Nothing here imports torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StatesDtype = Literal["float16", "bfloat16", "float32", "int8"]
AttentionImplementation = Literal["sdpa", "eager"]
PromptKind = Literal["present", "random", "popular", "adversarial", "caption"]
CATEGORY_KINDS: frozenset[str] = frozenset(get_args(PromptKind)) - {"caption"}
"""Kinds of prompts that ask about a category of the annotations."""
Engine = Literal["local", "ray"]
Cache = Literal["auto", "device", "memory", "none", "stream"]

DEFAULT_MIX: tuple[PromptKind, ...] = ("present", "random", "present", "popular", "present", "adversarial")
"""As many yes as no; with two prompts per image each image gets one of both."""

_SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
_PROJECT_ROOT = Path(__file__).resolve().parents[1]


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        legal = "letters, digits, dots, hyphens and underscores, starting with a letter or a digit"
        raise PydanticCustomError("contradiction", "can't be the name of a folder", {"legal": legal})
    return name


def is_prompt_text(kind: str) -> bool:
    """Whether an entry of `harvest.prompts` is a text to ask, not a kind of prompt: it has several words."""
    return len(kind.split()) > 1


FolderName = Annotated[str, AfterValidator(_folder_name)]


class VLMSettings(BaseModel):
    """Which vision-language model is loaded, and how it runs."""

    model_config = _SECTION

    hub_id: str
    """Hugging Face hub id, or a folder; a relative folder is taken from the project root."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null takes the newest."""
    dtype: Dtype = "auto"
    """Number format of the weights; auto takes the checkpoint's own, float32 on a CPU."""
    attn_implementation: AttentionImplementation = "sdpa"
    """Attention kernel of transformers."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:N or mps; auto takes an accelerator if there is one."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            raise PydanticCustomError("contradiction", "no such device", {"legal": "auto | cpu | cuda | cuda:N | mps"})
        return device

    @property
    def location(self) -> str:
        """`hub_id` as transformers takes it: an absolute path if it is a folder, else the hub id."""
        try:
            folder = _PROJECT_ROOT / Path(self.hub_id).expanduser()
            return str(folder) if folder.is_dir() else self.hub_id
        except (RuntimeError, OSError):  # no such user's home; a name that is too long
            return self.hub_id


class HarvestSettings(BaseModel):
    """Running the diagnostic on train images and keeping states and attention maps as shards."""

    model_config = _SECTION

    samples: int = Field(default=4000, ge=1)
    """Images to fit on."""
    validation: int = Field(default=400, ge=1)
    """Images to choose the best epoch on."""
    test: int = Field(default=400, ge=1)
    """Images to report the fit on."""
    tuning: int = Field(default=0, ge=0)
    """Images set aside for choosing SCR's hyper-parameters: not harvested, never in another split, listed in the
    harvest's index.json. The paper takes 200."""
    prompts: list[str] = list(DEFAULT_MIX)
    """Kinds of prompts, assigned to each image in turn from a seeded start: questions about a present object, about
    an absent one chosen as POPE does (random, popular, adversarial), or one caption. A text of several words is asked
    as it is. Images without annotations (data=pictures) take captions and texts alone."""
    prompts_per_image: int = Field(default=2, ge=1)
    """Prompts per image; each gives one attention map."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts per forward; the prompts of an image stay together, and share its pixels."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Instead of batch_size: tokens per forward, visual and text, padding counted, one row per prompt. For models
    whose grids differ from image to image. An image that exceeds it alone is a batch by itself."""
    shard_size: int = Field(default=50, ge=1)
    """Images per shard: what an interruption loses at most."""
    states_dtype: StatesDtype = "float16"
    """Number format of the states at rest; int8 has one scale per token, and half the bytes of float16."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split and of the questions."""
    engine: Engine = "local"
    """Which processes make the shards: local, this process (one of several under torchrun or Slurm); ray, the actors
    of a Ray cluster, which RAY_ADDRESS names, or of this machine."""
    output: str | None = None
    """URL (s3://bucket/prefix, file:///..., any that fsspec knows) under which the harvest's folder has a copy:
    finished shards are uploaded, and those that are there are downloaded instead of made. null keeps them in
    runs_dir."""
    workers: int = Field(default=1, ge=1)
    """Ray actors, each with its own model; only with engine=ray."""
    gpus_per_worker: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """GPUs that each Ray actor reserves; null takes 1 where the cluster has any, else 0. Only with engine=ray."""
    max_retries: int = Field(default=2, ge=0)
    """How often a shard is tried again after its Ray actor died or failed."""
    name: FolderName | None = None
    """Name of the folder under runs_dir/harvest; null means <model.name>-<data.name>. A sweep over settings of the
    harvest names one for each."""

    @field_validator("prompts")
    @classmethod
    def _known_prompts(cls, prompts: list[str]) -> list[str]:
        known = PromptKind.__args__
        unknown = [kind for kind in prompts if kind not in known and not is_prompt_text(kind)]
        if unknown or not prompts:
            reason = f"has no kind of prompt {unknown[0]!r}" if unknown else "is empty"
            raise PydanticCustomError(
                "contradiction", "{reason}",
                {"reason": reason, "legal": "a list of " + " | ".join(known) + " | texts of several words"},
            )  # fmt: skip
        return prompts

    @field_validator("prompts_per_image")
    @classmethod
    def _one_caption(cls, count: int, info: ValidationInfo) -> int:
        given = set(info.data.get("prompts", ()))
        fixed = {kind for kind in given if kind == "caption" or is_prompt_text(kind)}
        if given and given == fixed and count > len(fixed):
            one = fixed == {"caption"}
            reason = "there is one caption prompt per image" if one else f"harvest.prompts has {len(fixed)} texts"
            hint = f"Lower it to {len(fixed)}, or add questions to harvest.prompts."
            legal = "1" if len(fixed) == 1 else f"1 to {len(fixed)}"
            raise PydanticCustomError("contradiction", "{reason}", {"reason": reason, "legal": legal, "hint": hint})
        return count

    @field_validator("output")
    @classmethod
    def _is_url(cls, url: str | None, info: ValidationInfo) -> str | None:
        legal = "a URL such as s3://bucket/prefix or file:///folder, without wildcards"
        if url is not None and not re.fullmatch(r"[a-z][a-z0-9+.-]*:/{2,3}[^*?\[\]]*", url):
            raise PydanticCustomError("contradiction", "is no URL of a folder", {"legal": legal})
        if info.data.get("engine") == "ray" and (url or "").startswith("memory:"):
            raise PydanticCustomError("contradiction", "is seen by one process, and Ray has several", {"legal": legal})
        return url

    @field_validator("workers", "gpus_per_worker")
    @classmethod
    def _ray_alone(cls, value: float | None, info: ValidationInfo) -> float | None:
        assert info.field_name is not None
        if info.data.get("engine") == "local" and value != cls.model_fields[info.field_name].default:
            hint = "Add harvest.engine=ray, or start several processes with torchrun or Slurm (docs/harvest.md)."
            raise PydanticCustomError("contradiction", "needs harvest.engine=ray", {"hint": hint})
        return value

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split that is harvested."""
        return {"train": self.samples, "validation": self.validation, "test": self.test}

    @property
    def sample_settings(self) -> dict[str, object]:
        """The settings that decide which samples a harvest holds; batches, engines and places don't."""
        keys = {"samples", "validation", "test", "tuning", "prompts", "prompts_per_image", "shard_size",
                "states_dtype", "seed"}  # fmt: skip
        return self.model_dump(include=keys)

    @property
    def images(self) -> int:
        """Images harvested in all."""
        return sum(self.splits.values())


class ReadingSettings(BaseModel):
    """How a fit reads the shards."""

    model_config = _SECTION

    batch_size: int = Field(default=64, ge=1)
    """Attention maps per step."""
    train_images: int | None = Field(default=None, ge=1)
    """Images of the harvest to fit to, the first of its seeded order; null takes all. For learning curves."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that read shards; 0 reads in the main process."""
    cache: Cache = "auto"
    """Where shards are kept during the fit: on the device, in memory, or none: read from disk batch by batch. auto
    takes the first that they fit into, and logs why. stream reads the train split tar by tar, in a different order:
    for sets that no disk of this machine holds."""
    stream_from: str | None = None
    """Where the train tars of a stream are, with {shard} for a shard's name: a path, an http(s) URL, or pipe: and a
    command; null means the harvest's folder, where index, sidecars and the other splits are in any case."""

    @field_validator("cache")
    @classmethod
    def _stream_takes_all(cls, cache: Cache, info: ValidationInfo) -> Cache:
        if cache == "stream" and info.data.get("train_images") is not None:
            raise PydanticCustomError(
                "contradiction",
                "a stream takes all images",
                {"key": "train_images", "value": info.data["train_images"], "hint": "Choose another cache."},
            )
        return cache

    @field_validator("stream_from")
    @classmethod
    def _belongs_to_a_stream(cls, source: str | None, info: ValidationInfo) -> str | None:
        if source is not None and info.data.get("cache", "stream") != "stream":
            raise PydanticCustomError(
                "contradiction", "needs trainer.cache=stream", {"hint": "Add trainer.cache=stream."}
            )
        if source is not None and "{shard}" not in source:
            legal = "for instance https://host/folder/{shard}.tar"
            raise PydanticCustomError("contradiction", "does not say where the shard's name goes", {"legal": legal})
        return source
