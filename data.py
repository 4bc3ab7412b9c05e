"""Data sets on disk: where they lie, what is in them, and their images as uint8 tensors.

MVTec AD, VisA (as published and converted), BTAD and any folder in MVTec AD's layout; foreground
masks and texture sources for the synthetic anomalies. Nothing here trains or writes.
"""
import csv
import difflib
import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor

from settings import InputError, progress_bar

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
LOSSY = {"JPEG", "MPO", "WEBP"}                 # formats, whatever a file's suffix says
GOOD = {"good", "ok", "normal"}                 # folder names, in any case
# What the file name of a label has beside its image's name.
LABEL = re.compile(r"[_-](gt|masks?|labels?|seg)$|^(gt|masks?|labels?|seg)[_-]", re.IGNORECASE)
LEFTOVERS = {"@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN"}          # of systems, not hidden
DARK = ("{}: no 16-bit value passes 4095, so the image is nearly black; multiply 12-bit values by "
        "16, 8-bit ones by 257")
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
    what is wrong with the listing, notes: what was passed over in it, a line each."""
    data: str
    name: str
    root: Path
    train: list[Path]
    test: list[Item] = field(default_factory=list)
    annotated: bool = True
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> np.ndarray:
        """[N] in {0, 1}, 1 for the defective images of the test set."""
        return np.array([item.label for item in self.test], int)


# ---------------------------------------------------------------- finding and listing

def is_category(path: Path) -> bool:
    return (path / "train").is_dir() or (path / "Data" / "Images").is_dir()


def data_folders(data: str, root: Path) -> list[Path]:
    """Folders that may hold the categories of `data`: a data set's name or a folder's path, which
    `./demo` is, too."""
    if data in FOLDERS:
        return [root / folder for folder in FOLDERS[data] if (root / folder).is_dir()]
    return [path for path in (Path(data), root / data) if path.is_dir()]


def list_categories(data: str, root: Path) -> list[str]:
    """Names of the categories of `data` that lie under `root`, in the data set's own order.

    Raises InputError when there are none, and says how to get them.
    """
    for folder in data_folders(data, root):
        found = [p.name for p in visible(folder) if p.is_dir() and is_category(p)]
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
    folder = Path(os.path.abspath(data))
    if (folder / "train").is_dir():
        raise InputError(f"{data} is itself a category; say --data {folder.parent} --category "
                         f"{folder.name}")
    raise InputError(f"{data}: no category in it; each is a folder CATEGORY/train/good of images")


def find_category(data: str, name: str, root: Path) -> Category:
    """Find and list the category `name`, in any of the layouts docs/reproduce.md names.

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


def is_good(name: str) -> bool:
    """Whether a folder of this name holds normal images."""
    return name.strip().lower() in GOOD


