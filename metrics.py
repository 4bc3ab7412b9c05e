"""Scores of anomaly maps: image and pixel AUROC and AP, F1-max, AUPRO, a threshold from normals.

AUPRO is written out because its definition matters, and the other pixel metrics are made by the
same curve, in a fraction of a library's memory; the image metrics are scikit-learn's. No torch.
"""
import warnings
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.stats import beta
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score


def aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate of `limit`, in 0..1.

    MVTec AD's evaluation, exactly: every distinct score is a threshold; a pixel of a region adds
    1 / |region| to the mean overlap, a normal pixel of any image, good ones included, 1 / number of
    normal pixels to the rate; the area is divided by `limit`. maps: [N, H, W], larger is more
    anomalous; masks: bool [N, H, W]. Raises ValueError if there is no anomalous or no normal pixel.
    """
    return area(*weighted_roc(maps, masks, region_weights(masks)), limit) / limit


def region_weights(masks: np.ndarray) -> np.ndarray:
    """1 / |region| of every anomalous pixel, float64 in the order of maps[masks].

    masks: bool [N, H, W]. A region is 8-connected and lies within one image.
    """
    weights = []
    for mask in masks:
        regions, _ = ndimage.label(mask, np.ones((3, 3)))
        inside = regions[mask]
        weights.append(1 / np.bincount(inside)[inside])
    return np.concatenate(weights)


def weighted_roc(maps: np.ndarray, masks: np.ndarray,
                 weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False-positive rate and weighted true-positive rate, from (0, 0) to (1, 1).

    weights: of the anomalous pixels, in the order of maps[masks]. The curve rises only at their
    scores, so these alone are the thresholds, each with two points: before it, and with the pixels
    of this very score, normal ones among them. Other arguments and errors as in `aupro`.
    """
    if not masks.any() or masks.all():
        raise ValueError("pixel metrics need at least one anomalous and one normal pixel")
    thresholds, place = np.unique(maps[masks], return_inverse=True)
    hit = np.cumsum(np.bincount(place, weights)[::-1]) / weights.sum()    # thresholds falling
    normal = np.sort(maps[~masks])
    before, with_it = (1 - np.searchsorted(normal, thresholds[::-1], side) / len(normal)
                       for side in ("right", "left"))
    fpr = np.stack([before, with_it], 1).ravel()
    tpr = np.stack([np.append(0.0, hit[:-1]), hit], 1).ravel()
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], tpr, [1.0]])


def area(fpr: np.ndarray, tpr: np.ndarray, limit: float = 1.0) -> float:
    """Area under a curve up to fpr = limit, where it is interpolated: trapezoids."""
    k = np.searchsorted(fpr, limit)                         # the first point at or past the limit
    at_limit = np.interp(limit, fpr[k - 1:k + 1], tpr[k - 1:k + 1])
    return float(np.trapezoid(np.append(tpr[:k], at_limit), np.append(fpr[:k], limit)))


def pixel_metrics(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Pixel AUROC, pixel AP (both as scikit-learn's) and AUPRO. Arguments as in `aupro`."""
    anomalous = int(masks.sum())
    fpr, tpr = weighted_roc(maps, masks, np.ones(anomalous))
    false, true = fpr[2::2] * (masks.size - anomalous), tpr[2::2] * anomalous  # with each threshold
    return {"pixel_auroc": area(fpr, tpr),
            "pixel_ap": float(np.sum(np.diff(tpr[::2]) * true / (true + false))),
            "aupro": aupro(maps, masks)}


def evaluate(labels: np.ndarray, scores: np.ndarray, maps: np.ndarray | None = None,
             masks: np.ndarray | None = None) -> dict[str, float]:
    """All metrics of a test set, fractions in 0..1.

    labels: [N] in {0, 1}; scores: [N]; maps: [N, H, W]; masks: bool [N, H, W], or None where there
    is no ground truth. image_f1max: the best F1 of all thresholds, which sees the labels: an upper
    bound, not a result. What is undefined (no defective or no good image, no masks) is NaN, with a
    warning that names it.
    """
    labels = np.asarray(labels).astype(int)
    results = dict.fromkeys(("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap",
                             "aupro"), float("nan"))
    if 0 < labels.sum() < len(labels):
        precision, recall, _ = precision_recall_curve(labels, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        results.update(image_auroc=float(roc_auc_score(labels, scores)),
                       image_ap=float(average_precision_score(labels, scores)),
                       image_f1max=float(f1.max()))
    else:
        missing = "good" if labels.sum() else "defective"
        warnings.warn(f"the test set has no {missing} image: image metrics are undefined")
    if masks is None:
        warnings.warn("there is no ground truth: pixel metrics are undefined")
    elif not masks.any() or masks.all():
        missing = "normal" if masks.any() else "anomalous"
        warnings.warn(f"the masks have no {missing} pixel: pixel metrics are undefined")
    else:
        results.update(pixel_metrics(maps, masks))
    return results


class Threshold(NamedTuple):
    """A score above `value` is an alarm; on normal images that happens at `rate`, on average over
    held-out samples of this size, and for this very sample within `low`..`high` (95 %)."""
    value: float
    rate: float
    low: float
    high: float


def normal_threshold(scores: np.ndarray, false_alarms: float = 0.05) -> Threshold:
    """A threshold from scores of normal images alone.

    The k-th largest of n scores, k = floor(false_alarms (n + 1)), is exceeded by a new one with
    probability k / (n + 1) on average; given the sample, that probability is Beta(k, n + 1 - k)
    distributed. With too few scores for the rate asked for (k = 0) the largest is taken. Raises
    ValueError where there are none.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    n = len(ordered)
    if n == 0:
        raise ValueError("a threshold needs scores of normal images")
    k = min(n, max(1, int(np.floor(false_alarms * (n + 1) + 1e-9))))   # 0.05 * 20 is 1, not less
    low, high = beta.ppf([0.025, 0.975], k, n + 1 - k)
    return Threshold(float(ordered[k - 1]), k / (n + 1), float(low), float(high))
