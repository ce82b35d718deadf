"""Every code block of README and docs: Python runs, commands parse, and what can't run here says what it needs.

A comment before a block marks it: `<!-- given: names -->` for Python that uses names which the page takes for granted,
`<!-- needs: what -->` for a block that nothing here can run. `text` blocks are no code, nor are Sphinx's directives.
"""

from __future__ import annotations

import logging
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
from pipeline.predictors import COMMANDS as PREDICTOR_COMMANDS
from scenes import ensure_world
from scenes.world import render_scene
from scr_runtime import SCR, PredictorConfig, SCRConfig, SourcePredictor, describe_model, save_predictor
from scr_runtime.serve.settings import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NO_CODE = ("text", "{include}", "{toctree}", "{eval-rst}")
CONFIG = SCRConfig(num_sources=8, edit_layers=(0, 2), attention_layers=(2, 4))
OTHER_PROGRAMS = (
    "git", "cd", "pip", "python3", "pre-commit", "ruff", "pyright", "lint-imports", "source", "export", "hf", "vllm",
)  # fmt: skip
OTHER_MODULES = ("pytest", "vllm.entrypoints.openai.api_server")
"""Of others: their commands are not checked."""


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
    pattern = r"(?:^<!-- (?P<mark>(?:given|needs): [^\n]+) -->\n)?^```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```$"
    found = list(re.finditer(pattern, content, re.DOTALL | re.MULTILINE))
    assert len(found) * 2 == len(re.findall(r"^```", content, re.MULTILINE)), f"{page}: a block that is not closed"
    for match in found:
        line = content[: match.start("language")].count("\n") + 1
        yield Block(page, line, match["language"], match["mark"] or "", match["text"])


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [
    page for page in PAGES if any(b.language == "python" and not b.mark.startswith("needs") for b in blocks(page))
]


def test_every_block_runs_or_says_what_it_needs() -> None:
    assert len(BLOCKS) > 30 and len(PYTHON) >= 6
    silent = [str(block) for block in BLOCKS if block.language not in ("python", *NO_CODE) and not block.mark]
    assert not silent, f"nothing runs these blocks, and no <!-- needs: ... --> says why: {silent}"
    named = {test for block in BLOCKS for test in re.findall(r"tests/[\w/]+\.py", block.mark)}
    assert named and not [test for test in named if not (ROOT / test).exists()]


def test_the_file_of_a_model_of_ones_own_loads(tmp_path: Path) -> None:
    (block,) = [block for block in BLOCKS if block.language == "yaml"]
    folder = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (folder / "model" / "my-llava.yaml").write_text(block.text)
    config = load_config(["model=my-llava"], folder=folder)
    assert config.scr == SCRConfig.for_depth(32) and config.model.hub_id == "ORG/NAME"
    other = load_config(["model=llava-1.5-7b", "model.name=my-llava", "model.hub_id=ORG/NAME"])
    assert (other.model.name, other.model.hub_id) == ("my-llava", "ORG/NAME")


