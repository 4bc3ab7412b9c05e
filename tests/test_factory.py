"""Files and runs as they occur in factories: photos of phones, masks of any program, folders that
people and systems fill, runs that are added to, moved, shared, cut short or taken up elsewhere."""
import contextlib
import dataclasses
import errno
import importlib.util
import io
import json
import ntpath
import os
import re
import shutil
import struct
import sys
import threading
import warnings
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import bench
import data
import demo
import download
import evaluate
import figures
import predict
import runs
import train
from settings import InputError, Settings, exit_status, parse
from test_data import mvtec_tree, picture, png
from test_predict import rows_of
from test_runs import authors_state
from test_train import argv_for, contents, refused, trained  # noqa: F401

T = Image.Transpose
APPLE = bytes.fromhex("00051607000200004d6163204f5320582020202020202020") + bytes(80)
BYTES = os.fsdecode(b"caf\xe9")                             # a name that is no UTF-8


@pytest.fixture
def factory(trained, tmp_path) -> Path:  # noqa: F811
    """A copy of `trained`, as if the run had been made there."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs/parts/bolt/data.json"
    path.write_text(json.dumps({**json.loads(path.read_text()),
                                "root": str(tmp_path / "parts/bolt")}))
    return tmp_path


@pytest.fixture
def bolt(tmp_path) -> Path:
    """A category of four good training images, a good one and two defective ones for the test."""
    return mvtec_tree(tmp_path / "parts" / "bolt")


def read(bolt) -> data.Category:
    return data.find_category(str(bolt.parent), bolt.name, bolt.parent)


def check(folder, capsys) -> tuple[int, str]:
    capsys.readouterr()
    return download.main(["--check", str(folder)]), capsys.readouterr().out


def settings_for(bolt, **changes) -> Settings:
    return Settings(data=str(bolt.parent), category=bolt.name, root=str(bolt.parent), resize=16,
                    crop=16, foreground="none", **changes)


def inspect_with(run, *words) -> int:
    return predict.main([str(run), *map(str, words), "--device", "cpu", "--infer-steps", "1"])


# ---------------------------------------------------------------- how photos are stored

STORED = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
          6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}    # what EXIF's number says to undo


def upright() -> np.ndarray:
    image = np.full((16, 48, 3), 120, np.uint8)
    image[:8, :16], image[8:, 40:] = 240, 10
    return image


def turned(image: np.ndarray, number: int, path: Path) -> Path:
    """The image as a camera writes it that was held otherwise."""
    exif = Image.Exif()
    exif[0x0112] = number
    stored = Image.fromarray(image)
    stored = stored.transpose(STORED[number]) if STORED[number] is not None else stored
    stored.save(path, exif=exif, **({"quality": 97} if path.suffix == ".jpg" else
                                    {"lossless": True} if path.suffix == ".webp" else {}))
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("number", STORED)
def test_photos_are_read_as_a_viewer_shows_them(tmp_path, suffix, number):
    path = turned(upright(), number, tmp_path / f"photo{suffix}")
    with Image.open(path) as opened:
        assert opened.size == ((16, 48) if number > 4 else (48, 16)) or suffix == ".tif"
        for image in (data.to_rgb(data.open_image(path)), predict.as_rgb(opened)):
            assert np.abs(np.asarray(image).astype(int) - upright()).max() <= 8
    assert data.size_of(path) == (48, 16)


def test_a_mask_is_held_to_the_photo_as_it_is_shown(tmp_path):
    """Painted over a viewer's picture, or turned like the photo: both are the same mask."""
    photo = turned(upright(), 6, tmp_path / "photo.jpg")
    mask = np.zeros((16, 48), np.uint8)
    mask[2:6, 4:12] = 255
    png(tmp_path / "plain.png", mask)
    turned(mask, 8, tmp_path / "turned.png")
    for name in ("plain.png", "turned.png"):
        found = data.load_mask(data.Item(photo, 1, "cut", tmp_path / name), 48, 48)
        assert found[6:18, 4:12].all() and found.sum() == 12 * 8


def test_a_turned_photo_gets_the_score_and_the_pictures_of_the_upright_one(trained, tmp_path):
    model = predict.load(trained / "runs/parts/bolt", "cpu", infer_steps=1)
    found = model.inspect([upright(), turned(upright(), 6, tmp_path / "photo.png")])
    assert found[0].score == pytest.approx(found[1].score, rel=1e-4)
    assert found[1].heat_map().size == found[1].size == (48, 16)
    assert found[1].restored.shape == (16, 48, 3)


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


GREY = np.arange(4096).reshape(64, 64)                              # 12 bits


@pytest.mark.parametrize("values", [
    GREY.astype(np.float32), np.full((64, 64), np.nan, np.float32),
    *(np.where(GREY == 7, bad, GREY / 4095).astype(np.float32)
      for bad in (np.nan, np.inf, -np.inf)),
    GREY.astype(np.float32) / 16, GREY.astype(np.float64), (GREY * 244).astype(np.int32),
    (GREY * 2 ** 20).astype(np.uint32), (GREY - 9).astype(np.int32), (GREY * 16).astype(np.uint32)])
def test_numbers_without_a_known_range_are_refused_by_name(tmp_path, values):
    path = tiff(tmp_path / "part.tif", values)
    with pytest.raises(InputError, match="part.tif: cannot be read.*; replace or remove it"):
        data.open_image(path)
    with pytest.raises(InputError, match="an array .* not an image"):
        predict.as_rgb(values)
    if values.dtype == np.float32:
        with pytest.raises(ValueError, match="not finite|floats from 0 to"):
            predict.as_rgb(Image.fromarray(values))


@pytest.mark.parametrize("odd", [1.01, 256, -0.5, 1])
def test_a_single_pixel_changes_no_other(tmp_path, odd):
    values = np.where(GREY == 7, odd, GREY / 4095).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "part.tif")
    want = (GREY / 4095 * 255).round()
    want[0, 7] = 255 * min(max(odd, 0), 1)
    for image in (data.to_rgb(data.open_image(tmp_path / "part.tif")),
                  predict.as_rgb(Image.fromarray(values))):
        assert np.abs(np.asarray(image)[..., 0] - want).max() <= 1


