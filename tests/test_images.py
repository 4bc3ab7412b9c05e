"""How image files are decoded: photos as cameras store them, numbers of any range, masks as
programs write them, and what predict.py takes from Python."""
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import predict
from data import load_mask
from helpers import picture, png
from support.console import InputError
from support.images import doubts_about_mask, open_image, read_mask, size_of, to_rgb
from support.layouts import Item

T = Image.Transpose
# How a photo is stored for each of EXIF's orientations, 1 to 8.
STORED = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
          6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
GREY = np.arange(4096).reshape(64, 64)                              # all values of 12 bits


# ---------------------------------------------------------------- how photos are stored

def upright() -> np.ndarray:
    image = np.full((16, 48, 3), 120, np.uint8)
    image[:8, :16], image[8:, 40:] = 240, 10
    return image


def turned(image: np.ndarray, orientation: int, path: Path) -> Path:
    """The file that a camera writes of the image where it was held otherwise."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(image)
    if STORED[orientation] is not None:
        stored = stored.transpose(STORED[orientation])
    stored.save(path, exif=exif, **({"quality": 97} if path.suffix == ".jpg" else
                                    {"lossless": True} if path.suffix == ".webp" else {}))
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_photo_is_read_as_a_viewer_shows_it(tmp_path, suffix, orientation):
    path = turned(upright(), orientation, tmp_path / f"photo{suffix}")
    with Image.open(path) as opened:
        assert opened.size == ((16, 48) if orientation > 4 else (48, 16)) or suffix == ".tif"
        for image in (to_rgb(open_image(path)), predict.as_rgb(opened)):
            assert np.abs(np.asarray(image).astype(int) - upright()).max() <= 8
    assert size_of(path) == (48, 16)


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_uncompressed_tiff_is_turned_as_its_tag_says(tmp_path, mode, orientation):
    """Read by its name, and as an image that the user has opened."""
    levels = np.random.default_rng(0).integers(0, 256, (16, 48, 4)).astype(np.uint8)
    if mode == "I;16":
        original = Image.fromarray(257 * levels[..., 0].astype(np.uint16))
    else:
        original = Image.fromarray(levels).convert("RGB").convert(mode)
    turned = original if orientation == 1 else original.transpose(STORED[orientation])
    turned.save(tmp_path / "part.tif", tiffinfo={274: orientation})
    with Image.open(tmp_path / "part.tif") as opened:
        for image in (open_image(tmp_path / "part.tif"), predict.as_rgb(opened)):
            assert np.array_equal(to_rgb(image), to_rgb(original))
        assert opened.filename == str(tmp_path / "part.tif")


def test_a_mask_is_compared_with_the_photo_as_it_is_shown(tmp_path):
    """A mask painted over a viewer's picture and one turned like the photo are the same mask."""
    photo = turned(upright(), 6, tmp_path / "photo.jpg")
    mask = np.zeros((16, 48), np.uint8)
    mask[2:6, 4:12] = 255
    png(tmp_path / "plain.png", mask)
    turned(mask, 8, tmp_path / "turned.png")
    for name in ("plain.png", "turned.png"):
        truth = load_mask(Item(photo, 1, "cut", tmp_path / name), 48, 48)
        assert truth[6:18, 4:12].all() and truth.sum() == 12 * 8


def test_a_turned_photo_gets_the_score_and_the_pictures_of_the_upright_one(trained_parts, tmp_path):
    model = predict.load(trained_parts / "runs/parts/bolt", "cpu", infer_steps=1)
    first, second = model.inspect([upright(), turned(upright(), 6, tmp_path / "photo.png")])
    assert first.score == pytest.approx(second.score, rel=1e-4)
    assert second.heat_map().size == second.size == (48, 16)
    assert second.restored.shape == (16, 48, 3)