def typed(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command of a page with its place: lines of shell blocks, and code in a sentence that begins like one."""
    content = page.read_text(encoding="utf-8")
    places = [(block, block.text.replace("\\\n", " ").splitlines()) for block in blocks(page)]
    shell = [(str(block), line) for block, lines in places if block.language == "bash" for line in lines]
    prose = re.sub(r"^ *```.*?^ *```$", "", content, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    shell += [(page.name, span) for span in spans if re.match(r"(\w+=\S+ )*(\S*/)?(python|make|torchrun) \S", span)]
    for place, line in shell:
        words = shlex.split(line, comments=True)
        for number, word in reversed(list(enumerate(words))):
            if word == "&&":
                yield place, words[number + 1 :]
                del words[number:]
        if words:
            yield place, words


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """What is started, and its arguments: train.py, a module or make; nothing for a program of others."""
    while "=" in words[0] or words[0] == "srun":  # variables of the environment, Slurm
        words = words[1:]
    name = Path(words[0]).name
    if name == "torchrun":
        words = [name, *words[words.index("-m") :]]
    if words[1:2] == ["-I"]:  # an option that a page explains
        return "", []
    if name in ("python", "torchrun"):
        name, *words = words[1 + (words[1] == "-m") :]
        return ("", []) if name in OTHER_MODULES else (name, words)
    return ("", []) if name in OTHER_PROGRAMS else (name, words[1:])


def check_settings(program: str, arguments: list[str]) -> None:
    """Reads arguments as the program does, as far as no work is done.

    Raises:
        ValueError: The project has no such setting, command or option.
    """
    if not program or "--help" in arguments:
        return
    if "--config" in arguments:  # a run of the reader's
        place = arguments.index("--config")
        arguments = arguments[:place] + arguments[place + 2 :]
    arguments = [text for text in arguments if text != "..." and not text.startswith(("port=", "output="))]
    if program == "make":
        target, *given = arguments
        if f"\n{target}:" not in (ROOT / "Makefile").read_text(encoding="utf-8"):
            raise ValueError(f"the Makefile has no target {target}")
        for text in given:
            program = {"train": "train.py"}.get(target, target)
            check_settings(program, shlex.split(text.removeprefix("ARGS=")))
    elif program == "train.py":
        load_sweep(arguments)
    elif program == "scr_runtime.serve":
        parse(arguments)
    elif program == "export" and arguments and arguments[0] in PREDICTOR_COMMANDS:
        keys = {text.partition("=")[0] for text in arguments[1:] if "=" in text}
        if wrong := keys - set(re.findall(r"([\w.]+)=", PREDICTOR_COMMANDS[arguments[0]].usage)):
            raise ValueError(f"python -m export {arguments[0]} takes no {wrong}")
    elif program in ("data.harvest", "export", "evaluation", "playground"):
        if arguments[:1] != ["compare"]:  # takes runs, no settings
            load_config(long_forms(arguments[arguments[:1] == ["tune"] :]))
    else:
        check_options(program, arguments)


def check_options(module: str, arguments: list[str]) -> None:
    """Looks for a module of the project, and in its text for the options and the command that are given to it."""
    place = ROOT / module.removesuffix(".py").replace(".", "/")
    file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    if not file.is_file():
        raise ValueError(f"there is no module {module}")
    code = file.read_text(encoding="utf-8")
    named = [text for text in arguments if text.startswith("--")]
    named += [text for text in arguments[:1] if re.fullmatch("[a-z]+", text)]
    if missing := [text for text in named if f'"{text}"' not in code]:
        raise ValueError(f"{module} has no {missing}")
    load_config([text for text in arguments if re.match(r"[\w.]+=", text)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_the_project_takes(page: Path) -> None:
    wrong: list[str] = []
    for place, words in typed(page):
        try:
            check_settings(*program_of(words))
        except ValueError as error:
            wrong.append(f"{place}: {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_command_that_the_project_does_not_take_is_found() -> None:
    for line in (
        "python train.py predictor.los=kl", "python train.py model=llava", "make trian", 'make train ARGS="seed=x"',
        "python -m data.harvests", "torchrun --nproc-per-node 2 -m data.harvest harvest.sample=3",
        "python -m benchmarks.transfer shapes", "python -m benchmarks.prefill --repeat 3",
        "python -m data.inspect look A", "python -m export promote name=A versions=3",
        "python -m scr_runtime.serve modell=A", "wget https://host",
    ):  # fmt: skip
        with pytest.raises(ValueError):
            check_settings(*program_of(shlex.split(line)))


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


@pytest.fixture
def lightning(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Lightning logs; its loggers get their levels back."""
    loggers = [
        logging.getLogger(f"pytorch_lightning{part}") for part in ("", ".utilities.rank_zero", ".loggers.mlflow")
    ]
    levels = [logger.level for logger in loggers]
    loggers[0].addHandler(caplog.handler)
    yield caplog
    loggers[0].removeHandler(caplog.handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(
    page: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str], lightning: pytest.LogCaptureFixture
) -> None:
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
    assert "available:" not in lightning.text and "litlogger" not in lightning.text  # no notices, no adverts
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
    page, home = ((tmp_path / f"site/{name}.html").read_text(encoding="utf-8") for name in ("api", "index"))
    public = [name for name in scr_runtime.__all__ if name != "errors"]
    assert not [name for name in public if f'id="scr_runtime.{name}"' not in page]  # as users import them
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page + home)
    assert not loaded  # the site asks no other server
    assert 'id="on-your-model"' in home and 'src="_images/how-it-works.svg"' in home  # the README's own text
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert not [name for name in pages if f'href="{Path(name).stem}.html"' not in home]
    shutil.rmtree(tmp_path / "site")
