"""The world: deterministic, valid COCO, never half there."""

import errno
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scenes import CATEGORIES, ensure_world
from scenes.categories import CONTEXTS
from scenes.drawing import MIXED, SIZE, SQUARE, STREAMS, caption, render_scene
from scenes.marker import MARKER, NoWorldError
from scenes.world import WorldMismatchError

# Ids as in COCO's own annotation files, copied by hand from there.
COCO_IDS = {"person": 1, "car": 3, "boat": 9, "traffic light": 10, "dog": 18, "giraffe": 25,
            "sports ball": 37, "banana": 52, "chair": 62, "cell phone": 77, "scissors": 87}  # fmt: skip


def digest(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_world(tmp_path_factory.mktemp("scenes") / "world", train=12, val=6, seed=3)


def test_categories_are_those_of_coco():
    assert len(CATEGORIES) == len({c.coco_id for c in CATEGORIES}) == len({c.name for c in CATEGORIES}) == 40
    assert all(1 <= c.coco_id <= 90 for c in CATEGORIES)
    assert {name: i for i, name, _ in CATEGORIES if name in COCO_IDS} == COCO_IDS
    assert [len(members) for members in CONTEXTS.values()] == [8] * 5


def test_same_seed_same_bytes(world: Path, tmp_path: Path):
    again = ensure_world(tmp_path / "again", train=12, val=6, seed=3)
    assert digest(again) == digest(world)


def test_longer_world_begins_with_the_shorter_one(world: Path, tmp_path: Path):
    longer = digest(ensure_world(tmp_path / "longer", train=15, val=7, seed=3))
    images = {name: value for name, value in digest(world).items() if name.endswith(".png")}
    assert len(images) == 18
    assert images.items() <= longer.items()


def test_seed_stream_and_index_all_matter():
    base = render_scene(0, "train", 0).image
    for other in [
        (1, "train", 0),
        (0, "train", 1),
        *((0, stream, 0) for stream in STREAMS if stream != "train"),
    ]:
        assert not np.array_equal(base, render_scene(*other).image), other


def test_layout_is_coco(world: Path):
    by_id = {c.coco_id: c.name for c in CATEGORIES}
    seen_images: set[int] = set()
    seen_annotations: set[int] = set()
    for split, count in (("train", 12), ("val", 6)):
        instances = json.loads((world / "annotations" / f"instances_{split}.json").read_text())
        captions = json.loads((world / "annotations" / f"captions_{split}.json").read_text())
        assert {c["id"]: c["name"] for c in instances["categories"]} == by_id
        assert len(instances["images"]) == count
        assert {i["file_name"] for i in instances["images"]} == {f.name for f in (world / split).iterdir()}
        ids = {i["id"] for i in instances["images"]}
        assert ids.isdisjoint(seen_images)
        seen_images |= ids
        assert {a["image_id"] for a in instances["annotations"]} == ids, "every scene shows something"
        assert [c["image_id"] for c in captions["annotations"]] == [i["id"] for i in instances["images"]]
        for annotation in instances["annotations"]:
            assert annotation["id"] not in seen_annotations
            seen_annotations.add(annotation["id"])
            assert annotation["category_id"] in by_id
            assert annotation["iscrowd"] == 0
            x, y, width, height = annotation["bbox"]
            assert 0 <= x < x + width <= SIZE
            assert 0 <= y < y + height <= SIZE
            assert 0 < annotation["area"] <= width * height
        for image in instances["images"]:
            with Image.open(world / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"]) == (SIZE, SIZE)
                assert picture.mode == "RGB"


def test_a_world_of_mixed_sizes_is_coco_too(tmp_path: Path):
    root = ensure_world(tmp_path / "world", train=8, val=2, seed=3, sizes="mixed")
    sizes = set()
    for split in ("train", "val"):
        instances = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        by_id = {image["id"]: image for image in instances["images"]}
        for image in by_id.values():
            with Image.open(root / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                sizes.add(picture.size)
        for annotation in instances["annotations"]:
            x, y, width, height = annotation["bbox"]
            image = by_id[annotation["image_id"]]
            assert 0 <= x < x + width <= image["width"] and 0 <= y < y + height <= image["height"]
    assert len(sizes) > 2 and sizes <= set(MIXED.sizes)
    whole = digest(root)
    (root / "train" / "000000000002.png").unlink()
    (root / "annotations" / "captions_train.json").unlink()
    assert digest(ensure_world(root, train=8, val=2, seed=3, sizes="mixed")) == whole
    with pytest.raises(WorldMismatchError, match="size: 'mixed' -> 96"):
        ensure_world(root, train=8, val=2, seed=3)


def test_captions_name_what_is_seen(world: Path):
    instances = json.loads((world / "annotations" / "instances_val.json").read_text())
    captions = json.loads((world / "annotations" / "captions_val.json").read_text())
    by_id = {c.coco_id: c.name for c in CATEGORIES}
    for entry in captions["annotations"]:
        seen = {by_id[a["category_id"]] for a in instances["annotations"] if a["image_id"] == entry["image_id"]}
        assert seen == {name for name in by_id.values() if f" {name}" in entry["caption"]}
        assert entry["caption"].startswith(("A ", "An "))


def test_ground_truth_is_what_is_visible():
    for index in range(40):
        scene = render_scene(5, "val", index)
        for thing in scene.objects:
            x, y, width, height = thing.box
            inside = scene.labels[y : y + height, x : x + width] == thing.category + 1
            assert inside.sum() >= thing.area  # more where two of a kind overlap
            assert SQUARE.min_visible <= thing.visible <= 1
        assert set(np.unique(scene.labels)) - {0} == {i + 1 for i in scene.present}
        assert caption(scene).endswith(f" on {scene.ground}.")


def test_context_is_a_prior_but_no_rule():
    scenes = [render_scene(0, "val", index) for index in range(200)]
    things = [(CATEGORIES[o.category], s.context) for s in scenes for o in s.objects]
    at_home = np.mean([c.context == context for c, context in things if c.name != "person"])
    assert 0.82 < at_home < 0.94
    with_person = np.mean([any(CATEGORIES[i].name == "person" for i in s.present) for s in scenes])
    assert with_person > 0.25


def test_finished_world_is_reused(world: Path, capsys: pytest.CaptureFixture[str]):
    before = {file: file.stat().st_mtime_ns for file in world.rglob("*")}
    assert ensure_world(world, train=12, val=6, seed=3) == world
    assert "reusing" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in world.rglob("*")} == before


def test_a_world_of_other_settings_is_never_replaced(tmp_path: Path):
    root = ensure_world(tmp_path / "world", train=3, val=2, seed=0)
    first = digest(root)
    with pytest.raises(
        WorldMismatchError, match=r"differs in train, seed[^$]*seed: 0 -> 1[^$]*data\.name=NAME"
    ) as caught:
        ensure_world(root, train=4, val=2, seed=1)
    assert caught.value.difference == {"train": (3, 4), "seed": (0, 1)}
    assert digest(root) == first
    assert [p.name for p in tmp_path.iterdir()] == ["world"], "nothing is left beside it"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("scenes.world._png", full)
        with pytest.raises(OSError, match="No space left") as caught:
            ensure_world(tmp_path / "world", train=3, val=2)
    assert not isinstance(caught.value, NoWorldError) and list(tmp_path.iterdir()) == []


def test_a_linked_folder_is_filled_where_it_lies(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "world").symlink_to("disk")
    ensure_world(tmp_path / "world", train=3, val=2)
    assert (tmp_path / "world").is_symlink() and (tmp_path / "disk" / MARKER).is_file()


@pytest.mark.parametrize("cut", [False, True], ids=["removed", "cut"])
@pytest.mark.parametrize("lost", ["train/000000000002.png", "annotations/instances_val.json"])
def test_what_a_world_has_lost_is_rendered_again(
    tmp_path: Path, lost: str, cut: bool, capsys: pytest.CaptureFixture[str]
):
    root = ensure_world(tmp_path / "world", train=3, val=2)
    whole = digest(root)
    kept = (root / "train" / "000000000001.png").stat()
    if cut:
        (root / lost).write_bytes((root / lost).read_bytes()[:-20])
    else:
        (root / lost).unlink()
    ensure_world(root, train=3, val=2)
    assert "missing" in capsys.readouterr().out
    assert digest(root) == whole
    now = (root / "train" / "000000000001.png").stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns), "what is there is not written again"


def test_interrupted_rendering_leaves_no_world_and_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, calls = render_scene, []

    def stops(*arguments: object):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    root = tmp_path / "world"
    with monkeypatch.context() as patched:
        patched.setattr("scenes.world.render_scene", stops)
        with pytest.raises(KeyboardInterrupt):
            ensure_world(root, train=5, val=2)
    assert not root.exists()
    ensure_world(root, train=5, val=2)
    assert digest(root) == digest(ensure_world(tmp_path / "reference", train=5, val=2))


def test_foreign_folder_is_refused(tmp_path: Path):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(NoWorldError, match="no finished world"):
        ensure_world(tmp_path, train=2, val=2)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize(("train", "val", "seed"), [(0, 1, 0), (1_000_001, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_senseless_settings_are_refused(tmp_path: Path, train: int, val: int, seed: int):
    with pytest.raises(ValueError, match=r"train=|val=|seed="):
        ensure_world(tmp_path / "world", train, val, seed)
