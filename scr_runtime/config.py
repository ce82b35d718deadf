"""SCRConfig: the settings of the method itself, shared by training and deployment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scr_runtime.errors import ConfigurationError


@dataclass(frozen=True)
class SCRConfig:
    """Settings of Spatial Credit Redistribution.

    The defaults are the paper's for LLaVA-1.5 (arXiv 2602.22469): 32 sources of 24 x 24 patches, strength 1.10,
    edits after blocks 0-11, attention of layers 8-16, 8-connected neighbours, border patches never sources.

    Attributes:
        num_sources: K, source patches per image. Capped at half the eligible patches of a small grid.
        source_fraction: K as a share of an image's patches instead, for models whose grids differ from image to
            image; the paper's 32 of 24 x 24 is 0.0556. ``None`` keeps ``num_sources``.
        strength: lambda of eq. (1). A neighbour gains ``(strength - 1)`` times its source, and a source is divided
            by ``strength``. The paper finds 1.05-1.15 usable.
        edit_layers: first and last decoder block whose output is edited, both included. None before ``state_layer``:
            the sources are not known there.
        attention_layers: first and last decoder block whose text-to-image attention is averaged, both included.
            All behind ``state_layer``: that block has already run when the sources are asked for.
        connectivity: 8 or 4 neighbours per source.
        exclude_border: whether patches of the outer rows and columns (attention sinks) can't be sources.
        state_layer: the decoder block whose output the sources are chosen from: what the predictor reads, and where
            the diagnostic run starts. The paper's is 0; a later one knows more, at the same cost, and edits later.
        suppress_claimed: whether a patch that a better source claims as its neighbour can't be a source any more: the
            other reading of decision D7, an ablation. K stays what it is: where no unclaimed patch is left, the best
            claimed ones fill up.

    Raises:
        ConfigurationError: If a value is out of range; the message names every such field.
    """

    num_sources: int = 32
    strength: float = 1.10
    edit_layers: tuple[int, int] = (0, 11)
    attention_layers: tuple[int, int] = (8, 16)
    connectivity: int = 8
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
        if self.state_layer < 0:
            problems.append(f"state_layer={self.state_layer}: expected 0 or more")
        ranges = () if problems else (("edit_layers", self.state_layer), ("attention_layers", self.state_layer + 1))
        for name, earliest in ranges:
            if getattr(self, name)[0] < earliest:
                problems.append(
                    f"{name}={getattr(self, name)}: must start at block {earliest} or later, "
                    f"with state_layer={self.state_layer}"
                )
        if self.num_sources < 1:
            problems.append(f"num_sources={self.num_sources}: expected at least 1")
        if self.source_fraction is not None and not 0.0 < self.source_fraction <= 0.5:
            problems.append(f"source_fraction={self.source_fraction}: expected above 0, up to 0.5")
        if not (math.isfinite(self.strength) and 1.0 <= self.strength <= 2.0):
            problems.append(f"strength={self.strength}: expected 1.0 to 2.0 (the paper uses 1.05 to 1.15)")
        if self.connectivity not in (4, 8):
            problems.append(f"connectivity={self.connectivity}: expected 4 or 8")
        if problems:
            raise ConfigurationError("SCRConfig: " + "; ".join(problems))

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


def _is_layer_range(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2:  # pyright: ignore[reportUnknownArgumentType]
        return False
    first, last = value  # pyright: ignore[reportUnknownVariableType]
    return isinstance(first, int) and isinstance(last, int) and 0 <= first <= last
