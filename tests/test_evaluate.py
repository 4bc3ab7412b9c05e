"""The evaluation: metrics from maps, thresholds, synthetic defects; scoring a run folder again."""
import dataclasses
import json
import os
import pickle
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import metrics
import predict
import train
from data import load_run_data
from evaluate import score, score_maps, seconds_per_image, synthetic_defects
from helpers import argv_for, contents, interrupt, mean_std_model, refused, rows_of, run_of
from runs import build_model, load_checkpoint
from settings import Settings, parse
from support.console import InputError
from support.layouts import find_category
from transfusion import Restoration


def evaluation(run, *more: str) -> list[str]:
    """Arguments of evaluate.py, on the CPU as the training."""
    return [str(run), "--device", "cpu", *more]


# ---------------------------------------------------------------- the scores of a run

def test_metrics_can_be_computed_again_from_the_maps(small, demo_root):
    folder, _ = small
    s = Settings(**json.loads((folder / "config.json").read_text()))
    with np.load(folder / "maps.npz") as file:
        maps = {name: file[name] for name in file.files}
    assert set(maps) == {"M_disc", "M_recon", "M_last"}
    assert all(m.shape == (68, 64, 64) and m.dtype == np.float32 for m in maps.values())
    category = find_category("demo", "fabric", demo_root)
    masks = np.stack([data.load_mask(item, 256, 256) for item in category.test])
    labels = np.array([item.label for item in category.test])
    results, scores = score_maps(maps, labels, masks, s)
    written = json.loads((folder / "metrics.json").read_text())
    assert {k: written[k] for k in results} == results
    rows = rows_of(folder / "scores.csv")
    assert [row["file"] for row in rows] == [
        item.path.relative_to(category.root).as_posix() for item in category.test]
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert np.allclose([float(row["score"]) for row in rows], scores, rtol=1e-7)
    rate = (scores[labels == 0] > written["threshold"]).mean()
    assert written["false_alarm_rate"] == pytest.approx(rate)


def test_controls_training_and_true_labels_matter(small, demo_root):
    """Above the untrained network, and above a per-pixel model; chance under permuted labels."""
    folder, argv = small
    trained = json.loads((folder / "metrics.json").read_text())
    s, _ = parse(argv)
    untrained, *_ = score(build_model(s), s, load_run_data(s))
    pixelwise = mean_std_model(demo_root, "fabric")[1]
    for name in ("image_auroc", "aupro"):
        assert trained[name] > untrained[name] + 0.1, name
        assert trained[name] > pixelwise[name], name
    rows = rows_of(folder / "scores.csv")
    labels, scores = (np.array([float(row[k]) for row in rows]) for k in ("label", "score"))
    rng = np.random.default_rng(0)
    chance = [metrics.evaluate(rng.permutation(labels), scores, np.zeros((1, 1, 2)),
                               np.array([[[True, False]]]))["image_auroc"] for _ in range(50)]
    assert abs(np.mean(chance) - 0.5) < 0.1


def test_synthetic_defects_lie_on_held_out_images(small, demo_root):
    s = load_checkpoint(small[0] / "last.pt")[0]
    run_data = load_run_data(dataclasses.replace(s, root=str(demo_root)), folder=small[0])
    parts = run_data.images, run_data.held_out, run_data.foreground, run_data.textures
    images, M = synthetic_defects(*parts)
    originals = run_data.images[np.resize(run_data.held_out, len(images))]
    outside = (M == 0).expand_as(images)
    assert torch.equal(images[outside], originals[outside])
    assert (M.sum((1, 2, 3)) > 0).all() and set(M.unique().tolist()) == {0, 1}
    change = (images.float() - originals.float()).abs()[~outside]
    assert 0 < change.mean() < 0.25 * 128 and change.max() <= 0.25 * 255 + 0.5
    again = synthetic_defects(*parts)
    assert torch.equal(images, again[0]) and torch.equal(M, again[1])


