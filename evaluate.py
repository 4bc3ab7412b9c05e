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
from baselines.common import PREPARED
from perlin import anomaly_appearance, anomaly_mask, random_perlin
from runs import (Source, name_in, save_atomically, save_csv, save_json, scoring_side,
                  steps_per_epoch)
from settings import InputError, Settings, hardware, progress_bar
from transfusion import Restoration, TransFusion, anomaly_score, final_mask, forward_process


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
    """Eq. 11 of maps [N, H, W]: [N]. Raises InputError for a score that is no number, as that
    would pass for a normal image's."""
    scores = anomaly_score(torch.from_numpy(M_final)).numpy()
    if not np.isfinite(scores).all():
        raise InputError("a score is no number: the model's weights are damaged")
    return scores


def score(model: TransFusion, s: Settings, source: Source):
    """Restore and score the test set: metrics, image scores [N], raw maps."""
    maps = raw_maps(model, source.test, range(len(source.test)), s)
    return *score_maps(maps, source.category.labels, source.masks, s), maps


def prepare(model: TransFusion, s: Settings, source: Source) -> None:
    """Show a trained model of a method that asks for it the training images once more.

    Raises InputError where the method lacks something.
    """
    if not hasattr(model, "prepare"):
        return
    device = next(model.parameters()).device
    model.eval()
    try:
        model.prepare(data.scale(source.images[source.train[:PREPARED]].to(device)))
    except ValueError as error:
        raise InputError(str(error))


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

TRAINED = 100           # images of the training scored for the threshold, at most
SYNTHETIC = 64          # defects made on held-out images, to see how many a threshold finds
FAINT = 0.25            # their opacity, beta in Eq. 2


def normal_scores(model: TransFusion, s: Settings, source: Source) -> dict | None:
    """Scores of normal images, for thresholds, and of faint synthetic defects; None where no
    normal image is held out.

    {"images": [float] of the held-out images, "trained": [float] of some training images,
    "synthetic": [float] of `synthetic_defects`, "infer_steps": network calls}: plain types, for the
    checkpoint.
    """
    if not len(source.held_out):
        return None

    def scores(images, indices) -> list[float]:
        return image_scores(final_maps(raw_maps(model, images, indices, s), s)).tolist()

    return {"images": scores(source.images, source.held_out),
            "trained": scores(source.images, source.train[:TRAINED]),
            "synthetic": scores(synthetic_defects(source)[0], range(SYNTHETIC)),
            "infer_steps": network_calls(model, s)}


def synthetic_defects(source: Source) -> tuple[Tensor, Tensor]:
    """Section 3.3's anomalies at opacity FAINT on the held-out images, in turn: images, uint8
    [SYNTHETIC, 3, H, W], and masks M, [SYNTHETIC, 1, H, W] in {0, 1}. Always the same ones."""
    rng = np.random.default_rng(0)
    chosen = np.resize(source.held_out, SYNTHETIC)
    n, foreground = source.images[chosen], source.foreground[chosen].float()
    M, _ = anomaly_mask(random_perlin(rng, SYNTHETIC, *n.shape[2:], n.device), foreground)
    A = torch.stack([anomaly_appearance(image, texture, rng)
                     for image, texture in zip(n, source.textures.draw(SYNTHETIC, rng))])
    x = forward_process(n.float(), A.float(), M, FAINT)
    return x.round().to(torch.uint8), M


def threshold(normal: dict, s: Settings) -> metrics.Threshold:
    """The threshold of `normal_scores`, for images and, as a score is its map's largest value
    (Eq. 11), for the regions of a map.

    `metrics.normal_threshold` of the held-out and the training images together, and never below
    that of the held-out ones alone. These few bound the false alarms badly; the training's images,
    which a network that learns from anomalies does not know by heart, score as new ones do, or
    lower.
    """
    return max(metrics.normal_threshold(scores, s.false_alarms) for scores in
               (normal["images"], normal["images"] + normal.get("trained", [])))


def synthetic_found(normal: dict, image: metrics.Threshold) -> float | None:
    """Share of the synthetic defects above a threshold."""
    scores = np.array(normal.get("synthetic", []))
    return float((scores > image.value).mean()) if len(scores) else None


def in_words(normal: dict, image: metrics.Threshold) -> str:
    """What an image threshold promises, how surely, and how many synthetic defects it finds."""
    counts = f"{len(normal['images'])} held-out"
    if normal.get("trained"):
        counts += f" and {len(normal['trained'])} training"
    found = synthetic_found(normal, image)
    return (f"threshold {image.value:.4f}, from {counts} images\n"
            f"  of 100 good parts like these about {100 * image.rate:.0f} will be called defective "
            f"({100 * image.low:.0f} to {100 * image.high:.0f} is plausible)"
            + ("" if found is None else
               f"\n  of {len(normal['synthetic'])} faint synthetic defects painted on the held-out "
               f"images {round(found * len(normal['synthetic']))} are found"))


