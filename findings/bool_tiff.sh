#!/usr/bin/env bash
# A boolean mask that tifffile writes with its defaults is stored as "white is zero", with the bits
# of True as 1. Pillow and OpenCV follow the header and show the defect black on white: the mask is
# inverted. tifffile itself reads back what it was given.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 pillow==13.0.0 opencv-python-headless==5.0.0.93 \
    tifffile==2026.3.3
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import cv2
import numpy as np
import PIL
import tifffile
from PIL import Image

mask = np.zeros((64, 64), bool)
mask[10:20, 10:20] = True
tifffile.imwrite("mask.tif", mask)
print("Pillow", PIL.__version__, "OpenCV", cv2.__version__, "tifffile", tifffile.__version__)
shares = {"written": mask.mean(), "tifffile": (tifffile.imread("mask.tif") > 0).mean(),
          "Pillow": (np.asarray(Image.open("mask.tif")) > 0).mean(),
          "OpenCV": (cv2.imread("mask.tif", cv2.IMREAD_UNCHANGED) > 0).mean()}
print("share of the image that is defect:", {k: round(float(v), 4) for k, v in shares.items()})
assert shares["tifffile"] == shares["written"] == 100 / 4096
assert shares["Pillow"] == shares["OpenCV"] == 1 - 100 / 4096
EOF
