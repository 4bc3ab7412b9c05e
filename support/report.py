"""The output at the end of a command: a table of metrics, the picture to open, the next command.
"""
import math
import os
from pathlib import Path
from statistics import fmean

from support.console import printable
from metrics import MANY_PASSES
from support.files import read_json, save_atomically
from support.layouts import FOLDERS
from support.pictures import MAX_ROWS

COLUMNS = {"image_auroc": "image AUROC", "aupro": "AUPRO", "pixel_auroc": "pixel AUROC",
           "pixel_ap": "pixel AP", "false_alarm_rate": "false alarms",
           "detection_rate": "detected"}


def print_table(rows: list[dict]) -> None:
    """Print the metrics of each category and, if there are several, their means, in per cent."""
    def cell(value) -> str:
        return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"

    print("\n" + f"{'%':<14}" + "".join(f"{title:>13}" for title in COLUMNS.values()))
    for row in rows:
        print(f"{row['category']:<14}" + "".join(f"{cell(row.get(k)):>13}" for k in COLUMNS))
    if len(rows) > 1:
        defined = [[row[k] for row in rows if cell(row.get(k)) != "-"] for k in COLUMNS]
        print(f"{'mean of ' + str(len(rows)):<14}"
              + "".join(f"{cell(fmean(values) if values else None):>13}" for values in defined))


def print_next_steps(folders: list[Path], data_root: Path) -> None:
    """Name the folders of finished runs, the picture to open and the next command.

    data_root: the folder of the first run's category.
    """
    first, test = folders[0], data_root / "test"
    print(f"\nresults are in {', '.join(map(str, folders))}")
    for name in ("qualitative.png", "preview.png"):
        if (first / name).exists():
            print(f"open {first / name}: some images, their restorations and anomaly maps")
            break
    for folder in folders:
        if (folder / "odd.png").exists():
            print(f"open {folder / 'odd.png'}: photos of good parts whose scores stand out")
    path = first / "metrics.json"
    results = read_json(path) if path.exists() else {}
    passes = results.get("epoch", 0) if results.get("threshold") else 0
    if passes > MANY_PASSES and results["data"] not in FOLDERS:
        print(f"each photo was trained on {passes} times, so new good photos may score higher: set "
              f"the threshold with 20 of them, python predict.py {first} --calibrate PHOTOS")
    photos = os.path.relpath(test) if test.is_relative_to(Path.cwd()) else test
    print(f"next: python predict.py {first} {photos if test.is_dir() else 'PHOTOS'} --out found/")


def print_threshold_check(results: dict) -> None:
    """Print how the threshold performs on the test set. results: the content of metrics.json."""
    print(f"  at that threshold the test set's F1 is {100 * results['image_f1']:.1f} %; the best "
          f"threshold for this very test set would give {100 * results['image_f1max']:.1f} %")
    print(f"  the test set's defective images against the held-out normal ones: an AUROC of "
          f"{100 * results['image_auroc_held_out']:.1f} %")


def print_odd_photos(path: Path, images, indices, odd: list[tuple[int, float]], draw) -> None:
    """Name the photos of good parts whose scores stand out, and draw them in a PNG.

    images: `data.Images`; indices: those that were scored; odd: positions in `indices` and scores.
    draw: a function of file, images, names and ground truths, as `pictures.draw_rows`. An earlier
    picture is removed.
    """
    path.unlink(missing_ok=True)
    if not odd:
        print(f"  none of the {len(indices)} photos of good parts that were scored stands out")
        return
    these = "this photo: its score stands" if len(odd) == 1 else \
        f"these {len(odd)} photos: their scores stand"
    print(f"  look at {these} out from those of the other good parts; a defective part among the "
          f"good ones, or a rare good one? drawn in {path}")
    for k, score in odd[:MAX_ROWS]:
        print(f"    {printable(str(images.paths[indices[k]]))}: score {score:.4f}")
    if len(odd) > MAX_ROWS:
        print(f"    and {len(odd) - MAX_ROWS} more with lower scores")
    shown = [indices[k] for k, _ in odd[:MAX_ROWS]]
    names = [f"{images.paths[k].stem}\nscore {score:.3f}" for k, (_, score) in zip(shown, odd)]
    save_atomically(path, lambda file: draw(file, images[shown], names, [None] * len(shown)))
