"""Settings of the method and of the predictor, and the legal values of each: shared by training and deployment.

Nothing here imports torch, so that a configuration is checked before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from scr_runtime.errors import ConfigurationError

Mode = Literal["one-pass", "two-pass", "auto", "online", "uniform", "off"]
Connectivity = Literal[4, 8]
PositionFeatures = Literal["none", "linear", "fourier"]
QuestionFeatures = Literal["none", "concat", "bilinear"]
ContextFeatures = Literal["none", "mean", "neighbourhood", "both"]

FREQUENCIES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
"""Of the Fourier position features, in periods over half a grid's side."""
POSITION_COUNT: dict[PositionFeatures, int] = {"none": 0, "linear": 3, "fourier": 3 + 4 * len(FREQUENCIES)}
_MAX_RANK = 512


@dataclass(frozen=True)
class SCRConfig:
    """Settings of Spatial Credit Redistribution.

    The defaults are the paper's for LLaVA-1.5 (arXiv 2602.22469): 32 sources of 24 x 24 patches, strength 1.10,
    edits after blocks 0-11, attention of layers 8-16, 8-connected neighbours, border patches never sources.

    Attributes:
        num_sources: K, source patches per image. Capped at half the eligible patches of a small grid.
        strength: lambda of eq. (1). A neighbour gains ``(strength - 1)`` times its source, and a source is divided
            by ``strength``. The paper finds 1.05-1.15 usable.
        edit_layers: first and last decoder block whose output is edited, both included. None before ``state_layer``:
            the sources are not known there.
        attention_layers: first and last decoder block whose text-to-image attention is averaged, both included.
            All behind ``state_layer``: that block has already run when the sources are asked for.
        connectivity: 8 or 4 neighbours per source.
        exclude_border: whether patches of the outer rows and columns (attention sinks) can't be sources.
        source_fraction: K as a share of an image's patches instead, for models whose grids differ from image to
            image; the paper's 32 of 24 x 24 is 0.0556. ``None`` keeps ``num_sources``.
        state_layer: the decoder block whose output the sources are chosen from: what the predictor reads, and where
            the diagnostic run starts. The paper's is 0; a later one knows more, at the same cost, and edits later.
        suppress_claimed: whether a patch that a better source claims as its neighbour can no longer be a source: the
            other reading of decision D7, an ablation. K stays the same: where no unclaimed patch is left, the best
            claimed ones fill up.

    Raises:
        ConfigurationError: If a value is out of range; the message names every such field.
    """

    num_sources: int = 32
    strength: float = 1.10
    edit_layers: tuple[int, int] = (0, 11)
    attention_layers: tuple[int, int] = (8, 16)
    connectivity: Connectivity = 8
    exclude_border: bool = True
    source_fraction: float | None = None
    state_layer: int = 0
    suppress_claimed: bool = False

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name in ("edit_layers", "attention_layers"):
            value: Any = getattr(self, name)
            if not _is_layer_range(value):
                problems.append(f"{name}={value!r}: expected (first, last) with 0 <= first <= last")
            else:
                object.__setattr__(self, name, (int(value[0]), int(value[1])))  # YAML and JSON give lists
        for name in ("num_sources", "state_layer", "connectivity"):
            if not _is_integer(getattr(self, name)):
                problems.append(f"{name}={getattr(self, name)!r}: expected an integer")
        for name in ("strength", "source_fraction"):
            value = getattr(self, name)
            if not (_is_number(value) or (value is None and name == "source_fraction")):
                problems.append(f"{name}={value!r}: expected a number")
        for name in ("exclude_border", "suppress_claimed"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name}={getattr(self, name)!r}: expected true or false")
        if not problems:
            problems = self._out_of_range()
        if problems:
            raise ConfigurationError("SCRConfig: " + "; ".join(problems))

    def _out_of_range(self) -> list[str]:
        """What is wrong with values of the right types."""
        problems: list[str] = []
        if self.state_layer < 0:
            problems.append(f"state_layer={self.state_layer}: expected 0 or more")
        for name, earliest in (("edit_layers", self.state_layer), ("attention_layers", self.state_layer + 1)):
            if getattr(self, name)[0] < earliest:
                problems.append(
                    f"{name}={getattr(self, name)}: must start at block {earliest} or later, "
                    f"with state_layer={self.state_layer}"
                )
        if self.num_sources < 1:
            problems.append(f"num_sources={self.num_sources}: expected at least 1")
        if self.source_fraction is not None and not 0.0 < self.source_fraction <= 0.5:
            problems.append(f"source_fraction={self.source_fraction}: expected above 0, up to 0.5")
        if not 1.0 <= self.strength <= 2.0:  # NaN is not
            problems.append(f"strength={self.strength}: expected 1.0 to 2.0 (the paper uses 1.05 to 1.15)")
        if self.connectivity not in get_args(Connectivity):
            problems.append(f"connectivity={self.connectivity}: expected 4 or 8")
        return problems

    @property
    def sources_in_words(self) -> str:
        """K, or the share that is asked for instead."""
        fraction = self.source_fraction
        return f"{self.num_sources} sources" if fraction is None else f"{fraction:.2%} of the patches as sources"

    @classmethod
    def for_depth(cls, num_blocks: int) -> SCRConfig:
        """The paper's settings for LLaVA-1.5, whose layer ranges are of 32 blocks, as shares of another depth.

        Args:
            num_blocks: Decoder blocks of the model, at least 2.

        Raises:
            ConfigurationError: If there is one block only: none is left to read attention from.
        """
        if num_blocks < 2:
            raise ConfigurationError(
                f"{num_blocks} decoder blocks: SCR needs one to edit and one to read attention from"
            )
        share = num_blocks / 32
        first = max(round(8 * share), 1)
        last = min(max(round(16 * share), first), num_blocks - 1)
        return cls(edit_layers=(0, max(round(12 * share) - 1, 0)), attention_layers=(first, last))

    def behind_map(self, num_blocks: int) -> SCRConfig:
        """These settings as ``mode="online"`` takes them, which knows the map once its last block has run.

        Edited blocks that begin earlier are moved right behind ``attention_layers``: as many as before, and none of
        them the last block, whose edit no answer can see.

        Args:
            num_blocks: Decoder blocks of the model.

        Raises:
            ConfigurationError: If no block is left there.
        """
        (first, last), behind = self.edit_layers, self.attention_layers[1] + 1
        if first >= behind:
            return self
        if behind > num_blocks - 2:
            raise ConfigurationError(
                f"SCRConfig.attention_layers={self.attention_layers} of {num_blocks} blocks: none is left behind them "
                "whose edit an answer could see. Let attention_layers end earlier, or leave online out."
            )
        return dataclasses.replace(self, edit_layers=(behind, min(behind + last - first, num_blocks - 2)))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SCRConfig:
        """Builds a config from ``to_dict``'s result.

        Raises:
            ConfigurationError: If a key is unknown or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigurationError(f"SCRConfig: unknown keys {unknown}; the known ones are {sorted(known)}")
        return cls(**values)

    def check_online(self) -> None:
        """Checks that the first edit comes behind the map.

        Raises:
            ConfigurationError: If it does not.
        """
        if self.edit_layers[0] <= self.attention_layers[1]:
            raise ConfigurationError(
                f"SCRConfig.edit_layers={self.edit_layers}: mode='online' makes its map of attention_layers="
                f"{self.attention_layers} of the very pass that it edits, so edit_layers must start at block "
                f"{self.attention_layers[1] + 1} or later. config.behind_map(num_blocks) moves them there."
            )

    def check_depth(self, num_blocks: int) -> None:
        """Checks the layer ranges against a model's depth.

        Args:
            num_blocks: Decoder blocks of the model.

        Raises:
            ConfigurationError: If a range reaches beyond the last block.
        """
        for name in ("edit_layers", "attention_layers"):
            last = getattr(self, name)[1]
            if last >= num_blocks:
                raise ConfigurationError(
                    f"SCRConfig.{name} ends at block {last}, but the model has {num_blocks} decoder blocks "
                    f"(0-{num_blocks - 1}). Set {name} within that range."
                )


@dataclass(frozen=True)
class PredictorConfig:
    """Sizes and features of a SourcePredictor; the defaults are those of ``python train.py``.

    Attributes:
        hidden_size: d, width of the VLM's residual stream.
        rank: r, width of the factorised first layer. ``None`` takes the rank whose parameter count is nearest to
            ``budget`` (decision D3): at most half a rank's parameters off it, which is within 3 % for the hidden sizes
            of released models, 1,024 to 8,192. A small model, whose rank is at most its hidden size, stays below.
        width: Hidden units, 256 in the paper.
        budget: Trainable parameters aimed at, 120,000 in the paper.
        position: Features of a patch's place: ``"none"``; ``"linear"``: row, column and distance to the border;
            ``"fourier"``: sines and cosines of row and column too.
        question: How the mean state of the question's tokens enters: ``"none"``; ``"concat"``: its projection beside
            the patch's; ``"bilinear"``: an affine gate of it times the patch's.
        context: Features of the other patches: ``"none"``, the ``"mean"`` projection of the image, that of the
            3 x 3 ``"neighbourhood"``, or ``"both"``.
        components: Softmaxes over the patches whose mixture is the predicted map; 1 is a plain softmax. An attention
            map is itself a mean of softmaxes: one per layer, head and text token.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    hidden_size: int
    rank: int | None = None
    width: int = 256
    budget: int = 120_000
    position: PositionFeatures = "fourier"
    question: QuestionFeatures = "bilinear"
    context: ContextFeatures = "none"
    components: int = 24

    def __post_init__(self) -> None:
        for name in ("hidden_size", "width", "budget", "components"):
            value: Any = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ConfigurationError(f"PredictorConfig.{name}={value!r}: expected an integer of at least 1")
        choices = (("position", PositionFeatures), ("question", QuestionFeatures), ("context", ContextFeatures))
        for name, legal in choices:
            if getattr(self, name) not in get_args(legal):
                raise ConfigurationError(
                    f"PredictorConfig.{name}={getattr(self, name)!r}: expected one of {list(get_args(legal))}"
                )
        if self.rank is None:
            ranks = range(1, min(self.hidden_size, _MAX_RANK) + 1)
            nearest = min(ranks, key=lambda rank: abs(self._count(rank) - self.budget))
            object.__setattr__(self, "rank", nearest)
        elif not (_is_integer(self.rank) and 1 <= self.rank <= self.hidden_size):
            raise ConfigurationError(
                f"PredictorConfig.rank={self.rank!r}: expected 1 to hidden_size={self.hidden_size}, or None"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PredictorConfig:
        """Builds a config from ``to_dict``'s result.

        Raises:
            ConfigurationError: If a key is unknown or missing, or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            raise ConfigurationError(f"PredictorConfig: expected the keys {sorted(known)}, got {sorted(values)}")
        return cls(**values)

    @property
    def reads_question(self) -> bool:
        """Whether the scores depend on the question."""
        return self.question != "none"

    def features(self, rank: int) -> int:
        """Features of a patch that the hidden layer reads."""
        blocks = 1 + self.reads_question + {"none": 0, "both": 2}.get(self.context, 1)
        return blocks * rank + POSITION_COUNT[self.position]

    def count_parameters(self) -> int:
        """Trainable parameters of the network."""
        assert self.rank is not None  # __post_init__ resolved it
        return self._count(self.rank)

    def _count(self, rank: int) -> int:
        gate = rank * (rank + 1) if self.question == "bilinear" else 0
        weights = self.components * (rank + 1) if self.components > 1 else 0
        hidden = (self.features(rank) + 1) * self.width
        return self.hidden_size * rank + gate + weights + hidden + self.components * (self.width + 1)


def _is_layer_range(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2:  # pyright: ignore[reportUnknownArgumentType]
        return False
    first, last = value  # pyright: ignore[reportUnknownVariableType]
    return _is_integer(first) and _is_integer(last) and 0 <= first <= last  # pyright: ignore[reportUnknownArgumentType]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