def test_a_photo_beyond_pillows_limit_is_refused_with_what_to_do(tmp_path, monkeypatch):
    png(tmp_path / "line.png", picture(size=64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="line.png: has more than .* million pixels.*reduce it"):
        open_image(tmp_path / "line.png")


# ---------------------------------------------------------------- the range of the numbers

def tiff(path: Path, values: np.ndarray, photometric: int = 0, planes: bool = False) -> Path:
    """An uncompressed TIFF of any numbers, [H, W] or [H, W, 3]; Pillow writes few of these."""
    H, W, C = (*values.shape, 1)[:3]
    values = values.astype(values.dtype.newbyteorder("<"))
    pixels = (values.transpose(2, 0, 1) if planes else values).tobytes()
    size = len(pixels) // C if planes else len(pixels)
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: [W], 257: [H], 258: [8 * values.itemsize] * C, 259: [1],
            262: [photometric or (2 if C == 3 else 1)], 277: [C], 278: [H], 339: [kind] * C,
            273: [size * k for k in range(C if planes else 1)], 279: [size] * (C if planes else 1),
            284: [2 if planes else 1]}
    if photometric == -1:
        tags[262] = [0]                                             # white is zero
    start = 8 + 2 + 12 * len(tags) + 4
    room = sum(4 * len(v) for v in tags.values() if len(v) > 1)
    tags[273] = [start + room + offset for offset in tags[273]]
    entries, extra = b"", b""
    for tag, content in sorted(tags.items()):                       # all as 32-bit numbers
        place = content[0] if len(content) == 1 else start + len(extra)
        extra += struct.pack(f"<{len(content)}I", *content) if len(content) > 1 else b""
        entries += struct.pack("<HHII", tag, 4, len(content), place)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + extra
                     + pixels)
    return path


@pytest.mark.parametrize("values", [
    GREY.astype(np.float32), np.full((64, 64), np.nan, np.float32),
    *(np.where(GREY == 7, bad, GREY / 4095).astype(np.float32)
      for bad in (np.nan, np.inf, -np.inf)),
    GREY.astype(np.float32) / 16, GREY.astype(np.float64), (GREY * 244).astype(np.int32),
    (GREY * 2 ** 20).astype(np.uint32), (GREY - 9).astype(np.int32), (GREY * 16).astype(np.uint32)])
def test_numbers_of_an_unknown_range_are_refused_by_the_name_of_the_file(tmp_path, values):
    path = tiff(tmp_path / "part.tif", values)
    with pytest.raises(InputError, match="part.tif: cannot be read.*; replace or remove it"):
        open_image(path)
    with pytest.raises(InputError, match="an array .* not an image"):
        predict.as_rgb(values)
    if values.dtype == np.float32:
        with pytest.raises(ValueError, match="not finite|floats from 0 to"):
            predict.as_rgb(Image.fromarray(values))


@pytest.mark.parametrize("odd", [1.01, 256, -0.5, 1])
def test_a_single_pixel_out_of_range_changes_no_other_pixel(tmp_path, odd):
    values = np.where(GREY == 7, odd, GREY / 4095).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "part.tif")
    expected = (GREY / 4095 * 255).round()
    expected[0, 7] = 255 * min(max(odd, 0), 1)
    for image in (to_rgb(open_image(tmp_path / "part.tif")),
                  predict.as_rgb(Image.fromarray(values))):
        assert np.abs(np.asarray(image)[..., 0] - expected).max() <= 1


def test_16_bit_tiffs_with_white_as_zero_or_with_colour_planes(tmp_path):
    """White as zero is inverted; 16-bit colours in planes are refused."""
    deep = (GREY * 16).astype(np.uint16)
    plain = tiff(tmp_path / "plain.tif", deep)
    inverted = tiff(tmp_path / "inverted.tif", 65535 - deep, photometric=-1)
    images = [np.asarray(to_rgb(open_image(path))) for path in (plain, inverted)]
    assert np.array_equal(*images) and images[0].max() == 255
    colours = np.stack([deep, deep.T, deep[::-1]], -1)
    assert open_image(tiff(tmp_path / "colours.tif", colours)).mode == "RGB"
    with pytest.raises(InputError, match="planes.tif: .*16-bit colour in planes"):
        open_image(tiff(tmp_path / "planes.tif", colours, planes=True))


