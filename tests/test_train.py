"""The training command: what it writes and prints, how it is continued, what it refuses."""
import dataclasses
import json
import re
import resource
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import runs
import train
from data import load_run_data
from helpers import (argv_for, contents, interrupt, moments_of, picture, png, refused, rows_of,
                     run_of)
from settings import Settings, parse
from support import ranks
from support.report import print_table

# ---------------------------------------------------------------- a trained run


def test_run_folder(small):
    folder, _ = small
    assert set(contents(folder)) - {"odd.png"} == {"config.json", "data.json", "log.csv", "last.pt",
                                                   "metrics.json", "scores.csv", "maps.npz",
                                                   "qualitative.png"}
    results = json.loads((folder / "metrics.json").read_text())
    for name in ("image_auroc", "pixel_auroc", "aupro", "pixel_ap", "image_ap", "image_f1max"):
        assert 0 <= results[name] <= 1, name
    assert (results["step"], results["infer_steps"], results["threshold_images"]) == (400, 3, 8)
    assert results["seconds_train"] > 0 and results["seconds_per_image"] > 0
    assert results["seed"] == 0
    with Image.open(folder / "qualitative.png") as picture:
        assert picture.width >= 700 and picture.height > picture.width


def test_after_ten_steps_a_training_prints_how_long_it_takes(small, training):
    """Once, and within a factor of ten of what it took."""
    lines = re.findall(r"^  about ([\d.]+) (seconds|minutes) for the remaining 390 steps, judged "
                       r"by the first ten$", training[2].read_text(), re.MULTILINE)
    assert len(lines) == 1
    predicted = float(lines[0][0]) * {"seconds": 1, "minutes": 60}[lines[0][1]]
    seconds = json.loads((small[0] / "metrics.json").read_text())["seconds_train"]
    assert seconds / 10 < predicted < seconds * 10


def test_a_training_of_ten_steps_prints_no_duration(parts, capsys):
    assert train.main(argv_for(parts, "--steps", "10")) == 0
    assert "judged by the first ten" not in capsys.readouterr().out


def test_the_log_has_a_row_an_epoch_and_the_losses_fall(small):
    rows = rows_of(small[0] / "log.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, 24))  # 400 steps, 18 an epoch
    assert list(rows[0]) == ["epoch", "step", "loss", "n", "m", "a", "c", "gradient", "rollbacks",
                             "lr", "seconds"]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(sum(float(row[k]) for k in "nmac"), rel=1e-4)
        assert row["rollbacks"] == "0"
    for name in ("loss", "m", "a"):
        assert float(rows[-1][name]) < 0.8 * float(rows[0][name]), name


def test_a_finished_run_is_skipped_and_other_settings_are_refused(small, capsys):
    folder, argv = small
    before = contents(folder)
    assert train.main(argv) == 0
    assert f"skipped (python evaluate.py {folder} scores it again)" in capsys.readouterr().out
    refused(capsys, [*argv, "--lr", "0.5"], "other settings", "lr 0.001 there, 0.5 here", "--name")
    assert contents(folder) == before


def test_the_last_lines_name_the_picture_and_the_next_command(parts, capsys, monkeypatch):
    argv, run = argv_for(parts), run_of(parts)
    assert train.main(argv) == 0
    expected = [f"results are in {run}",
                f"open {run / 'qualitative.png'}: some images, their restorations and anomaly maps",
                f"next: python predict.py {run} {parts / 'bolt/test'} --out found/"]
    assert capsys.readouterr().out.splitlines()[-3:] == expected
    assert (run / "qualitative.png").exists()
    monkeypatch.chdir(parts.parent)                       # the photos lie below: a shorter path
    assert train.main(argv) == 0
    expected[2] = f"next: python predict.py {run} parts/bolt/test --out found/"
    assert capsys.readouterr().out.splitlines()[-3:] == expected


def test_a_defective_photo_among_the_good_ones_is_named_at_the_end(parts, capsys, monkeypatch):
    """All photos of train/good are scored. Here the score is the brightest pixel."""
    monkeypatch.setattr(evaluate, "scores_of", lambda model, s, images, indices: [
        images[[k]].max().item() / 255 for k in indices])
    assert train.main(argv_for(parts)) == 0
    assert "none of the 12 photos of good parts that were scored" in capsys.readouterr().out
    assert not (run_of(parts) / "odd.png").exists()
    png(parts / "bolt/train/good/odd.png", 2 * picture(100, 40))
    assert train.main(argv_for(parts, "--name", "odd")) == 0
    folder, out = run_of(parts, "odd"), capsys.readouterr().out.splitlines()
    at = [k for k, line in enumerate(out) if line == f"  look at this photo: its score stands "
          f"out from those of the other good parts; a defective part among the good ones, or a "
          f"rare good one? drawn in {folder / 'odd.png'}"]
    assert len(at) == 1
    assert out[at[0] + 1] == f"    {parts / 'bolt/train/good/odd.png'}: score 0.7843"
    assert out[-2] == f"open {folder / 'odd.png'}: photos of good parts whose scores stand out"
    assert (folder / "odd.png").exists()


# ---------------------------------------------------------------- interruption and resuming

def same_training(a, b) -> None:
    """Two run folders hold the same weights, averages and moments, scores and log, bit for bit."""
    one, other = (torch.load(run / "last.pt", weights_only=True) for run in (a, b))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][k], other[part][k]) for k in one[part]), part
    moments, others = (moments_of(state["optimizer"]) for state in (one, other))
    assert len(moments) == len(others) > 0 and all(map(torch.equal, moments, others))
    assert (a / "scores.csv").read_bytes() == (b / "scores.csv").read_bytes()
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(run / "log.csv")]
            for run in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) == 4                  # 11 steps, 3 an epoch


