"""The command line: runs, run folders, scoring again, resuming, and what is refused."""
import csv
import dataclasses
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import metrics
import predict
import settings
import train
from evaluate import (against_normal, in_words, score, score_maps, seconds_per_image,
                      synthetic_defects, synthetic_found, threshold)
from runs import (build_model, load_checkpoint, load_model, load_source, refuse_other_run,
                  steps_per_epoch)
from settings import InputError, Settings, parse
from test_demo import mean_std_model
from test_runs import authors_state
from transfusion import Restoration

HERE = Path(train.__file__).parent
TINY = ["--resize", "32", "--crop", "32", "--channels", "8", "--precision", "float32", "--device",
        "cpu", "--batch", "4", "--preset", "quick", "--infer-steps", "2"]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def write_parts(folder: Path) -> None:
    """A small category of the user's own, folder/parts/bolt."""
    rng = np.random.default_rng(0)
    root = folder / "parts" / "bolt"

    def save(place, image):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(root / place)

    def normal():
        return rng.integers(90, 110, (40, 40, 3))

    for k in range(12):
        save(f"train/good/{k}.png", normal())
    for k in range(2):
        save(f"test/good/{k}.png", normal())
        image, mask = normal(), np.zeros((40, 40))
        image[8:16, 8:16], mask[8:16, 8:16] = 220, 255
        save(f"test/dent/{k}.png", image)
        save(f"ground_truth/dent/{k}_mask.png", mask)


@pytest.fixture
def parts(tmp_path) -> Path:
    """A small category of the user's own, parts/bolt, as the current folder's neighbour."""
    write_parts(tmp_path)
    return tmp_path / "parts"


def argv_for(parts, *more):
    return ["--data", str(parts), "--category", "bolt", "--out", str(parts.parent / "runs"), *TINY,
            "--steps", "3", "--root", str(parts.parent), *more]


def refused(capsys, argv, *expected):
    """The command line says one line that holds all of `expected`, and exits with 2."""
    try:
        status = train.main(argv)
    except SystemExit as stop:                                       # argparse
        status = stop.code
    error = capsys.readouterr().err.split("\r")[-1].strip()
    lines = [line for line in error.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and "Traceback" not in error, error
    for part in expected:
        assert part in lines[0], lines[0]


# ---------------------------------------------------------------- a trained run

def test_run_folder(small):
    folder, _ = small
    assert set(contents(folder)) == {"config.json", "data.json", "log.csv", "last.pt", "metrics.json",
                                     "scores.csv", "maps.npz", "qualitative.png"}
    found = json.loads((folder / "metrics.json").read_text())
    for name in ("image_auroc", "pixel_auroc", "aupro", "pixel_ap", "image_ap", "image_f1max"):
        assert 0 <= found[name] <= 1, name
    assert found["step"] == 400 and found["infer_steps"] == 3 and found["threshold_images"] == 8
    assert found["seconds_train"] > 0 and found["seconds_per_image"] > 0 and found["seed"] == 0
    with Image.open(folder / "qualitative.png") as picture:
        assert picture.width >= 700 and picture.height > picture.width


def test_a_training_says_first_how_long_it_takes(small, training):
    """By the measured time of a step: within a factor of ten of what it took."""
    said = re.search(r"400 steps of 4 images .* float32: about ([\d.]+) (seconds|minutes)",
                     training[2].read_text())
    promised = float(said[1]) * {"seconds": 1, "minutes": 60}[said[2]]
    took = json.loads((small[0] / "metrics.json").read_text())["seconds_train"]
    assert took / 10 < promised < took * 10


def test_the_log_has_a_row_an_epoch_and_the_losses_fall(small):
    with open(small[0] / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 24))  # 400 steps, 18 an epoch
    assert list(rows[0]) == ["epoch", "step", "loss", "n", "m", "a", "c", "gradient", "skipped",
                             "lr", "seconds"]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(sum(float(row[k]) for k in "nmac"), rel=1e-4)
    for name in ("loss", "m", "a"):
        assert float(rows[-1][name]) < 0.8 * float(rows[0][name]), name