def test_sixteen_bits_stored_otherwise(tmp_path):
    """White as zero is turned round, planes of 16-bit colours are refused."""
    deep = (GREY * 16).astype(np.uint16)
    plain = tiff(tmp_path / "plain.tif", deep)
    inverted = tiff(tmp_path / "inverted.tif", 65535 - deep, photometric=-1)
    images = [np.asarray(data.to_rgb(data.open_image(path))) for path in (plain, inverted)]
    assert np.array_equal(*images) and images[0].max() == 255
    colours = np.stack([deep, deep.T, deep[::-1]], -1)
    assert data.open_image(tiff(tmp_path / "colours.tif", colours)).mode == "RGB"
    with pytest.raises(InputError, match="planes.tif: .*16-bit colour in planes"):
        data.open_image(tiff(tmp_path / "planes.tif", colours, planes=True))


def said(function, *words) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*words)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.mark.parametrize("top", [255, 4095, 65520])
@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "colour.tif", "array", "colours"])
def test_values_of_fewer_bits_than_their_file_has_are_pointed_out(tmp_path, kind, top):
    values = (GREY * (top / 4095)).astype(np.uint16)
    colours = np.stack([values] * 3, -1)
    if kind.startswith("grey"):
        Image.fromarray(values).save(tmp_path / kind)
    elif kind == "colour.tif":
        tiff(tmp_path / kind, colours)
    given = {"array": values, "colours": colours}.get(kind, tmp_path / kind)
    lines = said(predict.as_rgb, given)
    assert len(lines) == (top < 4096) and all("nearly black" in line for line in lines)
    assert kind in ("array", "colours") or not lines or kind in lines[0]
    if kind == "grey.png":
        assert said(data.read_mask, given) == []                    # numbers of classes


@pytest.mark.parametrize("kind", ["two.tif", "two.webp", "two.png"])
def test_of_several_pages_the_first_is_read_and_the_others_are_mentioned(tmp_path, kind):
    first, second = (Image.fromarray(picture(value).astype(np.uint8)) for value in (50, 200))
    first.save(tmp_path / kind, save_all=True, append_images=[second])
    lines = said(data.open_image, tmp_path / kind)
    assert len(lines) == 1 and kind in lines[0] and "2 pages" in lines[0]
    assert abs(np.asarray(data.open_image(tmp_path / kind)).mean() - 50) < 2


def test_a_warning_without_end_is_counted(tmp_path, capsys):
    for k in range(9):
        Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / f"{k}.png")

    @exit_status
    def command():
        for k in range(9):
            data.open_image(tmp_path / f"{k}.png")

    assert command() == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "2.png" in lines[2] and "6 more like this" in lines[3]


def test_a_full_gpu_is_one_line(tmp_path, capsys):
    @exit_status
    def command():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert command() == 2
    line, = capsys.readouterr().err.splitlines()
    assert "memory is full (CUDA out of memory)" in line and "--batch" in line

    def draw(file):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):              # no word about a full disk
        runs.save_atomically(tmp_path / "picture.png", draw)
    assert not list(tmp_path.iterdir())


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
def test_what_is_inspected_from_python(kind):
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (9, 7, 1)).astype(np.uint8), 3, -1)
    found = predict.as_rgb(KINDS[kind](grey))
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), grey)


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3)), np.zeros((8, 8, 3), bool), None, 3,
                                   np.zeros((3, 8, 8), np.uint8), np.zeros((1, 8, 8, 3), np.uint8),
                                   np.zeros((0, 8), np.uint8), torch.zeros(3, 8, 8), [[1, 2]],
                                   np.zeros((8, 8, 3), np.int64), np.zeros(8, np.uint8)])
def test_anything_else_is_refused_with_what_is_taken(trained, image):
    model = predict.load(trained / "runs/parts/bolt", "cpu")
    with pytest.raises(ValueError, match=r"not an image; a path, a PIL image, or an array \[H, W"):
        model.inspect([image])
    assert model.inspect([]) == []


def test_a_large_photo_gets_pictures_of_bounded_size(trained):
    model = predict.load(trained / "runs/parts/bolt", "cpu", infer_steps=1)
    model.threshold = SimpleNamespace(value=-1.0)                   # all of it is one region
    found = model.inspect(np.zeros((1500, 4096), np.uint8))
    assert found.size == (4096, 1500) and found.heat_map().size == (2048, 750)
    box = found.regions[0]
    assert [box[k] for k in ("x", "y", "width", "height")] == [0, 0, 4096, 1500]
    assert box["area"] == 4096 * 1500


