"""Image files decoded: photos as 8-bit RGB, ground truth as bool; any of the usual formats.

Pillow reads the files. What is decided here is which numbers they hold: the orientation, the range
of 16-bit, 32-bit and float values, the noise of a lossy mask.
"""
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.console import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
LOSSY_FORMATS = {"JPEG", "MPO", "WEBP"}                 # whatever a file's suffix says
TOO_DARK = ("{}: no 16-bit value passes 4095, so the image is nearly black; multiply 12-bit values "
            "by 16, 8-bit ones by 257")


def open_image(path: Path, is_mask: bool = False) -> Image.Image:
    """The image of a file, as `decode` gives it. Raises InputError for a file that is not an image,
    is cut off, or whose values have no known range."""
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
    """An image upright as its EXIF says, of 8 bits a channel or 16-bit grey ("I;16").

    Raises ValueError where the range of its values is not known: floats are read as 0..1, as nearly
    all of them must lie there. Warns, by name, of pages after the first and, but for a mask, of
    16-bit values that may be of fewer bits.
    """
    sixteen = ";16" in str(getattr(image, "tile", ""))           # gone once it is decoded
    image.load()
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        warnings.warn(f"{name}: {image.n_frames} pages, only the first is read")
    tags, upright = getattr(image, "tag_v2", {}), ImageOps.exif_transpose(image)
    if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:
        raise ValueError("16-bit colour in planes; save it as 8-bit")
    top = 0
    if image.mode == "F":
        upright = sixteen_bits(upright, tags)
    elif image.mode.startswith("I"):
        upright = sixteen_bits(upright, tags)
        top = np.asarray(upright).max()
    elif sixteen:                                         # of colours the upper 8 bits are left
        top = 256 * max(high for _, high in upright.convert("RGB").getextrema()) + 255
    if 0 < top < 4096 and not is_mask:
        warnings.warn(TOO_DARK.format(name))
    return upright


def sixteen_bits(image: Image.Image, tags) -> Image.Image:
    """A grey image of 16 or 32 bits or of floats as one of 16 bits; tags: a TIFF's.

    Raises ValueError where the range of its values is not known.
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
    if tags.get(262) == 0:                                        # white is zero
        values = 65535 - values.astype(np.int64)
    return Image.fromarray(values.astype(np.uint16))


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an image, upright; only a TIFF, which turns itself, is decoded."""
    with Image.open(path) as image:
        if image.format == "TIFF":
            return ImageOps.exif_transpose(image).size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any image of `open_image`: grey-scale, palette, alpha (dropped), 16-bit."""
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values * (255 / 65535)).round().astype(np.uint8))
    return image.convert("RGB")


def read_mask(path: Path) -> np.ndarray:
    """The anomalous pixels of a mask's file, bool [H, W]; see `load_mask`."""
    image = open_image(path, is_mask=True)
    values = np.asarray(image if image.mode in ("L", "1") or image.mode[0] == "I"
                        else image.convert("RGB")).astype(int)
    values = values.reshape(*values.shape[:2], -1).max(-1)
    top = values.max(initial=0)
    with Image.open(path) as file:
        lossy = file.format in LOSSY_FORMATS or file.info.get("compression") == "jpeg"    # a TIFF's
    least = top / 2 if lossy else top / 10 if top > 127 else 0
    return values > least
