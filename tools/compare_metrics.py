"""The numbers of metrics.py and transfusion.py beside those of public packages, on the same maps.

    python tools/compare_metrics.py

It runs every package that is installed, and names the others with the command that installs them.
The maps are drawn, so no data set is needed. The table is explained in docs/metrics.md.
"""
import argparse
import csv
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import metrics
import transfusion

KINDS = ("smooth", "21 levels", "near zero")
METRICS = ("image AUROC", "image AP", "pixel AUROC", "pixel AP", "AUPRO", "image F1max",
           "F1 threshold", "SSIM", "focal loss")
FIELDS = ("metric", "maps", "package", "version", "value", "ours", "difference", "note")
BRUTE_FORCE = "brute force"              # the definitions, written out below without any package


# ---------------------------------------------------------------- the maps

@dataclass(frozen=True)
class Case:
    """Anomaly maps of one kind, with their ground truth."""
    kind: str
    maps: np.ndarray                     # [N, H, W] float32 in [0, 1]
    masks: np.ndarray                    # [N, H, W] bool

    @cached_property
    def labels(self) -> np.ndarray:
        """1 for a defective image, [N]."""
        return self.masks.any((1, 2)).astype(int)

    @cached_property
    def scores(self) -> np.ndarray:
        """Eq. 11: the largest value of each map, [N]."""
        return self.maps.max((1, 2))

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """scores and labels [N], maps and masks [N, H, W], labels and masks as int64."""
        return (torch.from_numpy(self.scores), torch.from_numpy(self.labels),
                torch.from_numpy(self.maps), torch.from_numpy(self.masks).long())

    @cached_property
    def image_pair(self) -> tuple[Tensor, Tensor]:
        """Two batches of images for SSIM, [8, 3, H, W] in [0, 1]: maps, and the same smoothed by
        the filter of Eq. 10, which darkens their border."""
        maps = torch.from_numpy(self.maps[:8])[:, None]
        return tuple(x.expand(-1, 3, -1, -1).contiguous()
                     for x in (maps, F.avg_pool2d(maps, 7, 1, 3)))

    @cached_property
    def logits(self) -> Tensor:
        """The maps as logits of a predicted mask, [N, 1, H, W]."""
        return torch.from_numpy(self.maps)[:, None].clamp(1e-4, 1 - 1e-4).logit()

    @cached_property
    def target(self) -> Tensor:
        """The masks as float [N, 1, H, W]."""
        return torch.from_numpy(self.masks)[:, None].float()


def draw_cases(images: int = 40, side: int = 128) -> list[Case]:
    """The three kinds of maps, of the same images and masks.

    - smooth: a smooth random field, higher on the defects; hardly two pixels are equal.
    - 21 levels: the mean of 20 binary masks, as M_disc is where the network is sure of itself.
    - near zero: the smooth maps to a power at which 97 % of the pixels are below 0.005. The order
      of the pixels is that of the smooth maps, and so are all metrics that depend on order alone.
    """
    rng = np.random.default_rng(0)
    masks = np.zeros((images, side, side), bool)
    y, x = np.mgrid[:side, :side]
    for mask in masks[:images * 5 // 8]:                              # ellipses, some of them thin
        for _ in range(rng.integers(1, 4)):
            cy, cx = rng.uniform(0.1 * side, 0.9 * side, 2)
            a, b = rng.uniform(0.02 * side, 0.15 * side, 2)
            turn = rng.uniform(0, np.pi)
            u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
            v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            mask |= (u / a) ** 2 + (v / b) ** 2 < 1

    def field(sigma: float) -> np.ndarray:
        noise = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, sigma, sigma))
        return noise / noise.std()

    signal = field(5) + 3.5 * ndimage.gaussian_filter(masks.astype(float), (0, 2, 2))
    smooth = (signal - signal.min()) / np.ptp(signal)
    levels = np.mean([signal + 0.5 * field(3) > 3 for _ in range(20)], 0)
    near_zero = smooth ** (np.log(0.005) / np.log(np.quantile(smooth, 0.97)))
    return [Case(kind, maps.astype(np.float32), masks)
            for kind, maps in zip(KINDS, (smooth, levels, near_zero))]


