"""Functions of the notebooks: loading a run, drawing images, maps and the network, failure cases.

The notebooks load and plot. The tables are in tables.py.
"""
import base64
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Patch, Rectangle
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import demo
import train
from data import (SCORING_GRID, RunData, load_image, load_run_data, preprocess, scale,
                  scoring_side)
from evaluate import final_maps, image_scores
from runs import load_model
from settings import Settings
from support.console import InputError
from support.files import read_json
from support.layouts import FOLDERS
from support.pictures import over_grey
from tables import find_runs
from transfusion import Block, Resample, Restoration, ResUNet, Step, TransFusion

# The run that a notebook trains if there is none: a minute or two on two cores.
SMALL = ["--category", "fabric", "--resize", "64", "--crop", "64", "--batch", "8",
         "--steps", "300", "--name", "notebook"]
METHODS = ("draem", "anoddpm", "diffad", "d3ad", "patchcore")      # that are compared with ours


@dataclass
class FinishedRun:
    """A run that is trained and scored. maps: its raw maps [N, H, W] by name, of maps.npz.
    metrics: of metrics.json."""
    folder: Path
    model: TransFusion
    settings: Settings
    data: RunData
    maps: dict[str, np.ndarray]
    metrics: dict

    @cached_property
    def M_final(self) -> np.ndarray:
        """Eq. 10 of every test image, [N, H, W]."""
        return final_maps(self.maps, self.settings)

    @cached_property
    def scores(self) -> np.ndarray:
        """Eq. 11 of every test image, [N]."""
        return image_scores(self.M_final)

    @property
    def threshold(self) -> float:
        """The run's threshold; if it has none, the median score of the defective images."""
        threshold = self.metrics.get("threshold")
        if threshold is None:
            return float(np.median(self.scores[self.labels == 1]))
        return threshold

    @property
    def labels(self) -> np.ndarray:
        """1 for a defective test image, 0 for a good one, [N]."""
        return self.data.category.labels

    def images(self, indices) -> Tensor:
        """Test images as the model sees them, [B, 3, H, W] in [-1, 1]."""
        return scale(self.data.test[list(indices)])

    def normal(self, indices) -> Tensor:
        """The demo's test images without their defects (the n of Eq. 1), as the model sees them:
        [B, 3, H, W] in [-1, 1]."""
        items = [self.data.category.test[k] for k in indices]
        drawn = [demo.draw(self.settings.category, item.defect if item.label else None,
                           int(item.path.stem), healed=True)[0] for item in items]
        return scale(torch.from_numpy(np.stack([
            preprocess(Image.fromarray(n), self.settings.resize, self.settings.crop)
            for n in drawn])))

    def original(self, k: int) -> Tensor:
        """A test image on the scoring grid, 256 px less the crop, [3, side, side] in [-1, 1]."""
        path = self.data.category.test[k].path
        return scale(load_large([path], scoring_side(self.settings)))[0]

    def truth(self, k: int) -> np.ndarray:
        """Ground truth of a test image on the scoring grid, bool; zeros if there is none."""
        side = scoring_side(self.settings)
        return np.zeros((side, side), bool) if self.data.masks is None else self.data.masks[k]

    def restore(self, indices) -> Restoration:
        """The restoration of some test images, with as many network calls as the run's scores."""
        return self.model.restore(self.images(indices), self.settings.infer_steps)


def load_large(paths: Sequence[Path], crop: int = SCORING_GRID) -> Tensor:
    """Images of files on the scoring grid, whatever size a model sees, uint8 [B, 3, crop, crop]."""
    return torch.from_numpy(np.stack([load_image(p, SCORING_GRID, crop) for p in paths]))


