"""Muon for the convolutions and AdamW for everything else: the optimizer of the short presets.

torch.optim.Muon takes matrices alone, one at a time and always in bfloat16. On a CPU without
instructions for it a step then takes seconds (findings/muon_on_avx2.sh).
"""
import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

RATE = 3                            # Muon's learning rate in units of AdamW's (results/README.md)
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315), 5                 # coefficients and steps (Jordan 2024)


def new_optimizer(model: nn.Module, s) -> "AdamW | MuonAdamW":
    """AdamW (section 4.3), or MuonAdamW where the settings s say so."""
    if s.muon:
        return MuonAdamW(model, s.lr, s.weight_decay, s.precision == "bf16")
    return AdamW(model.parameters(), s.lr, weight_decay=s.weight_decay, fused=True)


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Set the singular values of matrices [N, rows, columns] to about 1 (0.7 to 1.2).

    By five steps of Newton-Schulz in this dtype, which is also that of the result.
    """
    (a, b, c), steps = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """Muon (Jordan et al. 2024): a step changes a weight about equally in every direction.

    The gradients of a weight are averaged with Nesterov's momentum and made orthogonal as the
    matrix [first axis, all others]. A step has the root mean square 0.2 lr, as AdamW's has about.
    Weights decay as in AdamW. bf16: whether to multiply matrices in bfloat16, else in float32.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, weight_decay: float, bf16: bool):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        settings, = self.param_groups
        same_shape: dict[tuple, list[tuple[nn.Parameter, Tensor]]] = {}
        for p in settings["params"]:
            if p.grad is not None:
                if p not in self.state:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"].lerp_(p.grad, 1 - MOMENTUM)
                ahead = p.grad.lerp(mean, MOMENTUM).flatten(1)
                same_shape.setdefault(ahead.shape, []).append((p, ahead))
        for shape, group in same_shape.items():
            length = 0.2 * settings["lr"] * math.sqrt(max(shape))
            directions = orthogonalise(torch.stack([ahead for _, ahead in group]), self.dtype)
            for (p, _), direction in zip(group, directions):
                p.mul_(1 - settings["lr"] * settings["weight_decay"])
                p.sub_(direction.reshape(p.shape), alpha=length)


class MuonAdamW:
    """Muon for the weights of the convolutions and AdamW for everything else, used like one.

    lr: AdamW's learning rate, a field of `param_groups`; Muon's is always RATE times as large.
    weight_decay, bf16: see Muon.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, bf16: bool):
        parameters = list(model.parameters())
        self.muon = Muon([p for p in parameters if p.ndim == 4], RATE * lr, weight_decay, bf16)
        self.adamw = AdamW([p for p in parameters if p.ndim != 4], lr, weight_decay=weight_decay,
                           fused=True)

    @property
    def param_groups(self) -> list[dict]:
        return self.adamw.param_groups

    def zero_grad(self) -> None:
        self.muon.zero_grad()
        self.adamw.zero_grad()

    def step(self) -> None:
        self.muon.param_groups[0]["lr"] = RATE * self.param_groups[0]["lr"]
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
