"""A trained model on new images: heat maps, restored images, scores, verdicts and regions.

    python predict.py runs/mvtec/cable photos/ --out found/

`inspect` does the same for images in memory. Training is train.py's, thresholds evaluate.py's.
"""
import argparse
import dataclasses
import glob
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from data import list_images, open_image, preprocess, scale, to_rgb
from evaluate import final_maps, image_scores, in_words, network_calls, over_grey, thresholds
from runs import load_model, make_folder, save_atomically, save_csv
from settings import InputError, Settings, check, exit_status, pick_device, progress_bar
from transfusion import TransFusion

SCORE_COLUMNS = ("file", "score", "threshold", "verdict")
REGION_COLUMNS = ("file", "x", "y", "width", "height", "area", "peak")


class Inspection(NamedTuple):
    """What the model finds in one image of H x W pixels.

    score: Eq. 11; M_final: Eq. 10, float32 [H, W], NaN where the centre crop leaves the image out;
    restored: uint8 [H, W, 3], the image itself there.
    """
    score: float
    M_final: np.ndarray
    restored: np.ndarray


def inspect(model: TransFusion, s: Settings, images: list[np.ndarray],
            infer_steps: int = 0) -> list[Inspection]:
    """Inspect a batch of images, uint8 [H, W, 3] RGB each, of any sizes.

    s: the settings of the run (`load_model` returns them); infer_steps: network calls, 0 for the
    run's. Maps and restorations come back at each image's own size and position.
    """
    device = next(model.parameters()).device
    ready = np.stack([preprocess(Image.fromarray(image), s.resize, s.crop) for image in images])
    x = scale(torch.tensor(ready).to(device))
    found = model.restore(x, infer_steps or s.infer_steps)
    maps = final_maps({name: getattr(found, name)[:, 0].cpu().numpy()
                       for name in ("M_disc", "M_recon", "M_last")}, s)
    scores, x_0 = image_scores(maps).tolist(), found.x_0.cpu()
    return [Inspection(score, *uncrop(image, M, restored, s))
            for image, score, M, restored in zip(images, scores, maps, x_0)]


