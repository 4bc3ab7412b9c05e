"""Images and masks as tensors, foregrounds, textures, and the split of a run's images."""
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import data
import predict
from helpers import mvtec_tree, picture, png, settings_for
from support.console import InputError
from support.layouts import Category, Item, find_category, list_images


# ---------------------------------------------------------------- images and masks

def test_a_mask_of_another_size_than_its_image_is_refused(tmp_path):
    root = mvtec_tree(tmp_path / "mvtec" / "cable")
    png(root / "ground_truth" / "cut" / "001_mask.png", np.ones((30, 32)))
    item = find_category("mvtec", "cable", tmp_path).test[1]
    with pytest.raises(InputError, match="001_mask.png is 32 x 30 pixels, its image .* 32 x 32"):
        data.load_mask(item, 16, 16)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_files_that_are_cut_off_or_no_images_are_refused(tmp_path, content):
    path = tmp_path / "a.png"
    png(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3)))
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(InputError, match="a.png: cannot be read as an image"):
        data.load_image(path, 32, 32)


def test_grey_colour_alpha_palette_and_16_bit_images_are_read_as_rgb(tmp_path):
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    rgb = np.stack([grey] * 3, -1)
    kinds = {"grey.png": Image.fromarray(grey), "rgb.bmp": Image.fromarray(rgb),
             "rgba.png": Image.fromarray(np.dstack([rgb, 0 * grey])),
             "palette.png": Image.fromarray(grey).convert("P"),
             "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
             "deep.tif": Image.fromarray(grey.astype(np.uint16) * 257),
             "float.tif": Image.fromarray(grey.astype(np.float32) / 255)}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        loaded = data.load_image(tmp_path / name, 8, 8)
        assert loaded.dtype == np.uint8 and np.array_equal(loaded, rgb.transpose(2, 0, 1)), name
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "dark.png")
    assert data.load_image(tmp_path / "dark.png", 8, 8).max() == 1   # of 16 bits, however dark


def test_preprocessing_resizes_and_crops_the_centre(tmp_path):
    image = np.zeros((64, 128, 3))
    image[16:48, 32:96] = 255                                        # the middle half, any aspect
    png(tmp_path / "a.png", image)
    cropped = data.load_image(tmp_path / "a.png", 32, 16)
    assert cropped.shape == (3, 16, 16) and cropped[:, 1:-1, 1:-1].min() == 255
    assert data.load_image(tmp_path / "a.png", 32, 32)[0, 0, 0] == 0


def test_masks_are_reduced_to_the_scoring_grid(tmp_path):
    mask = np.zeros((64, 64))
    mask[0:8, 0:8] = 255                                             # two whole pixels of 4 x 4
    mask[32:36, 32:34] = 70                                          # half of a pixel: anomalous
    mask[48:52, 48:49] = 90                                          # a quarter: kept, it is alone
    mask[8:9, 0:8] = 255                                             # a fringe of the first region
    png(tmp_path / "image.png", picture(size=64))
    png(tmp_path / "mask.png", mask)
    item = Item(tmp_path / "image.png", 1, "cut", tmp_path / "mask.png")
    expected = np.zeros((16, 16), bool)
    expected[0:2, 0:2] = expected[8, 8] = expected[12, 12] = True
    assert np.array_equal(data.load_mask(item, 16, 16), expected)
    assert np.array_equal(data.load_mask(item, 16, 12), expected[2:14, 2:14])
    Image.open(item.mask).convert("LA").save(item.mask)             # an opaque alpha is no defect
    assert np.array_equal(data.load_mask(item, 16, 16), expected)
    assert not data.load_mask(Item(tmp_path / "image.png", 0, "good"), 16, 16).any()


def test_no_region_vanishes_in_the_crop(tmp_path):
    """Regions that the crop cuts, the second of them down to less than half of any pixel."""
    mask = np.zeros((64, 64))
    mask[20:24, 0:9] = 255                       # grid columns 0, 1 and a quarter of column 2
    mask[40:44, 0:4] = 255                       # column 0: outside the crop altogether
    png(tmp_path / "image.png", picture(size=64))
    png(tmp_path / "mask.png", mask)
    item = Item(tmp_path / "image.png", 1, "cut", tmp_path / "mask.png")
    assert data.load_mask(item, 16, 16).sum() == 3
    cropped = data.load_mask(item, 16, 12)
    assert cropped.sum() == 1 and cropped[5 - 2, 0]