def test_seconds_per_image_is_of_one_image_alone_after_a_warm_up(parts, monkeypatch):
    s, _ = parse(argv_for(parts))
    run_data, model, sizes = load_run_data(s), build_model(s), []

    def restore(x, infer_steps):
        sizes.append(len(x))
        time.sleep(0.3 if len(sizes) == 1 else 0.01)
        return Restoration(x, x, x, x)

    monkeypatch.setattr(model, "restore", restore)
    assert 0.01 < seconds_per_image(model, s, run_data.test) < 0.1
    assert sizes == [1, 1, 1, 1]


def test_scoring_takes_the_masks_of_a_folder_while_they_are_there(parts, tmp_path):
    s, _ = parse(argv_for(parts, "--foreground", str(tmp_path / "masks")))
    (tmp_path / "masks").mkdir()
    half = Image.new("L", (40, 40))
    half.paste(255, (0, 0, 20, 40))
    for k in range(12):
        half.save(tmp_path / "masks" / f"{k}.png")
    foreground = load_run_data(s).foreground
    assert 0.5 <= foreground.float().mean() < 0.7
    assert torch.equal(load_run_data(s, training=False).foreground, foreground)
    shutil.rmtree(tmp_path / "masks")
    assert load_run_data(s, training=False).foreground.any()
    with pytest.raises(InputError, match="no such folder"):
        load_run_data(s)


# ---------------------------------------------------------------- the command

def test_the_same_numbers_again_and_other_settings_overwrite_nothing(parts, capsys):
    assert train.main(argv_for(parts)) == 0
    folder = run_of(parts)
    before = contents(folder)
    capsys.readouterr()
    assert evaluate.main(evaluation(folder, "--infer-steps", "3", "--lam", "0.5")) == 0
    out = capsys.readouterr().out
    assert "image AUROC" in out and out.splitlines()[-1] == f"results are in {folder}"
    after = contents(folder)
    assert set(after) - set(before) == {"metrics-infer_steps3-lam0.5.json"}
    assert all(after[name] == before[name] for name in before)
    assert json.loads(after["metrics-infer_steps3-lam0.5.json"])["infer_steps"] == 3
    assert evaluate.main(evaluation(folder, "--memory-gb", "0")) == 0     # images and maps on disk
    old, new = (json.loads(files["metrics.json"]) for files in (before, contents(folder)))
    old.pop("seconds_per_image"), new.pop("seconds_per_image")
    assert old == new and contents(folder)["scores.csv"] == before["scores.csv"]
    assert evaluate.main(evaluation(folder, "--final-mask", "last")) == 0   # M_1: of all 20 steps
    last = json.loads((folder / "metrics-final_masklast-infer_steps0.json").read_text())
    assert last["infer_steps"] == 20


@pytest.mark.parametrize("hold_out", ["0.1", "0"])
def test_an_unfinished_run_can_be_scored_and_still_be_resumed(hold_out, parts, capsys, monkeypatch):
    folder, argv = run_of(parts), argv_for(parts, "--steps", "6", "--hold-out", hold_out)
    interrupt(monkeypatch, 5)
    assert train.main(argv) == 130
    monkeypatch.undo()
    stopped = torch.load(folder / "last.pt", weights_only=True)["step"]
    assert stopped == 5 and evaluate.main(evaluation(folder)) == 0
    assert (folder / f"metrics-step{stopped}.json").exists()
    assert not (folder / "metrics.json").exists()
    assert predict.main([str(folder), str(parts / "bolt" / "test"), "--out",
                         str(parts.parent / "output"), "--device", "cpu"]) == 0
    assert "this model has no threshold" in capsys.readouterr().out
    # The folder spelt another way is the same run.
    assert train.main([*argv, "--data", f"{parts}/./", "--resume"]) == 0
    assert json.loads((folder / "metrics.json").read_text())["step"] == 6


