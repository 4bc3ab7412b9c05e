"""Scores of anomaly maps: image and pixel AUROC and AP, F1-max, AUPRO, a threshold from normals.

AUPRO is implemented here because its definition matters. The other pixel metrics use the same
curve, in a fraction of a library's memory. The image metrics are scikit-learn's. No torch.
"""
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.stats import beta, mannwhitneyu
from sklearn.metrics import (average_precision_score, f1_score, precision_recall_curve,
                             roc_auc_score)


def checked_masks(masks: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Ground truth as bool [N, H, W]. masks: of any dtype, with the values 0 and 1.

    Raises ValueError for other values (0 and 255, say) and for another shape than the maps'.
    """
    masks, shape = np.asarray(masks), np.shape(maps)
    if masks.shape != shape or masks.ndim != 3:
        raise ValueError(f"masks {list(masks.shape)} and maps {list(shape)}: both must have the "
                         f"same shape [N, H, W]")
    if masks.dtype != bool:
        values = np.unique(masks)
        if not np.isin(values, (0, 1)).all():
            raise ValueError(f"masks hold the values {', '.join(f'{v:g}' for v in values[:5])}: "
                             f"only 0 and 1 are allowed; pass masks > 0, say")
    return masks.astype(bool)


def aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate of `limit`, in 0..1.

    MVTec AD's evaluation, exactly: every distinct score is a threshold; a pixel of a region adds
    1 / |region| to the mean overlap, a normal pixel of any image, good ones included, 1 / number of
    normal pixels to the rate; the area is divided by `limit`. maps: [N, H, W], larger is more
    anomalous; masks: [N, H, W] in {0, 1}, of any dtype. Raises ValueError for other masks (see
    `checked_masks`) and if there is no anomalous or no normal pixel.
    """
    masks = checked_masks(masks, maps)
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

    weights: one per anomalous pixel, in the order of maps[masks]. The curve rises only at the
    scores of these pixels, so only they are thresholds. Each has two points: without and with the
    pixels of exactly this score, normal ones included. Other arguments and errors as in `aupro`.
    """
    if not masks.any() or masks.all():
        raise ValueError("pixel metrics need at least one anomalous and one normal pixel")
    thresholds, index = np.unique(maps[masks], return_inverse=True)
    hit = np.cumsum(np.bincount(index, weights)[::-1]) / weights.sum()    # thresholds falling
    normal = np.sort(maps[~masks])
    before, with_it = (1 - np.searchsorted(normal, thresholds[::-1], side) / len(normal)
                       for side in ("right", "left"))
    fpr = np.stack([before, with_it], 1).ravel()
    tpr = np.stack([np.append(0.0, hit[:-1]), hit], 1).ravel()
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], tpr, [1.0]])


def area(fpr: np.ndarray, tpr: np.ndarray, limit: float = 1.0) -> float:
    """Area under a curve up to fpr = limit by trapezoids; the last point is interpolated."""
    k = np.searchsorted(fpr, limit)                         # the first point at or past the limit
    at_limit = np.interp(limit, fpr[k - 1:k + 1], tpr[k - 1:k + 1])
    return float(np.trapezoid(np.append(tpr[:k], at_limit), np.append(fpr[:k], limit)))


def pixel_metrics(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Pixel AUROC, pixel AP (both as scikit-learn's) and AUPRO. Arguments as in `aupro`."""
    masks = checked_masks(masks, maps)
    anomalous = int(masks.sum())
    fpr, tpr = weighted_roc(maps, masks, np.ones(anomalous))
    false, true = fpr[2::2] * (masks.size - anomalous), tpr[2::2] * anomalous  # with each threshold
    return {"pixel_auroc": area(fpr, tpr),
            "pixel_ap": float(np.sum(np.diff(tpr[::2]) * true / (true + false))),
            "aupro": aupro(maps, masks)}


def evaluate(labels: np.ndarray, scores: np.ndarray, maps: np.ndarray | None = None,
             masks: np.ndarray | None = None) -> dict[str, float]:
    """All metrics of a test set, fractions in 0..1.

    labels: [N] in {0, 1}; scores: [N]; maps: [N, H, W]; masks: [N, H, W] in {0, 1}, of any dtype,
    or None where there is no ground truth. image_f1max: the best F1 of all thresholds, which sees
    the labels: an upper bound, not a result. An undefined metric (no defective or no good image, no
    masks) is NaN, and a warning gives the reason. Raises ValueError for other masks (see
    `checked_masks`).
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
        return results
    masks = checked_masks(masks, maps)
    if not masks.any() or masks.all():
        missing = "normal" if masks.any() else "anomalous"
        warnings.warn(f"the masks have no {missing} pixel: pixel metrics are undefined")
    else:
        results.update(pixel_metrics(maps, masks))
    return results


class Threshold(NamedTuple):
    """A score above `value` is an alarm. `rate` is the false alarm rate on normal images, averaged
    over held-out samples of this size; for this sample, it lies in `low`..`high` (95 %). `count`
    is the number of scores that set it."""
    value: float
    rate: float
    low: float
    high: float
    count: int


# A score stands out if it lies so many times as far above the median as the 90 % quantile does:
NAMED = 2            # its image is named
ODD = 4              # it sets no threshold, either
FEWEST = 3           # held-out images: the median of fewer follows a single odd one
CLEARLY = 0.1        # level of the rank test: held-out images score higher than the training's
MEMORISED = 30       # training images: fewer promise no false alarm rate (docs/own_parts.md)
MANY_PASSES = 300    # over the training images: their scores then say little of new ones (the same)


def stand_out(scores: np.ndarray, times: float = ODD) -> np.ndarray:
    """Which scores of normal images lie far above the others, bool [N].

    Those more than `times` as far above the median as nine tenths of the scores reach: with ODD one
    in 7 million of normally distributed scores, one in 1,250 of exponentially distributed ones;
    with NAMED one in 200 and one in 50. Never more than a tenth of them, hardly ever one of fewer
    than ten, and none within `times` 2 % of the median.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not len(scores):
        return np.zeros(0, bool)
    median, upper = np.quantile(scores, [0.5, 0.9])
    return scores > median + times * max(upper - median, 0.02 * median)


def normal_threshold(scores: np.ndarray, false_alarms: float = 0.05, odd: int = 0) -> Threshold:
    """A threshold from scores of normal images alone.

    The k-th largest of n scores, k = floor(false_alarms (n + 1)), is exceeded by a new score with
    probability k / (n + 1) on average; given the sample, that probability is Beta(k, n + 1 - k)
    distributed. With too few scores for the requested rate (k = 0), the largest score is taken.
    odd: of so many, the largest scores, none is taken; they count as false alarms. Raises
    ValueError if there are no scores.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    n = len(ordered)
    if n == 0:
        raise ValueError("a threshold needs scores of normal images")
    k = int(np.floor(false_alarms * (n + 1) + 1e-9))                   # 0.05 * 20 is 1, not less
    k = min(n, max(1 + odd, k))
    return Threshold(float(ordered[k - 1]), *rate_above(k, n), n)


def rate_above(k: int, n: int) -> tuple[float, float, float]:
    """The rate at which new scores exceed the k-th largest of n: its mean and its 95 % interval."""
    low, high = beta.ppf([0.025, 0.975], k, n + 1 - k)
    return k / (n + 1), float(low), float(high)


@dataclass(frozen=True)
class CalibrationScores:
    """Image scores from which a threshold is set; a checkpoint contains them.

    held_out: scores of normal images that were not trained on; training: of some that were;
    synthetic: of `evaluate.synthetic_defects`; infer_steps: the network calls per image.
    """
    held_out: list[float]
    training: list[float]
    synthetic: list[float]
    infer_steps: int


def normal_scores(scores: CalibrationScores) -> np.ndarray:
    """The scores of held-out, then of training images, [N].

    The training's are raised by a factor to the median of the held-out ones where that is higher: a
    network that memorises its images scores them too low. They are never lowered.
    """
    held_out, training = np.array(scores.held_out), np.array(scores.training)
    if len(held_out) >= FEWEST and len(training) and np.median(training) > 0:
        training = training * max(1.0, np.median(held_out) / np.median(training))
    return np.concatenate([held_out, training])


def odd_ones(scores: CalibrationScores) -> list[tuple[int, float]]:
    """Index and score of the held-out and training images worth a look, the highest first.

    The held-out images are counted first, then the training's. Of the demo's 80 good parts one to
    three are among them. An image that was trained on scores lower than a new one with its defect.
    """
    comparable, own = normal_scores(scores), scores.held_out + scores.training
    odd = np.flatnonzero(stand_out(comparable, NAMED))
    return [(int(k), own[k]) for k in odd[np.argsort(-comparable[odd])]]


def threshold(scores: CalibrationScores, false_alarms: float) -> Threshold:
    """The threshold for images and, because a score is its map's maximum (Eq. 11), for the regions
    of a map.

    It is the `normal_threshold` of the `normal_scores`, held-out and training images together, so
    that a single held-out image does not decide. Where the held-out images, even without their
    highest, lie clearly above the training's (a rank test), it is not below the threshold of the
    held-out ones alone: the training's scores may then have a smaller spread, too. Scores that
    `stand_out` do not set it. A network memorises a few images, so that the scores of fewer than
    MEMORISED training images promise nothing: then the rate is that of the held-out ones alone.
    """
    held_out, samples = sorted(scores.held_out), [normal_scores(scores)]
    if held_out and scores.training and mannwhitneyu(
            held_out[:-1] or held_out, scores.training, alternative="greater").pvalue <= CLEARLY:
        samples.append(np.array(held_out))
    limit = max((normal_threshold(some, false_alarms, int(stand_out(some).sum()))
                 for some in samples), key=lambda limit: (limit.value, limit.rate))
    if held_out and 0 < len(scores.training) < MEMORISED:
        above = sum(score > limit.value for score in held_out)
        k = min(above + 1, len(held_out))
        limit = Threshold(limit.value, *rate_above(k, len(held_out)), limit.count)
    return limit


def synthetic_detection_rate(scores: CalibrationScores, limit: Threshold) -> float | None:
    """Share of the synthetic defects above a threshold."""
    if not scores.synthetic:
        return None
    return float((np.array(scores.synthetic) > limit.value).mean())


def describe_threshold(scores: CalibrationScores, limit: Threshold) -> str:
    """Describe a threshold: its false alarm rate with a range, its synthetic detection rate."""
    counts = f"{len(scores.held_out)} held-out"
    if limit.count > len(scores.held_out):                 # else the held-out images alone set it
        counts += f" and {len(scores.training)} training"
    lines = [f"threshold {limit.value:.4f}, from {counts} images",
             f"  expected false alarm rate: {100 * limit.rate:.0f} % of good parts (plausible "
             f"range {100 * limit.low:.0f} to {100 * limit.high:.0f} %)"]
    rate = synthetic_detection_rate(scores, limit)
    if rate is not None:
        count = len(scores.synthetic)
        lines.append(f"  detection rate on {count} faint synthetic defects: {100 * rate:.0f} % "
                     f"({round(rate * count)} of {count})")
    return "\n".join(lines)


def threshold_metrics(calibration: CalibrationScores | None, false_alarms: float,
                      labels: np.ndarray, scores: np.ndarray) -> dict:
    """The threshold from normal images, and its false alarm and detection rates on the test set.

    image_auroc_held_out: the image AUROC with the held-out images in place of the test set's good
    images. It differs if these differ from the other normal images, for example in their light.
    """
    results = dict.fromkeys(("threshold", "false_alarms_promised", "false_alarm_rate",
                             "detection_rate", "synthetic_found", "image_f1",
                             "image_auroc_held_out"))
    results["threshold_images"] = len(calibration.held_out) if calibration else 0
    if calibration:
        limit = threshold(calibration, false_alarms)
        alarms = scores > limit.value
        results.update(threshold=limit.value, false_alarms_promised=limit.rate,
                       synthetic_found=synthetic_detection_rate(calibration, limit),
                       image_f1=f1_score(labels, alarms, zero_division=math.nan))
        for label, name in ((0, "false_alarm_rate"), (1, "detection_rate")):
            if (labels == label).any():
                results[name] = float(alarms[labels == label].mean())
        defective = scores[labels == 1].tolist()
        if defective:
            results["image_auroc_held_out"] = float(roc_auc_score(
                [0] * len(calibration.held_out) + [1] * len(defective),
                calibration.held_out + defective))
    return results