def test_a_photo_beyond_the_limit_says_what_to_do(tmp_path, monkeypatch):
    png(tmp_path / "line.png", picture(size=64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="line.png: has more than .* million pixels.*reduce it"):
        data.open_image(tmp_path / "line.png")


# ---------------------------------------------------------------- masks as programs write them

def drawn() -> np.ndarray:
    """A disc and a scratch askew, whose edges ring in a compression."""
    y, x = np.mgrid[:160, :200]
    disc, scratch = np.hypot(y - 45, x - 60) < 25, (abs(2 * y - x - 150) < 5) & (x > 14)
    return np.where(disc | scratch, 255, 0).astype(np.uint8)


@pytest.mark.parametrize("name, keys", [
    *((name, {"quality": quality}) for name in ("a.jpg", "a.jfif", "a.webp", "a.tif")
      for quality in (95, 75, 50)),
    ("a.png", {"format": "JPEG", "quality": 50})])                  # as some programs name it
def test_a_lossy_mask_has_the_regions_that_were_drawn(tmp_path, name, keys):
    more = {"compression": "jpeg"} if name == "a.tif" else {}
    Image.fromarray(drawn()).save(tmp_path / name, **keys, **more)
    found, want = data.read_mask(tmp_path / name), drawn() > 0
    assert ndimage.label(found, np.ones((3, 3)))[1] == 2
    assert (found & want).sum() / (found | want).sum() > 0.99


def test_noise_on_the_ground_of_a_mask_is_no_defect(tmp_path):
    noise = np.random.default_rng(0).integers(0, 6, drawn().shape)
    png(tmp_path / "mask.png", np.maximum(drawn(), noise))
    assert np.array_equal(data.read_mask(tmp_path / "mask.png"), drawn() > 0)


@pytest.mark.parametrize("value", [1, 3, 127, 128, 255])
def test_a_class_of_a_mask_counts_whatever_its_number(tmp_path, value):
    png(tmp_path / "mask.png", np.where(drawn(), value, 0))
    assert np.array_equal(data.read_mask(tmp_path / "mask.png"), drawn() > 0)


@pytest.mark.parametrize("name", ["{}_gt.png", "mask_{}.png", "{}_MASK.PNG", "{}_label.bmp"])
def test_masks_under_other_names_are_told_which_are_looked_for(bolt, name):
    for mask in (bolt / "ground_truth/cut").iterdir():
        mask.rename(mask.with_name(name.format(mask.stem.removesuffix("_mask"))))
    with pytest.raises(InputError, match=r"000.png: no mask for it; looked for .*cut.000_mask.\* "
                                         r"and 000.\*.*faults: 4"):
        read(bolt)


@pytest.mark.parametrize("second", ["000.png", "000_mask.bmp"])
def test_two_masks_of_an_image_are_refused(bolt, second):
    png(bolt / "ground_truth/cut" / second, np.ones((32, 32)))
    with pytest.raises(InputError, match="000(_mask)?....: a second mask for 000, beside 000"):
        read(bolt)


def test_two_images_of_a_mask_are_refused(bolt):
    Image.open(bolt / "test/cut/000.png").save(bolt / "test/cut/000.jpg")
    with pytest.raises(InputError, match="000_mask.png is for one image, but 2 are called 000"):
        read(bolt)
    shutil.rmtree(bolt / "ground_truth")
    assert len(read(bolt).test) == 4


def test_foreground_masks_that_may_be_of_two_images_are_refused(bolt, tmp_path):
    masks = tmp_path / "masks"
    for k in range(4):
        png(masks / f"{k:03}.png", np.full((32, 32), 255))
    category = read(bolt)
    images = data.Images(category.train, 16, 16)
    assert data.foreground_masks(images, category, str(masks))[0].all()
    png(masks / "001_mask.png", np.zeros((32, 32)))
    with pytest.raises(InputError, match="001_mask.png: a second foreground mask beside 001.png"):
        data.foreground_masks(images, category, str(masks))
    (masks / "001_mask.png").unlink()
    png(bolt / "train/good/camera2/001.png", picture())
    category = read(bolt)
    with pytest.raises(InputError, match="masks are not known; rename"):
        data.foreground_masks(data.Images(category.train, 16, 16), category, str(masks))


@pytest.mark.parametrize("name", ["001_mask.png", "001.jpg"])
def test_empty_masks_are_named_by_the_training_and_by_the_check(bolt, capsys, name):
    folder = bolt / "ground_truth/cut"
    (folder / "001_mask.png").unlink()
    Image.new("L", (32, 32)).save(folder / name)
    notes = [note for note in runs.load_source(settings_for(bolt)).notes if "are empty" in note]
    assert len(notes) == 1 and "1 masks" in notes[0] and str(folder / name) in notes[0]
    status, out = check(bolt, capsys)
    assert status == 0 and f"note: {folder / name}: empty" in out and "000_mask" not in out


@pytest.mark.parametrize("name", ["{}_GT.png", "{}_mask.png", "{}-label.bmp", "{}_seg.png",
                                  "{}_masks.png", "mask_{}.png", "GT-{}.png"])
@pytest.mark.parametrize("place", ["train/good", "test/good", "test/cut"])
def test_labels_among_the_images_are_refused_by_name(bolt, tmp_path, capsys, place, name):
    image = sorted((bolt / place).iterdir())[0]
    label = bolt / place / name.format(image.stem)
    png(label, np.zeros((32, 32)))
    with pytest.raises(InputError, match=f"{label.name}: looks like the label of the image beside"):
        read(bolt)
    status, out = check(bolt, capsys)
    assert status == 1 and label.name in out
    notes = predict.find_images([str(bolt / place)], tmp_path / "out")[1]
    assert len(notes) == 1 and label.name in notes[0]


def test_a_part_that_is_called_like_a_label_is_one(bolt):
    for name in ("black_mask.png", "mask_7.png", "_mask.png", "gt-.png"):    # no image beside it
        png(bolt / "train/good" / name, picture())
    assert len(read(bolt).train) == 8


# ---------------------------------------------------------------- folders as people fill them

@pytest.mark.parametrize("place", [
    "train/good/._000.png", "test/good/._000.png", "test/cut/._000.png", "._000.png",
    "ground_truth/cut/._000_mask.png", "test/.ipynb_checkpoints/000-checkpoint.png",
    "train/.ipynb_checkpoints/000.png", "test/cut/@eaDir/000.png/SMALL.jpg",
    "train/good/@eaDir/000.png", "test/__MACOSX/000.png", "test/cut/.DS_Store",
    "train/good/Thumbs.db", "../.Trash/bolt/train/good/000.png"])
def test_what_systems_leave_in_folders_is_not_read(bolt, capsys, place):
    before, alone = read(bolt), check(bolt.parent, capsys)
    assert alone[0] == 0 and alone[1].endswith("\n\nnothing is wrong\n")
    (bolt / place).parent.mkdir(parents=True, exist_ok=True)
    (bolt / place).write_bytes(APPLE)
    assert read(bolt) == before and check(bolt.parent, capsys) == alone
    assert data.list_categories(str(bolt.parent), bolt) == ["bolt"]
    found, notes = predict.find_images([str(bolt)], bolt / "out")
    assert len(found) == 9 and not notes                            # with two masks


def test_leftovers_beside_textures_are_not_drawn(tmp_path):
    png(tmp_path / "dtd/images/dotted/dotted_0001.jpg", picture())
    (tmp_path / "dtd/images/dotted/._dotted_0001.jpg").write_bytes(APPLE)
    assert data.Textures(tmp_path, 16).count == 1


@pytest.mark.parametrize("name", ["Good", "good ", "GOOD", "OK", "normal", "Normal"])
def test_good_may_be_spelled_otherwise(bolt, capsys, name):
    png(bolt / "test" / name / "005.png", picture())
    png(bolt / "train" / name / "005.png", picture())
    png(bolt / "ground_truth" / name / "005_mask.png", np.zeros((32, 32)))
    found = read(bolt)
    assert {item.path.parent.name: item.label for item in found.test} == {"cut": 1, "good": 0,
                                                                          name: 0}
    assert len(found.train) == 5
    assert check(bolt, capsys)[1].splitlines()[1].split()[1:5] == ["5", "2", "2", "2"]


def test_what_is_passed_over_is_counted_by_kind(bolt, tmp_path, capsys):
    for name in ("a.gif", "b.GIF", "c.heic", "d.xml", "README"):
        for place in ("train/good/", "train/", "test/cut/", "test/"):
            (bolt / (place + name)).write_bytes(b"")
    png(bolt / "test/loose.png", picture())
    notes = read(bolt).notes
    assert [note.split(": not read: ")[1] for note in notes] == [
        "4 .gif, 2 .heic, 2 .xml, 2 no suffix", "4 .gif, 2 .heic, 1 .png, 2 .xml, 2 no suffix"]
    status, out = check(bolt, capsys)
    assert status == 0 and all(f"note: {note}" in out for note in notes)
    assert all(f"note: {note}" in runs.load_source(settings_for(bolt)).notes for note in notes)
    found, more = predict.find_images([str(bolt / "train")], tmp_path / "out")
    assert len(found) == 4 and more == [notes[0]]


def test_folders_in_folders_and_behind_links_are_read(bolt, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    png(elsewhere / "camera3/010.png", picture())
    (elsewhere / "camera3/011.heic").touch()
    (elsewhere / "camera3/back").symlink_to(bolt / "train/good")    # round and round
    png(bolt / "train/good/camera2/009.png", picture())
    (bolt / "train/good/linked").symlink_to(elsewhere)
    found = read(bolt)
    assert [p.name for p in found.train] == [f"00{k}.png" for k in (0, 1, 2, 3, 9)] + ["010.png"]
    assert found.notes == [f"{bolt / 'train'}: not read: 1 .heic"]
    found, notes = predict.find_images([str(bolt / "train")], tmp_path / "out")
    assert len(found) == 6 and notes == [f"{bolt / 'train'}: not read: 1 .heic"]


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jfif", "a.bmp", "a.tiff", "a.webp", "a.ppm",
                                  "a.pgm"])
