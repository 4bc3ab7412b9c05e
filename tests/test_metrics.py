"""Metrics against brute force, by the definition, one threshold at a time."""
import warnings

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

import metrics


def regions_of(mask):
    """8-connected regions by flood fill."""
    left = {tuple(p) for p in np.argwhere(mask)}
    regions = []
    while left:
        region, todo = set(), [left.pop()]
        while todo:
            y, x = todo.pop()
            region.add((y, x))
            for near in [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    todo.append(near)
        regions.append(sorted(region))
    return regions


def aupro_brute_force(maps, masks, limit):
    regions = [(k, r) for k, mask in enumerate(masks) for r in regions_of(mask)]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        hit = maps >= threshold
        overlap = np.mean([np.mean([hit[k][p] for p in r]) for k, r in regions])
        points.append((hit[~masks].mean(), overlap))
    points.append((1.0, 1.0))
    area = 0.0
    for (f0, p0), (f1, p1) in zip(points, points[1:]):
        if f0 >= limit:
            break
        if f1 > limit:
            f1, p1 = limit, p0 + (p1 - p0) * (limit - f0) / (f1 - f0)
        area += (f1 - f0) * (p0 + p1) / 2
    return area / limit


def random_case(seed, levels):
    rng = np.random.default_rng(seed)
    masks = rng.random((4, 9, 11)) < 0.15
    masks[3] = False                                                # a good image counts too
    masks[0, 2:4, 2:4] = masks[0, 4, 4] = True                      # touching at a corner only
    maps = rng.random((4, 9, 11)) + 0.3 * masks
    return (np.round(maps * levels) if levels else maps), masks


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [0, 2, 5, 20])                    # 0: no ties
@pytest.mark.parametrize("seed", range(4))
def test_aupro_against_brute_force(seed, levels, limit):
    maps, masks = random_case(seed, levels)
    assert metrics.aupro(maps, masks, limit) == pytest.approx(
        aupro_brute_force(maps, masks, limit), abs=1e-12)


def test_aupro_of_known_maps():
    masks = np.zeros((2, 10, 10), bool)
    masks[0, :2, :2] = masks[0, 5:, 5:] = True
    assert metrics.aupro(masks.astype(float), masks) == pytest.approx(1)
    assert metrics.aupro(np.zeros(masks.shape), masks) == pytest.approx(0.15)   # one point: (1, 1)
    small_only = np.zeros(masks.shape)
    small_only[0, :2, :2] = 1                   # overlap 1/2 at no false alarm, then to (1, 1)
    assert metrics.aupro(small_only, masks) == pytest.approx(0.5 + 0.5 * 0.3 / 2)


def test_a_jump_at_the_limit_itself_does_not_count():
    maps = np.array([[[3.0, 3, 3, 2, 1, 1, 1, 1, 1, 1, 1]]])
    masks = np.array([[[False] * 3 + [True] + [False] * 7]])
    assert metrics.aupro(maps, masks, 0.3) == pytest.approx(0)


@pytest.mark.parametrize("levels", [0, 5])
def test_a_monotone_rescaling_does_not_move_aupro(levels):
    maps, masks = random_case(0, levels)
    before = metrics.aupro(maps, masks)
    for change in (np.sqrt, lambda m: m ** 9, lambda m: 1e-6 * m, lambda m: np.exp(5 * m)):
        assert metrics.aupro(change(maps.astype(np.float64)), masks) == pytest.approx(before,
                                                                                      abs=1e-12)


def test_regions_do_not_join_across_images():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 3, :2] = masks[1, 0, 0] = True
    weights = metrics.region_weights(masks)
    assert weights.tolist() == [0.5, 0.5, 1]


def test_corner_pixels_touch():
    """8-connected: two pixels that share a corner are one region."""
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 1, 1] = masks[0, 2, 2] = True
    weights = metrics.region_weights(masks)
    assert weights.tolist() == [0.5, 0.5]


def test_evaluate_against_pairs():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 6 + [1] * 9)
    scores = np.round(rng.random(15) + 0.4 * labels, 1)
    masks = (rng.random((15, 5, 5)) < 0.2) & (labels[:, None, None] == 1)
    maps = np.round(rng.random((15, 5, 5)) + 0.4 * masks, 1)
    results = metrics.evaluate(labels, scores, maps, masks)

    def auroc(truth, values):
        return np.mean([(p > q) + 0.5 * (p == q) for p in values[truth] for q in values[~truth]])

    assert results["image_auroc"] == pytest.approx(auroc(labels == 1, scores))
    assert results["pixel_auroc"] == pytest.approx(auroc(masks.ravel(), maps.ravel()))
    assert results["aupro"] == pytest.approx(aupro_brute_force(maps, masks, 0.3))
    best = max(2 * ((scores >= s) & (labels == 1)).sum() / ((scores >= s).sum() + 9)
               for s in scores)
    assert results["image_f1max"] == pytest.approx(best)
    precision = [((scores >= s) & (labels == 1)).sum() / (scores >= s).sum()
                 for s in sorted(set(scores), reverse=True)]
    recall = [0] + [((scores >= s) & (labels == 1)).sum() / 9
                    for s in sorted(set(scores), reverse=True)]
    assert results["image_ap"] == pytest.approx(np.sum(np.diff(recall) * precision))