def load_run(name: str, runs: str, root: str, category: str = "",
             training: bool = False) -> FinishedRun:
    """A finished run of a data set: of this category, or the first one if that is "".

    If there is none of the demo data, a small one is trained, or the training of one is continued.
    training: also load all images that the run was trained on, which have to exist. Raises
    InputError.
    """
    folders = [f for f in find_runs(name, runs) if not category or f.name.startswith(category)]
    if not folders and name == "demo" and category in ("", "fabric"):
        train.main([*SMALL, "--resume", "--root", root, "--out", runs])
        folders = find_runs(name, runs)
    if not folders:
        raise InputError(f"no finished run of {name} {category} under {runs}: "
                         f"python train.py --data {name} --category {category or 'CATEGORY'}")
    return open_run(folders[0], root, training)


def open_run(folder: Path, root: str, training: bool = False) -> FinishedRun:
    """The finished run of a folder. The user's own data is looked for where the run had it."""
    model, s, _ = load_model(folder / "last.pt", torch.device("cpu"))
    root = str(Path(root).expanduser())
    s = dataclasses.replace(s, root=root, device="cpu")
    if s.data not in FOLDERS and not Path(s.data).is_dir():       # relative to another folder
        s = dataclasses.replace(s, data=str(Path(read_json(folder / "data.json")["root"]).parent))
    if s.data == "demo":
        demo.write(Path(root) / "demo", s.category)
    with np.load(folder / "maps.npz") as file:
        maps = {k: file[k] for k in file.files}
    return FinishedRun(folder, model, s, load_run_data(s, training, folder), maps,
                       json.loads((folder / "metrics.json").read_text()))


def every_run(name: str, runs: str, root: str, first: str = "") -> list[FinishedRun]:
    """The finished runs of a data set, one a category, that of the category `first` first."""
    run = load_run(name, runs, root, first)
    return [run, *(open_run(f, root) for f in find_runs(name, runs) if f != run.folder)]


def other_methods(run: FinishedRun, root: str) -> dict[str, FinishedRun]:
    """The finished runs of other methods on the same category, by method.

    Their folders are CATEGORY-METHOD, next to the run's own.
    """
    folders = {m: run.folder.with_name(f"{run.settings.category}-{m}") for m in METHODS}
    return {m: open_run(f, root) for m, f in folders.items() if (f / "metrics.json").exists()}


def image_auroc(run: FinishedRun, **scoring) -> float:
    """Image AUROC of a run's maps with other scoring settings: lam, kernel, final_mask."""
    M_final = final_maps(run.maps, dataclasses.replace(run.settings, **scoring))
    return float(roc_auc_score(run.labels, image_scores(M_final)))


def at_score_quantile(run: FinishedRun, indices, quantile: float) -> int:
    """Which of these test images is at a quantile of their scores: 0 lowest, 1 highest."""
    order = sorted(indices, key=lambda k: run.scores[k])
    return order[round(quantile * (len(order) - 1))]


# ---------------------------------------------------------------- pictures

MAP = "inferno"                         # the colours of every map and every mask, from 0 to 1