def test_kinds_of_files_that_a_folder_is_searched_for(tmp_path, name):
    kind = {"jpg": "JPEG", "jfif": "JPEG", "pgm": "PPM"}.get(name[2:].lower())
    Image.new("L", (8, 8), 90).save(tmp_path / name, kind)
    found, notes = predict.find_images([str(tmp_path)], tmp_path / "out")
    assert found == [tmp_path / name] and not notes
    assert np.abs(data.load_image(found[0], 16, 16).astype(int) - 90).max() <= 1


def layout(root: Path, name: str) -> Path:
    """Folders of two newer data sets: validation images, and a folder of masks for each image."""
    test = "test_public" if name == "can" else "test"
    for k in range(2):
        for place in ("train/good", "validation/good", f"{test}/good", f"{test}/bad"):
            png(root / name / place / f"{k:03}.png", picture())
        png(root / name / ("test_public/ground_truth/bad/00{}_mask.png" if name == "can" else
                           "ground_truth/bad/00{}/000.png").format(k), np.ones((32, 32)))
    return root / name


def test_folders_of_another_layout_are_named(tmp_path, capsys):
    can = layout(tmp_path, "can")
    want = f"{can}: not read: test_public, validation; images are taken from train/good and test"
    assert len(read(can).notes) == 1 and want in read(can).notes[0]
    status, out = check(can, capsys)
    assert status == 0 and want in out


def test_several_masks_of_an_image_are_named_and_nothing_is_to_be_removed(tmp_path, capsys):
    bag = layout(tmp_path, "bag")
    with pytest.raises(InputError) as refusal:
        read(bag)
    status, out = check(bag, capsys)
    for words in (str(refusal.value), out):
        assert "ground_truth/bad/000: a folder of several masks for an image" in words
        assert not re.search("remove[^.;]*ground_truth", words)
    assert status == 1 and "not read: validation" in out


@pytest.mark.parametrize("name", ["tile", "screw", "candle", "01"])
@pytest.mark.parametrize("masks", [True, False])
def test_an_own_part_may_have_a_published_name(tmp_path, capsys, name, masks):
    mvtec_tree(tmp_path / "parts" / name, masks)
    mvtec_tree(tmp_path / "parts" / "bolt", masks)
    status, out = check(tmp_path / "parts", capsys)
    assert status == 0 and "nothing is wrong" in out and "published" not in out


@pytest.mark.parametrize("given", ["./demo", "demo/", "./demo/", "{}/demo", "../here/demo"])
def test_an_own_folder_may_be_called_like_a_data_set(tmp_path, monkeypatch, given):
    here = tmp_path / "here"
    for name in ("fabric", "nut"):
        mvtec_tree(here / "demo" / name)
    monkeypatch.chdir(here)
    monkeypatch.setattr(demo, "write", lambda *_: pytest.fail("drawn"))
    words = ["--data", given.format(here), "--category", "all", "--preset", "cpu"]
    s, names = train.find_categories(parse(words)[0])
    assert names == ["fabric", "nut"]
    assert len(data.find_category(s.data, "fabric", data.root_folder(s.root)).train) == 4
    assert not (here / "data").exists()
    embedded = parse(["--category", "fabric"])[0]                   # its run is another run
    folder = runs.run_folder(embedded)
    folder.mkdir(parents=True)
    runs.save_json(folder / "config.json", dataclasses.asdict(embedded))
    with pytest.raises(InputError, match="holds a run with other settings.*--name"):
        runs.refuse_other_run(folder, dataclasses.replace(embedded, data=s.data))


