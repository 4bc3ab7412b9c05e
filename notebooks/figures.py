"""What the notebooks share: finding a run, drawing images and maps, failure cases.

The notebooks load and plot; what they need beyond that is here, in tables.py, or in the module that
owns it.
"""
import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch import Tensor

import demo
import train
from data import FOLDERS, scale
from evaluate import final_maps, image_scores, over_grey
from runs import Source, load_model, load_source, read_json
from settings import InputError, Settings
from tables import find_runs
from transfusion import Restoration, TransFusion

# The run a notebook makes where there is none: a minute or two on two cores.
SMALL = ["--category", "fabric", "--resize", "64", "--crop", "64", "--batch", "8",
         "--steps", "300", "--name", "notebook"]


@dataclass
class Run:
    """A finished run, its model, its data and its raw maps [N, H, W] by name."""
    folder: Path
    model: TransFusion
    s: Settings
    source: Source
    maps: dict[str, np.ndarray]
    metrics: dict

    @cached_property
    def M_final(self) -> np.ndarray:
        """Eq. 10 of every test image, [N, H, W]."""
        return final_maps(self.maps, self.s)

    @cached_property
    def scores(self) -> np.ndarray:
        """Eq. 11 of every test image, [N]."""
        return image_scores(self.M_final)

    def images(self, indices) -> Tensor:
        """Test images [B, 3, H, W] in [-1, 1]."""
        return scale(self.source.test[list(indices)])

    def restore(self, indices) -> Restoration:
        """The restoration of some test images, in as many network calls as the run's scores."""
        return self.model.restore(self.images(indices), self.s.infer_steps)


def load_run(name: str, runs: str, root: str, category: str = "") -> Run:
    """A finished run of a data set, of this category or the first there is.

    For the demo data a small one is trained where there is none, or trained on where that was
    interrupted. Own data is found where the run had it. Raises InputError.
    """
    found = [f for f in find_runs(name, runs) if not category or f.name.startswith(category)]
    if not found and name == "demo" and category in ("", "fabric"):
        train.main([*SMALL, "--resume", "--root", root, "--out", runs])
        found = find_runs(name, runs)
    if not found:
        raise InputError(f"no finished run of {name} {category} under {runs}: "
                         f"python train.py --data {name} --category {category or 'CATEGORY'}")
    folder = found[0]
    model, s, _ = load_model(folder / "last.pt", torch.device("cpu"))
    s = dataclasses.replace(s, root=root, device="cpu")
    if s.data not in FOLDERS and not Path(s.data).is_dir():       # a path from another folder
        s = dataclasses.replace(s, data=str(Path(read_json(folder / "data.json")["root"]).parent))
    if name == "demo":
        demo.write(Path(root) / "demo", s.category)
    with np.load(folder / "maps.npz") as file:
        maps = {k: file[k] for k in file.files}
    return Run(folder, model, s, load_source(s, training=False), maps,
               json.loads((folder / "metrics.json").read_text()))


def image_auroc(run: Run, **scoring) -> float:
    """Image AUROC of a run's maps under other scoring settings: lam, kernel, final_mask."""
    M_final = final_maps(run.maps, dataclasses.replace(run.s, **scoring))
    return float(roc_auc_score(run.source.category.labels, image_scores(M_final)))


# ---------------------------------------------------------------- pictures

def show(axis: Axes, picture, title: str = "", top: float | None = None) -> None:
    """Draw an image [3, H, W] in [-1, 1], or a map [H, W] from 0 to `top` (1 if not given)."""
    picture = torch.as_tensor(picture).detach().float()
    if picture.ndim == 3 and len(picture) == 3:
        axis.imshow((picture.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0))
    else:
        axis.imshow(picture.squeeze(0) if picture.ndim == 3 else picture, cmap="inferno", vmin=0,
                    vmax=1 if top is None else top)
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])


