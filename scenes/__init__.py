"""The embedded default: a world of rendered scenes in COCO layout, and two small models trained on such scenes.

from scenes import CATEGORIES, CHECKPOINT, ensure_world
"""

from pathlib import Path

from scenes.categories import CATEGORIES
from scenes.world import ensure_world

CHECKPOINT: Path = Path(__file__).resolve().parent / "checkpoint"
"""The shipped scene-llava, for `from_pretrained` of `AutoModelForImageTextToText` and `AutoProcessor`."""

NEXT_CHECKPOINT: Path = CHECKPOINT.with_name("checkpoint-next")
"""The shipped scene-next, likewise."""

__all__ = ["CATEGORIES", "CHECKPOINT", "NEXT_CHECKPOINT", "ensure_world"]
