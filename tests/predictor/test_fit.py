"""The fit through its one function: determinism, interruptions by real signals, several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from predictor.errors import FitError
from predictor.fit import Fitted, Preempted, choose_precision, fit
from predictor.module import SourceModule, load_module
from scr_runtime.config import SCRConfig
from tests.predictor.fitting import EPOCHS, data_of, measure, module_of, settings_of, write_harvest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]


class Stop(pl.Callback):
    """Sends this process a signal after so many steps, or in the first validation after them."""

    def __init__(self, step: int, in_validation: bool = False, signum: int = signal.SIGTERM) -> None:
        self.step, self.in_validation, self.signum = step, in_validation, signum

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.in_validation:
            os.kill(os.getpid(), self.signum)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.in_validation:
            os.kill(os.getpid(), self.signum)


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_harvest(tmp_path_factory.mktemp("shards"))


def run(harvested: Path, folder: Path, **settings: Any) -> Fitted:
    """A fit that does not resume unless it is asked to."""
    data = data_of(harvested, **settings.pop("data", {}))
    module = module_of(data, settings.pop("seed", 0), settings.pop("scr", None))
    callbacks = settings.pop("callbacks", [])
    return fit(module, data, folder, settings_of(**{"resume": False} | settings), logger=False, callbacks=callbacks)


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=True)


def same(one: Any, other: Any, path: str = "") -> None:
    """Compares everything in two checkpoints, bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, path=f"{path}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


