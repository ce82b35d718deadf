"""Muon in one batch per shape: orthogonal updates, and the same steps as torch's own optimizer."""

import torch
from torch import nn

from scenes.muon import Trainer, orthogonalised


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 24, 8), (2, 8, 24)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.3


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(12, 12)
        self.out = nn.Linear(12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.mlp(x)))


def test_hidden_matrices_take_the_steps_of_torchs_muon():
    torch.manual_seed(0)
    ours, data = _Block(), torch.randn(64, 12)
    theirs = _Block()
    theirs.load_state_dict(ours.state_dict())
    trainer = Trainer([ours], [], rate=0.01, steps=50)
    muon = torch.optim.Muon([theirs.mlp.weight], lr=0.01, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    before = ours.mlp.weight.detach().clone()
    for module in (ours, theirs):
        loss = (module(data) - 1).square().mean()
        if module is ours:
            trainer._steps = 10  # the first of one warm step: the whole rate
            trainer.step(loss)
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            muon.step()
    moved, reference = (module.mlp.weight.detach() - before for module in (ours, theirs))
    assert (moved - reference).norm() < 0.03 * reference.norm()  # torch's iterates in bfloat16


def test_training_lowers_the_loss_and_leaves_no_gradients():
    torch.manual_seed(0)
    module, data = _Block(), torch.randn(64, 12)
    target = data[:, :1]
    trainer = Trainer([module], [], rate=0.02, steps=60)
    losses = []
    for _ in range(60):
        loss = (module(data) - target).square().mean()
        trainer.step(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(weight.grad is None for weight in module.parameters())
