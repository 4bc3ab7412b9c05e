"""Decoding of image files in all common formats: photos as 8-bit RGB, ground truth as bool.

Pillow reads the files. This module interprets their content: the orientation, the range of 16-bit,
32-bit and float values, and the compression noise of a mask.
"""
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.console import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
LOSSY_FORMATS = {"JPEG", "MPO", "WEBP"}                 # Pillow's names; suffixes may be wrong
TOO_DARK = ("{}: no 16-bit value passes 4095, so the image is nearly black; multiply 12-bit values "
            "by 16, 8-bit ones by 257")


def open_image(path: Path, is_mask: bool = False) -> Image.Image:
    """Read and `decode` an image file. Raises InputError for a file that is not an image or is
    truncated, and for values of unknown range."""
    try:
        with Image.open(path) as image:
            return decode(image, path, is_mask)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it")
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise InputError(f"{path}: has more than the {limit:.0f} million pixels that are read; cut "
                         f"it into parts, or reduce it")


def decode(image: Image.Image, name, is_mask: bool = False) -> Image.Image:
    """An image in its EXIF orientation, with 8 bits per channel or as 16-bit grey ("I;16").

    name: the image's name in warnings. Raises ValueError if the range of its values is unknown;
    nearly all floats must lie in 0..1. Warns if there are pages after the first and, except for a
    mask, if 16-bit values seem to have fewer bits.
    """
    is_16_bit = ";16" in str(getattr(image, "tile", ""))           # load() clears `tile`
    image.load()
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        warnings.warn(f"{name}: {image.n_frames} pages, only the first is read")
    tags, upright = getattr(image, "tag_v2", {}), ImageOps.exif_transpose(image)
    if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:
        raise ValueError("16-bit colour in planes; save it as 8-bit")
    largest = 0
    if image.mode == "F":
        upright = sixteen_bits(upright, tags)
    elif image.mode.startswith("I"):
        upright = sixteen_bits(upright, tags)
        largest = np.asarray(upright).max()
    elif is_16_bit:                                # Pillow keeps the upper 8 bits of colours
        largest = 256 * max(high for _, high in upright.convert("RGB").getextrema()) + 255
    if 0 < largest < 4096 and not is_mask:
        warnings.warn(TOO_DARK.format(name))
    return upright


def sixteen_bits(image: Image.Image, tags) -> Image.Image:
    """Convert a grey image of 16 or 32 bits or floats to 16 bits. tags: its TIFF tags, or {}.

    Raises ValueError if the range of its values is unknown.
    """
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise ValueError(f"{(~np.isfinite(values)).sum()} of its values are not finite")
        outside = (values < 0) | (values > 1)
        if outside.mean() > 0.001:
            raise ValueError(f"floats from {values.min():.3g} to {values.max():.3g}; they are read "
                             f"as 0..1, so divide them, or save as 8- or 16-bit")
        values = (values.clip(0, 1) * 65535).round()
    elif values.min() < 0 or values.max() > 65535 or 32 in tags.get(258, ()):
        raise ValueError("32-bit whole numbers, of which no range is known; save it as 8- or "
                         "16-bit")
    if tags.get(262) == 0:                                        # 0 stands for white
        values = 65535 - values.astype(np.int64)
    return Image.fromarray(values.astype(np.uint16))


def size_of(path: Path) -> tuple[int, int]:
    """Width and height in EXIF orientation. Only a TIFF, which loading rotates, is decoded."""
    with Image.open(path) as image:
        if image.format == "TIFF":
            return ImageOps.exif_transpose(image).size
        transposed = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return image.size[::-1] if transposed else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of `open_image` to 8-bit RGB: grey, palette, alpha (dropped) or 16-bit."""
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values * (255 / 65535)).round().astype(np.uint8))
    return image.convert("RGB")


def read_mask(path: Path) -> np.ndarray:
    """The anomalous pixels of a mask file, bool [H, W], by the rule in `data.load_mask`."""
    image = open_image(path, is_mask=True)
    values = np.asarray(image if image.mode in ("L", "1") or image.mode[0] == "I"
                        else image.convert("RGB")).astype(int)
    values = values.reshape(*values.shape[:2], -1).max(-1)
    largest = values.max(initial=0)
    with Image.open(path) as file:
        lossy = file.format in LOSSY_FORMATS or file.info.get("compression") == "jpeg"    # TIFF
    threshold = largest / 2 if lossy else largest / 10 if largest > 127 else 0
    return values > threshold
