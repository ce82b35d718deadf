"""A folder of images that questions name by file: checked before anything is asked, decoded as the harvest does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from datasets import Image
from PIL.Image import Image as PILImage

from data.errors import CorruptImageError
from evaluation.errors import EvaluationError
from evaluation.questions import listed


class Pictures:
    """Images of one folder, by file name.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._decoder = Image(mode="RGB")

    def check(self, names: Iterable[str]) -> None:
        """Looks for every image.

        Raises:
            EvaluationError: The folder does not exist, or images are missing from it: all are counted.
        """
        if not self.folder.is_dir():
            raise EvaluationError(
                f"images folder {self.folder} does not exist: set evaluation.images_dir, or data.root with "
                "data.eval_images"
            )
        wanted = list(dict.fromkeys(names))
        missing = [name for name in wanted if not (self.folder / name).is_file()]
        if missing:
            raise EvaluationError(
                f"{len(missing)} of {len(wanted)} images that the questions name are not in {self.folder}: "
                f"{listed(missing)}. Set evaluation.images_dir to the folder that belongs to the questions."
            )

    def sizes(self, names: Iterable[str]) -> list[tuple[str, int]]:
        """File name and bytes of each, as a cheap identity of their content."""
        return [(name, (self.folder / name).stat().st_size) for name in names]

    def open(self, name: str) -> PILImage:
        """Decodes an image to RGB, turned upright by its EXIF tag.

        Raises:
            CorruptImageError: It cannot be decoded.
        """
        path = self.folder / name
        content = path.read_bytes()
        try:
            return self._decoder.decode_example({"path": None, "bytes": content})
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, bomb errors...
            raise CorruptImageError(path, f"not an image ({type(error).__name__})") from error


def image_id(name: str) -> int | None:
    """The number at the end of an image's file name, as COCO counts: 42 of COCO_val2014_000000000042.jpg."""
    found = re.search(r"(\d+)\.\w+$", name)
    return int(found[1]) if found else None
