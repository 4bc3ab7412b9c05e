#!/usr/bin/env bash
# A colour TIFF with 16 bits and one plane for each colour (PlanarConfiguration 2, as line-scan
# software writes it) is a different picture in Pillow and in OpenCV, without a warning. Both read
# 8-bit planar files and 16-bit interleaved files correctly.
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

y, x = np.mgrid[:64, :96]
picture = np.stack([x * 65535 // 95, y * 65535 // 63, (x + y) * 400], -1).astype(np.uint16)
print("Pillow", PIL.__version__, "OpenCV", cv2.__version__, "tifffile", tifffile.__version__)
errors = {}
for bits in (8, 16):
    truth = picture if bits == 16 else (picture >> 8).astype(np.uint8)
    for planar in (False, True):
        tifffile.imwrite("a.tif", np.moveaxis(truth, -1, 0).copy() if planar else truth,
                         photometric="rgb", planarconfig="separate" if planar else "contig")
        assert np.array_equal(np.moveaxis(tifffile.imread("a.tif"), 0, -1) if planar
                              else tifffile.imread("a.tif"), truth)
        pillow = np.asarray(Image.open("a.tif")).astype(int)          # 8 bits: the high bytes
        opencv = cv2.imread("a.tif", cv2.IMREAD_UNCHANGED)[..., ::-1].astype(int)
        errors[bits, planar] = (int(np.abs(pillow - (picture >> 8)).max()),
                                int(np.abs(opencv - truth).max()))
        print(f"{bits} bits, {'planes' if planar else 'interleaved'}: largest error in Pillow "
              f"{errors[bits, planar][0]} of 255, in OpenCV {errors[bits, planar][1]} of "
              f"{2 ** bits - 1}")
assert errors[8, False] == errors[8, True] == errors[16, False] == (0, 0)
assert errors[16, True][0] > 100 and errors[16, True][1] > 30000
EOF
