#!/usr/bin/env bash
# Pillow opens a 16-bit grey PNG as mode "I;16" and treats it as 8 bits in several places, without a
# warning. convert("L") and convert("RGB"), which most image loaders call, clip at 255, so a photo
# with the full range of 16 bits becomes white. rotate with BILINEAR or BICUBIC returns values of at
# most 255 that have nothing to do with the picture (NEAREST is right). ImageStat's mean is wrong.
# resize is right. A 16-bit colour PNG is opened as its high bytes, so it keeps its picture.
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
from PIL import Image, ImageStat

grey = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (64, 1))
Image.fromarray(grey).save("grey.png")
cv2.imwrite("colour.png", np.stack([grey] * 3, -1))
print("Pillow", PIL.__version__)
white = {}
for name in ("grey.png", "colour.png"):
    for mode in ("L", "RGB"):
        with Image.open(name) as image:
            white[name, mode] = float((np.asarray(image.convert(mode)) == 255).mean())
            print(f"{name}, opened as {image.mode}, convert({mode!r}): "
                  f"{100 * white[name, mode]:.1f} % of the pixels are white")
assert min(white["grey.png", "L"], white["grey.png", "RGB"]) > 0.99
assert max(white["colour.png", "L"], white["colour.png", "RGB"]) < 0.01

image, as_float = Image.open("grey.png"), Image.fromarray(grey.astype(np.float32))
largest = {name: (int(np.asarray(image.rotate(10, how)).max()),
                  int(np.asarray(as_float.rotate(10, how)).max()))
           for name, how in (("NEAREST", Image.NEAREST), ("BILINEAR", Image.BILINEAR))}
for name, (found, truth) in largest.items():
    print(f"rotated by 10 degrees, {name}: largest value {found}, of the same picture as float "
          f"{truth}")
mean = ImageStat.Stat(image).mean[0]
print(f"ImageStat mean {mean:.0f}, truth {grey.mean():.0f}")
assert largest["NEAREST"] == (65535, 65535) and largest["BILINEAR"][0] < 256 and mean < 256
small = np.asarray(image.resize((64, 16), Image.BILINEAR)).astype(float)
assert np.abs(small - np.asarray(as_float.resize((64, 16), Image.BILINEAR))).max() <= 1
EOF
