"""photo_quality.py changes photos as it says; threshold_promise.py counts what a threshold lets by.
"""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import photo_quality
import threshold_promise
from helpers import ROOT, refused, rows_of, tiny
from metrics import CalibrationScores
from settings import Settings

PIXELS = np.random.default_rng(0).integers(60, 180, (40, 48, 3)).astype(np.uint8)
PHOTO = Image.fromarray(PIXELS)


def difference(photo):
    return np.asarray(photo).astype(float) - PIXELS


def test_changes_are_what_they_are_called():
    shifted = np.asarray(photo_quality.shift(PHOTO, 2))
    assert np.array_equal(shifted[2:, 2:], PIXELS[:-2, :-2])
    assert np.array_equal(shifted[:2, 2:], PIXELS[1::-1, :-2])           # mirrored
    for sigma in (1, 8):
        assert difference(photo_quality.noise(PHOTO, sigma)).std() == pytest.approx(sigma, rel=0.1)
    assert np.abs(np.asarray(photo_quality.light(PHOTO, 1.05)) - 1.05 * PIXELS).max() <= 0.5
    assert np.asarray(photo_quality.light(PHOTO, 2)).max() == 255
    errors = [np.abs(difference(photo_quality.jpeg(PHOTO, q))).mean() for q in (95, 50)]
    assert 0 < errors[0] < errors[1]
    assert np.asarray(photo_quality.blur(PHOTO, 2)).std() < 0.5 * PIXELS.std()


def test_every_change_gives_a_photo_or_an_image_of_the_models_size():
    for name, _, change in photo_quality.changes_of(16):
        size = (16, 16) if "model's size" in name or name == "resizer" else PHOTO.size
        assert change(PHOTO).size == size and change(PHOTO).mode == "RGB", name


def test_unchanged_photos_have_the_results_of_the_run(factory, monkeypatch, capsys):
    monkeypatch.setattr(photo_quality, "cv2", None)
    run, table = factory / "runs/parts/bolt", factory / "table.csv"
    argv = [str(run), "--root", str(factory), "--device", "cpu"]
    assert photo_quality.main([*argv, "--csv", str(table)]) == 0
    assert "pip install opencv-python-headless" in capsys.readouterr().out
    first, *others = rows_of(table)
    results = json.loads((run / "metrics.json").read_text())
    for name in ("threshold", "false_alarm_rate", "detection_rate", "image_auroc"):
        assert float(first[name]) == pytest.approx(results[name], abs=1e-4), name
    assert float(first["pixels_mean"]) == float(first["score_change_largest"]) == 0
    assert {row["change"] for row in others} == {name for name, *_ in
                                                 photo_quality.changes_of(32)} - {"none"}
    assert all(float(row["pixels_mean"]) > 0 for row in others)
    assert photo_quality.main([*argv, "--infer-steps", "1"]) == 0
    assert "1 network calls each" in capsys.readouterr().out


def test_the_promise_of_exchangeable_scores_is_kept_on_average():
    scores = np.random.default_rng(0).normal(size=600)
    rows = threshold_promise.promise_rows({1: scores, 1.05: scores + 1}, 0.05, 400)
    assert {row["photos"] for row in rows} == {8, 20, 50, 100, 200, 400}
    for row in rows:
        if row["light"] == 1:
            assert row["false_alarms_mean"] == pytest.approx(row["promised"], abs=0.01)
        else:
            assert row["false_alarms_mean"] > 2 * row["promised"]
        assert row["false_alarms_5"] <= row["false_alarms_mean"] <= row["false_alarms_95"]
    spread = [row["false_alarms_95"] - row["false_alarms_5"] for row in rows if row["light"] == 1]
    assert spread == sorted(spread, reverse=True)


def test_training_scores_steady_a_threshold_of_few_photos():
    scores = np.random.default_rng(0).normal(size=600)
    training = np.random.default_rng(1).normal(size=72).tolist()
    rows = [threshold_promise.promise_rows({1: scores}, 0.05, 400, (8,), some)[0]
            for some in ([], training)]
    assert [row["training_scores"] for row in rows] == [0, 72]
    assert rows[1]["promised"] == pytest.approx(0.05, abs=0.005)
    spread = [row["false_alarms_95"] - row["false_alarms_5"] for row in rows]
    assert spread[1] < spread[0] / 2


def test_fresh_photos_are_drawn_for_runs_of_the_demo_alone(tmp_path, monkeypatch, capsys):
    s = Settings(data="demo", category="gear", resize=32, crop=32, channels=8)
    for name, result in (("load_model", (tiny().eval(), s, {})),
                         ("load_run_data", SimpleNamespace(train_indices=range(72))),
                         ("calibration_scores", CalibrationScores(8 * [0.1], 72 * [0.1], [], 1))):
        monkeypatch.setattr(threshold_promise, name, lambda *_, result=result, **__: result)
    argv = ["run", "--photos", "12", "--deals", "3", "--device", "cpu", "--csv"]
    assert threshold_promise.main([*argv, str(tmp_path / "table.csv")]) == 0
    rows = rows_of(tmp_path / "table.csv")
    assert [float(row["light"]) for row in rows] == 2 * list(threshold_promise.LIGHTS)
    assert [row["training_scores"] for row in rows] == 5 * ["0"] + 5 * ["72"]
    object.__setattr__(s, "category", "cable")
    refused(capsys, [*argv, "table.csv"], "a run of cable", command=threshold_promise.main)


def test_the_page_shows_the_tables_of_results():
    page = (ROOT / "docs" / "own_parts.md").read_text()
    for tool in (photo_quality, threshold_promise):
        rows = rows_of(ROOT / "results" / f"{tool.__name__}.csv")
        assert "\n".join(tool.table(rows)) in page, tool.__name__
