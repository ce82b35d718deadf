"""Every code block of README and docs: Python runs, commands parse, and what can't run here says what it needs.

A comment before a block marks it: `<!-- given: names -->` for Python that uses names which the page takes for granted,
`<!-- needs: what -->` for a block that nothing here can run. `text` blocks are no code, nor are Sphinx's directives.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import scr_runtime
from configs import load_config, load_sweep
from data.harvest import harvest
from data.harvester import prepare
from data.images import CocoImages
from data.settings import HarvestSettings, VLMSettings
from data.vlm import load_vlm
from pipeline.commands import long_forms
from scenes import ensure_world
from scenes.world import render_scene
from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor, describe_model, save_predictor
from scr_runtime.serve.settings import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NO_CODE = ("text", "{toctree}", "{eval-rst}")
CONFIG = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
COMMANDS = ("train.py", "data.harvest", "export", "evaluation", "playground", "scr_runtime.serve")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    pattern = r"(?:^<!-- (?P<mark>(?:given|needs): [^\n]+) -->\n)?^```(?P<language>\S*)\n(?P<text>.*?)^```$"
    found = list(re.finditer(pattern, content, re.DOTALL | re.MULTILINE))
    assert len(found) * 2 == len(re.findall(r"^```", content, re.MULTILINE)), f"{page}: a block that is not closed"
    for match in found:
        line = content[: match.start("language")].count("\n") + 1
        yield Block(page, line, match["language"], match["mark"] or "", match["text"])


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [
    page for page in PAGES if any(b.language == "python" and not b.mark.startswith("needs") for b in blocks(page))
]


def test_every_block_runs_or_says_what_it_needs() -> None:
    assert len(BLOCKS) > 30 and len(PYTHON) >= 6
    silent = [str(block) for block in BLOCKS if block.language not in ("python", *NO_CODE) and not block.mark]
    assert not silent, f"nothing runs these blocks, and no <!-- needs: ... --> says why: {silent}"
    named = {test for block in BLOCKS for test in re.findall(r"tests/[\w/]+\.py", block.mark)}
    assert named and not [test for test in named if not (ROOT / test).exists()]


def commands(block: Block) -> Iterator[list[str]]:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        starts = [place for place, word in enumerate(words) if word in COMMANDS]
        if starts and any("python" in word or "torchrun" in word for word in words[: starts[0]]):
            yield words[starts[0] :]


@pytest.mark.parametrize("block", [block for block in SHELL if list(commands(block))], ids=str)
def test_the_settings_of_commands_are_ones_that_the_project_has(block: Block) -> None:
    for program, *arguments in commands(block):
        arguments = [text for text in arguments if not text.startswith(("port=", "output=", "--"))]
        if arguments[:1] == ["compare"] or (program == "export" and arguments and "=" not in arguments[0]):
            continue  # runs and folders, no settings
        arguments = arguments[1:] if arguments[:1] == ["tune"] else arguments
        if program == "scr_runtime.serve":
            parse(arguments)
        elif program == "train.py":
            load_sweep(arguments)
        else:
            load_config(long_forms(arguments))


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What pages take for granted: a model, its inputs, a predictor, a harvest."""
    model, processor = load_vlm(VLMSettings(hub_id="scenes/checkpoint", dtype="float32", device="cpu"))
    torch.manual_seed(0)
    predictor = SourcePredictor(PredictorConfig(hidden_size=128)).eval()
    for name in ("scene-llava", "qwen2.5-vl-7b"):
        save_predictor(
            tmp_path / "runs/predictors" / name, predictor, scr=CONFIG, model=describe_model(model, processor)
        )
    monkeypatch.chdir(tmp_path)
    picture = render_scene(0, "val", 3).image
    content = [{"type": "image"}, {"type": "text", "text": "X"}]
    words = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def prompt(question: str) -> str:
        return words.replace("X", question)

    asked = ["Is there a dog in the image?", "Is there a cup in the image?"]
    several = [processor(images=picture, text=prompt(question), return_tensors="pt") for question in asked]
    return {
        "SCR": SCR, "model": model, "processor": processor, "inputs": several[0], "first": several[0],
        "several": several, "questions": asked, "picture": picture, "prompt": prompt,
        "folder": "runs/predictors/scene-llava", "root": tmp_path,
    }  # fmt: skip


def harvested(given: dict[str, Any]) -> None:
    """A small harvest where `python train.py` has its own."""
    ensure_world(given["root"] / "world", train=44, val=2, seed=0)
    images = CocoImages(given["root"] / "world/train", given["root"] / "world/annotations/instances_train.json")
    settings = HarvestSettings(samples=32, validation=6, test=6)
    place = given["root"] / "runs/harvest/scene-llava-scenes"
    arguments: dict[str, Any] = {"model": given["model"], "processor": given["processor"], "scr": CONFIG}
    harvest(*prepare(place, images=images, settings=settings, **arguments))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*logging interval")
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    if page.name == "fit.md":
        harvested(given)
    if page.name == "README.md":
        os.chdir(ROOT)  # as pasted, in a clone: monkeypatch goes back
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language != "python" or block.mark.startswith("needs"):
            continue
        if block.mark:
            wanted = block.mark.partition(": ")[2].split(", ")
            names |= {name: given[name] for name in wanted if name in given}
        exec(compile(block.text, str(block), "exec"), names)
    printed = capsys.readouterr().out
    if page.name == "README.md":
        assert "Is there a dog in the image?" in printed and "two-pass [" in printed
        assert names["scr"].stats.prefills == 1


def test_files_that_the_readme_names_are_there() -> None:
    readme = (ROOT / "README.md").read_text()
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", readme) if not link.startswith("http")}
    assert len(links) > 10
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
    tree = readme.partition("train.py               the command")[2].partition("```")[0]
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms and not [room for room in rooms if f"\n{room}/" not in f"\n{tree}"]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "docs",
        str(tmp_path / "site"),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site/api.html").read_text(encoding="utf-8")
    public = [name for name in scr_runtime.__all__ if name != "errors"]
    assert not [name for name in public if not re.search(rf'id="scr_runtime\.\w+\.{name}"', page)]
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page)
    assert not loaded  # the site asks no other server
    shutil.rmtree(tmp_path / "site")
