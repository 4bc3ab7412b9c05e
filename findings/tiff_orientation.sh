#!/usr/bin/env bash
# The orientation tag of a TIFF file (274) with a quarter turn, 6 or 8. Pillow garbles an
# uncompressed grey file of 8 or 16 bits: it reads the rows with width and height exchanged, so the
# picture is sheared into stripes, without an error or a warning. The same picture as a compressed
# file, or in colour, is turned correctly. OpenCV 5 prints an error and returns None for all of
# them; orientation 3 (a half turn) is right in both.
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
import numpy as np
import PIL
import tifffile
from PIL import Image

y, x = np.mgrid[:64, :96]
picture = (128 + 60 * np.sin(x / 9) + 60 * np.cos(y / 5)).astype(np.uint8)
print("Pillow", PIL.__version__, "OpenCV", cv2.__version__, "tifffile", tifffile.__version__)
found = {}
for orientation, turns in ((3, 2), (6, -1)):
    for compression in (None, "lzw"):
        tifffile.imwrite("a.tif", picture, compression=compression,
                         extratags=[(274, "H", 1, orientation, True)])
        upright = np.rot90(picture, turns)
        pillow, opencv = np.asarray(Image.open("a.tif")), cv2.imread("a.tif", -1)
        if np.array_equal(pillow, upright):
            verdict = "right"
        else:
            sheared = np.rot90(picture.reshape(96, 64), turns)
            verdict = "garbled" if np.array_equal(pillow, sheared) else "other"
        found[orientation, compression] = (verdict, opencv is not None)
        print(f"orientation {orientation}, compression {compression}: Pillow {verdict}, OpenCV "
              f"{'returns None' if opencv is None else 'reads it'}")
assert found == {(3, None): ("right", True), (3, "lzw"): ("right", True),
                 (6, None): ("garbled", False), (6, "lzw"): ("right", False)}
EOF
