#!/usr/bin/env bash
# Pillow's BOX filter and OpenCV's INTER_AREA are both called area averaging. They agree where the
# new side divides the old one. Elsewhere Pillow's BOX takes whole pixels, those whose centre lies
# in the box, and OpenCV weighs the pixels at its edges by their share, as an area average does. A
# fine texture scaled from 900 to 400 px differs by dozens of grey levels, so a model trained on one
# must not be given images scaled by the other. Pillow's BILINEAR, HAMMING and LANCZOS are other
# filters again.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 pillow==13.0.0 opencv-python-headless==5.0.0.93
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import cv2
import numpy as np
import PIL
from PIL import Image

rng = np.random.default_rng(0)
texture = rng.integers(0, 256, (900, 900), dtype=np.uint8)
print("Pillow", PIL.__version__, "OpenCV", cv2.__version__)
largest = {}
for side in (450, 300, 400, 96):
    box = np.asarray(Image.fromarray(texture).resize((side, side), Image.BOX)).astype(int)
    area = cv2.resize(texture, (side, side), interpolation=cv2.INTER_AREA).astype(int)
    largest[side] = int(np.abs(box - area).max())
    print(f"900 to {side} px: largest difference {largest[side]} grey levels")
assert largest[450] <= 1 and largest[300] <= 1 and largest[400] > 40 and largest[96] > 3
EOF
