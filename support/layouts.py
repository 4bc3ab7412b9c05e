"""Data sets on disk: their folders, their categories, and the files of a category.

Supported are MVTec AD, VisA (as published and converted), BTAD, and any folder in MVTec AD's
layout. Image files are listed but not opened, unless two of them have the same name.

`photos_among` decides which image files are photos, for train.py, predict.py and
tools/download.py --check alike.
"""
import csv
import difflib
import functools
import glob
import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from support.console import InputError
from support.images import SUFFIXES, masks_among

GOOD = {"good", "ok", "normal"}                 # names of folders of normal images, in any case
# The suffix or prefix that tells the file name of a label from that of its image.
LABEL = re.compile(r"[_-](gt|masks?|labels?|seg)$|^(gt|masks?|labels?|seg)[_-]", re.IGNORECASE)
# Names of folders of labels, in any case and without - _ and spaces.
LABEL_FOLDERS = {"gt", "groundtruth", "mask", "masks", "label", "labels"}
PICTURES = ("heatmaps", "restored", "maps")     # folders of pictures that predict.py writes
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
    return any(map(os.path.isdir, (path / "train", path / "Data" / "Images")))


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
    own = ""
    for folder in data_folders(data, root):
        present = [p.name for p in visible(folder) if is_category(p)]
        names = [name for name in CATEGORIES.get(data, present) if name in present]
        if names:
            return names
        if present and not own:
            own = f"; {folder} holds {', '.join(present[:9])}: {data_flag(folder)} trains on it"
    if data in FOLDERS:
        raise InputError(
            f"no {data} data under {root}: python tools/download.py {data}, or get it from "
            f"{PAGES.get(data, 'demo.py')} and unpack it to {root / data}/CATEGORY, or say where "
            f"it lies with --root DIR{own}")
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
    own = next((folder for folder in data_folders(data, root) if is_category(folder / name)), None)
    if data in FOLDERS and own and name not in CATEGORIES[data]:
        raise InputError(f"{own / name} is not a category of {data}; to train on it, give "
                         f"{data_flag(own)} --category {name}")
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


def data_flag(folder: Path) -> str:
    """The flag --data that means this folder, also if it is called like a data set."""
    return f"--data {'./' * (str(folder) in FOLDERS)}{folder}"


def is_good(name: str) -> bool:
    """Whether a folder of this name holds normal images."""
    return name.strip().lower() in GOOD


def visible(folder: Path) -> list[Path]:
    """The content of a folder, sorted, without hidden and system files; [] if it is missing.

    Raises InputError if the folder cannot be listed.
    """
    try:
        return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name not in LEFTOVERS) \
            if os.path.isdir(folder) else []
    except OSError as error:
        raise InputError(not_listed(folder, error))


def not_listed(folder: Path, error: OSError) -> str:
    return f"{folder}: cannot be listed ({error.strerror}); permit it, or move the folder away"


def list_images(folder: Path) -> list[Path]:
    """The image files in a folder, without its subfolders."""
    return [p for p in visible(folder) if p.suffix.lower() in SUFFIXES and not p.is_dir()]


def search(folder: Path, within: tuple[Path, ...] = ()) -> tuple[list[Path], dict[Path, str]]:
    """All files below a folder, and a line of text for each folder that cannot be listed.

    A link back to a parent folder is not followed.
    """
    home = folder.resolve()
    if home in within:
        return [], {}
    try:
        content = [(path, path.is_dir()) for path in visible(folder)]
    except InputError as error:
        return [], {folder: str(error)}
    except OSError as error:                       # its names can be listed, but nothing else
        return [], {folder: not_listed(folder, error)}
    files, closed = [], {}
    for path, is_folder in content:
        below = search(path, (*within, home)) if is_folder else ([path], {})
        files += below[0]
        closed |= below[1]
    return files, closed


def find_files(folder: Path) -> list[Path]:
    """All files below a folder, without those in folders that cannot be listed."""
    return search(folder)[0]


def find_images(folder: Path) -> list[Path]:
    """The photos below a folder, by the rule of `photos_among`.

    Raises InputError if the folder itself cannot be listed.
    """
    files, closed = search(folder)
    if folder in closed:
        raise InputError(closed[folder])
    return photos_among(files, folder)


def find_masks(folder: Path) -> list[Path]:
    """All image files below a folder."""
    return [path for path in find_files(folder) if path.suffix.lower() in SUFFIXES]


