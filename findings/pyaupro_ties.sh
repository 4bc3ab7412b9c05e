#!/usr/bin/env bash
# pyaupro's exact mode ignores ties: pixels of one score are added to the curve one after the other,
# in the order in which they happen to be sorted. On continuous maps nothing is lost. On maps with
# few levels the AUPRO changes when maps and masks are flipped together.
# reference_implementation=True merges ties as MVTec's evaluation does, but auc_compute then ends
# the curve with a flat line instead of interpolating at the limit.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 pyaupro==0.1.11 torchmetrics==1.9.0 scipy==1.17.1 \
    numpy==2.4.6
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
from importlib.metadata import version

import numpy as np
import torch
from pyaupro import PerRegionOverlap, auc_compute
from scipy import ndimage

print("pyaupro", version("pyaupro"), "torch", torch.__version__)
rng = np.random.default_rng(0)
masks = np.zeros((10, 64, 64), bool)
masks[:, 5:50, 20:40] = True                              # one region an image: PRO is the recall
field = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 3, 3))
field = field / field.std() + 2 * masks
continuous = (field - field.min()) / np.ptp(field)
levels = np.mean([field + 0.5 * rng.normal(size=masks.shape) > 2 for _ in range(20)], 0)

def aupro(maps):                  # every distinct score is a threshold; all regions have one size
    x, y = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        x.append((maps[~masks] >= threshold).mean())
        y.append((maps[masks] >= threshold).mean())
    at = np.interp(0.3, x, y)
    k = np.searchsorted(x, 0.3)
    return np.trapezoid(y[:k] + [at], x[:k] + [0.3]) / 0.3

def packaged(maps, flip=False, **options):
    metric = PerRegionOverlap(**options)
    maps, truth = torch.from_numpy(maps), torch.from_numpy(masks).int()
    metric.update(*((maps.flip(1), truth.flip(1)) if flip else (maps, truth)))
    return auc_compute(*metric.compute(), limit=0.3).item()

exact = aupro(continuous)
print(f"continuous maps: AUPRO {exact:.4f}, pyaupro {packaged(continuous):.4f}")
assert abs(packaged(continuous) - exact) < 2e-3
exact, found, flipped, reference = (aupro(levels), packaged(levels), packaged(levels, True),
                                    packaged(levels, reference_implementation=True))
print(f"21 levels: AUPRO {exact:.4f}, pyaupro {found:.4f}, all flipped upside down {flipped:.4f}, "
      f"reference_implementation=True {reference:.4f}")
assert abs(found - flipped) > 1e-5 and exact - reference > 2e-3
EOF
