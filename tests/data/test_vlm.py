from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data import vlm
from data.chat import chat_inputs
from data.errors import ModelLoadError
from data.settings import AttentionImplementation, Dtype, VLMSettings
from data.vlm import DTYPES, load_vlm, model_config, model_identity
from tests.data import odd, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny.build_llava()
    path = tmp_path_factory.mktemp("models") / "tiny-llava"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_saved_model_is_loaded_for_evaluation(folder: Path):
    model, processor = load_vlm(VLMSettings(hub_id=str(folder), device="cpu"))
    assert not model.training and model.dtype == torch.float32
    assert processor.tokenizer.padding_side == "left"
    assert load_vlm(VLMSettings(hub_id=str(folder), dtype="bfloat16", device="cpu"))[0].dtype == torch.bfloat16


def test_every_number_format_has_a_dtype():
    assert {"auto", *DTYPES} == set(get_args(Dtype))


def identity_of(folder: Path, attention: AttentionImplementation = "sdpa") -> dict[str, Any]:
    settings = VLMSettings(hub_id=str(folder), device="cpu", attn_implementation=attention)
    return model_identity(*load_vlm(settings))


def test_the_identity_of_a_model_covers_weights_and_settings(folder: Path, tmp_path: Path):
    record = identity_of(folder)
    assert record["hub_id"] == "tiny-llava" and record["dtype"] == "float32"
    assert identity_of(folder, "eager") == record
    copy = tmp_path / "tiny-llava"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert identity_of(copy) == record  # in any folder of this name
    weights = load_file(copy / "model.safetensors")
    weights[next(iter(weights))] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = identity_of(copy)
    assert {key for key in record if record[key] != changed[key]} == {"weights_sha256"}


