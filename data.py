"""The data of a run: images and masks as tensors, foregrounds, texture sources, the training split.

support/layouts.py finds the files, and support/images.py decodes them. Nothing is trained here.
"""
import dataclasses
import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

import demo
from settings import Settings
from support import ranks
from support.console import InputError, progress_bar
from support.files import read_json, save_json
from support.images import doubts_about_mask, open_image, read_mask, size_of, to_rgb
from support.layouts import (Category, Item, describe_copies, find_category, find_images,
                             is_texture, list_categories, list_images, root_folder)

SCORING_GRID = 256                    # side of the grid on which uncropped images are scored


# ---------------------------------------------------------------- images and masks

def preprocess(image: Image.Image, resize: int, crop: int) -> np.ndarray:
    """Section 4.3's preprocessing: resize to resize x resize (aspect not kept), then centre crop.

    image: RGB of any size. Returns uint8 [3, crop, crop], which `scale` converts to [-1, 1].
    """
    image = image.resize((resize, resize), Image.Resampling.BILINEAR)
    edge = (resize - crop) // 2
    image = image.crop((edge, edge, edge + crop, edge + crop))
    return np.asarray(image).transpose(2, 0, 1)


def scale(images: Tensor) -> Tensor:
    """Convert uint8 images in 0..255 to float32 in [-1, 1] (section 4.3)."""
    return images.float() / 127.5 - 1


def unscale(x: Tensor) -> Tensor:
    """Images in about [-1, 1] as float32 in [0, 255]: `scale` undone."""
    return (x.clamp(-1, 1) + 1) * 127.5


def load_image(path: Path, resize: int, crop: int, is_mask: bool = False) -> np.ndarray:
    """Read and preprocess an image: uint8 [3, crop, crop]. Raises InputError (see `open_image`)."""
    return preprocess(to_rgb(open_image(path, is_mask)), resize, crop)


def load_mask(item: Item, grid: int, crop: int) -> np.ndarray:
    """Ground truth on the scoring grid, bool [crop, crop]: resized to grid x grid, then cropped.

    Anomalous pixels of the file are those above a tenth of its largest value (above 0, if that
    value is at most 127), in a JPEG or WebP those above half of it. A pixel of the grid is
    anomalous if at least half of its area is. An 8-connected region that would disappear from the
    crop by this rule keeps the pixel that it covers most. Normal images give zeros. Raises
    InputError if mask and image differ in size.
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


class Images:
    """uint8 images [3, crop, crop] of a list of files, decoded once and kept in memory.

    If they need more than `limit` bytes (`in_memory` is false), they are read from disk at every
    access. Indexing with a list or slice gives a batch, uint8 [n, 3, crop, crop]. Raises InputError
    for a file that cannot be read.
    """

    def __init__(self, paths: list[Path], resize: int, crop: int, limit: float = 4e9,
                 title: str = "images"):
        self.paths, self.resize, self.crop = paths, resize, crop
        self.bytes = len(paths) * 3 * crop * crop
        self.in_memory = self.bytes <= limit
        self.cache = np.empty((len(paths), 3, crop, crop), np.uint8) if self.in_memory else None
        with progress_bar(paths, desc=title, unit="image", leave=False) as bar:
            for k, path in enumerate(bar):
                image = load_image(path, resize, crop)             # checks every file before use
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

def find_foreground(image: np.ndarray) -> np.ndarray | None:
    """Segment the object in an image, uint8 [3, H, W] -> bool [H, W]; None if that is unreliable.

    The background is a quadratic surface, fitted robustly to the colours of the border. The object
    is the region that deviates from it by more than Otsu's threshold (shadows rarely do), with
    holes filled and slightly dilated. The result is unreliable if the border is not a smooth
    background, or if the object covers at most 1 % or at least 95 % of the image.
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
    """Foreground of every training image, bool [N, 1, H, W], and a line that describes it.

    mode: "auto" (segmented from the images), "none" (the whole image), or a folder of masks. The
    whole image is also used for MVTec AD's textures and zipper, and in mode "auto" if more than a
    tenth of the images cannot be segmented reliably. Raises InputError for a missing mask.
    """
    N, S = len(images), images.crop
    whole = torch.ones(1, 1, S, S, dtype=torch.bool).expand(N, 1, S, S)
    if mode == "none":
        return whole, "whole image"
    if is_texture(category.data, category.name):
        return whole, "whole image (a texture)"
    if mode != "auto":
        return foreground_from_folder(images, category, Path(mode))
    masks, n_unreliable = whole.clone(), 0
    for k in progress_bar(range(N), desc="foreground", unit="image", leave=False):
        mask = find_foreground(images[[k]][0].numpy())
        n_unreliable += mask is None
        if mask is not None:
            masks[k, 0] = torch.from_numpy(mask)
    if n_unreliable > 0.1 * N:
        return whole, f"whole image (no sure object in {n_unreliable} of {N} images)"
    return masks, f"objects found, {masks.float().mean():.0%} of the image"


