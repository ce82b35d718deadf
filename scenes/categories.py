"""What can stand in a scene: 40 categories of COCO with their real ids, in 5 contexts of 8."""

from __future__ import annotations

from typing import NamedTuple


class Category(NamedTuple):
    """One kind of object."""

    coco_id: int
    """The category id in COCO's own annotation files (1 to 90, with gaps)."""
    name: str
    """COCO's name, as it stands in questions and captions."""
    context: str
    """The context in which it is at home."""


# Within a context the order is the popularity: the first is the most frequent (Zipf).
CONTEXTS: dict[str, tuple[tuple[int, str, str], ...]] = {
    "street": (
        (3, "car", "\U0001f697"),
        (1, "person", "\U0001f9cd"),
        (10, "traffic light", "\U0001f6a6"),
        (2, "bicycle", "\U0001f6b2"),
        (6, "bus", "\U0001f68c"),
        (8, "truck", "\U0001f69a"),
        (13, "stop sign", "\U0001f6d1"),
        (4, "motorcycle", "\U0001f3cd"),
    ),
    "kitchen": (
        (47, "cup", "☕"),
        (53, "apple", "\U0001f34e"),
        (59, "pizza", "\U0001f355"),
        (49, "knife", "\U0001f52a"),
        (52, "banana", "\U0001f34c"),
        (61, "cake", "\U0001f382"),
        (60, "donut", "\U0001f369"),
        (46, "wine glass", "\U0001f377"),
    ),
    "sports": (
        (37, "sports ball", "⚽"),
        (43, "tennis racket", "\U0001f3be"),
        (38, "kite", "\U0001fa81"),
        (41, "skateboard", "\U0001f6f9"),
        (27, "backpack", "\U0001f392"),
        (35, "skis", "\U0001f3bf"),
        (34, "frisbee", "\U0001f94f"),
        (9, "boat", "⛵"),
    ),
    "animals": (
        (18, "dog", "\U0001f415"),
        (17, "cat", "\U0001f408"),
        (16, "bird", "\U0001f426"),
        (19, "horse", "\U0001f40e"),
        (21, "cow", "\U0001f404"),
        (20, "sheep", "\U0001f411"),
        (22, "elephant", "\U0001f418"),
        (25, "giraffe", "\U0001f992"),
    ),
    "office": (
        (62, "chair", "\U0001fa91"),
        (84, "book", "\U0001f4d6"),
        (73, "laptop", "\U0001f4bb"),
        (77, "cell phone", "\U0001f4f1"),
        (85, "clock", "\U0001f570"),
        (76, "keyboard", "⌨"),
        (74, "mouse", "\U0001f5b1"),
        (87, "scissors", "✂"),
    ),
}

CATEGORIES: tuple[Category, ...] = tuple(
    Category(coco_id, name, context) for context, members in CONTEXTS.items() for coco_id, name, _ in members
)
GLYPHS: dict[str, str] = {name: glyph for members in CONTEXTS.values() for _, name, glyph in members}
CONTEXT_SIZE = 8