def matching_paths(pattern: Path) -> list[Path]:
    """The paths that match a glob pattern. Brackets in the name of a folder that exists are part of
    its name."""
    folder = next(path for path in pattern.parents if os.path.isdir(path))
    return [folder / path for path in
            sorted(glob.glob(str(pattern.relative_to(folder)), root_dir=folder, recursive=True))]


# ---------------------------------------------------------------- what is a photo

def photos_among(files: list[Path], top: Path) -> list[Path]:
    """The photos among the files found below the folder `top`.

    Left out are other formats, results of this program, and masks or labels: files in a folder
    named in LABEL_FOLDERS, files named like the label of the photo beside them (000_GT.png beside
    000.png), and, of several files of one name, those that look like masks of the others.
    """
    results = {folder for folder in {p.parent for p in files} if holds_results(folder)}
    images = [p for p in files if p.suffix.lower() in SUFFIXES and p.parent not in results
              and not in_label_folder(p, top)]
    stems = {p.with_suffix("") for p in images}
    images = [p for p in images if not is_label_of_any(p, stems)]
    namesakes: dict[Path, list[Path]] = {}
    for path in images:
        namesakes.setdefault(path.with_suffix(""), []).append(path)
    masks = {mask for group in namesakes.values() if len(group) > 1 for mask in masks_among(group)}
    return [p for p in images if p not in masks]


def is_label_folder(name: str) -> bool:
    return re.sub("[-_ ]", "", name).lower() in LABEL_FOLDERS


def in_label_folder(path: Path, top: Path) -> bool:
    """Whether a folder on the way from `top` down to the file is named in LABEL_FOLDERS."""
    return any(map(is_label_folder, path.relative_to(top).parts[:-1]))


def is_label_of_any(path: Path, stems: set[Path]) -> bool:
    """Whether the file is named like the label of one of the photos, given without suffixes."""
    return bool(LABEL.search(path.stem)) and path.parent / LABEL.sub("", path.stem) in stems


def holds_results(folder: Path) -> bool:
    """Whether the pictures in a folder are results of a training or of predict.py."""
    return (folder / "last.pt").exists() or \
        any(path.name in PICTURES and (path.parent / "regions.csv").exists()
            for path in (folder, *folder.parents))


def unread_files(folder: Path, read: list[Path]) -> str:
    """A note on what is below a folder but not in `read`; "" if there is nothing.

    Files are counted by suffix. Masks and labels, results of this program, and folders that cannot
    be listed are counted, too, and the first of each kind is named.
    """
    files, closed = search(folder)
    read_files, photos = set(read), {path.with_suffix("") for path in read}
    suffixes: Counter = Counter()
    in_folders, beside, results = [], [], []
    for path in files:
        if path in read_files or path.name.lower() in ("thumbs.db", "desktop.ini"):
            continue
        name = str(path.relative_to(folder))
        if path.suffix.lower() not in SUFFIXES:
            suffixes[path.suffix.lower() or "no suffix"] += 1
        elif holds_results(path.parent):
            results.append(name)
        elif in_label_folder(path, folder):
            in_folders.append(name)
        elif is_label_of_any(path, photos) or path.with_suffix("") in photos:
            beside.append(name)
        else:
            suffixes[path.suffix.lower()] += 1
    counted = [f"{count} {suffix}" for suffix, count in sorted(suffixes.items())]
    counted += [f"{len(names)} {kind} ({names[0]}{' ...' * (len(names) > 1)})" for kind, names in (
        ("in folders of masks or labels", in_folders), ("masks or labels beside photos", beside),
        ("results of this program", results),
        ("folders that cannot be listed", [str(path.relative_to(folder)) for path in closed]))
        if names]
    return f"{folder}: not read: {', '.join(counted)}" if counted else ""


# ---------------------------------------------------------------- the files of a category

def read_category(data: str, name: str, path: Path, annotated: bool = False) -> Category:
    """List the files of a category and their faults. annotated: report missing masks even if there
    is no folder ground_truth. Raises InputError for VisA without its split table."""
    visa = os.path.isdir(path / "Data" / "Images")
    category = read_visa(data, name, path) if visa else read_mvtec(data, name, path, annotated)
    if not category.train:
        category.faults.append(f"{path}: no training images; put normal images into train/good")
    return category


