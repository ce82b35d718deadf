"""SourcePredictor: the network of 120K parameters that predicts SCR's sources from the state layer's output.

Training and deployment share this one definition.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from scr_runtime.confidence import Judgement, check_calibration, check_drift, drift_ratio, interpolate
from scr_runtime.config import FREQUENCIES, PositionFeatures, PredictorConfig, SCRConfig
from scr_runtime.redistribute import Grid
from scr_runtime.rule import SourceRule

_KEPT_GRIDS = 64


class _Fold(NamedTuple):
    """Two affine maps of raw states: to a patch's projection, and to the question's features."""

    patch: Tensor  # [r, d]
    patch_bias: Tensor  # [r]
    question: Tensor | None = None  # [r or r + M, d]: gate or projection, and the components' weights
    question_bias: Tensor | None = None  # [r or r + M]


class SourcePredictor(nn.Module):
    """Scores every visual token of an image as a source of SCR.

    ``o_j = W gelu(U f_j + b) + c`` with ``f_j = [V z_j, (V z_j) * g(V q), mean, 3x3 mean, position_j]``: ``z`` and
    ``q`` are the state layer's output (block 0's, in the paper) at the patch and over the question, standardised by
    training statistics, ``V: d -> r`` is the factorised first layer that a 120K budget forces (decision D3), ``g`` a
    small affine gate. With one component
    ``o_j`` is the score; with M of them, ``score_j = log sum_m exp(a_m) softmax(o)_jm``, softmax over patches, where
    the log weights ``a`` are affine in ``V q`` (without a question, in the mean of ``V z``).

    Attributes:
        config: Sizes and features.
        info: What the predictor was fitted for: model, SCR settings, metrics, provenance. Filled by
            ``load_predictor``; empty for a network that is being trained.
        threshold: Calibrated confidence under which ``mode="auto"`` asks the diagnostic run.
        drift_typical: Spread of the features of an image like those of the fit; ``None`` before ``set_drift``.
        drift_limit: Drift over which an image's features are not like those of the fit; ``None``: no guard.
    """

    state_mean: Tensor
    state_std: Tensor
    question_mean: Tensor
    question_std: Tensor
    temperature: Tensor
    calibration_raw: Tensor
    calibration_expected: Tensor

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.info: dict[str, Any] = {}
        self.threshold: float = 0.0
        self.drift_typical: float | None = None
        self.drift_limit: float | None = None
        size, rank = config.hidden_size, config.rank
        assert rank is not None  # __post_init__ resolved it
        wide: dict[str, Any] = {"dtype": torch.float32}  # whatever the default is
        self.project = nn.Linear(size, rank, bias=False, **wide)  # V
        self.gate = nn.Linear(rank, rank, **wide) if config.question == "bilinear" else None  # g
        self.weights = nn.Linear(rank, config.components, **wide) if config.components > 1 else None  # a
        self.hidden = nn.Linear(config.features(rank), config.width, **wide)  # U
        self.score = nn.Linear(config.width, config.components, **wide)  # W
        for name in ("state", "question"):
            self.register_buffer(f"{name}_mean", torch.zeros(size, **wide))
            self.register_buffer(f"{name}_std", torch.ones(size, **wide))
        self.register_buffer("temperature", torch.tensor(1.0, **wide))
        self.register_buffer("calibration_raw", torch.tensor([0.0, 1.0], **wide))
        self.register_buffer("calibration_expected", torch.tensor([0.0, 1.0], **wide))
        self._kept_fold: tuple[tuple[object, ...], _Fold] | None = None

    def __repr__(self) -> str:
        """Names what it was fitted for, instead of its layers."""
        parts = [f"{self.count_parameters():,} parameters", f"hidden size {self.config.hidden_size}"]
        if self.info:
            scr, recall = SCRConfig.from_dict(self.info["scr"]), self.info.get("metrics", {}).get("test/recall")
            parts += [f"block {scr.state_layer}", scr.sources_in_words, f"threshold {self.threshold:.3f}"]
            parts += [f"recall {recall:.3f}"] if isinstance(recall, int | float) else []
        name = self.info.get("model", {}).get("name")
        return f"<SourcePredictor{f' for {name}' if name else ''}: {', '.join(parts)}>"

    def forward(self, states: Tensor, grid: Grid, question: Tensor | None = None) -> Tensor:
        """Scores patches.

        Args:
            states: [B, N, d] states of the image's patches behind the state layer, row-major; any float dtype.
            grid: Rows and columns, ``rows * columns == N``.
            question: [B, d] mean state of the question's text tokens there. Needed if ``config.reads_question``.

        Returns:
            [B, N] float32 logits: their softmax over eligible patches estimates the attention map.

        Raises:
            ValueError: If N or d don't fit, or the question is missing.
        """
        return self._score(*self._features(states, grid, question))

    def score_and_spread(self, states: Tensor, grid: Grid, question: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores patches and measures the features that the scores are made from.

        Args:
            states: As ``forward``'s.
            grid: As ``forward``'s.
            question: As ``forward``'s.

        Returns:
            The scores, and [B] float32: each image's standard deviation of all features over patches and channels,
            which ``drift`` compares with the usual one. NaN or infinity if a state is.
        """
        features, weights = self._features(states, grid, question)
        return self._score(features, weights), features.std((1, 2), correction=0)

    def drift(self, spread: Tensor) -> Tensor:
        """How many times wider, or narrower, an image's features spread than those of the fit: 1 is usual.

        What the network cannot see cannot mislead it: so its own features are judged, standardised and projected,
        and not the states.

        Args:
            spread: [B] as ``score_and_spread`` returns it.

        Returns:
            [B] float32, at least 1; infinity for features that don't vary or are not finite. Over ``drift_limit``
            the scores mean nothing. 1 without a guard.
        """
        return torch.ones_like(spread) if self.drift_typical is None else drift_ratio(spread, self.drift_typical)

    def judge(self, scores: Tensor, spread: Tensor | None, rule: SourceRule) -> Judgement:
        """How far this predictor's scores of some images can be trusted.

        Args:
            scores: [I, N] as ``forward`` returns them.
            spread: [I] as ``score_and_spread`` returns it; ``None`` if it was not measured: no image has drifted then.
            rule: How sources are chosen from the scores.
        """
        confidence = self.calibrate(rule.confidence(scores, self.temperature.to(scores.device)))
        drift = torch.ones_like(confidence) if spread is None else self.drift(spread)
        if spread is None or self.drift_limit is None:
            return Judgement(confidence, drift, torch.zeros_like(confidence, dtype=torch.bool))
        return Judgement(confidence, drift, drift > self.drift_limit)

    def _features(self, states: Tensor, grid: Grid, question: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, N, F] float32 that the hidden layer reads, and the components' log weights [B, M] if there are any."""
        batch, patches, size = states.shape
        rows, columns = grid
        if size != self.config.hidden_size or patches != rows * columns:
            raise ValueError(
                f"states of shape {tuple(states.shape)} don't fit a grid of {rows} x {columns} patches and "
                f"hidden_size={self.config.hidden_size}"
            )
        fold = self._fold()
        patch = functional.linear(states.float(), fold.patch, fold.patch_bias)  # [B, N, r]
        features = [patch]
        weights = None
        if fold.question is not None:
            if question is None:
                raise ValueError("this predictor reads the question: pass question=[B, d]")
            asked = functional.linear(question.float(), fold.question, fold.question_bias)  # [B, r or r + M]
            first, weights = asked[:, None, : patch.shape[-1]], asked[:, patch.shape[-1] :]
            features.append(patch * first if self.gate is not None else first.expand_as(patch))
        elif self.weights is not None:
            weights = self.weights(patch.mean(1))
        if self.config.context in ("mean", "both"):
            features.append(patch.mean(1, keepdim=True).expand_as(patch))
        if self.config.context in ("neighbourhood", "both"):
            image = patch.view(batch, rows, columns, -1).permute(0, 3, 1, 2)  # [B, r, rows, columns], no copy
            around = functional.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
            features.append(around.permute(0, 2, 3, 1).flatten(1, 2))
        if self.config.position != "none":
            places = self._places(grid, states.device)
            features.append(places.expand(batch, -1, -1))
        features = torch.cat(features, dim=-1) if len(features) > 1 else patch
        return features, weights if self.weights is not None else None

    def _places(self, grid: Grid, device: torch.device) -> Tensor:
        """[N, P] features of the patches' places."""
        return _kept_places(grid, self.config.position, device)

    def _score(self, features: Tensor, weights: Tensor | None) -> Tensor:
        """[B, N] float32 scores, also where autocast made the layers' outputs narrower."""
        out = self.score(functional.gelu(self.hidden(features))).float()  # [B, N, M]
        if weights is None:
            return out.squeeze(-1)
        logs = out.log_softmax(1) + weights.float()[:, None]
        return logs[..., 0] - logs.log_softmax(-1)[..., 0]  # logsumexp over M, which is nine kernels on a GPU

    def _fold(self) -> _Fold:
        """Standardising folded into the projections: V ((h - mean) / std) = (V / std) h - (V / std) mean.

        A network that trains folds at each call. One that doesn't does it once: what the fold was made from is
        known by address and version, so that loading or moving the network makes a new one.
        """
        made_from = [self.project.weight, self.state_mean, self.state_std]
        if self.config.reads_question:
            made_from += [self.question_mean, self.question_std]
            made_from += [
                value for layer in (self.gate, self.weights) if layer is not None for value in layer.parameters()
            ]
        if any(tensor.requires_grad or tensor.is_inference() for tensor in made_from):
            return self._make_fold()
        key = tuple((tensor.data_ptr(), tensor._version, tensor.device) for tensor in made_from)
        kept = self._kept_fold
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept_fold = (key, self._make_fold())
        return kept[1]

    def _make_fold(self) -> _Fold:
        patch = self.project.weight / self.state_std  # [r, d]
        patch_bias = -(patch @ self.state_mean)
        if not self.config.reads_question:
            return _Fold(patch, patch_bias)
        project = self.project.weight / self.question_std  # [r, d]
        shift = -(project @ self.question_mean)  # [r]
        maps, biases = [project], [shift]
        if self.gate is not None:
            maps, biases = [self.gate.weight @ project], [self.gate.weight @ shift + self.gate.bias]
        if self.weights is not None:
            maps.append(self.weights.weight @ project)
            biases.append(self.weights.weight @ shift + self.weights.bias)
        return _Fold(patch, patch_bias, torch.cat(maps), torch.cat(biases))

    def set_statistics(
        self,
        state_mean: Tensor,
        state_std: Tensor,
        question_mean: Tensor | None = None,
        question_std: Tensor | None = None,
    ) -> None:
        """Stores the training set's feature statistics, each [d]; a zero deviation is replaced by one."""
        given = {"state_mean": state_mean, "state_std": state_std}
        given |= {
            name: value
            for name, value in (("question_mean", question_mean), ("question_std", question_std))
            if value is not None
        }
        for name, value in given.items():
            if name.endswith("std"):
                value = torch.where(value > 0, value, torch.ones_like(value))
            getattr(self, name).copy_(value)

    def set_calibration(self, raw: Tensor, expected: Tensor, threshold: float, temperature: float = 1.0) -> None:
        """Stores the confidence calibration.

        Args:
            raw: [M] ascending raw confidences.
            expected: [M] non-decreasing expected shares of true sources at those.
            threshold: Calibrated confidence under which ``auto`` falls back.
            temperature: Of the raw confidences, see ``SourceRule.confidence``.

        Raises:
            ValueError: If the knots are not finite, not ascending or differ in number, the temperature is not over 0,
                or the threshold is not finite.
        """
        check_calibration(raw, expected, temperature)
        if not math.isfinite(threshold):
            raise ValueError(f"threshold {threshold}: expected a finite number")
        self.calibration_raw = raw.float().to(self.calibration_raw.device, copy=True)  # the caller's may change
        self.calibration_expected = expected.float().to(self.calibration_raw.device, copy=True)
        self.temperature.fill_(temperature)
        self.threshold = float(threshold)

    def check_calibration(self) -> None:
        """Checks the stored calibration.

        Raises:
            ValueError: If ``set_calibration`` would not have stored it.
        """
        check_calibration(self.calibration_raw, self.calibration_expected, float(self.temperature))

    def set_drift(self, typical: float, limit: float) -> None:
        """Stores the drift guard.

        Args:
            typical: Spread of a usual image's features, over 0.
            limit: Largest drift of an image like those of the fit, at least 1.

        Raises:
            ValueError: If a value is out of range.
        """
        check_drift(typical, limit)
        self.drift_typical, self.drift_limit = float(typical), float(limit)

    def calibrate(self, raw: Tensor) -> Tensor:
        """Maps raw confidences [...] to expected shares of true sources [...], piecewise linearly."""
        return interpolate(raw, self.calibration_raw, self.calibration_expected)

    def count_parameters(self) -> int:
        """Number of parameters that a fit trains, without buffers (statistics, calibration)."""
        return sum(parameter.numel() for parameter in self.parameters())


@functools.lru_cache(maxsize=_KEPT_GRIDS)
@torch.inference_mode(False)
def _kept_places(grid: Grid, kind: PositionFeatures, device: torch.device) -> Tensor:
    """``position_features``, kept per grid; do not write to them."""
    axes = [torch.linspace(-1, 1, side, dtype=torch.float32) for side in grid]
    return position_features(axes[0], axes[1], kind).to(device)


def position_features(rows: Tensor, columns: Tensor, kind: PositionFeatures) -> Tensor:
    """[N, P] features of the patches' places, each within [-1, 1], from the rows' and the columns' places there."""
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    features = [row, column, 1 - torch.maximum(row.abs(), column.abs())]
    if kind == "fourier":
        features += [
            wave(torch.pi * frequency * axis)
            for frequency in FREQUENCIES
            for axis in (row, column)
            for wave in (torch.sin, torch.cos)
        ]
    return torch.stack(features, dim=-1).flatten(0, 1)