def foreground_from_folder(images: Images, category: Category, folder: Path) -> tuple[Tensor, str]:
    """Read the masks in folder/CATEGORY, or in folder if that does not exist, by the images' names.

    As in the authors' code, they are thresholded at half of their range and dilated by a 5 x 5
    square. Raises InputError for missing or ambiguous masks.
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
    shared = [p for p, count in Counter(p.stem for p in category.train).items() if count > 1]
    if shared:
        raise InputError(f"--foreground {folder}: {len(shared)} names of training images stand for "
                         f"several, as {shared[0]}, so their masks are not known; rename them")
    missing = [p for p in category.train if p.stem not in files]
    if missing:
        raise InputError(f"{folder}: no foreground mask named like {missing[0].name} "
                         f"(nor for {len(missing) - 1} more images)")
    grey = [load_image(files[p.stem], images.resize, images.crop, is_mask=True).max(0)
            for p in category.train]
    masks = ndimage.binary_dilation(np.stack(grey)[:, None] > 127, np.ones((1, 1, 5, 5)))
    return torch.from_numpy(masks), f"masks of {folder}, {masks.mean():.0%} of the image"


# ---------------------------------------------------------------- texture sources

class Textures:
    """Source images of textural anomalies: DTD if it is under the root, otherwise embedded images.

    `source` describes them. Files are decoded when first drawn and cached up to `limit` bytes.
    """

    def __init__(self, root: Path, size: int, limit: float = 1e9):
        self.size, self.limit = size, limit
        folders = [folder for folder in (root / "dtd" / "images", root / "dtd-r1.0.1" / "images")
                   if folder.is_dir()]
        self.paths = [p for p in find_images(folders[0]) if p.suffix == ".jpg"] if folders else []
        self.cache: dict[int, Tensor] = {}
        if self.paths:
            self.source = f"{len(self.paths)} images of DTD ({folders[0]})"
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
    """Procedural textures (clouds, stripes, checks, dots, wood and noise in random colours) and
    crops of scikit-learn's two photographs, uint8 [3, size, size] each."""
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


# ---------------------------------------------------------------- the data of a run

@dataclass
class RunData:
    """The data of a run: normal images with their foreground, textures, and the test set.

    images: N normal images; `train_indices` are trained on, `held_out` are not. foreground: bool
    [N, 1, H, W]. masks: ground truth of the test set on the scoring grid, bool [len(test), side,
    side], or None if the data has none. notes: lines of text for the user.
    """
    category: Category
    images: Images
    train_indices: np.ndarray
    held_out: np.ndarray
    foreground: Tensor
    textures: Textures
    test: Images
    masks: np.ndarray | None
    notes: list[str]

    def steps_per_epoch(self, batch: int) -> int:
        """Steps in an epoch; its last batch holds the remaining images."""
        return math.ceil(len(self.train_indices) / batch)


