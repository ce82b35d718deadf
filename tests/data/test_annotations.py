"""Annotations: what is malformed is named by file, entry and key, whether it is read for the first time or again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.annotations import AnnotationIndex, name_problem, parse_annotations
from data.chat import chat_inputs
from data.errors import AnnotationError
from data.images import CocoImages, read_annotations
from data.index import canonical_json
from data.wording import question_text
from tests.data import odd, tiny

Record = dict[str, Any]


def record() -> Record:
    return {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b/c.png"}],
        "annotations": [{"id": 0, "image_id": 1, "category_id": 5}, {"id": 1, "image_id": 1, "category_id": 7}],
        "categories": [{"id": 5, "name": "dog"}, {"id": 7, "name": "caf\u00e9 table"}],
    }


def written(folder: Path, value: object) -> Path:
    file = folder / "instances.json"
    file.write_text(json.dumps(value))
    return file


def test_well_formed_annotations(tmp_path: Path):
    index = parse_annotations(written(tmp_path, record()))
    assert index == AnnotationIndex(("dog", "caf\u00e9 table"), {1: "a.png", 2: "b/c.png"}, {1: [0, 1]})
    content = json.dumps(record(), ensure_ascii=False).encode()
    (tmp_path / "instances.json").write_bytes(b"\xef\xbb\xbf\n " + content)  # a byte order mark
    assert parse_annotations(tmp_path / "instances.json") == index


def put(*place: Any, value: Any) -> Callable[[Record], object]:
    """Puts a value at a place of a record; `...` removes what is there."""

    def change(inner: Any) -> None:
        for key in place[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[place[-1]]
        else:
            inner[place[-1]] = value

    return change


LISTS = ("images", "annotations", "categories")
_NO_ID = [..., None, "1", 1.0, True, -1, [], {}, 2**63, float("nan")]
MALFORMED = [
    *((put(key, value=value), f"{key} is .*expected a list") for key in LISTS
      for value in (None, {}, "x", 3)),
    *((put(key, value=...), f"it has no {key}") for key in LISTS),
    *((put(key, 1, value=value), rf"{key}\[1\] is .*expected an object") for key in LISTS
      for value in (None, [], "x", 3)),
    *((put(key, 1, "id", value=value), rf"{key}\[1\]: id is .*expected an integer") for key in ("images", "categories")
      for value in _NO_ID),
    *((put("annotations", 1, "id", value=value), r"annotations\[1\]: id is") for value in _NO_ID[1:]),
    *((put("annotations", 1, key, value=value), rf"annotations\[1\].*{key}")
      for key in ("image_id", "category_id") for value in _NO_ID),
    (put("annotations", 1, "image_id", value=99), r"annotations\[1\] has image_id 99, which its `images` do not list"),
    (put("annotations", 1, "category_id", value=99), r"annotations\[1\] has category_id 99"),
    *((put(key, 1, "id", value=first), rf"{key}\[1\]: id {first} comes twice")
      for key, first in (("images", 1), ("annotations", 0), ("categories", 5))),
    *((put("categories", 1, "name", value=value), r"categories\[1\]: name is")
      for value in (..., None, 3, [], {}, "", "  ", "\ud800", "<image>", "<|im_end|>", "[INST]", "a\nb", "a\0b",
                    "a\u2028b", "x" * 500)),
    (put("categories", 1, "name", value="dog"), "the name 'dog' comes twice"),
    *((put("images", 1, "file_name", value=value), r"images\[1\]: file_name is")
      for value in (..., None, 3, [], {}, "", "../a.png", "b/../../a.png", "/etc/passwd", "a\0.png", "\ud800.png")),
    (put("images", value=[]), "lists no images"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_annotations_are_named_each_time(tmp_path: Path, change: Callable[[Record], object], message: str):
    wrong = record()
    change(wrong)
    if "lists no images" in message:
        wrong["annotations"] = []
    file = written(tmp_path, wrong)
    for _ in range(2):  # the cache must not let in what parsing rejects
        with pytest.raises(AnnotationError, match=message) as caught:
            read_annotations(file, tmp_path / "cache")
        assert str(file) in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.json"))


@pytest.mark.parametrize("kind", [*odd.KINDS, *odd.CONTENTS])
def test_what_is_no_annotations_file(tmp_path: Path, kind: str):
    (tmp_path / "images").mkdir()
    odd.put(tmp_path / "instances.json", kind)
    for _ in range(2):
        with pytest.raises(AnnotationError, match=r"instances\.json"):
            CocoImages(tmp_path / "images", tmp_path / "instances.json", tmp_path / "cache")


def test_keys_that_come_twice_are_refused(tmp_path: Path):
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(record()).replace('"id": 5', '"id": 5, "id": 6'))
    with pytest.raises(AnnotationError, match="the key 'id' comes twice"):
        parse_annotations(file)


def test_a_number_of_5000_digits_is_refused(tmp_path: Path):
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(record()).replace('"image_id": 1', f'"image_id": {"1" * 5000}', 1))
    with pytest.raises(AnnotationError, match="not readable JSON"):
        parse_annotations(file)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*here, key)
        yield from places(item, (*here, key))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "name", "x"]), inner),
    max_leaves=5,
)


@given(place=st.sampled_from([(), *places(record())]), value=values)
@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_anywhere_is_accepted_or_named_and_the_same_again(tmp_path: Path, place: Any, value: Any):
    wrong: Any = record()
    if place:
        put(*place, value=value)(wrong)
    else:
        wrong = value
    file = written(tmp_path, wrong)
    found = []
    for cache in (tmp_path / "cache", tmp_path / "cache", None):
        try:
            found.append(read_annotations(file, cache))
        except AnnotationError as error:
            found.append(str(error))
    assert found[0] == found[1] == found[2]


@given(st.text(max_size=12))
@settings(deadline=None, max_examples=200)
def test_a_name_that_is_accepted_adds_no_image_to_a_prompt(llava: tuple[Any, Any], name: str):
    _, processor = llava
    if name_problem(name) is None:
        ids = chat_inputs(processor, [tiny.Image.new("RGB", (8, 8))], [question_text(name)])["input_ids"]
        assert (ids == processor.tokenizer.get_vocab()["<image>"]).sum() == tiny.TOKENS


# -- the index of annotations


def test_any_flipped_bit_of_the_index_is_harmless(tmp_path: Path):
    file = written(tmp_path, record())
    expected = read_annotations(file, tmp_path / "cache")
    [stored] = (tmp_path / "cache").glob("*.json")
    intact = stored.read_bytes()
    for place in range(0, 8 * len(intact), 7):
        content = bytearray(intact)
        content[place // 8] ^= 1 << place % 8
        stored.write_bytes(content)
        assert read_annotations(file, tmp_path / "cache") == expected
        assert stored.read_bytes() == intact


@pytest.mark.parametrize("kind", [*odd.KINDS, *odd.CONTENTS])
def test_whatever_lies_in_place_of_the_index_is_harmless(tmp_path: Path, kind: str):
    file = written(tmp_path, record())
    expected = read_annotations(file, tmp_path / "cache")
    [stored] = (tmp_path / "cache").glob("*.json")
    intact = stored.read_bytes()
    odd.put(stored, kind)
    for _ in range(2):
        assert read_annotations(file, tmp_path / "cache") == expected
    assert stored.is_dir() if kind == "a folder" else stored.read_bytes() == intact


@pytest.mark.parametrize(
    "change",
    [
        put("categories", value=None), put("categories", 0, value="<image>"), put("categories", 0, value=3),
        put("files", value=[]), put("files", "1", value="../x"), put("files", "x", value="a"),
        put("present", "1", value=[9]), put("present", "1", value=[-1]), put("present", "1", value=["0"]),
        put("present", "3", value=[0]), put("present", value=...), put("version", value=1), put("version", value=...),
    ],
)  # fmt: skip
def test_an_index_with_a_right_checksum_and_wrong_content_is_made_again(tmp_path: Path, change: Any):
    file = written(tmp_path, record())
    expected = read_annotations(file, tmp_path / "cache")
    [stored] = (tmp_path / "cache").glob("*.json")
    intact = stored.read_bytes()
    forged = json.loads(intact.partition(b"\n")[2])
    change(forged)
    content = canonical_json(forged)
    stored.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    assert read_annotations(file, tmp_path / "cache") == expected
    assert stored.read_bytes() == intact


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = written(tmp_path, record())
    (tmp_path / "cache").write_text("in the way")
    assert read_annotations(file, tmp_path / "cache" / "below") == read_annotations(file)
    assert "cannot be kept" in " ".join(capsys.readouterr().out.split())


def test_annotations_that_change_while_they_are_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = written(tmp_path, record())

    def changing(file: Path) -> AnnotationIndex:
        index = parse_annotations(file)
        file.write_text("{}")
        return index

    monkeypatch.setattr("data.images._parse_annotations", changing)
    with pytest.raises(AnnotationError, match="was changed while it was read"):
        read_annotations(file, tmp_path / "cache")
