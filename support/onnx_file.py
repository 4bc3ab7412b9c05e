"""The ONNX files of tools/export.py, run by onnxruntime or OpenVINO, whichever is installed.

The two packages are imported here and nowhere else, and only when a file is loaded.
"""
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from support.console import InputError

FORMAT = "1"                                        # version of the metadata, inputs and outputs
INPUT, OUTPUTS = "photo", ["score", "map", "restored"]


def load_onnx(path: Path, runtime: str = "auto",
              exact: bool = False) -> tuple[dict[str, str], Callable]:
    """The metadata of a file, and a function from photos to its outputs by name.

    photos: uint8 [B, crop, crop, 3]. The outputs are arrays: score [B] and map [B, crop, crop],
    float32, and restored, as the photos. runtime: a key of RUNTIMES; "auto" or "cpu" is the first
    that is installed. exact: in float32, also where OpenVINO would take bfloat16. Raises InputError
    for a file that tools/export.py did not write.
    """
    installed = [name for name in RUNTIMES if importlib.util.find_spec(name)]
    chosen = next(iter(installed), "onnxruntime") if runtime in ("auto", "cpu") else runtime
    if chosen not in RUNTIMES:
        raise InputError(f"--device {runtime}: an ONNX file runs on the CPU, with "
                         f"{' or '.join(RUNTIMES)}")
    if chosen not in installed:
        raise InputError(f"an ONNX file needs one more package: pip install {chosen}")
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        metadata, run = RUNTIMES[chosen](path, exact)
    except Exception as error:                      # each runtime has its own
        last_line = str(error).strip().split("\n")[-1][:120]
        raise InputError(f"{path} is not an ONNX file, or a damaged one ({chosen}: {last_line})")
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} was not written by this version's tools/export.py; export the "
                         f"run again")
    return metadata, run


def open_with_onnxruntime(path: Path, exact: bool) -> tuple[dict[str, str], Callable]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3                  # errors alone
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(photos: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(OUTPUTS, session.run(OUTPUTS, {INPUT: photos})))

    return session.get_modelmeta().custom_metadata_map, run


@cache
def openvino_core():
    """One for the whole process: graphs of several cores can end it when they are deleted."""
    import openvino
    return openvino.Core()


def open_with_openvino(path: Path, exact: bool) -> tuple[dict[str, str], Callable]:
    from openvino.frontend import FrontEndManager
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if exact:
        options["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = {}               # by batch size: a fixed size is half again as fast as any size

    def compile_for(size: int) -> dict[str, str]:
        """Compile the file for batches of this size. Returns its metadata."""
        frontend = FrontEndManager().load_by_framework("onnx")
        model = frontend.convert(frontend.load(str(path)))
        model.reshape([size, *list(model.input().partial_shape)[1:]])
        compiled[size] = openvino_core().compile_model(model, "CPU", options)
        return model.get_rt_info(["framework"]).value if "framework" in model.rt_info else {}

    def run(photos: np.ndarray) -> dict[str, np.ndarray]:
        """Single photos have a graph of their own; others fill up the largest batch so far."""
        count = len(photos)
        size = 1 if count == 1 else max(count, *compiled)
        if size not in compiled:
            for smaller in set(compiled) - {1}:
                del compiled[smaller]
            compile_for(size)
        empty = np.zeros((size - count, *photos.shape[1:]), np.uint8)
        outputs = compiled[size](np.concatenate([photos, empty]))
        return {name: array[:count].copy() for name, array in zip(OUTPUTS, outputs.values())}

    return compile_for(1), run


RUNTIMES = {"onnxruntime": open_with_onnxruntime, "openvino": open_with_openvino}
