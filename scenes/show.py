"""Shows what the world looks like: scenes as PNG files, and a sheet with the ground truth under each."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from scenes.categories import CATEGORIES
from scenes.drawing import LOOKS, SIZE, Scene, Sizes, render_scene

_ZOOM = 2
_GAP = 18
_TEXT = 44  # pixels for the caption under a scene
_INK, _PALE, _PAPER = (40, 44, 52), (122, 128, 138), (250, 250, 248)
_BOX = (255, 255, 255)


def write_scenes(
    out: Path, count: int, seed: int = 0, stream: str = "val", columns: int = 6, sizes: Sizes = "square"
) -> Path:
    """Writes `count` scenes and a contact sheet.

    Args:
        out: Folder for `scene-0000.png` .. and `contact-sheet.png`.
        count: Number of scenes, from 1.
        seed: Seed of the world.
        stream: A key of `scenes.drawing.STREAMS`.
        columns: Scenes in a row of the sheet.
        sizes: A key of `scenes.drawing.LOOKS`.

    Returns:
        The contact sheet's path.

    Raises:
        ValueError: `count` or `columns` is below 1.
    """
    if count < 1 or columns < 1:
        raise ValueError(f"count={count}, columns={columns}: both are 1 or greater")
    out.mkdir(parents=True, exist_ok=True)
    scenes = []
    for index in tqdm(range(count), desc="render scenes", unit="image"):
        scenes.append(render_scene(seed, stream, index, LOOKS[sizes]))
        Image.fromarray(scenes[-1].image).save(out / f"scene-{index:04d}.png")
    sheet = out / "contact-sheet.png"
    contact_sheet(scenes, columns).save(sheet, optimize=True)
    return sheet


def contact_sheet(scenes: list[Scene], columns: int = 6) -> Image.Image:
    """One picture with every scene, the small ones at double size: boxes around its objects, its categories below."""
    columns = min(columns, len(scenes))
    longest = max(max(scene.labels.shape) for scene in scenes)
    zoom = _ZOOM if longest <= SIZE else 1
    side = longest * zoom
    rows = -(-len(scenes) // columns)
    paper = Image.new("RGB", (_GAP + columns * (side + _GAP), _GAP + rows * (side + _TEXT + _GAP)), _PAPER)
    draw = ImageDraw.Draw(paper)
    bold, plain = ImageFont.load_default(12), ImageFont.load_default(11)
    for number, scene in enumerate(scenes):
        x = _GAP + number % columns * (side + _GAP)
        y = _GAP + number // columns * (side + _TEXT + _GAP)
        picture = Image.fromarray(scene.image)
        paper.paste(picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST), (x, y))
        for thing in scene.objects:
            left, top, width, height = (v * zoom for v in thing.box)
            draw.rectangle((x + left, y + top, x + left + width - 1, y + top + height - 1), outline=_BOX)
        draw.text((x, y + side + 4), f"{scene.context}, on {scene.ground}", fill=_PALE, font=plain)
        words = _wrap(draw, ", ".join(CATEGORIES[i].name for i in scene.present), bold, side)
        for line, text in enumerate(words[:2]):
            draw.text((x, y + side + 18 + 14 * line), text, fill=_INK, font=bold)
    return paper


def _wrap(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
