"""The scene model and its training: packing is exact; the checkpoint loads, sees, and hallucinates."""

import json
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from scenes import CATEGORIES, CHECKPOINT
from scenes.fit import (
    PackedLayout,
    Recipe,
    evaluate,
    fit,
    packed_logits,
    patch_labels,
    pope_questions,
    visual_features,
)
from scenes.model import (
    CAPTION_QUESTIONS,
    build_model,
    build_processor,
    build_tokenizer,
    chat,
    vocabulary,
    yes_no_question,
)
from scenes.world import caption, render_scene


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_vocabulary_knows_every_question_and_caption():
    words = vocabulary()
    unknown = words["<unk>"]
    tokenizer = build_tokenizer()
    texts = [chat(yes_no_question(c.name), answer) for c in CATEGORIES for answer in ("yes", "no")]
    texts += [chat(question, caption(render_scene(0, "val", i))) for i in range(60) for question in CAPTION_QUESTIONS]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert unknown not in ids, text
        assert ids[-1] == words["</s>"]


def test_chat_template_gives_the_text_of_the_training():
    processor: Any = build_processor()
    asked = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog in the image?"}],
    }
    prompt = processor.apply_chat_template([asked], add_generation_prompt=True)
    assert prompt == chat("Is there a dog in the image?")
    told = {"role": "assistant", "content": [{"type": "text", "text": "no"}]}
    whole = processor.apply_chat_template([asked, told])
    assert (
        processor.tokenizer(whole).input_ids
        == processor.tokenizer(chat("Is there a dog in the image?", "no")).input_ids
    )


def test_captions_survive_the_tokenizer():
    tokenizer = build_tokenizer()
    text = "A sports ball, a dog and an apple on grass."
    assert tokenizer.decode(tokenizer(f"{text}</s>").input_ids, skip_special_tokens=True) == text


def test_packed_equals_one_question_at_a_time():
    torch.manual_seed(0)
    model = build_model().eval()
    processor: Any = build_processor()
    questions = [yes_no_question("dog"), yes_no_question("traffic light"), CAPTION_QUESTIONS[0]]
    scenes = [render_scene(0, "val", i) for i in range(2)]
    branches = [processor.tokenizer(f"{question} ASSISTANT:").input_ids for question in questions]
    longest = max(len(branch) for branch in branches) + 2  # so that every branch ends in pads
    pad = processor.tokenizer.pad_token_id
    row = [token for branch in branches for token in branch + [pad] * (longest - len(branch))]
    inputs = processor(
        images=[Image.fromarray(s.image) for s in scenes], text=[chat(questions[0])] * 2, return_tensors="pt"
    )
    with torch.no_grad():
        projected = model.model.multi_modal_projector(visual_features(model, inputs["pixel_values"]))
        packed = packed_logits(model, projected, torch.tensor([row, row]), PackedLayout((longest,) * 3))
        for number, (question, branch) in enumerate(zip(questions, branches, strict=True)):
            images = [Image.fromarray(s.image) for s in scenes]
            single = processor(images=images, text=[chat(question)] * 2, return_tensors="pt")
            logits = model(**single).logits[:, -len(branch) :]
            begin = number * longest
            torch.testing.assert_close(packed[:, begin : begin + len(branch)], logits, atol=1e-4, rtol=1e-4)


def test_patch_labels_name_the_category_seen_most():
    labels = torch.zeros(1, 96, 96, dtype=torch.uint8)
    labels[0, :8, 8:16] = 7
    labels[0, :3, 8:16] = 40
    labels[0, 8:16, :1] = 9  # 8 of 64 pixels: too little
    found = patch_labels(labels)[0].view(12, 12)
    assert found[0, 1] == 7
    assert found.count_nonzero() == 1


def test_pope_questions_are_about_what_they_say():
    scenes = [s for s in (render_scene(0, "val", i) for i in range(60)) if len(s.present) >= 3]
    for scene, asked in zip(scenes, pope_questions(scenes, 0), strict=True):
        assert set(asked["positive"]) <= set(scene.present)
        for kind in ("random", "popular", "adversarial"):
            assert len(set(asked[kind])) == 3
            assert not set(asked[kind]) & set(scene.present)


