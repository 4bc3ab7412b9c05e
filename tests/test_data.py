"""Data sets in every layout, image kinds, masks on the scoring grid, foregrounds and textures."""
import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import data
from settings import InputError


def png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def picture(value=100, size=32):
    return np.full((size, size, 3), value)


def mvtec_tree(root, masks=True):
    for k in range(4):
        png(root / "train" / "good" / f"{k:03}.png", picture(k))
    png(root / "test" / "good" / "000.png", picture(10))
    for k in range(2):
        png(root / "test" / "cut" / f"{k:03}.png", picture(20))
        if masks:
            mask = np.zeros((32, 32))
            mask[4:8, 4:8] = 1 + k
            png(root / "ground_truth" / "cut" / f"{k:03}_mask.png", mask)
    return root


# ---------------------------------------------------------------- layouts

@pytest.mark.parametrize("folder", ["mvtec", "mvtec_anomaly_detection", "."])
def test_mvtec_wherever_it_lies_under_the_root(tmp_path, folder):
    mvtec_tree(tmp_path / folder / "cable")
    assert data.list_categories("mvtec", tmp_path) == ["cable"]
    found = data.find_category("mvtec", "cable", tmp_path)
    assert len(found.train) == 4 and found.annotated
    assert [(i.label, i.defect) for i in found.test] == [(1, "cut"), (1, "cut"), (0, "good")]
    assert found.test[0].mask.name == "000_mask.png" and found.test[2].mask is None


def test_categories_come_in_the_data_sets_order(tmp_path):
    for name in ("zipper", "bottle", "something_else"):
        mvtec_tree(tmp_path / "mvtec" / name)
    assert data.list_categories("mvtec", tmp_path) == ["bottle", "zipper"]


def test_any_folder(tmp_path, monkeypatch):
    mvtec_tree(tmp_path / "parts" / "bolt")
    monkeypatch.chdir(tmp_path)
    for where in ("parts", str(tmp_path / "parts")):
        found = data.find_category(where, "bolt", tmp_path / "elsewhere")
        assert found.data == "parts" and len(found.test) == 3


def test_btad(tmp_path):
    root = tmp_path / "BTech_Dataset_transformed" / "01"
    for place in ("train/ok", "test/ok", "test/ko"):
        png(root / place / "0000.bmp", picture())
    png(root / "ground_truth" / "ko" / "0000.png", np.ones((32, 32)))
    found = data.find_category("btad", "01", tmp_path)
    assert len(found.train) == 1 and sorted(item.label for item in found.test) == [0, 1]


@pytest.mark.parametrize("folder", ["VisA_pytorch/1cls", "visa_pytorch", "visa/visa_pytorch"])
def test_visa_converted(tmp_path, folder):
    root = tmp_path / folder / "candle"
    for place in ("train/good/0.JPG", "test/good/1.JPG", "test/bad/2.JPG"):
        png(root / place, picture())
    png(root / "ground_truth" / "bad" / "2.png", np.ones((32, 32)))
    found = data.find_category("visa", "candle", tmp_path)
    assert [(item.label, item.mask is not None) for item in found.test] == [(1, True), (0, False)]


def visa_tree(root, rows):
    (root / "split_csv").mkdir(parents=True)
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])
    for _, _, _, image, mask in rows:
        png(root / image, picture())
        if mask:
            png(root / mask, np.full((32, 32), 3))


def visa_rows(name="candle"):
    at = f"{name}/Data/"
    return [[name, "train", "normal", f"{at}Images/Normal/0.JPG", ""],
            [name, "train", "normal", f"{at}Images/Normal/1.JPG", ""],
            [name, "test", "normal", f"{at}Images/Normal/2.JPG", ""],
            [name, "test", "anomaly", f"{at}Images/Anomaly/0.JPG", f"{at}Masks/Anomaly/0.png"]]


