"""MuonAdamW: which weights Muon takes, what its steps do, and that the two are used like one."""
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import moments_of
from settings import Settings
from support.optimizer import RATE, MuonAdamW, new_optimizer

LR, DECAY = 0.01, 0.1


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 4, 4),
                         nn.Flatten(), nn.Linear(4 * 49, 2))


def train_step(model: nn.Module, optimizer, seed: int) -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_the_papers_optimizer_is_adamw_and_muon_is_asked_for():
    model = network()
    assert type(new_optimizer(model, Settings())) is torch.optim.AdamW
    assert type(new_optimizer(model, Settings(muon=True))) is MuonAdamW


def test_muon_has_the_weights_of_the_convolutions_and_adamw_everything_else():
    model = network()
    optimizer = MuonAdamW(model, LR, DECAY)
    assert [id(p) for p in optimizer.convolutions] == [id(model[0].weight), id(model[2].weight)]
    assert [tuple(m.shape) for m in optimizer.matrices] == [(8, 27), (8, 64)]
    others = optimizer.adamw.param_groups[0]["params"]
    assert len(others) == len(list(model.parameters())) - 2


def test_a_step_changes_a_convolution_about_equally_in_all_directions():
    """The singular values of a step are 0.5 to 1.5 of their mean, those of the gradient are not.
    Its root mean square is 0.2 times the learning rate, as that of AdamW is about."""
    model = network()
    optimizer = MuonAdamW(model, LR, weight_decay=0)
    before = model[0].weight.detach().clone()
    train_step(model, optimizer, 0)
    step = (model[0].weight.detach() - before).flatten(1)
    gradient = torch.linalg.svdvals(model[0].weight.grad.flatten(1))
    assert gradient[0] > 3 * gradient[-1]
    values = torch.linalg.svdvals(step)
    assert 0.5 < values.min() / values.mean() and values.max() / values.mean() < 1.5
    assert step.square().mean().sqrt().item() == pytest.approx(0.2 * RATE * LR, rel=0.3)
    assert (step * model[0].weight.grad.flatten(1)).sum() < 0                   # downhill


def test_both_follow_the_learning_rate_of_the_group_and_decay_their_weights():
    model = network()
    optimizer = MuonAdamW(model, LR, DECAY)
    optimizer.param_groups[0]["lr"] = 0.5
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before):
        assert torch.allclose(p, old * (1 - (RATE if p.ndim == 4 else 1) * 0.5 * DECAY))


def test_a_weight_without_a_gradient_stays():
    model = network()
    optimizer = MuonAdamW(model, LR, DECAY)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_a_training_continues_bit_for_bit_from_its_state():
    """Also after a step with other weights, as a training that returns to a checkpoint takes."""
    one, other = network(), network(1)
    first, second = MuonAdamW(one, LR, DECAY), MuonAdamW(other, LR, DECAY)
    for k in range(2):
        train_step(one, first, k)
        train_step(other, second, 7 + k)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(map(torch.equal, moments_of(first.state_dict()), moments_of(second.state_dict())))
    for k in range(2):
        train_step(one, first, 2 + k)
        train_step(other, second, 2 + k)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_one_code_path_for_cuda():
    with FakeTensorMode(), torch.device("cuda"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 4, 4))
        optimizer = MuonAdamW(model, LR, DECAY)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        moments = moments_of(optimizer.muon.state_dict())
        assert len(moments) == 2 and all(m.device.type == "cuda" for m in moments)