def test_metrics_can_be_computed_again_from_the_maps(small, demo_root):
    folder, _ = small
    s = Settings(**json.loads((folder / "config.json").read_text()))
    with np.load(folder / "maps.npz") as file:
        maps = {name: file[name] for name in file.files}
    assert set(maps) == {"M_disc", "M_recon", "M_last"}
    assert all(m.shape == (68, 64, 64) and m.dtype == np.float32 for m in maps.values())
    category = data.find_category("demo", "fabric", demo_root)
    masks = np.stack([data.load_mask(item, 256, 256) for item in category.test])
    labels = np.array([item.label for item in category.test])
    found, scores = score_maps(maps, labels, masks, s)
    written = json.loads((folder / "metrics.json").read_text())
    assert {k: written[k] for k in found} == found
    with open(folder / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [
        item.path.relative_to(category.root).as_posix() for item in category.test]
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert np.allclose([float(row["score"]) for row in rows], scores, rtol=1e-7)
    rate = (scores[labels == 0] > written["threshold"]).mean()
    assert written["false_alarm_rate"] == pytest.approx(rate)


def test_the_auroc_on_held_out_images_sees_what_light_hides():
    """Good test images that score lower than all others for another reason than their parts."""
    normal = {"images": [0.3, 0.1, 0.3]}
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.01, 0.02, 0.2, 0.4])
    found = against_normal(normal, Settings(), labels, scores)
    assert found["image_auroc_held_out"] == pytest.approx(4 / 6)
    assert against_normal(normal, Settings(), labels[:2], scores[:2])["image_auroc_held_out"] is None
    assert against_normal(None, Settings(), labels, scores)["image_auroc_held_out"] is None


def test_the_threshold_is_of_held_out_and_training_images():
    """The training's images add to a handful of held-out ones, and never lower their threshold."""
    few, many = {"images": [0.1, 0.2]}, np.linspace(0, 0.3, 98).tolist()
    assert threshold(few, Settings()).value == 0.2
    both = threshold({**few, "trained": many}, Settings())
    assert both.value == np.sort(many)[-5] and both.rate == pytest.approx(5 / 101)
    low = threshold({**few, "trained": [v / 10 for v in many]}, Settings())
    assert low == threshold(few, Settings())
    assert synthetic_found({"synthetic": [0.1, 0.2, 0.21, 0.3]}, low) == 0.5
    assert "of 100 good parts like these about 5 will" in in_words({**few, "trained": many}, both)


def test_synthetic_defects_lie_on_held_out_images(small, demo_root):
    s = load_checkpoint(small[0] / "last.pt")[0]
    source = load_source(dataclasses.replace(s, root=str(demo_root)), folder=small[0])
    images, M = synthetic_defects(source)
    originals = source.images[np.resize(source.held_out, len(images))]
    outside = (M == 0).expand_as(images)
    assert torch.equal(images[outside], originals[outside])
    assert (M.sum((1, 2, 3)) > 0).all() and set(M.unique().tolist()) == {0, 1}
    change = (images.float() - originals.float()).abs()[~outside]
    assert 0 < change.mean() < 0.25 * 128 and change.max() <= 0.25 * 255 + 0.5
    again = synthetic_defects(source)
    assert torch.equal(images, again[0]) and torch.equal(M, again[1])


