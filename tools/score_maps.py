"""Anomaly maps of any method, scored as a run's are: same test images, same grid, same metrics.

    python tools/score_maps.py maps/patchcore --data mvtec --category bottle
    python tools/score_maps.py maps/patchcore --run runs/mvtec/bottle         with that run's crop
    python tools/score_maps.py maps/ours --run runs/mvtec/bottle --export     the run's own maps

A map is a float TIFF or .npy of any size: DIR/CATEGORY/test/DEFECT/NNN.tiff for the image
test/DEFECT/NNN.png. The metrics are metrics.py's; tools/anomalib_maps.py writes such maps.
"""
import argparse
import csv
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

import metrics
from data import SCORING_GRID, load_mask, name_in, refuse_other_data, scoring_side
from evaluate import final_maps, image_scores
from runs import saved_settings
from support.console import InputError, exit_status, progress_bar
from support.files import (float_array, locked_folder, make_folder, read_json, save_atomically,
                           save_csv, save_json)
from support.layouts import (FOLDERS, Category, clean_data, find_category, find_files, root_folder,
                             unread_files)
from support.report import print_table

SUFFIXES = (".tiff", ".tif", ".npy")
RECORD = "maps.json"            # beside the maps: who made them, and which part of the image they show
COLUMNS = ("data", "category", "method", "image_auroc", "aupro", "pixel_auroc", "pixel_ap",
           "image_ap", "image_f1max", "images", "map_size", "map_side", "scored_side",
           "image_score", "trained_on", "training_images", "pre_trained", "seconds_train",
           "seconds_per_image", "package", "hardware")


# ---------------------------------------------------------------- one map

def read_map(path: Path) -> np.ndarray:
    """The map of a file, float32 [H, W].

    Raises InputError for whole numbers, colours, several pages, no pixels, and values that are not
    finite.
    """
    M = read_npy(path) if path.suffix.lower() == ".npy" else read_tiff(path)
    if 0 in M.shape:
        raise InputError(f"{path}: a map of size {' x '.join(map(str, M.shape))}; write it again")
    with np.errstate(over="ignore"):                   # float64 beyond float32 becomes infinite
        M = np.ascontiguousarray(M, np.float32)
    if not np.isfinite(M).all():
        raise InputError(f"{path}: {(~np.isfinite(M)).sum()} of its values are not finite; a map "
                         f"needs a number at every pixel")
    return M


def read_npy(path: Path) -> np.ndarray:
    """The array [H, W] of a .npy file, of any float type; axes of length 1 around it are left out.
    """
    try:
        M = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as an array ({error}); write it again")
    shape = list(M.shape)
    while M.ndim > 2 and M.shape[0] == 1:
        M = M[0]
    if M.ndim == 3 and M.shape[2] == 1:
        M = M[..., 0]
    if M.dtype.kind != "f" or M.ndim != 2:
        raise InputError(f"{path}: an array {shape} of {M.dtype}; a map is [H, W] of float32")
    return M


def read_tiff(path: Path) -> np.ndarray:
    """The array [H, W] of a TIFF of floats."""
    try:
        with Image.open(path) as image:
            mode, pages = image.mode, getattr(image, "n_frames", 1)
            M = np.array(image) if mode == "F" and pages == 1 else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a float32 TIFF ({error}); of float64 and "
                         f"float16 only .npy is read: np.save(path, M)")
    if M is None:
        kind = f"{pages} pages" if pages > 1 else \
            {"L": "8-bit grey", "1": "1-bit", "P": "a palette"}.get(mode, f"Pillow mode {mode}")
        raise InputError(f"{path}: {kind}; a map is one page of float32")
    return M


def to_grid(M: np.ndarray, map_side: int, side: int) -> np.ndarray:
    """A map [H, W] of the image's centre, of `map_side` of the grid's 256 pixels, on the scoring
    grid's centre [side, side]: bilinear, as `evaluate.final_maps` does it."""
    grid = F.interpolate(torch.from_numpy(M)[None, None], (map_side, map_side), mode="bilinear")
    edge = (map_side - side) // 2
    return grid[0, 0, edge:edge + side, edge:edge + side].numpy()


