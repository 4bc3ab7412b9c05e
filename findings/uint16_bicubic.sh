#!/usr/bin/env bash
# torchvision's bicubic resize of a uint16 tensor does not clip where the cubic overshoots: values
# wrap around. Beside an edge, black pixels become nearly white (64732 for 0) and white pixels
# nearly black. uint8 tensors and Pillow's 16-bit images are clipped, as they should be. Bilinear
# resize is right.
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
from torchvision.transforms.v2.functional import resize

print("torchvision", torchvision.__version__, "torch", torch.__version__)
photo = np.zeros((300, 300), np.uint16)
photo[:, 150:] = 65535                                                     # an edge: dark, bright
options = {"size": [96, 96], "interpolation": InterpolationMode.BICUBIC}
tensor16 = resize(torch.from_numpy(photo)[None], **options)[0].int()
tensor8 = resize(torch.from_numpy((photo >> 8).astype(np.uint8))[None], **options)[0].int()
pillow16 = torch.from_numpy(np.asarray(resize(Image.fromarray(photo), **options)).astype(int))
for name, found in (("uint16 tensor", tensor16), ("uint8 tensor", tensor8),
                    ("Pillow, 16 bits", pillow16)):
    print(f"{name}, across the edge: {found[0, 44:52].tolist()}")
assert tensor16[0, 46] > 60000 and tensor16[0, 49] < 5000
assert tensor8[0, :47].max() == 0 and pillow16[0, :47].max() == 0
EOF