def test_visa_as_published_follows_its_table(tmp_path):
    visa_tree(tmp_path / "visa", visa_rows() + visa_rows("pcb1"))
    png(tmp_path / "visa" / "candle" / "Data" / "Images" / "Normal" / "9.JPG", picture())
    assert data.list_categories("visa", tmp_path) == ["candle", "pcb1"]
    found = data.find_category("visa", "candle", tmp_path)
    assert [p.name for p in found.train] == ["0.JPG", "1.JPG"]      # 9.JPG is not in the table
    assert [(i.label, i.defect, bool(i.mask)) for i in found.test] == [(0, "good", False),
                                                                       (1, "bad", True)]
    assert data.load_mask(found.test[1], 16, 16).all()              # a class id of 3 is anomalous


def test_visa_without_its_table_or_with_a_wrong_one(tmp_path):
    visa_tree(tmp_path, visa_rows())
    (tmp_path / "candle" / "Data" / "Images" / "Normal" / "1.JPG").unlink()
    with pytest.raises(InputError, match="1.JPG: in VisA's table, but not there"):
        data.find_category("visa", "candle", tmp_path)
    (tmp_path / "split_csv" / "1cls.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not VisA's table"):
        data.find_category("visa", "candle", tmp_path)
    (tmp_path / "split_csv" / "1cls.csv").unlink()
    with pytest.raises(InputError, match="1cls.csv is missing"):
        data.find_category("visa", "candle", tmp_path)


def test_visa_without_a_mask_keeps_the_image_and_names_the_fault(tmp_path):
    visa_tree(tmp_path, visa_rows())
    mask = tmp_path / "candle" / "Data" / "Masks" / "Anomaly" / "0.png"
    mask.unlink()
    found = data.read_category("visa", "candle", tmp_path / "candle")
    assert found.faults == [f"{mask}: in VisA's table, but not there"]
    assert [(item.label, item.mask) for item in found.test] == [(0, None), (1, None)]


def test_no_ground_truth_folder_and_no_test_folder_are_fine(tmp_path):
    root = mvtec_tree(tmp_path / "a", masks=False)
    found = data.find_category(str(tmp_path), "a", tmp_path)
    assert not found.annotated and len(found.test) == 3
    for path in root.glob("test/*/*"):
        path.unlink()
    assert data.find_category(str(tmp_path), "a", tmp_path).test == []


# ---------------------------------------------------------------- what is refused

def test_missing_roots_say_how_to_get_the_data(tmp_path):
    with pytest.raises(InputError, match="no mvtec data under .*mvtec-ad.*--root"):
        data.find_category("mvtec", "cable", tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither a data set"):
        data.find_category("nonsense", "cable", tmp_path)


def test_unknown_category_suggests_the_nearest(tmp_path):
    mvtec_tree(tmp_path / "mvtec" / "cable")
    with pytest.raises(InputError, match="did you mean cable"):
        data.find_category("mvtec", "cabel", tmp_path)
    with pytest.raises(InputError, match="'wood' in mvtec is not there; there are: cable"):
        data.find_category("mvtec", "wood", tmp_path)


def test_empty_train_folder(tmp_path):
    root = mvtec_tree(tmp_path / "mvtec" / "cable")
    for path in (root / "train" / "good").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="cable: no training images"):
        data.find_category("mvtec", "cable", tmp_path)


def test_masks_and_images_must_pair(tmp_path):
    root = mvtec_tree(tmp_path / "mvtec" / "cable")
    mask = root / "ground_truth" / "cut" / "001_mask.png"
    other = mask.with_name("007_mask.png")
    mask.rename(other)
    with pytest.raises(InputError, match="001.png: no mask for it"):
        data.find_category("mvtec", "cable", tmp_path)
    other.rename(mask)
    png(other, np.ones((32, 32)))
    with pytest.raises(InputError, match="007_mask.png: a mask without its image"):
        data.find_category("mvtec", "cable", tmp_path)


def test_mask_of_another_size(tmp_path):
    root = mvtec_tree(tmp_path / "mvtec" / "cable")
    png(root / "ground_truth" / "cut" / "001_mask.png", np.ones((30, 32)))
    item = data.find_category("mvtec", "cable", tmp_path).test[1]
    with pytest.raises(InputError, match="001_mask.png is 32 x 30 pixels, its image .* 32 x 32"):
        data.load_mask(item, 16, 16)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_truncated_and_wrong_images(tmp_path, content):
    path = tmp_path / "a.png"
    png(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3)))
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(InputError, match="a.png: cannot be read as an image"):
        data.load_image(path, 32, 32)


