#!/usr/bin/env bash
# An anomaly map as a float32 TIFF, read by OpenCV 5 without IMREAD_UNCHANGED. A PNG of 16 bits is
# reduced to 8 bits by the default flags; the float TIFF is not reduced: imread returns None, and
# only a message on the error stream says that 32-bit samples cannot be handled. IMREAD_GRAYSCALE
# and IMREAD_ANYDEPTH | IMREAD_COLOR return None, too. IMREAD_ANYDEPTH alone reads the map exactly.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 pillow==13.0.0 opencv-python-headless==5.0.0.93
export OMP_NUM_THREADS=1
venv/bin/python - <<'EOF'
import cv2
import numpy as np
import PIL
from PIL import Image

y, x = np.mgrid[:64, :96]
anomaly_map = np.exp(-((x - 40) ** 2 + (y - 30) ** 2) / 200).astype(np.float32)
Image.fromarray(anomaly_map).save("map.tiff")
cv2.imwrite("map.png", (65535 * anomaly_map).astype(np.uint16))
print("Pillow", PIL.__version__, "OpenCV", cv2.__version__)
flags = {"default": cv2.IMREAD_COLOR, "GRAYSCALE": cv2.IMREAD_GRAYSCALE,
         "ANYDEPTH | COLOR": cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR,
         "ANYDEPTH": cv2.IMREAD_ANYDEPTH, "UNCHANGED": cv2.IMREAD_UNCHANGED}
for name, flag in flags.items():
    tiff, png = (cv2.imread(f"map.{suffix}", flag) for suffix in ("tiff", "png"))
    print(f"{name}: float32 TIFF {'None' if tiff is None else tiff.dtype}, 16-bit PNG {png.dtype}")
    assert (tiff is None) == (name not in ("ANYDEPTH", "UNCHANGED"))
    assert tiff is None or np.array_equal(tiff, anomaly_map)
    assert png.dtype == (np.uint8 if name in ("default", "GRAYSCALE") else np.uint16)
EOF
