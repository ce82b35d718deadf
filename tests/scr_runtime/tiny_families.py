"""Random tiny models of the real transformers classes, one per family, and prompts for them.

A prompt is assembled here, token by token, so that where each patch lies is known without asking scr_runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.scr_runtime.reference import IMAGE_TOKEN, Image
from tests.scr_runtime.tiny_qwen import BEGIN, HIDDEN, LAYERS, VOCABULARY, QWenStandIn

END, VIDEO_TOKEN, PAD = 97, 98, 0


@dataclass
class Picture:
    """An image in a prompt: its tokens, and each grid with the places of its patches among them."""

    tokens: list[int]
    grids: list[tuple[tuple[int, int], list[int]]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    visual: list[bool] | None = None  # where the image's features go, if not at the placeholder


@dataclass
class Prompt:
    inputs: dict[str, Any]
    images: list[Image]
    visual: Tensor  # [B, S] bool
    pictures: list[list[Picture]]

    def row(self, index: int) -> dict[str, Tensor]:
        """One row of the batch as a single prompt, without its padding."""
        keep = self.inputs["attention_mask"][index].bool()
        single = {key: value[index : index + 1, keep] for key, value in self.inputs.items() if key in _BY_POSITION}
        return single | _join(self.pictures[index])


_BY_POSITION = ("input_ids", "attention_mask", "mm_token_type_ids")


def _join(pictures: list[Picture]) -> dict[str, Tensor]:
    names = pictures[0].tensors if pictures else ()
    return {name: torch.cat([picture.tensors[name] for picture in pictures]) for name in names}


@dataclass(frozen=True)
class Tiny:
    """How to make one family's model and the images of its prompts."""

    name: str
    build: Callable[[str], Any]
    picture: Callable[[Any, torch.Generator, int], Picture]
    attentions: tuple[str, ...] = ("sdpa", "eager")
    generates: bool = True
    token_types: bool = False

    def model(self, seed: int = 0, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(seed)
        model = self.build(attn).eval().to(dtype)
        if self.generates:
            model.generation_config.eos_token_id = None  # tests want a fixed number of tokens
            model.generation_config.pad_token_id = PAD
        return model

    def prompt(self, model: Any, images_per_row: list[int], *, seed: int = 0, pad: str = "left") -> Prompt:
        generator = torch.Generator().manual_seed(seed)

        def words(count: int) -> list[int]:
            return torch.randint(3, 60, (count,), generator=generator).tolist()

        rows: list[list[int]] = []
        pictures: list[list[Picture]] = []
        starts: list[list[int]] = []
        for row, count in enumerate(images_per_row):
            ids, mine, places = [1, *words(2)], [], []
            for _ in range(count):
                picture = self.picture(model, generator, sum(map(len, pictures)) + len(mine))
                places.append(len(ids))
                mine.append(picture)
                ids += picture.tokens + words(1 + row)
            rows.append(ids + words(5 + 2 * row))
            pictures.append(mine)
            starts.append(places)
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), PAD)
        mask, visual = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        images: list[Image] = []
        for row, tokens in enumerate(rows):
            shift = length - len(tokens) if pad == "left" else 0
            ids[row, shift : shift + len(tokens)] = torch.tensor(tokens)
            mask[row, shift : shift + len(tokens)] = 1
            for picture, start in zip(pictures[row], starts[row], strict=True):
                marks = picture.visual or [token == IMAGE_TOKEN for token in picture.tokens]
                visual[row, shift + start : shift + start + len(marks)] = torch.tensor(marks)
                images += [
                    Image(row, [shift + start + place for place in places], grid) for grid, places in picture.grids
                ]
        inputs = {"input_ids": ids, "attention_mask": mask} | _join([picture for mine in pictures for picture in mine])
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
        if self.token_types:
            inputs["mm_token_type_ids"] = visual.long()
        return Prompt(inputs, images, visual, pictures)


def _grid(rows: int, columns: int, start: int = 0) -> tuple[tuple[int, int], list[int]]:
    return (rows, columns), list(range(start, start + rows * columns))


def _text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD,
    } | changes  # fmt: skip


# -- LLaVA -----------------------------------------------------------------------------------------------------------