def test_controls_training_and_true_labels_matter(small, demo_root):
    """Above the untrained network, and above a per-pixel model; chance under permuted labels."""
    folder, argv = small
    trained = json.loads((folder / "metrics.json").read_text())
    s, _ = parse(argv)
    untrained, *_ = score(build_model(s), s, load_source(s))
    pixelwise = mean_std_model(demo_root, "fabric")[1]
    for name in ("image_auroc", "aupro"):
        assert trained[name] > untrained[name] + 0.1, name
        assert trained[name] > pixelwise[name], name
    with open(folder / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    labels, scores = (np.array([float(row[k]) for row in rows]) for k in ("label", "score"))
    rng = np.random.default_rng(0)
    chance = [metrics.evaluate(rng.permutation(labels), scores, np.zeros((1, 1, 2)),
                               np.array([[[True, False]]]))["image_auroc"] for _ in range(50)]
    assert abs(np.mean(chance) - 0.5) < 0.1


def test_eval_again_gives_the_same_numbers_and_other_settings_overwrite_nothing(parts):
    argv = argv_for(parts)
    assert train.main(argv) == 0
    folder = parts.parent / "runs" / "parts" / "bolt"
    before = contents(folder)
    assert train.main([*argv, "--eval", "--infer-steps", "3", "--lam", "0.5"]) == 0
    after = contents(folder)
    assert set(after) - set(before) == {"metrics-infer_steps3-lam0.5.json"}
    assert all(after[name] == before[name] for name in before)
    assert json.loads(after["metrics-infer_steps3-lam0.5.json"])["infer_steps"] == 3
    assert train.main([*argv, "--eval", "--memory-gb", "0"]) == 0         # images and maps on disk
    old, new = (json.loads(files["metrics.json"]) for files in (before, contents(folder)))
    old.pop("seconds_per_image"), new.pop("seconds_per_image")
    assert old == new and contents(folder)["scores.csv"] == before["scores.csv"]


def test_a_finished_run_is_skipped_and_other_settings_are_refused(small, capsys):
    folder, argv = small
    before = contents(folder)
    assert train.main(argv) == 0
    assert "skipped" in capsys.readouterr().out
    refused(capsys, [*argv, "--lr", "0.5"], "other settings", "lr 0.001 there, 0.5 here", "--name")
    refused(capsys, [*argv, "--eval", "--T", "10"], "T cannot be changed after training")
    assert contents(folder) == before


def test_a_setting_that_a_run_is_older_than_had_its_default(tmp_path):
    config = dataclasses.asdict(Settings())
    del config["light"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuse_other_run(tmp_path, Settings())
    with pytest.raises(InputError, match="light 0.0 there, 0.15 here"):
        refuse_other_run(tmp_path, Settings(light=0.15))


# ---------------------------------------------------------------- interruption and resuming

def test_an_interrupted_run_resumes_bit_identically(parts, capsys, monkeypatch):
    assert train.main(argv_for(parts, "--steps", "11", "--name", "whole")) == 0
    argv = argv_for(parts, "--steps", "11", "--name", "broken")
    make_batch = train.make_batch
    done = []

    def interrupted(*args):
        done.append(1)
        if len(done) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return make_batch(*args)

    monkeypatch.setattr(train, "make_batch", interrupted)
    assert train.main(argv) == 130
    assert "stopped at step 5 of 11" in capsys.readouterr().err
    monkeypatch.setattr(train, "make_batch", make_batch)
    refused(capsys, argv, "unfinished run", "--resume")
    assert train.main([*argv, "--resume"]) == 0
    whole, broken = (parts.parent / "runs" / "parts" / f"bolt-{n}" for n in ("whole", "broken"))
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (whole, broken))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[k], b["optimizer"]["state"][key][k]) for k in state)
    for name in ("scores.csv",):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    logs = [[{k: v for k, v in row.items() if k != "seconds"}
             for row in csv.DictReader(open(run / "log.csv"))] for run in (whole, broken)]
    assert logs[0] == logs[1] and len(logs[0]) == 4                  # 11 steps, 3 an epoch


