"""Folders with tiny random models of the real classes and their real processors, as a user would name them in a YAML.

The families of `PLAIN` need no torchvision; the processors of `WITH_VIDEOS` hold one for videos, which does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

CATEGORIES = ("cup", "fork", "car", "bus", "person", "zebra")
PATCH, SIDE, WIDTH, BLOCKS = 4, 32, 32, 4  # pixels of a patch, and of a picture or tile; hidden size; decoder blocks
TILES = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
hf: Any = transformers  # whose stubs know half of the keywords
_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
_WORDS = ["USER", "ASSISTANT", ":", "Is", "there", "a", "an", "in", "the", "image", "?", "Describe", "."]
_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def _tokenizer(*special: str, **named: str) -> Any:
    """A tokenizer of words; `named` special tokens become attributes of it."""
    every = [*_SPECIAL, *special, *named.values()]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys((*every, *_WORDS, *CATEGORIES)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=named or list(special), padding_side="left",
    )  # fmt: skip


def _template(mark: str) -> str:
    return _TEMPLATE.replace("MARK", mark)


def _text(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "initializer_range": 0.2,
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
    } | changes  # fmt: skip


def _id(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


# -- without torchvision ---------------------------------------------------------------------------------------------


def _tower(kind: str) -> Any:
    config = {"clip": hf.CLIPVisionConfig, "siglip": hf.SiglipVisionConfig}[kind]
    return config(hidden_size=16, image_size=SIDE, patch_size=PATCH, **_SMALL)


def _llava(tower: str, strategy: Any) -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    size = {"height": SIDE, "width": SIDE}
    pixels = (
        hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
        if tower == "clip"
        else hf.SiglipImageProcessorPil(size=size)
    )
    processor = hf.LlavaProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(tower == "clip"), chat_template=_template("<image>"),
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=_tower(tower), text_config=hf.LlamaConfig(**_text(tokenizer)),
        image_token_index=_id(tokenizer, "<image>"), vision_feature_select_strategy=strategy, vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), processor


def _llava_next() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    pixels = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=TILES
    )
    processor = hf.LlavaNextProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_template("<image>"),
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        vision_config=_tower("clip"), text_config=hf.LlamaConfig(**_text(tokenizer)),
        image_token_index=_id(tokenizer, "<image>"), image_grid_pinpoints=TILES, vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config), processor


def _chameleon(swin_norm: bool) -> tuple[Any, Any]:
    codes = [f"IMGIMG{letter}Z" for letter in "ABCDEFGH"]
    tokenizer = _tokenizer("<image>", "<racm3:break>", "<eoss>", "<reserved08706>", *codes)
    tokenizer.chat_template = _template("<image>")  # its processor takes none
    pixels = hf.ChameleonImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = hf.ChameleonProcessor(pixels, tokenizer, image_seq_length=(SIDE // 4) ** 2)
    config = hf.ChameleonConfig(
        **_text(tokenizer), swin_norm=swin_norm,
        vocabulary_map={token: _id(tokenizer, token) for token in ("<image>", *codes)},
        vq_config={
            "resolution": SIDE, "base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1,
            "num_embeddings": 8, "embed_dim": 8, "latent_channels": 8,
        },
    )  # fmt: skip
    model = hf.ChameleonForConditionalGeneration(config)
    with torch.no_grad():  # an untrained encoder maps all to one code
        for module in model.model.vqmodel.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.3)
        nn.init.normal_(model.model.vqmodel.quantize.embedding.weight, std=2.0)
    return model, processor


# -- with torchvision ------------------------------------------------------------------------------------------------


def _qwen(kind: str) -> tuple[Any, Any]:
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(*names)
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    bounds = {"shortest_edge": 32 * 32, "longest_edge": 80 * 80}
    videos = hf.Qwen3VLVideoProcessor if kind == "Qwen3VL" else hf.Qwen2VLVideoProcessor
    processor = getattr(hf, f"{kind}Processor")(
        hf.Qwen2VLImageProcessor(**sizes, size=bounds), tokenizer, videos(**sizes),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    vision: dict[str, Any] = {
        "Qwen2VL": {"depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2},
        "Qwen2_5_VL": {
            "depth": 2, "hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 32, "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "Qwen3VL": {
            "depth": 3, "hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 32,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2], "initializer_range": 0.2,
        },
    }[kind]  # fmt: skip
    vision |= {"num_heads": 2, "patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = _text(tokenizer, rope_parameters=rope, **({"head_dim": 8} if kind == "Qwen3VL" else {}))
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = {key: _id(tokenizer, name) for key, name in zip(keys, names, strict=True)}
    config = getattr(hf, f"{kind}Config")(vision_config=vision, text_config=text, **ids)
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), processor


def _onevision() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>", "<video>")
    size = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=TILES), tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=size), num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2",
        chat_template=_template("<image>"),
    )  # fmt: skip
    config = hf.LlavaOnevisionConfig(
        vision_config=_tower("siglip"), text_config=hf.Qwen2Config(**_text(tokenizer)),
        image_token_id=_id(tokenizer, "<image>"), video_token_id=_id(tokenizer, "<video>"),
        image_grid_pinpoints=TILES, vision_aspect_ratio="anyres_max_2", vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _internvl(most: int) -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    side = SIDE + SIDE // 2  # patches are joined two by two
    size = {"height": side, "width": side}
    pixels = hf.GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=most, crop_to_patches=most > 1)
    tokens = (side // PATCH // 2) ** 2
    processor = hf.InternVLProcessor(
        pixels, tokenizer, hf.InternVLVideoProcessor(size=size), image_seq_length=tokens,
        chat_template=_template("<IMG_CONTEXT>"),
    )  # fmt: skip
    config = hf.InternVLConfig(
        vision_config={"hidden_size": 16, "image_size": [side, side], "patch_size": [PATCH, PATCH], **_SMALL},
        text_config=hf.Qwen2Config(**_text(tokenizer)),
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"), image_seq_length=tokens,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config), processor


PLAIN: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": lambda: _llava("clip", "default"),
    "llava-full": lambda: _llava("clip", "full"),
    "llava-siglip": lambda: _llava("siglip", "full"),
    "llava-next": _llava_next,
    "chameleon": lambda: _chameleon(False),
    "chameleon-swin": lambda: _chameleon(True),
}
WITH_VIDEOS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava-onevision": _onevision,
    "qwen2-vl": lambda: _qwen("Qwen2VL"),
    "qwen2.5-vl": lambda: _qwen("Qwen2_5_VL"),
    "qwen3-vl": lambda: _qwen("Qwen3VL"),
    "internvl": lambda: _internvl(4),
    "internvl-1tile": lambda: _internvl(1),
}
SEVERAL_GRIDS = {"llava-next", "llava-onevision", "internvl"}


def save_model(name: str, folder: Path) -> Path:
    """Writes the model of a family and its processor, as `save_pretrained` writes them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = {**PLAIN, **WITH_VIDEOS}[name]()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    if processor.tokenizer.chat_template:
        processor.tokenizer.save_pretrained(folder)
    return folder