def setup() -> None:
    """Pictures of notebooks: sharp enough to read, small enough to commit."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": 88})
    plt.rcParams.update({"figure.dpi": 100, "font.size": 9, "axes.titlesize": 9,
                         "legend.fontsize": 8, "figure.constrained_layout.use": True})


def show(axis: Axes, picture, title: str = "", top: float = 1.0) -> None:
    """Draw an image [3, H, W] in [-1, 1], or a map [H, W] or [1, H, W] from 0 to `top`."""
    picture = torch.as_tensor(picture).detach().float()
    if picture.ndim == 3 and len(picture) == 3:
        axis.imshow((picture.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0))
    else:
        axis.imshow(picture.squeeze(0) if picture.ndim == 3 else picture, cmap=MAP, vmin=0,
                    vmax=top)
    axis.set_title(title)
    axis.set(xticks=[], yticks=[])


def overlay(image: Tensor, M, top: float = 1.0) -> Tensor:
    """A map [H, W] of any size over the grey image [3, H, W]: an image in [-1, 1]."""
    M = F.interpolate(torch.as_tensor(np.asarray(M))[None, None].float(), image.shape[1:],
                      mode="bilinear")[0, 0]
    picture = (image.permute(1, 2, 0).numpy() / 2 + 0.5) * 255
    return torch.from_numpy(over_grey(picture, M.numpy(), top)).permute(2, 0, 1) / 127.5 - 1


def grid(rows, columns: Sequence[str] = (), labels: Sequence[str] = (), side: float = 1.8,
         top: float = 1.0) -> None:
    """Pictures in rows; columns: titles of the first row; labels: left of the rows.

    A cell is a picture as `show` takes it, alone or as (picture, title) or (picture, title, top),
    or None to leave it empty. side: of a picture, in inches.
    """
    count = max(map(len, rows))
    _, axes = plt.subplots(len(rows), count, squeeze=False,
                           figsize=(side * count, (side + 0.25) * len(rows)))
    for i, row in enumerate(rows):
        for axis in axes[i, len(row):]:
            axis.axis("off")
        for j, (axis, cell) in enumerate(zip(axes[i], row)):
            title = columns[j] if i == 0 and len(columns) else ""
            if cell is None:
                axis.axis("off")
            elif isinstance(cell, tuple):
                show(axis, cell[0], cell[1] or title, *cell[2:] or (top,))
            else:
                show(axis, cell, title, top)
        if len(labels):
            axes[i, 0].set_ylabel(labels[i])


def step_slider(steps: Sequence[Step]) -> None:
    """Display a slider over t, and x_t, M_t and n_t of the first image of a restoration.

    It also moves without a kernel, if the page keeps the state of its widgets. Where a page has no
    widgets, the same output is a strip of about six steps.
    """
    def frame(step: Step) -> ipywidgets.Image:                 # x_t, M_t, n_t from left to right
        M_t = plt.get_cmap(MAP)(step.M_t[0, 0].cpu().numpy())[..., :3]
        x_t, n_t = ((x[0].clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).cpu() for x in
                    (step.x_t, step.n_t))
        file = io.BytesIO()
        Image.fromarray((255 * np.hstack([x_t, M_t, n_t])).astype(np.uint8)).save(file, "WebP")
        return ipywidgets.Image(value=file.getvalue(), format="webp", width=660)

    frames = ipywidgets.Stack([frame(step) for step in steps], selected_index=0)
    slider = ipywidgets.SelectionSlider(options=[step.t for step in steps], description="t")
    ipywidgets.jslink((slider, "index"), (frames, "selected_index"))
    shown = [*steps[:-1:max(1, len(steps) // 5)], steps[-1]]
    grid([[(step.x_t[0], f"t = {step.t}") for step in shown] + [(steps[-1].x_prev[0], "x_0")],
          *([getattr(step, name)[0] for step in shown] for name in ("M_t", "n_t"))],
         labels=["x_t", "M_t", "n_t"], side=1.25)
    strip = io.BytesIO()
    plt.savefig(strip, format="jpeg", pil_kwargs={"quality": 88})
    plt.close()
    display({**ipywidgets.VBox([slider, frames])._repr_mimebundle_(),
             "image/jpeg": base64.b64encode(strip.getvalue()).decode(),
             "text/plain": "a slider over t"}, raw=True)


# ---------------------------------------------------------------- the network

class Layer(NamedTuple):
    """A layer of the network: its kind, and the shape (C, H, W) of its output."""
    name: str
    kind: str
    shape: tuple[int, int, int]


COLOURS = {"convolution": "#d9d9d9", "residual block": "#9ecae1",
           "residual block + attention": "#fdae6b", "half the size": "#c7e9c0",
           "twice the size": "#74c476", "head": "#fb6a4a"}


def layers(net: ResUNet, side: int) -> list[Layer]:
    """The layers in the order of their calls, when an image of this side is sent through them."""
    called = []
    parts = {"image_proj": net.image_proj,
             **{f"down.{k}": layer for k, layer in enumerate(net.down)}, "middle": net.middle,
             **{f"up.{k}": layer for k, layer in enumerate(net.up)},
             **{name: getattr(net, name) for name in ("anomaly_head", "normal_head", "mask_head")}}

    def kind(name: str, module: nn.Module) -> str:
        if name.endswith("head"):
            return "head"
        if isinstance(module, Resample):
            return "twice the size" if name.startswith("up") else "half the size"
        if isinstance(module, Block) and isinstance(module.attn, nn.Identity):
            return "residual block"
        return "convolution" if isinstance(module, nn.Conv2d) else "residual block + attention"

    def watch(name: str, module: nn.Module):
        return module.register_forward_hook(lambda _, inputs, output: called.append(
            Layer(name, kind(name, module), tuple(output.shape[1:]))))

    hooks = [watch(name, module) for name, module in parts.items()]
    with torch.no_grad():
        net(torch.zeros(1, 3, side, side), torch.zeros(1, 1, side, side), torch.ones(1).long())
    for hook in hooks:
        hook.remove()
    return called


def draw_network(network: list[Layer]) -> None:
    """Draw the network from left to right, a row for each resolution.

    A box has the number of channels of its layer. Black lines lead from layer to layer; grey lines
    are skip connections from the way down to the way up.
    """
    _, axis = plt.subplots(figsize=(12, 4.6))
    sizes = sorted({layer.shape[1] for layer in network}, reverse=True)
    trunk = [layer for layer in network if layer.kind != "head"]
    heads = [layer for layer in network if layer.kind == "head"]
    corners, skips, lines = {}, [], dict.fromkeys(sizes, 0)        # lower left corners by name

    def box(x: float, y: float, layer: Layer, text: str, width: float = 0.86) -> None:
        axis.add_patch(Rectangle((x, y), width, 0.8, facecolor=COLOURS[layer.kind],
                                 edgecolor="black", linewidth=0.6))
        axis.text(x + width / 2, y + 0.4, text, ha="center", va="center", fontsize=8)

    for x, layer in enumerate(trunk):
        y = -2.0 * sizes.index(layer.shape[1])
        corners[layer.name] = x, y
        box(x, y, layer, str(layer.shape[0]))
        if layer.name == "image_proj" or layer.name.startswith("down"):
            skips.append(layer)
        elif layer.name.startswith("up") and layer.kind != "twice the size":
            x_start, size = corners[skips.pop().name][0], layer.shape[1]
            lines[size] += 1
            height = y + 0.8 + 0.14 * lines[size]
            axis.plot([x_start + 0.43, x_start + 0.43, x + 0.43, x + 0.43],
                      [y + 0.8, height, height, y + 0.8], color="grey", linewidth=0.8)
    path = list(corners.values())
    for (x, y), (x_next, y_next) in zip(path, path[1:]):
        axis.plot([x + 0.86, x_next], [y + 0.4, y_next + 0.4], color="black", linewidth=0.8)
    for k, layer in enumerate(heads):
        axis.plot([path[-1][0] + 0.86, len(trunk) + 0.8], [path[-1][1] + 0.4, 1.4 - k],
                  color="black", linewidth=0.8)
        out = {"anomaly_head": r"$\epsilon_t$", "normal_head": "$n_t$", "mask_head": "logit $M_t$"}
        box(len(trunk) + 0.8, 1.0 - k, layer, f"{out[layer.name]}: {layer.shape[0]}", 2.6)
    for level, size in enumerate(sizes):
        axis.text(-0.4, -2.0 * level + 0.4, f"{size} x {size}", ha="right", va="center")
    axis.legend(handles=[Patch(facecolor=c, edgecolor="black", label=k)
                         for k, c in COLOURS.items()], loc="lower right", ncols=1)
    axis.set(xlim=(-2.8, len(trunk) + 3.8), ylim=(-2.0 * len(sizes) + 1.6, 2.1))
    axis.axis("off")


# ---------------------------------------------------------------- failure cases

class Failure(NamedTuple):
    """A test image that a rule picked. region: the largest disagreement, bool on the scoring grid.
    reason: why it was picked, in words."""
    index: int
    rule: str
    region: np.ndarray
    reason: str


def predicted_mask(run: FinishedRun, k: int) -> np.ndarray:
    """M_final above the threshold, bool on the scoring grid."""
    maps = {name: maps[[k]] for name, maps in run.maps.items()}
    return final_maps(maps, run.settings, scoring_side(run.settings))[0] > run.threshold


def largest_region(mask: np.ndarray) -> np.ndarray:
    """The largest 8-connected region of a mask, as a mask."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if count else labels > 0