@pytest.mark.parametrize("count, share", [(1, 0.9), (1, 0.1), (2, 0.9), (3, 0.5), (3, 0.01),
                                          (4, 0.9), (4, 0.0)])
def test_no_image_is_both_trained_on_and_held_out(bolt, count, share):
    for path in sorted((bolt / "train/good").iterdir())[count:]:
        path.unlink()
    source = runs.load_source(settings_for(bolt, hold_out=share))
    assert len(source.train) >= 1 and not set(source.train) & set(source.held_out)
    assert len(source.train) + len(source.held_out) == count
    assert bool(len(source.held_out)) == (share > 0 and count > 1)


@pytest.mark.parametrize("place", ["train/good/001.png", "test/good/000.png", "test/cut/001.png",
                                   "ground_truth/cut/001_mask.png"])
def test_a_broken_image_is_found_before_the_training_even_where_none_is_kept(bolt, place):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(noise).save(bolt / place)
    (bolt / place).write_bytes((bolt / place).read_bytes()[:500])
    with pytest.raises(InputError, match=f"{Path(place).name}: cannot be read"):
        runs.load_source(settings_for(bolt, memory_gb=0.0))


# ---------------------------------------------------------------- photos to inspect

def photos(folder: Path, count: int = 2) -> Path:
    for k in range(count):
        png(folder / f"{k}.png", picture(50 * k, 40))
    return folder


def test_own_pictures_are_never_inspected(tmp_path):
    """Results beside the photos, of this call or another, by whatever path."""
    line = photos(tmp_path / "line", 3)
    (tmp_path / "link").symlink_to(line)
    for folder in (line / "monday", line):
        (folder / "regions.csv").parent.mkdir(exist_ok=True)
        (folder / "regions.csv").touch()
        for name in predict.PICTURES:
            png(folder / name / "0.png.png", picture())
    png(line / "tuesday/heatmaps/0.png", picture())                 # of a call under way
    for given in (line, tmp_path / "link"):
        for out in (line / "tuesday", tmp_path / "link/tuesday"):
            found, notes = predict.find_images([str(given)], out)
            assert [p.name for p in found] == ["0.png", "1.png", "2.png"] and not notes
    assert len(predict.find_images([str(line)], tmp_path / "elsewhere")[0]) == 4
    assert len(predict.find_images([str(line), str(tmp_path / "link"), str(line / "*.png")],
                                   line / "tuesday")[0]) == 3       # each photo once


def test_other_photos_leave_no_pictures_of_the_first_ones(trained, tmp_path):
    run, out = trained / "runs/parts/bolt", tmp_path / "found"
    for count, name in ((3, "first"), (1, "second")):
        assert inspect_with(run, photos(tmp_path / name, count), "--out", out) == 0
    for folder in ("heatmaps", "restored"):
        assert [p.name for p in (out / folder).iterdir()] == ["0.png.png"]
    assert len(rows_of(out / "scores.csv")) == 1


def test_no_map_is_written_over_that_of_another_image(tmp_path):
    names = ["line1/bolt/test/hole/000.png", "line1/bolt/test/hole/000.jpg",
             "line1/bolt/test/hole/001.png", "line2/bolt/test/hole/000.png",
             "line2/bolt/test/hole/002.png", "line2/nut/test/hole/002.png"]
    places = predict.tiff_places([tmp_path / name for name in names], names)
    assert len(set(places)) == 6
    assert places[2] == "bolt/test/hole/001.tiff" and places[5] == "nut/test/hole/002.tiff"
    assert places[1] == "line1/bolt/test/hole/000.jpg.tiff"


def test_names_of_photos_on_several_drives(monkeypatch):
    monkeypatch.setattr(os.path, "commonpath", ntpath.commonpath)
    monkeypatch.setattr(os.path, "relpath", ntpath.relpath)
    files = [PureWindowsPath(name) for name in (r"C:\line1\a.png", r"D:\line2\a.png")]
    assert predict.names_of(files) == ["C/line1/a.png", "D/line2/a.png"]
    assert predict.relative(files[1], PureWindowsPath(r"C:\found")) == "file:///D:/line2/a.png"


def test_a_second_call_into_the_same_folder_is_refused(trained, tmp_path, capsys):
    run, out = trained / "runs/parts/bolt", tmp_path / "found"
    with runs.locked(out):
        assert inspect_with(run, photos(tmp_path / "line"), "--out", out) == 2
    assert "found is in use by another process" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == [".lock"]


def test_results_do_not_go_into_the_folder_of_a_run(factory, capsys):
    run = factory / "runs/parts/bolt"
    before = contents(run)
    assert inspect_with(run, photos(factory / "line"), "--out", run) == 2
    assert "holds a training's results; choose another folder" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.picture
def test_names_that_are_no_utf_8_even_in_the_picture(factory, capsys):
    """As from an archive of another system: inspected, checked, trained on and scored."""
    home, line = factory / "parts/bolt", photos(factory / "line", 3)
    try:
        (line / "1.png").rename(line / f"{BYTES}.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    assert inspect_with(factory / "runs/parts/bolt", line, "--out", factory / "found",
                        "--maps", "tiff") == 0
    rows = [row["file"] for row in rows_of(factory / "found/scores.csv")]
    assert len(rows) == 3 and r"caf\udce9.png" in rows
    page = (factory / "found/index.html").read_text(encoding="utf-8")
    assert "heatmaps/caf%E9.png.png" in page and r"caf\xe9.png" in page
    for place in ("test/dent/1{}.png", "ground_truth/dent/1{}_mask.png", "train/good/3{}.png"):
        old = home / place.format("")
        old.rename(old.with_name(old.name.replace("1", BYTES).replace("3", BYTES)))
    assert check(home, capsys)[0] == 0
    argv = argv_for(factory / "parts", "--name", "again", "--steps", "1")
    assert train.main(argv) == 0
    run = factory / "runs/parts/bolt-again"
    assert {"metrics.json", "scores.csv"} <= set(contents(run))
    assert Image.open(run / "qualitative.png").format == "PNG"
    s, _ = runs.load_checkpoint(run / "last.pt")
    assert len(runs.load_source(s, folder=run).images) == 12
    (run / "metrics.json").unlink()
    assert train.main([*argv, "--resume"]) == 0


