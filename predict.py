"""A trained model on new images: heat maps, restored images, scores, verdicts and regions.

    python predict.py runs/mvtec/cable photos/ --out found/

    model = predict.load("runs/mvtec/cable")           # the same from Python
    found = model.inspect("photo.png")
    found.score, found.verdict, found.heat_map(), found.regions

Training is train.py's, thresholds evaluate.py's.
"""
import argparse
import csv
import dataclasses
import glob
import html
import math
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

import data
from data import open_image, preprocess, scale, to_rgb
from evaluate import (final_maps, image_scores, in_words, network_calls, normal_scores, over_grey,
                      printable, threshold)
from runs import (Source, add_to_checkpoint, load_checkpoint, load_model, locked, make_folder,
                  save_atomically, save_csv)
from settings import SCORING, InputError, Settings, check, exit_status, pick_device, progress_bar
from transfusion import TransFusion

SCORE_COLUMNS = ("file", "score", "threshold", "verdict")
REGION_COLUMNS = ("file", "x", "y", "width", "height", "area", "peak")
SIDE = 2048                             # the longest side of a picture, in pixels
PICTURES = ("heatmaps", "restored", "maps")
TAKEN = ("a path, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] of "
         "uint8 or uint16, or a list of these")


# ---------------------------------------------------------------- from Python

