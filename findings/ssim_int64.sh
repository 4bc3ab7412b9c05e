#!/usr/bin/env bash
# scikit-image's structural_similarity takes the data range from the dtype. NumPy's default integer
# is int64, so two images that became int64 on the way (a sum, a difference, a list) are taken to
# have a range of 1.8e19, and their SSIM is 1.0, however different they are.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 scipy==1.17.1 scikit-image==0.26.0
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import numpy as np
import skimage
from skimage.metrics import structural_similarity

rng = np.random.default_rng(0)
a, b = rng.integers(0, 256, (2, 64, 64))                                  # int64, two random images
print("scikit-image", skimage.__version__)
as_uint8 = structural_similarity(a.astype(np.uint8), b.astype(np.uint8))
as_int64 = structural_similarity(a, b)
print(f"SSIM of two random images: {as_uint8:.3f} as uint8, {as_int64:.3f} as int64")
assert abs(as_uint8) < 0.1 and as_int64 > 0.999
EOF