@pytest.mark.network
def test_an_interrupted_run_resumes_bit_identically(parts, capsys, monkeypatch):
    """The images grow between the interruption and the end."""
    flags = ["--steps", "11", "--grow", "0.5:0.6"]
    assert train.main(argv_for(parts, *flags, "--name", "whole")) == 0
    assert "at 16 px until step 7, then 32 px (4 epochs)" in capsys.readouterr().out
    argv = argv_for(parts, *flags, "--name", "broken")
    interrupt(monkeypatch, 5)
    assert train.main(argv) == 130
    assert ("stopped at step 5 of 11; the same command with --resume continues from there"
            in capsys.readouterr().err)
    monkeypatch.undo()
    refused(capsys, argv, "unfinished run", "--resume continues it")
    assert train.main([*argv, "--resume"]) == 0
    same_training(run_of(parts, "whole"), run_of(parts, "broken"))


def test_resume_takes_the_settings_of_the_folder(parts, monkeypatch):
    """The command line says only which run it is. What it does not say is the folder's: the preset,
    the network's size, the length, the learning rate."""
    argv = argv_for(parts, "--steps", "11", "--lr", "5e-4", "--clip", "0.5", "--seed", "3")
    assert train.main([*argv, "--name", "whole"]) == 0
    interrupt(monkeypatch, 5)
    assert train.main([*argv, "--name", "broken"]) == 130
    monkeypatch.undo()
    config = json.loads((run_of(parts, "broken") / "config.json").read_text())
    identity = ["--data", str(parts), "--category", "bolt", "--name", "broken", "--out",
                str(parts.parent / "runs"), "--device", "cpu", "--resume"]
    assert train.main(identity) == 0
    same_training(run_of(parts, "whole"), run_of(parts, "broken"))
    resumed = json.loads((run_of(parts, "broken") / "config.json").read_text())
    assert resumed == config


def test_resume_refuses_a_flag_that_differs_and_takes_one_that_does_not(parts, capsys, monkeypatch):
    argv = argv_for(parts, "--steps", "6", "--lr", "5e-4")
    interrupt(monkeypatch, 2)
    assert train.main(argv) == 130
    monkeypatch.undo()
    before = contents(run_of(parts))
    for flags, words in ((["--lr", "0.5"], "--lr: lr 0.0005 there, 0.5 here"),
                         (["--no-pe"], "--pe: pe 2d there, none here"),
                         (["--preset", "cpu"], "--preset: preset quick there, cpu here")):
        refused(capsys, [*argv, "--resume", *flags], words, "--resume takes the settings of",
                "leave it out", "--name")
    assert contents(run_of(parts)) == before
    assert train.main([*argv, "--resume", "--lr", "0.0005", "--pe", "2d", "--steps", "9",
                       "--memory-gb", "0", "--eval-batch", "2", "--checkpoint-every", "2"]) == 0
    config = json.loads((run_of(parts) / "config.json").read_text())
    assert (config["lr"], config["steps"], config["memory_gb"], config["eval_batch"],
            config["checkpoint_every"]) == (0.0005, 9, 0, 2, 2)
    assert json.loads((run_of(parts) / "metrics.json").read_text())["step"] == 9
    refused(capsys, [*argv, "--resume", "--steps", "4"], "is 9 steps long already")


