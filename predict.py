"""Inspect images with a trained model: heat maps, restored images, scores, verdicts and regions.

    python predict.py runs/mvtec/cable photos/ --out found/

    model = predict.load("runs/mvtec/cable")           # the same from Python
    result = model.inspect("photo.png")
    result.score, result.verdict, result.heat_map(), result.regions

train.py trains the model, and evaluate.py computes the scores that set its threshold.
"""
import argparse
import contextlib
import csv
import dataclasses
import errno
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

HERE = Path(__file__).resolve().parent


@contextlib.contextmanager
def own_modules():
    """Import this folder's modules although the calling program may have a settings.py of its own.

    At the end the caller's modules are found under their names again.
    """
    names = {*(path.stem for path in HERE.glob("*.py")), "baselines", "support"}
    path = list(sys.path)

    def is_foreign(file: str | None) -> bool:
        return file is None or HERE not in Path(file).resolve().parents

    def loaded(name: str) -> list[str]:
        return [module for module in sys.modules if module.split(".")[0] == name]

    callers = {module: sys.modules.pop(module) for name in names for module in loaded(name)
               if is_foreign(getattr(sys.modules[module], "__file__", None))}
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in names:
            spec = PathFinder.find_spec(name, path)
            if spec and spec.origin and is_foreign(spec.origin):
                for module in loaded(name):
                    del sys.modules[module]
        sys.modules.update(callers)


with own_modules():
    from data import Images, Textures, foreground_masks, preprocess, scale, unscale
    from evaluate import (draw_restorations, final_maps, image_scores, network_calls, scores_of,
                          synthetic_defects)
    from metrics import MANY_PASSES, CalibrationScores, describe_threshold, odd_ones, threshold
    from runs import load_checkpoint, load_model
    from settings import Settings, check, names_of, with_all_steps
    from support.console import InputError, StopRequest, exit_status, progress_bar
    from support.devices import pick_device
    from support.files import (GrowingTable, locked_folder, make_folder, save_atomically,
                               save_float_tiff)
    from support.images import decode, open_image, to_rgb, warn_of_lost_levels
    from support.layouts import (PICTURES, Category, find_files, find_images, matching_paths,
                                 root_folder, unread_files)
    from support.onnx_file import load_onnx
    from support.page import HighestScores, PageRow, web_page
    from support.pictures import over_grey
    from support.report import print_odd_photos
    from support.weights import keep_in_bfloat16, load_torch
    from transfusion import Method

SCORE_COLUMNS = ("file", "score", "threshold", "verdict")
REGION_COLUMNS = ("file", "x", "y", "width", "height", "area", "peak")
PART_COLUMNS = ("part", "score", "threshold", "verdict", "photos", "file")
TABLES = ("scores.csv", "regions.csv", "parts.csv")
MAX_PICTURE_SIDE = 2048                 # the longest side of a picture, in pixels
ACCEPTED_INPUTS = ("a path, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] (RGB) or "
                   "[H, W, 4] of uint8 or uint16, or a list of these")


# ---------------------------------------------------------------- from Python