@dataclass(frozen=True, repr=False)
class Inspection:
    """What the model finds in one image.

    score: Eq. 11. verdict: "defective", "normal", or "" for a model without threshold. M_final:
    Eq. 10, float32 [H, W], NaN where the centre crop leaves the image out. image, restored: uint8
    [H, W, 3]; the restored is the image itself where that is so. H x W is the image's own size, or
    smaller where that has a side over SIDE pixels; size: its own width and height.
    """
    image: np.ndarray
    size: tuple[int, int]
    score: float
    M_final: np.ndarray
    restored: np.ndarray
    threshold: float | None

    def __repr__(self) -> str:
        return (f"Inspection(score {self.score:.4f}, {self.verdict or 'no verdict'}, "
                f"{len(self.regions)} regions)")

    @property
    def verdict(self) -> str:
        if self.threshold is None:
            return ""
        return "defective" if self.score > self.threshold else "normal"

    def heat_map(self) -> Image.Image:
        """The map over the grey image, colours from 0 to twice the threshold; what was not
        inspected is hatched."""
        top = max(2 * self.threshold if self.threshold else 0.5, 1e-6)
        shown = over_grey(self.image, np.nan_to_num(self.M_final), top)
        rows, columns = np.indices(self.M_final.shape)
        hatched = np.isnan(self.M_final) & ((rows + columns) // 4 % 2 == 0)
        shown[hatched] = 0.5 * shown[hatched] + 64
        return Image.fromarray(shown.round().astype(np.uint8))

    @property
    def regions(self) -> list[dict]:
        """Each 8-connected region of the map above the threshold, the highest first.

        x, y: the box's left and top; width, height; area: all in pixels of the image's own size;
        peak: the map's maximum. An empty list for a normal image, and without a threshold.
        """
        if self.verdict != "defective":
            return []
        M = np.nan_to_num(self.M_final)
        level = min(self.threshold, 0.999 * M.max())           # resizing takes a little off a peak
        H, W = self.M_final.shape
        wide, high = self.size[0] / W, self.size[1] / H
        labels, _ = ndimage.label(M > level, np.ones((3, 3)))
        found = []
        for k, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
            inside = labels[rows, columns] == k
            found.append({"x": round(columns.start * wide), "y": round(rows.start * high),
                          "width": round((columns.stop - columns.start) * wide),
                          "height": round((rows.stop - rows.start) * high),
                          "area": round(inside.sum() * wide * high),
                          "peak": float(self.M_final[rows, columns][inside].max())})
        return sorted(found, key=lambda region: -region["peak"])


class Inspector:
    """A trained model that inspects images; `load` makes it.

    threshold: metrics.Threshold, or None for a model without held-out images. batch: images that go
    through the network at a time.
    """

    batch = 8

    def __init__(self, model: TransFusion, s: Settings, normal: dict | None):
        self.model, self.s, self.normal = model, s, normal
        self.threshold = threshold(normal, s) if normal else None

    def inspect(self, images):
        """The Inspection of an image, or the list of those of a list of images.

        images: a path, a PIL image, or an array of uint8 or uint16, grey [H, W], [H, W, 1], RGB or
        RGBA, of any size. Raises ValueError for anything else, and for a file that is no image.
        """
        if not isinstance(images, (list, tuple)):
            return self.inspect_batch([images])[0]
        return [found for start in range(0, len(images), self.batch)
                for found in self.inspect_batch(images[start:start + self.batch])]

    def inspect_batch(self, images) -> list[Inspection]:
        """`inspect` for a list that goes through the network at once."""
        pictures = [as_rgb(image) for image in images]
        ready = np.stack([preprocess(image, self.s.resize, self.s.crop) for image in pictures])
        x = scale(torch.tensor(ready).to(next(self.model.parameters()).device))
        found = self.model.restore(x, self.s.infer_steps)
        maps = final_maps({name: getattr(found, name)[:, 0].cpu().numpy()
                           for name in ("M_disc", "M_recon", "M_last")}, self.s)
        scores = image_scores(maps).tolist()
        level = self.threshold and self.threshold.value
        return [Inspection(shown, image.size, score, *uncrop(shown, M, x_0, self.s), level)
                for image, shown, score, M, x_0 in
                zip(pictures, map(as_shown, pictures), scores, maps, found.x_0.cpu())]


def load(run, device: str = "auto", **changes) -> Inspector:
    """The model of a run folder or a checkpoint, ready to inspect.

    changes: of the run's settings, as `false_alarms=0.01` or `infer_steps=5`. Raises ValueError
    for a file that is no checkpoint or settings that cannot be.
    """
    path = Path(run).expanduser()
    model, s, state = load_model(path / "last.pt" if path.is_dir() else path, pick_device(device))
    unknown = set(changes) - set(SCORING)
    if unknown:
        raise InputError(f"{', '.join(sorted(unknown))}: cannot be changed after training")
    s = dataclasses.replace(s, **changes)
    check(s)
    network_calls(model, s)
    return Inspector(model, s, state.get("calibrated") or state.get("normal"))


def as_rgb(image) -> Image.Image:
    """8-bit RGB of whatever `inspect` takes. Raises ValueError."""
    if isinstance(image, (str, os.PathLike)):
        return to_rgb(open_image(Path(image).expanduser()))
    if isinstance(image, Image.Image):
        return to_rgb(data.decode(image, "an image"))
    array = np.asarray(image) if isinstance(image, np.ndarray) else None
    if array is None or array.dtype not in (np.uint8, np.uint16) or 0 in array.shape \
            or not (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        kind = f"an array {list(array.shape)} of {array.dtype}" if array is not None else \
            type(image).__name__
        raise InputError(f"{kind}: not an image; {TAKEN}")
    if array.dtype == np.uint16:
        if 0 < array.max() < 4096:
            warnings.warn(data.DARK.format("an array"))
        array = (array / 257).round().astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array).convert("RGB")


def as_shown(image: Image.Image) -> np.ndarray:
    """The image at the size of its pictures, uint8 [H, W, 3]."""
    share = SIDE / max(image.size)
    if share < 1:
        image = image.resize([max(1, round(share * side)) for side in image.size],
                             Image.Resampling.BILINEAR, reducing_gap=2)
    return np.array(image)


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


# ---------------------------------------------------------------- the command

def find_images(given: list[str], out: Path) -> tuple[list[Path], list[str]]:
    """The files named, those of folders (searched through) and of globs, and what was passed over
    there. Not the pictures that this command has written. Raises InputError where a name stands for
    none."""
    def written(path: Path) -> bool:
        return any(folder.name in PICTURES and (folder.parent.resolve() == out.resolve()
                                                or (folder.parent / "regions.csv").exists())
                   for folder in path.parents)

    found, notes = [], []
    for name in given:
        path = Path(name).expanduser()
        if path.is_dir():
            some = [p for p in data.find_images(path) if not written(p)]
            ours = [p for p in data.find_files(path) if written(p) or p.name in ("scores.csv",
                    "regions.csv", "index.html")]
            notes += [data.passed_over(path, some + ours), *data.beside(some)]
        elif path.exists():
            some = [path]
        else:
            some = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))
                    if Path(p).is_file() and not written(Path(p))]
        if not some:
            raise InputError(f"{name}: no image there; give image files, folders or globs")
        found += some
    unique = {p.resolve(): Path(os.path.abspath(p)) for p in reversed(found)}
    return list(reversed(unique.values())), [note for note in notes if note]