def test_same_seed_same_run_and_another_seed_another(parts):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train.main(argv_for(parts, "--name", name, "--seed", str(seed), "--steps", "3")) == 0
    a, b, c = (torch.load(run_of(parts, name) / "last.pt", weights_only=True)["model"]
               for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.network
def test_a_full_disk_at_the_checkpoint_leaves_nothing_half_written(parts, capsys, monkeypatch):
    """The file size limit of the process makes every larger write fail, as a full disk does.

    It is set while a checkpoint is written. Python ignores the signal that comes with it.
    """
    save, (soft, hard) = runs.Run.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(run):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            save(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(runs.Run, "save", save_on_a_full_disk)
    assert train.main(argv_for(parts)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error, error
    assert "last.pt: cannot be written" in error.splitlines()[-1]
    assert set(contents(run_of(parts))) == {"config.json", "data.json"}


# ---------------------------------------------------------------- other ways to run

def test_eval_every_logs_each_evaluation(parts):
    assert train.main(argv_for(parts, "--steps", "6", "--eval-every", "2")) == 0     # 3 an epoch
    rows = rows_of(run_of(parts) / "eval.csv")
    assert [row["epoch"] for row in rows] == ["2"] and 0 <= float(rows[0]["image_auroc"]) <= 1


def test_light_changes_the_whole_batch_and_nothing_without_it(parts):
    s, _ = parse(argv_for(parts))
    run_data, cpu = load_run_data(s), torch.device("cpu")
    usual, same, lit = (train.make_batch(dataclasses.replace(s, light=light), run_data, 20, 0,
                                         cpu)[0] for light in (0.0, 0.0, 0.5))
    assert torch.equal(usual, same)
    assert all(not torch.equal(a, b) for a, b in zip(usual, lit))


@pytest.mark.parametrize("share, count", [(0.5, 2), (0.75, 3), (0.6, 3), (1.0, 4)])
def test_so_many_images_of_a_batch_have_an_anomaly(parts, share, count):
    s, _ = parse(argv_for(parts, "--anomalous", str(share)))
    _, eps, M, _, _ = train.make_batch(s, load_run_data(s), 20, 0, torch.device("cpu"))
    for part in (M, eps):
        assert part.flatten(1).any(1).tolist() == count * [True] + (4 - count) * [False]


def test_images_grow_as_the_settings_say(parts):
    """Image, mask, guide and texture alike; the foreground stays a mask."""
    s, _ = parse(argv_for(parts, "--grow", "0.5:0.4,0.75:0.8", "--steps", "10"))
    assert [train.image_side(s, step, 10) for step in range(10)] == 4 * [16] + 4 * [24] + 2 * [32]
    run_data, cpu = load_run_data(s), torch.device("cpu")
    run_data.foreground[:] = False
    run_data.foreground[:, :, 10:23, 7:21] = True
    whole, small = (train.make_batch(s, run_data, 20, 0, cpu, side=side) for side in (32, 16))
    assert [part.shape[2:] for part in small[:4]] == 4 * [(16, 16)]
    for larger, smaller in zip(whole[:2], small[:2]):         # x, and eps outside the anomaly
        shrunk = torch.nn.functional.avg_pool2d(larger, 2)
        assert (shrunk - smaller).abs().mean() < 0.1
    assert set(small[2].unique().tolist()) <= {0, 1} and small[2].sum() > 0
    assert small[2][..., :5, :].sum() == small[2][..., 12:, :].sum() == 0
    assert torch.equal(whole[4], small[4])                    # t, by the same random numbers


def test_an_epoch_ends_with_what_is_left(parts, monkeypatch):
    """11 images in batches of 4: 4, 4 and 3, each image once; two ranks fill the last one up."""
    s, _ = parse(argv_for(parts, "--rotation", "0", "--anomalous", "0.5"))
    run_data, cpu = load_run_data(s), torch.device("cpu")
    assert len(run_data.train_indices) == 11 and run_data.steps_per_epoch(s.batch) == 3
    batches = [train.make_batch(s, run_data, 20, step, cpu) for step in range(3)]
    assert [len(x) for x, *_ in batches] == [4, 4, 3]
    assert [M.flatten(1).any(1).tolist() for _, _, M, *_ in batches][2] == [True, True, False]
    images = torch.cat([x for x, *_ in batches]).flatten(1).unique(dim=0)
    assert len(images) == 11
    few = dataclasses.replace(s, batch=16)                        # fewer images than a batch
    assert run_data.steps_per_epoch(16) == 1
    assert len(train.make_batch(few, run_data, 20, 0, cpu)[0]) == 16
    monkeypatch.setattr(ranks, "COUNT", 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "RANK", rank)
        halves.append(train.make_batch(s, run_data, 20, 2, cpu))
    assert [M.flatten(1).any(1).tolist() for _, _, M, *_ in halves] == 2 * [[True, False]]
    whole = torch.cat([x for x, *_ in halves])
    assert all(any(torch.equal(x, y) for y in whole) for x in batches[2][0])


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


def test_all_categories_skip_the_finished_and_end_with_a_table(factory, capsys):
    parts = factory / "parts"
    shutil.copytree(parts / "bolt", parts / "nut")
    argv = argv_for(parts)
    argv[argv.index("bolt")] = "all"
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "bolt is finished" in out and re.search(r"\nbolt .*\nnut .*\nmean of 2 ", out)


def test_the_tables_mean_counts_zeros_and_leaves_out_what_is_undefined(capsys):
    print_table([{"category": "bolt", "image_auroc": 0.5, "false_alarm_rate": 0.0},
                 {"category": "nut", "image_auroc": None, "false_alarm_rate": 0.5}])
    mean = capsys.readouterr().out.splitlines()[-1].split()
    assert mean == ["mean", "of", "2", "50.0", "-", "-", "-", "25.0", "-"]


@pytest.mark.parametrize("flags", [["--no-pe"], ["--no-sim-mask"], ["--drop-loss", "c"],
                                   ["--T", "5", "--schedule", "root"],
                                   pytest.param(["--final-mask", "last"],
                                                marks=pytest.mark.picture),
                                   ["--preset", "authors", "--channels", "8", "--epochs", "1",
                                    "--resize", "32", "--crop", "32"]])
def test_ablations_run(parts, flags):
    assert train.main(argv_for(parts, "--steps", "2", *flags)) == 0
    results = json.loads((run_of(parts) / "metrics.json").read_text())
    assert 0 <= results["aupro"] <= 1


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(parts, monkeypatch):
    """Traced, but not handed to the C++ compiler, which takes minutes."""
    compile_module, compiled_modules = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled_modules.append(self)
                        or compile_module(self, backend="eager"))
    for name in ("--no-compile", "--compile"):
        assert train.main(argv_for(parts, "--steps", "3", name, "--name", name[2:])) == 0
    plain, compiled = (runs.load_model(run_of(parts, name) / "last.pt",
                                       torch.device("cpu"))[0].state_dict()
                       for name in ("no-compile", "compile"))
    assert len(compiled_modules) == 1 and plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[k], compiled[k], atol=1e-5) for k in plain)


