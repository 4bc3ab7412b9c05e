"""The compute device: how it is chosen, its name, whether it is fast in bfloat16; timing a call."""
import platform
import re
import statistics
import time
from pathlib import Path

import torch

from support.console import InputError


def pick_device(name: str) -> torch.device:
    """The device that --device names; "auto" is a GPU if there is one, otherwise the CPU.

    Raises InputError for a device that does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: no such device; cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine has no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                         f"devices, counted from 0")
    return device


def fast_bf16(device: torch.device) -> bool:
    """Whether this processor multiplies in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name)
                   for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def hardware(device: str) -> str:
    """The name of the GPU, or the name of the CPU and the number of torch's threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def median_seconds(call) -> float:
    """Wall-clock time of a call that waits for the device: the median of three, after one to warm
    up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
