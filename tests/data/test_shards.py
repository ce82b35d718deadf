from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from data import shards
from data.errors import DamagedShardError, DataError, UnfinishedHarvestError
from data.images import CocoImages
from data.shards import Sample, ShardReader, ShardWriter, check_shard, quantise, question_dtype, write_index

NAME = "train-00000"


def make_sample(image_id: int, prompts: int = 2, dtype: torch.dtype = torch.float16) -> Sample:
    generator = torch.Generator().manual_seed(image_id)
    states = torch.randn(6, 5, generator=generator)
    stored, scales = quantise(states) if dtype == torch.int8 else (states.to(dtype), None)
    return Sample(
        image_id=image_id,
        file=f"folder/{image_id}.v2.jpg",
        states=stored,
        scales=scales,
        attention=torch.rand(prompts, 6, generator=generator),
        question=torch.randn(prompts, 5, generator=generator).to(question_dtype(dtype)),
        grid=(2, 3),
        prompts=[
            {"text": f"A caf\u00e9 {p}?", "label": "no", "category": "c", "strategy": "x"} for p in range(prompts)
        ],
        entropy=[1.0 / 3 + p for p in range(prompts)],
    )


def write_shards(directory: Path, dtype: torch.dtype = torch.float16) -> Path:
    directory.mkdir()
    for number in range(2):
        with ShardWriter(directory, f"train-{number:05d}", "settings") as writer:
            for image_id in range(3):
                writer.write(make_sample(10 * number + image_id, dtype=dtype))
    write_index(directory, {"train": [NAME, "train-00001"]}, {}, {})
    return directory


def assert_same(left: Sample, right: Sample) -> None:
    assert (left.scales is None) == (right.scales is None)
    for name in ("states", "attention", "question", *(["scales"] if left.scales is not None else [])):
        one, other = getattr(left, name), getattr(right, name)
        assert one.dtype == other.dtype and torch.equal(one, other)
    for name in ("image_id", "file", "grid", "prompts", "entropy", "key"):
        assert getattr(left, name) == getattr(right, name)


@pytest.mark.parametrize("dtype", shards.STATES_DTYPES.values())
def test_samples_come_back_as_they_were_written(tmp_path: Path, dtype: torch.dtype):
    reader = ShardReader(write_shards(tmp_path / "shards", dtype), "train")
    assert reader.keys == [f"{i:012d}" for i in (0, 1, 2, 10, 11, 12)]
    for sample in reader:
        assert_same(sample, make_sample(sample.image_id, dtype=dtype).decoded())
    assert_same(reader.stored(4), make_sample(11, dtype=dtype))


def test_int8_states_are_off_by_half_a_step_of_their_token_at_most(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 64, generator=generator) * torch.logspace(-4, 5, 50)[:, None]
    states[7] = 0
    stored, scales = quantise(states)
    assert stored.abs().amax(-1).tolist() == [127 * (token != 7) for token in range(50)]
    error = (stored * scales[:, None] - states).abs()
    assert (error <= scales[:, None] * 0.5001).all() and error[7].max() == 0


def test_int8_without_scales_and_scales_without_int8_are_refused():
    whole, small = make_sample(1), make_sample(1, dtype=torch.int8)
    small.check()
    for wrong in (replace(small, scales=None), replace(whole, scales=small.scales)):
        with pytest.raises(ValueError, match="scales of"):
            wrong.check()


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


