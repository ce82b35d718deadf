"""SourcePredictor: the network of 120K parameters that guesses SCR's sources from block-0 states.

Training and deployment share this one definition.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from scr_runtime.errors import ConfigurationError
from scr_runtime.redistribute import Grid, rank_patches

POSITIONS = ("none", "linear", "fourier")
QUESTIONS = ("none", "concat", "bilinear")
CONTEXTS = ("none", "mean", "neighbourhood", "both")

_FREQUENCIES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)  # periods over half a grid's side
_POSITION_FEATURES = {"none": 0, "linear": 3, "fourier": 3 + 4 * len(_FREQUENCIES)}
_MAX_RANK = 512


@dataclass(frozen=True)
class PredictorConfig:
    """Sizes and features of a SourcePredictor.

    Attributes:
        hidden_size: d, width of the VLM's residual stream.
        rank: r, width of the factorised first layer. ``None`` takes the rank whose parameter count is nearest to
            ``budget`` (decision D3): at most half a rank's parameters off it, which is within 3 % for the hidden sizes
            of released models, 1,024 to 8,192. A small model, whose rank is at most its hidden size, stays below.
        width: Hidden units, 256 in the paper.
        budget: Trainable parameters aimed at, 120,000 in the paper.
        position: What is told of a patch's place: ``"none"``; ``"linear"``: row, column and distance to the border;
            ``"fourier"``: sines and cosines of row and column too.
        question: How the mean state of the question's tokens enters: ``"none"``; ``"concat"``: its projection beside
            the patch's; ``"bilinear"``: an affine gate of it times the patch's.
        context: What is told of the other patches: ``"none"``, the ``"mean"`` projection of the image, that of the
            3 x 3 ``"neighbourhood"``, or ``"both"``.
        components: Softmaxes over the patches whose mixture is the predicted map; 1 is a plain softmax. An attention
            map is itself a mean of softmaxes: one per layer, head and text token.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    hidden_size: int
    rank: int | None = None
    width: int = 256
    budget: int = 120_000
    position: str = "fourier"
    question: str = "bilinear"
    context: str = "both"
    components: int = 24

    def __post_init__(self) -> None:
        for name in ("hidden_size", "width", "budget", "components"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"PredictorConfig.{name}={getattr(self, name)}: expected at least 1")
        for name, choices in (("position", POSITIONS), ("question", QUESTIONS), ("context", CONTEXTS)):
            if getattr(self, name) not in choices:
                raise ConfigurationError(
                    f"PredictorConfig.{name}={getattr(self, name)!r}: expected one of {list(choices)}"
                )
        if self.rank is None:
            ranks = range(1, min(self.hidden_size, _MAX_RANK) + 1)
            nearest = min(ranks, key=lambda rank: abs(self._count(rank) - self.budget))
            object.__setattr__(self, "rank", nearest)
        elif not 1 <= self.rank <= self.hidden_size:
            raise ConfigurationError(
                f"PredictorConfig.rank={self.rank}: expected 1 to hidden_size={self.hidden_size}, or None"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PredictorConfig:
        """Builds a config from ``to_dict``'s result.

        Raises:
            ConfigurationError: If a key is unknown or missing, or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            raise ConfigurationError(f"PredictorConfig: expected the keys {sorted(known)}, got {sorted(values)}")
        return cls(**values)

    @property
    def reads_question(self) -> bool:
        """Whether the scores depend on the question."""
        return self.question != "none"

    def features(self, rank: int) -> int:
        """Features of a patch that the hidden layer reads."""
        blocks = 1 + self.reads_question + {"none": 0, "both": 2}.get(self.context, 1)
        return blocks * rank + _POSITION_FEATURES[self.position]

    def _count(self, rank: int) -> int:
        gate = rank * (rank + 1) if self.question == "bilinear" else 0
        weights = self.components * (rank + 1) if self.components > 1 else 0
        hidden = (self.features(rank) + 1) * self.width
        return self.hidden_size * rank + gate + weights + hidden + self.components * (self.width + 1)


class _Fold(NamedTuple):
    """Two affine maps of raw states: to a patch's projection, and to what the question brings."""

    patch: Tensor  # [r, d]
    patch_bias: Tensor  # [r]
    question: Tensor | None = None  # [r or r + M, d]: gate or projection, and the components' weights
    question_bias: Tensor | None = None  # [r or r + M]


class SourcePredictor(nn.Module):
    """Scores every visual token of an image as a source of SCR.

    ``o_j = W gelu(U f_j + b) + c`` with ``f_j = [V z_j, (V z_j) * g(V q), mean, 3x3 mean, position_j]``: ``z`` and
    ``q`` are block-0 states of the patch and of the question, standardised by training statistics, ``V: d -> r`` is
    the factorised first layer that a 120K budget forces (decision D3), ``g`` a small affine gate. With one component
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
        self.project = nn.Linear(size, rank, bias=False)  # V
        self.gate = nn.Linear(rank, rank) if config.question == "bilinear" else None  # g
        self.weights = nn.Linear(rank, config.components) if config.components > 1 else None  # a
        self.hidden = nn.Linear(config.features(rank), config.width)  # U
        self.score = nn.Linear(config.width, config.components)  # W
        for name in ("state", "question"):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("calibration_raw", torch.tensor([0.0, 1.0]))
        self.register_buffer("calibration_expected", torch.tensor([0.0, 1.0]))
        self._positions: dict[tuple[Grid, torch.device], Tensor] = {}
        self._kept_fold: tuple[tuple[object, ...], _Fold] | None = None

    def forward(self, states: Tensor, grid: Grid, question: Tensor | None = None) -> Tensor:
        """Scores patches.

        Args:
            states: [B, N, d] block-0 states of the image's patches, row-major; any float dtype.
            grid: Rows and columns, ``rows * columns == N``.
            question: [B, d] mean block-0 state of the question's text tokens. Needed if ``config.reads_question``.

        Returns:
            [B, N] float32 logits: their softmax over eligible patches estimates the attention map.

        Raises:
            ValueError: If N or d don't fit, or the question is missing.
        """
        return self._score(*self._features(states, grid, question))

    def score_and_spread(self, states: Tensor, grid: Grid, question: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores patches, and tells how far the features reach that the scores were made from.

        Args:
            states: As ``forward``'s.
            grid: As ``forward``'s.
            question: As ``forward``'s.

        Returns:
            The scores, and [B] float32: each image's standard deviation of all features over patches and channels.
            ``drift`` says whether that is usual. NaN or infinity if a state is.
        """
        features, weights = self._features(states, grid, question)
        return self._score(features, weights), features.std((1, 2), correction=0)

    def drift(self, spread: Tensor) -> Tensor:
        """How many times wider, or narrower, an image's features reach than those of the fit: 1 is usual.

        What the network cannot see cannot mislead it: so its own features are judged, standardised and projected,
        and not the states.

        Args:
            spread: [B] as ``score_and_spread`` returns it.

        Returns:
            [B] float32, at least 1; infinity for features that don't vary or are not finite. Over ``drift_limit``
            the scores mean nothing. 1 without a guard.
        """
        if self.drift_typical is None:
            return torch.ones_like(spread)
        ratio = spread / self.drift_typical
        return torch.maximum(ratio, 1 / ratio).nan_to_num(nan=math.inf, posinf=math.inf)

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
            features.append(self._position_features(grid, states.device).expand(batch, -1, -1))
        features = torch.cat(features, dim=-1) if len(features) > 1 else patch
        return features, weights if self.weights is not None else None

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
            temperature: Of the raw confidences, see ``raw_confidence``.

        Raises:
            ValueError: If the knots are not ascending or differ in number, or the temperature is not over 0.
        """
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"calibration temperature {temperature}: expected a number over 0")
        if raw.ndim != 1 or raw.shape != expected.shape or len(raw) < 2:
            raise ValueError(f"calibration knots of shapes {tuple(raw.shape)} and {tuple(expected.shape)}")
        if not (bool((raw.diff() > 0).all()) and bool((expected.diff() >= 0).all())):
            raise ValueError("calibration knots must be ascending in raw and non-decreasing in expected")
        self.calibration_raw = raw.float().to(self.calibration_raw.device)
        self.calibration_expected = expected.float().to(self.calibration_raw.device)
        self.temperature.fill_(temperature)
        self.threshold = float(threshold)

    def set_drift(self, typical: float, limit: float) -> None:
        """Stores the drift guard.

        Args:
            typical: Spread of a usual image's features, over 0.
            limit: Largest drift of an image like those of the fit, at least 1.

        Raises:
            ValueError: If a value is out of range.
        """
        if not (math.isfinite(typical) and typical > 0 and math.isfinite(limit) and limit >= 1):
            raise ValueError(f"typical={typical}, limit={limit}: expected a spread over 0 and a ratio of at least 1")
        self.drift_typical, self.drift_limit = float(typical), float(limit)

    def calibrate(self, raw: Tensor) -> Tensor:
        """Maps raw confidences [...] to expected shares of true sources [...], piecewise linearly."""
        knots, values = self.calibration_raw, self.calibration_expected
        right = torch.searchsorted(knots, raw.contiguous()).clamp(1, len(knots) - 1)
        left = right - 1
        step = ((raw - knots[left]) / (knots[right] - knots[left])).clamp(0.0, 1.0)
        return values[left] + step * (values[right] - values[left])

    def count_parameters(self) -> int:
        """Number of parameters that a fit trains; buffers (statistics, calibration) are not among them."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _position_features(self, grid: Grid, device: torch.device) -> Tensor:
        """[N, P] features of the patches' places, each within [-1, 1]."""
        key = (grid, device)
        if key not in self._positions:
            rows, columns = grid
            row = torch.linspace(-1, 1, rows)[:, None].expand(rows, columns)
            column = torch.linspace(-1, 1, columns)[None, :].expand(rows, columns)
            features = [row, column, 1 - torch.maximum(row.abs(), column.abs())]
            if self.config.position == "fourier":
                features += [
                    wave(torch.pi * frequency * axis)
                    for frequency in _FREQUENCIES
                    for axis in (row, column)
                    for wave in (torch.sin, torch.cos)
                ]
            self._positions[key] = torch.stack(features, dim=-1).flatten(0, 1).to(device)
        return self._positions[key]


def raw_confidence(
    scores: Tensor, eligible: Tensor, k: int, temperature: Tensor | float = 1.0, claims: Tensor | None = None
) -> Tensor:
    """How far the chosen patches stand out from the first that was not chosen.

    A patch whose score is near the cut might as well be on its other side; ``sigmoid((score - cut) / temperature)`` is
    the chance that it is on this one, if scores err logistically. (The share of the predicted map on the chosen
    patches, which is the obvious candidate, ranks images far worse by their recall: docs/results.md.)

    Args:
        scores: [I, N] logits of the predictor.
        eligible: [N] or [I, N] bool, patches that can be sources, more than k of them.
        k: Number of sources.
        temperature: Spread of the scores' errors, fitted on validation rows.
        claims: See ``rank_patches``; the first that was not chosen is then the one that would come next.

    Returns:
        [I] float32 in [0.5, 1]: mean of that chance over the k chosen patches. Under 0.5 is possible with ``claims``
        alone, where claimed patches had to be chosen.
    """
    ranked = rank_patches(scores, eligible, k + 1, claims)[0]
    cut = ranked[:, k - 1 : k + 1].mean(-1, keepdim=True)
    return torch.sigmoid((ranked[:, :k] - cut) / temperature).mean(-1)