# ---------------------------------------------------------------- runs that are taken up again

def begun(s: Settings, folder: Path) -> runs.Source:
    source = runs.load_source(s)
    folder.mkdir()
    runs.keep_data(folder, source)
    return source


def names_in(source: runs.Source) -> tuple[list[str], list[str]]:
    return tuple([source.images.paths[k].name for k in part]
                 for part in (source.train, source.held_out))


@pytest.mark.parametrize("training", [True, False])
def test_images_that_come_later_change_no_split(bolt, tmp_path, training):
    s = settings_for(bolt, hold_out=0.5)
    before = names_in(begun(s, tmp_path / "run"))
    for name in ("0000.png", "camera2/009.png", "zzz.png"):
        png(bolt / "train/good" / name, picture())
    source = runs.load_source(s, training, tmp_path / "run")
    assert names_in(source) == before and len(source.images) == 4
    assert [n for n in source.notes if "3 normal images were added" in n and "warning" in n]


def test_images_that_are_gone_stop_what_needs_them(bolt, tmp_path):
    s = settings_for(bolt, hold_out=0.5)
    trained_on, held_out = names_in(begun(s, tmp_path / "run"))
    (bolt / "train/good" / trained_on[0]).unlink()
    assert names_in(runs.load_source(s, False, tmp_path / "run")) == (trained_on[1:], held_out)
    with pytest.raises(InputError, match=f"{trained_on[0]}: gone .*put it back"):
        runs.load_source(s, True, tmp_path / "run")
    (bolt / "train/good" / held_out[0]).unlink()
    with pytest.raises(InputError, match=f"{held_out[0]}: gone"):
        runs.load_source(s, False, tmp_path / "run")


def test_a_run_keeps_its_held_out_images_whatever_it_is_asked(factory, capsys):
    """Images are added after the training; then it is scored again, resumed, shown."""
    run, parts = factory / "runs/parts/bolt", factory / "parts"
    before = json.loads((run / "metrics.json").read_text())
    kept = json.loads((run / "data.json").read_text())
    for k in range(20, 40):
        png(parts / f"bolt/train/good/{k}.png", picture(size=40))
    for more in (["--eval"], ["--resume", "--steps", "7"]):
        assert train.main(argv_for(parts, *more)) == 0
        assert "warning: 20 normal images were added since" in capsys.readouterr().out
        after = json.loads((run / "metrics.json").read_text())
        assert after["threshold_images"] == before["threshold_images"]
        assert more == ["--resume", "--steps", "7"] or after["threshold"] == before["threshold"]
        assert json.loads((run / "data.json").read_text()) == kept
    shown = figures.load_run("parts", str(factory / "runs"), str(factory)).source
    assert names_in(shown)[1] == [Path(name).name for name in kept["held_out"]]


def test_another_folder_of_the_same_name_leaves_the_results_alone(factory, capsys):
    run, other = factory / "runs/parts/bolt", factory / "customer/parts"
    shutil.copytree(factory / "parts", other)
    shutil.copy(other / "bolt/test/good/0.png", other / "bolt/test/good/7.png")
    before = contents(run)
    for more in (["--eval"], ["--resume"], []):
        refused(capsys, argv_for(factory / "parts", "--data", str(other), *more), "holds a run of",
                str(factory / "parts/bolt"), str(other / "bolt"), "--name or --out")
        assert contents(run) == before


def test_foreign_weights_are_not_scored_twice_on_other_data(factory, capsys):
    parts, other = factory / "parts", factory / "customer/parts"
    shutil.copytree(parts, other)
    shutil.copy(other / "bolt/test/good/0.png", other / "bolt/test/good/7.png")
    torch.save(authors_state(), factory / "weights.pkl")
    words = ["--preset", "authors", "--channels", "32", "--name", "theirs", "--eval"]
    weights = ["--weights", str(factory / "weights.pkl")]
    assert train.main(argv_for(parts, *words, *weights)) == 0
    for more in ([], weights):
        refused(capsys, argv_for(parts, *words, *more, "--data", str(other)), "holds a run of")


@pytest.mark.parametrize("spelled", ["relative", "dotted", "link", "moved"])
def test_the_same_data_by_another_path_is_the_same_run(factory, monkeypatch, capsys, spelled):
    monkeypatch.chdir(factory)
    (factory / "link").symlink_to(factory)
    (factory / "new").mkdir()
    given = {"relative": "parts", "dotted": "./runs/../parts/", "link": "link/parts",
             "moved": "new/parts"}[spelled]
    if spelled == "moved":
        (factory / "parts").rename(factory / "new/parts")
    words = argv_for(factory / "parts", "--data", given, "--root", str(factory / "nowhere"))
    assert train.main(words) == 0
    assert "finished with these settings: skipped" in capsys.readouterr().out
    if spelled in ("relative", "moved"):
        (factory / "runs/parts/bolt/metrics.json").unlink()
        assert train.main([*words, "--resume"]) == 0


def without(words: list[str], flag: str) -> list[str]:
    place = words.index(flag)
    return words[:place] + words[place + 2:]


def test_a_run_goes_on_where_bfloat16_is_not_fast(factory, monkeypatch, capsys):
    run, words = factory / "runs/parts/bolt", without(argv_for(factory / "parts"), "--precision")
    config = runs.read_json(run / "config.json")
    runs.save_json(run / "config.json", {**config, "precision": "bf16"})
    state = torch.load(run / "last.pt", weights_only=True)
    torch.save({**state, "settings": {**state["settings"], "precision": "bf16"}}, run / "last.pt")
    for module in (runs, sys.modules["settings"]):
        monkeypatch.setattr(module, "fast_bf16", lambda device: False)
    assert train.main(words) == 0
    assert "finished with these settings: skipped" in capsys.readouterr().out
    refused(capsys, [*words, "--precision", "float32"], "precision bf16 there, float32 here")
    (run / "metrics.json").unlink()
    assert train.main([*words, "--resume"]) == 0
    assert "goes on in float32; it was begun in bf16" in capsys.readouterr().out