def test_same_seed_same_run_and_another_seed_another(parts):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train.main(argv_for(parts, "--name", name, "--seed", str(seed), "--steps", "3")) == 0
    a, b, c = (torch.load(parts.parent / "runs" / "parts" / f"bolt-{n}" / "last.pt",
                          weights_only=True)["model"] for n in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


def test_a_full_disk_at_the_checkpoint_leaves_nothing_half_written(parts):
    """The file size limit of the process makes every larger write fail, as a full disk does."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run([sys.executable, "train.py", *argv_for(parts)], cwd=HERE, text=True,
                          capture_output=True, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "last.pt: cannot be written" in done.stderr.splitlines()[-1]
    assert set(contents(parts.parent / "runs" / "parts" / "bolt")) == {"config.json", "data.json"}


# ---------------------------------------------------------------- other ways to run

def test_eval_every_logs_each_evaluation(parts):
    assert train.main(argv_for(parts, "--steps", "6", "--eval-every", "2")) == 0     # 3 an epoch
    with open(parts.parent / "runs" / "parts" / "bolt" / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["2"] and 0 <= float(rows[0]["image_auroc"]) <= 1


def test_light_changes_the_whole_batch_and_nothing_without_it(parts):
    s, _ = parse(argv_for(parts))
    source, cpu = load_source(s), torch.device("cpu")
    usual, same, lit = (train.make_batch(dataclasses.replace(s, light=light), source, 20, 0, cpu)[0]
                        for light in (0.0, 0.0, 0.5))
    assert torch.equal(usual, same)
    assert all(not torch.equal(a, b) for a, b in zip(usual, lit))


def test_an_unfinished_run_can_be_scored_and_still_be_resumed(parts, capsys, monkeypatch):
    folder, steps = parts.parent / "runs" / "parts" / "bolt", []

    def interrupt(*args):
        steps.append(args)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return make_batch(*args)

    make_batch = train.make_batch
    monkeypatch.setattr(train, "make_batch", interrupt)
    argv = argv_for(parts, "--steps", "6")
    assert train.main(argv) == 130
    monkeypatch.undo()
    stopped = torch.load(folder / "last.pt", weights_only=True)["step"]
    assert train.main([*argv, "--eval"]) == 0
    assert (folder / f"metrics-step{stopped}.json").exists()
    assert not (folder / "metrics.json").exists()
    assert predict.main([str(folder), str(parts / "bolt" / "test"), "--out",
                         str(parts.parent / "found"), "--device", "cpu"]) == 0
    assert "this model has no threshold" in capsys.readouterr().out
    # The folder spelt another way is the same run.
    assert train.main(argv_for(Path(f"{parts}/./"), "--steps", "6", "--resume")) == 0
    assert (folder / "metrics.json").exists()


def test_an_epoch_ends_with_what_is_left(parts, monkeypatch):
    """11 images in batches of 4: 4, 4 and 3, each image once; two ranks fill the last one up."""
    s, _ = parse(argv_for(parts, "--rotation", "0"))
    source, cpu = load_source(s), torch.device("cpu")
    assert len(source.train) == 11 and steps_per_epoch(s, source) == 3
    batches = [train.make_batch(s, source, 20, step, cpu) for step in range(3)]
    assert [len(x) for x, *_ in batches] == [4, 4, 3]
    assert [M.flatten(1).any(1).tolist() for _, _, M, *_ in batches][2] == [True, True, False]
    seen = torch.cat([x for x, *_ in batches]).flatten(1).unique(dim=0)
    assert len(seen) == 11
    few = dataclasses.replace(s, batch=16)                        # fewer images than a batch
    assert steps_per_epoch(few, source) == 1
    assert len(train.make_batch(few, source, 20, 0, cpu)[0]) == 16
    monkeypatch.setattr(train, "RANKS", 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(train, "RANK", rank)
        halves.append(train.make_batch(s, source, 20, 2, cpu))
    assert [M.flatten(1).any(1).tolist() for _, _, M, *_ in halves] == 2 * [[True, False]]
    whole = torch.cat([x for x, *_ in halves])
    assert all(any(torch.equal(x, y) for y in whole) for x in batches[2][0])


def test_the_last_mask_is_m_1_unless_fewer_steps_are_asked_for():
    last = ["--preset", "cpu", "--final-mask", "last"]
    assert parse(["--preset", "cpu"])[0].infer_steps == 3
    s, flags = parse(last)
    assert s.infer_steps == 0 and "infer_steps" in flags.given       # --eval takes it, too
    assert parse([*last, "--infer-steps", "5"])[0].infer_steps == 5


def test_paper_and_authors_compute_in_float32(monkeypatch):
    monkeypatch.setattr(settings, "fast_bf16", lambda device: True)
    found = {preset: parse(["--preset", preset])[0].precision for preset in settings.PRESETS}
    assert found == {"paper": "float32", "authors": "float32", "cpu": "bf16", "quick": "bf16"}
    assert parse(["--preset", "paper", "--precision", "bf16"])[0].precision == "bf16"


def test_the_authors_preset_turns_as_their_code_does():
    turned = {preset: parse(["--preset", preset])[0] for preset in settings.PRESETS}
    assert {k: (s.rotation, s.authors_rotation) for k, s in turned.items()} == {
        "paper": (90, False), "authors": (20, True), "cpu": (90, False), "quick": (10, False)}


def test_one_folder_of_masks_is_not_for_all_categories(parts, tmp_path, capsys):
    """MVTec AD's file names repeat: bolt's masks would fit nut's images."""
    shutil.copytree(parts / "bolt", parts / "nut")
    argv = argv_for(parts, "--foreground", str(tmp_path / "masks"))
    argv[argv.index("bolt")] = "all"
    for name in ("bolt", "nut"):
        refused(capsys, argv, "masks: no folder bolt" if name == "bolt" else "no folder nut")
        folder = tmp_path / "masks" / name
        folder.mkdir(parents=True)
        for k in range(12):
            Image.new("L", (40, 40), 255).save(folder / f"{k}.png")
    assert train.main(argv) == 0


def test_scoring_takes_the_given_masks_while_they_are_there(parts, tmp_path):
    s, _ = parse(argv_for(parts, "--foreground", str(tmp_path / "masks")))
    (tmp_path / "masks").mkdir()
    half = Image.new("L", (40, 40))
    half.paste(255, (0, 0, 20, 40))
    for k in range(12):
        half.save(tmp_path / "masks" / f"{k}.png")
    given = load_source(s).foreground
    assert 0.5 <= given.float().mean() < 0.7
    assert torch.equal(load_source(s, training=False).foreground, given)
    shutil.rmtree(tmp_path / "masks")
    assert load_source(s, training=False).foreground.any()
    with pytest.raises(InputError, match="no such folder"):
        load_source(s)


def test_epochs_beat_the_steps_of_a_preset():
    assert parse(["--preset", "quick"])[0].steps == 1200
    assert parse(["--preset", "quick", "--epochs", "5"])[0].steps == 0


def test_eval_checks_inference_steps_against_the_runs_own_schedule(parts, capsys):
    usual = ["--hold-out", "0", "--steps", "2"]
    assert train.main(argv_for(parts, *usual, "--T", "30")) == 0
    assert train.main(argv_for(parts, *usual, "--eval", "--infer-steps", "25")) == 0
    assert train.main(argv_for(parts, *usual, "--T", "5", "--name", "short")) == 0
    refused(capsys, argv_for(parts, *usual, "--name", "short", "--eval", "--infer-steps", "10"),
            "10 inference steps", "1 to 5")


def test_eval_finds_data_that_has_moved(parts):
    assert train.main(argv_for(parts)) == 0
    metrics = parts.parent / "runs" / "parts" / "bolt" / "metrics.json"
    before = json.loads(metrics.read_text())
    moved = parts.parent / "elsewhere" / "parts"
    moved.parent.mkdir()
    parts.rename(moved)
    metrics.unlink()
    assert train.main(argv_for(parts, "--eval", "--data", str(moved))) == 0
    assert json.loads(metrics.read_text())["image_auroc"] == before["image_auroc"]


def test_all_categories_skip_the_finished_and_end_with_a_table(parts, capsys):
    shutil.copytree(parts / "bolt", parts / "nut")
    assert train.main(argv_for(parts)) == 0
    capsys.readouterr()
    argv = argv_for(parts)
    argv[argv.index("bolt")] = "all"
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "bolt is finished" in out and re.search(r"\nbolt .*\nnut .*\nmean of 2 ", out)


def test_the_tables_mean_counts_zeros_and_leaves_out_what_is_undefined(capsys):
    train.print_table([{"category": "bolt", "image_auroc": 0.5, "false_alarm_rate": 0.0},
                       {"category": "nut", "image_auroc": None, "false_alarm_rate": 0.5}])
    mean = capsys.readouterr().out.splitlines()[-1].split()
    assert mean == ["mean", "of", "2", "50.0", "-", "-", "-", "25.0", "-"]


@pytest.mark.parametrize("flags", [["--no-pe"], ["--no-sim-mask"], ["--drop-loss", "c"],
                                   ["--T", "5", "--schedule", "root"],
                                   pytest.param(["--final-mask", "last"], marks=pytest.mark.picture),
                                   ["--preset", "authors", "--channels", "8", "--epochs", "1",
                                    "--resize", "32", "--crop", "32"]])
def test_ablations_run(parts, flags):
    assert train.main(argv_for(parts, "--steps", "2", *flags)) == 0
    found = json.loads((parts.parent / "runs" / "parts" / "bolt" / "metrics.json").read_text())
    assert 0 <= found["aupro"] <= 1


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(parts, monkeypatch):
    """Traced, but not handed to the C++ compiler, which takes minutes."""
    whole, used = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self: used.append(self) or whole(self, backend="eager"))
    for name in ("--no-compile", "--compile"):
        assert train.main(argv_for(parts, "--steps", "3", name, "--name", name[2:])) == 0
    plain, compiled = (load_model(parts.parent / "runs" / "parts" / f"bolt-{n}" / "last.pt",
                                  torch.device("cpu"))[0].state_dict()
                       for n in ("no-compile", "compile"))
    assert len(used) == 1 and plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[k], compiled[k], atol=1e-5) for k in plain)


