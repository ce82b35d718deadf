from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from predictor.baselines import evaluate, floors
from predictor.batch import rule_of
from predictor.errors import FitError
from predictor.losses import LOSSES
from predictor.metrics import METRICS, SourceMetrics
from predictor.module import Moments, SourceModule, load_module, rate_factor
from predictor.settings import FitSettings, LossName
from scr_runtime.config import PredictorConfig, SCRConfig

MakeLoader = Callable[..., DataLoader[dict[str, Any]]]
SIZE, K = 24, 6

pytestmark = [
    # Lightning recommends workers for loaders that have none; these loaders hold a few rows in memory.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Lightning 2.6 still asks torch's pytree in the way that torch 2.13 deprecates.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]


def _trainer(epochs: int = 1, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
    }
    return pl.Trainer(max_epochs=epochs, **(defaults | settings))


SCR = SCRConfig(num_sources=K)


def _module(scr: SCRConfig = SCR, loss: LossName = "kl", weight_decay: float = 0.01, **network: Any) -> SourceModule:
    sizes: dict[str, Any] = {"hidden_size": SIZE, "width": 64, "context": "both"} | network
    settings = FitSettings(learning_rate=3e-3, warmup_fraction=0.05, weight_decay=weight_decay)
    return SourceModule(PredictorConfig(**sizes), scr, settings, loss)


Fitted = tuple[SourceModule, pl.Trainer]


def _fit(make_loader: MakeLoader, epochs: int, images: int, **settings: Any) -> Fitted:
    pl.seed_everything(0, verbose=False)
    module = _module(**settings)
    train = make_loader(images=images, seed=1, shuffle=True)
    module.compute_statistics(make_loader(images=images, seed=1))
    trainer = _trainer(epochs)
    trainer.fit(module, train, make_loader(seed=2))
    return module, trainer


def test_learns_far_more_than_the_position(make_loader: MakeLoader) -> None:
    module, trainer = _fit(make_loader, epochs=12, images=400)
    assert {"train/loss", "val/loss"} | {f"val/{name}" for name in METRICS} <= set(trainer.logged_metrics)

    test = make_loader(seed=3, images=60)
    (logged,) = trainer.validate(module, test, verbose=False)
    assert set(logged) == {"val/loss"} | {f"val/{name}" for name in METRICS}
    position = evaluate(floors(make_loader(seed=1, images=400), SCR)["position"], test, SCR)
    assert position["mass"].mean() < 0.5
    assert logged["val/mass"] > 0.9
    assert logged["val/recall"] > position["recall"].mean() + 0.4

    rows = evaluate(module.score, test, SCR)  # outside a Trainer: the same numbers
    for name in METRICS:
        assert rows[name].mean() == pytest.approx(logged[f"val/{name}"], abs=1e-5)


@pytest.mark.parametrize("loss", ["bce", "mse_log"])
def test_other_losses_learn_too(make_loader: MakeLoader, loss: LossName) -> None:
    module, _ = _fit(make_loader, epochs=4, images=200, loss=loss)
    untrained = evaluate(_module().score, make_loader(seed=3), SCR)
    assert evaluate(module.score, make_loader(seed=3), SCR)["mass"].mean() > untrained["mass"].mean() + 0.2


def test_a_predictor_that_reads_nothing_but_states_fits(make_loader: MakeLoader) -> None:
    module, trainer = _fit(
        make_loader, epochs=1, images=40, position="none", question="none", context="none", components=1
    )
    assert module.predictor.gate is None
    assert math.isfinite(trainer.logged_metrics["val/mass"])


def test_same_seed_same_weights(make_loader: MakeLoader) -> None:
    first, _ = _fit(make_loader, epochs=2, images=40)
    second, _ = _fit(make_loader, epochs=2, images=40)
    for name, value in first.state_dict().items():
        assert value.equal(second.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_equal_a_direct_computation(make_loader: MakeLoader, dtype: torch.dtype) -> None:
    loader = make_loader(images=25, dtype=dtype, batch_size=17)
    module = _module()
    module.compute_statistics(loader)
    batches = list(loader)
    assert batches[0]["states"].dtype == dtype
    for name, values in (
        ("state", torch.cat([b["states"] for b in batches]).flatten(0, 1).double()),
        ("question", torch.cat([b["question"] for b in batches]).double()),
    ):
        wanted_std, wanted_mean = torch.std_mean(values, dim=0, correction=0)
        mean, std = getattr(module.predictor, f"{name}_mean"), getattr(module.predictor, f"{name}_std")
        torch.testing.assert_close(mean, wanted_mean.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(std, wanted_std.float(), rtol=1e-5, atol=1e-6)


def test_moments_keep_the_variance_of_a_feature_with_a_large_mean() -> None:
    values = 10_000 + torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    moments = Moments(1)
    for part in values.split(37):
        moments.add(part)
    mean, std = moments.mean_and_std()
    torch.testing.assert_close(mean, values.double().mean(dim=0).float())
    torch.testing.assert_close(std, values.double().std(dim=0, correction=0).float(), rtol=1e-4, atol=0)


def test_statistics_reject_overflown_states(make_loader: MakeLoader) -> None:
    batch = next(iter(make_loader()))
    batch["states"][3, 2, 1] = torch.inf
    with pytest.raises(FitError, match="bfloat16"):
        _module().compute_statistics([batch])


def test_statistics_reject_an_empty_set() -> None:
    with pytest.raises(FitError, match="empty"):
        _module().compute_statistics([])


def test_fit_without_statistics_is_rejected(make_loader: MakeLoader) -> None:
    with pytest.raises(RuntimeError, match="compute_statistics"):
        _trainer().fit(_module(), make_loader(), make_loader(seed=2))


def test_best_checkpoint_round_trip(make_loader: MakeLoader, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module = _module(rank=5, loss="bce")
    module.compute_statistics(make_loader())
    best = ModelCheckpoint(tmp_path, monitor="val/mass", mode="max")
    trainer = _trainer(2, enable_checkpointing=True, callbacks=[best], default_root_dir=tmp_path)
    trainer.fit(module, make_loader(), make_loader(seed=2))

    loaded = load_module(best.best_model_path)
    assert loaded.hyper_parameters == module.hyper_parameters and not loaded.training
    assert loaded.has_statistics and loaded.predictor.state_std.equal(module.predictor.state_std)
    rows = evaluate(loaded.score, make_loader(seed=2), SCR)
    assert rows["mass"].mean() == pytest.approx(float(best.best_model_score or 0), abs=1e-5)


class _StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def test_resumes_to_the_end_of_an_undisturbed_run(make_loader: MakeLoader, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    whole = _module()
    whole.compute_statistics(make_loader())
    cut = copy.deepcopy(whole)
    _trainer(4).fit(whole, make_loader(), make_loader(seed=2))

    stopped = _trainer(4, callbacks=[_StopAfter(2)])
    stopped.fit(cut, make_loader(), make_loader(seed=2))
    assert stopped.current_epoch == 2
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    resumed = _module()  # without statistics: they come with the checkpoint
    path = str(tmp_path / "last.ckpt")
    _trainer(4).fit(resumed, make_loader(), make_loader(seed=2), ckpt_path=path, weights_only=True)
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name


def _plain(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_plain, value.values() if isinstance(value, dict) else value))
    return value is None or type(value) in (int, float, str, bool)


def test_hyper_parameters_are_plain() -> None:
    scr = SCRConfig(num_sources=K, edit_layers=(1, 2), suppress_claimed=True)
    module = _module(scr, loss="bce", rank=5)
    saved = module.hyper_parameters
    assert set(saved) == {"network", "scr", "settings", "loss"} and _plain(saved)
    assert saved["network"]["hidden_size"] == SIZE and saved["scr"]["edit_layers"] == [1, 2]


class _Trainer(FitSettings):
    """The configuration's section has more keys, which are not the module's business."""

    batch_size: int = 64


def test_more_settings_than_the_fits_own_are_left_out() -> None:
    own = SourceModule(PredictorConfig(SIZE), SCR, FitSettings(patience=3))
    assert SourceModule(PredictorConfig(SIZE), SCR, _Trainer(patience=3)).hyper_parameters == own.hyper_parameters


def test_a_module_survives_pickling() -> None:
    """As a spawned process gets it."""
    module = _module(SCRConfig(num_sources=K, source_fraction=0.1), loss="lambdarank")
    copied = pickle.loads(pickle.dumps(module))
    assert copied.hyper_parameters == module.hyper_parameters and copied.scr == module.scr
    for name, value in module.state_dict().items():
        assert value.equal(copied.state_dict()[name]), name


def test_a_checkpoint_of_the_former_version_is_read(make_loader: MakeLoader, tmp_path: Path) -> None:
    module = _module(SCRConfig(num_sources=7, connectivity=4, suppress_claimed=True), loss="mse_log", rank=5)
    module.compute_statistics(make_loader())
    flat = {
        "hidden_size": SIZE, "rank": None, "width": 64, "budget": 120_000, "position": "fourier",
        "question": "bilinear", "context": "both", "components": 24, "loss": "mse_log", "num_sources": 7,
        "exclude_border": True, "connectivity": 4, "suppress_claimed": True, "learning_rate": 3e-3,
        "weight_decay": 0.01, "warmup_fraction": 0.05,
    }  # fmt: skip
    for rank in (5, None):  # as given; as it follows from the budget
        if rank is None:
            module = _module(SCRConfig(num_sources=7, connectivity=4, suppress_claimed=True), loss="mse_log")
        former = {"hyper_parameters": flat | {"rank": rank}, "state_dict": module.state_dict(), "epoch": 3}
        torch.save(former, tmp_path / "best.ckpt")
        loaded = load_module(tmp_path / "best.ckpt")
        assert loaded.hyper_parameters == module.hyper_parameters
        for name, value in module.state_dict().items():
            assert value.equal(loaded.state_dict()[name]), name


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*best\.ckpt: run train\.py first"):
        load_module(path)
    torch.save({"state_dict": {}, "hyper_parameters": _module().hyper_parameters}, path)
    whole = path.read_bytes()
    for content in (b"", b"{}", whole[: len(whole) // 2], whole):
        path.write_bytes(content)
        with pytest.raises(FitError, match=r"best\.ckpt is no checkpoint that this version reads"):
            load_module(path)


@pytest.mark.parametrize("scr", [SCRConfig(source_fraction=0.2), SCRConfig(num_sources=K, suppress_claimed=True)])
@pytest.mark.parametrize("loss", ["bce", "lambdarank"])
def test_a_fit_uses_the_rule_of_the_settings(make_loader: MakeLoader, scr: SCRConfig, loss: LossName) -> None:
    """Not only loss and metrics one by one, but the module's own."""
    module = _module(scr, loss)
    module.compute_statistics(make_loader())
    loader = make_loader(seed=2, batch_size=7)
    (logged,) = _trainer().validate(module, loader, verbose=False)
    rows = evaluate(module.score, loader, scr)
    other = evaluate(module.score, loader, SCRConfig(num_sources=K))
    for name in METRICS:
        assert logged[f"val/{name}"] == pytest.approx(rows[name].mean(), abs=1e-5)
    assert abs(other["mass"].mean() - rows["mass"].mean()) > 1e-3
    losses = [
        LOSSES[loss](module.score(batch), batch["attention"], rule_of(batch, scr)) * len(batch["key"])
        for batch in loader
    ]
    assert logged["val/loss"] == pytest.approx(float(sum(losses)) / len(rows["mass"]), rel=1e-5)


def test_validation_metrics_are_those_of_the_set(make_loader: MakeLoader) -> None:
    module = _module()
    module.compute_statistics(make_loader())
    loader = make_loader(seed=2, batch_size=7)
    (logged,) = _trainer().validate(module, loader, verbose=False)
    rows = evaluate(module.score, loader, SCR)
    for name in METRICS:
        assert logged[f"val/{name}"] == pytest.approx(rows[name].mean(), abs=1e-5)
    assert isinstance(module.val_metrics, SourceMetrics) and module.val_metrics.count == 0


def test_weight_decay_is_for_matrices_only(make_loader: MakeLoader) -> None:
    module = _module(weight_decay=0.3)
    module.compute_statistics(make_loader())
    trainer = _trainer(1)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    decayed, plain = trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(module.parameters()))
    assert decayed["lr"] == pytest.approx(0, abs=1e-9)  # the cosine has ended


def test_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 10, 100) for step in range(101)]
    assert factors[:11] == sorted(factors[:11]) and factors[10] == max(factors) == 1
    assert factors[10:] == sorted(factors[10:], reverse=True) and factors[100] == pytest.approx(0)
    assert 0 < factors[0] < 0.1
    assert rate_factor(0, 0, 5) == 1


def test_bad_settings_name_the_legal_ones() -> None:
    with pytest.raises(ValueError, match=r"'mse'; legal: kl, bce, mse_log, lambdarank\. Did you mean 'mse_log'"):
        _module(loss="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"warmup_fraction\n.*less than 1"):
        FitSettings(warmup_fraction=1.0)


def test_endless_training_is_rejected(make_loader: MakeLoader) -> None:
    module = _module()
    module.compute_statistics(make_loader())
    with pytest.raises(ValueError, match="max_epochs"):
        _trainer(-1, max_time="00:00:00:01").fit(module, make_loader(), make_loader(seed=2))