def warnings_of(function, *args) -> list[str]:
    """The warnings of a call, as text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.mark.parametrize("top", [255, 4095, 65520])
@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "colour.tif", "array", "colours"])
def test_a_warning_names_values_of_fewer_bits_than_their_file_has(tmp_path, kind, top):
    values = (GREY * (top / 4095)).astype(np.uint16)
    colours = np.stack([values] * 3, -1)
    if kind.startswith("grey"):
        Image.fromarray(values).save(tmp_path / kind)
    elif kind == "colour.tif":
        tiff(tmp_path / kind, colours)
    image = {"array": values, "colours": colours}.get(kind, tmp_path / kind)
    lines = warnings_of(predict.as_rgb, image)
    assert len(lines) == (top < 4096) and all("nearly black" in line for line in lines)
    assert kind in ("array", "colours") or not lines or kind in lines[0]
    if kind == "grey.png":
        assert warnings_of(read_mask, image) == []                  # numbers of classes


@pytest.mark.parametrize("base, step", [(51200, 4), (32268, 4), (60000, 1), (4000, 2)])
@pytest.mark.parametrize("kind", ["part.png", "part.tif", "floats.tif", "an array", "colours.tif"])
def test_a_photo_that_loses_its_grey_levels_is_named(tmp_path, kind, base, step):
    """As of a thermal camera, whose counts lie in a narrow band; with faulty pixels."""
    values = (base + step * (GREY // 16)).astype(np.uint16)             # 256 grey levels
    values[0, :2] = 0, 65535
    image = tmp_path / kind
    if kind == "an array":
        image = values
    elif kind == "floats.tif":
        Image.fromarray((values / 65535).astype(np.float32)).save(image)
    elif kind == "colours.tif":
        tiff(image, np.stack([values] * 3, -1))
    else:
        Image.fromarray(values).save(image)
    lines = warnings_of(predict.as_rgb, image)
    left = len(np.unique((values[1:] // 256 if kind == "colours.tif" else
                          (values[1:] / 257).round())))
    number = f"{left} grey" if kind == "colours.tif" else f"{left} of 256 grey"
    assert len(lines) == 1 and f"{kind}: only the upper 8 of 16 bits" in lines[0]
    assert f"so {number} levels are left; stretch the values of all photos" in lines[0]
    assert kind == "an array" or warnings_of(read_mask, image) == []


@pytest.mark.parametrize("values", [GREY * 16, GREY // 16 * 257, 30000 + GREY // 100 * 257,
                                    20000 + GREY * 8, np.full((64, 64), 40000)])
def test_photos_that_keep_their_grey_levels_are_not_named(tmp_path, values):
    """All of the range; 8-bit values in 16 bits, of low contrast, too; half of the range; a plain
    surface."""
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "part.png")
    assert warnings_of(open_image, tmp_path / "part.png") == []


@pytest.mark.parametrize("values, named", [
    ([0, 255], True), ([0, 1], True), ([0, 128], True), ([255, 20], True), ([0], True),
    ([255], True), ([9, 200], False), ([90], False), ([0, 1, 2], False), ([0, 254, 255], False)])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "1", "I;16"])
def test_pictures_of_two_grey_values_are_named_among_photos(tmp_path, mode, values, named):
    grey = np.resize(np.array(values, np.uint8), (8, 9))
    image = Image.fromarray(grey).convert(mode) if mode != "I;16" else \
        Image.fromarray(np.where(grey == 255, 65535, grey * np.uint16(250)))
    image.save(tmp_path / "part.png")
    lines = [line for line in warnings_of(open_image, tmp_path / "part.png")
             if "nearly black" not in line]
    named |= mode == "1"
    assert len(lines) == (named and not (mode == "I;16" and values == [0, 1]))
    assert all("part.png: at most two grey values, like a mask rather" in line for line in lines)
    assert warnings_of(read_mask, tmp_path / "part.png") == []


def test_a_picture_of_two_colours_is_a_photo(tmp_path):
    png(tmp_path / "part.png", np.where(GREY[..., None] % 2, (0, 0, 0), (200, 30, 30)))
    assert warnings_of(open_image, tmp_path / "part.png") == []


@pytest.mark.parametrize("kind", ["two.tif", "two.webp", "two.png"])
def test_of_several_pages_the_first_is_read_and_the_others_are_mentioned(tmp_path, kind):
    first, second = (Image.fromarray(picture(value).astype(np.uint8)) for value in (50, 200))
    first.save(tmp_path / kind, save_all=True, append_images=[second])
    lines = warnings_of(open_image, tmp_path / kind)
    assert len(lines) == 1 and kind in lines[0] and "2 pages" in lines[0]
    assert abs(np.asarray(open_image(tmp_path / kind)).mean() - 50) < 2


# ---------------------------------------------------------------- what predict.py takes from Python

KINDS = {"RGB": lambda a: a, "grey": lambda a: a[..., 0], "grey, 1": lambda a: a[..., :1],
         "RGBA": lambda a: np.dstack([a, a[..., 0]]),
         "16 bits": lambda a: a.astype(np.uint16) * 257,
         "16 bits, grey": lambda a: a[..., 0].astype(np.uint16) * 257,
         "16 bits, RGBA": lambda a: np.dstack([a, a[..., 0]]).astype(np.uint16) * 257,
         "PIL": Image.fromarray, "PIL, grey": lambda a: Image.fromarray(a).convert("L"),
         "PIL, alpha": lambda a: Image.fromarray(a).convert("RGBA"),
         "PIL, palette": lambda a: Image.fromarray(a[..., 0]).convert("P"),
         "PIL, 16 bits": lambda a: Image.fromarray(a[..., 0].astype(np.uint16) * 257),
         "PIL, floats": lambda a: Image.fromarray((a[..., 0] / 255).astype(np.float32))}


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_or_pillow_image_of_any_kind_is_the_same_rgb_image(kind):
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (9, 7, 1)).astype(np.uint8), 3, -1)
    image = predict.as_rgb(KINDS[kind](grey))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), grey)


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3)), np.zeros((8, 8, 3), bool), None, 3,
                                   np.zeros((3, 8, 8), np.uint8), np.zeros((1, 8, 8, 3), np.uint8),
                                   np.zeros((0, 8), np.uint8), torch.zeros(3, 8, 8), [[1, 2]],
                                   np.zeros((8, 8, 3), np.int64), np.zeros(8, np.uint8)])
def test_anything_else_is_refused_with_what_is_accepted(trained_parts, image):
    model = predict.load(trained_parts / "runs/parts/bolt", "cpu")
    with pytest.raises(ValueError, match=r"not an image; a path, a PIL image, or an array \[H, W"):
        model.inspect([image])
    assert model.inspect([]) == []


# ---------------------------------------------------------------- masks as programs write them

def drawn_mask() -> np.ndarray:
    """A disc and a slanted scratch, with edges that ring in a lossy compression."""
    y, x = np.mgrid[:160, :200]
    disc, scratch = np.hypot(y - 45, x - 60) < 25, (abs(2 * y - x - 150) < 5) & (x > 14)
    return np.where(disc | scratch, 255, 0).astype(np.uint8)


@pytest.mark.parametrize("name, options", [
    *((name, {"quality": quality}) for name in ("a.jpg", "a.jfif", "a.webp", "a.tif")
      for quality in (95, 75, 50)),
    ("a.png", {"format": "JPEG", "quality": 50})])                  # as some programs name it
def test_a_lossy_mask_has_the_regions_that_were_drawn(tmp_path, name, options):
    more = {"compression": "jpeg"} if name == "a.tif" else {}
    Image.fromarray(drawn_mask()).save(tmp_path / name, **options, **more)
    mask, expected = read_mask(tmp_path / name), drawn_mask() > 0
    assert ndimage.label(mask, np.ones((3, 3)))[1] == 2
    assert (mask & expected).sum() / (mask | expected).sum() > 0.99


def test_noise_in_the_background_of_a_mask_is_no_defect(tmp_path):
    noise = np.random.default_rng(0).integers(0, 6, drawn_mask().shape)
    png(tmp_path / "mask.png", np.maximum(drawn_mask(), noise))
    assert np.array_equal(read_mask(tmp_path / "mask.png"), drawn_mask() > 0)


def one_bit_tiff(path: Path, mask: np.ndarray, photometric: int, software: bytes) -> Path:
    """A TIFF of one bit a pixel. tifffile writes a bool array with photometric 0 (white is zero),
    without BitsPerSample, and with its own name as the software."""
    bits = np.packbits(mask, axis=1).tobytes()
    values = {256: mask.shape[1], 257: mask.shape[0], 259: 1, 262: photometric, 273: 0, 277: 1,
              278: mask.shape[0], 279: len(bits)}
    start = 8 + 2 + 12 * (len(values) + bool(software)) + 4
    values[273] = start + len(software)
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items()]
    if software:
        entries.append(struct.pack("<HHII", 305, 2, len(software), start))
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
                     + software + bits)
    return path


@pytest.mark.parametrize("photometric, software, inverted", [
    (0, b"tifffile.py\0", False), (1, b"tifffile.py\0", False), (1, b"", False),
    (0, b"", True), (0, b"a scanner\0", True)])
def test_a_bool_mask_of_tifffile_is_read_as_it_was_written(tmp_path, photometric, software,
                                                          inverted):
    """By the standard its file shows the negative, as a fax shows black ink for ones."""
    mask = drawn_mask() > 0
    path = one_bit_tiff(tmp_path / "mask.tif", mask, photometric, software)
    assert np.array_equal(read_mask(path), ~mask if inverted else mask)
    assert np.array_equal(np.asarray(to_rgb(open_image(path)))[..., 0] > 0,
                          ~mask if inverted else mask)


@pytest.mark.parametrize("compression", [None, "group3", "group4", "tiff_lzw", "packbits"])
def test_a_bool_mask_of_pillow_is_read_as_it_was_written(tmp_path, compression):
    mask = drawn_mask() > 0
    Image.fromarray(mask).save(tmp_path / "mask.tif", compression=compression)
    assert np.array_equal(read_mask(tmp_path / "mask.tif"), mask)


@pytest.mark.parametrize("values, expected", [
    ({}, []), ({255: 1.0}, ["covers 100.0%"]), ({255: 0.6}, ["covers 60.0%"]), ({255: 0.4}, []),
    ({1: 0.1, 255: 0.1}, ["holds the values 1, 255 besides black; those above 25.5 count"]),
    ({100: 0.1, 200: 0.7}, ["covers 80.0%", "holds the values 100, 200"]),
    ({value: 0.02 for value in range(1, 7)}, [])])
def test_doubts_about_a_mask(tmp_path, values, expected):
    """Values of rows of the mask, and the share of each in all rows."""
    mask, row = np.zeros((100, 20)), 0
    for value, share in values.items():
        mask[row:row + round(100 * share)] = value
        row += round(100 * share)
    mask[-1] = mask[0] if sum(values.values()) > 0.5 else 0              # touches all edges, or not
    png(tmp_path / "mask.png", mask)
    doubts = doubts_about_mask(tmp_path / "mask.png")
    assert len(doubts) == len(expected)
    for doubt, text in zip(doubts, expected):
        assert doubt.startswith(f"{tmp_path / 'mask.png'}: ") and text.split("0.0%")[0] in doubt


def test_a_large_defect_inside_the_image_is_no_inverted_mask(tmp_path):
    mask = np.full((50, 50), 255)
    mask[:, 0] = 0
    png(tmp_path / "mask.png", mask)
    assert doubts_about_mask(tmp_path / "mask.png") == []


@pytest.mark.parametrize("value", [1, 3, 127, 128, 255])
def test_a_class_of_a_mask_is_anomalous_whatever_its_number(tmp_path, value):
    png(tmp_path / "mask.png", np.where(drawn_mask(), value, 0))
    assert np.array_equal(read_mask(tmp_path / "mask.png"), drawn_mask() > 0)
