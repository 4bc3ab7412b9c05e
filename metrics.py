"""Scores of anomaly maps: image and pixel AUROC and AP, F1-max, AUPRO, a threshold from normals.

AUPRO is written out because its definition matters, and the other pixel metrics follow from the same
sorted pixels; the image metrics are scikit-learn's. No torch.
"""
import warnings
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.stats import beta
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score


def region_weights(masks: np.ndarray) -> tuple[np.ndarray, int]:
    """1 / |region| of every anomalous pixel, float64 in the order of x[masks], and the number of
    regions.

    masks: bool [N, H, W]. A region is 8-connected and lies within one image.
    """
    weights, count = [], 0
    for mask in masks:
        regions, found = ndimage.label(mask, np.ones((3, 3)))
        inside = regions[mask]
        weights.append(1 / np.bincount(inside)[inside])
        count += found
    return np.concatenate(weights), count


class Ranking(NamedTuple):
    """The anomalous pixels' distinct scores, from the highest down, and what lies above them.

    order: the anomalous pixels by falling score; last: the place in it of each distinct score's
    last pixel; above, reached: how many normal pixels score more, and at least as much.
    """
    order: np.ndarray
    last: np.ndarray
    above: np.ndarray
    reached: np.ndarray
    normals: int


def rank_pixels(maps: np.ndarray, masks: np.ndarray) -> Ranking:
    """All that the pixel metrics need, by sorting the normal and the anomalous pixels apart.

    maps: [N, H, W], larger is more anomalous; masks: bool [N, H, W]. Raises ValueError if there is
    no anomalous or no normal pixel.
    """
    if not masks.any() or masks.all():
        raise ValueError("pixel metrics need at least one anomalous and one normal pixel")
    scores, normal = maps[masks], np.sort(maps[~masks])
    order = np.argsort(scores)[::-1]
    scores = scores[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    above, reached = (len(normal) - np.searchsorted(normal, scores[last], side)
                      for side in ("right", "left"))
    return Ranking(order, last, above, reached, len(normal))


def corners(ranking: Ranking, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve of `after` (its value once each distinct score is reached) over the false-positive
    rate, from (0, 0) to (1, 1).

    It moves only at an anomalous pixel's score, so it has two corners at each: before and after
    the pixels of that very score, the normal ones among them.
    """
    false = np.stack([ranking.above, ranking.reached], 1).ravel() / ranking.normals
    value = np.stack([np.append(0.0, after[:-1]), after], 1).ravel()
    return np.concatenate([[0.0], false, [1.0]]), np.concatenate([[0.0], value, [1.0]])


def pro_curve(maps: np.ndarray, masks: np.ndarray,
              ranking: Ranking | None = None) -> tuple[np.ndarray, np.ndarray]:
    """False-positive rate and mean overlap of the regions, the corners of the curve over all
    thresholds from (0, 0) to (1, 1).

    MVTec AD's evaluation: a pixel of a region adds 1 / |region|, a normal pixel of any image, the
    good ones included, 1 / number of normal pixels; equal scores are one point of the curve.
    Arguments and errors as in `rank_pixels`.
    """
    ranking = ranking or rank_pixels(maps, masks)
    weights, count = region_weights(masks)
    return corners(ranking, np.cumsum(weights[ranking.order])[ranking.last] / count)


def aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3,
          ranking: Ranking | None = None) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate of `limit`, in 0..1.

    Exact: every distinct score is a threshold, the trapezoid is interpolated at the limit and the
    area divided by it. Arguments and errors as in `rank_pixels`.
    """
    false, overlap = pro_curve(maps, masks, ranking)
    k = np.searchsorted(false, limit)                       # the first point at or past the limit
    share = (limit - false[k - 1]) / (false[k] - false[k - 1])
    at_limit = overlap[k - 1] + share * (overlap[k] - overlap[k - 1])
    return float(np.trapezoid(np.append(overlap[:k], at_limit),
                              np.append(false[:k], limit)) / limit)


def pixel_metrics(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Pixel AUROC, pixel AP (both as scikit-learn's, in a fraction of its memory) and AUPRO."""
    ranking = rank_pixels(maps, masks)
    hits = ranking.last + 1                                 # anomalous pixels found so far
    found = hits / hits[-1]
    precision = hits / (hits + ranking.reached)
    return {"pixel_auroc": float(np.trapezoid(*reversed(corners(ranking, found)))),
            "pixel_ap": float(np.sum(np.diff(found, prepend=0.0) * precision)),
            "aupro": aupro(maps, masks, ranking=ranking)}


def f1_max(labels: np.ndarray, scores: np.ndarray) -> float:
    """Best F1 over all thresholds, which looks at the labels: an upper bound, not a result."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def evaluate(labels: np.ndarray, scores: np.ndarray, maps: np.ndarray | None = None,
             masks: np.ndarray | None = None) -> dict[str, float]:
    """All metrics of a test set, fractions in 0..1.

    labels: [N] in {0, 1}; scores: [N]; maps: [N, H, W]; masks: bool [N, H, W], or None where there
    is no ground truth. What is undefined (no defective or no good image, no masks) is NaN, with a
    warning that names it.
    """
    nan, labels = float("nan"), np.asarray(labels).astype(int)
    results = dict.fromkeys(("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap",
                             "aupro"), nan)
    if 0 < labels.sum() < len(labels):
        results.update(image_auroc=float(roc_auc_score(labels, scores)),
                       image_ap=float(average_precision_score(labels, scores)),
                       image_f1max=f1_max(labels, scores))
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


def normal_threshold(scores: np.ndarray, false_alarms: float = 0.05,
                     n: int | None = None) -> Threshold:
    """A threshold from scores of normal images (or pixels) alone.

    The k-th largest of n scores, k = floor(false_alarms (n + 1)), is exceeded by a new one with
    probability k / (n + 1) on average; given the sample, that probability is Beta(k, n + 1 - k)
    distributed. With too few scores for the rate asked for (k = 0) the largest is taken. scores:
    all n of them, or the largest of n. Raises ValueError where there are none, or where so few of
    the n are given that the k-th is not among them.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    n = n or len(ordered)
    if n == 0:
        raise ValueError("a threshold needs scores of normal images")
    k = min(n, max(1, int(np.floor(false_alarms * (n + 1) + 1e-9))))
    if k > len(ordered):
        raise ValueError(f"a false-alarm rate of {false_alarms} needs the {k} largest scores of "
                         f"{n}, and {len(ordered)} are kept")
    low, high = beta.ppf([0.025, 0.975], k, n + 1 - k)
    return Threshold(float(ordered[k - 1]), k / (n + 1), float(low), float(high))
