#!/usr/bin/env bash
# torch.onnx.export, with its defaults, writes a file that onnxruntime and onnx.checker refuse, if a
# model clamps the same tensor twice: the second clamp's bound is named in the graph but stored
# nowhere. The export itself reports success. With optimize=False the file is right.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 torch==2.14.1 onnx==1.23.2 onnxruntime==1.32.0 \
    onnxscript==0.7.2
export OMP_NUM_THREADS=1 EOFWARNINGS=ignore
venv/bin/python - <<'EOF'
import onnx
import onnxruntime
import onnxscript
import torch


class Once(torch.nn.Module):
    def forward(self, x):
        y = x.clamp(-1, 1)
        return y, y + 1


class Twice(torch.nn.Module):
    def forward(self, x):
        return x.clamp(-1, 1), x.clamp(-1, 1) + 1


def refusals(model, **options) -> list[str]:
    torch.onnx.export(model, (torch.rand(2, 3),), "model.onnx", verbose=False, **options)
    found = []
    for name, read in (("onnxruntime", onnxruntime.InferenceSession),
                       ("onnx.checker", onnx.checker.check_model)):
        try:
            read("model.onnx")
        except Exception as error:
            found.append(f"{name}: {' '.join(str(error).split())[:150]}")
    return found


print("torch", torch.__version__, "onnxscript", onnxscript.__version__, "onnx", onnx.__version__,
      "onnxruntime", onnxruntime.__version__)
once, twice, plain = (refusals(Once()), refusals(Twice()), refusals(Twice(), optimize=False))
print("clamped once:", once or "loads")
print("clamped twice:", *twice, sep="\n  ")
print("clamped twice, optimize=False:", plain or "loads")
assert not once and len(twice) == 2 and not plain
EOF
