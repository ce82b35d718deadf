"""The scene model: words and template fit together; the shipped checkpoint loads, sees and describes."""

import json
import stat
from dataclasses import asdict
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.wording import question_text
from scenes import CATEGORIES, CHECKPOINT
from scenes.drawing import caption, render_scene
from scenes.fit import Recipe
from scenes.model import CAPTION_QUESTIONS, build_processor, build_tokenizer, vocabulary


def chat(question: str, answer: str = "") -> str:
    """The text of a lesson: what the template makes of one image and one question, then the answer, if any."""
    return f"USER: <image>\n{question} ASSISTANT:" + (f" {answer}</s>" if answer else "")


def test_vocabulary_knows_every_question_and_caption():
    words = vocabulary()
    unknown = words["<unk>"]
    tokenizer = build_tokenizer()
    texts = [chat(question_text(c.name), answer) for c in CATEGORIES for answer in ("yes", "no")]
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
    answered = {"role": "assistant", "content": [{"type": "text", "text": "no"}]}
    whole = processor.apply_chat_template([asked, answered])
    assert (
        processor.tokenizer(whole).input_ids
        == processor.tokenizer(chat("Is there a dog in the image?", "no")).input_ids
    )


def test_captions_survive_the_tokenizer():
    tokenizer = build_tokenizer()
    text = "A sports ball, a dog and an apple on grass."
    assert tokenizer.decode(tokenizer(f"{text}</s>").input_ids, skip_special_tokens=True) == text


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
            questions.append(question_text(CATEGORIES[category].name))
            truth.append(answer)
    answered = answers(shipped, images, questions)
    assert len(truth) >= 40
    assert set(answered) <= {"yes", "no"}
    assert sum(a == b for a, b in zip(answered, truth, strict=True)) / len(truth) > 0.9


def test_checkpoint_describes_in_whole_sentences(shipped: tuple):
    scenes = [render_scene(0, "val", index) for index in range(8)]
    images = [Image.fromarray(scene.image) for scene in scenes]
    texts = answers(shipped, images, [CAPTION_QUESTIONS[0]] * 8, tokens=48)
    named = [{i for i, c in enumerate(CATEGORIES) if f" {c.name}" in text} for text in texts]
    assert all(text.startswith(("A ", "An ")) and text.endswith(".") for text in texts)
    hits = sum(len(said & set(scene.present)) for said, scene in zip(named, scenes, strict=True))
    assert hits >= 0.5 * sum(len(said) for said in named)