def test_errors_name_the_model_and_the_way_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match=r"from the folder .*empty.*\n.*model\.hub_id"):
        load_vlm(VLMSettings(hub_id=str(tmp_path / "empty")))
    with pytest.raises(ModelLoadError, match=r"model\.hub_id='.*nowhere': there is no such folder"):
        load_vlm(VLMSettings(hub_id=str(tmp_path / "nowhere")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelLoadError, match=r"model\.device='cuda', but torch sees no CUDA device"):
        load_vlm(VLMSettings(hub_id=str(folder), device="cuda"))


def test_a_checkpoint_without_some_weights_is_rejected(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="lacks 1 weights"):
        load_vlm(VLMSettings(hub_id=str(tmp_path)))


def test_a_cut_checkpoint_is_rejected(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(ModelLoadError, match="cannot load"):
        load_vlm(VLMSettings(hub_id=str(tmp_path)))


@pytest.mark.parametrize("build", [tiny.build_llava, tiny.build_qwen])
def test_saving_a_model_does_not_change_what_it_is(build: Any, tmp_path: Path):
    model, processor = build()
    before = model_identity(model, processor)
    model.save_pretrained(tmp_path)
    assert model_identity(model, processor) == before
    again: Any = type(model).from_pretrained(tmp_path)
    assert model_identity(again, processor)["config_sha256"] == before["config_sha256"]
    model.config.text_config.rms_norm_eps *= 2
    assert model_identity(model, processor)["config_sha256"] != before["config_sha256"]


# -- what is knowable before the weights are loaded


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "tiny-llava")


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights must not be loaded."""

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr(vlm.AutoModelForImageTextToText, "from_pretrained", loaded)


def settings_of(folder: Path) -> VLMSettings:
    return VLMSettings(hub_id=str(folder), device="cpu")


def edit(file: Path, **values: Any) -> None:
    record = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (record | values).items() if value is not ...}))


@pytest.mark.usefixtures("weightless")
def test_the_configuration_needs_no_weights(copied: Path):
    (copied / "model.safetensors").unlink()
    config = model_config(settings_of(copied))
    assert config.get_text_config().num_hidden_layers == 4 and config.get_text_config().hidden_size == tiny.WIDTH


@pytest.mark.usefixtures("weightless")
def test_a_model_that_scr_does_not_know_is_rejected_by_its_type(copied: Path):
    transformers.BertConfig().save_pretrained(copied)
    for load in (model_config, load_vlm):
        with pytest.raises(ModelLoadError, match=r"a model of type 'bert'.*llava.*qwen2_vl"):
            load(settings_of(copied))


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize("value", [0, -3, "many", None, 2.5])
def test_impossible_sizes_are_rejected(copied: Path, value: Any):
    text = json.loads((copied / "config.json").read_text())["text_config"]
    edit(copied / "config.json", text_config={**text, "num_hidden_layers": value})
    with pytest.raises(ModelLoadError, match=str(copied)):
        model_config(settings_of(copied))


@pytest.mark.usefixtures("weightless")
def test_the_processor_comes_before_the_weights(copied: Path):
    for file in copied.glob("*processor*"):
        file.unlink()
    with pytest.raises(ModelLoadError, match=str(copied)):
        load_vlm(settings_of(copied))


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}", "cannot make a prompt about an image"),
        ("{{ messages[7]['nothing'].x }}", "cannot make a prompt about an image"),
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("no image here", "cannot make a prompt|leaves the image out"),
        (None, "has no chat template"),
    ],
)
def test_a_chat_template_that_does_not_work_is_rejected(copied: Path, template: str | None, message: str):
    for file in copied.glob("chat_template*"):
        file.unlink()
    for file in copied.glob("*.json"):
        if "chat_template" in file.read_text():
            edit(file, chat_template=...)
    if template is not None:
        (copied / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelLoadError, match=message):
        load_vlm(settings_of(copied))


def test_a_tokenizers_template_serves_a_processor_that_has_none(copied: Path, monkeypatch: pytest.MonkeyPatch):
    """Chameleon's processor drops it when it is made."""
    template = (
        "USER: {% for part in messages[0]['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    )
    plain = vlm.AutoProcessor.from_pretrained

    def dropping(*arguments: Any, **settings: Any) -> Any:
        processor = plain(*arguments, **settings)
        processor.chat_template, processor.tokenizer.chat_template = None, template
        return processor

    monkeypatch.setattr(vlm.AutoProcessor, "from_pretrained", dropping)
    _, processor = load_vlm(settings_of(copied))
    inputs = chat_inputs(processor, [tiny.Image.new("RGB", (9, 9))], ["Is there a cup ?"])
    assert "Is there a cup" in processor.tokenizer.decode(inputs["input_ids"][0])


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    ("error", "package"),
    [
        (ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found."), "torchvision"),
        (ImportError("Package `num2words` is required. Install it with `pip install num2words`."), "num2words"),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "einops"),
        (ImportError("X requires the PIL library but it was not found."), "pillow"),
        (ImportError("apply_chat_template requires jinja2 to be installed. pip install jinja2"), "jinja2"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch, error: ImportError, package: str
):
    def refused(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(vlm.AutoProcessor, "from_pretrained", refused)
    with pytest.raises(ModelLoadError, match=rf"needs the package {package}, .*: pip install {package}\n") as caught:
        load_vlm(settings_of(copied))
    assert "hf download" not in str(caught.value) and "model.hub_id to a folder" not in str(caught.value)


@pytest.mark.usefixtures("weightless")
def test_a_real_processor_without_torchvision(tmp_path: Path):
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    model, processor = tiny.build_qwen()
    for part in (model.config, processor.tokenizer, processor):
        part.save_pretrained(tmp_path)
    video = {"video_processor_type": "Qwen2VLVideoProcessor"}
    edit(tmp_path / "processor_config.json", processor_class="Qwen2VLProcessor", video_processor=video)
    with pytest.raises(ModelLoadError, match="needs the package torchvision, which is not installed: pip install"):
        load_vlm(settings_of(tmp_path))


def test_without_a_network_the_cache_alone_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def from_pretrained(*_: Any, local_files_only: bool, **__: Any) -> Any:
        asked.append(local_files_only)
        raise OSError("not there")

    def no_name(*_: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr(vlm.AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    for lookup in (no_name, lambda *_: []):
        monkeypatch.setattr("socket.getaddrinfo", lookup)
        with pytest.raises(ModelLoadError, match="not there"):
            load_vlm(VLMSettings(hub_id="someone/model", device="cpu"))
    monkeypatch.setattr("socket.getaddrinfo", no_name)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "proxy"})
    with pytest.raises(ModelLoadError, match="not there"):
        load_vlm(VLMSettings(hub_id="someone/model", device="cpu"))
    assert asked == [True, False, False]  # a proxy may know the name


def test_advice_fits_where_the_model_was_looked_for(copied: Path, monkeypatch: pytest.MonkeyPatch):
    (copied / "config.json").write_text("{")
    with pytest.raises(ModelLoadError) as caught:
        load_vlm(settings_of(copied))
    assert "hf download" not in str(caught.value) and "copy or fetch it again" in str(caught.value)

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(vlm.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ModelLoadError, match="hf download someone/model"):
        load_vlm(VLMSettings(hub_id="someone/model", device="cpu"))
    for place in ("/nowhere", "./nowhere", "runs/models/nowhere", "~nobody/model"):
        with pytest.raises(ModelLoadError, match="there is no such folder"):
            load_vlm(VLMSettings(hub_id=place, device="cpu"))
    with pytest.raises(ModelLoadError, match="is a file: give the folder"):
        load_vlm(settings_of(copied / "config.json"))


FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", [*odd.KINDS, *odd.CONTENTS])
def test_a_model_folder_with_odd_files_is_loaded_or_rejected(copied: Path, file: str, kind: str):
    odd.put(copied / file, kind)
    try:
        load_vlm(settings_of(copied))
    except ModelLoadError as error:
        assert str(copied) in str(error)
    else:
        assert file.startswith("tokenizer_config")  # its defaults will do


# -- another processor is another harvest


@pytest.mark.parametrize(
    "file",
    ["processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"],
)
def test_the_identity_of_a_model_covers_the_files_of_its_processor(folder: Path, copied: Path, file: str):
    record = identity_of(folder)
    assert identity_of(copied) == record
    with (copied / file).open("a") as stream:
        stream.write("\n" if (folder / file).exists() else "{}")
    changed = identity_of(copied)
    assert {key for key in record if record[key] != changed[key]} == {"processor_sha256"}


def test_a_model_without_a_folder_has_no_files():
    assert "processor_sha256" not in model_identity(*tiny.build_llava())