def _clip(side: int) -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=4 * side,
        patch_size=4,
    )  # fmt: skip


def _siglip(side: int) -> Any:
    return transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=4 * side,
        patch_size=4,
    )  # fmt: skip


def _llava(strategy: Any) -> Callable[[str], Any]:
    def build(attn: str) -> Any:
        settings: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "attn_implementation": attn}
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                **settings, vision_config=_clip(6), text_config=transformers.LlamaConfig(**_text()),
                vision_feature_select_strategy=strategy,
            )
        )  # fmt: skip

    return build


def _llava_picture(model: Any, generator: torch.Generator, index: int) -> Picture:
    skip = int(model.config.vision_feature_select_strategy == "full")
    pixels = torch.randn(1, 3, 24, 24, generator=generator)
    return Picture([IMAGE_TOKEN] * (36 + skip), [_grid(6, 6, skip)], {"pixel_values": pixels})


def _llava_next(attn: str) -> Any:
    settings: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "attn_implementation": attn}
    return transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            **settings, vision_config=_clip(6), text_config=transformers.LlamaConfig(**_text()),
            image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        )
    )  # fmt: skip


def _llava_onevision(attn: str) -> Any:
    settings: dict[str, Any] = {
        "image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "attn_implementation": attn,
    }  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(
            **settings, vision_config=_siglip(6), text_config=transformers.Qwen2Config(**_text()),
            image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]], vision_aspect_ratio="anyres_max_2",
        )
    )  # fmt: skip


def _tiled_picture(model: Any, generator: torch.Generator, index: int) -> Picture:
    """The model's own packing of marked features shows the grid: newlines are -1."""
    height, width = [(17, 40), (48, 48), (40, 22), (30, 30)][index % 4]
    tiles = 5 if (height, width) in ((48, 48), (30, 30)) else 3
    settings: dict[str, Any] = {} if hasattr(model.config, "vision_aspect_ratio") else {
        "vision_feature_select_strategy": "default"
    }  # fmt: skip
    if hasattr(model.config, "vision_aspect_ratio"):
        settings["vision_aspect_ratio"] = model.config.vision_aspect_ratio
    (packed,), _ = model.model.pack_image_features(
        [torch.ones(tiles, 36, 1)], torch.tensor([[height, width]]), image_newline=torch.tensor([-1.0]), **settings
    )
    newlines = (packed[:, 0] == -1).nonzero().flatten().tolist()
    rows, columns = len(newlines), newlines[0] - 36
    joined = [36 + row * (columns + 1) + column for row in range(rows) for column in range(columns)]
    pixels = torch.zeros(1, 5, 3, 24, 24)
    pixels[:, :tiles] = torch.randn(1, tiles, 3, 24, 24, generator=generator)
    return Picture(
        [IMAGE_TOKEN] * len(packed),
        [_grid(6, 6), ((rows, columns), joined)],
        {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])},
    )


# -- Qwen ------------------------------------------------------------------------------------------------------------


