"""What is compared: one entry for each method, with what it is and how it is run.

A lower hallucination rate alone proves little: sources drawn at random lower it too, and so does a model that simply
says "no" more often. Each control takes one explanation away; docs/evaluation.md says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluation import maps
from evaluation.edits import Act, NoiseEdit, SourceEdit
from evaluation.maps import BlockMaps, Sources
from evaluation.settings import EvaluationSettings, MethodName
from scr_runtime import SCRConfig
from scr_runtime.layout import VisualLayout

VANILLA, SAMPLED, TWO_PASS, ONE_PASS, AUTO = "vanilla", "vanilla-sampled", "two-pass", "one-pass", "auto"
UNIFORM, SWAPPED, SHIFT, ONLINE = "uniform", "swapped", "shift", "online"


@dataclass(frozen=True)
class Plain:
    """The model as it is.

    Attributes:
        sampled: Whether answers are always drawn at random, whatever `evaluation.decoding` says.
    """

    sampled: bool = False


@dataclass(frozen=True)
class FromMap:
    """The edit on sources that follow from the maps of a block.

    Attributes:
        choose: (block, row, image of the row) -> its sources.
        per_image: Whether they are the same for all questions about an image.
        connectivity: Neighbours of a source instead of the model's setting.
        radius: How far neighbours may lie.
        noise: Whether Gaussian noise of the edit's norm takes the edit's place.
        behind_map: Whether the edited blocks are moved behind those of the map, as the runtime's online needs them.
    """

    choose: Callable[[BlockMaps, int, int], Sources]
    per_image: bool = False
    connectivity: int | None = None
    radius: int = 1
    noise: bool = False
    behind_map: bool = False

    def edit_layers(self, scr: SCRConfig, num_blocks: int) -> tuple[int, int]:
        """First and last edited block."""
        return (scr.behind_map(num_blocks) if self.behind_map else scr).edit_layers

    def settings(self, scr: SCRConfig) -> SCRConfig:
        """The model's settings with this method's neighbours."""
        return scr if self.connectivity is None else replace(scr, connectivity=self.connectivity)  # type: ignore[arg-type]

    def act(self, layout: VisualLayout, sources: Sequence[Sequence[int]], scr: SCRConfig, seed: int) -> Act:
        """What is done to the blocks' outputs of one prefill."""
        edit = SourceEdit(layout, sources, self.settings(scr), self.radius)
        return NoiseEdit(edit, seed) if self.noise else edit

    def dose(self, sources: Sequence[int], grid: tuple[int, int], scr: SCRConfig) -> int:
        """Neighbours that are written to."""
        if self.radius > 1:
            return maps.reached(sources, grid, self.radius)
        return maps.owned_neighbours(sources, grid, self.settings(scr).connectivity)


@dataclass(frozen=True)
class Predicted:
    """The runtime in mode one-pass, with a predictor."""


@dataclass(frozen=True)
class Derived:
    """Follows from the answers of other methods: nothing is asked."""


Run = Plain | FromMap | Predicted | Derived


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        description: What it is, in a line of a table.
        run: How it is run.
        control: Whether it is a control: a gain that it has too is not due to where two-pass's sources are.
    """

    description: str
    run: Run
    control: bool = False


METHODS: dict[MethodName, Entry] = {
    "vanilla": Entry("the model as it is", Plain()),
    "vanilla-sampled": Entry("the model as it is, answers drawn at random", Plain(sampled=True)),
    "two-pass": Entry("sources from the diagnostic run", FromMap(maps.two_pass)),
    "one-pass": Entry("sources from the predictor", Predicted()),
    "auto": Entry("the predictor, two-pass where it is unsure", Derived()),
    "uniform": Entry("control: K random sources for each image", FromMap(maps.uniform, per_image=True), True),
    "swapped": Entry(
        "control: two-pass's sources of another image, equal dose", FromMap(maps.swapped, per_image=True), True
    ),
    "dose-matched": Entry(
        "control: random sources with as many owned neighbours as two-pass's", FromMap(maps.dose_matched), True
    ),
    "shift": Entry("control: vanilla, yes margin shifted by two-pass's mean shift", Derived(), True),
    "position": Entry("control: mean map of other images", FromMap(maps.position, per_image=True), True),
    "norm": Entry("control: patches of largest state norm", FromMap(maps.norm, per_image=True), True),
    "least": Entry("control: least-attended patches", FromMap(maps.least), True),
    "noise": Entry("control: Gaussian noise of the edit's norm", FromMap(maps.two_pass, noise=True), True),
    "4-connected": Entry("variant: 4 neighbours per source", FromMap(maps.two_pass, connectivity=4)),
    "radius-2": Entry("variant: 24 neighbours per source", FromMap(maps.two_pass, radius=2)),
    "online": Entry("rival: map of the running pass, edits behind it", FromMap(maps.two_pass, behind_map=True)),
}


NEEDS: dict[str, tuple[str, ...]] = {AUTO: (TWO_PASS, ONE_PASS), SHIFT: (TWO_PASS,)}
"""What a derived method follows from: compared with it, asked for or not."""


@dataclass(frozen=True)
class Method:
    """One row of the tables: a method, and where it needs them a predictor and a threshold.

    Attributes:
        name: As tables print it: `auto`, `auto@0.70`, `one-pass:other`.
        base: Its entry.
        predictor: Name of its predictor; "" for the first.
        threshold: Of a further row of `auto`; `None` for the predictor's own.
    """

    name: str
    base: MethodName
    predictor: str | None = None
    threshold: float | None = None

    @property
    def asked(self) -> bool:
        """Whether the model is asked: auto is, where a prompt has images of both kinds."""
        return self.base == AUTO or not isinstance(self.entry.run, Derived)

    @property
    def entry(self) -> Entry:
        """What it is and how it is run."""
        return METHODS[self.base]


def expand(settings: EvaluationSettings, predictors: Mapping[str, Any]) -> list[Method]:
    """The rows of a comparison: one-pass and auto once for each predictor, auto once more for each threshold.

    Args:
        settings: Which methods.
        predictors: Name -> predictor; the first one's rows carry no name.
    """
    rows: list[Method] = []
    needed = {need for base in settings.methods for need in NEEDS.get(base, ())}
    for base in METHODS:
        if base not in settings.methods and base not in needed:
            continue
        if base not in (ONE_PASS, AUTO):
            rows.append(Method(base, base))
            continue
        for place, name in enumerate(predictors):
            ending = f":{name}" if place else ""
            rows.append(Method(base + ending, base, name))
            for threshold in settings.thresholds if base == AUTO else ():
                rows.append(Method(f"{base}@{threshold:.2f}{ending}", AUTO, name, threshold))
    return rows
