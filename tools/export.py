"""A trained model as one ONNX file that onnxruntime and OpenVINO run, also without this repository.

    python tools/export.py runs/parts/bolt bolt.onnx
    python predict.py bolt.onnx photos/ --out found/

The file contains the whole restoration with all its network calls, Eq. 4, Eq. 10 and Eq. 11, and in
its metadata the preprocessing and the threshold. It computes in float32.
"""
import argparse
import dataclasses
import importlib.util
import io
import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

import predict
from data import scale, unscale
from settings import Settings
from support.console import InputError, exit_status
from support.files import save_atomically
from support.onnx_file import FORMAT, INPUT, OUTPUTS, load_onnx
from transfusion import Method, anomaly_score, final_mask

PREPROCESSING = ("8-bit RGB; resized to resize x resize, bilinear with antialiasing (Pillow's "
                 "BILINEAR), aspect not kept; centre crop of crop x crop; uint8 [B, crop, crop, 3]")
EXPORTABLE = ("transfusion", "draem")   # the others draw noise, take gradients or keep patches
LARGEST_DIFFERENCE = 1e-4               # of the file's scores from the model's


class WholeInspection(nn.Module):
    """Photos, uint8 [B, crop, crop, 3], to the score [B], the map [B, crop, crop] and the restored
    image, uint8 like the photos."""

    def __init__(self, model: Method, s: Settings):
        super().__init__()
        self.model, self.s = model, s

    @torch.no_grad()
    def forward(self, photo: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        restored = self.model.restore(scale(photo.permute(0, 3, 1, 2)), self.s.infer_steps)
        M_final = final_mask(restored.M_disc, restored.M_recon, self.s.lam, self.s.kernel)
        pixels = unscale(restored.x_0).round().to(torch.uint8).permute(0, 2, 3, 1)
        return anomaly_score(M_final), M_final[:, 0], pixels


def export(inspector: predict.Inspector) -> bytes:
    """The content of the ONNX file. Raises InputError for a model that cannot be exported."""
    if not importlib.util.find_spec("onnx"):
        raise InputError("tools/export.py needs two more packages: pip install onnx onnxruntime "
                         "(or openvino in place of the latter)")
    import onnx
    s = inspector.s
    if s.method not in EXPORTABLE:
        raise InputError(f"--method {s.method}: cannot be exported; {' and '.join(EXPORTABLE)} can")
    if s.final_mask != "combined":
        raise InputError(f"--final-mask {s.final_mask}: only combined can be exported")
    inspector.model.bf16 = False                        # of TransFusion and the other methods
    network, file = WholeInspection(inspector.model, s).eval(), io.BytesIO()
    example = torch.zeros(2, s.crop, s.crop, 3, dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # of constants that tracing records
            # dynamo=True takes half a minute for each of the network calls
            torch.onnx.export(network, (example,), file, input_names=[INPUT], output_names=OUTPUTS,
                              dynamic_axes={name: {0: "batch"} for name in (INPUT, *OUTPUTS)},
                              opset_version=18, dynamo=False)
    except Exception as error:                          # whatever torch finds
        raise InputError(f"--method {s.method} cannot be exported ({type(error).__name__}: "
                         f"{str(error).strip().splitlines()[0][:120]})")
    model = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(model, metadata(inspector))
    content = model.SerializeToString()
    refuse_if_different(content, network)
    return content


def metadata(inspector: predict.Inspector) -> dict[str, str]:
    """What a program needs to know to use the file; predict.py reads it back."""
    s, scores, limit = inspector.s, inspector.calibration, inspector.threshold
    return {"format": FORMAT, "preprocessing": PREPROCESSING, "resize": str(s.resize),
            "crop": str(s.crop), "infer_steps": str(inspector.calls),
            "threshold": str(limit.value) if limit else "", "false_alarms": str(s.false_alarms),
            "calibration": json.dumps(scores and dataclasses.asdict(scores))}


def refuse_if_different(content: bytes, network: WholeInspection) -> None:
    """Raise InputError if the file's scores of three random photos differ from the model's.

    It was exported with two photos, so this also shows that it takes any number.
    """
    rng, side = np.random.default_rng(0), network.s.crop
    photos = rng.integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        _, run = load_onnx(path, exact=True)
        try:
            scores = run(photos)["score"]
        except Exception:                               # each runtime has its own
            scores = np.full(3, np.nan)
    expected = network(torch.from_numpy(photos))[0].numpy()
    if not np.abs(scores - expected).max() <= LARGEST_DIFFERENCE:
        raise InputError(f"--method {network.s.method} cannot be exported: the file gives other "
                         f"scores than the model ({scores.tolist()}, not {expected.tolist()})")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a trained model as one ONNX file.")
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint")
    parser.add_argument("file", metavar="FILE", type=Path, help="the file to write, such as "
                        "bolt.onnx")
    parser.add_argument("--infer-steps", type=int, metavar="K",
                        help="network calls an image (default: the run's)")
    parser.add_argument("--false-alarms", type=float, metavar="RATE",
                        help="false-alarm rate of the image threshold (default: the run's)")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags = command_line().parse_args(argv)
    path = flags.file.expanduser()
    if path.suffix.lower() != ".onnx" or not path.absolute().parent.is_dir():
        raise InputError(f"{path}: give a name that ends in .onnx, in a folder that exists")
    changes = {k: getattr(flags, k) for k in ("infer_steps", "false_alarms")
               if getattr(flags, k) is not None}
    inspector = predict.load_trained(flags.run, "cpu", **changes)
    if isinstance(inspector, predict.OnnxInspector):
        raise InputError(f"{flags.run} is an ONNX file already; give a run folder")
    content = export(inspector)
    save_atomically(path, lambda file: file.write(content))
    print(f"{path}: {len(content) / 1e6:.0f} MB, {inspector.calls} network calls an image at "
          f"{inspector.s.crop} px; python predict.py {path} PHOTOS --out FOUND inspects with it")


if __name__ == "__main__":
    sys.exit(main())