@dataclass(frozen=True, repr=False)
class Inspection:
    """The result for one image.

    score: Eq. 11. verdict: "defective", "normal", or "" for a model without a threshold. M_final:
    Eq. 10, float32 [H, W], NaN outside the centre crop. image, restored: uint8 [H, W, 3]; outside
    the crop, `restored` is the image itself. H x W is the size of the image, scaled down if a side
    exceeds MAX_PICTURE_SIDE pixels. size: the original width and height in pixels. model_map: Eq.
    10 at the model's size, float32 [crop, crop]. edge: the share of a side that the centre crop
    cuts off at each end.
    """
    image: np.ndarray
    size: tuple[int, int]
    score: float
    M_final: np.ndarray
    restored: np.ndarray
    threshold: float | None
    model_map: np.ndarray
    edge: float

    def __repr__(self) -> str:
        return (f"Inspection(score {self.score:.4f}, {self.verdict or 'no verdict'}, "
                f"{len(self.regions)} regions)")

    @property
    def verdict(self) -> str:
        if self.threshold is None:
            return ""
        return "defective" if self.score > self.threshold else "normal"

    def heat_map(self) -> Image.Image:
        """The anomaly map over the grey image, in colours from 0 to twice the threshold. The area
        outside the centre crop is hatched."""
        top = max(2 * self.threshold if self.threshold else 0.5, 1e-6)
        shown = over_grey(self.image, np.nan_to_num(self.M_final), top)
        rows, columns = np.indices(self.M_final.shape)
        hatched = np.isnan(self.M_final) & ((rows + columns) // 4 % 2 == 0)
        shown[hatched] = 0.5 * shown[hatched] + 64
        return Image.fromarray(shown.round().astype(np.uint8))

    def save_map(self, path: Path) -> None:
        """Write the anomaly map at the image's own size, float32 TIFF, 0 outside the centre crop.

        A few rows are made at a time, whatever the size. Raises InputError.
        """
        W, H = self.size
        (first, last), (left, right) = inner_range(H, self.edge), inner_range(W, self.edge)
        side, model_map = len(self.model_map), Image.fromarray(self.model_map)

        def rows(top: int, bottom: int) -> np.ndarray:
            if self.M_final.shape == (H, W):
                return np.nan_to_num(self.M_final[top:bottom])
            strip = np.zeros((bottom - top, W), np.float32)
            a, b = max(top, first), min(bottom, last)
            if a < b:
                box = (0, (a - first) * side / (last - first), side,
                       (b - first) * side / (last - first))
                strip[a - top:b - top, left:right] = model_map.resize(
                    (right - left, b - a), Image.Resampling.BILINEAR, box)
            return strip

        save_float_tiff(path, W, H, rows)

    @property
    def regions(self) -> list[dict]:
        """The 8-connected regions of the map above the threshold, the highest peak first.

        x, y (left and top of the bounding box), width, height and area are in pixels of the
        original image; peak is the map's maximum in the region. A normal image and a model without
        a threshold give an empty list.
        """
        if self.verdict != "defective":
            return []
        M = np.nan_to_num(self.M_final)
        level = min(self.threshold, 0.999 * M.max())           # resizing lowers a peak slightly
        H, W = self.M_final.shape
        x_scale, y_scale = self.size[0] / W, self.size[1] / H
        labels, _ = ndimage.label(M > level, np.ones((3, 3)))
        regions = []
        for k, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
            inside = labels[rows, columns] == k
            regions.append({"x": round(columns.start * x_scale), "y": round(rows.start * y_scale),
                            "width": round((columns.stop - columns.start) * x_scale),
                            "height": round((rows.stop - rows.start) * y_scale),
                            "area": round(inside.sum() * x_scale * y_scale),
                            "peak": float(self.M_final[rows, columns][inside].max())})
        return sorted(regions, key=lambda region: -region["peak"])


class Inspector:
    """A trained model that inspects images; created by `load`.

    threshold: metrics.Threshold, or None for a model without held-out images. batch: number of
    images that the network restores at a time.
    """

    batch = 8

    def __init__(self, model: Method, s: Settings,
                 calibration: CalibrationScores | None):
        self.model, self.s, self.calibration = model, s, calibration
        self.threshold = threshold(calibration, s.false_alarms) if calibration else None

    def inspect(self, images):
        """The Inspection of an image, or a list of Inspections for a list of images.

        images: a path, a PIL image, or an array of uint8 or uint16: grey [H, W] or [H, W, 1], RGB
        [H, W, 3] or RGBA [H, W, 4], of any size. Raises ValueError for anything else, and for a
        file that is not an image.
        """
        if not isinstance(images, (list, tuple)):
            return self.inspect_batch([images])[0]
        return [inspection for start in range(0, len(images), self.batch)
                for inspection in self.inspect_batch(images[start:start + self.batch])]

    def inspect_batch(self, images) -> list[Inspection]:
        """`inspect` for a list of images that the network restores as one batch."""
        pictures = [as_rgb(image) for image in images]
        arrays = np.stack([preprocess(image, self.s.resize, self.s.crop) for image in pictures])
        x_0, maps = self.restore(torch.tensor(arrays))
        scores = image_scores(maps).tolist()
        limit = self.threshold and self.threshold.value
        edge = (self.s.resize - self.s.crop) / 2 / self.s.resize
        return [Inspection(displayed, image.size, score, *uncrop(displayed, M, x_0, edge), limit, M,
                           edge)
                for image, displayed, score, M, x_0 in
                zip(pictures, map(as_shown, pictures), scores, maps, x_0)]

    def restore(self, images: Tensor) -> tuple[Tensor, np.ndarray]:
        """x_0 [B, 3, crop, crop] and M_final [B, crop, crop] of uint8 images [B, 3, crop, crop]."""
        x = scale(images.to(next(self.model.parameters()).device))
        restored = self.model.restore(x, self.s.infer_steps)
        return restored.x_0.cpu(), final_maps({name: getattr(restored, name)[:, 0].cpu().numpy()
                                               for name in ("M_disc", "M_recon", "M_last")}, self.s)

    @property
    def calls(self) -> int:
        """The network calls of an image."""
        return network_calls(self.model, self.s)


class OnnxInspector(Inspector):
    """An Inspector whose model is an ONNX file of tools/export.py. Raises InputError for other
    metadata, and for changes of scoring settings that such a file does not allow."""

    def __init__(self, path: Path, device: str, changes: dict):
        data, run = load_onnx(path, device)
        try:
            scores = json.loads(data["calibration"])
            s = Settings(resize=int(data["resize"]), crop=int(data["crop"]),
                         infer_steps=int(data["infer_steps"]),
                         false_alarms=float(data["false_alarms"]))
            scores = scores and CalibrationScores(**scores)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path} holds other metadata than tools/export.py writes ({error}); "
                             f"export the run again")
        fixed = [name for name, value in changes.items()
                 if name != "false_alarms" and value != getattr(s, name)]
        if fixed:
            raise InputError(f"{', '.join(fixed)}: fixed in {path}; export the run with another")
        s = dataclasses.replace(s, **changes)
        check(s)
        super().__init__(run, s, scores)

    def restore(self, images: Tensor) -> tuple[Tensor, np.ndarray]:
        outputs = self.model(images.permute(0, 2, 3, 1).contiguous().numpy())
        return scale(torch.tensor(outputs["restored"]).permute(0, 3, 1, 2)), outputs["map"]

    @property
    def calls(self) -> int:
        return self.s.infer_steps