@pytest.mark.parametrize("label, missing", [(0, "defective"), (1, "good")])
def test_a_one_sided_test_set_gives_nan_and_the_rest(label, missing):
    masks = np.zeros((3, 4, 4), bool)
    masks[:, 1, 1] = bool(label)
    with pytest.warns(UserWarning, match=f"no {missing} image"):
        results = metrics.evaluate(np.full(3, label), np.arange(3.0), masks + 0.0, masks)
    assert np.isnan(results["image_auroc"]) and np.isnan(results["image_f1max"])
    assert np.isnan(results["aupro"]) == (label == 0)
    if label:
        assert results["aupro"] == pytest.approx(1)


def test_no_ground_truth_leaves_the_image_metrics():
    with pytest.warns(UserWarning, match="no ground truth"):
        results = metrics.evaluate(np.array([0, 1]), np.array([0.1, 0.9]))
    assert results["image_auroc"] == 1 and np.isnan(results["aupro"])


def test_a_complete_test_set_gives_no_warning():
    maps, masks = random_case(0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.evaluate(masks.any((1, 2)), maps.max((1, 2)), maps, masks)


@pytest.mark.parametrize("n, asked, rank, promised", [(99, 0.05, 5, 0.05), (19, 0.05, 1, 0.05),
                                                      (10, 0.05, 1, 1 / 11), (1, 0.5, 1, 0.5)])
def test_threshold_from_normal_scores(n, asked, rank, promised):
    scores = np.random.default_rng(0).permutation(n).astype(float)
    threshold, rate, low, high, count = metrics.normal_threshold(scores, asked)
    assert low < rate < high and count == n
    assert threshold == n - rank and rate == pytest.approx(promised)


def test_threshold_keeps_its_promise_on_average():
    rng = np.random.default_rng(0)
    alarms = [np.mean(rng.normal(size=200) > metrics.normal_threshold(rng.normal(size=39), 0.1)[0])
              for _ in range(2000)]
    assert np.mean(alarms) == pytest.approx(0.1, abs=0.005)


def test_threshold_needs_scores():
    with pytest.raises(ValueError, match="normal images"):
        metrics.normal_threshold([])


def test_threshold_interval_holds_the_rate_of_this_sample():
    """Uniform scores: the rate of a sample is one minus its threshold; 95 % lie in the interval."""
    rng = np.random.default_rng(0)
    thresholds = [metrics.normal_threshold(rng.random(30), 0.1) for _ in range(4000)]
    assert all((t.low, t.high) == (thresholds[0].low, thresholds[0].high) for t in thresholds)
    inside = [t.low < 1 - t.value < t.high for t in thresholds]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("levels", [0, 2, 5, 20])
def test_pixel_metrics_are_scikit_learns(levels):
    maps, masks = random_case(1, levels)
    results = metrics.pixel_metrics(maps.astype(np.float32), masks)
    flat = maps.astype(np.float32).ravel()
    assert results["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), flat), abs=1e-12)
    assert results["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), flat),
                                              abs=1e-12)


def test_the_rate_asked_for_is_5_percent():
    assert metrics.normal_threshold(range(39)).value == 37             # 2 of 40


def test_the_best_f1_where_precision_and_recall_are_low():
    """The best threshold has precision 1/4 and recall 1/2, less than 1 together."""
    labels = np.zeros(1000, int)
    labels[[996, 0]] = 1                                               # fourth from above, and last
    with pytest.warns(UserWarning, match="no ground truth"):
        assert metrics.evaluate(labels, np.arange(1000.0))["image_f1max"] == pytest.approx(1 / 3)


def test_threshold_of_every_rate():
    """A rate of 1 takes the lowest score, a rate of 0 the highest."""
    assert metrics.normal_threshold([3, 1, 2], 1.0).value == 1
    assert metrics.normal_threshold([3, 1, 2], 0.0).value == 3


# ---------------------------------------------------------------- values and shape of the masks

@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_masks_of_any_dtype_equal_bool(dtype):
    maps, masks = random_case(2, 20)
    numbers = masks.astype(dtype)
    assert metrics.aupro(maps, numbers) == metrics.aupro(maps, masks)
    assert metrics.pixel_metrics(maps, numbers) == metrics.pixel_metrics(maps, masks)
    labels, scores = masks.any((1, 2)), maps.max((1, 2))
    assert metrics.evaluate(labels, scores, maps, numbers) == metrics.evaluate(labels, scores, maps,
                                                                               masks)


def refuses_masks(maps, masks, match):
    """All three functions that take masks refuse these."""
    labels, scores = np.array([0, 1, 0, 1]), np.arange(4.0)
    for compute in (metrics.aupro, metrics.pixel_metrics,
                    lambda *pair: metrics.evaluate(labels, scores, *pair)):
        with pytest.raises(ValueError, match=match):
            compute(maps, masks)


def test_masks_of_other_values_are_refused_by_name():
    maps, masks = random_case(2, 0)
    refuses_masks(maps, 255 * masks.astype(np.uint8), "values 0, 255: only 0 and 1")
    refuses_masks(maps, 0.5 * masks, "values 0, 0.5: only 0 and 1")
    refuses_masks(maps, np.where(masks, np.nan, 0.0), "values 0, nan: only 0 and 1")


def test_masks_of_another_shape_are_refused():
    maps, masks = random_case(2, 0)
    refuses_masks(maps, masks[:, :-1], r"masks \[4, 8, 11\] and maps \[4, 9, 11\]")
    refuses_masks(maps, masks[:3], r"masks \[3, 9, 11\] and maps \[4, 9, 11\]")
    refuses_masks(maps[0], masks[0], r"the same shape \[N, H, W\]")


# ---------------------------------------------------------------- thresholds of a run

def calibration(held_out, training=(), synthetic=()):
    return metrics.CalibrationScores(list(held_out), list(training), list(synthetic), 3)


def test_the_auroc_on_held_out_images_sees_what_light_hides():
    """Good test images that score lower than all others for another reason than their parts."""
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.01, 0.02, 0.2, 0.4])

    def auroc_held_out(scores_of_normal_images, labels, scores):
        return metrics.threshold_metrics(scores_of_normal_images, 0.05, labels,
                                         scores)["image_auroc_held_out"]

    held_out = calibration([0.3, 0.1, 0.3])
    assert auroc_held_out(held_out, labels, scores) == pytest.approx(4 / 6)
    assert auroc_held_out(held_out, labels[:2], scores[:2]) is None
    assert auroc_held_out(None, labels, scores) is None