def read_mvtec(data: str, name: str, path: Path, annotated: bool = False) -> Category:
    """A category in MVTec AD's layout. Normal images are in a folder named in GOOD or below it. The
    mask of the image ID.* is ID_mask.* or ID.*, in the same subfolder of ground_truth."""
    train_folder, truth = path / "train", path / "ground_truth"
    train = [p for folder in visible(train_folder) if folder.is_dir() and is_good(folder.name)
             for p in photos_among(find_files(folder), folder)]
    test, notes = [], []
    faults = [line for folder in (train_folder, path / "test", truth)
              for line in search(folder)[1].values()]
    annotated |= truth.is_dir()
    for folder in (p for p in visible(path / "test") if p.is_dir()):
        if is_label_folder(folder.name) and not (truth / folder.name).is_dir():
            continue
        images = photos_among(find_files(folder), folder)
        if is_good(folder.name):
            test += [Item(p, 0, folder.name) for p in images]
            continue
        masks, unpaired, with_several = {}, [], set()
        stems = Counter(p.relative_to(folder).with_suffix("") for p in images)
        for mask in find_masks(truth / folder.name):
            relative = mask.relative_to(truth / folder.name)
            stem = relative.parent / relative.stem.removesuffix("_mask")
            if stem in masks:
                faults.append(f"{mask}: a second mask for {stem.name}, beside {masks[stem].name}; "
                              f"keep one of them")
            elif stem in stems:
                masks[stem] = mask
            elif relative.parent in stems:
                with_several.add(relative.parent)
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
            if annotated and stem not in masks and stem not in with_several:
                faults.append(f"{image}: no mask for it; looked for {truth / folder.name / stem}"
                              f"_mask.* and {stem.name}.*; add it, or move ground_truth away to "
                              f"go without any")
            test.append(Item(image, 1, folder.name, masks.get(stem)))
        faults += unpaired
    faults += [f"{mask}: a mask without its image" for folder in visible(truth)
               if not is_good(folder.name) and not (path / "test" / folder.name).is_dir()
               for mask in find_masks(folder)]
    standard = {"train", "test", "ground_truth"}
    others = [p.name for p in visible(path) if p.is_dir() and p.name not in standard
              and (find_masks(p) or search(p)[1])]
    if others:
        notes.append(f"{path}: not read: {', '.join(others)}; images are taken from train/good and "
                     f"test, masks from ground_truth")
    notes += filter(None, (unread_files(folder, read) for folder, read in
                           ((train_folder, train), (path / "test", [item.path for item in test]))))
    return Category(data, name, path, train, test, annotated, list(dict.fromkeys(faults)), notes)


def read_visa(data: str, name: str, path: Path) -> Category:
    """A category of VisA as published, with the train / test split of split_csv/1cls.csv."""
    table = path.parent / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise InputError(f"{table} is missing: VisA's official split is part of its archive")
    train, test, faults = [], [], []
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
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


def describe_copies(category: Category) -> list[str]:
    """A line on the test images that have the same content as a training image, if there are any.

    Only files of the same size are read.
    """
    same_size: dict[int, list[Path]] = {}
    for path in category.train:
        same_size.setdefault(path.stat().st_size, []).append(path)

    @functools.cache
    def digest(path: Path) -> bytes:
        return hashlib.sha1(path.read_bytes()).digest()

    copies = [(item.path, path) for item in category.test
              for path in same_size.get(item.path.stat().st_size, [])
              if digest(item.path) == digest(path)]
    n_copies = len({path for path, _ in copies})
    return [f"{n_copies} test images are training images, too, so the scores are too good: "
            f"{copies[0][0]} is {copies[0][1]}" + " ..." * (n_copies > 1)] if copies else []


def is_texture(data: str, name: str) -> bool:
    """Whether a category is one of MVTec AD's five textures or zipper, for which the authors' code
    uses no foreground masks."""
    return data == "mvtec" and name in TEXTURES


def clean_data(data: str) -> str:
    """--data as it is kept: parts/, ./parts and parts are one run, and ./demo is no data set."""
    is_path = os.path.dirname(data) or data.startswith((".", "~"))
    data = os.path.normpath(os.path.expanduser(data))
    return os.path.join(".", data) if is_path and data in FOLDERS else data


def root_folder(folder: str = "") -> Path:
    """The data root: `folder`, or the environment variable TRANSFUSION_DATA, or ./data."""
    return Path(folder or os.environ.get("TRANSFUSION_DATA", "data")).expanduser()