def names_of(files: list[Path]) -> list[str]:
    """Each file's path below the folder that holds them all; from its drive's root, where they lie
    on several."""
    try:
        common = Path(os.path.commonpath([file.parent for file in files]))
        return [file.relative_to(common).as_posix() for file in files]
    except ValueError:
        return ["/".join(part.strip("/\\:") for part in file.parts) for file in files]


def tiff_places(files: list[Path], names: list[str]) -> list[str]:
    """CATEGORY/test/DEFECT/NNN.tiff for images of such a tree, else, or where two would be one, its
    own name."""
    places = ["/".join((*file.parts[-4:-1], file.stem + ".tiff"))
              if len(file.parts) > 3 and file.parts[-3] == "test" else name + ".tiff"
              for file, name in zip(files, names)]
    count = Counter(places)
    return [place if count[place] == 1 else name + ".tiff" for place, name in zip(places, names)]


@exit_status
def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 where an image could not be read, 2, 130."""
    flags = parse(argv)
    changes = {k: getattr(flags, k) for k in ("false_alarms", "infer_steps")
               if getattr(flags, k) is not None}
    model = load(flags.run, flags.device, **changes)
    if flags.calibrate:
        model = calibrate(model, Path(flags.run).expanduser(), flags)
    model.batch = flags.batch
    say_threshold(model, flags.run)
    if not flags.images:
        return 0
    out = Path(flags.out).expanduser()
    files, notes = find_images(flags.images, out)
    for note in notes:
        print(f"note: {note}")
    if (out / "last.pt").exists():
        raise InputError(f"--out {out}: holds a training's results; choose another folder")
    with locked(out):
        remove_old(out)
        return inspect_files(model, files, out, flags)


def inspect_files(model: Inspector, files: list[Path], out: Path, flags) -> int:
    """Inspect them batch by batch and write what is found. Returns 1 where some cannot be read."""
    names = names_of(files)
    places = tiff_places(files, names)
    scores, found, shown, unread = [], [], [], []
    with progress_bar(total=len(files), unit="image") as bar:
        for start in range(0, len(files), flags.batch):
            batch, pictures = range(start, min(start + flags.batch, len(files))), {}
            for k in batch:
                try:
                    pictures[k] = to_rgb(open_image(files[k]))
                except InputError as error:
                    unread.append(files[k])
                    bar.write(f"error: {error}", file=sys.stderr)
            for k, result in zip(pictures, model.inspect(list(pictures.values()))):
                regions = result.regions
                scores.append({"file": names[k], "score": f"{result.score:.6g}",
                               "verdict": result.verdict, "threshold":
                               "" if result.threshold is None else f"{result.threshold:.6g}"})
                found += [{"file": names[k], **region, "peak": f"{region['peak']:.6g}"}
                          for region in regions]
                shown.append((files[k], names[k], result.score, result.size, regions))
                save_image(out / "heatmaps" / f"{names[k]}.png", result.heat_map())
                save_image(out / "restored" / f"{names[k]}.png", Image.fromarray(result.restored))
                if flags.maps == "tiff":
                    save_image(out / "maps" / places[k],
                               Image.fromarray(np.nan_to_num(result.M_final)))
            save_csv(out / "scores.csv", scores, SCORE_COLUMNS)
            save_csv(out / "regions.csv", found, REGION_COLUMNS)
            bar.update(len(batch))
    threshold = model.threshold and model.threshold.value
    page = web_page(shown, threshold, out, len(unread)).encode("utf-8", "backslashreplace")
    save_atomically(out / "index.html", lambda file: file.write(page))
    defective = sum(row["verdict"] == "defective" for row in scores)
    print(f"{len(scores)} images inspected"
          + (f", {defective} defective" if model.threshold else ", no verdicts")
          + (f", {len(unread)} could not be read" if unread else "")
          + f"; index.html, scores.csv, regions.csv, heatmaps and restored are in {out}")
    return 1 if unread else 0


def remove_old(out: Path) -> None:
    """Remove the pictures that the scores.csv of an earlier call names."""
    try:
        with open(out / "scores.csv", newline="", encoding="utf-8") as file:
            names = [row["file"] for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, csv.Error):
        return
    for name in names:
        for folder in PICTURES[:2]:
            path = out / folder / f"{name}.png"
            if ".." not in Path(name).parts and not Path(name).is_absolute():
                path.unlink(missing_ok=True)


def calibrate(model: Inspector, run: Path, flags) -> Inspector:
    """--calibrate: take the threshold of a trained model from photos of good parts, and keep it.

    They count as held-out images, in place of those of an earlier call. The run's own held-out
    images count with those of the training: a few photos alone would bound the false alarms worse
    than these did. All is scored with the run's own settings, whatever the flags change.
    """
    path = run / "last.pt" if run.is_dir() else run
    s, state = load_checkpoint(path)
    files, notes = find_images(flags.calibrate, Path(flags.out or run).expanduser())
    for note in notes:
        print(f"note: {note}")
    root = data.root_folder(s.root)
    photos = data.Images(files, s.resize, s.crop, s.memory_gb * 1e9, "good photos")
    category = data.Category(s.data, s.category, root, files)
    foreground, _ = data.foreground_masks(photos, category, "none" if s.foreground == "none"
                                          else "auto")
    normal = normal_scores(model.model, s, Source(
        category, photos, np.array([], int), np.arange(len(files)), foreground,
        data.Textures(root, s.crop), [], None, []))
    own = state.get("normal")                              # the training's
    if own and own["infer_steps"] == normal["infer_steps"]:
        normal["trained"] = own["images"] + own.get("trained", [])
    with locked(path.parent):
        add_to_checkpoint(path, calibrated=normal)
    before = f"threshold {threshold(model.normal, s).value:.4f}" if model.normal else "no threshold"
    print(f"{path}: {before} before, {threshold(normal, s).value:.4f} now")
    needed = math.ceil(1 / s.false_alarms - 1) if s.false_alarms else 0
    if len(files) + len(normal["trained"]) < needed:
        print(f"note: {len(files)} photos cannot promise {100 * s.false_alarms:g} % false alarms, "
              f"{needed} can")
    return Inspector(model.model, model.s, normal)


def say_threshold(model: Inspector, run: str) -> None:
    """Print the threshold with what it promises, or how to get one."""
    if not model.threshold:
        print(f"this model has no threshold: scores only; python predict.py {run} --calibrate "
              f"GOOD_PHOTOS gives it one")
        return
    print(in_words(model.normal, model.threshold))
    calls = network_calls(model.model, model.s)
    if calls != model.normal["infer_steps"]:
        print(f"warning: the threshold belongs to {model.normal['infer_steps']} network calls, not "
              f"to {calls}; scores shift a little", file=sys.stderr)


def save_image(path: Path, picture: Image.Image) -> None:
    make_folder(path.parent)
    save_atomically(path, lambda file: picture.save(file, format=path.suffix[1:].upper()))


# ---------------------------------------------------------------- the page

STYLE = """body{font:15px/1.4 sans-serif;margin:2em;color:#222}
figure{display:flex;gap:1em;margin:0 0 1.2em;align-items:flex-start}
.p{position:relative;flex:none;width:260px}
.p img{width:100%;height:auto;display:block;background:#eee}
.b{position:absolute;border:2px solid #0cf;box-sizing:border-box}
hr{border:0;border-top:3px solid #c00;margin:2em 0 .3em}figcaption{overflow-wrap:anywhere}"""


def web_page(shown: list[tuple], threshold: float | None, out: Path, unread: int) -> str:
    """A page of all photos, the highest score first: photo, heat map with the regions' boxes, name.

    shown: file, name, score, (width, height) and regions of each. The pictures are those on disk,
    loaded as one scrolls to them.
    """
    def link(path) -> str:
        return html.escape(quote(os.fsencode(str(path).replace(os.sep, "/"))))

    defective = sum(threshold is not None and row[2] > threshold for row in shown)
    counts = f"{len(shown)} photos" + (
        f", {defective} defective, {len(shown) - defective} normal" if threshold is not None else
        ", no threshold, so no verdicts") + (f", {unread} could not be read" if unread else "")
    parts = [f"<!doctype html><html><head><meta charset='utf-8'><title>{counts}</title><style>"
             f"{STYLE}</style></head><body><h1>{counts}</h1>"]
    drawn = threshold is None
    for file, name, score, (W, H), regions in sorted(shown, key=lambda row: -row[2]):
        if not drawn and score <= threshold:
            parts.append(f"<hr><p>threshold {threshold:.4g}: below it, normal</p>")
            drawn = True
        size = f"loading='lazy' width='{W}' height='{H}'"
        count = f"{len(regions)} region{'s' * (len(regions) != 1)}"
        photo = "" if file.suffix.lower() in (".tif", ".tiff", ".ppm", ".pgm") else \
            f"<div class='p'><img {size} src='{link(relative(file, out))}'></div>"
        boxes = "".join(f"<div class='b' style='left:{100 * r['x'] / W:.2f}%;top:"
                        f"{100 * r['y'] / H:.2f}%;width:{100 * r['width'] / W:.2f}%;height:"
                        f"{100 * r['height'] / H:.2f}%'></div>" for r in regions)
        parts.append(f"<figure>{photo}<div class='p'><img {size} src='heatmaps/{link(name)}.png'>"
                     f"{boxes}</div><figcaption>{html.escape(printable(name))}<br>score "
                     f"{score:.4g}<br>{count}</figcaption></figure>")
    if not drawn:
        parts.append(f"<hr><p>threshold {threshold:.4g}: no photo below it</p>")
    return "\n".join([*parts, "</body></html>\n"])


def relative(file: Path, out: Path) -> str:
    try:
        return os.path.relpath(file, out)
    except ValueError:                                                # on another drive
        return file.as_uri()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Inspect images with a trained model.")
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint")
    parser.add_argument("images", metavar="IMAGES", nargs="*",
                        help="files, folders (searched through) or globs")
    parser.add_argument("--out", help="folder to write to; needed with IMAGES; the pictures of an "
                        "earlier call there are removed")
    parser.add_argument("--calibrate", metavar="GOOD_PHOTOS", nargs="+",
                        help="take the run's threshold from these photos of good parts, which no "
                        "training has seen, and keep it")
    parser.add_argument("--maps", choices=("tiff",),
                        help="also write the float maps, in MVTec's evaluation layout where the "
                        "images lie in CATEGORY/test/DEFECT; 0 where not inspected")
    parser.add_argument("--infer-steps", type=int, metavar="K",
                        help="network calls an image (default: the run's)")
    parser.add_argument("--false-alarms", type=float, metavar="RATE",
                        help="false-alarm rate of the image threshold (default: the run's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default 8)")
    flags = parser.parse_args(argv)
    if flags.batch < 1:
        raise InputError(f"--batch {flags.batch}: must be at least 1")
    if not flags.images and not flags.calibrate:
        parser.error("give IMAGES to inspect, or --calibrate GOOD_PHOTOS")
    if flags.images and not flags.out:
        parser.error("the following arguments are required: --out")
    if not flags.images and (flags.false_alarms is not None or flags.infer_steps is not None):
        parser.error("--false-alarms and --infer-steps are for IMAGES; --calibrate takes the run's")
    return flags


if __name__ == "__main__":
    sys.exit(main())
