"""A model on a test set: restorations, maps, scores, thresholds, and the results of a run.

Eq. 10 and 11 are transfusion.py's, the metrics metrics.py's; this is what lies between.
"""
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

import data
import metrics
from runs import (Source, save_atomically, save_csv, save_json, scoring_side,
                  steps_per_epoch)
from settings import InputError, Settings, hardware, progress_bar
from transfusion import TransFusion, anomaly_score, final_mask


# ---------------------------------------------------------------- restorations and maps

def network_calls(model: TransFusion, s: Settings) -> int:
    """How many network calls a restoration makes. Raises InputError if the schedule has fewer."""
    try:
        return len(model.path(s.infer_steps)) - 1
    except ValueError as error:
        raise InputError(f"--infer-steps {s.infer_steps}: {error}")


def restore_all(model: TransFusion, images: data.Images, indices, s: Settings):
    """Restore images[indices] batch by batch: yields each batch's place and its Restoration."""
    device = next(model.parameters()).device
    model.eval()
    with progress_bar(total=len(indices), desc="restoring", unit="image", leave=False) as bar:
        for start in range(0, len(indices), s.eval_batch):
            chosen = indices[start:start + s.eval_batch]
            x = data.scale(images[chosen].to(device))
            yield slice(start, start + len(chosen)), model.restore(x, s.infer_steps)
            bar.update(len(chosen))


def new_maps(shape: tuple[int, ...], s: Settings) -> np.ndarray:
    """An array for maps, float32: in memory, or above the memory limit in an unnamed file."""
    size = 4 * math.prod(shape)
    if size <= s.memory_gb * 1e9:
        return np.empty(shape, np.float32)
    file = tempfile.TemporaryFile()
    try:
        if hasattr(os, "posix_fallocate"):             # a mapped file that finds no room later
            os.posix_fallocate(file.fileno(), 0, size)            # would end the process
    except OSError as error:
        raise InputError(f"no room for {size / 1e9:.1f} GB of maps in {tempfile.gettempdir()} "
                         f"({error}); set TMPDIR to another folder, or raise --memory-gb")
    return np.memmap(file, np.float32, "w+", shape=shape)


def raw_maps(model: TransFusion, images: data.Images, indices,
             s: Settings) -> dict[str, np.ndarray]:
    """Unfiltered M_disc, M_recon and last M of images[indices], float32 [N, H, W], by name."""
    maps = {name: new_maps((len(indices), s.crop, s.crop), s)
            for name in ("M_disc", "M_recon", "M_last")}
    for place, restored in restore_all(model, images, indices, s):
        for name in maps:
            maps[name][place] = getattr(restored, name)[:, 0].cpu().numpy()
    return maps


def final_maps(maps: dict[str, np.ndarray], s: Settings, side: int = 0) -> np.ndarray:
    """M_final [N, H, W] of Eq. 10, or one of its parts alone (Table 4), from raw maps.

    side: bring the maps bilinearly to side x side; 0 leaves them at the model's size.
    """
    lam = {"combined": s.lam, "disc": 1.0, "recon": 0.0, "last": 1.0}[s.final_mask]
    mask = "M_last" if s.final_mask == "last" else "M_disc"
    N, H, W = maps[mask].shape
    final = new_maps((N, side or H, side or W), s)
    for start in range(0, N, 64):
        place = slice(start, start + 64)
        M_disc, M_recon = (torch.tensor(maps[name][place])[:, None]
                           for name in (mask, "M_recon"))
        M_final = final_mask(M_disc, M_recon, lam, s.kernel)
        if side:
            M_final = F.interpolate(M_final, (side, side), mode="bilinear")
        final[place] = M_final[:, 0].numpy()
    return final


def score_maps(maps: dict[str, np.ndarray], labels: np.ndarray, masks: np.ndarray | None,
               s: Settings) -> tuple[dict[str, float], np.ndarray]:
    """Metrics of raw maps, and the image scores [N]. Pixels are compared on the scoring grid."""
    scores = image_scores(final_maps(maps, s))
    return metrics.evaluate(labels, scores, final_maps(maps, s, scoring_side(s)), masks), scores


