"""Data sets on disk: their folders, their categories, and the files of a category.

Supported are MVTec AD, VisA (as published and converted), BTAD, and any folder in MVTec AD's
layout. Image files are listed but not opened.
"""
import csv
import difflib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from support.console import InputError
from support.images import SUFFIXES

GOOD = {"good", "ok", "normal"}                 # names of folders of normal images, in any case
# The suffix or prefix that tells the file name of a label from that of its image.
LABEL = re.compile(r"[_-](gt|masks?|labels?|seg)$|^(gt|masks?|labels?|seg)[_-]", re.IGNORECASE)
LEFTOVERS = {"@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN"}       # system folders
TEXTURES = {"carpet", "grid", "leather", "tile", "wood", "zipper"}     # see is_texture

CATEGORIES = {
    "mvtec": ("bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile "
              "toothbrush transistor wood zipper").split(),
    "visa": ("candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 "
             "pipe_fryum").split(),
    "btad": ["01", "02", "03"],
    "demo": ["fabric", "gear", "blister"],
}
FOLDERS = {                                     # under the data root, in the order of the search
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
    """A test image. label: 1 is defective; mask: None for a normal or unannotated image."""
    path: Path
    label: int
    defect: str
    mask: Path | None = None


@dataclass(frozen=True)
class Category:
    """One category on disk. annotated: whether the data has ground-truth masks; faults: errors in
    its files; notes: files that are ignored. Faults and notes are lines of text for the user."""
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


def is_category(path: Path) -> bool:
    return (path / "train").is_dir() or (path / "Data" / "Images").is_dir()


def data_folders(data: str, root: Path) -> list[Path]:
    """Folders that may hold the categories of `data`, which is the name of a data set or the path
    of a folder; `./demo` is a path."""
    if data in FOLDERS:
        return [root / folder for folder in FOLDERS[data] if (root / folder).is_dir()]
    return [path for path in (Path(data), root / data) if path.is_dir()]


def list_categories(data: str, root: Path) -> list[str]:
    """Names of the categories of `data` that lie under `root`, in the data set's own order.

    Raises InputError if there are none; its message says how to get them.
    """
    for folder in data_folders(data, root):
        names = [p.name for p in visible(folder) if p.is_dir() and is_category(p)]
        names = [name for name in CATEGORIES.get(data, names) if name in names]
        if names:
            return names
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
    """Find and list the category `name`, in any of the layouts of docs/reproduce.md.

    Raises InputError for an unknown name (and suggests a similar one), an empty train folder, and
    masks that do not match the images.
    """
    names = list_categories(data, root)
    if name not in names:
        similar = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {similar[0]}?" if similar else f"there are: {', '.join(names)}"
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
    """The content of a folder, sorted, without hidden and system files; [] if it is missing."""
    return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name not in LEFTOVERS) \
        if folder.is_dir() else []


def list_images(folder: Path) -> list[Path]:
    """The image files in a folder, without its subfolders."""
    return [p for p in visible(folder) if p.suffix.lower() in SUFFIXES and not p.is_dir()]


