from __future__ import annotations

import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from datasets import Dataset
from datasets import Image as DatasetsImage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import images as images_module
from data.errors import AnnotationError, CorruptImageError, ImageFileError, NotEnoughImagesError
from data.images import CocoImages, read_annotations, seeded_order, split_ids
from tests.data import odd, tiny

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


def test_a_folder_without_annotations_is_its_own_list(tmp_path: Path):
    for name in ("b.PNG", "a.jpg", "deeper/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    pictures = CocoImages(tmp_path, None)
    assert [pictures.path(number).relative_to(tmp_path).as_posix() for number in pictures.ids] == [
        "a.jpg", "b.PNG", "deeper/c.webp",
    ]  # fmt: skip
    assert pictures.categories == () and pictures.present(0) == frozenset() and pictures.open(1).size == (8, 8)
    Image.new("RGB", (9, 9)).save(tmp_path / "d.png")
    assert CocoImages(tmp_path, None).annotations_sha256 != pictures.annotations_sha256
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnnotationError, match=r"empty holds no pictures \(\.jpg"):
        CocoImages(tmp_path / "empty", None)


@pytest.mark.parametrize(
    ("mode", "format"), [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG")]
)
@pytest.mark.parametrize("size", [(8, 8), (5, 900), (1, 1)])
def test_any_mode_and_size_is_opened_as_rgb(tmp_path: Path, mode: str, format: str, size: tuple[int, int]):
    images = tiny.write_coco(tmp_path / "coco", 1)
    picture = Image.new("RGB", size, (200, 0, 0))
    picture = Image.new(mode, size, 200) if mode == "I;16" else picture.convert(mode)
    picture.save(images.path(10), format=format)
    opened = images.open(10)
    assert opened.mode == "RGB" and opened.size == size
    if mode in ("CMYK", "RGBA", "P"):
        red, green, blue = opened.getpixel((0, 0))  # type: ignore[misc]
        assert red > 150 and green < 60 and blue < 60  # not inverted


def test_a_huge_photograph_is_opened(tmp_path: Path):
    images = tiny.write_coco(tmp_path / "coco", 1)
    Image.new("RGB", (6000, 4500), "red").save(images.path(10), format="JPEG")
    assert images.open(10).size == (6000, 4500)


def test_exif_rotation_is_applied_as_datasets_does(tmp_path: Path):
    images = tiny.write_coco(tmp_path / "coco", 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture = Image.new("RGB", (40, 20))
    picture.paste((255, 255, 255), (0, 0, 40, 10))
    picture.save(images.path(10), format="JPEG", exif=exif)
    opened = images.open(10)
    assert opened.size == (20, 40)
    assert opened.getpixel((15, 20))[0] > 200 and opened.getpixel((5, 20))[0] < 50  # type: ignore[index]
    plain = Dataset.from_dict({"image": [str(images.path(10))]}).cast_column("image", DatasetsImage(mode="RGB"))
    assert plain[0]["image"].tobytes() == opened.tobytes()


def test_a_bomb_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = tiny.write_coco(tmp_path / "coco", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CorruptImageError, match="DecompressionBombError"):
        images.open(10)


# -- COCO's own layout, and the index of its annotations


def write_coco2014(root: Path, images: int, annotations: int) -> Path:
    """A folder as the official archives unpack it; pictures are empty files. Returns the instances file."""
    (root / "train2014").mkdir(parents=True)
    (root / "annotations").mkdir()
    names = [f"COCO_train2014_{9 + 7 * i:012d}.jpg" for i in range(images)]
    for name in names:
        (root / "train2014" / name).touch()
    record = {
        "info": {"year": 2014},
        "licenses": [],
        "images": [{"id": 9 + 7 * i, "file_name": name, "height": 480, "width": 640} for i, name in enumerate(names)],
        "annotations": [
            {
                "segmentation": [[1.5, 2.25, 30.75, 40.5] * 6],
                "area": 702.1,
                "iscrowd": 0,
                "image_id": 9 + 7 * (k * 31 % images),
                "bbox": [473.07, 395.93, 38.65, 28.67],
                "category_id": 1 + k * 17 % 90,
                "id": k,
            }
            for k in range(annotations)
        ],
        # ids have gaps, as the official ones do
        "categories": [{"supercategory": "thing", "id": c, "name": f"thing {c}"} for c in range(1, 91)],
    }
    file = root / "annotations" / "instances_train2014.json"
    file.write_text(json.dumps(record))
    return file


def test_official_layout_through_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_coco2014(tmp_path, 6300, 50_000)
    first = CocoImages(tmp_path / "train2014", file, tmp_path / "runs" / "cache")
    [stored] = (tmp_path / "runs" / "cache").glob("*.json")
    assert stored.stat().st_size < file.stat().st_size / 10
    monkeypatch.setattr(images_module, "_parse_annotations", lambda _: pytest.fail("parsed again"))
    second = CocoImages(tmp_path / "train2014", file, tmp_path / "runs" / "cache")
    assert (second.ids, second.categories) == (first.ids, first.categories)
    assert second.annotations_sha256 == first.annotations_sha256
    assert all(second.present(i) == first.present(i) and second.path(i) == first.path(i) for i in first.ids)
    assert first.path(9).name == "COCO_train2014_000000000009.jpg"
    assert first.present(9) == {f"thing {1 + k * 17 % 90}" for k in range(0, 50_000, 6300)}
    splits = split_ids(first.ids, {"train": 5000, "validation": 500, "test": 500, "tuning": 200}, seed=0)
    assert len({i for members in splits.values() for i in members}) == 6200
    assert splits["tuning"][:3] == seeded_order(first.ids, 0, "split")[6000:6003]


@pytest.mark.parametrize("damage", [b"", b"x", b"0" * 64 + b'\n{"version":1}'])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: bytes):
    file = write_coco2014(tmp_path, 10, 50)
    whole = read_annotations(file, tmp_path / "cache")
    [stored] = (tmp_path / "cache").glob("*.json")
    content = stored.read_bytes()
    stored.write_bytes(damage or content[: len(content) // 2])
    assert read_annotations(file, tmp_path / "cache") == whole
    assert stored.read_bytes() == content


def test_other_annotations_have_another_index(tmp_path: Path):
    file = write_coco2014(tmp_path, 10, 50)
    first, checksum = read_annotations(file, tmp_path / "cache")
    file.write_text(file.read_text().replace('thing 1"', 'thing x"'))  # the same size
    second, other = read_annotations(file, tmp_path / "cache")
    assert first.categories[0] == "thing 1" and second.categories[0] == "thing x" and checksum != other
    assert len(list((tmp_path / "cache").glob("*.json"))) == 2
    assert read_annotations(file) == (second, other)


@pytest.mark.parametrize("locks", [True, False])
def test_of_processes_that_begin_at_once_one_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool):
    """Threads here: a lock belongs to an opened file, so that to it they are like processes."""
    file = tiny.write_coco(tmp_path / "coco", 6).annotations_file
    parse, parsed = images_module._parse_annotations, []

    def slow(file: Path) -> images_module.AnnotationIndex:
        parsed.append(file)
        time.sleep(0.3)
        return parse(file)

    def refused(*_: object) -> None:
        raise OSError("this file system knows no locks")

    monkeypatch.setattr(images_module, "_parse_annotations", slow)
    if not locks:
        monkeypatch.setattr("fcntl.flock", refused)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: read_annotations(file, tmp_path / "cache"), range(4 if locks else 1)))
    assert len(parsed) == 1
    assert all(result == read_annotations(file) for result in results)


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


