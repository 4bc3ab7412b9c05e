"""Muon for the convolutions and AdamW for everything else: the optimizer of the short presets."""
from torch import nn
from torch.optim import AdamW, Muon

RATE = 3                            # Muon's learning rate in units of AdamW's


def new_optimizer(model: nn.Module, s) -> "AdamW | MuonAdamW":
    """AdamW (section 4.3), or MuonAdamW where the settings s say so."""
    if s.muon:
        return MuonAdamW(model, s.lr, s.weight_decay)
    return AdamW(model.parameters(), s.lr, weight_decay=s.weight_decay, fused=True)


class MuonAdamW:
    """Two optimizers of torch that are used like one. The paper has AdamW alone (section 4.3).

    Muon (Jordan et al. 2024) sets all singular values of a weight matrix's averaged gradient to
    about 1, so that a step changes the weight equally in every direction. It is meant for
    matrices; the weight [out, in, k, k] of a convolution is the matrix [out, in * k * k] in the
    same memory. "match_rms_adamw" gives its steps the size that AdamW's have at the same learning
    rate. AdamW has the linear layers, the norms and the biases.

    lr: the learning rate of AdamW; Muon's is RATE times as large. weight_decay: a step multiplies
    each weight by 1 - weight_decay times its learning rate.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        parameters = list(model.parameters())
        self.convolutions = [p for p in parameters if p.ndim == 4]
        self.matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in self.convolutions]
        self.muon = Muon(self.matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW([p for p in parameters if p.ndim != 4], lr, weight_decay=weight_decay,
                           fused=True)

    @property
    def param_groups(self) -> list[dict]:
        """AdamW's group; Muon's learning rate follows its."""
        return self.adamw.param_groups

    def zero_grad(self) -> None:
        for parameter in (*self.convolutions, *self.adamw.param_groups[0]["params"]):
            parameter.grad = None

    def step(self) -> None:
        for matrix, weight in zip(self.matrices, self.convolutions):
            matrix.grad = None if weight.grad is None else weight.grad.reshape(matrix.shape)
        self.muon.param_groups[0]["lr"] = RATE * self.adamw.param_groups[0]["lr"]
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