def test_the_threshold_is_of_held_out_and_training_images():
    """The training's images add to a handful of held-out ones, and never lower their threshold."""
    few, many = [0.1, 0.2], np.linspace(0, 0.3, 98).tolist()
    assert metrics.threshold(calibration(few), 0.05).value == 0.2
    both = metrics.threshold(calibration(few, many), 0.05)
    assert both.value == np.sort(many)[-5] and both.rate == pytest.approx(5 / 101)
    low = metrics.threshold(calibration(few, [v / 10 for v in many]), 0.05)
    assert low == metrics.threshold(calibration(few), 0.05)
    synthetic = calibration(few, many, [0.1, 0.2, 0.21, 0.3])
    assert metrics.synthetic_detection_rate(synthetic, low) == 0.5
    assert metrics.synthetic_detection_rate(calibration(few), low) is None
    assert metrics.describe_threshold(synthetic, both).splitlines() == [
        f"threshold {both.value:.4f}, from 2 held-out and 98 training images",
        "  expected false alarm rate: 5 % of good parts (plausible range 2 to 10 %)",
        "  detection rate on 4 faint synthetic defects: 25 % (1 of 4)"]
    for scores in (calibration(few), synthetic):                # the held-out images alone set `low`
        assert metrics.describe_threshold(scores, low).splitlines()[0] == \
            "threshold 0.2000, from 2 held-out images"


# ---------------------------------------------------------------- one odd image does not decide

def normal_case(held_out: int, training: int, rng, memorised: float = 0.0):
    """Log-normal scores of spread 0.2; the training's lie `memorised` spreads lower."""
    return [np.exp(0.2 * (rng.normal(size=count) - shift)).tolist()
            for count, shift in ((held_out, 0.0), (training, memorised))]


