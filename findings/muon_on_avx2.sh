#!/usr/bin/env bash
# torch.optim.Muon multiplies matrices in bfloat16, whatever the type of the weights, and has no
# setting for it. On an x86 processor without AVX-512 (here: oneDNN limited to AVX2, which is what
# decides), torch multiplies bfloat16 matrices by a plain loop. A step of Muon on float32 weights
# then takes many times as long as the same matrix products in float32.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.15.0 numpy==2.4.6
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore ONEDNN_MAX_CPU_ISA=AVX2
venv/bin/python - <<'EOF'
import time

import torch

torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.randn(128, 1152))
weight.grad = torch.randn(128, 1152)
muon = torch.optim.Muon([weight], lr=0.02)


def products_in_float32():
    x = weight.grad / weight.grad.norm()
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)


def milliseconds(work):
    times = []
    for _ in range(5):
        start = time.process_time()
        work()
        times.append(1000 * (time.process_time() - start))
    return min(times)


step, products = milliseconds(muon.step), milliseconds(products_in_float32)
print("torch", torch.__version__, "weights", weight.dtype)
print(f"a step of torch.optim.Muon {step:.1f} ms, the same products in float32 {products:.1f} ms")
assert step > 3 * products
EOF
