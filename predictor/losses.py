"""Losses that train a predictor to find the patches that a two-pass diagnostic run would choose as sources.

Every loss has the same signature, so that a configuration key can name one of `LOSSES`:

    loss(scores [B, N], attention [B, N], rule) -> scalar (float32, mean over rows)

`attention` is the raw map A (not normalised, as the harvest stores it), `rule` the sources' rule of the batch's grid.
A row without any attention on its eligible patches has no target; it counts neither in the sum nor in the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from predictor.settings import LossName
from scr_runtime.rule import SourceRule

Loss = Callable[[Tensor, Tensor, SourceRule], Tensor]

_LOG_FLOOR = 1e-6
"""Smallest share of a row's attention that a logarithm sees; far below 1/N for any patch grid."""


def normalised_target(attention: Tensor, eligible: Tensor) -> Tensor:
    """Turns attention maps into distributions over the eligible patches.

    Args:
        attention: [B, N] non-negative maps on any scale.
        eligible: [N] bool.

    Returns:
        [B, N] float32; a row sums to 1, or is all zeros if it has no attention on eligible patches.
    """
    mass = attention.float().masked_fill(~eligible, 0.0)
    total = mass.sum(dim=-1, keepdim=True)
    return mass / total.where(total > 0, 1.0)


def kl(scores: Tensor, attention: Tensor, rule: SourceRule) -> Tensor:
    """Listwise KL divergence of softmax(scores) from the sum-normalised map, in nats.

    The top-one ListNet loss (Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach",
    ICML 2007) with the map itself as the target distribution, less the target's own entropy: a perfect
    prediction has loss 0.
    """
    target = normalised_target(attention, rule.eligible)
    log_predicted = scores.float().masked_fill(~rule.eligible, -torch.inf).log_softmax(dim=-1)
    log_predicted = log_predicted.masked_fill(~rule.eligible, 0.0)  # 0 * -inf would be nan
    divergence = (torch.xlogy(target, target) - target * log_predicted).sum(dim=-1)  # [B]
    return _mean_over_rows(divergence, target)


def bce(scores: Tensor, attention: Tensor, rule: SourceRule) -> Tensor:
    """Binary cross-entropy of membership in the map's K sources, averaged over the eligible patches, in nats.

    Treats each patch as its own yes/no question ("is it a source?"), as a plain reading of the paper's
    One-Pass SCR (arXiv 2602.22469) does.
    """
    target = normalised_target(attention, rule.eligible)
    member = torch.zeros_like(target).scatter_(-1, rule.choose(attention), 1.0)
    logits = scores.float().masked_fill(~rule.eligible, 0.0)
    per_patch = F.binary_cross_entropy_with_logits(logits, member, reduction="none")
    return _mean_over_rows(_mean_over_patches(per_patch, rule.eligible), target)


def mse_log(scores: Tensor, attention: Tensor, rule: SourceRule) -> Tensor:
    """Squared error between scores and the log of the sum-normalised map, averaged over eligible patches.

    Regression on log-attention, as KVzap (arXiv 2601.07891) fits its token scores. Shares under 1e-6 of a row (zeros
    above all) count as 1e-6.
    """
    target = normalised_target(attention, rule.eligible)
    error = scores.float().masked_fill(~rule.eligible, 0.0) - target.clamp_min(_LOG_FLOOR).log()
    return _mean_over_rows(_mean_over_patches(error.square(), rule.eligible), target)


def lambdarank(scores: Tensor, attention: Tensor, rule: SourceRule) -> Tensor:
    """Pairwise logistic loss between each of the map's K sources and each patch below it, by the change of DCG.

    LambdaRank (Burges, "From RankNet to LambdaRank to LambdaMART: An Overview", MSR-TR-2010-82): a pair counts as
    much as exchanging the two in the predicted order would change the discounted cumulative gain, with the share of
    the attention as gain and discount 1 / log2(rank + 1), over the ideal. Only pairs that concern the sources are
    taken (the first of the pair is one), so the loss looks at the top of the list alone. The weights are constants to
    the gradient. Scores come out on an arbitrary scale: their softmax is no estimate of the map.
    """
    target = normalised_target(attention, rule.eligible)
    order = rule.rank(scores)[1]  # [B, N]
    places = torch.arange(2, target.shape[-1] + 2, device=target.device, dtype=torch.float32)
    discounts = (1 / places.log2()).expand_as(target)  # [B, N], of each place
    discount = torch.zeros_like(target).scatter_(-1, order, discounts)  # [B, N], of each patch
    ideal = (target.sort(dim=-1, descending=True).values * discounts).sum(dim=-1)  # [B]
    top = rule.choose(attention)  # [B, K]
    gain = target.gather(-1, top)[..., None] - target[:, None, :]  # [B, K, N]
    weight = gain.clamp_min(0) * (discount.gather(-1, top)[..., None] - discount[:, None, :]).abs()
    weight = weight.masked_fill(~rule.eligible, 0.0) / ideal.where(ideal > 0, 1.0)[:, None, None]
    finite = scores.float().masked_fill(~rule.eligible, 0.0)
    ahead = finite.gather(-1, top)[..., None] - finite[:, None, :]  # [B, K, N]
    return _mean_over_rows((weight.detach() * F.softplus(-ahead)).sum(dim=(-1, -2)), target)


LOSSES: dict[LossName, Loss] = {"kl": kl, "bce": bce, "mse_log": mse_log, "lambdarank": lambdarank}


def _mean_over_patches(values: Tensor, eligible: Tensor) -> Tensor:
    """[B, N] -> [B], over the eligible patches."""
    return values.masked_fill(~eligible, 0.0).sum(dim=-1) / eligible.sum(dim=-1).clamp_min(1)


def _mean_over_rows(values: Tensor, target: Tensor) -> Tensor:
    """[B] -> scalar, over the rows that have a target."""
    has_target = target.sum(dim=-1) > 0
    return values.masked_fill(~has_target, 0.0).sum() / has_target.sum().clamp_min(1)