# ---------------------------------------------------------------- this repository

def our_values(case: Case) -> dict[str, float]:
    """Each metric as this repository computes it.

    SSIM is computed on images in [0, 2] here, with its range of 2, and on images in [0, 1] with a
    range of 1 by the packages, some of which refuse negative values. The two are equal.
    """
    found = metrics.evaluate(case.labels, case.scores, case.maps, case.masks)
    a, b = case.image_pair
    with_focal, without = (transfusion.mask_loss(case.logits, case.target, alpha).item()
                           for alpha in (1.0, 0.0))
    return {"image AUROC": found["image_auroc"], "image AP": found["image_ap"],
            "pixel AUROC": found["pixel_auroc"], "pixel AP": found["pixel_ap"],
            "AUPRO": found["aupro"], "image F1max": found["image_f1max"],
            "F1 threshold": best_f1(case.labels, case.scores)[1],
            "SSIM": transfusion.ssim(2 * a, 2 * b).item(), "focal loss": with_focal - without}


# ---------------------------------------------------------------- the definitions, written out

def best_f1(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """The best F1 of all thresholds, and the largest threshold that has it (score >= threshold)."""
    return max((f1_of(labels, scores >= t), float(t)) for t in np.unique(scores))


def f1_of(labels: np.ndarray, alarms: np.ndarray) -> float:
    true = int(alarms[labels == 1].sum())
    return 2 * true / int(alarms.sum() + labels.sum())


def curve_points(scores: np.ndarray, hit: np.ndarray, false: np.ndarray) -> list[tuple]:
    """(false, hit) added up from the highest score down, one point for each distinct score."""
    order = np.argsort(-scores, kind="stable")
    steps = zip(scores[order].tolist(), false[order].tolist(), hit[order].tolist())
    points, x, y = [(0.0, 0.0)], 0.0, 0.0
    for _, pixels in groupby(steps, key=lambda step: step[0]):
        for _, dx, dy in pixels:
            x, y = x + dx, y + dy
        points.append((x, y))
    return points


def area_under(points: list[tuple], limit: float) -> float:
    """Trapezoids up to x = limit, where the curve is interpolated, divided by the limit."""
    total = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        total += (x1 - x0) * (y0 + y1) / 2
    return total / limit


def region_shares(mask: np.ndarray) -> np.ndarray:
    """1 / size of its 8-connected region for every anomalous pixel, 0 elsewhere: by flood fill."""
    shares = np.zeros(mask.shape)
    left = set(map(tuple, np.argwhere(mask).tolist()))
    while left:
        region = [left.pop()]
        for y, x in region:                                               # grows while it is read
            near = {(y + j, x + i) for j in (-1, 0, 1) for i in (-1, 0, 1)} & left
            left -= near
            region += near
        shares[tuple(np.transpose(region))] = 1 / len(region)
    return shares


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The sum of precision x gain of recall over the distinct scores."""
    points = curve_points(scores, labels.astype(float), 1.0 - labels)
    positives = points[-1][1]
    return sum((hit - before) / positives * hit / (hit + false)
               for (_, before), (false, hit) in zip(points, points[1:]))


def roc_area(scores: np.ndarray, labels: np.ndarray) -> float:
    hit = labels / labels.sum()
    return area_under(curve_points(scores, hit, (1 - labels) / (1 - labels).sum()), 1.0)


def focal_by_definition(logits: Tensor, target: Tensor) -> float:
    """-0.25 (1 - p)^2 log p on anomalous pixels, -0.75 p^2 log(1 - p) on normal ones, averaged."""
    p = logits.double().sigmoid().numpy()
    loss = np.where(target.numpy() == 1, -0.25 * (1 - p) ** 2 * np.log(p),
                    -0.75 * p ** 2 * np.log1p(-p))
    return float(loss.mean())


# ---------------------------------------------------------------- the packages

Numbers = Iterator[tuple[str, str, Callable[[], float]]]      # metric, call, what computes it


def with_brute_force(case: Case) -> Numbers:
    """No package: the definitions above, one score after the other."""
    def aupro() -> float:
        shares = np.stack([region_shares(mask) for mask in case.masks])
        normal = ~case.masks / (~case.masks).sum()
        regions = round(shares.sum())
        return area_under(curve_points(case.maps.ravel(), shares.ravel() / regions,
                                       normal.ravel()), 0.3)

    pixels, truth = case.maps.ravel(), case.masks.ravel().astype(int)
    yield "image AUROC", "definition", lambda: roc_area(case.scores, case.labels)
    yield "image AP", "definition", lambda: average_precision(case.scores, case.labels)
    yield "pixel AUROC", "definition", lambda: roc_area(pixels, truth)
    yield "pixel AP", "definition", lambda: average_precision(pixels, truth)
    yield "AUPRO", "definition, as MVTec's evaluation", aupro
    yield "image F1max", "definition", lambda: best_f1(case.labels, case.scores)[0]
    yield "focal loss", "definition, float64", lambda: focal_by_definition(case.logits, case.target)


def with_scikit_learn(case: Case) -> Numbers:
    from sklearn import metrics as sk
    pixels, truth = case.maps.ravel(), case.masks.ravel()

    def threshold() -> float:
        precision, recall, thresholds = sk.precision_recall_curve(case.labels, case.scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        return float(thresholds[f1[:-1].argmax()])

    yield "image AUROC", "roc_auc_score", lambda: sk.roc_auc_score(case.labels, case.scores)
    yield ("image AP", "average_precision_score",
           lambda: sk.average_precision_score(case.labels, case.scores))
    yield "pixel AUROC", "roc_auc_score", lambda: sk.roc_auc_score(truth, pixels)
    yield ("pixel AP", "average_precision_score",
           lambda: sk.average_precision_score(truth, pixels))
    yield ("image F1max", "precision_recall_curve, verdict score >= threshold",
           lambda: sk.f1_score(case.labels, case.scores >= threshold()))
    yield "F1 threshold", "precision_recall_curve", threshold


def with_scipy(case: Case) -> Numbers:
    from scipy.stats import mannwhitneyu

    def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
        good, bad = (scores[labels == k].astype(np.float64) for k in (0, 1))
        return mannwhitneyu(bad, good).statistic / (len(bad) * len(good))

    yield "image AUROC", "mannwhitneyu", lambda: auroc(case.scores, case.labels)
    yield "pixel AUROC", "mannwhitneyu", lambda: auroc(case.maps.ravel(), case.masks.ravel())


def with_torchmetrics(case: Case) -> Numbers:
    from torchmetrics import classification as tm
    from torchmetrics.image import StructuralSimilarityIndexMeasure
    scores, labels, maps, masks = case.tensors

    def threshold() -> float:
        precision, recall, thresholds = tm.BinaryPrecisionRecallCurve()(scores, labels)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return thresholds[f1[:-1].argmax()].item()

    for bins in (None, 200):
        call = f"thresholds={bins}"
        yield "image AUROC", call, lambda: tm.BinaryAUROC(thresholds=bins)(scores, labels).item()
        yield ("image AP", call,
               lambda: tm.BinaryAveragePrecision(thresholds=bins)(scores, labels).item())
        yield "pixel AUROC", call, lambda: tm.BinaryAUROC(thresholds=bins)(maps, masks).item()
        yield ("pixel AP", call,
               lambda: tm.BinaryAveragePrecision(thresholds=bins)(maps, masks).item())
    yield ("image F1max", "BinaryPrecisionRecallCurve, then BinaryF1Score at its threshold",
           lambda: tm.BinaryF1Score(threshold=threshold())(scores, labels).item())
    yield "F1 threshold", "BinaryPrecisionRecallCurve", threshold
    yield ("SSIM", "data_range=1.0", lambda: StructuralSimilarityIndexMeasure(data_range=1.0)(
        *case.image_pair).item())


def with_anomalib(case: Case) -> Numbers:
    from anomalib.data import ImageBatch
    from anomalib.metrics import AUPR, AUPRO, AUROC, F1AdaptiveThreshold, F1Max
    scores, labels, maps, masks = case.tensors
    batch = ImageBatch(image=torch.zeros(len(maps), 3, *maps.shape[1:]), pred_score=scores,
                       gt_label=labels.bool(), anomaly_map=maps, gt_mask=masks.bool())

    def value(metric: type, *fields: str) -> float:
        computed = metric(fields=list(fields))
        computed.update(batch)
        return float(computed.compute())

    image, pixel = ("pred_score", "gt_label"), ("anomaly_map", "gt_mask")
    yield "image AUROC", "AUROC", lambda: value(AUROC, *image)
    yield "image AP", "AUPR", lambda: value(AUPR, *image)
    yield "pixel AUROC", "AUROC", lambda: value(AUROC, *pixel)
    yield "pixel AP", "AUPR", lambda: value(AUPR, *pixel)
    yield "AUPRO", "AUPRO", lambda: value(AUPRO, *pixel)
    yield "image F1max", "F1Max", lambda: value(F1Max, *image)
    yield ("image F1max", "F1AdaptiveThreshold, verdict score > threshold as in PostProcessor",
           lambda: f1_of(case.labels, case.scores > value(F1AdaptiveThreshold, *image)))
    yield "F1 threshold", "F1AdaptiveThreshold", lambda: value(F1AdaptiveThreshold, *image)


def with_adeval(case: Case) -> Numbers:
    import adeval
    from adeval.au_pro import calculate_au_pro
    masks, pixels, truth = case.masks.astype(np.uint8), case.maps.ravel(), case.masks.ravel()

    def summary(key: str) -> float:
        bins = adeval.EvalAccumulator(0.0, 1.0, 0.0, 1.0)
        bins.add_anomap_batch(list(case.maps), list(masks))
        bins.add_image(case.scores, case.labels)
        return bins.summary()[key]

    yield ("image AUROC", "auroc_and_aupr",
           lambda: adeval.auroc_and_aupr(case.scores, case.labels)[0])
    yield "image AP", "auroc_and_aupr", lambda: adeval.auroc_and_aupr(case.scores, case.labels)[1]
    yield "pixel AUROC", "auroc_and_aupr", lambda: adeval.auroc_and_aupr(pixels, truth)[0]
    yield "pixel AP", "auroc_and_aupr", lambda: adeval.auroc_and_aupr(pixels, truth)[1]
    yield "pixel AUROC", "EvalAccumulator", lambda: summary("p_auroc")
    yield "pixel AP", "EvalAccumulator", lambda: summary("p_aupr")
    yield ("AUPRO", "au_pro.calculate_au_pro",
           lambda: calculate_au_pro(list(masks), list(case.maps))[0])
    yield "AUPRO", "EvalAccumulator", lambda: summary("p_aupro")


def with_pyaupro(case: Case) -> Numbers:
    from pyaupro import PerRegionOverlap, auc_compute
    *_, maps, masks = case.tensors

    def curve(**options) -> tuple[Tensor, Tensor]:
        metric = PerRegionOverlap(**options)
        metric.update(maps, masks)
        return metric.compute()

    yield ("AUPRO", "PerRegionOverlap(), auc_compute",
           lambda: auc_compute(*curve(), limit=0.3).item())
    yield ("AUPRO", "thresholds=100, auc_compute",
           lambda: auc_compute(*curve(thresholds=100), limit=0.3, descending=True).item())
    yield ("AUPRO", "reference_implementation=True (MVTec's code), auc_compute",
           lambda: auc_compute(*curve(reference_implementation=True), limit=0.3).item())
    yield ("AUPRO", "reference_implementation=True (MVTec's code), area interpolated at 0.3",
           lambda: area_under([*zip(*(x.tolist() for x in curve(reference_implementation=True)))],
                              0.3))


def with_pyimgano(case: Case) -> Numbers:
    from pyimgano import evaluation as py
    yield "image AUROC", "compute_auroc", lambda: py.compute_auroc(case.labels, case.scores)
    yield ("image AP", "compute_average_precision",
           lambda: py.compute_average_precision(case.labels, case.scores))
    yield ("pixel AUROC", "compute_pixel_auroc",
           lambda: py.compute_pixel_auroc(case.masks, case.maps))
    yield ("pixel AP", "compute_pixel_average_precision",
           lambda: py.compute_pixel_average_precision(case.masks, case.maps))
    yield "AUPRO", "compute_aupro", lambda: py.compute_aupro(case.masks, case.maps)
    yield ("image F1max", "evaluate_detector",
           lambda: py.evaluate_detector(case.labels, case.scores)["metrics"]["f1"])
    yield ("F1 threshold", "find_optimal_threshold",
           lambda: py.find_optimal_threshold(case.labels, case.scores)[0])


def with_imgad(case: Case) -> Numbers:
    from imgad.evaluation import evaluate_maps, evaluate_scores

    def image(key: str) -> float:
        return evaluate_scores(case.labels, case.scores)[key]

    def pixel(key: str) -> float:
        return evaluate_maps(list(case.masks), list(case.maps))[key]

    yield "image AUROC", "evaluate_scores", lambda: image("auroc")
    yield "image AP", "evaluate_scores", lambda: image("aupr")
    yield "pixel AUROC", "evaluate_maps", lambda: pixel("pixel_auroc")
    yield "pixel AP", "evaluate_maps", lambda: pixel("pixel_aupr")
    yield "AUPRO", "evaluate_maps", lambda: pixel("aupro")
    yield "image F1max", "evaluate_scores", lambda: image("f1_max")


def with_torcheval(case: Case) -> Numbers:
    from torcheval.metrics.functional import binary_auprc, binary_auroc
    scores, labels, maps, masks = case.tensors
    yield "image AUROC", "binary_auroc", lambda: binary_auroc(scores, labels).item()
    yield "image AP", "binary_auprc", lambda: binary_auprc(scores, labels).item()
    yield ("pixel AUROC", "binary_auroc",
           lambda: binary_auroc(maps.flatten(), masks.flatten()).item())
    yield "pixel AP", "binary_auprc", lambda: binary_auprc(maps.flatten(), masks.flatten()).item()


def with_ignite(case: Case) -> Numbers:
    from ignite.metrics import ROC_AUC, SSIM, AveragePrecision
    scores, labels, maps, masks = case.tensors

    def value(metric, *pair: Tensor) -> float:
        metric.reset()
        metric.update(pair)
        return float(metric.compute())

    yield "image AUROC", "ROC_AUC", lambda: value(ROC_AUC(), scores, labels)
    yield "image AP", "AveragePrecision", lambda: value(AveragePrecision(), scores, labels)
    yield "pixel AUROC", "ROC_AUC", lambda: value(ROC_AUC(), maps.flatten(), masks.flatten())
    yield ("pixel AP", "AveragePrecision",
           lambda: value(AveragePrecision(), maps.flatten(), masks.flatten()))
    yield "SSIM", "data_range=1.0", lambda: value(SSIM(data_range=1.0), *case.image_pair)


def with_scikit_image(case: Case) -> Numbers:
    from skimage.metrics import structural_similarity
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(*case.image_pair)]

    def value(**options) -> float:
        return float(np.mean([structural_similarity(a, b, channel_axis=0, data_range=1.0, **options)
                              for a, b in pairs]))

    yield ("SSIM", "gaussian_weights, sigma 1.5, use_sample_covariance=False",
           lambda: value(gaussian_weights=True, sigma=1.5, use_sample_covariance=False))
    yield "SSIM", "defaults (window 7 x 7), data_range=1.0", value


def with_kornia(case: Case) -> Numbers:
    from kornia.losses import BinaryFocalLossWithLogits
    from kornia.metrics import ssim
    yield ("SSIM", "metrics.ssim, window 11, its default padding",
           lambda: ssim(*case.image_pair, 11).mean().item())
    yield ("SSIM", 'metrics.ssim, window 11, padding="valid"',
           lambda: ssim(*case.image_pair, 11, padding="valid").mean().item())
    yield ("focal loss", "BinaryFocalLossWithLogits(alpha=0.25, gamma=2)",
           lambda: BinaryFocalLossWithLogits(alpha=0.25, gamma=2.0, reduction="mean")(
               case.logits, case.target).item())


def with_monai(case: Case) -> Numbers:
    from monai.losses import FocalLoss
    from monai.metrics import SSIMMetric
    yield ("SSIM", "SSIMMetric(2, data_range=1.0)",
           lambda: SSIMMetric(spatial_dims=2, data_range=1.0)(*case.image_pair).mean().item())
    yield ("focal loss", "FocalLoss(alpha=0.25, gamma=2)",
           lambda: FocalLoss(gamma=2.0, alpha=0.25)(case.logits, case.target).item())


def with_pytorch_msssim(case: Case) -> Numbers:
    from pytorch_msssim import ssim
    yield "SSIM", "data_range=1.0", lambda: ssim(*case.image_pair, data_range=1.0).item()
    yield "SSIM", "defaults (data_range 255)", lambda: ssim(*case.image_pair).item()


def with_piq(case: Case) -> Numbers:
    from piq import ssim
    yield "SSIM", "data_range=1.0", lambda: ssim(*case.image_pair, data_range=1.0).item()
    large = [F.interpolate(x, scale_factor=3) for x in case.image_pair]
    yield ("SSIM", "the same images at 384 px, downsample=True (its default) less downsample=False",
           lambda: our_values(case)["SSIM"] + (ssim(*large).item()
                                               - ssim(*large, downsample=False).item()))


def with_pyiqa(case: Case) -> Numbers:
    import pyiqa
    for name in ("ssim", "ssimc"):
        yield ("SSIM", f'create_metric("{name}")', lambda: pyiqa.create_metric(
            name, device="cpu")(*case.image_pair).mean().item())


def with_sewar(case: Case) -> Numbers:
    from sewar.full_ref import ssim
    from sewar.utils import Filter
    pairs = [[x.permute(1, 2, 0).double().numpy() for x in pair] for pair in zip(*case.image_pair)]
    gauss = {"fltr": Filter.GAUSSIAN, "sigma": 1.5, "ws": 11}
    yield ("SSIM", "defaults (uniform window 11 x 11), MAX=1.0",
           lambda: float(np.mean([ssim(a, b, MAX=1.0)[0] for a, b in pairs])))
    yield ("SSIM", "Gaussian window of sigma 1.5, MAX=1.0",
           lambda: float(np.mean([ssim(a, b, MAX=1.0, fltr_specs=gauss)[0] for a, b in pairs])))


def with_torchvision(case: Case) -> Numbers:
    from torchvision.ops import sigmoid_focal_loss
    yield ("focal loss", "sigmoid_focal_loss(alpha=0.25, gamma=2), which this repository calls",
           lambda: sigmoid_focal_loss(case.logits, case.target, reduction="mean").item())


def with_segmentation_models(case: Case) -> Numbers:
    from segmentation_models_pytorch.losses import FocalLoss
    yield ("focal loss", 'FocalLoss("binary", alpha=0.25)',
           lambda: FocalLoss("binary", alpha=0.25)(case.logits, case.target).item())
    yield ("focal loss", 'FocalLoss("binary"), its defaults',
           lambda: FocalLoss("binary")(case.logits, case.target).item())


# In the order of the table, by the names under which pip installs them.
PACKAGES: dict[str, Callable[[Case], Numbers]] = {
    BRUTE_FORCE: with_brute_force, "scikit-learn": with_scikit_learn, "scipy": with_scipy,
    "torchmetrics": with_torchmetrics, "anomalib": with_anomalib, "ADEval": with_adeval,
    "pyaupro": with_pyaupro, "pyimgano": with_pyimgano, "imgad": with_imgad,
    "torcheval": with_torcheval, "pytorch-ignite": with_ignite, "scikit-image": with_scikit_image,
    "kornia": with_kornia, "monai": with_monai, "pytorch-msssim": with_pytorch_msssim,
    "piq": with_piq, "pyiqa": with_pyiqa, "sewar": with_sewar, "torchvision": with_torchvision,
    "segmentation-models-pytorch": with_segmentation_models}


def versions() -> dict[str, str]:
    """The installed packages of the table and their versions."""
    installed = {BRUTE_FORCE: ""}
    for package in PACKAGES:
        try:
            installed.setdefault(package, version(package))
        except PackageNotFoundError:
            pass
    return {package: installed[package] for package in PACKAGES if package in installed}


# ---------------------------------------------------------------- the table

def rows_of(case: Case, installed: dict[str, str]) -> list[dict]:
    """A row for every call of the installed packages, with the fields FIELDS.

    A call that raises has an empty value, and the error stands in its note.
    """
    ours = our_values(case)
    rows = []
    for package, release in installed.items():
        for metric, call, compute in PACKAGES[package](case):
            note, value = call, math.nan
            try:
                value = float(compute())
            except Exception as error:               # an old package on a new numpy, say: report it
                note = f"{call}: {type(error).__name__}: {str(error).splitlines()[0]}"
            known = not math.isnan(value)
            rows.append({"metric": metric, "maps": case.kind, "package": package,
                         "version": release, "value": f"{value:.7f}" if known else "",
                         "ours": f"{ours[metric]:.7f}",
                         "difference": f"{value - ours[metric]:.2e}" if known else "",
                         "note": note})
    return rows


def shown(difference: str) -> str:
    """A difference as the table shows it; below 1e-5 it is a matter of float32 and the machine."""
    if not difference:
        return "error"
    value = float(difference)
    if abs(value) < 1e-5:
        return "0"
    return f"{value:+.5f}" if abs(value) < 1e-3 else f"{value:+.3f}"


def table(rows: list[dict]) -> list[str]:
    """The rows as Markdown, a table for each metric: the differences on the three kinds of maps."""
    lines = []
    for metric in METRICS:
        of_metric = [row for row in rows if row["metric"] == metric]
        if not of_metric:
            continue
        lines += ["", f"### {metric}", "", f"| package, call | {' | '.join(KINDS)} |",
                  "|---|" + "---|" * len(KINDS)]
        values = {row["maps"]: f"{float(row['ours']):.4f}" for row in of_metric}
        lines.append(f"| **this repository** | {' | '.join(values.get(k, '') for k in KINDS)} |")
        calls = dict.fromkeys((row["package"], row["version"], row["note"].split(": ")[0])
                              for row in of_metric)
        for package, release, call in calls:
            cells = {row["maps"]: shown(row["difference"]) for row in of_metric
                     if (row["package"], row["note"].split(": ")[0]) == (package, call)}
            lines.append(f"| {' '.join((package, release)).strip()}, {call} | "
                         f"{' | '.join(cells.get(k, '') for k in KINDS)} |")
    return lines


def command_line() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=ROOT / "results" / "compare_metrics.csv",
                        help="file to write (default results/compare_metrics.csv)")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = command_line().parse_args(argv)
    installed = versions()
    warnings.simplefilter("ignore")
    rows = [row for case in draw_cases() for row in rows_of(case, installed)]
    print("\n".join(table(rows)))
    print(f"\n{len(installed) - 1} packages; differences are the package's value less ours, and 0 "
          f"stands for less than 0.00001")
    missing = [package for package in PACKAGES if package not in installed]
    if missing:
        print("not installed, so not compared: " + ", ".join(missing))
        print("  pip install " + " ".join(missing))
    try:
        with open(flags.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        print(f"error: {flags.csv}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
