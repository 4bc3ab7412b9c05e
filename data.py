"""Data sets on disk: where they lie, what is in them, and their images as uint8 tensors.

MVTec AD, VisA (as published and converted), BTAD and any folder in MVTec AD's layout; foreground
masks and texture sources for the synthetic anomalies. Nothing here trains or writes.
"""
import csv
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from settings import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
GOOD = {"good", "ok"}
TEXTURES = {"carpet", "grid", "leather", "tile", "wood", "zipper"}     # see is_texture

CATEGORIES = {
    "mvtec": ("bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile "
              "toothbrush transistor wood zipper").split(),
    "visa": ("candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 "
             "pipe_fryum").split(),
    "btad": ["01", "02", "03"],
    "demo": ["fabric", "gear", "blister"],
}
FOLDERS = {                                     # under the root, in the order they are tried
    "mvtec": ("mvtec", "mvtec_anomaly_detection", "."),
    "visa": ("visa", "VisA_20220922", "VisA", "VisA_pytorch/1cls", "visa/VisA_pytorch/1cls",
             "visa_pytorch", "visa/visa_pytorch", "."),
    "btad": ("btad", "BTech_Dataset_transformed", "btad/BTech_Dataset_transformed", "."),
    "demo": ("demo", "."),
}
PAGES = {"mvtec": "https://www.mvtec.com/company/research/datasets/mvtec-ad",
         "visa": "https://github.com/amazon-science/spot-diff",
         "btad": "https://avires.dimi.uniud.it/papers/btad/btad.zip"}


@dataclass(frozen=True)
class Item:
    """A test image: label 1 is defective; mask is None where it is normal or not annotated."""
    path: Path
    label: int
    defect: str
    mask: Path | None = None


@dataclass(frozen=True)
class Category:
    """One category on disk. annotated: whether the defects have ground-truth masks at all; faults:
    what is wrong with the listing, a line each."""
    data: str
    name: str
    root: Path
    train: list[Path]
    test: list[Item] = field(default_factory=list)
    annotated: bool = True
    faults: list[str] = field(default_factory=list)

    @property
    def labels(self) -> np.ndarray:
        """[N] in {0, 1}, 1 for the defective images of the test set."""
        return np.array([item.label for item in self.test], int)


# ---------------------------------------------------------------- finding and listing

def is_category(path: Path) -> bool:
    return (path / "train").is_dir() or (path / "Data" / "Images").is_dir()


def data_folders(data: str, root: Path) -> list[Path]:
    """Folders that may hold the categories of `data`: a data set's name or a folder's path."""
    if data in FOLDERS:
        return [root / folder for folder in FOLDERS[data] if (root / folder).is_dir()]
    return [path for path in (Path(data), root / data) if path.is_dir()]


def list_categories(data: str, root: Path) -> list[str]:
    """Names of the categories of `data` that lie under `root`, in the data set's own order.

    Raises InputError when there are none, and says how to get them.
    """
    for folder in data_folders(data, root):
        found = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and is_category(p)]
        found = [name for name in CATEGORIES.get(data, found) if name in found]
        if found:
            return found
    if data in FOLDERS:
        raise InputError(
            f"no {data} data under {root}: python tools/download.py {data}, or get it from "
            f"{PAGES.get(data, 'demo.py')} and unpack it to {root / data}/CATEGORY, or say where "
            f"it lies with --root DIR")
    if not data_folders(data, root):
        raise InputError(f"--data {data}: neither a data set ({', '.join(FOLDERS)}) nor a folder")
    raise InputError(f"{data}: no category in it; each is a folder CATEGORY/train/good of images")


