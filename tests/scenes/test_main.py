"""`python -m scenes`: what it writes, and what it says when it can't."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from scenes import CHECKPOINT
from scenes.__main__ import main
from scenes.categories import CATEGORIES
from scenes.drawing import MIXED, render_scene
from scenes.show import contact_sheet
from scenes.sprites import SPRITE_SIZE, load_sprites, make_sheet


def test_render_writes_scenes_and_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["render", "--out", str(tmp_path), "--count", "5", "--columns", "3"]) == 0
    assert len(list(tmp_path.glob("scene-*.png"))) == 5
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.width > 3 * 96
    assert str(tmp_path / "contact-sheet.png") in capsys.readouterr().out


def test_render_and_world_know_mixed_sizes(tmp_path: Path):
    assert (
        main(["render", "--out", str(tmp_path / "sheet"), "--count", "4", "--columns", "2", "--sizes", "mixed"]) == 0
    )
    sizes = set()
    for file in (tmp_path / "sheet").glob("scene-*.png"):
        with Image.open(file) as scene:
            sizes.add(scene.size)
    assert sizes <= set(MIXED.sizes)
    world = ["world", "--out", str(tmp_path / "world"), "--train", "2", "--val", "1"]
    assert main([*world, "--sizes", "mixed"]) == 0
    assert main(world) == 2, "a world of other settings is never replaced"


def test_sheet_of_one_scene_is_one_column():
    assert contact_sheet([render_scene(0, "val", 0)]).width < 300


def test_world_command_makes_then_reuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for expected in ("rendering", "reusing"):
        assert main(["world", "--out", str(tmp_path / "world"), "--train", "2", "--val", "1"]) == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["render", "--count", "0"], "count=0"),
        (["world", "--train", "0"], "train=0"),
        (["fit", "--steps-scale", "-1"], "steps scale -1"),
        (["evaluate", "--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["evaluate", "--check", "1"], "check=1"),
        (["sprites", "--font", "nowhere.ttf"], "No font at nowhere.ttf"),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_weights_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    assert main(["evaluate", "--checkpoint", str(tmp_path)]) == 2
    assert "cannot load a vision-language model" in capsys.readouterr().err


def test_sheet_has_a_sprite_for_every_category():
    sprites = load_sprites()
    assert len(sprites) == len(CATEGORIES)
    assert all(max(sprite.size) >= SPRITE_SIZE - 4 for sprite in sprites)


def test_a_font_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        make_sheet(tmp_path / "none.ttf", tmp_path / "sheet.png")