def load_run_data(s: Settings, training: bool = True, folder: Path | None = None) -> RunData:
    """Read and check all data of a run before the training starts. Raises InputError.

    folder: an existing run folder; its split into training and held-out images is reused. If
    `training`, the number of textures must also be the one in its record.
    """
    root = root_folder(s.root)
    category, record, notes = find_category(s.data, s.category, root), {}, []
    if folder and (folder / "data.json").exists():
        record = refuse_other_data(folder, category)
        category, notes = select_recorded_images(category, record, training)
    limit = s.memory_gb * 1e9
    images = Images(category.train, s.resize, s.crop, limit, "training images")
    test = Images([item.path for item in category.test], s.resize, s.crop,
                  limit - images.bytes * images.in_memory, "test images")
    masks = None
    if category.annotated and category.test:
        masks = np.stack([load_mask(item, SCORING_GRID, scoring_side(s)) for item in category.test])
        notes += describe_ground_truth(category.test, masks)
    train_indices, held_out = split_images(s, category, record)
    try:
        foreground, foreground_note = foreground_masks(images, category, s.foreground)
    except InputError:
        if training:
            raise                                 # scoring does not need the folder of masks
        foreground, foreground_note = foreground_masks(images, category)
    textures = Textures(root, s.crop)
    if training and record.get("textures", textures.count) != textures.count:
        raise InputError(f"this run was begun with {record['textures']} textures, now there are "
                         f"{textures.count}: {textures.source}; put --root back, or give another "
                         f"--name")
    where = "in memory" if images.in_memory and test.in_memory else "partly read from disk"
    notes = [f"{len(train_indices)} normal images to train on, {len(held_out)} held out, "
             f"{len(test)} to test ({(images.bytes + test.bytes) / 1e6:.0f} MB, {where})",
             f"foreground: {foreground_note}", f"textures: {textures.source}",
             *(f"note: {note}" for note in category.notes),
             *(f"warning: {line}" for line in describe_copies(category)), *notes]
    return RunData(category, images, train_indices, held_out, foreground, textures, test, masks,
                   notes)


