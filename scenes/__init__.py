"""The embedded default: a world of rendered scenes in COCO layout, and a small LLaVA trained on such scenes.

from scenes import CATEGORIES, CHECKPOINT, ensure_world
"""

from pathlib import Path

from scenes.categories import CATEGORIES
from scenes.world import ensure_world

CHECKPOINT: Path = Path(__file__).resolve().parent / "checkpoint"
"""The shipped scene model, for `from_pretrained` of `AutoModelForImageTextToText` and `AutoProcessor`."""

__all__ = ["CATEGORIES", "CHECKPOINT", "ensure_world"]
