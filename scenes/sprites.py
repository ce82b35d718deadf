"""The sprite sheet: one glyph of Noto Color Emoji per category, kept here so that a run needs no font."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scenes.categories import CATEGORIES, GLYPHS

SHEET = Path(__file__).parent / "assets" / "sprites.png"
DEFAULT_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian package fonts-noto-color-emoji
SPRITE_SIZE = 72  # pixels a side
_COLUMNS = 8
_FONT_SIZE = 109  # the only bitmap size in a CBDT font


def make_sheet(font: Path = DEFAULT_FONT, out: Path = SHEET) -> Path:
    """Draws the 40 glyphs, cropped and scaled to fit 72 px squares, in the order of `CATEGORIES`.

    Args:
        font: A colour bitmap font (CBDT), such as NotoColorEmoji.ttf.
        out: The PNG file to write.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: There is no font at `font`.
    """
    if not font.is_file():
        raise FileNotFoundError(
            f"No font at {font}. Install the Debian package fonts-noto-color-emoji or give --font. "
            f"(A run needs no font: the finished sheet is {SHEET.name}.)"
        )
    face = ImageFont.truetype(str(font), _FONT_SIZE)
    rows = -(-len(CATEGORIES) // _COLUMNS)
    sheet = Image.new("RGBA", (_COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE), (0, 0, 0, 0))
    for index, category in enumerate(CATEGORIES):
        canvas = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((20, 20), GLYPHS[category.name], font=face, embedded_color=True)
        box = canvas.getchannel("A").getbbox()
        if box is None:
            raise ValueError(f"The font {font.name} has no glyph for {category.name!r}: choose NotoColorEmoji.ttf")
        glyph = canvas.crop(box)
        glyph.thumbnail((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
        x = index % _COLUMNS * SPRITE_SIZE + (SPRITE_SIZE - glyph.width) // 2
        y = index // _COLUMNS * SPRITE_SIZE + (SPRITE_SIZE - glyph.height) // 2
        sheet.paste(glyph, (x, y))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(255, method=Image.Quantize.FASTOCTREE).save(out, optimize=True)
    return out


@lru_cache(maxsize=1)
def load_sprites() -> tuple[Image.Image, ...]:
    """The sprites in the order of `CATEGORIES`: RGBA, cropped to their glyph, up to 72 px a side."""
    with Image.open(SHEET) as image:
        sheet = image.convert("RGBA")
    sprites = []
    for index in range(len(CATEGORIES)):
        x, y = index % _COLUMNS * SPRITE_SIZE, index // _COLUMNS * SPRITE_SIZE
        sprite = sheet.crop((x, y, x + SPRITE_SIZE, y + SPRITE_SIZE))
        alpha = np.asarray(sprite.getchannel("A")) > 16
        ys, xs = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
        sprites.append(sprite.crop((int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)))
    return tuple(sprites)