def split_images(s: Settings, category: Category, record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and held-out images, from a run's record or drawn with the seed."""
    if record:
        index_of = {name_in(category, path): k for k, path in enumerate(category.train)}
        return (np.array([index_of[name] for name in record["train"] if name in index_of], int),
                np.array([index_of[name] for name in record["held_out"]], int))
    count = len(category.train)
    order = np.random.default_rng(s.seed).permutation(count)
    n_held_out = min(max(round(s.hold_out * count), 1), count - 1) if s.hold_out else 0
    return order[n_held_out:], order[:n_held_out]


def select_recorded_images(category: Category, record: dict,
                           training: bool) -> tuple[Category, list[str]]:
    """The category with only the normal images of a run's record, and a note on images added since.

    Raises InputError if a held-out image is missing or, when training, any image of the record.
    """
    paths = {name_in(category, path): path for path in category.train}
    needed = (record["train"] if training else []) + record["held_out"]
    missing = [name for name in needed if name not in paths]
    if missing:
        raise InputError(f"{category.root / missing[0]}: gone (and {len(missing) - 1} more), but "
                         f"this run was begun with it; put it back, or give another --name")
    recorded = {*record["train"], *record["held_out"]}
    new = set(paths) - recorded
    notes = [f"warning: {len(new)} normal images were added since this run began: not used"]
    category = dataclasses.replace(category, train=[path for name, path in paths.items()
                                                    if name in recorded])
    return category, notes if new else []


def describe_ground_truth(items: list[Item], masks: np.ndarray) -> list[str]:
    """A line on how many ground-truth regions remain after the scoring grid and the centre crop.

    It also says how much of their images the masks cover. Further lines list the mask files that
    are empty and those that are probably wrong, such as inverted masks.
    """
    shares, outside, regions, empty, doubts = [], 0, np.zeros(2, int), [], []
    for item, mask in zip(items, masks):
        if item.mask:
            full_mask = read_mask(item.mask)
            shares.append(full_mask.mean())
            doubts += doubts_about_mask(item.mask)
            regions += [ndimage.label(part, np.ones((3, 3)))[1] for part in (full_mask, mask)]
            outside += bool(full_mask.any()) and not mask.any()
            if not full_mask.any():
                empty.append(item.mask)
    notes = [f"ground truth: {regions[0]} regions in {len(shares)} masks, {regions[1]} where they "
             f"are scored" + (f"; {outside} masks lie outside the crop" if outside else "")
             + (f"; {np.mean(shares):.1%} of an image is defect on average" if shares else "")]
    if empty:
        notes.append(f"warning: {len(empty)} masks of defects are empty, so these defects are not "
                     f"scored: {', '.join(map(str, empty[:9]))}")
    notes += [f"warning: {doubt}" for doubt in doubts[:3]]
    if len(doubts) > 3:
        notes.append(f"warning: {len(doubts) - 3} more doubts about masks; tools/download.py "
                     f"--check lists them")
    return notes


def scoring_side(s: Settings) -> int:
    """Side of the scoring grid in pixels after the centre crop."""
    return round(SCORING_GRID * s.crop / s.resize)


def find_categories(s: Settings) -> tuple[Settings, list[str]]:
    """The settings, with `root` set for the demo, and the names of the requested categories.

    The demo's categories are drawn first. Raises InputError if there are no categories or none is
    requested, or if --foreground names a folder in which a category has no subfolder.
    """
    if s.data == "demo":
        s = dataclasses.replace(s, root=s.root or "data")
        if not ranks.RANK:
            demo.write(Path(s.root) / "demo", s.category)
    ranks.wait()
    names = list_categories(s.data, root_folder(s.root))
    if not s.category:
        raise InputError(f"--category: one of {', '.join(names)}, or all")
    if s.category != "all":
        return s, [s.category]
    if s.foreground not in ("auto", "none"):
        unmasked = [name for name in names if not is_texture(s.data, name)
                   and not (Path(s.foreground) / name).is_dir()]
        if unmasked:
            raise InputError(f"--foreground {s.foreground}: no folder {unmasked[0]} in it (nor for "
                             f"{len(unmasked) - 1} more); each category needs one of its own there")
    return s, names


# ---------------------------------------------------------------- the record of a run's data

def name_in(category: Category, path: Path) -> str:
    """An image's path relative to the folder of its category."""
    return path.relative_to(category.root).as_posix() if path.is_relative_to(category.root) else \
        os.path.relpath(path, category.root)


def fingerprint(category: Category) -> str:
    """SHA-1 of the names and file sizes of a category's images."""
    digest = hashlib.sha1()
    for path in [*category.train, *(item.path for item in category.test)]:
        digest.update(os.fsencode(name_in(category, path)) + b" %d\n" % path.stat().st_size)
    return digest.hexdigest()


def save_data_record(folder: Path, run_data: RunData) -> None:
    """Write data.json, unless the folder has one: the data set of a run, its split, and its number
    of textures."""
    if (folder / "data.json").exists():
        return
    category, paths = run_data.category, run_data.images.paths
    save_json(folder / "data.json", {
        "root": str(category.root.resolve()), "files": fingerprint(category),
        "textures": run_data.textures.count,
        "train": [name_in(category, paths[k]) for k in run_data.train_indices],
        "held_out": [name_in(category, paths[k]) for k in run_data.held_out]})


def refuse_other_data(folder: Path, category: Category) -> dict:
    """Read a run's data.json.

    Raises InputError if the run used another folder with other files.
    """
    record = read_json(folder / "data.json")
    if record["root"] != str(category.root.resolve()) and record["files"] != fingerprint(category):
        raise InputError(f"{folder} holds a run of {record['root']}, not of {category.root}, "
                         f"which needs a run of its own (train.py --name)")
    return record