@pytest.mark.picture
def test_without_masks_or_without_a_test_set(parts, capsys):
    shutil.rmtree(parts / "bolt" / "ground_truth")
    assert train.main(argv_for(parts)) == 0
    assert "no ground truth" in capsys.readouterr().err
    results = json.loads((run_of(parts) / "metrics.json").read_text())
    assert results["aupro"] is None and results["image_auroc"] is not None
    shutil.rmtree(parts / "bolt" / "test")
    assert train.main(argv_for(parts, "--name", "untested")) == 0
    out, folder = capsys.readouterr().out, run_of(parts, "untested")
    assert "not scored" in out
    assert out.splitlines()[-2:] == [
        f"open {folder / 'preview.png'}: some images, their restorations and anomaly maps",
        f"next: python predict.py {folder} PHOTOS --out found/"]
    assert (folder / "preview.png").stat().st_size > 10_000
    assert 0 <= json.loads((folder / "metrics.json").read_text())["synthetic_found"] <= 1
    refused(capsys, argv_for(parts, "--name", "watched", "--eval-every", "1"), "--eval-every 1",
            "no test images")
    assert train.main(argv_for(parts, "--name", "untested")) == 0
    assert "is finished with these settings" in capsys.readouterr().out


def test_the_learning_rate_of_the_paper():
    s = Settings()
    rates = [train.learning_rate(s, epoch * 26, 1500 * 26, 26) for epoch in (0, 799, 800, 1499)]
    assert rates == pytest.approx([1e-5, 1e-5, 1e-6, 1e-6])


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
    (["--grow", "48:0.5"], ["--grow 48:0.5", "SIDE:SHARE", "between 0 and 1"]),
    (["--grow", "0.5:0.5,0.4:0.6"], ["--grow 0.5:0.5,0.4:0.6", "that rise"]),
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
    (["--preset", "slow"], ["--preset", "slow"]),
    (["--device", "cuda:9"], ["--device cuda:9"]),
    (["--device", "toaster"], ["--device toaster"]),
    (["--foreground", "nowhere"], ["--foreground nowhere", "no such folder"]),
    (["--category", "bolts"], ["no category 'bolts'", "did you mean bolt?"]),
    (["--category", ""], ["--category", "one of bolt"]),
    (["--data", "mvtec"], ["no mvtec data under", "mvtec-ad", "--root"]),
    (["--data", "nonsense"], ["neither a data set"]),
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