def test_inference_steps_are_checked_against_the_runs_own_schedule(parts, capsys):
    usual = ["--hold-out", "0", "--steps", "2"]
    assert train.main(argv_for(parts, *usual, "--T", "30")) == 0
    assert evaluate.main(evaluation(run_of(parts), "--infer-steps", "25")) == 0
    assert train.main(argv_for(parts, *usual, "--T", "5", "--name", "short")) == 0
    refused(capsys, evaluation(run_of(parts, "short"), "--infer-steps", "10"),
            "10 inference steps", "1 to 5", command=evaluate.main)


def test_data_that_has_moved_is_found(parts, capsys):
    assert train.main(argv_for(parts)) == 0
    path = run_of(parts) / "metrics.json"
    before = json.loads(path.read_text())
    moved = parts.parent / "elsewhere" / "parts"
    moved.parent.mkdir()
    parts.rename(moved)
    path.unlink()
    refused(capsys, evaluation(path.parent), str(parts), command=evaluate.main)
    assert evaluate.main(evaluation(path.parent, "--data", str(moved))) == 0
    after = json.loads(path.read_text())
    before.pop("seconds_per_image"), after.pop("seconds_per_image")
    assert after == before


# ---------------------------------------------------------------- what is refused

def test_a_run_folder_that_does_not_exist_is_one_line(tmp_path, capsys):
    refused(capsys, [str(tmp_path / "runs/demo/nowhere")], "nowhere/last.pt does not exist",
            command=evaluate.main)
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    refused(capsys, [str(tmp_path / "run")], "run/last.pt does not exist", command=evaluate.main)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("flags, expected", [
    (["--T", "10"], ["--T 10"]),                               # not to be changed after training
    (["--lr", "0.5"], ["--lr 0.5"]),
    (["--infer-steps", "21"], ["21 inference steps", "1 to 20"]),
    (["--infer-steps", "-1"], ["--infer-steps -1", "at least 0"]),
    (["--lam", "1.5"], ["--lam 1.5", "0..1"]),
    (["--kernel", "4"], ["--kernel 4", "odd"]),
    (["--false-alarms", "2"], ["--false-alarms 2", "0..1"]),
    (["--eval-batch", "0"], ["--eval-batch 0", "at least 1"]),
    (["--final-mask", "first"], ["--final-mask", "first"]),
    (["--device", "toaster"], ["--device toaster", "no such device"]),
    (["--data", "nowhere"], ["neither a data set"]),
])
def test_bad_arguments(factory, capsys, flags, expected):
    folder = factory / "runs/parts/bolt"
    before = contents(folder)
    refused(capsys, evaluation(folder, *flags), *expected, command=evaluate.main)
    assert contents(folder) == before


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content, expected", [
    (b"", ["is not a checkpoint"]),
    (b"PK not a zip", ["is not a checkpoint"]),
    ("pickle", ["is not a checkpoint"]),
    ({"a": torch.zeros(1)}, ["not a checkpoint of train.py", "tools/import_authors.py"]),
    ("newer", ["newer version", "format 99"]),
    ("architecture", ["another architecture"]),
    ("settings", ["is not a checkpoint of train.py"]),
    ("setting", ["channels 'many'"]),
])
def test_bad_checkpoints(factory, capsys, monkeypatch, content, expected):
    monkeypatch.chdir(factory / "parts")
    path = factory / "runs" / "parts" / "bolt" / "last.pt"
    state = torch.load(path, weights_only=True)
    if content == "pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        if content == "newer":
            content = {**state, "format": 99}
        elif content == "architecture":
            content = {**state, "settings": {**state["settings"], "channels": 16}}
        elif content == "settings":
            content = {**state, "settings": [1]}
        elif content == "setting":
            content = {**state, "settings": {**state["settings"], "channels": "many"}}
        torch.save(content, path)
    refused(capsys, evaluation(path.parent), "last.pt", *expected, command=evaluate.main)
    assert not (factory / "parts" / "executed").exists()