def load(run, device: str = "auto", **changes) -> Inspector:
    """Load the model of a run folder, of a checkpoint file, or of an ONNX file of tools/export.py.

    changes: scoring settings to override, such as `false_alarms=0.01` or `infer_steps=5`. Raises
    ValueError for a file that is not a checkpoint and for invalid settings.
    """
    inspector = load_trained(run, device, **changes)
    if inspector.s.method == "transfusion" and inspector.s.precision == "bf16":
        keep_in_bfloat16(inspector.model.net)
    return inspector


def load_trained(run, device: str = "auto", **changes) -> Inspector:
    """`load`, with the weights as they were trained."""
    path = Path(run).expanduser()
    not_scoring = set(changes) - names_of("scoring")
    if not_scoring:
        raise InputError(f"{', '.join(sorted(not_scoring))}: cannot be changed after training")
    changes = with_all_steps(changes)
    if path.suffix.lower() == ".onnx" and not path.is_dir():
        return OnnxInspector(path, device, changes)
    model, s, state = load_model(path / "last.pt" if path.is_dir() else path, pick_device(device))
    s = dataclasses.replace(s, **changes)
    check(s)
    network_calls(model, s)
    scores = state.get("user_calibration") or state.get("calibration")
    return Inspector(model, s, CalibrationScores(**scores) if scores else None)


