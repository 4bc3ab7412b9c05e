#!/usr/bin/env bash
# ADEval's metrics are right on continuous maps. On maps with few levels, such as the mean of 20
# binary masks, two of them are not. calculate_au_pro is too low, however many thresholds it is
# given: among pixels of one score the false-positive rate rises pixel by pixel while the overlap
# stays, so the curve is a staircase below the true one. auroc_and_aupr loses the pixels at the
# largest score: a perfect binary map has an AUPR of 0. (ADEval needs torch for a GPU alone, and
# NumPy below 2.4.)
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.3.5 opencv-python-headless==5.0.0.93 scipy==1.17.1 \
    scikit-learn==1.9.1
venv/bin/pip install -q --no-deps ADEval==1.1.0
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
from importlib.metadata import version

import adeval
import numpy as np
from adeval.au_pro import calculate_au_pro
from scipy import ndimage
from sklearn.metrics import average_precision_score

print("ADEval", version("ADEval"), "numpy", np.__version__)
rng = np.random.default_rng(0)
masks = np.zeros((10, 64, 64), np.uint8)
masks[:, 20:40, 20:40] = 1                                # one region an image: PRO is the recall
field = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 3, 3))
field = field / field.std() + 2 * masks
continuous = (field - field.min()) / np.ptp(field)
levels = np.mean([field + 0.5 * rng.normal(size=masks.shape) > 1.5 for _ in range(20)], 0)

def aupro(maps):                  # every distinct score is a threshold; all regions have one size
    x, y = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        x.append((maps[masks == 0] >= threshold).mean())
        y.append((maps[masks == 1] >= threshold).mean())
    at = np.interp(0.3, x, y)
    k = np.searchsorted(x, 0.3)
    return np.trapezoid(y[:k] + [at], x[:k] + [0.3]) / 0.3

too_low = {}
for name, maps in (("continuous", continuous), ("21 levels", levels)):
    found = [calculate_au_pro(list(masks), list(maps), num_thresholds=n)[0] for n in (100, 5000)]
    too_low[name] = aupro(maps) - found[1]
    print(f"{name}: AUPRO {aupro(maps):.4f}, calculate_au_pro {found[0]:.4f} with 100 thresholds, "
          f"{found[1]:.4f} with 5000")
perfect = masks.ravel().astype(np.float32)
aupr = adeval.auroc_and_aupr(perfect, masks.ravel())[1]
print(f"perfect binary map: AUPR {aupr:.3f}, scikit-learn "
      f"{average_precision_score(masks.ravel(), perfect):.3f}")
assert abs(too_low["continuous"]) < 1e-3 and too_low["21 levels"] > 0.01 and aupr < 0.01
EOF
