from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.errors import (
    DiskTooSmallError,
    HarvestMismatchError,
    NotEnoughImagesError,
    StatesOverflowError,
    TooManyBadImagesError,
)
from data.harvest import _prefetch, harvest, main, plan_shards
from data.images import CocoImages
from data.shards import ShardReader, damaged_shards
from data.vlm import chat_inputs
from scr_runtime import SCRConfig, capture
from tests.data import tiny

Run = Callable[..., dict[str, Any]]
SPLITS = {"train": 20, "validation": 6, "test": 4}


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def image_ids(directory: Path) -> list[int]:
    return [int(key) for split in SPLITS for key in ShardReader(directory, split).keys]


@pytest.fixture
def undisturbed(tmp_path: Path, coco: CocoImages, run_harvest: Run) -> Path:
    run_harvest(tmp_path / "undisturbed", coco)
    return tmp_path / "undisturbed"


def test_plan_deals_every_image_once(coco: CocoImages):
    plans = plan_shards(coco.ids, SPLITS, shard_size=5, seed=0)
    assert [plan.name for plan in plans] == [
        *(f"train-{n:05d}" for n in range(4)), "validation-00000", "validation-00001", "test-00000",
    ]  # fmt: skip
    dealt = [i for plan in plans for i in (*plan.image_ids, *plan.reserve)]
    assert sorted(dealt) == list(coco.ids)
    assert [len(plan.image_ids) for plan in plans] == [5, 5, 5, 5, 5, 1, 4]