def expand_home(name) -> Path:
    """A path whose ~ is the home folder; ~$bolt.png is a file of this name."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def as_rgb(image) -> Image.Image:
    """Convert any image that `inspect` accepts to 8-bit RGB. Raises ValueError for other inputs."""
    if isinstance(image, (str, os.PathLike)):
        return to_rgb(open_image(expand_home(image)))
    if isinstance(image, Image.Image):
        return to_rgb(decode(image, "an image"))
    array = np.asarray(image) if isinstance(image, np.ndarray) else None
    if array is None or array.dtype not in (np.uint8, np.uint16) or 0 in array.shape \
            or not (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        kind = f"an array {list(array.shape)} of {array.dtype}" if array is not None else \
            type(image).__name__
        raise InputError(f"{kind}: not an image; {ACCEPTED_INPUTS}")
    if array.dtype == np.uint16:
        warn_of_lost_levels(array, "an array")
        array = (array / 257).round().astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array).convert("RGB")


def as_shown(image: Image.Image) -> np.ndarray:
    """The image, scaled down if a side exceeds MAX_PICTURE_SIDE pixels, as uint8 [H, W, 3]."""
    ratio = MAX_PICTURE_SIDE / max(image.size)
    if ratio < 1:
        image = image.resize([max(1, round(ratio * side)) for side in image.size],
                             Image.Resampling.BILINEAR, reducing_gap=2)
    return np.array(image)


def inner_range(length: int, edge: float) -> tuple[int, int]:
    """First and last pixel of a side that the centre crop keeps, at least one of them."""
    cut = min(round(edge * length), (length - 1) // 2)
    return cut, length - cut


def uncrop(image: np.ndarray, M_final: np.ndarray, x_0: Tensor,
           edge: float) -> tuple[np.ndarray, np.ndarray]:
    """Undo the centre crop and the resize of M_final [crop, crop] and x_0 [3, crop, crop].

    Returns the map, float32 [H, W], and the restored image, uint8 [H, W, 3], of `image`'s size.
    """
    H, W, _ = image.shape
    (top, bottom), (left, right) = inner_range(H, edge), inner_range(W, edge)
    size = (right - left, bottom - top)
    whole, restored = np.full((H, W), np.nan, np.float32), image.copy()
    whole[top:bottom, left:right] = Image.fromarray(M_final).resize(size, Image.Resampling.BILINEAR)
    pixels = unscale(x_0).round().to(torch.uint8).permute(1, 2, 0).numpy()
    restored[top:bottom, left:right] = Image.fromarray(pixels).resize(size,
                                                                      Image.Resampling.BILINEAR)
    return whole, restored


# ---------------------------------------------------------------- the command

def folder_of(name: str) -> Path:
    """The folder that a name on the command line stands for, or in which its files lie."""
    path = expand_home(name)
    while not path.is_dir():                               # of a file, or of a glob
        path = path.parent
    return path


def find_photos(names: list[str], out: Path) -> tuple[list[Path], list[str]]:
    """Find the image files of `names`: files, folders (searched recursively) and globs.

    Pictures that this command has written are skipped. Returns the files, and notes on other files
    that are not read. Raises InputError for a name without any image.
    """
    @lru_cache(maxsize=None)
    def is_output_folder(folder: Path) -> bool:
        if folder.name in PICTURES and (folder.parent.resolve() == out.resolve()
                                        or (folder.parent / "regions.csv").exists()):
            return True
        return folder.parent != folder and is_output_folder(folder.parent)

    def is_output(path: Path) -> bool:
        return is_output_folder(path.parent)

    photos, notes = [], []
    for name in names:
        path = expand_home(name)
        if path.is_dir():
            files = [p for p in find_images(path) if not is_output(p)]
            outputs = [p for p in find_files(path) if is_output(p)
                       or p.name in (*TABLES, "index.html")]
            notes.append(unread_files(path, files + outputs))
        elif path.exists():
            files = [path]
        else:
            files = [p for p in matching_paths(path) if p.is_file() and not is_output(p)]
        if not files:
            raise InputError(f"{name}: no image there; give image files, folders or globs")
        photos += files
    folders = {folder: folder.resolve() for folder in {p.parent for p in photos}}
    unique = {p.resolve() if p.is_symlink() else folders[p.parent] / p.name:
              Path(os.path.abspath(p)) for p in reversed(photos)}
    return list(reversed(unique.values())), [note for note in notes if note]


def relative_names(files: list[Path], names: list[str]) -> list[str]:
    """Each file's path relative to the folder that all names on the command line lie in.

    So it does not depend on what else is there. On several drives it is relative to the root.
    """
    try:
        base = Path(os.path.commonpath([os.path.abspath(folder_of(name)) for name in names]))
        return [file.relative_to(base).as_posix() for file in files]
    except ValueError:
        return ["/".join(part.strip("/\\:") for part in file.parts) for file in files]


def tiff_paths(files: list[Path], names: list[str]) -> list[str]:
    """Names of the float maps: CATEGORY/test/DEFECT/NNN.tiff for images in such a tree; for other
    images, and where two names would be equal, the relative name plus .tiff."""
    paths = ["/".join((*file.parts[-4:-1], file.stem + ".tiff"))
             if len(file.parts) > 3 and file.parts[-3] == "test" else name + ".tiff"
             for file, name in zip(files, names)]
    count = Counter(paths)
    return [path if count[path] == 1 else name + ".tiff" for path, name in zip(paths, names)]


@exit_status
def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 1 if an image could not be read."""
    flags = parse(argv)
    changes = {k: getattr(flags, k) for k in ("false_alarms", "infer_steps")
               if getattr(flags, k) is not None}
    model = load(flags.run, flags.device, **changes)
    if flags.calibrate:
        model = calibrate(model, Path(flags.run).expanduser(), flags)
    model.batch = flags.batch
    print_threshold(model, flags.run)
    if not flags.images:
        return 0
    out = Path(flags.out).expanduser()
    files, notes = find_photos(flags.images, out)
    for note in notes:
        print(f"note: {note}")
    if (out / "last.pt").exists():
        raise InputError(f"--out {out}: holds a training's results; choose another folder")
    names = relative_names(files, flags.images)
    parts = part_names(names, flags.group) if flags.group else []
    if parts and model.threshold:
        print_part_rate(parts, model.threshold.rate)
    with locked_folder(out):
        remove_old_pictures(out)
        return inspect_files(model, files, names, parts, out, flags)