def test_a_finished_run_is_trained_for_longer(factory, capsys):
    run, words = factory / "runs/parts/bolt", argv_for(factory / "parts")
    refused(capsys, [*words, "--steps", "9"], "a run of 3 steps; --resume trains it to this",
            "--name NAME begins another from the start")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "steps": 9}))
    (run / "metrics.json").unlink()                           # killed before its first checkpoint
    assert train.main([*words, "--eval"]) == 0
    assert (run / "metrics-step3.json").exists() and not (run / "metrics.json").exists()
    assert train.main([*words, "--steps", "8", "--resume"]) == 0        # ends within an epoch
    assert train.main([*words, "--steps", "9", "--resume"]) == 0
    assert json.loads((run / "metrics.json").read_text())["step"] == 9
    log = rows_of(run / "log.csv")
    assert log[-1]["step"] == "9" and all(row["skipped"] == "0" for row in log)
    refused(capsys, [*words, "--steps", "7", "--resume"], "9 steps long already")


def test_an_interrupted_run_can_be_ended_early(factory):
    run, words = factory / "runs/parts/bolt", argv_for(factory / "parts")
    state = torch.load(run / "last.pt", weights_only=True)
    del state["normal"]
    torch.save({**state, "settings": {**state["settings"], "steps": 9}}, run / "last.pt")
    (run / "metrics.json").unlink()                                 # as if stopped at 3 of 9 steps
    assert train.main([*words, "--steps", "3", "--resume"]) == 0
    assert train.main([*words, "--eval"]) == 0
    assert not list(run.glob("metrics-step*"))


def test_a_training_does_not_go_on_with_other_textures(factory, capsys):
    words = [*argv_for(factory / "parts"), "--steps", "9", "--resume"]
    kept = json.loads((factory / "runs/parts/bolt/data.json").read_text())
    png(factory / "dtd" / "images" / "dotted" / "1.jpg", picture(50))
    refused(capsys, words, f"begun with {kept['textures']} textures, now there are 1", "--root")
    shutil.rmtree(factory / "dtd")
    assert train.main(words) == 0


def test_a_run_without_a_threshold_names_the_command_that_gives_one(factory, capsys):
    path = factory / "runs/parts/bolt/last.pt"
    state = torch.load(path, weights_only=True)
    del state["normal"]                                             # stopped before its end
    torch.save(state, path)
    assert inspect_with(path.parent, photos(factory / "line"), "--out", factory / "found") == 0
    assert re.search(r"no threshold.*python predict.py \S+ --calibrate", capsys.readouterr().out)
    (path.parent / "metrics.json").unlink()
    assert predict.main([str(path.parent), "--calibrate", str(factory / "line")]) == 0
    assert predict.load(path).threshold
    assert train.main([*argv_for(factory / "parts"), "--eval"]) == 0    # is still unfinished
    assert not (path.parent / "metrics.json").exists()
    assert (path.parent / "metrics-step3.json").exists()
    calibrated = predict.load(path).threshold
    assert train.main([*argv_for(factory / "parts"), "--resume"]) == 0  # no step is left
    assert predict.load(path).threshold == calibrated != evaluate.threshold(
        torch.load(path, weights_only=True)["normal"], Settings())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_give_no_verdict(factory, capsys, value):
    run = factory / "runs/parts/bolt"
    state = torch.load(run / "last.pt", weights_only=True)
    for weights in (state["model"], state["ema"]):
        next(v for v in weights.values() if v.ndim == 4).view(-1)[0] = value
    torch.save(state, run / "last.pt")
    assert inspect_with(run, photos(factory / "line"), "--out", factory / "found") == 2
    assert "not finite numbers; the file is damaged" in capsys.readouterr().err
    assert not (factory / "found").exists()
    before = contents(run)
    for more in (["--eval"], ["--resume", "--steps", "9"]):
        refused(capsys, argv_for(factory / "parts", *more), "last.pt", "not finite numbers")
    assert contents(run)["last.pt"] == before["last.pt"]
    theirs = authors_state()
    theirs["model.final.bias"][0] = value
    with pytest.raises(ValueError, match="not finite: model.final.bias"):
        runs.load_authors_weights(train.start_model(Settings(channels=32, preset="authors",
                                                             authors_schedule=True, pe="row",
                                                             device="cpu"), ""), theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_an_error_everywhere(trained, monkeypatch, value):
    """Whatever makes it so: below a threshold it would pass for a good part's."""
    model = predict.load(trained / "runs/parts/bolt", "cpu", infer_steps=1)
    s = dataclasses.replace(model.s, data=str(trained / "parts"), root=str(trained))
    restore = model.model.restore

    def damaged(x, steps):
        found = restore(x, steps)
        found.M_disc[0, 0, 3, 3] = value
        return found

    monkeypatch.setattr(model.model, "restore", damaged)
    with pytest.raises(InputError, match="a score is no number"):
        model.inspect(picture().astype(np.uint8))
    with pytest.raises(InputError, match="a score is no number"):
        evaluate.score(model.model, s, runs.load_source(s, training=False))


# ---------------------------------------------------------------- many categories, many kinds

@pytest.mark.parametrize("harm", ["empty image", "in use"])
def test_one_category_that_fails_does_not_stop_the_others(factory, capsys, harm):
    parts = factory / "parts"
    for name in ("clip", "disc"):
        shutil.copytree(parts / "bolt", parts / name)
    words = argv_for(parts, "--steps", "1", "--name", "new", "--category", "all")
    hold = contextlib.nullcontext()
    if harm == "in use":
        hold = runs.locked(factory / "runs/parts/clip-new")
    else:
        (parts / "clip/test/dent/1.png").write_bytes(b"")
    with hold:
        assert train.main(words) == 2
    said = capsys.readouterr()
    for name in ("bolt", "disc"):
        assert (factory / f"runs/parts/{name}-new/metrics.json").exists()
    assert re.search(r"image AUROC.*\nbolt .*\ndisc .*\nmean of 2", said.out)
    errors = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and "1 of 3 categories failed" in errors[1] and "clip" in errors[1]


def test_the_picture_of_a_run_has_a_bounded_number_of_rows():
    """The test set has a folder for each part: not all of them are shown, but a good image is."""
    items = [data.Item(Path(f"{k}.png"), int(k < 120), f"SN{k // 2:05}" if k < 120 else "good")
             for k in range(130)]
    shown = evaluate.pick_rows(items)
    assert len(set(shown)) == len(shown) == evaluate.ROWS and items[shown[-1]].label == 0
    assert len({items[k].defect for k in shown}) == evaluate.ROWS
    assert len(evaluate.pick_rows(items[:6] + items[-4:])) == 8             # two of each kind


def test_the_numbers_are_written_before_the_picture(factory, monkeypatch):
    run = factory / "runs/parts/bolt"
    for name in ("metrics.json", "scores.csv", "maps.npz"):
        (run / name).unlink()
    monkeypatch.delattr(evaluate, "draw_rows")
    with pytest.raises(NameError):
        train.main(argv_for(factory / "parts", "--eval"))
    assert {"metrics.json", "scores.csv", "maps.npz"} <= set(contents(run))


# ---------------------------------------------------------------- where commands run

class Full(io.TextIOBase):
    """A log whose disk is full."""
    encoding = "utf-8"

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        self.write("")


class Closed(Full):
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [Full, Closed])
def test_a_log_that_takes_nothing_more_ends_no_training(factory, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    assert train.main(argv_for(factory / "parts", "--resume", "--steps", "8")) == 0
    assert runs.load_checkpoint(factory / "runs/parts/bolt/last.pt")[1]["step"] == 8
    assert inspect_with(factory / "runs/parts/bolt", photos(factory / "line"), "--out",
                        factory / "found") == 0
    assert isinstance(sys.stdout, stream)                           # put back


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_output_without_the_letters_writes_them_out(monkeypatch, encoding):
    taken = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(taken, encoding))

    @exit_status
    def command():
        print("零件: done")

    assert command() == 0
    assert taken.getvalue() == rb"\u96f6\u4ef6: done" + os.linesep.encode()