def visible(folder: Path) -> list[Path]:
    """What is in a folder, without the files and folders that systems and tools leave there."""
    return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name not in LEFTOVERS) \
        if folder.is_dir() else []


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder itself."""
    return [p for p in visible(folder) if p.suffix.lower() in SUFFIXES and not p.is_dir()]


def find_files(folder: Path, within: tuple[Path, ...] = ()) -> list[Path]:
    """The files of a folder and of those in it; a link that leads back up is not followed."""
    home = folder.resolve()
    if home in within:
        return []
    return [file for path in visible(folder) for file in
            (find_files(path, (*within, home)) if path.is_dir() else [path])]


def find_images(folder: Path) -> list[Path]:
    """The image files of a folder and of those in it."""
    return [path for path in find_files(folder) if path.suffix.lower() in SUFFIXES]


def passed_over(folder: Path, read: list[Path]) -> str:
    """Which files below a folder are not among those read: their number by suffix, or nothing."""
    known = set(read)
    left = Counter(p.suffix.lower() or "no suffix" for p in find_files(folder)
                   if p not in known and p.name.lower() not in ("thumbs.db", "desktop.ini"))
    names = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left.items()))
    return f"{folder}: not read: {names}" if names else ""


def read_category(data: str, name: str, path: Path, annotated: bool = False) -> Category:
    """What is there of a category, and what is wrong with it. annotated: masks are missing even
    where there is no ground_truth at all. Raises InputError for a VisA without its table."""
    visa = (path / "Data" / "Images").is_dir()
    category = read_visa(data, name, path) if visa else read_mvtec(data, name, path, annotated)
    if not category.train:
        category.faults.append(f"{path}: no training images; put normal images into train/good")
    return category


def read_mvtec(data: str, name: str, path: Path, annotated: bool = False) -> Category:
    """A category in MVTec AD's layout: folders called good, in any spelling of GOOD, and their
    subfolders; masks of ID.* are ID_mask.* or ID.*, in the same subfolder."""
    train_folder, truth = path / "train", path / "ground_truth"
    train = [p for folder in visible(train_folder) if folder.is_dir() and is_good(folder.name)
             for p in find_images(folder)]
    test, faults, notes = [], beside(train), []
    annotated |= truth.is_dir()
    for folder in (p for p in visible(path / "test") if p.is_dir()):
        images = find_images(folder)
        faults += beside(images)
        if is_good(folder.name):
            test += [Item(p, 0, folder.name) for p in images]
            continue
        masks, alone = {}, []
        stems = Counter(p.relative_to(folder).with_suffix("") for p in images)
        for mask in find_images(truth / folder.name):
            place = mask.relative_to(truth / folder.name)
            stem = place.parent / place.stem.removesuffix("_mask")
            if stem in masks:
                faults.append(f"{mask}: a second mask for {stem.name}, beside {masks[stem].name}; "
                              f"keep one of them")
            elif stem in stems:
                masks[stem] = mask
            elif place.parent in stems:
                faults.append(f"{mask.parent}: a folder of several masks for an image, as in MVTec "
                              f"LOCO, which is not read; one mask an image, "
                              f"{place.parent}_mask.png")
            else:
                alone.append(f"{mask}: a mask without its image")
        for image in images:
            stem = image.relative_to(folder).with_suffix("")
            if stem in masks and stems[stem] > 1:
                faults.append(f"{image}: {masks[stem].name} is for one image, but {stems[stem]} "
                              f"are called {stem.name}; rename them and their masks")
            if annotated and stem not in masks:
                faults.append(f"{image}: no mask for it; looked for {truth / folder.name / stem}"
                              f"_mask.* and {stem.name}.*; add it, or move ground_truth away to "
                              f"go without any")
            test.append(Item(image, 1, folder.name, masks.get(stem)))
        faults += alone
    faults += [f"{mask}: a mask without its image" for folder in visible(truth)
               if not is_good(folder.name) and not (path / "test" / folder.name).is_dir()
               for mask in find_images(folder)]
    known = {"train", "test", "ground_truth"}
    others = [p.name for p in visible(path) if p.is_dir() and p.name not in known
              and find_images(p)]
    if others:
        notes.append(f"{path}: not read: {', '.join(others)}; images are taken from train/good and "
                     f"test, masks from ground_truth")
    notes += filter(None, (passed_over(folder, read) for folder, read in
                           ((train_folder, train), (path / "test", [item.path for item in test]))))
    return Category(data, name, path, train, test, annotated, list(dict.fromkeys(faults)), notes)


def beside(images: list[Path]) -> list[str]:
    """A fault for labels that lie among the images they belong to, as 000_GT.png beside 000.png."""
    known = set(p.with_suffix("") for p in images)
    labels = [p for p in images if LABEL.search(p.stem)
              and p.parent / LABEL.sub("", p.stem) in known]
    return [f"{labels[0]}: looks like the label of the image beside it, not like a part (as do "
            f"{len(labels) - 1} more there); move labels to another folder, those of "
            f"test images to ground_truth"] if labels else []


def read_visa(data: str, name: str, path: Path) -> Category:
    """A category of VisA as published: split_csv/1cls.csv says what is train and what is test."""
    table = path.parent / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise InputError(f"{table} is missing: VisA's official split is part of its archive")
    train, test, faults = [], [], []
    try:
        with open(table, newline="", encoding="utf-8") as file:
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
        warnings.warn(DARK.format(name))
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

    Pixels of the file that are not black are anomalous, in a JPEG or WebP those above half of its
    largest value; up to a tenth of that, where it exceeds 127, is no label but noise. A pixel of
    the grid is anomalous where at least half of its area is, and an 8-connected region of which the
    crop would show nothing for that reason keeps its best pixel there. Normal images: zeros. Raises
    InputError for a mask that is not of its image's size.
    """
    if item.mask is None:
        return np.zeros((crop, crop), bool)
    mask = read_mask(item.mask)
    size = size_of(item.path)[::-1]
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