def find_category(data: str, name: str, root: Path) -> Category:
    """Find and list the category `name`, in any of the layouts the README names.

    Raises InputError for a name that is not there (with the nearest that is), an empty train
    folder, and masks and images that do not pair.
    """
    known = list_categories(data, root)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        absent = " is not there" if name in CATEGORIES.get(data, []) else ""
        raise InputError(f"no category {name!r} in {data}{absent}; {hint}")
    path = next(folder / name for folder in data_folders(data, root) if is_category(folder / name))
    label = data if data in FOLDERS else Path(data).resolve().name
    category = read_category(label, name, path)
    if category.faults:
        raise InputError(f"{category.faults[0]} (faults: {len(category.faults)}; python "
                         f"tools/download.py --check {path} lists them)")
    return category


def list_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def read_category(data: str, name: str, path: Path, annotated: bool = False) -> Category:
    """What is there of a category, and what is wrong with it. annotated: masks are missing even
    where there is no ground_truth at all. Raises InputError for a VisA without its table."""
    visa = (path / "Data" / "Images").is_dir()
    category = read_visa(data, name, path) if visa else read_mvtec(data, name, path, annotated)
    if not category.train:
        category.faults.append(f"{path}: no training images; put normal images into train/good")
    return category


def read_mvtec(data: str, name: str, path: Path, annotated: bool = False) -> Category:
    """A category in MVTec AD's layout (BTAD's `ok` counts as good, masks ID_mask.* or ID.*)."""
    train = [p for good in sorted(GOOD) for p in list_images(path / "train" / good)]
    truth, test, faults = path / "ground_truth", [], []
    annotated |= truth.is_dir()
    for folder in sorted(p for p in path.glob("test/*") if p.is_dir()):
        images = list_images(folder)
        if folder.name in GOOD:
            test += [Item(p, 0, folder.name) for p in images]
            continue
        masks = {p.stem.removesuffix("_mask"): p for p in list_images(truth / folder.name)}
        faults += [f"{p}: no mask for it in {truth / folder.name}; add it, or remove all of "
                   f"ground_truth" for p in images if annotated and p.stem not in masks]
        faults += [f"{masks[stem]}: a mask without its image"
                   for stem in sorted(set(masks) - {p.stem for p in images})]
        test += [Item(p, 1, folder.name, masks.get(p.stem)) for p in images]
    return Category(data, name, path, train, test, annotated, faults)


