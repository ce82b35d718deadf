"""Photos of four shapes in COCO's layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from tests.families.models import CATEGORIES

SHAPES = ((640, 480), (427, 640), (500, 500), (640, 200))  # width and height in pixels


def write_photos(root: Path, count: int) -> Path:
    """Photos in turn of each shape, with two objects each, as train2014; there is no val2014."""
    folder = root / "train2014"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir()
    annotations = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        photo = Image.fromarray(noise).resize(SHAPES[number % len(SHAPES)], Image.Resampling.BICUBIC)
        photo.filter(ImageFilter.GaussianBlur(2)).save(folder / name_of(number), quality=90)
        for category in (number % len(CATEGORIES), (number + 1 + number % 3) % len(CATEGORIES)):
            annotations.append({"id": len(annotations), "image_id": number + 1, "category_id": category + 1})
    record = {
        "images": [{"id": number + 1, "file_name": name_of(number)} for number in range(count)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, start=1)],
    }
    (root / "annotations" / "instances_train2014.json").write_text(json.dumps(record))
    return root


def name_of(number: int) -> str:
    return f"COCO_train2014_{number + 1:012d}.jpg"