# ---------------------------------------------------------------- images and masks

def test_image_kinds(tmp_path):
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
        got = data.load_image(tmp_path / name, 8, 8)
        assert got.dtype == np.uint8 and np.array_equal(got, rgb.transpose(2, 0, 1)), name
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "dark.png")
    assert data.load_image(tmp_path / "dark.png", 8, 8).max() == 1   # of 16 bits, however dark


def test_preprocessing_resizes_and_crops_the_centre(tmp_path):
    image = np.zeros((64, 128, 3))
    image[16:48, 32:96] = 255                                        # the middle half, any aspect
    png(tmp_path / "a.png", image)
    got = data.load_image(tmp_path / "a.png", 32, 16)
    assert got.shape == (3, 16, 16) and got[:, 1:-1, 1:-1].min() == 255
    assert data.load_image(tmp_path / "a.png", 32, 32)[0, 0, 0] == 0


def test_masks_on_the_scoring_grid(tmp_path):
    mask = np.zeros((64, 64))
    mask[0:8, 0:8] = 255                                             # two whole pixels of 4 x 4
    mask[32:36, 32:34] = 70                                          # half of a pixel: anomalous
    mask[48:52, 48:49] = 90                                          # a quarter: kept, it is alone
    mask[8:9, 0:8] = 255                                             # a fringe of the first region
    png(tmp_path / "image.png", picture(size=64))
    png(tmp_path / "mask.png", mask)
    item = data.Item(tmp_path / "image.png", 1, "cut", tmp_path / "mask.png")
    want = np.zeros((16, 16), bool)
    want[0:2, 0:2] = want[8, 8] = want[12, 12] = True
    assert np.array_equal(data.load_mask(item, 16, 16), want)
    assert np.array_equal(data.load_mask(item, 16, 12), want[2:14, 2:14])
    Image.open(item.mask).convert("LA").save(item.mask)             # an opaque alpha is no defect
    assert np.array_equal(data.load_mask(item, 16, 16), want)
    assert not data.load_mask(data.Item(tmp_path / "image.png", 0, "good"), 16, 16).any()


def test_no_region_vanishes_in_the_crop(tmp_path):
    """Regions that the crop cuts, the second of them down to less than half of any pixel."""
    mask = np.zeros((64, 64))
    mask[20:24, 0:9] = 255                       # grid columns 0, 1 and a quarter of column 2
    mask[40:44, 0:4] = 255                       # column 0: outside the crop altogether
    png(tmp_path / "image.png", picture(size=64))
    png(tmp_path / "mask.png", mask)
    item = data.Item(tmp_path / "image.png", 1, "cut", tmp_path / "mask.png")
    assert data.load_mask(item, 16, 16).sum() == 3
    found = data.load_mask(item, 16, 12)
    assert found.sum() == 1 and found[5 - 2, 0]


def test_scale():
    assert data.scale(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_images_above_the_limit_are_read_from_disk(tmp_path):
    mvtec_tree(tmp_path / "a")
    paths = data.list_images(tmp_path / "a" / "train" / "good")
    kept, read = data.Images(paths, 16, 8), data.Images(paths, 16, 8, limit=100)
    assert kept.in_memory and not read.in_memory and kept.bytes == 4 * 3 * 8 * 8
    assert kept[[2, 0]].shape == (2, 3, 8, 8) and int(kept[[2]][0, 0, 0, 0]) == 2
    assert torch.equal(kept[1:3], read[1:3]) and torch.equal(kept[[2, 0]], read[[2, 0]])


# ---------------------------------------------------------------- foregrounds and textures

def object_image(size=64, noise=3):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size]
    disc = np.hypot(y - 30, x - 34) < 15
    image = np.where(disc, 90, 200 - x / 3) + rng.normal(0, noise, (size, size))
    return np.repeat(image[None], 3, 0).clip(0, 255).astype(np.uint8), disc


