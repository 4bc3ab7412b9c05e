#!/usr/bin/env bash
# torchvision's bilinear rotation (and affine and perspective transform) with a fill blends the
# border twice: once with black, by interpolating at the border, and once with the fill. A white
# image turned on a white fill gets a dark rim: 191 for 255. Pillow images have no rim, and neither
# has fill=None. A model that is trained on normal parts sees the rim as part of every rotated one.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 pillow==13.0.0
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import rotate

print("torchvision", torchvision.__version__, "torch", torch.__version__)
white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
options = {"angle": 30, "interpolation": InterpolationMode.BILINEAR, "fill": 255}
darkest = {"tensor": int(rotate(white, **options).min()),
           "Pillow image": int(np.asarray(rotate(Image.new("RGB", (64, 64), (255,) * 3),
                                                 **options)).min())}
print("darkest pixel of a white image, turned by 30 degrees on white:", darkest)
assert darkest == {"tensor": 191, "Pillow image": 255}
EOF
