"""Decoding of image files in all common formats: photos as 8-bit RGB, ground truth as bool.

Pillow reads the files. This module interprets their content: the orientation, the range of 16-bit,
32-bit and float values, and the compression noise of a mask. It also names content that can be read
but is probably wrong: photos that lose their grey levels, masks among photos, inverted masks.
"""
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps

from support.console import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
LOSSY_FORMATS = {"JPEG", "MPO", "WEBP"}                 # Pillow's names; suffixes may be wrong
TOO_DARK = ("{}: no 16-bit value passes 4095, so the image is nearly black; multiply 12-bit values "
            "by 16, 8-bit ones by 257")
FEW_LEVELS = ("{}: only the upper 8 of 16 bits are read, so {} grey levels are left; stretch the "
              "values of all photos in the same way before you use them")
LIKE_A_MASK = ("{}: at most two grey values, like a mask rather than a photo; masks belong in "
               "ground_truth")


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
    mask, if 16-bit values lose most of their grey levels or if the image looks like a mask.
    """
    is_16_bit = ";16" in str(getattr(image, "tile", ""))           # load() clears `tile`
    load_unmapped(image)
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        warnings.warn(f"{name}: {image.n_frames} pages, only the first is read")
    tags, upright = getattr(image, "tag_v2", {}), ImageOps.exif_transpose(image)
    if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:
        raise ValueError("16-bit colour in planes; save it as 8-bit")
    if image.mode == "F" or image.mode.startswith("I"):
        upright = sixteen_bits(upright, tags)
    elif image.mode == "1" and tags.get(262) == 0 and str(tags.get(305)).startswith("tifffile"):
        upright = ImageChops.invert(upright)       # it stores True as 1, but calls 0 white
    if is_mask:
        return upright
    if upright.mode.startswith("I"):
        warned = warn_of_lost_levels(np.asarray(upright), name)
    else:                                          # of 16-bit colours Pillow keeps the upper 8 bits
        warned = is_16_bit and warn_of_lost_levels(
            np.maximum(257 * np.asarray(upright.convert("RGB"), np.uint16), 1), name, cut=True)
    if not warned and is_two_valued(upright):
        warnings.warn(LIKE_A_MASK.format(name))
    return upright


def load_unmapped(image: Image.Image) -> None:
    """`image.load()` without mapping the file into memory, as Pillow does with an uncompressed file
    that it opened by its name: Pillow 13 garbles a mapped TIFF of orientation 5 to 8."""
    name, image.filename = getattr(image, "filename", ""), ""
    try:
        image.load()
    finally:
        image.filename = name


def warn_of_lost_levels(values: np.ndarray, name, cut: bool = False) -> bool:
    """Warn if few grey levels of a photo are left when the upper 8 of 16 bits are read.

    Few are less than 64 and at most half of those in the file or, if the lower 8 bits are missing
    already (`cut`), less than 16. The darkest and the brightest thousandth of the pixels do not
    count, because cameras have faulty pixels. values: uint16 [H, W] or [H, W, C]; alpha does not
    count. Returns whether there was a warning.
    """
    counts = np.bincount((values[..., :3] if values.ndim == 3 else values).ravel())
    if 1 < len(counts) <= 4096:
        warnings.warn(TOO_DARK.format(name))
        return True
    sums = counts.cumsum()
    first = np.searchsorted(sums, 0.001 * sums[-1], side="right")
    last = np.searchsorted(sums, 0.999 * sums[-1])
    levels = first + np.flatnonzero(counts[first:last + 1])
    n_left = len(np.unique((levels / 257).round()))
    few = n_left < 16 if cut else n_left < 64 and 2 * n_left <= len(levels)
    if few:
        number = n_left if cut else f"{n_left} of {len(levels)}"
        warnings.warn(FEW_LEVELS.format(name, number))
    return few


def is_two_valued(image: Image.Image) -> bool:
    """Whether an image has at most two grey values and one of them is black or white."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        return bool((low == 0 or high == 65535) and ((values == low) | (values == high)).all())
    image = image if image.mode in ("1", "L", "RGB") else image.convert("RGB")
    colours = {tuple(np.atleast_1d(colour).tolist()) for _, colour in image.getcolors(2) or []}
    return bool(colours & {(0,), (255,), (0, 0, 0), (255, 255, 255)}
                and all(len(set(colour)) == 1 for colour in colours))


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


# ---------------------------------------------------------------- masks

def read_mask(path: Path) -> np.ndarray:
    """The anomalous pixels of a mask file, bool [H, W], by the rule in `data.load_mask`."""
    values, threshold = mask_values(path)
    return values > threshold


def mask_values(path: Path) -> tuple[np.ndarray, float]:
    """The values of a mask file, int [H, W], and the largest value that counts as normal."""
    image = open_image(path, is_mask=True)
    values = np.asarray(image if image.mode in ("L", "1") or image.mode[0] == "I"
                        else image.convert("RGB")).astype(int)
    values = values.reshape(*values.shape[:2], -1).max(-1)
    largest = values.max(initial=0)
    with Image.open(path) as file:
        lossy = file.format in LOSSY_FORMATS or file.info.get("compression") == "jpeg"    # TIFF
    threshold = largest / 2 if lossy else largest / 10 if largest > 127 else 0
    return values, threshold


def doubts_about_mask(path: Path) -> list[str]:
    """What in a mask can be read but is probably wrong, a line of text each.

    It is named if it covers more than half of its image and touches all four edges, as an inverted
    mask does, and if it has two to four values besides black, such as a class and a void label.
    """
    values, threshold = mask_values(path)
    mask, lines = values > threshold, []
    if mask.mean() > 0.5 and all(edge.any() for edge in (mask[0], mask[-1], mask[:, 0],
                                                         mask[:, -1])):
        lines.append(f"{path}: covers {mask.mean():.1%} of its image and touches all four edges; "
                     f"is it inverted? White is the defect")
    others = np.unique(values[values > 0])
    if 2 <= len(others) <= 4:
        lines.append(f"{path}: holds the values {', '.join(map(str, others))} besides black; those "
                     f"above {threshold:g} count as defect")
    return lines


def masks_among(paths: list[Path]) -> list[Path]:
    """Those of several images of one name that look like masks of the others; may be [].

    An image looks like a mask if 95 % of its pixels, and half of those that are not about black,
    are about black or about as bright as the brightest pixel. If all do, as photos of parts before
    a lamp may, those with less than half as many grey levels as another one are the masks.
    """
    levels, like_masks = {}, []
    for path in paths:
        try:
            grey = np.asarray(to_rgb(open_image(path, is_mask=True))).max(-1)
        except InputError:
            continue                               # named when it is read as a photo
        counts = np.bincount(grey.ravel())
        width = len(counts) // 8
        between = counts[width + 1:len(counts) - 1 - width].sum()
        levels[path] = np.count_nonzero(counts)
        if between <= min(0.05 * counts.sum(), 0.5 * counts[width + 1:].sum()):
            like_masks.append(path)
    if len(like_masks) < len(levels):
        return like_masks
    return [path for path in like_masks if 2 * levels[path] < max(levels.values())]