def read_visa(data: str, name: str, path: Path) -> Category:
    """A category of VisA as published: split_csv/1cls.csv says what is train and what is test."""
    table = path.parent / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise InputError(f"{table} is missing: VisA's official split is part of its archive")
    train, test, faults = [], [], []
    try:
        with open(table, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["object"] == name]
        for row in rows:
            image, normal = path.parent / row["image"], row["label"] == "normal"
            mask = None if normal or row["split"] == "train" else path.parent / row["mask"]
            gone = [p for p in (image, mask) if p and not p.is_file()]
            faults += [f"{p}: in VisA's table, but not there" for p in gone]
            if image in gone:
                continue
            if row["split"] == "train":
                train.append(image)
            else:
                test.append(Item(image, 0 if normal else 1, "good" if normal else "bad",
                                 None if mask in gone else mask))
    except (KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not VisA's table object,split,label,image,mask ({error!r})")
    return Category(data, name, path, train, test, faults=faults)


# ---------------------------------------------------------------- reading images

def open_image(path: Path) -> Image.Image:
    """A decoded image. Raises InputError for a file that is not one, or is cut off."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it")


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any image: grey-scale, palette, alpha (dropped), 16-bit and float."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else \
            255 if values.max(initial=0) > 1 else 1
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    return image.convert("RGB")


def preprocess(image: Image.Image, resize: int, crop: int) -> np.ndarray:
    """Section 4.3's preprocessing: resize x resize (the aspect is not kept), then the centre crop.

    image: RGB of any size. Returns uint8 [3, crop, crop]; `scale` brings it to [-1, 1].
    """
    image = image.resize((resize, resize), Image.Resampling.BILINEAR)
    edge = (resize - crop) // 2
    image = image.crop((edge, edge, edge + crop, edge + crop))
    return np.asarray(image).transpose(2, 0, 1)


def scale(images: Tensor) -> Tensor:
    """uint8 images in 0..255 as float32 in [-1, 1] (section 4.3)."""
    return images.float() / 127.5 - 1


def load_image(path: Path, resize: int, crop: int) -> np.ndarray:
    """The image of a file, preprocessed, uint8 [3, crop, crop]. Raises InputError."""
    return preprocess(to_rgb(open_image(path)), resize, crop)


def load_mask(item: Item, grid: int, crop: int) -> np.ndarray:
    """Ground truth on the scoring grid, bool [crop, crop]: the image at grid x grid, then cropped.

    Non-zero pixels of the file are anomalous; a pixel of the grid is where at least half of its
    area is, and an 8-connected region of which the crop would show nothing for that reason keeps
    its best pixel there. Normal images: zeros. Raises InputError for a mask that is not of its
    image's size.
    """
    if item.mask is None:
        return np.zeros((crop, crop), bool)
    mask = np.asarray(open_image(item.mask))
    channels = mask.reshape(*mask.shape[:2], -1)
    if channels.shape[-1] in (2, 4):                           # the last of them is alpha
        channels = channels[..., :-1]
    mask = (channels > 0).any(-1)
    with Image.open(item.path) as image:
        size = (image.height, image.width)
    if mask.shape != size:
        raise InputError(f"{item.mask} is {mask.shape[1]} x {mask.shape[0]} pixels, "
                         f"its image {item.path} {size[1]} x {size[0]}; they must agree")
    edge = (grid - crop) // 2

    def coverage(region: np.ndarray) -> np.ndarray:
        full = Image.fromarray(region.astype(np.float32))
        full = np.asarray(full.resize((grid, grid), Image.Resampling.BOX))
        return full[edge:edge + crop, edge:edge + crop]

    reduced = coverage(mask) >= 0.5
    regions, count = ndimage.label(mask, np.ones((3, 3)))
    for k in range(1, count + 1):
        share = coverage(regions == k)
        if share.any() and not reduced[share > 0].any():
            reduced[np.unravel_index(share.argmax(), share.shape)] = True
    return reduced


class Images(Sequence):
    """uint8 images [3, crop, crop] of a list of files, decoded once and kept in memory.

    Above `limit` bytes they are read from disk at every access instead (`in_memory` says).
    Indexing with a list gives a batch, uint8 [len, 3, crop, crop]. Raises InputError.
    """

    def __init__(self, paths: list[Path], resize: int, crop: int, limit: float = 4e9,
                 title: str = "", progress: bool = False):
        self.paths, self.resize, self.crop = paths, resize, crop
        self.bytes = len(paths) * 3 * crop * crop
        self.in_memory = self.bytes <= limit
        self.cache = None
        if self.in_memory:
            self.cache = np.empty((len(paths), 3, crop, crop), np.uint8)
            with tqdm(paths, desc=title, unit="image", leave=False, disable=not progress) as bar:
                for k, path in enumerate(bar):
                    self.cache[k] = load_image(path, resize, crop)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices) -> Tensor:
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        if self.cache is not None:
            return torch.tensor(self.cache[list(indices)])
        return torch.tensor(np.stack([load_image(self.paths[k], self.resize, self.crop)
                                      for k in indices]))


# ---------------------------------------------------------------- foreground masks

def is_texture(data: str, name: str) -> bool:
    """Whether it is one of MVTec AD's six categories without a foreground in the authors' code: the
    five textures, and zipper."""
    return data == "mvtec" and name in TEXTURES


def find_foreground(image: np.ndarray) -> np.ndarray | None:
    """The object of one image, uint8 [3, H, W] -> bool [H, W], or None where that is not sure.

    The background is a quadratic surface fitted to the border's colours, robustly; the object is
    what deviates from it by more than Otsu's threshold, which shadows hardly do, holes filled,
    slightly dilated. Not sure: a border that is no smooth background, or an object that covers
    hardly anything or everything.
    """
    _, H, W = image.shape
    smooth = ndimage.gaussian_filter(image.astype(np.float32), (0, H / 256, W / 256))
    smooth = smooth.transpose(1, 2, 0)
    y, x = np.mgrid[-1:1:H * 1j, -1:1:W * 1j]
    basis = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], -1)
    border = np.ones((H, W), bool)
    width = max(2, H // 32)
    border[width:-width, width:-width] = False
    background = border
    for _ in range(3):
        surface = np.linalg.lstsq(basis[background], smooth[background], rcond=None)[0]
        deviation = np.abs(smooth - basis @ surface).max(-1)
        noise = 1.4826 * np.median(deviation[background]) + 1
        background = border & (deviation < 4 * noise)
        if background.sum() < 0.7 * border.sum():
            return None
    mask = deviation > max(4 * noise, otsu(deviation))
    mask = ndimage.binary_fill_holes(ndimage.binary_opening(mask))
    regions, count = ndimage.label(mask)
    if count == 0:
        return None
    areas = np.bincount(regions.ravel())[1:]
    mask = np.isin(regions, 1 + np.flatnonzero(areas > 0.05 * areas.max()))
    mask = ndimage.binary_dilation(mask, iterations=max(1, round(H / 48)))
    return mask if 0.01 < mask.mean() < 0.95 else None


def otsu(values: np.ndarray) -> float:
    """The threshold that separates the values into the two most distinct classes (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[1:] + edges[:-1]) / 2
    below, moment = np.cumsum(counts)[:-1], np.cumsum(counts * centres)[:-1]
    above, total = counts.sum() - below, (counts * centres).sum()
    between = (total * below / counts.sum() - moment) ** 2 / np.maximum(below * above, 1)
    return float(centres[between.argmax()])


def foreground_masks(images: Images, category: Category, mode: str = "auto",
                     progress: bool = False) -> tuple[Tensor, str]:
    """Foreground of every training image, bool [N, 1, H, W], and a line that says what it is.

    mode: "auto" (found in the images), "none" (the whole image), or a folder of masks. MVTec AD's
    textures have no foreground: the whole image, and so has a category in which more than a tenth
    of the images are not sure. Raises InputError.
    """
    N, S = len(images), images.crop
    whole = torch.ones(1, 1, S, S, dtype=torch.bool).expand(N, 1, S, S)
    if mode == "none":
        return whole, "whole image"
    if is_texture(category.data, category.name):
        return whole, "whole image (a texture)"
    if mode != "auto":
        return given_foreground(images, category, Path(mode))
    masks, unsure = whole.clone(), 0
    for k in tqdm(range(N), desc="foreground", unit="image", leave=False, disable=not progress):
        found = find_foreground(images[[k]][0].numpy())
        unsure += found is None
        if found is not None:
            masks[k, 0] = torch.from_numpy(found)
    if unsure > 0.1 * N:
        return whole, f"whole image (no sure object in {unsure} of {N} images)"
    return masks, f"objects found, {masks.float().mean():.0%} of the image"


def given_foreground(images: Images, category: Category, folder: Path) -> tuple[Tensor, str]:
    """The masks of folder/CATEGORY, or where that is not there of folder, by the images' names.

    As in the authors' code: thresholded at half of their range, dilated by a 5 x 5 square.
    """
    if not folder.is_dir():
        raise InputError(f"--foreground {folder}: no such folder; auto, none or a folder of masks")
    if (folder / category.name).is_dir():
        folder = folder / category.name
    files = {p.stem.removesuffix("_mask"): p for p in list_images(folder)}
    gone = [p for p in category.train if p.stem not in files]
    if gone:
        raise InputError(f"{folder}: no foreground mask named like {gone[0].name} "
                         f"(nor for {len(gone) - 1} more images)")
    loaded = [load_image(files[p.stem], images.resize, images.crop).max(0) for p in category.train]
    masks = ndimage.binary_dilation(np.stack(loaded)[:, None] > 127, np.ones((1, 1, 5, 5)))
    return torch.from_numpy(masks), f"masks of {folder}, {masks.mean():.0%} of the image"


# ---------------------------------------------------------------- texture sources

class Textures:
    """Source images of textural anomalies: DTD where it lies under the root, else embedded ones.

    `source` says which. Files are decoded when first drawn and kept up to `limit` bytes.
    """

    def __init__(self, root: Path, size: int, limit: float = 1e9):
        self.size, self.limit = size, limit
        found = [folder for folder in (root / "dtd" / "images", root / "dtd-r1.0.1" / "images")
                 if folder.is_dir()]
        self.paths = sorted(found[0].glob("*/*.jpg")) if found else []
        self.cache: dict[int, Tensor] = {}
        if self.paths:
            self.source = f"{len(self.paths)} images of DTD ({found[0]})"
            self.count = len(self.paths)
        else:
            self.cache = dict(enumerate(embedded_textures(size)))
            self.count = len(self.cache)
            self.source = f"{self.count} embedded images (no DTD at {root / 'dtd' / 'images'})"

    def draw(self, n: int, rng: np.random.Generator) -> Tensor:
        """n textures, uint8 [n, 3, size, size]."""
        return torch.stack([self.get(k) for k in rng.integers(0, self.count, n).tolist()])

    def get(self, k: int) -> Tensor:
        if k in self.cache:
            return self.cache[k]
        image = torch.tensor(load_image(self.paths[k], self.size, self.size))
        if (len(self.cache) + 1) * image.nbytes <= self.limit:
            self.cache[k] = image
        return image


def embedded_textures(size: int, drawn: int = 48, seed: int = 0) -> list[Tensor]:
    """Drawn textures (cloud, stripe, check, dot and wood patterns in random colours) and crops of
    scikit-learn's two photographs, uint8 [3, size, size] each."""
    from sklearn.datasets import load_sample_images
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:size * 1j, 0:1:size * 1j]
    images = []
    for k in range(drawn):
        angle, frequency = rng.uniform(0, np.pi), 2 ** rng.uniform(1, 5)
        u = x * np.cos(angle) + y * np.sin(angle)
        v = y * np.cos(angle) - x * np.sin(angle)
        cloud = ndimage.gaussian_filter(rng.normal(size=(size, size)), size / frequency / 4)
        cloud /= cloud.std()
        wave = 2 * np.pi * frequency
        pattern = (cloud,
                   np.sin(wave * u + 0.5 * cloud),
                   np.sign(np.sin(wave * u) * np.sin(wave * v)),
                   ((np.sin(wave * u) * np.cos(wave * v)) > 0.6).astype(float),
                   np.sin(wave * (u + 0.15 * cloud)) * np.abs(cloud),
                   rng.normal(size=(size, size)) + cloud)[k % 6]
        pattern = (pattern - pattern.min()) / np.ptp(pattern)
        colours = rng.uniform(0, 255, (2, 3, 1, 1))
        image = colours[0] * pattern + colours[1] * (1 - pattern)
        image += rng.normal(scale=rng.uniform(0, 15), size=image.shape)
        images.append(image.clip(0, 255).astype(np.uint8))
    for photo in load_sample_images().images:
        for side in (100, 150, 200, 300):
            for _ in range(4):
                top = rng.integers(0, photo.shape[0] - side)
                left = rng.integers(0, photo.shape[1] - side)
                part = Image.fromarray(photo[top:top + side, left:left + side])
                images.append(np.asarray(part.resize((size, size))).transpose(2, 0, 1))
    return [torch.tensor(image) for image in images]


def root_folder(given: str = "") -> Path:
    """Where data lies: the folder given, else the environment's TRANSFUSION_DATA, else ./data."""
    return Path(given or os.environ.get("TRANSFUSION_DATA", "data"))