def _rope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _qwen(kind: str) -> Callable[[str], Any]:
    def build(attn: str) -> Any:
        vision: dict[str, Any]
        if kind == "Qwen2VL":
            vision = {"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2}
        elif kind == "Qwen2_5_VL":
            vision = {
                "depth": 2, "hidden_size": 16, "out_hidden_size": HIDDEN, "num_heads": 2, "intermediate_size": 32,
                "window_size": 16, "fullatt_block_indexes": [1],
            }  # fmt: skip
        else:
            vision = {
                "depth": 3, "hidden_size": 16, "out_hidden_size": HIDDEN, "num_heads": 2, "intermediate_size": 32,
                "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2], "initializer_range": 0.2,
            }  # fmt: skip
        vision |= {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
        extra = {"head_dim": 8} if kind == "Qwen3VL" else {}
        config = getattr(transformers, f"{kind}Config")(
            vision_config=vision, text_config=_text(rope_parameters=_rope(), **extra), image_token_id=IMAGE_TOKEN,
            video_token_id=VIDEO_TOKEN, vision_start_token_id=BEGIN, vision_end_token_id=END,
            attn_implementation=attn,
        )  # fmt: skip
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    return build


def _qwen_picture(model: Any, generator: torch.Generator, index: int) -> Picture:
    rows, columns = [(4, 6), (6, 4), (5, 5), (4, 7)][index % 4]  # the first two: equal numbers of tokens
    pixels = torch.randn(4 * rows * columns, 3 * 2 * 4 * 4, generator=generator)
    table = torch.tensor([[1, 2 * rows, 2 * columns]])
    grid, places = _grid(rows, columns, 1)
    tokens = [BEGIN, *[IMAGE_TOKEN] * len(places), END]
    return Picture(tokens, [(grid, places)], {"pixel_values": pixels, "image_grid_thw": table})


# -- Chameleon, InternVL ---------------------------------------------------------------------------------------------


def _chameleon(swin_norm: bool) -> Callable[[str], Any]:
    def build(attn: str) -> Any:
        names = {f"IMGIMG{letter}Z": 60 + place for place, letter in enumerate("ABCDEFGH")}
        settings: dict[str, Any] = {"attn_implementation": attn}
        config = transformers.ChameleonConfig(
            **_text(), **settings, swin_norm=swin_norm, vocabulary_map={"<image>": IMAGE_TOKEN} | names,
            vq_config={
                "resolution": 12, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
                "num_embeddings": 8, "embed_dim": 8, "latent_channels": 8,
            },
        )  # fmt: skip
        model = transformers.ChameleonForConditionalGeneration(config)
        with torch.no_grad():  # an untrained encoder maps all to one code
            for module in model.model.vqmodel.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=0.3)
            nn.init.normal_(model.model.vqmodel.quantize.embedding.weight, std=2.0)
        return model

    return build


def _chameleon_picture(model: Any, generator: torch.Generator, index: int) -> Picture:
    pixels = torch.randn(1, 3, 12, 12, generator=generator)
    return Picture([BEGIN, *[IMAGE_TOKEN] * 36, END], [_grid(6, 6, 1)], {"pixel_values": pixels})


def _internvl(attn: str) -> Any:
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [48, 48], "patch_size": [4, 4],
    }  # fmt: skip
    settings: dict[str, Any] = {"attn_implementation": attn}
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            **settings, vision_config=vision, text_config=transformers.Qwen2Config(**_text()),
            image_token_id=IMAGE_TOKEN, image_seq_length=36,
        )
    )  # fmt: skip


def _internvl_picture(model: Any, generator: torch.Generator, index: int) -> Picture:
    tiles = 1 if index % 2 else 3  # one tile alone, or two and a thumbnail
    pixels = torch.randn(tiles, 3, 48, 48, generator=generator)
    grids = [_grid(6, 6, 1 + 36 * tile) for tile in range(tiles)]
    return Picture([BEGIN, *[IMAGE_TOKEN] * 36 * tiles, END], grids, {"pixel_values": pixels})


# -- Qwen-VL, the first one -------------------------------------------------------------------------------------------


def _qwen_v1(attn: str) -> Any:
    model = QWenStandIn()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def _qwen_v1_picture(model: Any, generator: torch.Generator, index: int) -> Picture:
    path = torch.randint(3, 60, (8,), generator=generator).tolist()
    tokens = [BEGIN, *path, *[95] * 28, END]
    return Picture(tokens, [_grid(6, 6, 1)], {}, [False, *[True] * 36, False])


TINY: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny("llava", _llava("default"), _llava_picture),
        Tiny("llava-full", _llava("full"), _llava_picture),
        Tiny("llava-next", _llava_next, _tiled_picture),
        Tiny("llava-onevision", _llava_onevision, _tiled_picture),
        Tiny("qwen2-vl", _qwen("Qwen2VL"), _qwen_picture, token_types=True),
        Tiny("qwen2.5-vl", _qwen("Qwen2_5_VL"), _qwen_picture, token_types=True),
        Tiny("qwen3-vl", _qwen("Qwen3VL"), _qwen_picture, token_types=True),
        Tiny("chameleon", _chameleon(False), _chameleon_picture),
        Tiny("chameleon-swin", _chameleon(True), _chameleon_picture),
        Tiny("internvl", _internvl, _internvl_picture),
        Tiny("qwen-vl", _qwen_v1, _qwen_v1_picture, attentions=("own",), generates=False),
    )
}
