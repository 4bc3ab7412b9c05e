"""Weights on disk: files of plain values and tensors, put into a model or refused."""
import pickle
from pathlib import Path

import torch
from torch import Tensor

from support.console import InputError


def load_torch(path: Path) -> dict:
    """torch.load of plain types and tensors only. Raises InputError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist")
    except pickle.UnpicklingError:
        raise InputError(f"{path} is not a checkpoint: it holds other things than plain values and "
                         f"tensors, and was not opened, as that could run code")
    except Exception as error:
        first = str(error).split("\n")[0][:120]
        raise InputError(f"{path} is not a checkpoint ({type(error).__name__}: {first})")


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Put weights into the model. Raises InputError for those of another one, and for NaN."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise InputError(f"{path} holds another architecture: {first[:160]}")
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise InputError(f"{path} holds weights that are not finite numbers; the file is damaged: "
                         f"train again, or use another checkpoint")
