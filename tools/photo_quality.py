"""How scores move where photos change: JPEG quality, resizer, camera shift, noise, light, blur.

    python tools/photo_quality.py runs/demo/fabric runs/demo/blister --csv results/photo_quality.csv

The test photos of a finished run are changed, one property at a time, and scored again. The model
and its threshold stay as they are. A row of the table is a change, with the false alarm rate, the
detection rate and the image AUROC after it. OpenCV's resizers are compared if it is installed.
"""
import argparse
import io
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from sklearn.metrics import roc_auc_score
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

from data import load_run_data, preprocess
from evaluate import calibration_scores, network_calls, scores_of
from metrics import CalibrationScores, threshold
from runs import load_model
from settings import Settings, check
from support.console import InputError, exit_status
from support.devices import pick_device
from support.files import rounded, save_csv
from support.images import open_image, to_rgb
from transfusion import Method

try:
    import cv2
except ImportError:
    cv2 = None


# ---------------------------------------------------------------- changes of a photo
# Each takes an RGB image and returns one.

def jpeg(photo: Image.Image, quality: int) -> Image.Image:
    """Saved as a JPEG with Pillow's default subsampling (4:2:0) and read again."""
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def shift(photo: Image.Image, pixels: int) -> Image.Image:
    """The content moves right and down by a number of pixels; the gap mirrors what is beside it."""
    padded = np.pad(np.asarray(photo), ((pixels, 0), (pixels, 0), (0, 0)), "symmetric")
    return Image.fromarray(padded[:photo.height, :photo.width])