def against_normal(normal: dict | None, s: Settings, labels: np.ndarray,
                   scores: np.ndarray) -> dict:
    """The threshold from normal images, and what it does on the test set.

    image_auroc_held_out: the image AUROC with these images in place of the test set's good ones. It
    differs where the good test images differ from the other normal ones, in light say.
    """
    found = dict.fromkeys(("threshold", "false_alarms_promised", "false_alarm_rate",
                           "detection_rate", "synthetic_found", "image_f1",
                           "image_auroc_held_out"))
    found["threshold_images"] = len(normal["images"]) if normal else 0
    if normal:
        image = threshold(normal, s)
        alarms = scores > image.value
        found.update(threshold=image.value, false_alarms_promised=image.rate,
                     synthetic_found=synthetic_found(normal, image),
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
    found.update(data=source.category.data, category=s.category, method=s.method,
                 preset=s.preset, seed=s.seed, step=progress["step"],
                 epoch=math.ceil(progress["step"] / per_epoch),
                 seconds_train=round(progress["seconds"], 1),
                 seconds_per_image=seconds_per_image(model, s, source.test),
                 infer_steps=network_calls(model, s), precision=s.precision,
                 device=s.device, hardware=hardware(s.device), torch=torch.__version__)
    if not suffix:
        save_csv(folder / "scores.csv",
                 [{"file": name_in(source.category, item.path), "label": item.label,
                   "score": f"{value:.9g}"} for item, value in zip(source.category.test, scores)])
        save_atomically(folder / "maps.npz", lambda file: np.savez_compressed(file, **maps))
    save_json(folder / f"metrics{suffix}.json", found)
    if not suffix:
        save_atomically(folder / "qualitative.png",
                        lambda file: draw_test_images(file, model, s, source))
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


def pick_rows(items: list[data.Item], of_each: int = 2) -> list[int]:
    """Some test images of each kind, good ones last."""
    kinds = sorted({item.defect for item in items}, key=lambda kind: (data.is_good(kind), kind))
    each = max(1, min(of_each, ROWS // len(kinds)))
    shown = [k for kind in kinds
             for k in [k for k, item in enumerate(items) if item.defect == kind][:each]]
    return shown if len(shown) <= ROWS else shown[:ROWS - 1] + shown[-1:]  # the last one is good


def draw_test_images(file, model: TransFusion, s: Settings, source: Source) -> None:
    """qualitative.png: some test images of each kind."""
    items, shown = source.category.test, pick_rows(source.category.test)
    truths = [None if source.masks is None else source.masks[k] for k in shown]
    draw_rows(file, model, s, source.test[shown],
              [f"{items[k].defect}\n{items[k].path.stem}" for k in shown], truths)


def draw_preview(file, model: TransFusion, s: Settings, source: Source) -> None:
    """preview.png: held-out normal images, and the faint synthetic defects made on them."""
    count = min(6, len(source.held_out))
    made, M = synthetic_defects(source)
    draw_rows(file, model, s, torch.cat([made[:count], source.images[source.held_out[:count]]]),
              ["synthetic\ndefect"] * count + ["held-out\nnormal"] * count,
              [*M[:count, 0].numpy(), *np.zeros_like(M[:count, 0])])


def draw_rows(file, model: TransFusion, s: Settings, images: Tensor, names: list[str],
              truths: list) -> None:
    """A row for each of images, uint8 [N, 3, H, W]: input, restoration, map over image, map, truth
    (a mask, or None)."""
    from matplotlib.figure import Figure
    parts = (part for _, part in restore_all(model, images, range(len(images)), s))
    x_0, *maps = (torch.cat(part).cpu() for part in zip(*parts))
    M_final = final_maps(dict(zip(Restoration._fields[1:], (M[:, 0].numpy() for M in maps))), s)
    top = float(M_final.max())

    photos = images.permute(0, 2, 3, 1).numpy()
    restored = ((x_0.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    over = [over_grey(photo, M, top) for photo, M in zip(photos, M_final)]
    truth = [np.full_like(M_final[0], np.nan) if M is None else top * M for M in truths]
    columns = {"image": photos, "restoration": restored, "map over image": over,
               "anomaly map": M_final, "ground truth": truth}

    figure = Figure(figsize=(10, 2 * len(images) + 0.8), layout="constrained")
    axes = figure.subplots(1, 5)
    for axis, (title, pictures) in zip(axes, columns.items()):         # a column is one picture
        side, white = len(pictures[0]), 255 if pictures[0].ndim == 3 else np.nan
        gap = side // 16
        rows = [np.pad(picture, ((0, gap), *[(0, 0)] * (picture.ndim - 1)), constant_values=white)
                for picture in pictures]
        column = np.concatenate(rows)[:-gap]
        shade = axis.imshow(column / 255 if column.ndim == 3 else column, cmap="inferno", vmin=0,
                            vmax=top)
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[], frame_on=False)
    side = images.shape[-1]
    axes[0].set_yticks([side / 2 + k * (side + side // 16) for k in range(len(images))],
                       [printable(name) for name in names], fontsize=8, rotation=90, va="center",
                       ha="center", parse_math=False)
    axes[0].tick_params(length=0, pad=12)
    figure.colorbar(shade, ax=axes, location="bottom", shrink=0.4, aspect=30, pad=0.01,
                    label="M_final (Eq. 10)")
    figure.savefig(file, format="png", dpi=80)
