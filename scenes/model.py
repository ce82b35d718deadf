"""Builds the scene model: a LLaVA of 2.6 million parameters, of the same classes as the large ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data.wording import CAPTION_PROMPT, question_text, with_article
from scenes.categories import CATEGORIES
from scenes.drawing import GROUNDS, SIZE

PATCH = 8  # pixels a side
GRID = SIZE // PATCH  # 12 x 12 = 144 visual tokens
HIDDEN = 128
TOWER_LAYERS, LANGUAGE_LAYERS, HEADS = 4, 8, 4
CAPTION_QUESTIONS = (CAPTION_PROMPT, "What is in the image?")
SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Every word the model can read or say, with its token id."""
    texts = [question_text(category.name) for category in CATEGORIES] + list(CAPTION_QUESTIONS)
    texts += [ground for ground, _ in GROUNDS.values()] + [with_article("apple"), "A dog, a cat and an apple on."]
    texts += ["USER: ASSISTANT: yes no Yes No An the The photo picture what which objects can you see there are is"]
    texts += ["Please answer with yes or no. Answer Is it this that any not I do not know two one in of ! ; -"]
    words = list(dict.fromkeys(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)))
    return {word: index for index, word in enumerate([*SPECIAL_TOKENS, *words])}


def build_tokenizer(words: Mapping[str, int] | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token a word or punctuation mark, padding on the left.

    Args:
        words: Token ids of its words, `SPECIAL_TOKENS` among them; by default `vocabulary()`.
    """
    tokenizer = Tokenizer(models.WordLevel(dict(words or vocabulary()), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor(words: Mapping[str, int] | None = None, side: int = SIZE, patch: int = PATCH) -> LlavaProcessor:
    """The processor of a LLaVA with a word-level tokenizer and one chat template, by default the scene model's.

    Images are scaled to [-1, 1]; those of `side` x `side` pixels keep their size.

    Args:
        words: As in `build_tokenizer`.
        side: Pixels a side of what the model sees.
        patch: Pixels a side of a patch.
    """
    pixels = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=build_tokenizer(words),
        patch_size=patch,
        num_additional_image_tokens=1,  # the class token of CLIP, which "default" leaves out again
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )


def build_model() -> LlavaForConditionalGeneration:
    """The scene model with fresh weights (fp32), drawn from torch's global generator."""
    words = vocabulary()
    ids = {"pad_token_id": words["<pad>"], "bos_token_id": words["<s>"], "eos_token_id": words["</s>"]}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            num_hidden_layers=TOWER_LAYERS,
            num_attention_heads=HEADS,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=HIDDEN,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LANGUAGE_LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=1024,
            initializer_range=0.05,  # 0.02 is meant for wider models
            pad_token_id=ids["pad_token_id"],
            bos_token_id=ids["bos_token_id"],
            eos_token_id=ids["eos_token_id"],
        ),
        image_token_index=words["<image>"],
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    model.generation_config.max_new_tokens = 48
    return model
