#!/usr/bin/env bash
# The same 12-bit picture has the values 0 to 4095 in one reader and 0 to 65520 (or 65535) in
# another. Which reader scales depends on the file format: Pillow scales PGM and JPEG 2000 and
# leaves TIFF, OpenCV scales TIFF and leaves PGM and JPEG 2000. A model that was trained on one of
# these and is given another sees an image that is 16 times darker or brighter.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 pillow==13.0.0 opencv-python-headless==5.0.0.93 \
    tifffile==2026.3.3 imagecodecs==2026.3.6
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import cv2
import imagecodecs
import numpy as np
import PIL
import tifffile
from PIL import Image

picture = np.tile(np.linspace(0, 4095, 96).astype(np.uint16), (64, 1))
with open("a.pgm", "wb") as file:
    file.write(b"P5 96 64 4095\n" + picture.astype(">u2").tobytes())
with open("a.jp2", "wb") as file:
    file.write(imagecodecs.jpeg2k_encode(picture, bitspersample=12, level=0))
tifffile.imwrite("a.tif", picture, bitspersample=12)

print("Pillow", PIL.__version__, "OpenCV", cv2.__version__, "tifffile", tifffile.__version__)
largest = {}
for name in ("a.pgm", "a.jp2", "a.tif"):
    with Image.open(name) as image:
        largest[name] = (int(np.asarray(image).max()), int(cv2.imread(name, -1).max()))
    print(f"{name}: largest value {largest[name][0]} in Pillow, {largest[name][1]} in OpenCV")
assert largest == {"a.pgm": (65535, 4095), "a.jp2": (65520, 4095), "a.tif": (4095, 65520)}
EOF
