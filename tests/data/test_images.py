from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from data.errors import AnnotationError, CorruptImageError, NotEnoughImagesError
from data.images import CocoImages, seeded_order, split_ids
from tests.data import tiny

SIZES = {"train": 20, "validation": 6, "test": 4}


def test_splits_are_disjoint_and_depend_on_the_seed_alone():
    splits = split_ids(range(100), SIZES, seed=3)
    chosen = [image_id for members in splits.values() for image_id in members]
    assert {name: len(members) for name, members in splits.items()} == SIZES
    assert len(set(chosen)) == 30
    assert split_ids(reversed(range(100)), SIZES, seed=3) == splits
    assert split_ids(range(100), SIZES, seed=4) != splits


def test_the_order_is_the_same_on_any_machine():
    # from `printf 0:split:$i | sha256sum`; another order here would re-deal every harvest
    assert seeded_order(range(8), seed=0, salt="split") == [7, 2, 5, 1, 0, 3, 6, 4]


def test_more_samples_than_images_says_how_many_there_are_and_which_key_to_change():
    with pytest.raises(NotEnoughImagesError, match=r"30 images .*20 train \+ 6 validation.*only 25.*harvest\.samples"):
        split_ids(range(25), SIZES, seed=0)


def test_index_of_a_coco_folder(coco: CocoImages):
    assert len(coco) == 40 and coco.ids[:2] == (10, 20)
    assert coco.categories == tiny.CATEGORIES
    assert coco.present(10) == {"car", "bus"}
    assert coco.path(10).name == "000010.png"
    picture = coco.open(20)
    assert picture.mode == "RGB" and picture.size == (tiny.SIDE, tiny.SIDE)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_any_mode_is_opened_as_rgb(tmp_path: Path, mode: str):
    images = tiny.write_coco(tmp_path / "coco", 1)
    file = images.path(10)
    Image.new("RGB", (5, 900), "red").convert(mode).save(file, format="TIFF" if mode == "CMYK" else "PNG")
    assert images.open(10).mode == "RGB"


def test_exif_rotation_is_applied(tmp_path: Path):
    images = tiny.write_coco(tmp_path / "coco", 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (40, 20)).save(images.path(10), format="JPEG", exif=exif)
    assert images.open(10).size == (20, 40)


def test_folder_without_annotations(tmp_path: Path):
    images = tiny.write_coco(tmp_path / "coco", 3)
    images.annotations_file.unlink()
    with pytest.raises(AnnotationError, match=r"holds 3 files, but its annotations .*instances\.json do not exist"):
        tiny.open_coco(tmp_path / "coco")


def test_missing_folder(tmp_path: Path):
    with pytest.raises(AnnotationError, match=r"nowhere does not exist\. Set data\.root"):
        CocoImages(tmp_path / "nowhere", tmp_path / "instances.json")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not readable JSON"), ('{"images": []}', "has no annotations, categories")]
)
def test_unreadable_annotations(tmp_path: Path, content: str, message: str):
    tiny.write_coco(tmp_path / "coco", 1).annotations_file.write_text(content)
    with pytest.raises(AnnotationError, match=message):
        tiny.open_coco(tmp_path / "coco")


def test_annotations_that_name_missing_files(tmp_path: Path):
    images = tiny.write_coco(tmp_path / "coco", 3)
    images.path(20).unlink()
    with pytest.raises(AnnotationError, match=r"lists 3 images, but 1 of them are not in .*: 000020\.png"):
        tiny.open_coco(tmp_path / "coco")


def test_annotation_of_an_unknown_category(tmp_path: Path):
    images = tiny.write_coco(tmp_path / "coco", 1)
    record = json.loads(images.annotations_file.read_text())
    record["annotations"][0]["category_id"] = 99
    images.annotations_file.write_text(json.dumps(record))
    with pytest.raises(AnnotationError, match="category_id 99"):
        tiny.open_coco(tmp_path / "coco")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_corrupt_image_is_named(tmp_path: Path, damage: str):
    images = tiny.write_coco(tmp_path / "coco", 2)
    if damage == "truncated":
        tiny.truncate_image(images, 10)
    else:
        images.path(10).write_text("not an image" if damage == "text" else "")
    with pytest.raises(CorruptImageError, match=r"000010\.png cannot be decoded") as caught:
        images.open(10)
    assert caught.value.path == images.path(10)
    images.open(20)


def test_a_file_that_vanished_is_not_a_corrupt_image(tmp_path: Path):
    images = tiny.write_coco(tmp_path / "coco", 1)
    images.path(10).unlink()
    with pytest.raises(FileNotFoundError):
        images.open(10)
