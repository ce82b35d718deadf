from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.errors import DataError, SettingsError, UnfinishedHarvestError
from data.index import check_shard
from data.sample import STATES_DTYPES
from data.shards import ShardReader, ShardWriter
from tests.data.tiny import assert_same, make_sample, write_shards

NAME = "train-00000"


@pytest.mark.parametrize("dtype", STATES_DTYPES.values())
def test_samples_come_back_as_they_were_written(tmp_path: Path, dtype: torch.dtype):
    reader = ShardReader(write_shards(tmp_path / "shards", dtype), "train")
    assert reader.keys == [f"{i:012d}" for i in (0, 1, 2, 10, 11, 12)]
    for sample in reader:
        assert_same(sample, make_sample(sample.image_id, dtype=dtype).decoded())
    assert_same(reader.stored(4), make_sample(11, dtype=dtype))


def test_tensors_are_views_that_cannot_reach_the_file(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    reader = ShardReader(directory, "train")
    reader[0].states.zero_()
    assert reader[0].states.abs().sum() == 0  # a view of the map, not a copy
    check_shard(directory, NAME)
    assert_same(ShardReader(directory, "train")[0], make_sample(0))


def test_a_reader_travels_to_another_process(tmp_path: Path):
    reader = ShardReader(write_shards(tmp_path / "shards"), "train")
    assert_same(reader[0], pickle.loads(pickle.dumps(reader))[0])


def test_shards_are_ordinary_webdatasets(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    with (directory / f"{NAME}.tar").open("rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": NAME, "stream": stream}])))
    assert [sample["__key__"] for sample in samples] == [f"{i:012d}" for i in range(3)]
    assert json.loads(samples[1]["json"])["file"] == "folder/1.v2.jpg"


def test_equal_samples_give_equal_bytes(tmp_path: Path):
    first, second = (write_shards(tmp_path / name) for name in ("a", "b"))
    names = sorted(file.name for file in first.iterdir())
    assert names == [
        "index.json", "manifest.json", "train-00000.json", "train-00000.tar", "train-00001.json", "train-00001.tar",
    ]  # fmt: skip
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_an_exception_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, NAME, "settings") as writer:
        writer.write(make_sample(1))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_harvest_is_rejected(tmp_path: Path):
    with pytest.raises(UnfinishedHarvestError, match=r"index\.json is missing.*python -m data\.harvest"):
        ShardReader(tmp_path, "train")


def test_another_format_version_is_rejected(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps({**index, "format_version": 2}))
    with pytest.raises(DataError, match="format version 2, this release reads 1"):
        ShardReader(directory, "train")


def test_unknown_split(tmp_path: Path):
    with pytest.raises(SettingsError, match="no split 'test': it has train"):
        ShardReader(write_shards(tmp_path / "shards"), "test")
