from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from data.chat import chat_inputs
from data.errors import HarvestMismatchError, SettingsError, StatesOverflowError, TooManyBadImagesError
from data.folder import HarvestSummary
from data.harvest import harvest
from data.harvester import prepare, visual_tokens
from data.images import CocoImages
from data.index import SPLITS, damaged_shards
from data.pictures import PictureGrids
from data.plan import plan_shards
from data.prefetch import prefetch
from data.sample import sample_bytes
from data.shards import ShardReader
from scr_runtime import Capture, SCRConfig, capture
from tests.data import tiny
from tests.data.tiny import contents

Run = Callable[..., HarvestSummary]


def image_ids(directory: Path) -> list[int]:
    return [int(key) for split in SPLITS for key in ShardReader(directory, split).keys]


def planned(images: CocoImages) -> list[int]:
    return [image_id for plan in plan_shards(images.ids, tiny.SETTINGS) for image_id in plan.image_ids]


def test_a_harvest_holds_what_was_asked(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    summary = run_harvest(tmp_path, coco)
    assert (summary.images, summary.samples, summary.reused, summary.skipped) == (30, 60, 0, 0)
    assert summary.tokens == 30 * tiny.TOKENS
    assert summary.bytes == sum(file.stat().st_size for file in tmp_path.glob("*.tar"))
    assert [len(ShardReader(tmp_path, split)) for split in SPLITS] == [20, 6, 4]
    assert len(set(image_ids(tmp_path))) == 30
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["fingerprint"] == summary.fingerprint
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


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    """22 images of five sizes, from 9 to 120 tokens of a tiny Qwen2-VL."""
    root = tmp_path_factory.mktemp("sizes")
    images = tiny.write_coco(root / "coco", 22)
    for number, image_id in enumerate(images.ids):
        size = [(32, 32), (80, 96), (24, 24), (64, 24), (24, 88)][number % 5]
        images.open(image_id).resize(size).save(images.path(image_id))
    return images


def test_batches_are_bounded_in_tokens_and_change_nothing_else(tmp_path: Path, sizes: CocoImages):
    """A real Qwen2-VL: grids follow the size of the image."""
    model, processor = tiny.build_qwen()
    batches: list[tuple[int, int, int]] = []  # rows, columns, images

    def spied(model: Any, config: SCRConfig, inputs: Any, rows_per_image: int) -> Any:
        batches.append((*inputs["input_ids"].shape, len(inputs["image_grid_thw"])))
        return capture(model, config, inputs, rows_per_image)

    def run(name: str, **settings: Any) -> list[Any]:
        batches.clear()
        run_harvest_of(tmp_path / name, **settings)
        del batches[-2:]  # of the other splits
        return list(ShardReader(tmp_path / name, "train"))

    def run_harvest_of(directory: Path, **settings: Any) -> None:
        job, harvester = prepare(
            directory, model=model, processor=processor, scr=tiny.CONFIG, images=sizes, capture=spied,
            settings=tiny.changed(samples=20, validation=1, test=1, shard_size=20, states_dtype="float32", **settings),
        )  # fmt: skip
        harvest(job, harvester)

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


def test_states_of_another_block_are_another_harvest(
    tmp_path: Path, coco: CocoImages, llava: tuple[Any, Any], run_harvest: Run
):
    model, processor = llava
    later = SCRConfig(num_sources=2, edit_layers=(1, 1), attention_layers=(2, 2), state_layer=1)
    first = SCRConfig(num_sources=2, edit_layers=(0, 1), attention_layers=(2, 2))

    def run(folder: str, scr: SCRConfig) -> None:
        run_harvest(tmp_path / folder, coco, scr=scr, capture=capture, samples=4, states_dtype="float32")

    for folder, config in (("block0", first), ("block1", later)):
        run(folder, config)
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
        run("block0", later)
    with pytest.raises(HarvestMismatchError, match="state_layer: 1 -> 0"):
        run("block1", first)


def test_a_truncated_image_is_skipped_counted_and_replaced(tmp_path: Path, run_harvest: Run, undisturbed: Path):
    images = tiny.write_coco(tmp_path / "coco", 40)
    bad = planned(images)[7]
    tiny.truncate_image(images, bad)
    summary = run_harvest(tmp_path / "shards", images)
    assert (summary.images, summary.skipped) == (30, 1)
    plan = plan_shards(images.ids, tiny.SETTINGS)[1]
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
    assert run_harvest(tmp_path / "shards", images).skipped == 1


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"batch_tokens": 300}])
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((16, 40), "a grid of 5 x 2 patches has none off its border: 16 x 40 pixels are too small or narrow"),
        ((1, 300), "its processor rejects 1 x 300 pixels: "),
    ],
)
def test_a_picture_without_inner_patches_is_skipped_listed_and_replaced(
    tmp_path: Path, size: tuple[int, int], reason: str, settings: dict[str, Any]
):
    images = tiny.write_coco(tmp_path / "coco", 40)
    plans = plan_shards(images.ids, tiny.SETTINGS)
    bad = plans[1].image_ids[2]
    Image.new("RGB", size).save(images.path(bad))
    model, processor = tiny.build_qwen()
    job, harvester = prepare(
        tmp_path / "shards", model=model, processor=processor, scr=tiny.CONFIG, images=images,
        settings=tiny.changed(**settings),
    )  # fmt: skip
    summary = harvest(job, harvester)
    assert (summary.images, summary.skipped) == (30, 1)
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert [(entry["image_id"], entry["shard"]) for entry in index["skipped"]] == [(bad, "train-00001")]
    assert index["skipped"][0]["reason"].startswith(reason)
    ids = image_ids(tmp_path / "shards")
    assert bad not in ids and plans[1].reserve[0] in ids