def test_what_the_crop_takes_from_the_ground_truth_is_printed(parts):
    for k, place in enumerate([(slice(0, 4), slice(0, 40)), (slice(18, 22), slice(18, 22))]):
        mask = np.zeros((40, 40), np.uint8)
        mask[place] = 255
        mask[36:40, 36:40] = 255                                       # in the corner of both
        Image.fromarray(mask).save(parts / f"bolt/ground_truth/dent/{k}_mask.png")
    s = Settings(data=str(parts), category="bolt", resize=64, crop=32)
    for crop, line in ((32, "ground truth: 4 regions in 2 masks, 1 where they are scored; 1 masks "
                            "lie outside the crop; "),
                       (64, "ground truth: 4 regions in 2 masks, 4 where they are scored; ")):
        notes = load_run_data(dataclasses.replace(s, crop=crop)).notes
        assert [note for note in notes if note.startswith(line)], notes


def test_resume_checks_the_settings_of_the_folder_and_not_those_of_a_default_preset(
        parts, monkeypatch):
    """A crop of 104 pixels is larger than the 96 pixels of the cpu preset, which is the default."""
    argv = argv_for(parts, "--steps", "6", "--resize", "128", "--crop", "104", "--preset", "cpu")
    interrupt(monkeypatch, 2)
    assert train.main(argv) == 130
    monkeypatch.undo()
    identity = ["--data", str(parts), "--category", "bolt", "--out", str(parts.parent / "runs"),
                "--device", "cpu", "--resume"]
    assert train.main([*identity, "--crop", "104", "--precision", "auto"]) == 0
    assert json.loads((run_of(parts) / "config.json").read_text())["crop"] == 104


def test_the_announced_time_counts_larger_steps_as_longer_ones(capsys):
    """30 steps, 10 of 1 s and then 20 of 4 s: 80 s remain, not 20."""
    with train.progress_bar(kind=train.StepBar, total=30) as bar:
        bar.work = 10 + 4 * 20
        bar.start_t -= 10
        for _ in range(11):
            bar.advance()
    assert "about 80 seconds for the remaining 20 steps" in capsys.readouterr().out


def test_the_time_is_not_announced_again_after_a_return_to_a_checkpoint(capsys):
    with train.progress_bar(kind=train.StepBar, total=30) as bar:
        for _ in range(12):
            bar.advance()
        bar.update(-12)
        for _ in range(12):
            bar.advance()
    assert capsys.readouterr().out.count("judged by the first ten") == 1
