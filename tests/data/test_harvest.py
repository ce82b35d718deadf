from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import shards
from data.errors import HarvestMismatchError
from data.folder import HarvestSummary
from data.images import CocoImages
from scr_runtime import SCRConfig
from tests.data import tiny
from tests.data.tiny import contents

Run = Callable[..., HarvestSummary]


def test_a_second_harvest_is_byte_identical(tmp_path: Path, coco: CocoImages, run_harvest: Run, undisturbed: Path):
    run_harvest(tmp_path / "again", coco)
    assert contents(tmp_path / "again") == contents(undisturbed)


def test_a_finished_harvest_is_reused_and_says_so(
    coco: CocoImages, run_harvest: Run, undisturbed: Path, capsys: pytest.CaptureFixture[str]
):
    def never(*_: Any) -> Any:
        raise AssertionError("nothing is left to run")

    before = contents(undisturbed)
    summary = run_harvest(undisturbed, coco, capture=never, batch_size=7)
    assert (summary.reused, summary.shards_reused, summary.shards) == (30, 7, 7)
    assert "reusing the finished harvest" in capsys.readouterr().out
    assert contents(undisturbed) == before


@pytest.mark.parametrize("damage", ["tar missing", "sidecar missing", "cut", "flipped", "index missing"])
def test_only_damaged_shards_are_redone(coco: CocoImages, run_harvest: Run, undisturbed: Path, damage: str):
    before = contents(undisturbed)
    shard = undisturbed / "train-00002.tar"
    if damage == "cut":
        shard.write_bytes(before[shard.name][:2000])
    elif damage == "flipped":
        shard.write_bytes(before[shard.name][:-1500] + b"\xff" + before[shard.name][-1499:])
    else:
        {"tar": shard, "sidecar": shard.with_suffix(".json"), "index": undisturbed / "index.json"}[
            damage.split()[0]
        ].unlink()
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return tiny.fake_capture(*arguments)

    summary = run_harvest(undisturbed, coco, capture=counted)
    assert summary.shards_reused == (7 if damage == "index missing" else 6)
    assert calls == (0 if damage == "index missing" else 3)  # 5 images x 2 prompts in batches of 4
    assert contents(undisturbed) == before


def test_an_interrupted_harvest_is_finished_by_the_next_run(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, undisturbed: Path, capsys: pytest.CaptureFixture[str]
):
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return tiny.fake_capture(*arguments)

    target = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        run_harvest(target, coco, capture=interrupted)
    assert sorted(file.name for file in target.iterdir()) == [
        "harvest.json", "train-00000.json", "train-00000.tar", "train-00001.json", "train-00001.tar",
    ]  # fmt: skip
    assert run_harvest(target, coco).shards_reused == 2
    assert "reusing 2 of 7 shards" in capsys.readouterr().out
    assert contents(target) == contents(undisturbed)


_VICTIM = """
import sys, time
import torch
from pathlib import Path
from data.harvest import harvest
from data.harvester import prepare
from tests.data import tiny

def slow(*arguments):
    time.sleep(0.05)
    return tiny.fake_capture(*arguments)

torch.set_num_threads(1)
model, processor = tiny.build_llava()
job, harvester = prepare(
    Path(sys.argv[2]), model=model, processor=processor, scr=tiny.CONFIG,
    images=tiny.open_coco(Path(sys.argv[1])), settings=tiny.SETTINGS, capture=slow,
)
harvest(job, harvester)
"""


def test_a_killed_harvest_loses_nothing(tmp_path: Path, coco: CocoImages, run_harvest: Run, undisturbed: Path):
    target = tmp_path / "killed"
    project = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", _VICTIM, str(coco.images_dir.parent), str(target)],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        # kill it in the middle of the third shard
        while not list(target.glob("train-00002.tar.tmp.*")):
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (target / "index.json").exists()
    assert list(target.glob("*.tmp.*"))
    summary = run_harvest(target, coco)
    assert summary.shards_reused == 2 and summary.images == 30
    assert contents(target) == contents(undisturbed)