def test_too_many_small_pictures_stop_the_harvest_with_the_list(tmp_path: Path):
    images = tiny.write_coco(tmp_path / "coco", 40)
    for image_id in planned(images)[:2]:
        Image.new("RGB", (16, 40)).save(images.path(image_id))
    model, processor = tiny.build_qwen()
    job, harvester = prepare(
        tmp_path / "shards", model=model, processor=processor, scr=tiny.CONFIG, images=images, settings=tiny.SETTINGS
    )
    with pytest.raises(
        TooManyBadImagesError, match=r"2 images cannot be used, at most 1.*\n.*a grid of 5 x 2 patches"
    ):
        harvest(job, harvester)


def test_one_grid_for_all_images_is_no_pictures_fault(tmp_path: Path, coco: CocoImages, llava: tuple[Any, Any]):
    """And costs no second preprocessing: the fit reports it."""
    pictures = PictureGrids(*llava)
    assert pictures.problem(Image.new("RGB", (2, 300))) is None
    assert pictures.of(Image.new("RGB", (2, 300))) == [tiny.GRID]


def test_without_a_reserve_the_shard_is_short(tmp_path: Path, run_harvest: Run):
    images = tiny.write_coco(tmp_path / "coco", 30)
    tiny.truncate_image(images, planned(images)[0])
    summary = run_harvest(tmp_path / "shards", images)
    assert (summary.images, summary.skipped) == (29, 1)


def test_the_disk_estimate_is_an_upper_bound_but_not_a_wild_one(coco: CocoImages, undisturbed: Path):
    written = sum(file.stat().st_size for file in undisturbed.iterdir())
    estimate = 30 * sample_bytes(tiny.TOKENS, tiny.WIDTH, 2, torch.float16)
    assert written < 2 * estimate  # tiny samples: tar's own blocks of 10 KB weigh