def test_leftovers_of_dead_writers_are_removed_and_those_of_living_ones_stay(tmp_path: Path):
    machine = socket.gethostname()
    dead, alive, elsewhere, given_up, of_another_shard, not_ours = (
        tmp_path / f"{name}.tmp.{writer}"
        for name, writer in [
            (f"{NAME}.tar", f"{machine}.4194303"),
            (f"{NAME}.tar", f"{machine}.1"),
            (f"{NAME}.tar", "another.machine.4194303"),
            (f"{NAME}.json", "another.machine.4194302"),
            ("train-00001.tar", f"{machine}.4194303"),
            ("notes.txt", f"{machine}.4194303"),
        ]
    )
    for file in (dead, alive, elsewhere, given_up, of_another_shard, not_ours):
        file.touch()
    os.utime(given_up, (0, 0))
    with ShardWriter(tmp_path, NAME, "settings") as writer:
        writer.write(make_sample(1))
    assert not dead.exists() and not given_up.exists()
    assert alive.exists() and elsewhere.exists() and of_another_shard.exists() and not_ours.exists()
    shards.remove_leftovers(tmp_path)
    assert not of_another_shard.exists() and alive.exists() and elsewhere.exists() and not_ours.exists()


def test_contradicting_fields_are_refused(tmp_path: Path):
    good = make_sample(1)
    bad = Sample(**{**good.__dict__, "grid": (3, 3), "entropy": [1.0], "attention": good.attention.half()})
    with pytest.raises(ValueError, match=r"grid \(3, 3\) has 9 patches, states have 6; 1 entropies.*float16"):
        bad.check()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        (f"{NAME}.tar", cut, "it was cut or overwritten"),
        (f"{NAME}.tar", flip, "bytes changed after it was written"),
        (f"{NAME}.tar", Path.unlink, "train-00000.tar is missing"),
        (f"{NAME}.json", Path.unlink, "its sidecar train-00000.json is missing"),
        (f"{NAME}.json", cut, "its sidecar train-00000.json is unreadable"),
        (f"{NAME}.json", flip, "its sidecar train-00000.json (was changed|is unreadable)"),
    ],
)
def test_damage_is_found_and_the_message_names_shard_and_way_out(
    tmp_path: Path, file: str, damage: Callable[[Path], None], reason: str
):
    directory = write_shards(tmp_path / "shards")
    assert shards.damaged_shards(directory) == []
    damage(directory / file)
    with pytest.raises(DamagedShardError, match=rf"shard train-00000: .*{reason}.*only this shard is redone"):
        check_shard(directory, NAME)
    assert [problem.name for problem in shards.damaged_shards(directory)] == [NAME]
    assert shards.main(["verify", str(directory)]) == 1
    if damage is not flip or file.endswith("json"):
        with pytest.raises(DamagedShardError, match=NAME):
            ShardReader(directory, "train")


def test_a_shard_of_another_harvest_is_found(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    with ShardWriter(directory, NAME, "settings") as writer:
        writer.write(make_sample(99))
    assert "not the shard that index.json lists" in str(shards.damaged_shards(directory)[0])
    with pytest.raises(DamagedShardError, match="other settings"):
        check_shard(directory, NAME, settings_fingerprint="others")


def test_an_unfinished_harvest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UnfinishedHarvestError, match=r"index\.json is missing.*python -m data\.harvest"):
        ShardReader(tmp_path, "train")
    assert shards.main(["verify", str(tmp_path)]) == 2
    assert "no finished harvest" in capsys.readouterr().err


def test_another_format_version_is_refused(tmp_path: Path):
    directory = write_shards(tmp_path / "shards")
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps({**index, "format_version": 2}))
    with pytest.raises(DataError, match="format version 2, this release reads 1"):
        ShardReader(directory, "train")


def test_unknown_split(tmp_path: Path):
    with pytest.raises(ValueError, match="no split 'test': it has train"):
        ShardReader(write_shards(tmp_path / "shards"), "test")


def test_show_prints_a_summary_and_draws_maps_over_images(
    tmp_path: Path, coco: CocoImages, run_harvest: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
):
    run_harvest(tmp_path, coco)
    assert shards.main(["verify", str(tmp_path)]) == 0
    assert shards.main(["show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "train: 20 images, 40 maps" in shown and "states (16, 16) float16, grids 4 x 4" in shown
    assert (tmp_path / "contact-sheet.png").stat().st_size > 1000
    assert shards.main(["show", str(tmp_path), "--images", str(tmp_path / "nowhere")]) == 0
    assert "no contact sheet" in capsys.readouterr().out