def image_scores(M_final: np.ndarray) -> np.ndarray:
    """Eq. 11 of maps [N, H, W]: [N]."""
    return anomaly_score(torch.from_numpy(M_final)).numpy()


def score(model: TransFusion, s: Settings, source: Source):
    """Restore and score the test set: metrics, image scores [N], raw maps."""
    maps = raw_maps(model, source.test, range(len(source.test)), s)
    return *score_maps(maps, source.category.labels, source.masks, s), maps


def seconds_per_image(model: TransFusion, s: Settings, images: data.Images) -> float:
    """Time to restore one image alone (Table 5): the median of three after one to warm up."""
    device, times = next(model.parameters()).device, []
    model.eval()
    for k in range(4):
        x = data.scale(images[[k % len(images)]].to(device))
        start = time.perf_counter()
        model.restore(x, s.infer_steps).x_0.cpu()              # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# ---------------------------------------------------------------- thresholds

KEPT = 0.1      # share of the normal pixels' scores kept, the largest; settings.check asks no more


def normal_scores(model: TransFusion, s: Settings, images: data.Images, indices) -> dict | None:
    """Scores of normal images that no training has seen, for thresholds; None without any.

    {"images": [float], "pixels": float32 tensor, the largest KEPT of all pixels' M_final,
    "pixel_count": of how many, "infer_steps": network calls}: plain types, for the checkpoint.
    """
    if len(indices) == 0:
        return None
    M_final = final_maps(raw_maps(model, images, indices, s), s)
    pixels = torch.from_numpy(M_final).flatten()
    return {"images": image_scores(M_final).tolist(), "pixel_count": len(pixels),
            "pixels": pixels.topk(math.ceil(KEPT * len(pixels))).values,
            "infer_steps": network_calls(model, s)}


def thresholds(normal: dict, s: Settings) -> tuple[metrics.Threshold, metrics.Threshold]:
    """The image threshold and the pixel threshold of `normal_scores`, by the same rule."""
    return (metrics.normal_threshold(normal["images"], s.false_alarms),
            metrics.normal_threshold(normal["pixels"].numpy(), s.pixel_false_alarms,
                                     normal["pixel_count"]))


def in_words(image: metrics.Threshold, count: int) -> str:
    """What an image threshold from `count` normal images promises, and how surely."""
    return (f"threshold {image.value:.4f} from {count} held-out normal image"
            f"{'s' if count > 1 else ''}: about {100 * image.rate:.1f} % of normal parts will be "
            f"called defective (with {count} anything from {100 * image.low:.1f} to "
            f"{100 * image.high:.1f} % is plausible)")


def against_normal(normal: dict | None, s: Settings, labels: np.ndarray,
                   scores: np.ndarray) -> dict:
    """The thresholds from the held-out normal images, and what the first does on the test set.

    image_auroc_held_out: the image AUROC with these images in place of the test set's good ones. It
    differs where the good test images differ from the other normal ones, in light say.
    """
    found = dict.fromkeys(("threshold", "pixel_threshold", "false_alarms_promised",
                           "false_alarm_rate", "detection_rate", "image_f1",
                           "image_auroc_held_out"))
    found["threshold_images"] = len(normal["images"]) if normal else 0
    if normal:
        image, pixel = thresholds(normal, s)
        alarms = scores > image.value
        found.update(threshold=image.value, pixel_threshold=pixel.value,
                     false_alarms_promised=image.rate,
                     image_f1=f1_score(labels, alarms, zero_division=math.nan))
        for label, name in ((0, "false_alarm_rate"), (1, "detection_rate")):
            if (labels == label).any():
                found[name] = float(alarms[labels == label].mean())
        defective = scores[labels == 1].tolist()
        if defective:
            found["image_auroc_held_out"] = float(roc_auc_score(
                [0] * len(normal["images"]) + [1] * len(defective), normal["images"] + defective))
    return found


# ---------------------------------------------------------------- the results of a run