def test_other_settings_are_rejected_with_their_difference(coco: CocoImages, run_harvest: Run, undisturbed: Path):
    before = contents(undisturbed)
    with pytest.raises(HarvestMismatchError) as caught:
        run_harvest(undisturbed, coco, states_dtype="bfloat16", samples=10, validation=5)
    assert caught.value.difference == {
        "states_dtype": ("float16", "bfloat16"),
        "splits.train": (20, 10),
        "splits.validation": (6, 5),
    }
    assert "splits.train: 20 -> 10" in str(caught.value)
    assert contents(undisturbed) == before


def test_what_plays_no_part_in_the_harvest_may_change(coco: CocoImages, run_harvest: Run, undisturbed: Path):
    edit_changed = SCRConfig(num_sources=4, strength=1.2, edit_layers=(0, 3), attention_layers=(1, 2))
    assert run_harvest(undisturbed, coco, scr=edit_changed, batch_size=32).reused == 30


def test_overwrite_harvests_again(tmp_path: Path, coco: CocoImages, run_harvest: Run, undisturbed: Path):
    (undisturbed / "notes.txt").write_text("not ours")
    summary = run_harvest(undisturbed, coco, seed=1, shard_size=20, overwrite=True)
    assert summary.reused == 0
    run_harvest(tmp_path / "fresh", coco, seed=1, shard_size=20)
    assert contents(undisturbed) == {**contents(tmp_path / "fresh"), "notes.txt": b"not ours"}


def test_a_disk_that_fills_up_costs_the_running_shard_only(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    written = 0
    plain_write = shards._HashingStream.write

    def write(stream: Any, content: bytes) -> int:
        nonlocal written
        written += len(content)
        if written > 60_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain_write(stream, content)

    with monkeypatch.context() as patch:
        patch.setattr(shards._HashingStream, "write", write)
        with pytest.raises(OSError, match="No space left on device"):
            run_harvest(tmp_path / "full", coco)
    left = contents(tmp_path / "full")
    assert "train-00000.json" in left and not [name for name in left if ".tmp." in name]
    assert run_harvest(tmp_path / "full", coco).shards_reused == sum(name.endswith(".tar") for name in left)
    assert contents(tmp_path / "full") == contents(undisturbed)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from pipeline.commands import harvest as main

    images = tiny.write_coco(tmp_path / "coco", 12)
    for part in tiny.build_llava():  # not the shared one: saving changes a model's config
        part.save_pretrained(tmp_path / "tiny-llava")
    arguments = [
        f"runs_dir={tmp_path / 'runs'}",
        f"model.hub_id={tmp_path / 'tiny-llava'}",
        "model.device=cpu",
        "model.scr.edit_layers=[0,1]",
        "model.scr.attention_layers=[1,2]",
        "data=coco2014",
        f"data.root={tmp_path / 'coco'}",
        f"data.train_images={images.images_dir.name}",
        f"data.train_annotations={images.annotations_file.name}",
        "harvest.tuning=1",
        "harvest.samples=4",
        "harvest.validation=2",
        "harvest.test=2",
    ]
    assert main(arguments) == 0
    assert "16 maps of 8 images (0 reused, 0 skipped)" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "(8 reused, 0 skipped)" in capsys.readouterr().out
    (harvested,) = (tmp_path / "runs" / "harvest").iterdir()
    before = contents(harvested)
    assert main([*arguments, "harvest.prompts_per_image=1"]) == 0  # a folder beside it
    assert len(list((tmp_path / "runs" / "harvest").iterdir())) == 2
    assert main([*arguments, "harvest.prompts_per_image=1", f"harvest.name={harvested.name}"]) == 1
    message = capsys.readouterr().err
    assert "prompts_per_image: 2 -> 1" in message
    assert "overwrite=true" in message and "harvest.name=" in message
    assert contents(harvested) == before
    assert main([*arguments[:-3], "harvest.samples=9", *arguments[-2:]]) == 1
    assert "14 images are asked for" in capsys.readouterr().err