def test_one_odd_held_out_image_does_not_set_the_threshold():
    """The scores of a real case: 27 held out, one of them at 0.233, the others up to 0.147."""
    rng = np.random.default_rng(0)
    held_out = [*np.linspace(0.08, 0.147, 26), 0.233]
    training = rng.uniform(0.075, 0.15, 100).tolist()
    limit = metrics.threshold(calibration(held_out, training), 0.05)
    assert 0.14 < limit.value < 0.15 and limit.rate == pytest.approx(6 / 128)
    assert metrics.odd_ones(calibration(held_out, training)) == [(26, 0.233)]


@pytest.mark.parametrize("count", [2, 3, 5, 8, 20])
def test_one_odd_image_of_few_moves_the_threshold_little(count):
    """It decides where the others lie above the training by chance: at the level of the test."""
    moved = []
    for seed in range(40):
        held_out, training = normal_case(count, 9 * count, np.random.default_rng(seed))
        odd = [5.0, *held_out[1:]]
        limits = [metrics.threshold(calibration(some, training), 0.05).value
                  for some in (held_out, odd)]
        moved.append(limits[1] / limits[0])
    assert np.median(moved) < 1.15 and np.mean(np.array(moved) > 2) < 0.2


def test_a_single_held_out_image_is_believed_and_promises_little():
    """Nothing tells whether it is odd or the training memorised its images."""
    limit = metrics.threshold(calibration([0.9], np.linspace(0.1, 0.2, 72)), 0.05)
    assert limit.value == 0.9 and limit.rate == 0.5
    pooled = metrics.threshold(calibration([0.15], np.linspace(0.1, 0.2, 72)), 0.05)
    assert pooled.value < 0.2 and pooled.rate == pytest.approx(3 / 74)


def false_alarms(held_out: int, training: int, memorised: float) -> tuple[float, float]:
    """The mean of the promised and of the true false alarm rate, over 300 deals."""
    rates, rng = [], np.random.default_rng(0)
    for _ in range(300):
        limit = metrics.threshold(calibration(*normal_case(held_out, training, rng, memorised)),
                                  0.05)
        rates.append((limit.rate, norm.sf(np.log(limit.value) / 0.2)))
    return tuple(np.mean(rates, 0))


@pytest.mark.parametrize("held_out", [4, 8, 27])
@pytest.mark.parametrize("memorised", [0.0, 0.5, 1.0, 3.0])
def test_the_promised_rate_holds_also_where_the_training_memorised_its_images(held_out, memorised):
    promised, true = false_alarms(held_out, 9 * held_out, memorised)
    assert true < 0.09 and true < promised + 0.035


def test_few_training_images_promise_nothing():
    """Two held out, 18 memorised: measured on the demo, 30 % of new good photos were above."""
    training = np.linspace(0.14, 0.18, 18)
    few = metrics.threshold(calibration([0.15, 0.17], training), 0.05)
    assert few.rate == pytest.approx(1 / 3) and few.high > 0.8 and few.count == 20
    assert few.value == max(training)                       # the threshold itself is as it was
    above = metrics.threshold(calibration([0.15, 0.17, 0.19, 0.5], training), 0.05)
    assert above.rate == pytest.approx((1 + sum(v > above.value for v in (0.15, 0.17, 0.19, 0.5)))
                                       / 5)
    enough = metrics.threshold(calibration([0.15, 0.17], np.linspace(0.14, 0.18, 36)), 0.05)
    assert enough.rate == pytest.approx(1 / 39)


def test_scores_that_are_alike_give_the_rate_asked_for():
    promised, true = false_alarms(27, 243, 0.0)
    assert true == pytest.approx(0.05, abs=0.01) and promised == pytest.approx(0.05, abs=0.005)


def test_odd_images_of_a_model_without_training_scores_count_as_false_alarms():
    held_out = [*np.linspace(0.3, 0.4, 19), 0.9]
    limit = metrics.threshold(calibration(held_out), 0.05)
    assert limit.value == 0.4 and limit.rate == pytest.approx(2 / 21)


def test_two_odd_images_of_sixty_are_named_and_hardly_another():
    named = []
    for seed in range(40):
        held_out, training = normal_case(6, 54, np.random.default_rng(seed), memorised=1.0)
        training[17], held_out[3] = 3.0, 3.5
        odd = [k for k, _ in metrics.odd_ones(calibration(held_out, training))]
        assert {3, 6 + 17} <= set(odd)
        named.append(len(odd))
    assert np.mean(named) < 3.2


def test_nothing_stands_out_of_equal_or_few_scores():
    assert not metrics.stand_out([]).any() and not metrics.stand_out([0.1] * 30 + [0.101]).any()
    assert not metrics.stand_out(np.random.default_rng(0).random(9)).any()
    assert metrics.stand_out([0.1] * 30 + [0.2]).tolist() == [False] * 30 + [True]