def circle(axis: Axes, region: np.ndarray) -> None:
    """Draw a red circle around a region, unless it is empty."""
    if region.any():
        rows, columns = np.nonzero(region)
        middle = ((columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2)
        radius = max(np.ptp(rows), np.ptp(columns)) / 2 + 8
        axis.add_patch(Circle(middle, radius, fill=False, color="red", linewidth=1.5))


def failures(run: FinishedRun, each: int = 2) -> list[Failure]:
    """The worst test images under each of four rules, `each` of them at most, by scores and maps.

    Missed: the defective images of lowest score, of those not above the threshold. False alarm:
    the good images of highest score, of those above the threshold. Restored, not annotated: the
    images with the largest changed area outside the ground truth. Masks disagree: of the defective
    images above the threshold, those whose predicted and true mask overlap least (intersection over
    union).
    """
    labels, scores, cases = run.labels, run.scores, []
    truth = np.stack([run.truth(k) for k in range(len(labels))])
    predicted = np.stack([predicted_mask(run, k) for k in range(len(labels))])
    alarm, good, defective = scores > run.threshold, labels == 0, labels == 1
    threshold_text = f"threshold {run.threshold:.3f}"
    missed = np.flatnonzero(defective & ~alarm)
    for k in missed[scores[missed].argsort()][:each]:
        cases.append(Failure(k, "missed", largest_region(truth[k]),
                             f"scores {scores[k]:.3f} ({threshold_text}), less than "
                             f"{np.mean(scores[good] > scores[k]):.0%} of the good images"))
    false = np.flatnonzero(good & alarm)
    for k in false[scores[false].argsort()[::-1]][:each]:
        cases.append(Failure(k, "false alarm", largest_region(predicted[k]),
                             f"a good image that scores {scores[k]:.3f} ({threshold_text}), more than "
                             f"{np.mean(scores[defective] < scores[k]):.0%} of the defective "
                             f"ones"))
    changed = F.interpolate(torch.from_numpy(run.maps["M_recon"])[:, None], truth.shape[1:],
                            mode="bilinear")[:, 0].numpy() > 0.01
    changed &= ~ndimage.binary_dilation(truth, np.ones((1, 9, 9)))
    areas = changed.mean((1, 2))
    for k in areas.argsort()[::-1][:each]:
        if areas[k]:
            cases.append(Failure(k, "restored, not annotated", largest_region(changed[k]),
                                 f"{areas[k]:.1%} of the image, outside the annotation, was "
                                 f"changed by more than a tenth of the grey range"))
    detected = np.flatnonzero(defective & alarm)
    overlap = (truth & predicted)[detected].sum((1, 2)) / np.maximum(
        (truth | predicted)[detected].sum((1, 2)), 1)
    for k, share in sorted(zip(detected, overlap), key=lambda pair: pair[1])[:each]:
        more, less = (predicted[k] & ~truth[k]).sum(), (truth[k] & ~predicted[k]).sum()
        cases.append(Failure(k, "masks disagree", largest_region(truth[k] ^ predicted[k]),
                             f"predicted and true mask share {share:.0%} of their union: "
                             f"{more} pixels too many, {less} too few, of {truth[k].sum()}"))
    return cases
