from __future__ import annotations

import pytest

from data.log import log


def test_a_long_line_is_wrapped_and_its_path_stays_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    folder = "/a/very/long/folder/name" * 4
    log("shards", f"12.3 MB in {folder}, kept in memory: 12.3 MB are within the limit of 2,048 MB")
    assert capsys.readouterr().out.splitlines() == [
        "shards: 12.3 MB in",
        f"  {folder},",
        "  kept in memory: 12.3 MB are within the limit of 2,048 MB",
    ]