def test_a_harvest_holds_what_was_asked(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    summary = run_harvest(tmp_path, coco)
    assert (summary["images"], summary["samples"], summary["reused"], summary["skipped"]) == (30, 60, 0, 0)
    assert summary["tokens"] == 30 * tiny.TOKENS
    assert summary["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("*.tar"))
    assert [len(ShardReader(tmp_path, split)) for split in SPLITS] == [20, 6, 4]
    assert len(set(image_ids(tmp_path))) == 30
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["fingerprint"] == summary["fingerprint"]
    assert index["settings"]["model"]["image_processor"].startswith("CLIPImageProcessor")
    assert {"torch", "transformers"} <= index["provenance"]["libraries"].keys()
    assert damaged_shards(tmp_path) == []


def test_real_captures_of_a_real_llava(tmp_path: Path, coco: CocoImages, llava: tuple[Any, Any], run_harvest: Run):
    model, processor = llava
    run_harvest(tmp_path, coco, capture=capture, states_dtype="float32", batch_size=3)
    reader = ShardReader(tmp_path, "test")
    for sample in reader:
        assert sample.grid == tiny.GRID and sample.states.shape == (tiny.TOKENS, tiny.WIDTH)
        assert 0 < sample.entropy[0] <= torch.log(torch.tensor(tiny.TOKENS)).item() + 1e-5
    # one image on its own gives what it gave inside its batch
    sample = reader[2]
    picture = coco.open(sample.image_id)
    alone = capture(model, tiny.CONFIG, chat_inputs(processor, [picture], [sample.prompts[1]["text"]]))[0]
    torch.testing.assert_close(sample.states, alone.states, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sample.attention[1], alone.attention, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(sample.question[1], alone.question, atol=1e-5, rtol=1e-4)


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
    assert (summary["reused"], summary["shards_reused"], summary["shards"]) == (30, 7, 7)
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
    assert summary["shards_reused"] == (7 if damage == "index missing" else 6)
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
    assert run_harvest(target, coco)["shards_reused"] == 2
    assert "reusing 2 of 7 shards" in capsys.readouterr().out
    assert contents(target) == contents(undisturbed)


_VICTIM = """
import sys, time
import torch
from pathlib import Path
from data.harvest import harvest
from tests.data import tiny

def slow(*arguments):
    time.sleep(0.05)
    return tiny.fake_capture(*arguments)

torch.set_num_threads(1)
model, processor = tiny.build_llava()
harvest(
    Path(sys.argv[2]), model=model, processor=processor, config=tiny.CONFIG,
    images=tiny.open_coco(Path(sys.argv[1])), splits={"train": 20, "validation": 6, "test": 4},
    shard_size=5, batch_size=4, capture=slow,
)
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
    assert summary["shards_reused"] == 2 and summary["images"] == 30
    assert contents(target) == contents(undisturbed)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    """20 images of five sizes, from 4 to 120 tokens of a tiny Qwen2-VL."""
    root = tmp_path_factory.mktemp("sizes")
    images = tiny.write_coco(root / "coco", 20)
    for number, image_id in enumerate(images.ids):
        size = [(32, 32), (80, 96), (16, 16), (64, 24), (24, 88)][number % 5]
        images.open(image_id).resize(size).save(images.path(image_id))
    return images


def test_batches_are_bounded_in_tokens_and_change_nothing_else(tmp_path: Path, sizes: CocoImages):
    """A real Qwen2-VL: grids follow the size of the image."""
    model, processor = tiny.build_qwen()
    batches: list[tuple[int, int, int]] = []  # rows, columns, images

    def spied(model: Any, config: SCRConfig, inputs: Any, rows_per_image: int) -> Any:
        batches.append((*inputs["input_ids"].shape, len(inputs["image_grid_thw"]) // 2))
        return capture(model, config, inputs, rows_per_image)

    def run(name: str, **settings: Any) -> list[Any]:
        batches.clear()
        harvest(
            tmp_path / name, model=model, processor=processor, config=tiny.CONFIG, images=sizes, splits={"train": 20},
            shard_size=20, states_dtype="float32", capture=spied, **settings,
        )  # fmt: skip
        return list(ShardReader(tmp_path / name, "train"))

    one_by_one = run("one", batch_size=2)
    assert len(batches) == 20 and len({sample.grid for sample in one_by_one}) == 5
    lengths = [columns for _, columns, _ in batches]  # of each image's longer prompt, in the order of the plan
    limit = 2 * 2 * sorted(set(lengths))[-2] + 1  # two of the largest do not fit together, and neither three others
    together = run("tokens", batch_tokens=limit)
    assert all(rows * columns <= limit or images == 1 for rows, columns, images in batches)
    assert sum(images for *_, images in batches) == 20 and 5 < len(batches) < 20
    start = 0
    for images in [images for *_, images in batches][:-1]:  # none of them could have taken one image more
        assert 2 * (images + 1) * max(lengths[start : start + images + 1]) > limit
        start += images
    for one, other in zip(one_by_one, together, strict=True):
        assert (one.image_id, one.grid, one.prompts) == (other.image_id, other.grid, other.prompts)
        torch.testing.assert_close(one.states, other.states, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.attention, other.attention, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(one.question, other.question, atol=1e-5, rtol=1e-4)
    run("alone", batch_tokens=1)
    assert [images for *_, images in batches] == [1] * 20
    assert json.loads((tmp_path / "alone" / "index.json").read_text())["provenance"]["batch_tokens"] == 1


def test_states_of_another_block_are_another_harvest(tmp_path: Path, coco: CocoImages, llava: tuple[Any, Any]):
    model, processor = llava
    later = SCRConfig(num_sources=2, edit_layers=(1, 1), attention_layers=(2, 2), state_layer=1)
    first = SCRConfig(num_sources=2, edit_layers=(0, 1), attention_layers=(2, 2))
    run = {"model": model, "processor": processor, "images": coco, "splits": {"train": 4}, "states_dtype": "float32"}
    for folder, config in (("block0", first), ("block1", later)):
        harvest(tmp_path / folder, config=config, **run)
        index = json.loads((tmp_path / folder / "index.json").read_text())
        assert index["settings"].get("state_layer", 0) == config.state_layer
        assert index["provenance"]["scr"]["state_layer"] == config.state_layer
        sample = ShardReader(tmp_path / folder, "train")[0]
        inputs = chat_inputs(processor, [coco.open(sample.image_id)], [sample.prompts[0]["text"]])
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[config.state_layer + 1][0]
        expected = hidden[inputs["input_ids"][0] == model.config.image_token_id]
        torch.testing.assert_close(sample.states, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(HarvestMismatchError, match="state_layer: 0 -> 1"):
        harvest(tmp_path / "block0", config=later, **run)
    with pytest.raises(HarvestMismatchError, match="state_layer: 1 -> 0"):
        harvest(tmp_path / "block1", config=first, **run)


def test_other_settings_are_refused_with_their_difference(coco: CocoImages, run_harvest: Run, undisturbed: Path):
    before = contents(undisturbed)
    with pytest.raises(HarvestMismatchError) as caught:
        run_harvest(undisturbed, coco, states_dtype="bfloat16", splits={"train": 10, "test": 4})
    assert caught.value.difference == {
        "states_dtype": ("float16", "bfloat16"),
        "splits.train": (20, 10),
        "splits.validation": (6, None),
    }
    assert "splits.train: 20 -> 10" in str(caught.value)
    assert contents(undisturbed) == before


def test_what_plays_no_part_in_the_harvest_may_change(coco: CocoImages, undisturbed: Path, llava: tuple[Any, Any]):
    edit_changed = SCRConfig(num_sources=4, strength=1.2, edit_layers=(0, 3), attention_layers=(1, 2))
    model, processor = llava
    summary = harvest(
        undisturbed,
        model=model,
        processor=processor,
        config=edit_changed,
        images=coco,
        splits=SPLITS,
        shard_size=5,
    )
    assert summary["reused"] == 30


def test_overwrite_harvests_again(tmp_path: Path, coco: CocoImages, run_harvest: Run, undisturbed: Path):
    (undisturbed / "notes.txt").write_text("not ours")
    summary = run_harvest(undisturbed, coco, seed=1, shard_size=20, overwrite=True)
    assert summary["reused"] == 0
    run_harvest(tmp_path / "fresh", coco, seed=1, shard_size=20)
    assert contents(undisturbed) == {**contents(tmp_path / "fresh"), "notes.txt": b"not ours"}


def test_more_samples_than_images(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    with pytest.raises(NotEnoughImagesError, match=r"41 images.*only 40.*harvest\.samples"):
        run_harvest(tmp_path / "none", coco, splits={"train": 41})
    assert not (tmp_path / "none").exists()


def planned(images: CocoImages) -> list[int]:
    return [image_id for plan in plan_shards(images.ids, SPLITS, 5, 0) for image_id in plan.image_ids]


def test_a_truncated_image_is_skipped_counted_and_replaced(tmp_path: Path, run_harvest: Run, undisturbed: Path):
    images = tiny.write_coco(tmp_path / "coco", 40)
    bad = planned(images)[7]
    tiny.truncate_image(images, bad)
    summary = run_harvest(tmp_path / "shards", images)
    assert (summary["images"], summary["skipped"]) == (30, 1)
    plan = plan_shards(images.ids, SPLITS, 5, 0)[1]
    ids = image_ids(tmp_path / "shards")
    assert bad not in ids and plan.reserve[0] in ids and len(set(ids)) == 30
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert [(entry["image_id"], entry["file"], entry["shard"]) for entry in index["skipped"]] == [
        (bad, f"{bad:06d}.png", "train-00001")
    ]
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert manifest["skipped"] == index["skipped"]
    assert [image_id for split in SPLITS for image_id in manifest["splits"][split]] == ids
    found = contents(tmp_path / "shards")
    changed = {name for name, content in contents(undisturbed).items() if found[name] != content}
    assert changed == {"train-00001.tar", "train-00001.json", "index.json", "manifest.json"}
    assert run_harvest(tmp_path / "shards", images)["skipped"] == 1


def test_too_many_bad_images_stop_the_harvest_with_the_list_until_they_are_mended(
    tmp_path: Path, run_harvest: Run, undisturbed: Path
):
    images = tiny.write_coco(tmp_path / "coco", 40)
    bad = [planned(images)[2], planned(images)[13]]
    intact = {image_id: images.path(image_id).read_bytes() for image_id in bad}
    for image_id in bad:
        tiny.truncate_image(images, image_id)
    for _ in range(2):
        with pytest.raises(TooManyBadImagesError, match=r"2 images cannot be decoded, at most 1") as caught:
            run_harvest(tmp_path / "shards", images)
        assert all(f"{image_id:06d}.png" in str(caught.value) for image_id in bad)
    for image_id, content in intact.items():
        images.path(image_id).write_bytes(content)
    assert run_harvest(tmp_path / "shards", images)["shards_reused"] == 1
    expected, found = contents(undisturbed), contents(tmp_path / "shards")
    del expected["index.json"], found["index.json"]  # it tells the folder of the images
    assert found == expected


def test_without_a_reserve_the_shard_is_short(tmp_path: Path, run_harvest: Run):
    images = tiny.write_coco(tmp_path / "coco", 30)
    tiny.truncate_image(images, planned(images)[0])
    summary = run_harvest(tmp_path / "shards", images)
    assert (summary["images"], summary["skipped"]) == (29, 1)


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path,
    coco: CocoImages,
    run_harvest: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DiskTooSmallError, match=r"needs 0\.\d MB.*harvest\.samples"):
        run_harvest(tmp_path, coco)
    assert "30 images x 2 prompts, 16 visual tokens each (480 in all)" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tar*"))


def test_a_disk_that_fills_up_costs_the_running_shard_only(
    tmp_path: Path, coco: CocoImages, run_harvest: Run, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    from data import shards

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
    assert run_harvest(tmp_path / "full", coco)["shards_reused"] == sum(name.endswith(".tar") for name in left)
    assert contents(tmp_path / "full") == contents(undisturbed)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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
    assert main([*arguments, "harvest.prompts_per_image=1"]) == 1
    assert "prompts_per_image: 2 -> 1" in capsys.readouterr().err
    assert main([*arguments[:-3], "harvest.samples=9", *arguments[-2:]]) == 1
    assert "14 images are asked for" in capsys.readouterr().err


def test_the_disk_estimate_is_an_upper_bound_but_not_a_wild_one(coco: CocoImages, undisturbed: Path):
    from data.shards import sample_bytes

    written = sum(file.stat().st_size for file in undisturbed.iterdir())
    estimate = 30 * sample_bytes(tiny.TOKENS, tiny.WIDTH, 2, torch.float16)
    assert written < 2 * estimate  # tiny samples: tar's own blocks of 10 KB weigh


def test_states_beyond_float16_are_refused_not_stored_as_inf(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    def large(*arguments: Any) -> Any:
        captures = tiny.fake_capture(*arguments)
        for one in captures:
            one.states = one.states + 1e5
        return captures

    with pytest.raises(StatesOverflowError, match=r"not finite as float16\. Use harvest\.states_dtype=bfloat16"):
        run_harvest(tmp_path / "half", coco, capture=large)
    run_harvest(tmp_path / "wide", coco, capture=large, states_dtype="bfloat16")


def test_int8_states_are_the_float_ones_rounded(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    wide = run_harvest(tmp_path / "wide", coco, states_dtype="float32")
    small = run_harvest(tmp_path / "small", coco, states_dtype="int8")
    assert small["images"] == wide["images"]
    pairs = zip(ShardReader(tmp_path / "wide", "test"), ShardReader(tmp_path / "small", "test"), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(other.states, one.states, atol=float(one.states.abs().max()) / 250, rtol=0)
        assert torch.equal(one.question, other.question) and torch.equal(one.attention, other.attention)

    def broken(*arguments: Any) -> Any:
        captures = tiny.fake_capture(*arguments)
        captures[0].states = captures[0].states.fill_(float("nan"))
        return captures

    with pytest.raises(StatesOverflowError, match="not finite as int8"):
        run_harvest(tmp_path / "broken", coco, states_dtype="int8", capture=broken)


def test_each_image_is_decoded_and_preprocessed_once(
    tmp_path: Path, coco: CocoImages, llava: tuple[Any, Any], run_harvest: Run, monkeypatch: pytest.MonkeyPatch
):
    decoded: list[int] = []
    processed: list[int] = []
    plain_open, processor = CocoImages.open, type(llava[1].image_processor)
    plain_process = processor.__call__

    def open_(images: CocoImages, image_id: int) -> Any:
        decoded.append(image_id)
        return plain_open(images, image_id)

    def process(self: Any, images: Any, *arguments: Any, **settings: Any) -> Any:
        processed.append(len(images))
        return plain_process(self, images, *arguments, **settings)

    run_harvest(tmp_path / "once", coco, capture=capture, prompts_per_image=3, batch_size=7)
    monkeypatch.setattr(CocoImages, "open", open_)
    monkeypatch.setattr(processor, "__call__", process)
    run_harvest(tmp_path / "again", coco, capture=capture, prompts_per_image=3, batch_size=7)
    assert contents(tmp_path / "again") == contents(tmp_path / "once")
    assert len(decoded) == 31 and sum(processed) == 31  # 30, and one to tell how many tokens an image has
    assert max(processed) == 2  # 7 prompts are two images of three


def test_one_image_of_many_prompts_may_exceed_the_batch(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    summary = run_harvest(tmp_path / "a", coco, prompts_per_image=9, batch_size=4)
    assert summary["samples"] == 30 * 9
    run_harvest(tmp_path / "b", coco, prompts_per_image=9, batch_size=100)
    assert contents(tmp_path / "a")["train-00000.tar"] == contents(tmp_path / "b")["train-00000.tar"]


def test_images_for_tuning_are_listed_and_in_no_shard(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    run_harvest(tmp_path, coco, tuning=7)
    index = json.loads((tmp_path / "index.json").read_text())
    tuning = index["set_aside"]["tuning"]
    plans = plan_shards(coco.ids, SPLITS, 5, 0, 7)
    dealt = [i for plan in plans for i in (*plan.image_ids, *plan.reserve)]
    assert len(tuning) == 7 and sorted([*dealt, *tuning]) == list(coco.ids)
    assert index["settings"]["tuning"] == 7
    assert [plan.image_ids for plan in plans] == [p.image_ids for p in plan_shards(coco.ids, SPLITS, 5, 0)]
    with pytest.raises(NotEnoughImagesError, match=r"4 test \+ 11 tuning.*harvest\.tuning"):
        run_harvest(tmp_path / "b", coco, tuning=11)


def test_captures_that_do_not_match_the_rows_are_refused(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    with pytest.raises(RuntimeError, match="4 rows gave captures of rows"):
        run_harvest(tmp_path, coco, capture=lambda *arguments: tiny.fake_capture(*arguments)[1:])


@pytest.mark.parametrize(
    ("mode", "size"), [("L", (1, 300)), ("CMYK", (64, 48)), ("RGB", (8, 8)), ("RGB", (4000, 3000))]
)
def test_odd_images_are_harvested(tmp_path: Path, run_harvest: Run, mode: str, size: tuple[int, int]):
    images = tiny.write_coco(tmp_path / "coco", 40)
    Image.new("RGB", size, "red").convert(mode).save(images.path(planned(images)[0]), format="JPEG")
    assert run_harvest(tmp_path / "shards", images)["skipped"] == 0


def test_prefetch_keeps_the_order_raises_and_ends_its_thread():
    closed = []

    def numbers() -> Iterator[int]:
        try:
            yield from range(100)
            raise ZeroDivisionError
        finally:
            closed.append(True)

    drawn = []
    with pytest.raises(ZeroDivisionError):
        for number in _prefetch(numbers(), 2):
            drawn.append(number)
    assert drawn == list(range(100)) and closed == [True]
    stream = _prefetch(numbers(), 2)
    assert next(stream) == 0
    stream.close()
    assert closed == [True] or len(closed) == 2