def noise(photo: Image.Image, sigma: float) -> Image.Image:
    """Gaussian noise of `sigma` grey levels, of each channel by itself; the same for all photos."""
    pixels = np.asarray(photo, float)
    pixels = pixels + np.random.default_rng(0).normal(0, sigma, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def light(photo: Image.Image, factor: float) -> Image.Image:
    """Every grey level times a factor; above 255 it is clipped."""
    return photo.point(lambda value: min(255, round(value * factor)))


def blur(photo: Image.Image, sigma: float) -> Image.Image:
    """A Gaussian filter of `sigma` pixels."""
    return photo.filter(ImageFilter.GaussianBlur(sigma))


def resize_with_opencv(photo: Image.Image, interpolation: int, side: int) -> Image.Image:
    return Image.fromarray(cv2.resize(np.asarray(photo), (side, side), interpolation=interpolation))


def at_model_size(change, side: int, photo: Image.Image) -> Image.Image:
    """A change of a photo that the camera already delivers at the model's size."""
    return change(photo.resize((side, side), Image.Resampling.BILINEAR))


def changes_of(side: int) -> list[tuple[str, str, object]]:
    """What is tried: name, value, and a function of an image. side: the model's resize."""
    changes = [("none", "", lambda photo: photo)]
    changes += [("JPEG quality", q, partial(jpeg, quality=q)) for q in (95, 90, 80, 70, 50)]
    if cv2:
        changes += [("resizer", name, partial(resize_with_opencv, interpolation=flag, side=side))
                    for name, flag in (("cv2 INTER_LINEAR", cv2.INTER_LINEAR),
                                       ("cv2 INTER_AREA", cv2.INTER_AREA))]
    changes += [("shift, px", k, partial(shift, pixels=k)) for k in (1, 2, 4, 8)]
    changes += [("noise, grey levels", k, partial(noise, sigma=k)) for k in (1, 2, 4, 8)]
    changes += [("brightness, factor", k, partial(light, factor=k)) for k in (0.9, 0.95, 1.05, 1.1)]
    changes += [("blur, px", k, partial(blur, sigma=k)) for k in (1, 2)]
    changes += [("JPEG quality, photo of the model's size", q,
                 partial(at_model_size, partial(jpeg, quality=q), side)) for q in (95, 80, 50)]
    changes += [("noise, photo of the model's size", k,
                 partial(at_model_size, partial(noise, sigma=k), side)) for k in (2, 8)]
    return changes


# ---------------------------------------------------------------- the table

def changed_photos(paths: list[Path], change, s: Settings) -> Tensor:
    """The photos after a change, as the network gets them: uint8 [N, 3, crop, crop]."""
    return torch.tensor(np.stack([preprocess(change(to_rgb(open_image(path))), s.resize, s.crop)
                                  for path in paths]))


def quality_rows(model: Method, s: Settings, paths: list[Path], labels: np.ndarray,
                 limit: float) -> list[dict]:
    """A row for each change. paths, labels: the test photos; limit: the threshold.

    The changes of good photos' scores are in units of the threshold: 1 takes a score of 0 to it.
    pixels_mean is the mean difference of the network's input, in grey levels.
    """
    rows, good = [], labels == 0
    for name, value, change in changes_of(s.resize):
        photos = changed_photos(paths, change, s)
        scores = np.array(scores_of(model, s, photos, range(len(photos))))
        if not rows:
            unchanged, first = scores, photos.float()
        moved = (scores - unchanged)[good] / limit
        rows.append({"change": name, "value": value,
                     "pixels_mean": (photos.float() - first).abs().mean().item(),
                     "score_change_mean": moved.mean(),
                     "score_change_largest": moved[np.abs(moved).argmax()],
                     "false_alarm_rate": (scores > limit)[good].mean(),
                     "detection_rate": (scores > limit)[~good].mean(),
                     "image_auroc": roc_auc_score(labels, scores)})
        print(", ".join(f"{k} {v}" for k, v in rounded(rows[-1]).items() if v != ""), flush=True)
    return rows


def table(rows: list[dict]) -> list[str]:
    """The page's table: false alarm rate / detection rate / image AUROC in per cent by product."""
    products = list(dict.fromkeys(row["category"] for row in rows))
    cells = {(row["change"], str(row["value"]), row["category"]):
             " / ".join(f"{100 * float(row[k]):.{digits}f}" for k, digits in
                        (("false_alarm_rate", 0), ("detection_rate", 0), ("image_auroc", 1)))
             for row in rows}
    lines = [f"| change | {' | '.join(products)} |", "|---" * (1 + len(products)) + "|"]
    for name, value in dict.fromkeys((name, value) for name, value, _ in cells):
        shown = (cells.get((name, value, product), "-") for product in products)
        lines.append(f"| {f'{name}: {value}' if value else name} | {' | '.join(shown)} |")
    return lines


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Change a run's test photos and score them again.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="finished run folders")
    parser.add_argument("--root", help="folder of the data sets (default: each run's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--infer-steps", type=int, metavar="K",
                        help="network calls per photo, and a threshold that belongs to them "
                             "(default: each run's)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags = command_line().parse_args(argv)
    if not cv2:
        print("OpenCV's resizers are left out: pip install opencv-python-headless adds them")
    rows = []
    for folder in flags.runs:
        model, s, state = load_model(folder / "last.pt", pick_device(flags.device))
        s = replace(s, root=flags.root or s.root, infer_steps=flags.infer_steps or s.infer_steps)
        check(s)
        calls = network_calls(model, s)
        run_data = load_run_data(s, training=False, folder=folder)
        items, labels = run_data.category.test, run_data.category.labels
        if not 0 < labels.sum() < len(labels):
            raise InputError(f"{folder}: the test set needs good and defective photos")
        scores = state.get("calibration") and CalibrationScores(**state["calibration"])
        if not scores or scores.infer_steps != calls:
            scores = calibration_scores(model, s, run_data)
        if not scores:
            raise InputError(f"{folder}: no image was held out, so there is no threshold")
        limit = threshold(scores, s.false_alarms).value
        print(f"{folder}: {len(items)} photos, {calls} network calls each, threshold {limit:.4f}")
        for row in quality_rows(model, s, [item.path for item in items], labels, limit):
            rows.append({"data": s.data, "category": s.category, "preset": s.preset,
                         "seed": s.seed, "infer_steps": calls, "side": s.resize,
                         "good": int((labels == 0).sum()), "defective": int(labels.sum()),
                         "threshold": round(limit, 5), **rounded(row)})
        if flags.csv:
            save_csv(flags.csv, rows)
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