def test_scale_brings_0_to_255_to_minus_1_to_1():
    assert data.scale(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_images_above_the_limit_are_read_from_disk(tmp_path):
    mvtec_tree(tmp_path / "a")
    paths = list_images(tmp_path / "a" / "train" / "good")
    cached, on_disk = data.Images(paths, 16, 8), data.Images(paths, 16, 8, limit=100)
    assert cached.in_memory and not on_disk.in_memory and cached.bytes == 4 * 3 * 8 * 8
    assert cached[[2, 0]].shape == (2, 3, 8, 8) and int(cached[[2]][0, 0, 0, 0]) == 3
    assert torch.equal(cached[1:3], on_disk[1:3])
    assert torch.equal(cached[[2, 0]], on_disk[[2, 0]])


@pytest.mark.parametrize("H, W", [(1, 1), (2, 2), (3, 2), (2, 2048), (8, 5)])
def test_of_a_tiny_image_at_least_a_pixel_is_inspected(H, W):
    """Also if the border that is not inspected is wider than the image."""
    edge = (64 - 16) / 2 / 64
    M, restored = predict.uncrop(np.zeros((H, W, 3), np.uint8), np.ones((16, 16), np.float32),
                                 torch.ones(3, 16, 16), edge)
    assert M.shape == (H, W) and np.nansum(M) >= 1 and restored.max() == 255


# ---------------------------------------------------------------- foregrounds and textures

def object_image(size=64, noise=3):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size]
    disc = np.hypot(y - 30, x - 34) < 15
    image = np.where(disc, 90, 200 - x / 3) + rng.normal(0, noise, (size, size))
    return np.repeat(image[None], 3, 0).clip(0, 255).astype(np.uint8), disc


def test_foreground_is_found_on_an_uneven_background():
    image, disc = object_image()
    foreground = data.find_foreground(image)
    assert foreground[disc].all() and foreground.mean() < 1.5 * disc.mean()


def test_shadows_are_no_foreground():
    image, disc = object_image()
    y, x = np.mgrid[0:64, 0:64]
    shadow = (np.hypot(y - 40, x - 40) < 15) & ~disc
    image[:, shadow] -= 40                                           # the disc is 100 darker
    foreground = data.find_foreground(image)
    edge = ndimage.binary_dilation(disc, iterations=3)
    assert foreground[disc].all() and not foreground[shadow & ~edge].any()


def test_there_is_no_foreground_without_a_plain_background():
    rng = np.random.default_rng(0)
    assert data.find_foreground(rng.integers(0, 255, (3, 64, 64)).astype(np.uint8)) is None
    assert data.find_foreground(np.full((3, 64, 64), 128, np.uint8)) is None


def category_of(folder, name="bolt", of="parts"):
    return Category(of, name, folder, list_images(folder))


def test_foregrounds_are_found_or_the_whole_image_or_read_from_a_folder(tmp_path):
    image, disc = object_image()
    for k in range(3):
        png(tmp_path / "images" / f"{k}.png", image.transpose(1, 2, 0))
        png(tmp_path / "masks" / f"{2 - k}_mask.png", np.full((64, 64), 255 * (k == 0)))
    bolt = category_of(tmp_path / "images")
    images = data.Images(bolt.train, 64, 64)
    carpet, own = (category_of(tmp_path / "images", "carpet", of) for of in ("mvtec", "parts"))
    for mode, category, share in (("auto", bolt, disc.mean()), ("auto", carpet, 1),
                                  ("auto", own, disc.mean()), ("none", bolt, 1),
                                  (str(tmp_path / "masks"), carpet, 1)):
        masks, line = data.foreground_masks(images, category, mode)
        assert masks.shape == (3, 1, 64, 64) and masks.dtype == torch.bool and line
        assert share <= float(masks.float().mean()) <= 1.5 * share
    masks, _ = data.foreground_masks(images, bolt, str(tmp_path / "masks"))
    assert masks.flatten(1).any(1).tolist() == [False, False, True]  # by file name, not by order
    (tmp_path / "masks" / "1_mask.png").unlink()
    with pytest.raises(InputError, match="no foreground mask named like 1.png"):
        data.foreground_masks(images, bolt, str(tmp_path / "masks"))
    with pytest.raises(InputError, match="no such folder"):
        data.foreground_masks(images, bolt, str(tmp_path / "nothing"))


def test_foregrounds_from_a_folder_are_halved_dilated_and_of_their_own_category(tmp_path):
    """As the authors' code reads them; the file names of two categories are the same."""
    png(tmp_path / "images" / "000.png", object_image()[0].transpose(1, 2, 0))
    bolt, nut = (category_of(tmp_path / "images", name) for name in ("bolt", "nut"))
    images = data.Images(bolt.train, 64, 64)
    mask = np.full((64, 64), 100)                                   # below half: not the object
    mask[20:30, 40:45] = 160
    png(tmp_path / "masks" / "000.png", np.full((64, 64), 255))
    png(tmp_path / "masks" / "nut" / "000_mask.png", mask)
    masks, line = data.foreground_masks(images, nut, str(tmp_path / "masks"))
    expected = np.zeros((64, 64), bool)
    expected[18:32, 38:47] = True
    assert np.array_equal(masks[0, 0].numpy(), expected) and str(tmp_path / "masks/nut") in line
    assert data.foreground_masks(images, bolt, str(tmp_path / "masks"))[0].all()