def read_mask(path: Path) -> np.ndarray:
    """The anomalous pixels of a mask's file, bool [H, W]; see `load_mask`."""
    image = open_image(path, is_mask=True)
    values = np.asarray(image if image.mode in ("L", "1") or image.mode[0] == "I"
                        else image.convert("RGB")).astype(int)
    values = values.reshape(*values.shape[:2], -1).max(-1)
    top = values.max(initial=0)
    with Image.open(path) as file:
        lossy = file.format in LOSSY or file.info.get("compression") == "jpeg"          # a TIFF's
    least = top / 2 if lossy else top / 10 if top > 127 else 0
    return values > least


class Images:
    """uint8 images [3, crop, crop] of a list of files, decoded once and kept in memory.

    Above `limit` bytes they are read from disk at every access instead (`in_memory` says).
    Indexing with a list gives a batch, uint8 [len, 3, crop, crop]. Raises InputError.
    """

    def __init__(self, paths: list[Path], resize: int, crop: int, limit: float = 4e9,
                 title: str = "images"):
        self.paths, self.resize, self.crop = paths, resize, crop
        self.bytes = len(paths) * 3 * crop * crop
        self.in_memory = self.bytes <= limit
        self.cache = np.empty((len(paths), 3, crop, crop), np.uint8) if self.in_memory else None
        with progress_bar(paths, desc=title, unit="image", leave=False) as bar:
            for k, path in enumerate(bar):
                image = load_image(path, resize, crop)             # all are looked at before use
                if self.in_memory:
                    self.cache[k] = image

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


def foreground_masks(images: Images, category: Category,
                     mode: str = "auto") -> tuple[Tensor, str]:
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
    for k in progress_bar(range(N), desc="foreground", unit="image", leave=False):
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
    files: dict[str, Path] = {}
    for path in list_images(folder):
        other = files.setdefault(path.stem.removesuffix("_mask"), path)
        if other != path:
            raise InputError(f"{path}: a second foreground mask beside {other.name}; keep one")
    twice = [p for p, count in Counter(p.stem for p in category.train).items() if count > 1]
    if twice:
        raise InputError(f"--foreground {folder}: {len(twice)} names of training images stand for "
                         f"several, as {twice[0]}, so their masks are not known; rename them")
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
        self.paths = [p for p in find_images(found[0]) if p.suffix == ".jpg"] if found else []
        self.cache: dict[int, Tensor] = {}
        if self.paths:
            self.source = f"{len(self.paths)} images of DTD ({found[0]})"
            self.count = len(self.paths)
        else:
            self.cache = dict(enumerate(embedded_textures(size)))
            self.count = len(self.cache)
            self.source = (f"{self.count} embedded images (DTD, which is optional, is not at "
                           f"{root / 'dtd' / 'images'})")

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


def embedded_textures(size: int) -> list[Tensor]:
    """Drawn textures (cloud, stripe, check, dot and wood patterns in random colours) and crops of
    scikit-learn's two photographs, uint8 [3, size, size] each."""
    from sklearn.datasets import load_sample_images
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:1:size * 1j, 0:1:size * 1j]
    images = []
    for k in range(48):
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
    return Path(given or os.environ.get("TRANSFUSION_DATA", "data")).expanduser()
