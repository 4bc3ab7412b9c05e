"""Training with several processes; only this module reads torchrun's environment variables.

RANK is this process's number, COUNT the number of processes, LOCAL_RANK the number on this machine.
A single process is rank 0 of 1. Rank 0 prints and writes files; the others only compute.
"""
import os
import sys
from collections.abc import Mapping
from datetime import timedelta

from support.console import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


def read_environment(environment: Mapping[str, str]) -> tuple[int, int, int, str]:
    """Rank, number of processes, local rank, and a note on variables that were ignored.

    torchrun's variables are used only if all of VARIABLES are set and consistent. A shell inside
    another job may have some of them; one process runs then.
    """
    values = {name: environment[name] for name in VARIABLES if environment.get(name)}
    numbers = [values.get(name, "") for name in VARIABLES[:3]]
    if len(values) == len(VARIABLES) and all(number.isdecimal() for number in numbers):
        rank, count, local_rank = map(int, numbers)
        if local_rank <= rank < count:
            return rank, count, local_rank, ""
    if values.keys() & set(VARIABLES[:3]):
        return 0, 1, 0, (f"note: {', '.join(f'{k}={v}' for k, v in values.items())} in the "
                         f"environment ignored, as torchrun sets {', '.join(VARIABLES)} together; "
                         f"one process runs")
    return 0, 1, 0, ""


RANK, COUNT, LOCAL_RANK, NOTE = read_environment(os.environ)


def silence_others() -> None:
    """Discard what ranks other than 0 write to standard output and error."""
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def join(device: str, batch: int) -> str:
    """Join the group of processes, if there are several. Returns the device of this process.

    On GPUs each process has its own device. Raises InputError for a batch that is not a multiple of
    2 COUNT: every rank gets the same number of images, half of them anomalous.
    """
    if COUNT == 1:
        return device
    import torch
    if batch % (2 * COUNT):
        raise InputError(f"--batch {batch}: {COUNT} processes share it evenly, half of it "
                         f"anomalous, only if it is a multiple of {2 * COUNT}")
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{LOCAL_RANK}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo",
                                         timeout=timedelta(hours=12))    # while rank 0 scores
    return device


def wait() -> None:
    """Wait until every rank has called this function."""
    if COUNT > 1:
        import torch
        torch.distributed.barrier()


def mean(values):
    """The mean of a tensor over all ranks. With several ranks, `values` itself becomes the sum."""
    if COUNT > 1:
        import torch
        torch.distributed.all_reduce(values)
    return values / COUNT


def any_rank(flag: bool, device) -> bool:
    """Whether the flag is true on at least one rank."""
    if COUNT == 1:
        return flag
    import torch
    return bool(mean(torch.tensor(float(flag), device=device)))
