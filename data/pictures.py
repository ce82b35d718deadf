"""What is known of a picture before the model runs: its patch grids, its visual tokens."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image as PILImage

from data.chat import chat_inputs
from data.grids import Grid
from data.wording import CAPTION_PROMPT
from scr_runtime.families import family_of


class PictureGrids:
    """The grids that pictures will have, without running the model.

    They follow from a picture's size alone: one of each size is preprocessed, and none where the family has one grid
    for all images.

    Args:
        model: vision-language model.
        processor: as returned by `load_vlm`.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model
        self._processor = processor
        self._family = family_of(model)
        self._problems: dict[tuple[int, int], str | None] = {}  # by the picture's size

    def of(self, picture: PILImage) -> list[Grid]:
        """The grids of a picture, in the order of the prompt."""
        inputs = chat_inputs(self._processor, [picture], [CAPTION_PROMPT])
        return [image.grid for image in self._family.image_grids(self._model, inputs)]

    def problem(self, picture: PILImage) -> str | None:
        """Why a picture can't be harvested: one of its grids has no patch off its border, or there is none at all.

        Where all images have the same grid, it is not the picture's fault, and the fit reports it.
        """
        if self._family.fixed_grid is not None:
            return None
        if picture.size not in self._problems:
            self._problems[picture.size] = self._problem(picture)
        return self._problems[picture.size]

    def _problem(self, picture: PILImage) -> str | None:
        size = f"{picture.width} x {picture.height} pixels"
        try:
            grids = self.of(picture)
        except ValueError as error:  # Qwen's processors reject a picture that is 200 times as long as wide
            return f"its processor rejects {size}: {error}"
        flat = [f"{rows} x {columns}" for rows, columns in grids if min(rows, columns) < 3]
        return f"a grid of {flat[0]} patches has none off its border: {size} are too small or narrow" if flat else None
