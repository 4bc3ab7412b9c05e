#!/usr/bin/env bash
# cv2.imwrite returns True where it cannot write the array's type: it casts to 8 bits without
# scaling, and prints a line about it on stderr at most. An anomaly map in [0, 1] becomes zeros and
# ones: float32 as PNG, and float16 even as TIFF, which holds floats. A 16-bit photo saved as JPEG
# is white.
#
# Exits with 0 while this holds, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 opencv-python-headless==5.0.0.93
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
import cv2
import numpy as np

anomaly_map = np.linspace(0, 1, 64 * 64).reshape(64, 64)
photo = np.tile(np.linspace(2000, 60000, 64).astype(np.uint16), (64, 1))
print("OpenCV", cv2.__version__)
found = {}
for name, array in (("map32.png", anomaly_map.astype(np.float32)),
                    ("map16.tif", anomaly_map.astype(np.float16)), ("photo.jpg", photo)):
    returned = cv2.imwrite(name, array)
    read = cv2.imread(name, cv2.IMREAD_UNCHANGED)
    found[name] = (returned, str(read.dtype), np.unique(read).tolist())
    print(f"{name}: {array.dtype} {array.min():g} to {array.max():g}, imwrite returns {returned}; "
          f"read again: {read.dtype}, values {found[name][2]}")
assert found == {"map32.png": (True, "uint8", [0, 1]), "map16.tif": (True, "uint8", [0, 1]),
                 "photo.jpg": (True, "uint8", [255])}
cv2.imwrite("map32.tif", anomaly_map.astype(np.float32))                # float32 TIFF is right
assert np.array_equal(cv2.imread("map32.tif", -1), anomaly_map.astype(np.float32))
EOF