def test_the_data_command_needs_no_module_of_unix(monkeypatch):
    for name in ("fcntl", "resource", "pwd"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("download_elsewhere", download.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.main


def test_a_training_in_a_worker_thread(factory):
    ends = []
    words = argv_for(factory / "parts", "--resume", "--steps", "7")
    worker = threading.Thread(target=lambda: ends.append(train.main(words)))
    worker.start()
    worker.join()
    assert ends == [0]


def test_a_notebooks_first_cell_goes_on_after_an_interruption(tmp_path, monkeypatch):
    for name in ("TRAIN", "TEST_GOOD", "PER_DEFECT"):
        monkeypatch.setattr(demo, name, 2)
    monkeypatch.setattr(figures, "SMALL", ["--category", "fabric", "--resize", "16", "--crop", "16",
                                           "--channels", "8", "--steps", "6", "--batch", "2",
                                           "--name", "notebook", "--device", "cpu"])
    make_batch, done = train.make_batch, []

    def interrupted(*args):
        done.append(1)
        if len(done) == 5:
            raise KeyboardInterrupt
        return make_batch(*args)

    monkeypatch.setattr(train, "make_batch", interrupted)
    words = ("demo", str(tmp_path / "runs"), str(tmp_path / "data"), "fabric")
    with pytest.raises(InputError, match="no finished run"):
        figures.load_run(*words)
    run = figures.load_run(*words)
    assert run.metrics["step"] == 6 and len(run.scores) == len(run.source.test)


def test_a_notebook_finds_own_data_from_its_own_folder(factory, monkeypatch):
    """The run was trained a folder higher, with --data parts."""
    path = factory / "runs/parts/bolt/last.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "settings": {**state["settings"], "data": "parts"}}, path)
    (factory / "notebooks").mkdir()
    monkeypatch.chdir(factory / "notebooks")
    run = figures.load_run("parts", "../runs", "../data", "bolt")
    assert run.source.category.root == factory / "parts/bolt" and len(run.scores) == 4


def test_a_tilde_is_the_home_folder_in_every_command(factory, monkeypatch, capsys):
    here = factory / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(factory))
    s = parse(["--data=~/parts", "--category", "bolt", "--out=~/runs", "--root=~/data",
               "--foreground=~/fg", "--preset", "cpu"])[0]
    assert [s.data, s.out, s.root, s.foreground] == [str(factory / name) for name in
                                                     ("parts", "runs", "data", "fg")]
    monkeypatch.setenv("TRANSFUSION_DATA", "~/data")
    assert data.root_folder() == data.root_folder("~/data") == factory / "data"
    photos(factory / "line")
    assert inspect_with("~/runs/parts/bolt", "~/line", "--out=~/found") == 0
    assert (factory / "found/scores.csv").exists()
    assert inspect_with("~/runs/parts/bolt", "~/line/*.png", "--out=~/found") == 0
    assert predict.load("~/runs/parts/bolt", "cpu").inspect("~/line/0.png").score >= 0
    assert download.main(["--check=~/parts"]) == 0
    assert figures.load_run("parts", "~/runs", "~").folder == factory / "runs/parts/bolt"
    refused(capsys, argv_for(factory / "parts", "--name", "w", "--weights=~/w.pkl"),
            f"{factory / 'w.pkl'} does not exist")
    assert bench.main(["--json=~/none/a.json"]) == 2
    assert str(factory / "none") in capsys.readouterr().err
    monkeypatch.setattr(download, "fetch", lambda name, root: print(root))
    assert download.main(["visa", "--root=~/data"]) == 0
    assert capsys.readouterr().out == f"{factory / 'data'}\n"
    assert list(here.iterdir()) == []