def find_files(folder: Path, within: tuple[Path, ...] = ()) -> list[Path]:
    """All files below a folder; a link back to a parent folder is not followed."""
    home = folder.resolve()
    if home in within:
        return []
    return [file for path in visible(folder) for file in
            (find_files(path, (*within, home)) if path.is_dir() else [path])]


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder."""
    return [path for path in find_files(folder) if path.suffix.lower() in SUFFIXES]


def unread_files(folder: Path, read: list[Path]) -> str:
    """A note on the files below a folder that are not in `read`, counted by suffix; may be ""."""
    read_files = set(read)
    unread = Counter(p.suffix.lower() or "no suffix" for p in find_files(folder)
                   if p not in read_files and p.name.lower() not in ("thumbs.db", "desktop.ini"))
    names = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
    return f"{folder}: not read: {names}" if names else ""


def read_category(data: str, name: str, path: Path, annotated: bool = False) -> Category:
    """List the files of a category and their faults. annotated: report missing masks even if there
    is no folder ground_truth. Raises InputError for VisA without its split table."""
    visa = (path / "Data" / "Images").is_dir()
    category = read_visa(data, name, path) if visa else read_mvtec(data, name, path, annotated)
    if not category.train:
        category.faults.append(f"{path}: no training images; put normal images into train/good")
    return category


def read_mvtec(data: str, name: str, path: Path, annotated: bool = False) -> Category:
    """A category in MVTec AD's layout. Normal images are in a folder named in GOOD or below it. The
    mask of the image ID.* is ID_mask.* or ID.*, in the same subfolder of ground_truth."""
    train_folder, truth = path / "train", path / "ground_truth"
    train = [p for folder in visible(train_folder) if folder.is_dir() and is_good(folder.name)
             for p in find_images(folder)]
    test, faults, notes = [], labels_among_images(train), []
    annotated |= truth.is_dir()
    for folder in (p for p in visible(path / "test") if p.is_dir()):
        images = find_images(folder)
        faults += labels_among_images(images)
        if is_good(folder.name):
            test += [Item(p, 0, folder.name) for p in images]
            continue
        masks, unpaired = {}, []
        stems = Counter(p.relative_to(folder).with_suffix("") for p in images)
        for mask in find_images(truth / folder.name):
            relative = mask.relative_to(truth / folder.name)
            stem = relative.parent / relative.stem.removesuffix("_mask")
            if stem in masks:
                faults.append(f"{mask}: a second mask for {stem.name}, beside {masks[stem].name}; "
                              f"keep one of them")
            elif stem in stems:
                masks[stem] = mask
            elif relative.parent in stems:
                faults.append(f"{mask.parent}: a folder of several masks for an image, as in MVTec "
                              f"LOCO, which is not read; one mask an image, "
                              f"{relative.parent}_mask.png")
            else:
                unpaired.append(f"{mask}: a mask without its image")
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
        faults += unpaired
    faults += [f"{mask}: a mask without its image" for folder in visible(truth)
               if not is_good(folder.name) and not (path / "test" / folder.name).is_dir()
               for mask in find_images(folder)]
    standard = {"train", "test", "ground_truth"}
    others = [p.name for p in visible(path) if p.is_dir() and p.name not in standard
              and find_images(p)]
    if others:
        notes.append(f"{path}: not read: {', '.join(others)}; images are taken from train/good and "
                     f"test, masks from ground_truth")
    notes += filter(None, (unread_files(folder, read) for folder, read in
                           ((train_folder, train), (path / "test", [item.path for item in test]))))
    return Category(data, name, path, train, test, annotated, list(dict.fromkeys(faults)), notes)


def labels_among_images(images: list[Path]) -> list[str]:
    """A fault if label files lie among the images, such as 000_GT.png beside 000.png."""
    stems = set(p.with_suffix("") for p in images)
    labels = [p for p in images if LABEL.search(p.stem)
              and p.parent / LABEL.sub("", p.stem) in stems]
    return [f"{labels[0]}: looks like the label of the image beside it, not like a part (as do "
            f"{len(labels) - 1} more there); move labels to another folder, those of "
            f"test images to ground_truth"] if labels else []


def read_visa(data: str, name: str, path: Path) -> Category:
    """A category of VisA as published, with the train / test split of split_csv/1cls.csv."""
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
            missing = [p for p in (image, mask) if p and not p.is_file()]
            faults += [f"{p}: in VisA's table, but not there" for p in missing]
            if image in missing:
                continue
            if row["split"] == "train":
                train.append(image)
            else:
                test.append(Item(image, 0 if normal else 1, "good" if normal else "bad",
                                 None if mask in missing else mask))
    except (KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not VisA's table object,split,label,image,mask ({error!r})")
    return Category(data, name, path, train, test, faults=faults)


def is_texture(data: str, name: str) -> bool:
    """Whether a category is one of MVTec AD's five textures or zipper, for which the authors' code
    uses no foreground masks."""
    return data == "mvtec" and name in TEXTURES


def root_folder(folder: str = "") -> Path:
    """The data root: `folder`, or the environment variable TRANSFUSION_DATA, or ./data."""
    return Path(folder or os.environ.get("TRANSFUSION_DATA", "data")).expanduser()