def uncrop(image: np.ndarray, M_final: np.ndarray, x_0: Tensor,
           s: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Undo the centre crop and the resize of M_final [crop, crop] and x_0 [3, crop, crop].

    Returns the map, float32 [H, W], and the restored image, uint8 [H, W, 3], of `image`'s size.
    """
    H, W, _ = image.shape
    edge = (s.resize - s.crop) / 2 / s.resize
    top, left = round(edge * H), round(edge * W)
    bottom, right = H - top, W - left
    size = (right - left, bottom - top)
    full, restored = np.full((H, W), np.nan, np.float32), image.copy()
    full[top:bottom, left:right] = Image.fromarray(M_final).resize(size, Image.Resampling.BILINEAR)
    pixels = ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    restored[top:bottom, left:right] = Image.fromarray(pixels).resize(size,
                                                                      Image.Resampling.BILINEAR)
    return full, restored


def heat_map(image: np.ndarray, M_final: np.ndarray, top: float) -> Image.Image:
    """The map over the grey image, colours from 0 to `top`; what was not inspected is hatched."""
    shown = over_grey(image, np.nan_to_num(M_final), top)
    rows, columns = np.indices(M_final.shape)
    hatched = np.isnan(M_final) & ((rows + columns) // 4 % 2 == 0)
    shown[hatched] = 0.5 * shown[hatched] + 64
    return Image.fromarray(shown.round().astype(np.uint8))


def regions(file: str, M_final: np.ndarray, threshold: float) -> list[dict]:
    """A row for each 8-connected region of the map above the threshold, the highest first.

    x, y: the box's left and top, in pixels of the image; area in pixels; peak: the map's maximum.
    """
    above = np.nan_to_num(M_final) > threshold
    labels, _ = ndimage.label(above, np.ones((3, 3)))
    rows = []
    for k, (rows_of, columns_of) in enumerate(ndimage.find_objects(labels), 1):
        inside = labels[rows_of, columns_of] == k
        rows.append({"file": file, "x": columns_of.start, "y": rows_of.start,
                     "width": columns_of.stop - columns_of.start,
                     "height": rows_of.stop - rows_of.start, "area": int(inside.sum()),
                     "peak": f"{M_final[rows_of, columns_of][inside].max():.6g}"})
    return sorted(rows, key=lambda row: -float(row["peak"]))


# ---------------------------------------------------------------- the command

def find_images(given: list[str], out: Path) -> list[Path]:
    """The files named, those of folders (searched through) and of globs, but none under `out`,
    where an earlier call may have written. Raises InputError where a name stands for none."""
    found, out = [], Path(os.path.abspath(out))            # without the .. that leads out of it
    for name in given:
        path = Path(name)
        if path.is_dir():
            some = [image for folder in sorted([path, *(p for p in path.rglob("*") if p.is_dir())])
                    for image in list_images(folder)]
        elif path.exists():
            some = [path]
        else:
            some = [Path(p) for p in sorted(glob.glob(name, recursive=True)) if Path(p).is_file()]
        some = [p for p in (Path(os.path.abspath(p)) for p in some) if out not in p.parents]
        if not some:
            raise InputError(f"{name}: no image there; give image files, folders or globs")
        found += some
    return list(dict.fromkeys(found))


def tiff_place(file: Path, name: str) -> str:
    """CATEGORY/test/DEFECT/NNN.tiff for an image of such a tree, else its own name."""
    if len(file.parts) > 3 and file.parts[-3] == "test":
        return "/".join((*file.parts[-4:-1], file.stem + ".tiff"))
    return name + ".tiff"


@exit_status
def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 where an image could not be read, 2, 130."""
    flags = parse(argv)
    run = Path(flags.run)
    device = pick_device(flags.device)
    model, s, state = load_model(run / "last.pt" if run.is_dir() else run, device)
    s = dataclasses.replace(s, **{k: getattr(flags, k) for k in ("false_alarms",
                            "pixel_false_alarms", "infer_steps") if getattr(flags, k) is not None})
    check(s)
    image_threshold, pixel_threshold = say_thresholds(state, s, network_calls(model, s))
    out = Path(flags.out)
    files = find_images(flags.images, out)
    common = Path(os.path.commonpath([file.parent for file in files]))
    make_folder(out)

    top = max(2 * image_threshold if image_threshold else 0.5, 1e-6)    # of the heat maps' colours
    scores, found, unread = [], [], []
    with progress_bar(total=len(files), unit="image") as bar:
        for start in range(0, len(files), flags.batch):
            batch = []
            for file in files[start:start + flags.batch]:
                try:
                    batch.append((file, np.array(to_rgb(open_image(file)))))
                except InputError as error:
                    unread.append(file)
                    bar.write(f"error: {error}", file=sys.stderr)
            done = inspect(model, s, [image for _, image in batch]) if batch else []
            for (file, image), result in zip(batch, done):
                name = file.relative_to(common).as_posix()
                verdict = "" if image_threshold is None else \
                    "defective" if result.score > image_threshold else "normal"
                scores.append({"file": name, "score": f"{result.score:.6g}", "verdict": verdict,
                               "threshold": "" if image_threshold is None
                               else f"{image_threshold:.6g}"})
                if pixel_threshold is not None:
                    found += regions(name, result.M_final, pixel_threshold)
                save_image(out / "heatmaps" / f"{name}.png", heat_map(image, result.M_final, top))
                save_image(out / "restored" / f"{name}.png", Image.fromarray(result.restored))
                if flags.maps == "tiff":
                    save_image(out / "maps" / tiff_place(file, name),
                               Image.fromarray(np.nan_to_num(result.M_final)))
            save_csv(out / "scores.csv", scores, SCORE_COLUMNS)
            save_csv(out / "regions.csv", found, REGION_COLUMNS)
            bar.update(min(flags.batch, len(files) - start))
    defective = sum(row["verdict"] == "defective" for row in scores)
    print(f"{len(scores)} images inspected"
          + (f", {defective} defective" if image_threshold is not None else ", no verdicts")
          + (f", {len(unread)} could not be read" if unread else "")
          + f"; scores.csv, regions.csv, heatmaps and restored are in {out}")
    return 1 if unread else 0


def say_thresholds(state: dict, s: Settings, calls: int) -> tuple[float | None, float | None]:
    """The two thresholds of a checkpoint's content, printed with what they promise; None without
    any."""
    normal = state.get("normal")
    if not normal:
        why = "was trained without held-out images (--hold-out)" if "normal" in state else \
            "is of a run that is not finished (train.py --resume goes on with it)"
        print(f"this model {why}, so there is no threshold: scores only")
        return None, None
    image, pixel = thresholds(normal, s)
    print(in_words(image, len(normal["images"])))
    if calls != normal["infer_steps"]:
        print(f"warning: the threshold belongs to {normal['infer_steps']} network calls, not to "
              f"{calls}; scores shift a little", file=sys.stderr)
    return image.value, pixel.value


def save_image(path: Path, picture: Image.Image) -> None:
    make_folder(path.parent)
    save_atomically(path, lambda file: picture.save(file, format=path.suffix[1:].upper()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Inspect images with a trained model.")
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint")
    parser.add_argument("images", metavar="IMAGES", nargs="+",
                        help="files, folders (searched through) or globs")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--maps", choices=("tiff",),
                        help="also write the float maps, in MVTec's evaluation layout where the "
                        "images lie in CATEGORY/test/DEFECT; 0 where not inspected")
    parser.add_argument("--infer-steps", type=int, metavar="K",
                        help="network calls an image (default: the run's)")
    parser.add_argument("--false-alarms", type=float, metavar="RATE",
                        help="false-alarm rate of the image threshold (default: the run's)")
    parser.add_argument("--pixel-false-alarms", type=float, metavar="RATE",
                        help="share of normal pixels above the pixel threshold")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default 8)")
    flags = parser.parse_args(argv)
    if flags.batch < 1:
        raise InputError(f"--batch {flags.batch}: must be at least 1")
    return flags


if __name__ == "__main__":
    sys.exit(main())