@pytest.mark.picture
def test_without_masks_or_without_a_test_set(parts, capsys):
    shutil.rmtree(parts / "bolt" / "ground_truth")
    assert train.main(argv_for(parts)) == 0
    assert "no ground truth" in capsys.readouterr().err
    found = json.loads((parts.parent / "runs" / "parts" / "bolt" / "metrics.json").read_text())
    assert found["aupro"] is None and found["image_auroc"] is not None
    shutil.rmtree(parts / "bolt" / "test")
    assert train.main(argv_for(parts, "--name", "untested")) == 0
    said = capsys.readouterr().out
    assert "not scored" in said and "preview.png" in said
    folder = parts.parent / "runs" / "parts" / "bolt-untested"
    assert (folder / "preview.png").stat().st_size > 10_000
    assert 0 <= json.loads((folder / "metrics.json").read_text())["synthetic_found"] <= 1
    refused(capsys, argv_for(parts, "--name", "watched", "--eval-every", "1"), "--eval-every 1",
            "no test images")
    assert train.main(argv_for(parts, "--name", "untested")) == 0
    assert "is finished with these settings" in capsys.readouterr().out


def test_the_authors_weights_are_scored_with_one_command(parts, tmp_path, capsys):
    torch.save(authors_state(), tmp_path / "bolt_model.pkl")
    plain = argv_for(parts, "--preset", "authors", "--channels", "32", "--infer-steps", "0",
                     "--hold-out", "0")
    argv = [*plain, "--eval", "--weights"]
    assert train.main([*argv, str(tmp_path / "bolt_model.pkl")]) == 0
    folder = parts.parent / "runs" / "parts" / "bolt"
    assert json.loads((folder / "metrics.json").read_text())["infer_steps"] == 18
    model, *_ = load_model(folder / "last.pt", torch.device("cpu"))
    assert torch.equal(model.net.normal_head.weight, authors_state()["model.final_mean.weight"])
    refused(capsys, [*argv, str(tmp_path / "bolt_model.pkl"), "--preset", "quick", "--name", "x"],
            "image_proj.weight is [32, 5, 3, 3]", "--preset authors")
    refused(capsys, [*argv, str(tmp_path / "absent.pkl")], "does not exist")
    refused(capsys, plain, "holds scored --weights", "--name")
    (folder / "metrics.json").unlink()                                  # killed while it scored
    refused(capsys, [*plain, "--resume"], "holds scored --weights", "--name")
    trained = argv_for(parts, "--preset", "authors", "--steps", "1", "--infer-steps", "1", "--name",
                       "trained")
    assert train.main(trained) == 0
    before = contents(parts.parent / "runs" / "parts" / "bolt-trained")
    refused(capsys, [*trained, "--eval", "--weights", str(tmp_path / "bolt_model.pkl")],
            "holds a trained model", "--name")
    assert contents(parts.parent / "runs" / "parts" / "bolt-trained") == before


