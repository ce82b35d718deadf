from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import files
from data.errors import UnreadableFileError
from data.files import is_count, is_relative, open_regular, parse_json, read_bytes, read_json, shown
from tests.data import odd

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("kind", odd.KINDS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str):
    path = tmp_path / "file.json"
    odd.put(path, kind)
    tracemalloc.start()
    with pytest.raises(UnreadableFileError, match=r"file\.json (is|has|cannot be opened)") as caught:
        read_bytes(path, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 and not caught.value.missing and not caught.value.failed
    with pytest.raises(UnreadableFileError):
        read_json(path, 1 << 20)


def test_missing_files_are_told_apart_from_those_that_the_system_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for path in (tmp_path / "nowhere", tmp_path / "nowhere" / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").touch()
        with pytest.raises(UnreadableFileError, match="does not exist") as caught:
            open_regular(path)
        assert caught.value.missing
    for name in ("null\0byte", "x" * 5000):
        with pytest.raises(UnreadableFileError, match="cannot be opened") as caught:
            open_regular(tmp_path / name)
        assert not caught.value.missing and not caught.value.failed

    def refused(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UnreadableFileError, match=r"cannot be read \(Permission denied\)") as caught:
        open_regular(tmp_path / "file")
    assert caught.value.failed


def test_a_name_that_is_given_to_a_fifo_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    path.touch()
    looked, check = [], files._check_regular

    def swapping(file: Any, status: os.stat_result) -> None:
        check(file, status)
        if not looked:
            path.unlink()
            os.mkfifo(path)
        looked.append(file)

    monkeypatch.setattr(files, "_check_regular", swapping)
    with pytest.raises(UnreadableFileError, match="is a FIFO"):
        open_regular(path)


def test_links_to_regular_files_are_followed(tmp_path: Path):
    (tmp_path / "there").write_bytes(b"[1]")
    (tmp_path / "link").symlink_to("there")
    assert read_json(tmp_path / "link", 10) == [1]


@pytest.mark.parametrize("kind", [kind for kind in odd.CONTENTS if kind not in odd.LEGAL])
def test_json_that_could_be_misunderstood_is_refused(kind: str):
    with pytest.raises(ValueError):
        parse_json(odd.CONTENTS[kind])


@given(values)
@settings(deadline=None, max_examples=200)
def test_json_is_read_as_it_was_written(value: Any):
    for ascii_only in (True, False):
        content = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert parse_json(content) == value
        assert parse_json(b"\xef\xbb\xbf" + content) == value  # a byte order mark says nothing


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_a_value_or_a_value_error(content: bytes):
    try:
        value = parse_json(content)
    except ValueError:
        return
    assert json.loads(content.decode("utf-8-sig")) == value


def test_constants_are_accepted_where_they_are_asked_for():
    assert parse_json(b"[1e5, Infinity]", constants=True) == [1e5, float("inf")]
    for content in (b"[NaN]", b"[-Infinity]", b"[1e400]"):
        with pytest.raises(ValueError):
            parse_json(content)


@pytest.mark.parametrize("name", ["", "a", "a/b.png", "..x", "x..", "./a"])
def test_names_below_a_folder(name: str):
    assert is_relative(name)


@pytest.mark.parametrize("name", ["/a", "..", "../a", "a/../b", "a\0", "\ud800", None, 3, ["a"]])
def test_names_outside_of_it(name: object):
    assert not is_relative(name)


def test_counts_are_integers_of_64_bits():
    assert is_count(0) and is_count(5, 5) and is_count(2**63 - 1)
    assert not any(is_count(value) for value in (-1, 2**63, True, 1.0, "1", None, [1]))


def test_long_and_odd_values_are_shown_in_short():
    assert shown("x" * 500) == "'" + "x" * 79 + "..."
    assert shown("\ud800") == "'\\ud800'"
