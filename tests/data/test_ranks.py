"""Several processes, one harvest: who makes what, who finishes it, and what readers see until then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import inspect
from data.errors import (
    HarvestMismatchError,
    RankError,
    TooManyBadImagesError,
    UnfinishedHarvestError,
)
from data.folder import HarvestSummary
from data.images import CocoImages
from data.plan import plan_shards
from data.ranks import Rank, rank_of_this_process
from data.shards import ShardReader
from tests.data import tiny
from tests.data.tiny import contents

Run = Callable[..., HarvestSummary]
PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("environment", "number", "size", "local"),
    [
        ({}, 0, 1, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, 3, 8, 1),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, 2, 4, 0),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "10", "SLURM_ARRAY_TASK_MIN": "0"}, 5, 10, None),
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
            | {"SLURM_ARRAY_TASK_STEP": "3"},
            2, 3, None,
        ),
        (
            {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"},
            9, 12, None,
        ),
    ],
)  # fmt: skip
def test_a_rank_is_read_from_its_launcher(environment: dict[str, str], number: int, size: int, local: int | None):
    rank = rank_of_this_process(environment)
    assert (rank.number, rank.size, rank.local) == (number, size, local)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is missing"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"rank 2 of 2 \(RANK, WORLD_SIZE\): ranks are 0 to 1"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, "SLURM_ARRAY_TASK_COUNT is missing"),
        # some tasks of an array resubmitted: 4,6,9 of what was 0-9
        (
            {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "4"},
            "rank 5 of 3",
        ),
    ],
)
def test_impossible_ranks_are_rejected(environment: dict[str, str], message: str):
    with pytest.raises(RankError, match=message):
        rank_of_this_process(environment)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_shares_are_disjoint_and_complete(size: int):
    items = list(range(27))
    shares = [Rank(number, size).share(items) for number in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert all(Rank(0, size).owner(item) == number for number, share in enumerate(shares) for item in share)


def test_each_rank_of_a_machine_takes_its_own_device():
    assert [Rank(r, 12, r % 4).device("auto", 4) for r in range(8)] == [f"cuda:{n}" for n in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert Rank(3, 4, 3).device("cuda", 1) == "cuda:0"  # the launcher shows each process its own
    assert Rank(3, 4, 3).device("auto", 0) == "auto" and Rank(3, 4, 3).device("cpu", 4) == "cpu"
    assert Rank(3, 4, 3).device("cuda:2", 4) == "cuda:2" and Rank().device("auto", 4) == "auto"


# ---- the harvest


@pytest.mark.parametrize("sizes", [(2,), (3,), (9,), (2, 3)])
def test_ranks_fill_one_folder(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, sizes: tuple[int, ...], capsys: pytest.CaptureFixture[str]
):
    run_harvest(tmp_path / "alone", coco)
    target = tmp_path / "shared"
    if len(sizes) == 2:  # one of two ranks, then three others: what is there is kept
        assert run_harvest(target, coco, rank=Rank(1, 2)).shards == 3
    last = sizes[-1]
    for number in range(last):
        result = run_harvest(target, coco, rank=Rank(number, last))
        assert result.shards == len(range(number, 7, last))
        done = number >= min(last, 7) - 1
        assert result.finished == done == (target / "index.json").exists()
        out = " ".join(capsys.readouterr().out.split())
        if done:
            assert f"rank {number} of {last} is done, and all 7 shards are there" in out
        else:
            assert f"rank {number} of {last} is done. {len(result.missing)} of 7 shards are missing" in out
            with pytest.raises(UnfinishedHarvestError, match=result.missing[0]):
                ShardReader(target, "train")
    assert contents(target) == contents(tmp_path / "alone")
    before = {file.name: file.stat().st_mtime_ns for file in target.glob("*.tar")}
    assert run_harvest(target, coco).shards_reused == 7
    assert {file.name: file.stat().st_mtime_ns for file in target.glob("*.tar")} == before


def test_a_rank_names_the_missing_shards_and_their_ranks(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, capsys: Any
):
    run_harvest(tmp_path, coco, rank=Rank(1, 3, variables="RANK, WORLD_SIZE"))
    out = " ".join(capsys.readouterr().out.split())
    missing = "train-00000, train-00002, train-00003, validation-00001, test-00000"
    assert f"5 of 7 shards are missing: {missing} (of ranks 0, 2)" in out


def test_a_damaged_shard_of_another_rank_is_no_longer_counted(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    for number in range(2):
        run_harvest(tmp_path, coco, rank=Rank(number, 2))
    intact = contents(tmp_path)
    content = bytearray(intact["train-00001.tar"])
    content[700] ^= 1
    (tmp_path / "train-00001.tar").write_bytes(content)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_harvest(tmp_path, coco, rank=Rank(1, 2), capture=interrupted)
    assert run_harvest(tmp_path, coco, rank=Rank(0, 2)).missing == ["train-00001"]
    assert run_harvest(tmp_path, coco, rank=Rank(1, 2)).finished
    assert contents(tmp_path) == intact


def test_ranks_share_the_limit_of_bad_images(tmp_path: Path, run_harvest: Run):
    images = tiny.write_coco(tmp_path / "coco", 40)
    plans = plan_shards(images.ids, tiny.SETTINGS)
    bad = [plans[0].image_ids[0], plans[1].image_ids[0]]
    intact = {image_id: images.path(image_id).read_bytes() for image_id in bad}
    for image_id in bad:
        tiny.truncate_image(images, image_id)
    target = tmp_path / "shards"
    run_harvest(target, images, rank=Rank(0, 2))
    with pytest.raises(TooManyBadImagesError, match="2 images cannot be used, at most 1"):
        run_harvest(target, images, rank=Rank(1, 2))
    for image_id, content in intact.items():
        images.path(image_id).write_bytes(content)
    assert run_harvest(target, images, rank=Rank(1, 2)).finished  # its own shard is redone, and one bad is allowed
    assert run_harvest(target, images).skipped == 1


def test_ranks_of_other_settings_are_rejected(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    run_harvest(tmp_path, coco, rank=Rank(0, 2))
    with pytest.raises(HarvestMismatchError, match=r"seed: 0 -> 1"):
        run_harvest(tmp_path, coco, rank=Rank(1, 2), seed=1)
    with pytest.raises(ValueError, match="overwrite=True with several ranks"):
        run_harvest(tmp_path, coco, rank=Rank(1, 2), seed=1, overwrite=True)


# ---- real processes


def command(tmp_path: Path) -> list[str]:
    for part in tiny.build_llava():  # not the shared one: saving changes a model's config
        part.save_pretrained(tmp_path / "tiny-llava")
    return [
        f"runs_dir={tmp_path / 'runs'}",
        f"model.hub_id={tmp_path / 'tiny-llava'}",
        "model.device=cpu",
        "model.scr.edit_layers=[0,1]",
        "model.scr.attention_layers=[1,2]",
        "data.world.train=150",
        "data.world.val=2",
        "evaluation.images=2",
        "harvest.samples=12",
        "harvest.validation=3",
        "harvest.test=3",
        "harvest.shard_size=2",
    ]


@pytest.mark.slow
def test_torchrun_and_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Two processes of torchrun render one world and harvest it; then ranks of other counts, as Slurm starts them."""
    from pipeline.commands import harvest as main

    arguments = command(tmp_path)
    plain = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    plain["OMP_NUM_THREADS"] = "1"  # as in this process: the order of sums is in the bytes
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "data.harvest", *arguments],
        cwd=PROJECT, env=plain, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("rendering 152 scenes") == 1 and run.stdout.count("reusing the finished world") == 1
    assert "all 10 shards are there: the harvest is finished" in run.stdout
    (target,) = (tmp_path / "runs" / "harvest").iterdir()
    together = contents(target)
    assert len(json.loads(together["manifest.json"])["splits"]["train"]) == 12
    assert inspect.main(["verify", str(target)]) == 0

    for name in [*target.glob("train-0000[135].*"), target / "index.json"]:
        name.unlink()
    for number in (2, 0, 1):  # three tasks of a Slurm array, in any order
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert ("unfinished" in out) == (number != 1)
    assert contents(target) == together
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name)
    (target / "train-00004.tar").unlink()
    assert main(arguments) == 0
    assert "(16 reused, 0 skipped)" in capsys.readouterr().out
    assert contents(target) == together
    monkeypatch.setenv("RANK", "0")
    assert main(arguments) == 1
    assert "WORLD_SIZE is missing" in capsys.readouterr().err
