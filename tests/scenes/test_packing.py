"""Packing is exact, and a patch is labelled by what it shows."""

from typing import Any

import torch
from PIL import Image

from data.chat import chat_inputs
from data.wording import question_text
from scenes.drawing import render_scene
from scenes.model import CAPTION_QUESTIONS, build_model, build_processor
from scenes.packing import PackedLayout, packed_states, patch_labels, visual_features


def test_packed_equals_one_question_at_a_time():
    torch.manual_seed(0)
    model = build_model().eval()
    processor: Any = build_processor()
    questions = [question_text("dog"), question_text("traffic light"), CAPTION_QUESTIONS[0]]
    scenes = [render_scene(0, "val", i) for i in range(2)]
    branches = [processor.tokenizer(f"{question} ASSISTANT:").input_ids for question in questions]
    longest = max(len(branch) for branch in branches) + 2  # so that every branch ends in pads
    pad = processor.tokenizer.pad_token_id
    row = [token for branch in branches for token in branch + [pad] * (longest - len(branch))]
    images = [Image.fromarray(scene.image) for scene in scenes]
    pixels = chat_inputs(processor, images, questions[:2])["pixel_values"]
    with torch.no_grad():
        projected = model.model.multi_modal_projector(visual_features(model, pixels))
        states = packed_states(model, projected, torch.tensor([row, row]), PackedLayout((longest,) * 3))
        packed = model.lm_head(states[-1])
        for number, (question, branch) in enumerate(zip(questions, branches, strict=True)):
            single: Any = chat_inputs(processor, images, [question] * 2)
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