def test_recipe_scales_its_steps_and_nothing_else():
    half = Recipe().scaled(0.5)
    assert half.tower_steps == round(Recipe().tower_steps / 2)
    assert half.tower_batch == Recipe().tower_batch
    with pytest.raises(ValueError, match="steps scale 0"):
        Recipe().scaled(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_short_fit_learns_saves_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = Recipe(tower_steps=12, tower_batch=16, language_steps=6, language_batch=4)
    result = fit(tmp_path / "checkpoint", seed=1, recipe=recipe, check=20, workers=0)
    assert {stage: len(losses) for stage, losses in result["losses"].items()} == {"A": 12, "B": 6}
    for stage in "AB":
        losses = result["losses"][stage]
        assert losses[-1] < losses[0], stage
    assert [row["split"] for row in result["rows"]] == ["random", "popular", "adversarial"]
    assert "adversarial" in capsys.readouterr().out
    AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_fit_refuses_a_folder_of_other_things(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds other files"):
        fit(tmp_path)


# -- the shipped checkpoint ------------------------------------------------------------------------


def test_checkpoint_is_small_and_safe():
    files = {file.name: file for file in CHECKPOINT.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "processor_config.json",
    } <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".ckpt"))]
    assert sum(file.stat().st_size for file in files.values()) < 6_000_000
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444 for file in files.values())
    config = json.loads(files["config.json"].read_text())
    fitted = json.loads(files["fit.json"].read_text())
    assert fitted["recipe"] == asdict(Recipe()), "the shipped checkpoint is that of the default recipe"
    assert (config["model_type"], config["dtype"]) == ("llava", "float16")


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(CHECKPOINT)


def answers(shipped: tuple, images: list[Image.Image], questions: list[str], tokens: int = 4) -> list[str]:
    """Greedy answers through the chat template, left padding and `generate`, as a user would ask."""
    model, processor = shipped
    assert processor.tokenizer.padding_side == "left"
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_checkpoint_sees_large_objects_and_stops_after_its_answer(shipped: tuple):
    images, questions, truth = [], [], []
    for index in range(60):
        scene = render_scene(0, "val", index)
        thing = scene.objects[0]
        if thing.visible < 0.9 or thing.area < 250:
            continue
        absent = next(i for i in range(index, index + 40) if CATEGORIES[i % 40].context != scene.context
                      and i % 40 not in scene.present) % 40  # fmt: skip
        for category, answer in ((thing.category, "yes"), (absent, "no")):
            images.append(Image.fromarray(scene.image))
            questions.append(yes_no_question(CATEGORIES[category].name))
            truth.append(answer)
    told = answers(shipped, images, questions)
    assert len(truth) >= 40
    assert set(told) <= {"yes", "no"}
    assert sum(a == b for a, b in zip(told, truth, strict=True)) / len(truth) > 0.9


def test_checkpoint_describes_in_whole_sentences(shipped: tuple):
    scenes = [render_scene(0, "val", index) for index in range(8)]
    images = [Image.fromarray(scene.image) for scene in scenes]
    texts = answers(shipped, images, [CAPTION_QUESTIONS[0]] * 8, tokens=48)
    named = [{i for i, c in enumerate(CATEGORIES) if f" {c.name}" in text} for text in texts]
    assert all(text.startswith(("A ", "An ")) and text.endswith(".") for text in texts)
    hits = sum(len(said & set(scene.present)) for said, scene in zip(named, scenes, strict=True))
    assert hits >= 0.5 * sum(len(said) for said in named)


def test_checkpoint_hallucinates_what_belongs_to_the_context(shipped: tuple):
    rows = {str(row["split"]): row for row in evaluate(shipped[0], seed=0, count=100)}
    assert float(rows["adversarial"]["accuracy"]) > 0.65
    assert float(rows["random"]["accuracy"]) > 0.8
    assert float(rows["adversarial"]["hr"]) > float(rows["random"]["hr"]) + 0.05