def part_names(names: list[str], pattern: str) -> list[str]:
    """--group: the part that each photo shows, by the groups of a regular expression.

    The pattern is searched in the photo's name in scores.csv. A photo that it does not match is a
    part of its own. Raises InputError for a pattern that is none, has no group or matches nothing.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--group {pattern}: not a regular expression ({error})")
    if not compiled.groups:
        raise InputError(f"--group {pattern}: has no group; put the part's name in brackets, as in "
                         f"'(.*)_cam[0-9]'")
    matches = [compiled.search(name) for name in names]
    unmatched = [name for name, match in zip(names, matches) if not match]
    if len(unmatched) == len(names):
        raise InputError(f"--group {pattern}: matches no photo's name, such as {names[0]}")
    if unmatched:
        print(f"note: --group matches {len(names) - len(unmatched)} of {len(names)} photos; "
              f"each of the others counts as a part of its own, such as {unmatched[0]}")
    parts = ["-".join(group or "" for group in match.groups()) if match else name
             for name, match in zip(names, matches)]
    counts = Counter(part for part, match in zip(parts, matches) if match)
    views = usual_views(counts)
    incomplete = [part for part, count in counts.items() if count < views]
    if incomplete:
        print(f"warning: {len(incomplete)} of {len(counts)} parts have fewer photos than the usual "
              f"{views}, such as {incomplete[0]}; a defect that only a missing photo shows is not "
              f"found")
    return parts


def usual_views(counts: Counter) -> int:
    """The number of photos that most parts have. counts: of photos, by part."""
    return Counter(counts.values()).most_common(1)[0][0]


def print_part_rate(parts: list[str], rate: float) -> None:
    """Print the false alarm rate of whole parts. parts: of each photo; rate: that of photos."""
    views = usual_views(Counter(parts))
    if views > 1:
        print(f"  these are rates of photos: of good parts with {views} photos each, up to "
              f"{100 * min(1, views * rate):.0f} % are expected to be called defective")


def inspect_files(model: Inspector, files: list[Path], names: list[str], parts: list[str],
                  out: Path, flags) -> int:
    """Inspect the files batch by batch and write the results into a folder, as they come.

    parts: of each file, or empty. The exit status is 1 if a photo could not be read, or a picture
    or a table not be written. Raises KeyboardInterrupt, with page and tables written, where it is
    asked to stop.
    """
    map_names = tiff_paths(files, names)
    limit = model.threshold and model.threshold.value
    scores = GrowingTable(out / "scores.csv", SCORE_COLUMNS)
    regions = GrowingTable(out / "regions.csv", REGION_COLUMNS)
    (out / "parts.csv").unlink(missing_ok=True)
    highest, problems, by_part = HighestScores(), [], {}

    def write_page(note: str = "") -> None:
        page = web_page(highest.rows(), limit, out, len(problems), highest.count,
                        highest.defective, note, part_rows(by_part, limit))
        save_atomically(out / "index.html",
                        lambda file: file.write(page.encode("utf-8", "backslashreplace")))

    write_page(f"unfinished: 0 of {len(files)} photos inspected when this page was written")
    with StopRequest() as stop, progress_bar(total=len(files), unit="image") as bar:
        for start in range(0, len(files), flags.batch):
            batch, pictures = range(start, min(start + flags.batch, len(files))), {}
            for k in batch:
                try:
                    pictures[k] = np.asarray(to_rgb(open_image(files[k])))
                except InputError as error:
                    problems.append(names[k])
                    bar.write(f"error: {error}", file=sys.stderr)
            rows, region_rows = [], []
            for k, result in zip(pictures, model.inspect(list(pictures.values()))):
                rows.append({"file": names[k], "score": f"{result.score:.6g}",
                             "verdict": result.verdict,
                             "threshold": "" if limit is None else f"{limit:.6g}"})
                region_rows += [{"file": names[k], **region, "peak": f"{region['peak']:.6g}"}
                                for region in result.regions]
                drawn = flags.pictures == "all" or (flags.pictures == "defective"
                                                    and result.verdict == "defective")
                try:
                    if drawn:
                        save_pictures(result, out, names[k])
                    if flags.maps == "tiff":
                        path = out / "maps" / map_names[k]
                        make_folder(path.parent)
                        result.save_map(path)
                except InputError as error:
                    if not is_about_one_file(error):
                        raise
                    drawn = False
                    problems.append(names[k])
                    bar.write(f"error: {error}", file=sys.stderr)
                highest.add(PageRow(files[k], names[k], result.score, result.size, result.regions,
                                    drawn), result.verdict == "defective")
                if parts:
                    best, file, count = by_part.get(parts[k], (-math.inf, "", 0))
                    by_part[parts[k]] = (*max((best, file), (result.score, names[k])), count + 1)
            scores.append(rows)
            regions.append(region_rows)
            bar.update(len(batch))
            if stop.asked:
                break
    stopped = highest.count + len(problems) < len(files)
    end = f"unfinished: {highest.count} of {len(files)} photos inspected" if stopped else ""
    tables = [scores, regions]
    if parts:
        tables.append(GrowingTable(out / "parts.csv", PART_COLUMNS))
        tables[-1].append(part_rows(by_part, limit))
    unwritten = [line for table in tables if (line := table.close())]
    for line in unwritten:
        print(f"error: {line}", file=sys.stderr)
    write_page(end)
    if stopped:
        raise KeyboardInterrupt(f"{end}; the results so far are in {out}")
    bad = sum(limit is not None and score > limit for score, *_ in by_part.values())
    written = ["index.html", "scores.csv", "regions.csv",
               *(["heatmaps", "restored"] if flags.pictures != "none" else []),
               *(["maps"] if flags.maps else [])]
    print(f"{highest.count} images inspected"
          + (f", {highest.defective} defective" if model.threshold else ", no verdicts")
          + (f", {len(problems)} could not be read or written" if problems else "")
          + (f"; {len(by_part)} parts, {bad} defective, in parts.csv" if parts else "")
          + f"; {', '.join(written[:-1])} and {written[-1]} are in {out}")
    return 1 if problems or unwritten else 0


def save_pictures(result: Inspection, out: Path, name: str) -> None:
    """The heat map and the restored image of a photo. Raises InputError."""
    for folder, picture in (("heatmaps", result.heat_map()),
                            ("restored", Image.fromarray(result.restored))):
        path = out / folder / f"{name}.png"
        make_folder(path.parent)
        save_atomically(path, lambda file: picture.save(file, format="PNG"))


def is_about_one_file(error: InputError) -> bool:
    """Whether only this file cannot be written, as its name is too long, and others can."""
    return getattr(error.__cause__, "errno", None) == errno.ENAMETOOLONG


def part_rows(by_part: dict, limit: float | None) -> list[dict]:
    """A row for each part, the highest score first: that of its worst photo decides."""
    rows = sorted(by_part.items(), key=lambda item: -item[1][0])
    verdicts = {True: "defective", False: "normal"}
    return [{"part": part, "score": f"{score:.6g}", "threshold":
             "" if limit is None else f"{limit:.6g}",
             "verdict": "" if limit is None else verdicts[score > limit], "photos": count,
             "file": file} for part, (score, file, count) in rows]


def remove_old_pictures(out: Path) -> None:
    """Remove the pictures of an earlier call, which its scores.csv lists."""
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
    """--calibrate: set the threshold of a trained model with photos of good parts, and save it.

    The photos serve as held-out images and replace those of an earlier call. The run's own held-out
    images are counted as training images, because a few photos alone would bound the false alarm
    rate poorly; after MANY_PASSES they are left out. All images are scored with the run's own
    settings, even if flags change them.
    """
    if isinstance(model, OnnxInspector):
        raise InputError(f"--calibrate: {run} keeps its threshold; calibrate the run folder, then "
                         f"export it again with tools/export.py")
    path = run / "last.pt" if run.is_dir() else run
    s, state = load_checkpoint(path)
    files, notes = find_photos(flags.calibrate, Path(flags.out or run).expanduser())
    for note in notes:
        print(f"note: {note}")
    root = root_folder(s.root)
    photos = Images(files, s.resize, s.crop, s.memory_gb * 1e9, "good photos")
    foreground, _ = foreground_masks(photos, Category(s.data, s.category, root, files),
                                     "none" if s.foreground == "none" else "auto")
    indices = range(len(files))
    synthetic, _ = synthetic_defects(photos, indices, foreground, Textures(root, s.crop))
    calls, training = network_calls(model.model, s), []
    run_scores = state.get("calibration")                  # from the training
    passes = state["log"][-1]["epoch"] if state.get("log") else 0
    if run_scores and run_scores["infer_steps"] == calls and passes <= MANY_PASSES:
        training = run_scores["held_out"] + run_scores["training"]
    scores = CalibrationScores(scores_of(model.model, s, photos, indices), training,
                               scores_of(model.model, s, synthetic, range(len(synthetic))), calls)
    with locked_folder(path.parent):
        content = {**load_torch(path), "user_calibration": dataclasses.asdict(scores)}
        save_atomically(path, lambda file: torch.save(content, file))
    old_threshold = "no threshold"
    if model.calibration:
        old_threshold = f"threshold {threshold(model.calibration, s.false_alarms).value:.4f}"
    print(f"{path}: {old_threshold} before, {threshold(scores, s.false_alarms).value:.4f} now")
    needed = math.ceil(1 / s.false_alarms - 1) if s.false_alarms else 0
    if len(files) + len(training) < needed:
        print(f"note: {len(files)} photos and {len(training)} scores of the training cannot "
              f"promise {100 * s.false_alarms:g} % false alarms; {needed} scores can")
    print_odd_photos(path.with_name("odd-calibrate.png"), photos, indices,
                     [(k, score) for k, score in odd_ones(scores) if k < len(files)],
                     lambda file, *rows: draw_restorations(file, model.model, s, *rows))
    return Inspector(model.model, model.s, scores)


def print_threshold(model: Inspector, run: str) -> None:
    """Print the threshold and its expected false alarm rate, or how to set a threshold."""
    if not model.threshold:
        print(f"this model has no threshold: scores only; python predict.py {run} --calibrate "
              f"GOOD_PHOTOS gives it one")
        return
    print(describe_threshold(model.calibration, model.threshold))
    if model.calls != model.calibration.infer_steps:
        print(f"warning: the threshold was set with {model.calibration.infer_steps} network calls "
              f"and not with {model.calls}; scores shift a little", file=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Inspect images with a trained model.")
    parser.add_argument("run", metavar="RUN", help="a run folder, a checkpoint, or an ONNX file")
    parser.add_argument("images", metavar="IMAGES", nargs="*",
                        help="files, folders (searched through) or globs")
    parser.add_argument("--out", help="folder to write to; needed with IMAGES; the results of an "
                        "earlier call there are replaced")
    parser.add_argument("--calibrate", metavar="GOOD_PHOTOS", nargs="+",
                        help="take the run's threshold from these photos of good parts, which no "
                        "training has seen, and keep it")
    parser.add_argument("--maps", choices=("tiff",),
                        help="also write the float maps, in MVTec's evaluation layout where the "
                        "images lie in CATEGORY/test/DEFECT, at each image's own size; 0 where not "
                        "inspected")
    parser.add_argument("--pictures", choices=("none", "defective", "all"), default="all",
                        help="the photos of which heat map and restored image are written "
                        "(default all)")
    parser.add_argument("--group", metavar="PATTERN",
                        help="several photos show one part: a regular expression whose group is "
                        "the part's name, as '(.*)_cam[0-9]'; the highest score decides")
    parser.add_argument("--infer-steps", type=int, metavar="K",
                        help="network calls an image (default: the run's)")
    parser.add_argument("--false-alarms", type=float, metavar="RATE",
                        help="false-alarm rate of the image threshold (default: the run's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; for an "
                        "ONNX file onnxruntime or openvino")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default 8)")
    flags = parser.parse_args(argv)
    if flags.batch < 1:
        raise InputError(f"--batch {flags.batch}: must be at least 1")
    if not flags.images and not flags.calibrate:
        parser.error("give IMAGES to inspect, or --calibrate GOOD_PHOTOS")
    if flags.images and not flags.out:
        parser.error("the following arguments are required: --out")
    if flags.out and not flags.images:
        parser.error("--out is for IMAGES, and there are none: write these before --calibrate")
    if not flags.images and (flags.false_alarms is not None or flags.infer_steps is not None):
        parser.error("--false-alarms and --infer-steps are for IMAGES; --calibrate takes the run's")
    return flags


if __name__ == "__main__":
    sys.exit(main())