def test_without_a_gpu_the_cpu_preset_is_taken_and_said(parts, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    s, _ = parse(["--data", "mvtec", "--category", "cable"])
    assert s.preset == "cpu" and "no GPU" in capsys.readouterr().out
    s, _ = parse(["--data", "mvtec", "--category", "cable", "--preset", "paper"])
    assert (s.T, s.resize, s.crop, s.batch, s.lr, s.epochs, s.lr_drop) == (20, 256, 224, 8, 1e-5,
                                                                         1500, 800)


@pytest.mark.parametrize("preset, flags, crop", [
    ("cpu", [], 96), ("cpu", ["--resize", "256"], 256), ("quick", ["--resize", "64"], 64),
    ("authors", ["--resize", "320"], 320), ("cpu", ["--resize", "256", "--crop", "224"], 224),
    ("paper", ["--resize", "512"], 448), ("paper", ["--resize", "288"], 248),
    ("paper", ["--resize", "288", "--crop", "224"], 224)])
def test_another_size_leaves_out_the_same_share(preset, flags, crop):
    assert parse(["--preset", preset, *flags])[0].crop == crop


def test_seconds_per_image_is_of_one_image_alone_after_a_warm_up(parts, monkeypatch):
    s, _ = parse(argv_for(parts))
    source, model, sizes = load_source(s), build_model(s), []

    def restore(x, infer_steps):
        sizes.append(len(x))
        time.sleep(0.3 if len(sizes) == 1 else 0.01)
        return Restoration(x, x, x, x)

    monkeypatch.setattr(model, "restore", restore)
    assert 0.01 < seconds_per_image(model, s, source.test) < 0.1
    assert sizes == [1, 1, 1, 1]


def test_the_learning_rate_of_the_paper():
    s = Settings()
    rates = [train.learning_rate(s, epoch * 26, 1500 * 26, 26) for epoch in (0, 799, 800, 1499)]
    assert rates == pytest.approx([1e-5, 1e-5, 1e-6, 1e-6])


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for f in dataclasses.fields(Settings):
        assert "--" + f.name.replace("_", "-") in out


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("flags, expected", [
    (["--T", "0"], ["--T 0", "at least 1"]),
    (["--infer-steps", "21"], ["21 inference steps", "1 to 20"]),
    (["--resize", "250"], ["--resize 250", "multiple of 8", "248"]),
    (["--crop", "64"], ["--crop 64 is larger"]),
    (["--batch", "1"], ["--batch 1", "at least 2"]),
    (["--lam", "1.5"], ["--lam 1.5", "0..1"]),
    (["--light", "-0.1"], ["--light -0.1", "0..1"]),
    (["--kernel", "4"], ["--kernel 4", "odd"]),
    (["--lr", "-1"], ["--lr -1"]),
    (["--rotation", "-5"], ["--rotation -5", "at least 0"]),
    (["--ema", "1"], ["--ema 1", "below 1"]),
    (["--eval-every", "-1"], ["--eval-every -1", "at least 0"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--weight-decay", "-1"], ["--weight-decay -1", "at least 0"]),
    (["--device", "mps"], ["--device mps", "no such device"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--drop-loss", "nx"], ["--drop-loss nx"]),
    (["--drop-loss", "nmac"], ["--drop-loss nmac"]),
    (["--channels", "12"], ["--channels 12", "multiple of 8"]),
    (["--schedule", "cubic"], ["--schedule", "cubic"]),
    (["--preset", "fast"], ["--preset", "fast"]),
    (["--device", "cuda:9"], ["--device cuda:9"]),
    (["--device", "toaster"], ["--device toaster"]),
    (["--foreground", "nowhere"], ["--foreground nowhere", "no such folder"]),
    (["--weights", "nothing.pkl"], ["nothing.pkl does not exist"]),
    (["--category", "bolts"], ["no category 'bolts'", "did you mean bolt?"]),
    (["--category", ""], ["--category", "one of bolt"]),
    (["--data", "mvtec"], ["no mvtec data under", "mvtec-ad", "--root"]),
    (["--data", "nonsense"], ["neither a data set"]),
    (["--eval"], ["last.pt does not exist"]),
    (["--no-such-flag"], ["--no-such-flag"]),
])
def test_bad_arguments(parts, capsys, flags, expected):
    refused(capsys, argv_for(parts, *flags), *expected)
    assert not (parts.parent / "runs").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("harm, expected", [
    (lambda bolt: [p.unlink() for p in (bolt / "train/good").iterdir()], ["no training images"]),
    (lambda bolt: truncate(bolt / "train/good/3.png"), ["3.png", "cannot be read"]),
    (lambda bolt: truncate(bolt / "test/dent/1.png"), ["1.png", "cannot be read"]),
    (lambda bolt: truncate(bolt / "ground_truth/dent/1_mask.png"), ["1_mask.png", "cannot be"]),
    (lambda bolt: (bolt / "test/dent/1.png").unlink(), ["1_mask.png", "without its image"]),
    (lambda bolt: (bolt / "ground_truth/dent/0_mask.png").unlink(), ["0.png", "no mask for it"]),
    (lambda bolt: Image.new("L", (9, 9)).save(bolt / "ground_truth/dent/0_mask.png"),
     ["0_mask.png is 9 x 9", "40 x 40"]),
])
def test_bad_data(parts, capsys, harm, expected):
    harm(parts / "bolt")
    refused(capsys, argv_for(parts), *expected)
    assert not (parts.parent / "runs").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with parts/bolt and a run of it."""
    folder = tmp_path_factory.mktemp("trained")
    write_parts(folder)
    assert train.main(argv_for(folder / "parts")) == 0
    return folder


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content, expected", [
    (b"", ["is not a checkpoint"]),
    (b"PK not a zip", ["is not a checkpoint"]),
    ("pickle", ["is not a checkpoint"]),
    ({"a": torch.zeros(1)}, ["not a checkpoint of train.py"]),
    ("newer", ["newer version", "format 99"]),
    ("architecture", ["another architecture"]),
    ("settings", ["is not a checkpoint of train.py"]),
    ("setting", ["channels 'many'"]),
])
def test_bad_checkpoints(trained, tmp_path, capsys, monkeypatch, content, expected):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    parts = tmp_path / "parts"
    monkeypatch.chdir(parts)
    argv = argv_for(parts)
    path = tmp_path / "runs" / "parts" / "bolt" / "last.pt"
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
    refused(capsys, [*argv, "--eval"], "last.pt", *expected)
    assert not (parts / "executed").exists()


def test_what_the_crop_takes_from_the_truth_is_said(parts):
    for k, place in enumerate([(slice(0, 4), slice(0, 40)), (slice(18, 22), slice(18, 22))]):
        mask = np.zeros((40, 40), np.uint8)
        mask[place] = 255
        mask[36:40, 36:40] = 255                                       # in the corner of both
        Image.fromarray(mask).save(parts / f"bolt/ground_truth/dent/{k}_mask.png")
    s = Settings(data=str(parts), category="bolt", resize=64, crop=32)
    notes = load_source(s).notes
    assert "ground truth: 4 regions in 2 masks, 1 where they are scored; 1 masks lie outside the " \
           "crop" in notes
    assert "ground truth: 4 regions in 2 masks, 4 where they are scored" \
           in load_source(dataclasses.replace(s, crop=64)).notes