def overlay(axis: Axes, image: Tensor, M: np.ndarray, title: str = "", top: float = 1.0) -> None:
    """A map over the grey image [3, H, W]."""
    picture = (image.permute(1, 2, 0).numpy() / 2 + 0.5) * 255
    axis.imshow(over_grey(picture, np.asarray(M), top) / 255)
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])


def truth_of(run: Run, k: int) -> np.ndarray:
    """Ground truth of a test image at the model's size, bool [H, W]; zeros where there is none."""
    if run.source.masks is None:
        return np.zeros((run.s.crop, run.s.crop), bool)
    mask = torch.from_numpy(run.source.masks[k])[None, None].float()
    return (torch.nn.functional.adaptive_avg_pool2d(mask, run.s.crop)[0, 0] >= 0.5).numpy()


def predicted_mask(run: Run, k: int) -> np.ndarray:
    """M_final above the threshold (half of the largest score where there is none)."""
    level = run.metrics.get("threshold")
    return run.M_final[k] > (run.scores.max() / 2 if level is None else level)


# ---------------------------------------------------------------- failure cases

class Failure(NamedTuple):
    """A test image that a rule picked, where it is worst, and why, in a sentence."""
    index: int
    rule: str
    where: np.ndarray                     # bool [H, W], the largest disagreement
    why: str


def largest_region(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if count else labels > 0


def circle(axis: Axes, where: np.ndarray) -> None:
    """A red circle around a region."""
    if where.any():
        rows, columns = np.nonzero(where)
        middle = ((columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2)
        radius = max(np.ptp(rows), np.ptp(columns)) / 2 + 3
        axis.add_patch(Circle(middle, radius, fill=False, color="red", linewidth=1.5))


def failures(run: Run, each: int = 2) -> list[Failure]:
    """The `each` worst test images under each of four rules, found from scores and maps alone.

    Missed: the defective images of lowest score. False alarm: the good ones of highest. Restored,
    not annotated: the most changed image area outside the truth, where there is any. Disagreeing:
    the least overlap (intersection over union) of predicted and true mask.
    """
    labels, scores, found = run.source.category.labels, run.scores, []
    truth = np.stack([truth_of(run, k) for k in range(len(labels))])
    predicted = np.stack([predicted_mask(run, k) for k in range(len(labels))])
    good, bad = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    threshold = run.metrics.get("threshold")
    against = "" if threshold is None else f" (threshold {threshold:.3f})"
    for k in bad[scores[bad].argsort()][:each]:
        found.append(Failure(k, "missed", largest_region(truth[k]),
                             f"scores only {scores[k]:.3f}{against}: on its {truth[k].sum()} "
                             f"annotated pixels no single mask exceeds "
                             f"{run.maps['M_disc'][k][truth[k]].max(initial=0):.2f} on average"))
    for k in good[scores[good].argsort()[::-1]][:each]:
        found.append(Failure(k, "false alarm", largest_region(run.M_final[k] > 0.8 * scores[k]),
                             f"a good image that scores {scores[k]:.3f}{against}, more than "
                             f"{np.mean(scores[bad] < scores[k]):.0%} of the defective ones"))
    changed = (run.maps["M_recon"] > 0.01) & ~ndimage.binary_dilation(truth, np.ones((1, 5, 5)))
    areas = changed.sum((1, 2))
    for k in [k for k in areas.argsort()[::-1] if areas[k]][:each]:
        found.append(Failure(k, "restored, not annotated", largest_region(changed[k]),
                             f"{areas[k]} pixels outside the annotation were changed by more than "
                             f"a tenth of the grey range"))
    joint = (truth & predicted)[bad].sum((1, 2)) / np.maximum((truth | predicted)[bad].sum((1, 2)),
                                                              1)
    for k, share in sorted(zip(bad, joint), key=lambda pair: pair[1])[:each]:
        found.append(Failure(k, "masks disagree", largest_region(truth[k] ^ predicted[k]),
                             f"predicted and true mask share {share:.0%} of their union: "
                             f"{(predicted[k] & ~truth[k]).sum()} pixels too many, "
                             f"{(truth[k] & ~predicted[k]).sum()} too few"))
    return found
