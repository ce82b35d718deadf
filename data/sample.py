"""One image of a harvest: its states, and one attention map per prompt. Fields, number formats, checks.

At rest a sample is two members of a webdataset tar, keyed by the image id:

    000000000042.safetensors    states     [N, d]  float16 | bfloat16 | float32 | int8: output of block 0 (or of the
                                                   state layer that harvest.json names), per image; N counts the
                                                   patches of all its grids, one grid after the other
                                scales     [N]     float32, only beside int8: a state is its integers times its scale
                                attention  [P, N]  float32, one map per prompt, as captured (not normalised)
                                question   [P, d]  dtype of the states (float32 beside int8), pooled states of the
                                                   prompt's text
    000000000042.json           image_id, file, grid [rows, columns], prompts [P], entropy [P] (nats)

An image may have several grids (a thumbnail, tiles): then `grid` is the list of them in the order of the prompt, and
`entropy` has [P * G] values, those of a prompt side by side. Everything behind the readers works on the parts of a
sample (`Sample.part`), which have one grid each, as the runtime edits each grid by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.files import is_count, is_relative, shown
from data.grids import Grid, grids_of, grids_record, is_grids_record, patches
from data.settings import StatesDtype

STATES_DTYPES: dict[StatesDtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
TAR_BLOCK = 512


@dataclass(frozen=True, eq=False)
class Sample:
    """One image: its states, and one attention map per prompt.

    Attributes:
        image_id: COCO image id.
        file: file name of the image, relative to the images folder.
        states: output of the state layer at the visual tokens. [N, d], fp16 | bf16 | fp32 | int8
        attention: attention from text to patches under each prompt, mean over text rows, heads and layers, not
            normalised. [P, N], fp32
        question: pooled states of each prompt's text. [P, d], dtype of the states, fp32 beside int8
        grids: rows and columns of patches of each grid, in the order of the prompt; N patches in all.
        prompts: the prompt of each map: dicts with text, label, category, strategy. P of them
        entropy: credit entropy of the states of each grid under each prompt, in nats (eq. 2 of arXiv 2602.22469).
            P * G values, those of a prompt side by side
        scales: factor of each token's int8 states; None for other dtypes. [N], fp32
        place: of a part: the place of its grid among those of its image.
    """

    image_id: int
    file: str
    states: Tensor
    attention: Tensor
    question: Tensor
    grids: tuple[Grid, ...]
    prompts: Sequence[Mapping[str, Any]]
    entropy: Sequence[float]
    scales: Tensor | None = None
    place: int = 0

    @classmethod
    def from_members(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sample:
        """The sample that was stored with these `facts` and `tensors`.

        Raises:
            KeyError: one of them is missing.
            ValueError: one of them is of another kind, or they contradict each other.
        """
        wrong = [name for name, kind in _FACTS.items() if not kind(facts[name])]
        if wrong:
            raise ValueError(f"{wrong[0]} is {shown(facts[wrong[0]])}")
        sample = cls(
            image_id=facts["image_id"],
            file=facts["file"],
            states=tensors["states"],
            attention=tensors["attention"],
            question=tensors["question"],
            grids=grids_of(facts["grid"]),
            prompts=facts["prompts"],
            entropy=facts["entropy"],
            scales=tensors.get("scales"),
        )
        sample.check()
        return sample

    def facts(self) -> dict[str, Any]:
        """What the sample's JSON member holds."""
        return {
            "image_id": self.image_id,
            "file": self.file,
            "grid": grids_record(self.grids),
            "prompts": [dict(prompt) for prompt in self.prompts],
            "entropy": list(self.entropy),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What the sample's safetensors member holds."""
        tensors = {"states": self.states, "attention": self.attention, "question": self.question}
        if self.scales is not None:
            tensors["scales"] = self.scales
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def decoded(self) -> Sample:
        """The sample as it is used: int8 states become float32, all others stay."""
        if self.scales is None:
            return self
        return replace(self, states=self.states * self.scales[:, None], scales=None)

    @property
    def grid(self) -> Grid:
        """The grid of a sample, or of a part, that has one.

        Raises:
            ValueError: it has several.
        """
        if len(self.grids) != 1:
            raise ValueError(f"sample {self.key} has {len(self.grids)} grids: ask its parts")
        return self.grids[0]

    def part(self, place: int) -> Sample:
        """One grid of the image, with all prompts; the sample itself if it has no other."""
        if len(self.grids) == 1:
            return self
        start = patches(self.grids[:place])
        tokens = slice(start, start + patches(self.grids[place : place + 1]))
        return replace(
            self,
            states=self.states[tokens],
            attention=self.attention[:, tokens],
            grids=(self.grids[place],),
            entropy=self.entropy[place :: len(self.grids)],
            scales=None if self.scales is None else self.scales[tokens],
            place=place,
        )

    @property
    def overview(self) -> Sample:
        """The part whose grid covers the whole picture: the last of the largest ones.

        A joined grid of tiles is larger than the thumbnail before it; tiles of equal size end with the thumbnail.
        """
        largest = max(rows * columns for rows, columns in self.grids)
        return self.part(max(i for i, (rows, columns) in enumerate(self.grids) if rows * columns == largest))

    @property
    def key(self) -> str:
        """Name of the sample in the tar; without dots, which would end a webdataset key."""
        return f"{self.image_id:012d}"

    def check(self) -> None:
        """Raises ValueError when shapes, dtypes and counts contradict each other."""
        if self.states.ndim != 2:
            raise ValueError(f"sample {self.key}: states are {tuple(self.states.shape)}, expected [N, d]")
        tokens, width = self.states.shape
        prompts = len(self.prompts)
        expected = {"attention": (prompts, tokens), "question": (prompts, width)}
        wrong = [
            f"{name} is {tuple(getattr(self, name).shape)}, expected {shape}"
            for name, shape in expected.items()
            if tuple(getattr(self, name).shape) != shape
        ]
        if (count := patches(self.grids)) != tokens:
            shape = f"grid {self.grids[0]} has" if len(self.grids) == 1 else f"grids {self.grids} have"
            wrong.append(f"{shape} {count} patches, states have {tokens}")
        if len(self.entropy) != prompts * len(self.grids):
            wrong.append(f"{len(self.entropy)} entropies for {prompts} prompts and {len(self.grids)} grids")
        if self.states.dtype not in STATES_DTYPES.values() or self.question.dtype != question_dtype(self.states.dtype):
            wrong.append(f"states are {self.states.dtype}, question {self.question.dtype}")
        scales = None if self.scales is None else (self.scales.dtype, *self.scales.shape)
        if scales != ((torch.float32, tokens) if self.states.dtype == torch.int8 else None):
            wrong.append(f"scales of {self.states.dtype} states are {scales}")
        if self.attention.dtype != torch.float32:
            wrong.append(f"attention is {self.attention.dtype}, expected torch.float32")
        if wrong:
            raise ValueError(f"sample {self.key}: {'; '.join(wrong)}")


def _is_list_of(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(item) in kinds for item in value)


_FACTS: dict[str, Callable[[object], bool]] = {  # what a sample's JSON member holds
    "image_id": is_count,
    "file": is_relative,
    "grid": is_grids_record,
    "prompts": _is_list_of(dict),
    "entropy": _is_list_of(float, int),
}


def sample_bytes(tokens: int, width: int, prompts: int, states_dtype: torch.dtype) -> int:
    """Bytes of one sample in a tar, by arithmetic: tensors, headers and padding, and 400 bytes of text per prompt.

    Args:
        tokens: N, patches of the image.
        width: d, width of the states.
        prompts: P, maps of the image.
        states_dtype: storage dtype of the states.
    """
    tensors = tokens * width * states_dtype.itemsize + tokens * 4 * (states_dtype == torch.int8)
    tensors += prompts * (tokens * 4 + width * question_dtype(states_dtype).itemsize)
    return tensors + 400 * prompts + 8 * TAR_BLOCK


def question_dtype(states_dtype: torch.dtype) -> torch.dtype:
    """Storage dtype of the questions beside states of a dtype."""
    return torch.float32 if states_dtype == torch.int8 else states_dtype


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds states to int8 with one scale per token, so that a token's largest entry becomes 127.

    Args:
        states: [N, d], any floating-point dtype.

    Returns:
        [N, d] int8, and [N] float32 scales.
    """
    wide = states.float()
    scales = (wide.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scales[:, None]).round().to(torch.int8), scales