def peak(M: np.ndarray, map_side: int, side: int) -> float:
    """The largest value of a map within the part of the image that is scored (Eq. 11)."""
    H, W = M.shape
    edge = (map_side - side) / 2 / map_side
    top, left = min(round(edge * H), (H - 1) // 2), min(round(edge * W), (W - 1) // 2)
    return float(M[top:H - top, left:W - left].max())


# ---------------------------------------------------------------- the maps of a category

def image_names(category: Category) -> list[list[str]]:
    """The names that each test image's map may have, without the map's suffix, the usual one first:
    DEFECT/NNN, DEFECT/NNN.png. A name that stands for two images is left out."""
    names, tests = [], category.root / "test"
    for item in category.test:
        path = item.path
        places = [path.relative_to(tests)] if path.is_relative_to(tests) else \
            [Path(item.defect) / path.name, Path(path.parent.name) / path.name]  # VisA as published
        names.append([name.as_posix() for place in places
                      for name in (place.with_suffix(""), place)])
    count = Counter(name for each in names for name in set(each))
    return [[name for name in each if count[name] == 1] for each in names]


def image_index(category: Category) -> dict[str, int]:
    """The number of the test image that a name stands for; see `image_names`."""
    return {name: k for k, each in enumerate(image_names(category)) for name in each}


def find_maps_folder(folder: Path, category: Category) -> Path:
    """The folder of DEFECT/NNN.tiff. Raises InputError where there is none for this category."""
    defects = {name.split("/")[0] for name in image_index(category)}
    candidates = [folder / category.name / "test", folder / category.name, folder / "test", folder]
    for path in candidates:
        if any((path / defect).is_dir() for defect in defects):
            return path
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    others = sorted(path.parent.name for path in folder.glob("*/test") if path.is_dir())
    hint = f"there are maps of {', '.join(others)}" if others else \
        f"looked for {candidates[0] / sorted(defects)[0]}/*.tiff and the same without test or " \
        f"{category.name}"
    raise InputError(f"{folder}: no maps of {category.name}; {hint}")


def match_maps(folder: Path, category: Category) -> list[Path]:
    """The map of each test image. folder: of DEFECT/NNN.tiff.

    Warns of maps without an image. Raises InputError for two maps of one image, and for images
    without a map.
    """
    images, of_image, unused = image_index(category), {}, []
    files = [path for path in find_files(folder) if path.suffix.lower() in SUFFIXES]
    for path in files:
        k = images.get(path.relative_to(folder).with_suffix("").as_posix())
        if k is None:
            unused.append(path)
        elif k in of_image:
            raise InputError(f"{path}: a second map of one image, beside {of_image[k]}; keep one")
        else:
            of_image[k] = path
    rest = f"{len(unused)} maps belong to no test image of {category.name}, the first " \
           f"{unused[0]}" if unused else ""
    missing = [item.path for k, item in enumerate(category.test) if k not in of_image]
    if missing:
        hint = rest or unread_files(folder, files) or "write the missing ones"
        raise InputError(f"{folder}: {len(missing)} of {len(category.test)} test images of "
                         f"{category.name} have no map, the first "
                         f"{name_in(category, missing[0])}; {hint}")
    if unused:
        warnings.warn(f"not used: {rest}")
    return [of_image[k] for k in range(len(category.test))]


@dataclass(frozen=True)
class Maps:
    """The maps of a category's test images.

    on_grid: on the scoring grid, float32 [N, side, side]; peaks: the largest value of each map at
    its own size, float32 [N]; size: height and width, None if they differ from map to map.
    """
    on_grid: np.ndarray
    peaks: np.ndarray
    size: tuple[int, int] | None


def load_maps(paths: list[Path], map_side: int = SCORING_GRID, side: int = SCORING_GRID,
              memory_gb: float = 4.0) -> Maps:
    """Read these maps. map_side: of the 256 pixels of the image's side, how many the maps show,
    around the centre; side: how many are scored. Raises InputError, see `read_map`."""
    on_grid, peaks = float_array((len(paths), side, side), memory_gb), []
    sizes = set()
    for k, path in enumerate(progress_bar(paths, desc="maps", unit="map", leave=False)):
        M = read_map(path)
        on_grid[k], sizes = to_grid(M, map_side, side), sizes | {M.shape}
        peaks.append(peak(M, map_side, side))
    if on_grid.max() == on_grid.min():
        warnings.warn(f"every map has the value {on_grid.max():g} everywhere: the scores below "
                      f"mean nothing")
    return Maps(on_grid, np.array(peaks, np.float32), sizes.pop() if len(sizes) == 1 else None)


def read_scores(path: Path, category: Category) -> np.ndarray:
    """Image scores [N] of a CSV with the columns file and score; further columns are ignored.

    file: an image's path; the part behind the last "test" counts. Raises InputError.
    """
    images = image_index(category)
    images |= {name_in(category, item.path): k for k, item in enumerate(category.test)}
    scores = np.full(len(category.test), np.nan)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                place = Path(row["file"].replace("\\", "/"))
                parts = place.parts
                if "test" in parts:
                    parts = parts[len(parts) - parts[::-1].index("test"):]
                text = "/".join(parts)
                k = images.get(text, images.get(text.rpartition(".")[0], images.get(str(place))))
                if k is None:
                    continue
                if not np.isnan(scores[k]):
                    raise InputError(f"{path}: two scores of {row['file']}; keep one")
                scores[k] = float(row["score"])
                if not np.isfinite(scores[k]):
                    raise InputError(f"{path}: the score of {row['file']} is {row['score']}")
    except (OSError, KeyError, TypeError, AttributeError, csv.Error, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a table with the columns file and score ({error!r})")
    missing = np.flatnonzero(np.isnan(scores))
    if len(missing):
        raise InputError(f"{path}: {len(missing)} of {len(scores)} test images of {category.name} "
                         f"have no score, the first "
                         f"{name_in(category, category.test[missing[0]].path)}")
    return scores


# ---------------------------------------------------------------- a run's own maps

def find_run_category(run: Path, data: str = "", root: str = "") -> tuple[Category, int]:
    """The category of a run, and the side of what it scores on the grid.

    data, root: where its images lie now, if they have moved. Raises InputError.
    """
    s = saved_settings(run)
    if not s:
        raise InputError(f"{run}: not a run folder, it has no config.json")
    if data:
        s = replace(s, data=clean_data(data))
    elif s.data not in FOLDERS and not Path(s.data).is_dir():     # a path from another folder
        s = replace(s, data=str(Path(read_json(run / "data.json")["root"]).parent))
    category = find_category(s.data, s.category, root_folder(root or s.root))
    refuse_other_data(run, category)
    return category, scoring_side(s)


def export_maps(run: Path, category: Category, folder: Path) -> None:
    """Write a run's final maps (Eq. 10) at the model's size, and its image scores, into
    folder/CATEGORY. Raises InputError where the run's maps are not those of the category."""
    s = saved_settings(run)
    if not (run / "maps.npz").exists():
        raise InputError(f"{run} holds no maps.npz; python evaluate.py {run} writes it")
    with np.load(run / "maps.npz") as file:
        M_final = final_maps({name: file[name] for name in file.files}, s)
    if len(M_final) != len(category.test):
        raise InputError(f"{run}/maps.npz: {len(M_final)} maps for {len(category.test)} test "
                         f"images; python evaluate.py {run} writes them anew")
    write_maps(folder / category.name, category, M_final, image_scores(M_final),
               {"method": s.method, "map_side": scoring_side(s)})


def write_maps(folder: Path, category: Category, maps, scores, record: dict) -> None:
    """Write maps as folder/test/DEFECT/NNN.tiff, scores.csv and the record beside them.

    maps: float32 [H, W] of each test image, an array or an iterator; scores: one each. Raises
    InputError where the folder holds a run.
    """
    if (folder / "config.json").exists():
        raise InputError(f"{folder}: holds a training's results; choose another folder")
    with locked_folder(folder):
        rows = []
        for item, names, M, score in zip(category.test, image_names(category), maps, scores):
            path = folder / "test" / f"{names[0]}.tiff"
            make_folder(path.parent)
            save_atomically(path, lambda file: Image.fromarray(np.asarray(M, np.float32)).save(
                file, format="TIFF"))
            rows.append({"file": name_in(category, item.path), "label": item.label,
                         "score": f"{score:.9g}"})
        save_csv(folder / "scores.csv", rows)
        save_json(folder / RECORD, record)


# ---------------------------------------------------------------- the command

def score_folder(folder: Path, category: Category, scores: Path | None = None, method: str = "",
                 side: int = 0, map_side: int = 0) -> tuple[Path, dict]:
    """Score the maps of a category: the folder of its files, and a row like metrics.json's.

    scores: a CSV of image scores, in place of the maps' largest values. method: its name (default:
    the record's, or the folder's name). side, map_side: see `load_maps`; 0 stands for the record's
    or the whole image. Raises InputError.
    """
    if not category.test:
        raise InputError(f"{category.root}: no test images to score")
    tests = find_maps_folder(folder, category)
    home = tests.parent if tests.name == "test" else tests
    if (home / "config.json").exists():
        raise InputError(f"{home}: holds a training's results; move the maps to another folder")
    record = read_json(home / RECORD) if (home / RECORD).exists() else {}
    map_side = map_side or record.get("map_side", SCORING_GRID)
    side = side or map_side
    if side > map_side:
        raise InputError(f"--crop {side}: the maps show the centre {map_side} of {SCORING_GRID} "
                         f"pixels only; give --crop {map_side} or less")
    maps = load_maps(match_maps(tests, category), map_side, side)
    masks = None
    if category.annotated:
        masks = np.stack([load_mask(item, SCORING_GRID, side) for item in category.test])
    values = read_scores(scores, category) if scores else maps.peaks
    size = "various" if maps.size is None else f"{maps.size[0]} x {maps.size[1]}"
    row = {**metrics.evaluate(category.labels, values, maps.on_grid, masks),
           "data": category.data, "category": category.name, "images": len(values),
           **record, "method": method or record.get("method") or folder.resolve().name,
           "map_size": size, "map_side": map_side, "scored_side": side,
           "image_score": scores.name if scores else "largest value of the map"}
    return home, row


def add_row(path: Path, row: dict) -> None:
    """Add a row to a table of methods, or replace that of the same data, category and method."""
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and set(rows[0]) != set(COLUMNS):
            raise InputError(f"--out {path}: has other columns than these rows; give another file")
    text = {key: f"{value:.6f}" if isinstance(value, float) else "" if value is None else
            str(value) for key, value in ((key, row.get(key)) for key in COLUMNS)}
    key = [text[name] for name in COLUMNS[:3]]
    rows = [other for other in rows if [other[name] for name in COLUMNS[:3]] != key] + [text]
    make_folder(path.parent)
    save_csv(path, rows, COLUMNS)


def side_flag(text: str) -> int:
    """A side on the scoring grid, from the command line."""
    value = int(text)
    if not 16 <= value <= SCORING_GRID:
        raise argparse.ArgumentTypeError(f"{value} is not in 16..{SCORING_GRID}")
    return value


def command_line() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        description="Score anomaly maps of any method with this repository's metrics.")
    parser.add_argument("maps", metavar="DIR", help="folder of the maps, CATEGORY/test/DEFECT/"
                        "NNN.tiff (or .npy) in it; CATEGORY and test may be left out")
    parser.add_argument("--data", help="mvtec, visa, btad, demo, or a folder of categories")
    parser.add_argument("--category", help="the category")
    parser.add_argument("--root", default="", help="folder of the data sets (default: "
                        "$TRANSFUSION_DATA or ./data)")
    parser.add_argument("--run", metavar="RUN", help="take data, category and crop from this run")
    parser.add_argument("--export", action="store_true", help="first write the maps of --run, at "
                        "the model's size, and its scores to DIR")
    parser.add_argument("--scores", metavar="FILE", help="CSV with the columns file, score: the "
                        "image scores (default: the largest value of each map)")
    parser.add_argument("--crop", type=side_flag, metavar="N", default=0, help="score the centre N "
                        "of 256 pixels, 224 for the paper preset (default: all that the maps show)")
    parser.add_argument("--map-crop", type=side_flag, metavar="N", default=0, help="the maps show "
                        "only the centre N of 256 pixels of the image (default: all of it)")
    parser.add_argument("--method", default="", help="the method's name in the table (default: "
                        "that of the record beside the maps, or of DIR)")
    parser.add_argument("--out", metavar="FILE", help="CSV table to which the row is added")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags = command_line().parse_args(argv)
    folder = Path(flags.maps).expanduser()
    if flags.run:
        if flags.category:
            raise InputError("--category: the run's is taken; leave it or --run out")
        run = Path(flags.run).expanduser()
        category, side = find_run_category(run, flags.data or "", flags.root)
        if flags.export:
            export_maps(run, category, folder)
    elif flags.data and flags.category and not flags.export:
        category, side = find_category(clean_data(flags.data), flags.category,
                                       root_folder(flags.root)), 0
    else:
        raise InputError("--export needs --run RUN" if flags.export else
                         "give --data and --category, or --run RUN")
    scores = Path(flags.scores).expanduser() if flags.scores else None
    home, row = score_folder(folder, category, scores, flags.method, flags.crop or side,
                             flags.map_crop)
    save_json(home / "metrics.json", row)
    if flags.out:
        add_row(Path(flags.out).expanduser(), row)
    print(f"{row['method']}: {row['images']} maps of {row['map_size']} pixels, scored on "
          f"{row['scored_side']} x {row['scored_side']}; image score: {row['image_score']}")
    print_table([row])
    if not scores and (home / "scores.csv").exists():
        print(f"note: {home / 'scores.csv'} is there; --scores takes the image scores from it")
    print(f"\nthe row is in {home / 'metrics.json'}" + (f" and {flags.out}" if flags.out else ""))


if __name__ == "__main__":
    sys.exit(main())