def test_a_category_without_sure_objects_falls_back_to_the_whole_image(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(3):
        png(tmp_path / f"{k}.png", rng.integers(0, 255, (64, 64, 3)))
    category = category_of(tmp_path)
    masks, line = data.foreground_masks(data.Images(category.train, 64, 64), category)
    assert masks.all() and "3 of 3" in line


def test_foreground_masks_that_may_be_of_two_images_are_refused(bolt, tmp_path):
    folder = tmp_path / "masks"
    for k in range(4):
        png(folder / f"{k:03}.png", np.full((32, 32), 255))
    category = find_category(str(bolt.parent), "bolt", tmp_path)
    images = data.Images(category.train, 16, 16)
    assert data.foreground_masks(images, category, str(folder))[0].all()
    png(folder / "001_mask.png", np.zeros((32, 32)))
    with pytest.raises(InputError, match="001_mask.png: a second foreground mask beside 001.png"):
        data.foreground_masks(images, category, str(folder))
    (folder / "001_mask.png").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")                               # masks are no photos
        data.foreground_masks(images, category, str(folder))
    png(bolt / "train/good/camera2/001.png", picture())
    category = find_category(str(bolt.parent), "bolt", tmp_path)
    with pytest.raises(InputError, match="masks are not known; rename"):
        data.foreground_masks(data.Images(category.train, 16, 16), category, str(folder))


def test_textures_are_embedded_or_those_of_dtd(tmp_path):
    embedded = data.Textures(tmp_path, 32)
    drawn = embedded.draw(5, np.random.default_rng(0))
    assert "embedded" in embedded.source and drawn.shape == (5, 3, 32, 32)
    assert drawn.dtype == torch.uint8 and len({tuple(d.flatten().tolist()) for d in drawn}) > 1
    again = data.Textures(tmp_path, 32)
    assert all(torch.equal(embedded.get(k), again.get(k)) for k in range(embedded.count))
    for k in range(3):
        png(tmp_path / "dtd" / "images" / "dotted" / f"{k}.jpg", picture(50 * k))
    dtd = data.Textures(tmp_path, 32, limit=2 * 3 * 32 * 32)
    assert dtd.count == 3 and "DTD" in dtd.source
    assert [int(dtd.get(k)[0, 0, 0]) for k in range(3)] == [0, 50, 100] and len(dtd.cache) == 2


def test_files_that_systems_leave_beside_textures_are_not_drawn(tmp_path):
    png(tmp_path / "dtd/images/dotted/dotted_0001.jpg", picture())
    (tmp_path / "dtd/images/dotted/._dotted_0001.jpg").write_bytes(b"\0\5\x16\7\0\2\0\0")
    assert data.Textures(tmp_path, 16).count == 1


# ---------------------------------------------------------------- the images of a run

@pytest.mark.parametrize("count, share", [(1, 0.9), (1, 0.1), (2, 0.9), (3, 0.5), (3, 0.01),
                                          (4, 0.9), (4, 0.0)])
def test_no_image_is_both_trained_on_and_held_out(bolt, count, share):
    for path in sorted((bolt / "train/good").iterdir())[count:]:
        path.unlink()
    run_data = data.load_run_data(settings_for(bolt, hold_out=share))
    train, held_out = set(run_data.train_indices), set(run_data.held_out)
    assert len(train) >= 1 and not train & held_out
    assert len(run_data.train_indices) + len(run_data.held_out) == count
    assert bool(held_out) == (share > 0 and count > 1)


@pytest.mark.parametrize("place", ["train/good/001.png", "test/good/000.png", "test/cut/001.png",
                                   "ground_truth/cut/001_mask.png"])
def test_a_broken_image_is_found_before_the_training_even_where_none_is_kept(bolt, place):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(noise).save(bolt / place)
    (bolt / place).write_bytes((bolt / place).read_bytes()[:500])
    with pytest.raises(InputError, match=f"{Path(place).name}: cannot be read"):
        data.load_run_data(settings_for(bolt, memory_gb=0.0))


# ---------------------------------------------------------------- real images, where there are any

@pytest.mark.slow
@pytest.mark.parametrize("name", ["bottle", "screw"])
def test_foreground_holds_the_annotated_defects_of_mvtec(name):
    root = os.environ.get("TRANSFUSION_DATA", "")
    if not root or not (Path(root) / "mvtec" / name).is_dir():
        pytest.skip("needs MVTec AD under TRANSFUSION_DATA")
    inside = annotated = 0
    areas = []
    for item in find_category("mvtec", name, Path(root)).test:
        foreground = data.find_foreground(data.load_image(item.path, 256, 256))
        foreground = np.ones((256, 256), bool) if foreground is None else foreground
        truth = data.load_mask(item, 256, 256)
        inside, annotated = inside + (truth & foreground).sum(), annotated + truth.sum()
        areas.append(foreground.mean())
    assert inside / annotated >= 0.97
    assert name != "screw" or np.mean(areas) < 0.5
