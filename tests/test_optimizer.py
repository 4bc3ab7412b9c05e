"""MuonAdamW: which weights Muon takes, what its steps do, and that the two are used like one."""
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import moments_of
from settings import Settings
from support.optimizer import RATE, Muon, MuonAdamW, new_optimizer, orthogonalise

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
    optimizer = MuonAdamW(model, LR, DECAY, bf16=False)
    weights, = (group["params"] for group in optimizer.muon.param_groups)
    assert [id(p) for p in weights] == [id(model[0].weight), id(model[2].weight)]
    others, = (group["params"] for group in optimizer.adamw.param_groups)
    assert len(others) == len(list(model.parameters())) - 2


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalise_sets_the_singular_values_to_about_1_and_keeps_the_directions(shape, dtype):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(1e-3 * matrices, dtype)
    assert result.dtype == dtype and result.shape == matrices.shape
    values = torch.linalg.svdvals(result.float())
    assert 0.6 < values.min() and values.max() < 1.3
    U, _, V = torch.linalg.svd(matrices, full_matrices=False)
    inside = U.mT @ result.float() @ V.mT                   # diagonal where the directions agree
    rest = inside - torch.diag_embed(torch.diagonal(inside, dim1=1, dim2=2))
    assert rest.abs().max() < 0.05 and torch.diagonal(inside, dim1=1, dim2=2).min() > 0.6


@pytest.mark.parametrize("bf16, tolerance", [(True, 0.005), (False, 0.05)])
def test_muon_takes_the_steps_of_torchs_muon_which_is_always_bfloat16(bf16, tolerance):
    """With "match_rms_adamw", on the same weights as matrices; three steps with decay."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in
              ((8, 3, 3, 3), (8, 3, 3, 3), (4, 2, 1, 1))]
    ours = [nn.Parameter(w.clone()) for w in starts]
    theirs = [nn.Parameter(w.flatten(1).clone()) for w in starts]
    muon = Muon(ours, LR, DECAY, bf16)
    reference = torch.optim.Muon(theirs, LR, DECAY, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.flatten(1)
        muon.step()
        reference.step()
    for a, b, start in zip(ours, theirs, starts):
        moved = (b - start.flatten(1)).norm()
        assert moved > 0.01 and (a.flatten(1) - b).norm() < tolerance * moved


def test_both_follow_the_learning_rate_of_the_group_and_decay_their_weights():
    model = network()
    optimizer = MuonAdamW(model, LR, DECAY, bf16=False)
    optimizer.param_groups[0]["lr"] = 0.5
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before):
        assert torch.allclose(p, old * (1 - (RATE if p.ndim == 4 else 1) * 0.5 * DECAY))


def test_a_weight_without_a_gradient_stays():
    """As those of another stage of a training, which had gradients before."""
    model = network()
    optimizer = MuonAdamW(model, LR, DECAY, bf16=False)
    train_step(model, optimizer, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_a_training_continues_bit_for_bit_from_its_state():
    """Also after a step with other weights, as a training that returns to a checkpoint takes."""
    one, other = network(), network(1)
    first, second = (MuonAdamW(model, LR, DECAY, bf16=True) for model in (one, other))
    for k in range(2):
        train_step(one, first, k)
        train_step(other, second, 7 + k)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    moments, others = (moments_of(optimizer.state_dict()) for optimizer in (first, second))
    assert len(moments) == len(others) > 0 and all(map(torch.equal, moments, others))
    for k in range(2):
        train_step(one, first, 2 + k)
        train_step(other, second, 2 + k)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_one_code_path_for_cuda():
    with FakeTensorMode(), torch.device("cuda"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 4, 4))
        optimizer = MuonAdamW(model, LR, DECAY, bf16=False)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        moments = moments_of(optimizer.muon.state_dict())
        assert len(moments) == 2 and all(m.device.type == "cuda" for m in moments)