def test_states_beyond_float16_are_rejected_not_stored_as_inf(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    def large(*arguments: Any) -> list[Capture]:
        return [dataclasses.replace(one, states=one.states + 1e5) for one in tiny.fake_capture(*arguments)]

    with pytest.raises(StatesOverflowError, match=r"not finite as float16\. Use harvest\.states_dtype=bfloat16"):
        run_harvest(tmp_path / "half", coco, capture=large)
    run_harvest(tmp_path / "wide", coco, capture=large, states_dtype="bfloat16")


def test_int8_states_are_the_float_ones_rounded(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    wide = run_harvest(tmp_path / "wide", coco, states_dtype="float32")
    small = run_harvest(tmp_path / "small", coco, states_dtype="int8")
    assert small.images == wide.images
    pairs = zip(ShardReader(tmp_path / "wide", "test"), ShardReader(tmp_path / "small", "test"), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(other.states, one.states, atol=float(one.states.abs().max()) / 250, rtol=0)
        assert torch.equal(one.question, other.question) and torch.equal(one.attention, other.attention)

    def broken(*arguments: Any) -> list[Capture]:
        captures = tiny.fake_capture(*arguments)
        captures[0].states.fill_(float("nan"))
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
    assert len(decoded) == 31 and sum(processed) == 31  # 30, and one to count the tokens of an image
    assert max(processed) == 2  # 7 prompts are two images of three


def test_one_image_of_many_prompts_may_exceed_the_batch(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    summary = run_harvest(tmp_path / "a", coco, prompts_per_image=9, batch_size=4)
    assert summary.samples == 30 * 9
    run_harvest(tmp_path / "b", coco, prompts_per_image=9, batch_size=100)
    assert contents(tmp_path / "a")["train-00000.tar"] == contents(tmp_path / "b")["train-00000.tar"]


def test_captures_that_do_not_match_the_rows_are_rejected(tmp_path: Path, coco: CocoImages, run_harvest: Run):
    with pytest.raises(RuntimeError, match="4 rows gave captures of rows"):
        run_harvest(tmp_path, coco, capture=lambda *arguments: tiny.fake_capture(*arguments)[1:])


@pytest.mark.parametrize(
    ("mode", "size"), [("L", (1, 300)), ("CMYK", (64, 48)), ("RGB", (8, 8)), ("RGB", (4000, 3000))]
)
def test_odd_images_are_harvested(tmp_path: Path, run_harvest: Run, mode: str, size: tuple[int, int]):
    images = tiny.write_coco(tmp_path / "coco", 40)
    Image.new("RGB", size, "red").convert(mode).save(images.path(planned(images)[0]), format="JPEG")
    assert run_harvest(tmp_path / "shards", images).skipped == 0


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
        for number in prefetch(numbers(), 2):
            drawn.append(number)
    assert drawn == list(range(100)) and closed == [True]
    stream = prefetch(numbers(), 2)
    assert next(stream) == 0
    stream.close()
    assert closed == [True] or len(closed) == 2


@pytest.mark.parametrize("build", [tiny.build_llava, tiny.build_qwen])
def test_visual_tokens_are_counted_without_a_forward(build: Any):
    model, processor = build()
    picture = Image.new("RGB", (32, 32))
    inputs = chat_inputs(processor, [picture], ["Describe the image."])
    assert visual_tokens(model.config, processor, picture) == tiny.TOKENS
    marked = inputs["input_ids"] == model.config.image_token_id
    assert visual_tokens(model.config, processor, picture) == marked.sum()


def test_visual_tokens_are_counted_as_the_family_marks_them():
    """The first Qwen-VL has no image token: its visual tokens lie between a begin and an end token."""
    begin, end = 90, 91
    ids = torch.tensor([[1, 2, begin, *[7] * 256, end, 3]])
    processor: Any = SimpleNamespace(apply_chat_template=lambda *_, **__: {"input_ids": ids})
    config = SimpleNamespace(model_type="qwen", visual={"image_start_id": begin})
    assert visual_tokens(config, processor, Image.new("RGB", (32, 32))) == 256


def test_more_prompts_than_the_annotations_can_give_are_rejected_before_anything_is_written(
    tmp_path: Path, coco: CocoImages, run_harvest: Run
):
    with pytest.raises(SettingsError, match=r"harvest\.prompts_per_image=11: use 1 to 10"):
        run_harvest(tmp_path / "none", coco, prompts_per_image=11)
    assert not (tmp_path / "none").exists()