@pytest.fixture(scope="module")
def undisturbed(harvested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(harvested, folder)
    return folder


def test_the_same_seed_gives_the_same_fit_bit_for_bit(harvested: Path, undisturbed: Path, tmp_path: Path) -> None:
    fitted = run(harvested, tmp_path)
    same(last(undisturbed), last(tmp_path))
    assert fitted.epochs == EPOCHS and not fitted.module.training
    same(dict(load_module(tmp_path / "best.ckpt").state_dict()), dict(fitted.module.state_dict()))
    assert fitted.score == last(tmp_path)["callbacks"]["_Keeper"]["score"]
    other = run(harvested, tmp_path / "other", seed=1)
    assert not torch.equal(other.module.predictor.project.weight, fitted.module.predictor.project.weight)


@pytest.mark.parametrize("stop", [Stop(5), Stop(8), Stop(10, in_validation=True), Stop(16)])
def test_sigterm_keeps_the_fit_and_resuming_ends_like_an_undisturbed_one(
    harvested: Path, undisturbed: Path, tmp_path: Path, stop: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"kept in .*last\.ckpt"):
        run(harvested, tmp_path, callbacks=[stop])
    assert signal.getsignal(signal.SIGTERM) is before
    assert last(tmp_path)["global_step"] == stop.step
    assert not json.loads((tmp_path / "fit.json").read_text())["finished"]
    fitted = run(harvested, tmp_path, resume=True)
    assert "resumes from" in " ".join(capsys.readouterr().out.split())
    same(last(undisturbed), last(tmp_path))
    assert fitted.epochs == EPOCHS


def test_a_stream_resumes_where_it_was(harvested: Path, tmp_path: Path) -> None:
    streamed = {"data": {"cache": "stream"}}
    run(harvested, tmp_path / "whole", **streamed)
    with pytest.raises(Preempted):
        run(harvested, tmp_path / "cut", callbacks=[Stop(8)], **streamed)
    run(harvested, tmp_path / "cut", resume=True, **streamed)
    same(last(tmp_path / "whole"), last(tmp_path / "cut"))


def test_patience_ends_a_fit_and_is_kept_when_it_was_killed_after_its_last_epoch(
    harvested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def constant(self: SourceModule, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 0.0, batch_size=1)
        self.log("val/mass", 0.5, batch_size=1)

    monkeypatch.setattr(SourceModule, "validation_step", constant)
    monkeypatch.setattr(SourceModule, "on_validation_epoch_end", lambda self: None)
    with pytest.raises(Preempted):
        run(harvested, tmp_path, patience=2, max_epochs=9, callbacks=[Stop(15, in_validation=True)])
    fitted = run(harvested, tmp_path, patience=2, max_epochs=9, resume=True)
    assert (fitted.epochs, fitted.score, last(tmp_path)["global_step"]) == (3, 0.5, 15)


@pytest.mark.parametrize("change", [{"max_epochs": 3}, {"seed": 1}, {"gradient_clip": None}])
def test_other_settings_start_from_the_beginning_and_are_named(
    harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    with pytest.raises(Preempted):
        run(harvested, tmp_path, callbacks=[Stop(8)])
    fitted = run(harvested, tmp_path, resume=True, **change)
    key = "initial_weights" if "seed" in change else next(iter(change))
    output = " ".join(capsys.readouterr().out.split())
    assert (
        f"had other settings, so this one starts from the beginning: {key} was" in output
        and "resumes from" not in output
    )
    whole = run(harvested, tmp_path / "whole", **change)
    same(dict(whole.module.state_dict()), dict(fitted.module.state_dict()))


def test_only_an_interrupted_fit_is_resumed_and_only_on_request(
    harvested: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Preempted):
        run(harvested, tmp_path, callbacks=[Stop(8)])
    run(harvested, tmp_path)  # from the beginning
    run(harvested, tmp_path, resume=True)  # from the beginning too: it was finished
    assert "resumes from" not in " ".join(capsys.readouterr().out.split())
    same(last(undisturbed), last(tmp_path))


@pytest.mark.parametrize(
    ("accelerator", "cuda", "abilities", "chosen"),
    [
        ("cpu", True, {"avx512_bf16": True}, "bf16-mixed"),
        ("auto", False, {"amx_bf16": True}, "bf16-mixed"),
        ("auto", False, {"avx512_bf16": False}, "32-true"),
        ("auto", True, {}, "bf16-mixed"),
        ("mps", False, {"avx512_bf16": True}, "32-true"),
    ],
)
def test_auto_takes_the_precision_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, cuda: bool, abilities: dict[str, bool], chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    assert choose_precision(accelerator) == chosen


def test_precision_is_checked_and_used(harvested: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"precision\n.*'auto', '32-true' or 'bf16-mixed'"):
        run(harvested, tmp_path, precision="16")
    fitted = run(harvested, tmp_path, precision="bf16-mixed", max_epochs=1)
    whole = run(harvested, tmp_path / "whole", max_epochs=1)
    assert fitted.score == pytest.approx(whole.score, abs=0.1)
    assert not torch.equal(fitted.module.predictor.project.weight, whole.module.predictor.project.weight)


def command(harvested: Path, folder: Path, *settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.predictor.fitting", str(harvested), str(folder), *settings],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_epochs(folder: Path, epochs: int, process: subprocess.Popen[str]) -> None:
    """Until last.ckpt is that of so many epochs, or the process ends."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / "last.ckpt").exists() and last(folder)["callbacks"]["_Keeper"]["epochs"] >= epochs:
            return
        time.sleep(0.01)
    raise AssertionError(f"the process ended first: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_resumes_a_process_that_got_the_signal(
    harvested: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    longer = "max_epochs=120", "patience=120"
    whole = command(harvested, tmp_path / "whole", *longer)
    out, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err
    stopped = command(harvested, tmp_path / "cut", *longer)
    wait_for_epochs(tmp_path / "cut", 3, stopped)
    stopped.send_signal(signum)
    output = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == (143 if signum == signal.SIGTERM else -9)
    assert ("the fit is kept in" in output) == (signum == signal.SIGTERM) and "Traceback" not in output
    assert 3 <= last(tmp_path / "cut")["callbacks"]["_Keeper"]["epochs"] < 120
    resumed = command(harvested, tmp_path / "cut", *longer)
    again, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    assert "resumes from" in again and again.splitlines()[-1] == out.splitlines()[-1]
    same(last(tmp_path / "whole"), last(tmp_path / "cut"))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(harvested: Path, undisturbed: Path, tmp_path: Path) -> None:
    one = command(harvested, tmp_path / "one")
    alone, err = one.communicate(timeout=200)
    assert one.returncode == 0, err
    two = command(harvested, tmp_path / "two", "devices=2")
    out, err = two.communicate(timeout=200)
    assert two.returncode == 0, err
    found, wanted = (json.loads(text.splitlines()[-1]) for text in (out, alone))
    # metrics of one fit's weights, found by two processes and by one
    module = load_module(tmp_path / "two" / "best.ckpt")
    assert found == pytest.approx({**wanted, **measure(module, data_of(harvested), 1)}, abs=1e-6)
    assert {"val/mass", "val/recall", "val/loss"} <= set(found)
    # and the fit itself: the same batches, the same gradients, the same loss of each epoch
    first, second = last(tmp_path / "one"), last(tmp_path / "two")
    same(last(undisturbed)["state_dict"], first["state_dict"])
    del first["state_dict"]["predictor.score.bias"]  # no map depends on it, and Adam makes steps of its rounding
    for name, weights in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], weights, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sigterm_reaches_both_processes_and_one_process_can_resume(
    harvested: Path, undisturbed: Path, tmp_path: Path
) -> None:
    settings = "max_epochs=400", "patience=400"
    stopped = command(harvested, tmp_path, "devices=2", *settings)
    wait_for_epochs(tmp_path, 2, stopped)
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 143 and "the fit is kept in" in output, output
    epochs = last(tmp_path)["callbacks"]["_Keeper"]["epochs"]
    assert 2 <= epochs < 400
    resumed = command(harvested, tmp_path, *settings)
    wait_for_epochs(tmp_path, epochs + 1, resumed)
    resumed.send_signal(signal.SIGTERM)
    assert "resumes from" in resumed.communicate(timeout=60)[0]


@pytest.mark.parametrize(
    "scr", [SCRConfig(source_fraction=0.25, exclude_border=False), SCRConfig(num_sources=3, suppress_claimed=True)]
)
def test_every_rule_of_choosing_sources_can_be_fitted_and_decides_whether_to_resume(
    harvested: Path, tmp_path: Path, scr: SCRConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Preempted):
        run(harvested, tmp_path, scr=scr, callbacks=[Stop(6)])
    record = json.loads((tmp_path / "fit.json").read_text())["fit"]
    assert all(value is None or isinstance(value, str | int | float) for value in record.values())  # flat
    assert record["source_fraction"] == scr.source_fraction and record["suppress_claimed"] == scr.suppress_claimed
    fitted = run(harvested, tmp_path, scr=dataclasses.replace(scr, strength=1.05), resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "resumes from" in said  # the strength of the edit is not the fit's business
    assert fitted.module.scr == dataclasses.replace(scr, strength=1.05) and fitted.score > 0
    with pytest.raises(Preempted):
        run(harvested, tmp_path, scr=scr, callbacks=[Stop(6)])
    run(harvested, tmp_path, resume=True)
    assert "starts from the beginning" in " ".join(capsys.readouterr().out.split())


def test_a_fit_that_diverges_names_the_key(harvested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = SourceModule.forward
    monkeypatch.setattr(SourceModule, "forward", lambda *inputs: scored(*inputs) * torch.nan)
    with pytest.raises(FitError, match=r"the fit diverged.* in every epoch; lower trainer\.learning_rate"):
        run(harvested, tmp_path, max_epochs=1)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_named(tmp_path: Path, split: str) -> None:
    splits = {"train": 8, "validation": 8, "test": 1}
    folders = [tmp_path / "empty", tmp_path / "whole"]
    for folder, counts in zip(folders, (splits | {split: 0}, splits), strict=True):
        folder.mkdir()
        write_harvest(folder, counts)
    data, whole = map(data_of, folders)
    module = module_of(whole)
    key = "samples" if split == "train" else "validation"
    with pytest.raises(FitError, match=rf"the {split} split has no maps.*harvest\.{key}"):
        fit(module, data, tmp_path / "fit", settings_of(), logger=False)