@pytest.mark.parametrize("damage", ["truncated", "truncated JPEG", "text", "empty"])
def test_a_corrupt_image_is_named(tmp_path: Path, damage: str):
    images = tiny.write_coco(tmp_path / "coco", 2)
    if damage == "truncated JPEG":
        Image.effect_noise((200, 200), 60).save(images.path(10), format="JPEG")
    if damage.startswith("truncated"):
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
    for read in (images.open, images.size):
        with pytest.raises(FileNotFoundError) as caught:
            read(10)
        assert isinstance(caught.value, ImageFileError) and "000010.png has vanished" in str(caught.value)


def test_an_image_that_the_system_cannot_read_is_not_a_corrupt_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = tiny.write_coco(tmp_path / "coco", 1)

    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ImageFileError, match=r"cannot be read \(Permission denied\)"):
        images.open(10)


# -- odd things in the images folder


@pytest.mark.parametrize("kind", odd.KINDS)
def test_an_image_that_becomes_something_odd_is_an_error_of_ours(tmp_path: Path, kind: str):
    images = tiny.write_coco(tmp_path / "coco", 2)
    odd.put(images.path(10), kind)
    for read in (images.open, images.size):
        with pytest.raises((CorruptImageError, ImageFileError), match=r"000010\.png"):
            read(10)
    if kind != "a terabyte":  # a sparse file is a file
        with pytest.raises(AnnotationError, match=r"1 of them are not in .*: 000010\.png"):
            tiny.open_coco(tmp_path / "coco")
    images.open(20)


@pytest.mark.parametrize("kind", odd.KINDS)
def test_odd_things_beside_the_images_are_left_alone(tmp_path: Path, kind: str):
    images = tiny.write_coco(tmp_path / "coco", 2)
    odd.put(images.images_dir / "beside", kind)
    assert len(tiny.open_coco(tmp_path / "coco")) == 2


@pytest.mark.parametrize("kind", [*odd.KINDS, "noise"])
def test_an_images_folder_that_is_none(tmp_path: Path, kind: str):
    images = tiny.write_coco(tmp_path / "coco", 1)
    images.path(10).unlink()
    images.images_dir.rmdir()
    odd.put(images.images_dir, kind)
    with pytest.raises(AnnotationError, match="images"):
        tiny.open_coco(tmp_path / "coco")


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000 + "a.png", "none/a.png"])
def test_names_that_lead_to_no_file(tmp_path: Path, name: str):
    images = tiny.write_coco(tmp_path / "coco", 1)
    record = json.loads(images.annotations_file.read_text())
    record["images"][0]["file_name"] = name
    images.annotations_file.write_text(json.dumps(record))
    with pytest.raises(AnnotationError, match="1 of them are not in"):
        tiny.open_coco(tmp_path / "coco")


@given(
    content=st.binary(max_size=300),
    head=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"]),
)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_an_image_or_a_corrupt_one(any_image: CocoImages, content: bytes, head: bytes):
    any_image.path(10).write_bytes(head + content)
    with contextlib.suppress(CorruptImageError):
        assert any_image.open(10).mode == "RGB"
    with contextlib.suppress(CorruptImageError):
        assert min(any_image.size(10)) >= 0


@pytest.fixture(scope="module")
def any_image(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    return tiny.write_coco(tmp_path_factory.mktemp("any") / "coco", 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_decoded_image(tmp_path: Path, orientation: int):
    images = tiny.write_coco(tmp_path / "coco", 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(images.path(10), format="JPEG", exif=exif)
    assert images.size(10) == images.open(10).size
