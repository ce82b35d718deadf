"""Images of a batch with grids of their own (Qwen2-VL), and prompts with several images: tiles and thumbnails."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from evaluation import batches
from evaluation.asking import Asker, Task
from evaluation.decoding import Decoding
from evaluation.edits import owned_neighbours
from evaluation.methods import Method, expand
from evaluation.pictures import Pictures
from evaluation.questions import Item
from evaluation.settings import EvaluationSettings
from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor
from tests.data.tiny import WIDTH, build_qwen

CONFIG = SCRConfig(num_sources=3, edit_layers=(0, 2), attention_layers=(1, 1), strength=2.0)
SIZES = ((64, 48), (48, 80), (64, 48), (72, 40))
QUESTIONS = ("Is there a an in the image?", "Describe the image.")
DECODING = Decoding("greedy", 3, margins=False)


def tiled(processor: Any, images: Any, texts: Any) -> Any:
    """Each picture twice: as it is, and as a thumbnail on a grid of its own."""
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    prompts = [f"USER: {vision}{vision}{text} ASSISTANT:" for text in texts]
    pictures = [picture for image in images for picture in (image, image.resize((32, 32)))]
    return processor(images=pictures, text=prompts, return_tensors="pt", padding=True)


def tiled_rows(processor: Any, images: Any, texts: Any) -> tuple[Any, int]:
    """Row by row, as `shared_chat_inputs` gives what can't be shared."""
    rows = [image for image, own in zip(images, texts, strict=True) for _ in own]
    return tiled(processor, rows, [text for own in texts for text in own]), 1


@pytest.fixture(params=[1, 2], ids=["one-image", "tiles"])
def asked(request: Any, tmp_path: Path, monkeypatch: Any) -> tuple[Asker, Task, int, Any]:
    model, processor = build_qwen()
    generator = torch.Generator().manual_seed(0)
    for n, (width, height) in enumerate(SIZES):
        pixels = torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{n}.png")
    make = batches.chat_inputs
    if request.param == 2:
        make = tiled
        monkeypatch.setattr(batches, "chat_inputs", tiled)
        monkeypatch.setattr(batches, "shared_chat_inputs", tiled_rows)
    items = [Item(f"{n}.png", text) for n in range(len(SIZES)) for text in QUESTIONS]
    return (
        Asker(model, processor, CONFIG, Pictures(tmp_path), 8, 0),
        Task("t", items, "{question}", DECODING),
        request.param,
        make,
    )


def make_predictor(threshold: float = 0.0) -> SourcePredictor:
    torch.manual_seed(0)
    found = SourcePredictor(PredictorConfig(WIDTH, rank=4, width=8, question="concat")).eval().requires_grad_(False)
    found.set_calibration(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 1.0]), threshold)
    return found


def single(asker: Asker, item: Item, make: Any, context: Any) -> list[int]:
    inputs = make(asker.processor, [asker.pictures.open(item.image)], [item.text])
    with torch.no_grad(), context:
        tokens = asker.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def test_every_method_on_grids_that_differ(asked: Any) -> None:
    asker, task, images, make = asked
    predictor = make_predictor()
    settings = EvaluationSettings(methods=["all"])
    stores = asker.ask(task, expand(settings, {"": predictor}), {"": predictor})
    for n, item in enumerate(task.items):
        for name, scr in (
            ("vanilla", None),
            ("two-pass", SCR(asker.model, config=CONFIG, mode="two-pass")),
            ("one-pass", SCR(asker.model, config=CONFIG, mode="one-pass", predictor=predictor)),
            ("online", SCR(asker.model, config=CONFIG.behind_map(4), mode="online")),
        ):
            answer = stores[name][n, None]
            assert answer.tokens == single(asker, item, make, scr or nullcontext())
            assert len(answer.images) == images
            if scr is not None:
                assert [one.sources for one in answer.images] == [report.sources for report in scr.reports]
        for name in set(stores) - {"vanilla", "vanilla-sampled"}:
            for place, one in enumerate(stores[name][n, None].images):
                two = stores["two-pass"][n, None].images[place]
                assert one.grid == two.grid and len(one.sources) == len(two.sources)
                assert max(one.sources) < one.grid[0] * one.grid[1]
                if name == "dose-matched":
                    assert abs(one.dose - two.dose) <= 1
    grids = {tuple(one.grid for one in stores["two-pass"][n, None].images) for n in range(len(task.items))}
    assert len(grids) == 3
    swapped = [stores["swapped"][n, None].images[0].sources for n in range(4)]
    assert swapped[:2] == [stores["two-pass"][4, None].images[0].sources] * 2  # of the same grid
    assert swapped[2:] != [stores["two-pass"][n, None].images[0].sources for n in (2, 3)]


def test_auto_decides_image_by_image(asked: Any) -> None:
    asker, task, _, make = asked
    methods = expand(EvaluationSettings(methods=["vanilla", "two-pass", "one-pass"]), {"": make_predictor()})
    one = asker.ask(task, methods, {"": make_predictor()})["one-pass"]
    found = sorted(image.confidence or 0 for n in range(len(task.items)) for image in one[n, None].images)
    predictor = make_predictor(found[len(found) // 2])
    stores = asker.ask(task, [*methods, Method("auto", "auto", "")], {"": predictor})
    providers = []
    for n, item in enumerate(task.items):
        scr = SCR(asker.model, config=CONFIG, mode="auto", predictor=predictor)
        answer = stores["auto"][n, None]
        assert answer.tokens == single(asker, item, make, scr)
        assert [one.sources for one in answer.images] == [report.sources for report in scr.reports]
        providers.append([report.provider for report in scr.reports])
    assert len({provider for row in providers for provider in row}) == 2


def test_doses_are_counted(asked: Any) -> None:
    asker, task, _, _ = asked
    stores = asker.ask(task, [Method("vanilla", "vanilla"), Method("two-pass", "two-pass")], {})
    for one in stores["two-pass"][0, None].images:
        assert one.dose == owned_neighbours(one.sources, one.grid, 8)