def write_results(folder: Path, model: TransFusion, s: Settings, source: Source, progress: dict,
                  normal: dict | None, suffix: str = "") -> dict:
    """Score the model and write metrics[suffix].json; without a suffix the other files too."""
    found, scores, maps = score(model, s, source)
    found.update(against_normal(normal, s, source.category.labels, scores))
    per_epoch = steps_per_epoch(s, source)
    found.update(data=source.category.data, category=s.category, preset=s.preset, seed=s.seed,
                 step=progress["step"], epoch=math.ceil(progress["step"] / per_epoch),
                 seconds_train=round(progress["seconds"], 1),
                 seconds_per_image=seconds_per_image(model, s, source.test),
                 infer_steps=network_calls(model, s), precision=s.precision,
                 device=s.device, hardware=hardware(s.device), torch=torch.__version__)
    if not suffix:
        save_csv(folder / "scores.csv",
                 [{"file": item.path.relative_to(source.category.root).as_posix(),
                   "label": item.label, "score": f"{value:.9g}"}
                  for item, value in zip(source.category.test, scores)])
        save_atomically(folder / "maps.npz", lambda file: np.savez_compressed(file, **maps))
    save_json(folder / f"metrics{suffix}.json", found)
    if not suffix:
        save_atomically(folder / "qualitative.png",
                        lambda file: draw_qualitative(file, model, s, source, maps))
    return found


# ---------------------------------------------------------------- the picture of a run

def over_grey(image: np.ndarray, M: np.ndarray, top: float) -> np.ndarray:
    """A map [H, W] in colours from 0 to `top` over the grey image [H, W, 3]; both in 0..255."""
    from matplotlib import colormaps
    share = np.clip(M / top, 0, 1)[..., None]
    alpha = 0.8 * np.sqrt(share)
    colours = colormaps["inferno"](share[..., 0])[..., :3] * 255
    return (1 - alpha) * image.mean(-1, keepdims=True) + alpha * colours


def printable(name: str) -> str:
    """A file's name for people: bytes that are no UTF-8 are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


ROWS = 24                                               # of the picture, at most


def draw_qualitative(file, model: TransFusion, s: Settings, source: Source, maps: dict,
                     of_each: int = 2) -> None:
    """For some test images of each kind: input, restoration, map over image, map, truth."""
    from matplotlib.figure import Figure
    items = source.category.test
    kinds = sorted({item.defect for item in items}, key=lambda kind: (data.is_good(kind), kind))
    each = max(1, min(of_each, ROWS // len(kinds)))
    shown = [k for kind in kinds
             for k in [k for k, item in enumerate(items) if item.defect == kind][:each]]
    if len(shown) > ROWS:
        shown = shown[:ROWS - 1] + shown[-1:]                   # the last is a good image
    M_final = final_maps(maps, s)
    top = float(M_final.max())
    restored = torch.cat([part.x_0.cpu() for _, part in restore_all(model, source.test, shown, s)])

    def picture(image: Tensor) -> np.ndarray:
        return image.permute(1, 2, 0).numpy()

    titles = ["image", "restoration", "map over image", "anomaly map", "ground truth"]
    figure = Figure(figsize=(10, 2 * len(shown) + 0.8), layout="constrained")
    axes = figure.subplots(len(shown), 5, squeeze=False)
    for row, k, image, x_0 in zip(axes, shown, source.test[shown], restored):
        truth = source.masks[k] if source.masks is not None else None
        row[0].imshow(picture(image))
        row[1].imshow(picture(x_0.clamp(-1, 1) / 2 + 0.5))
        row[2].imshow(over_grey(picture(image), M_final[k], top) / 255)
        shade = row[3].imshow(M_final[k], cmap="inferno", vmin=0, vmax=top)
        if truth is not None:
            row[4].imshow(truth, cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(printable(f"{items[k].defect}\n{items[k].path.stem}"), fontsize=8,
                          parse_math=False)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    figure.colorbar(shade, ax=axes, location="bottom", shrink=0.4, aspect=30, pad=0.01,
                    label="M_final (Eq. 10)")
    figure.savefig(file, format="png", dpi=80)
