"""Checkpoint files of plain values and tensors: reading them and loading their weights."""
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from support.console import InputError


def load_torch(path: Path) -> dict:
    """torch.load for plain types and tensors only. Raises InputError for other content."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist")
    except pickle.UnpicklingError:
        raise InputError(f"{path} is not a checkpoint: it holds other things than plain values and "
                         f"tensors, and was not opened, as that could run code")
    except Exception as error:
        first_line = str(error).split("\n")[0][:120]
        raise InputError(f"{path} is not a checkpoint ({type(error).__name__}: {first_line})")


def keep_in_bfloat16(network: nn.Module) -> None:
    """Convert the weights of convolutions and linear layers to bfloat16, once and for all.

    It is for a network that is only used, and only under bfloat16 autocast. Autocast would convert
    the weights again in each call; the outputs are the same, bit for bit.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            layer.to(torch.bfloat16)


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load weights into a model. Raises InputError if they do not fit or are not finite."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise InputError(f"{path} holds another architecture: {detail[:160]}")
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise InputError(f"{path} holds weights that are not finite numbers; the file is damaged: "
                         f"train again, or use another checkpoint")