def test_foreground_is_found_on_an_uneven_background():
    image, disc = object_image()
    found = data.find_foreground(image)
    assert found[disc].all() and found.mean() < 1.5 * disc.mean()


def test_foreground_leaves_shadows_out():
    image, disc = object_image()
    y, x = np.mgrid[0:64, 0:64]
    shadow = (np.hypot(y - 40, x - 40) < 15) & ~disc
    image[:, shadow] -= 40                                           # the disc is 100 darker
    found = data.find_foreground(image)
    edge = ndimage.binary_dilation(disc, iterations=3)
    assert found[disc].all() and not found[shadow & ~edge].any()


def test_foreground_is_not_sure_without_a_background():
    rng = np.random.default_rng(0)
    assert data.find_foreground(rng.integers(0, 255, (3, 64, 64)).astype(np.uint8)) is None
    assert data.find_foreground(np.full((3, 64, 64), 128, np.uint8)) is None


def category_of(folder, name="bolt", of="parts"):
    return data.Category(of, name, folder, data.list_images(folder))


def test_foreground_modes(tmp_path):
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
    given, _ = data.foreground_masks(images, bolt, str(tmp_path / "masks"))
    assert given.flatten(1).any(1).tolist() == [False, False, True]  # by file name, not by order
    (tmp_path / "masks" / "1_mask.png").unlink()
    with pytest.raises(InputError, match="no foreground mask named like 1.png"):
        data.foreground_masks(images, bolt, str(tmp_path / "masks"))
    with pytest.raises(InputError, match="no such folder"):
        data.foreground_masks(images, bolt, str(tmp_path / "nothing"))


def test_given_foregrounds_are_halved_dilated_and_of_their_own_category(tmp_path):
    """As the authors' code reads them; the file names of two categories are the same."""
    png(tmp_path / "images" / "000.png", object_image()[0].transpose(1, 2, 0))
    bolt, nut = (category_of(tmp_path / "images", name) for name in ("bolt", "nut"))
    images = data.Images(bolt.train, 64, 64)
    mask = np.full((64, 64), 100)                                   # below half: not the object
    mask[20:30, 40:45] = 160
    png(tmp_path / "masks" / "000.png", np.full((64, 64), 255))
    png(tmp_path / "masks" / "nut" / "000_mask.png", mask)
    found, line = data.foreground_masks(images, nut, str(tmp_path / "masks"))
    want = np.zeros((64, 64), bool)
    want[18:32, 38:47] = True
    assert np.array_equal(found[0, 0].numpy(), want) and str(tmp_path / "masks" / "nut") in line
    assert data.foreground_masks(images, bolt, str(tmp_path / "masks"))[0].all()


def test_a_category_without_sure_objects_falls_back_to_the_whole_image(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(3):
        png(tmp_path / f"{k}.png", rng.integers(0, 255, (64, 64, 3)))
    category = category_of(tmp_path)
    masks, line = data.foreground_masks(data.Images(category.train, 64, 64), category)
    assert masks.all() and "3 of 3" in line


def test_textures_embedded_or_dtd(tmp_path):
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


# ---------------------------------------------------------------- real images, where there are any

@pytest.mark.parametrize("name", ["bottle", "screw"])
def test_foreground_holds_the_annotated_defects_of_mvtec(name):
    root = os.environ.get("TRANSFUSION_DATA", "")
    if not root or not (Path(root) / "mvtec" / name).is_dir():
        pytest.skip("needs MVTec AD under TRANSFUSION_DATA")
    inside = annotated = 0
    areas = []
    for item in data.find_category("mvtec", name, Path(root)).test:
        found = data.find_foreground(data.load_image(item.path, 256, 256))
        found = np.ones((256, 256), bool) if found is None else found
        truth = data.load_mask(item, 256, 256)
        inside, annotated = inside + (truth & found).sum(), annotated + truth.sum()
        areas.append(found.mean())
    assert inside / annotated >= 0.97
    assert name != "screw" or np.mean(areas) < 0.5
