"""Run folders that are continued, lengthened, moved, shared or damaged, the record of a run's data,
and several categories in one command."""
import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch

import data
import demo
import evaluate
import figures
import import_authors
import metrics
import predict
import runs
import settings
import train
from helpers import (argv_for, authors_state, contents, picture, png, refused, rows_of, run_predict,
                     settings_for, write_photos)
from settings import Settings
from support.console import InputError
from support.files import locked_folder, read_json, save_json


def evaluate_argv(factory: Path, *more: str) -> list[str]:
    """Arguments of evaluate.py for the run of `factory` on its images, on the CPU."""
    return [str(factory / "runs/parts/bolt"), "--data", str(factory / "parts"), "--root",
            str(factory), "--device", "cpu", *more]


# ---------------------------------------------------------------- the record of a run's data

def recorded(s: Settings, folder: Path) -> data.RunData:
    """The data of a run that begins in the folder."""
    run_data = data.load_run_data(s)
    folder.mkdir()
    data.save_data_record(folder, run_data)
    return run_data


def split_names(run_data: data.RunData) -> tuple[list[str], list[str]]:
    """The names of the images trained on, and of those held out."""
    return tuple([run_data.images.paths[k].name for k in indices]
                 for indices in (run_data.train_indices, run_data.held_out))


@pytest.mark.parametrize("training", [True, False])
def test_images_that_are_added_later_change_no_split(bolt, tmp_path, training):
    s = settings_for(bolt, hold_out=0.5)
    before = split_names(recorded(s, tmp_path / "run"))
    for name in ("0000.png", "camera2/009.png", "zzz.png"):
        png(bolt / "train/good" / name, picture())
    run_data = data.load_run_data(s, training, tmp_path / "run")
    assert split_names(run_data) == before and len(run_data.images) == 4
    assert [n for n in run_data.notes if "3 normal images were added" in n and "warning" in n]


def test_images_that_are_gone_stop_only_what_needs_them(bolt, tmp_path):
    s = settings_for(bolt, hold_out=0.5)
    train_names, held_out = split_names(recorded(s, tmp_path / "run"))
    (bolt / "train/good" / train_names[0]).unlink()
    assert split_names(data.load_run_data(s, False, tmp_path / "run")) == (train_names[1:],
                                                                           held_out)
    with pytest.raises(InputError, match=f"{train_names[0]}: gone .*put it back"):
        data.load_run_data(s, True, tmp_path / "run")
    (bolt / "train/good" / held_out[0]).unlink()
    with pytest.raises(InputError, match=f"{held_out[0]}: gone"):
        data.load_run_data(s, False, tmp_path / "run")


def test_a_run_keeps_its_held_out_images_whatever_it_is_asked(factory, capsys):
    """Images are added after the training; then it is scored again, resumed, shown."""
    run, parts = factory / "runs/parts/bolt", factory / "parts"
    before = read_json(run / "metrics.json")
    record = read_json(run / "data.json")
    for k in range(20, 40):
        png(parts / f"bolt/train/good/{k}.png", picture(size=40))
    for command, argv in ((evaluate.main, evaluate_argv(factory)),
                          (train.main, argv_for(parts, "--resume", "--steps", "7"))):
        assert command(argv) == 0
        assert "warning: 20 normal images were added since" in capsys.readouterr().out
        after = read_json(run / "metrics.json")
        assert after["threshold_images"] == before["threshold_images"]
        assert command is train.main or after["threshold"] == before["threshold"]
        assert read_json(run / "data.json") == record
    shown = figures.load_run("parts", str(factory / "runs"), str(factory)).data
    assert split_names(shown)[1] == [Path(name).name for name in record["held_out"]]


def test_another_folder_of_the_same_name_leaves_the_results_alone(factory, capsys):
    run, other = factory / "runs/parts/bolt", factory / "customer/parts"
    shutil.copytree(factory / "parts", other)
    shutil.copy(other / "bolt/test/good/0.png", other / "bolt/test/good/7.png")
    before = contents(run)
    for command, argv in (
            (evaluate.main, evaluate_argv(factory, "--data", str(other))),
            (train.main, argv_for(factory / "parts", "--data", str(other), "--resume")),
            (train.main, argv_for(factory / "parts", "--data", str(other)))):
        refused(capsys, argv, "holds a run of", str(factory / "parts/bolt"), str(other / "bolt"),
                "a run of its own (train.py --name)", command=command)
        assert contents(run) == before


@pytest.mark.network
def test_weights_of_the_authors_are_not_scored_on_one_folder_after_another(factory, capsys):
    parts, other = factory / "parts", factory / "customer/parts"
    shutil.copytree(parts, other)
    shutil.copy(other / "bolt/test/good/0.png", other / "bolt/test/good/7.png")
    torch.save(authors_state(), factory / "weights.pkl")
    run = factory / "runs/parts/bolt-theirs"
    assert import_authors.main([str(factory / "weights.pkl"), str(run), "--data", str(parts),
                                "--channels", "32", "--resize", "32", "--crop", "32",
                                "--infer-steps", "2", "--device", "cpu"]) == 0
    argv = [str(run), "--root", str(factory), "--device", "cpu"]
    assert evaluate.main(argv) == 0
    before = contents(run)
    refused(capsys, [*argv, "--data", str(other)], "holds a run of", command=evaluate.main)
    assert contents(run) == before


@pytest.mark.parametrize("spelled", ["relative", "dotted", "link", "moved"])
def test_the_same_data_by_another_path_is_the_same_run(factory, monkeypatch, capsys, spelled):
    monkeypatch.chdir(factory)
    (factory / "link").symlink_to(factory)
    (factory / "new").mkdir()
    path = {"relative": "parts", "dotted": "./runs/../parts/", "link": "link/parts",
            "moved": "new/parts"}[spelled]
    if spelled == "moved":
        (factory / "parts").rename(factory / "new/parts")
    argv = argv_for(factory / "parts", "--data", path, "--root", str(factory / "nowhere"))
    assert train.main(argv) == 0
    assert "finished with these settings: skipped" in capsys.readouterr().out
    if spelled in ("relative", "moved"):
        (factory / "runs/parts/bolt/metrics.json").unlink()
        assert train.main([*argv, "--resume"]) == 0


def test_a_training_is_not_continued_with_other_textures(factory, capsys):
    argv = [*argv_for(factory / "parts"), "--steps", "9", "--resume"]
    record = read_json(factory / "runs/parts/bolt/data.json")
    png(factory / "dtd" / "images" / "dotted" / "1.jpg", picture(50))
    refused(capsys, argv, f"begun with {record['textures']} textures, now there are 1", "--root")
    shutil.rmtree(factory / "dtd")
    assert train.main(argv) == 0


# ---------------------------------------------------------------- runs that are continued

def without(argv: list[str], flag: str) -> list[str]:
    index = argv.index(flag)
    return argv[:index] + argv[index + 2:]


def test_a_run_in_bfloat16_is_continued_in_float32_where_bfloat16_is_slow(factory, monkeypatch,
                                                                         capsys):
    run, argv = factory / "runs/parts/bolt", without(argv_for(factory / "parts"), "--precision")
    save_json(run / "config.json", {**read_json(run / "config.json"), "precision": "bf16"})
    state = torch.load(run / "last.pt", weights_only=True)
    torch.save({**state, "settings": {**state["settings"], "precision": "bf16"}}, run / "last.pt")
    for module in (runs, settings):
        monkeypatch.setattr(module, "fast_bf16", lambda device: False)
    assert train.main(argv) == 0
    assert "finished with these settings: skipped" in capsys.readouterr().out
    refused(capsys, [*argv, "--precision", "float32"], "precision bf16 there, float32 here")
    (run / "metrics.json").unlink()
    assert train.main([*argv, "--resume"]) == 0
    assert "continues in float32; the run was begun in bf16" in capsys.readouterr().out


def test_a_finished_run_is_trained_for_longer(factory, capsys):
    run, argv = factory / "runs/parts/bolt", argv_for(factory / "parts")
    refused(capsys, [*argv, "--steps", "9"], "a run of 3 steps; --resume trains it to this",
            "--name NAME begins another from the start")
    save_json(run / "config.json", {**read_json(run / "config.json"), "steps": 9})
    (run / "metrics.json").unlink()                           # killed before its first checkpoint
    assert evaluate.main(evaluate_argv(factory)) == 0
    assert (run / "metrics-step3.json").exists() and not (run / "metrics.json").exists()
    assert train.main([*argv, "--steps", "8", "--resume"]) == 0         # ends within an epoch
    assert train.main([*argv, "--steps", "9", "--resume"]) == 0
    assert read_json(run / "metrics.json")["step"] == 9
    log = rows_of(run / "log.csv")
    assert log[-1]["step"] == "9" and all(row["rollbacks"] == "0" for row in log)
    refused(capsys, [*argv, "--steps", "7", "--resume"], "9 steps long already")


def test_an_interrupted_run_can_be_ended_early(factory):
    run, argv = factory / "runs/parts/bolt", argv_for(factory / "parts")
    state = torch.load(run / "last.pt", weights_only=True)
    torch.save({**state, "calibration": None, "settings": {**state["settings"], "steps": 9}},
               run / "last.pt")
    (run / "metrics.json").unlink()                                 # as if stopped at 3 of 9 steps
    assert train.main([*argv, "--steps", "3", "--resume"]) == 0
    assert evaluate.main(evaluate_argv(factory)) == 0
    assert not list(run.glob("metrics-step*"))


def test_a_run_without_a_threshold_names_the_command_that_gives_one(factory, capsys):
    path = factory / "runs/parts/bolt/last.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "calibration": None}, path)                # stopped before its end
    photos = write_photos(factory / "line")
    assert run_predict(path.parent, photos, "--out", factory / "found") == 0
    assert re.search(r"no threshold.*python predict.py \S+ --calibrate", capsys.readouterr().out)
    (path.parent / "metrics.json").unlink()
    assert predict.main([str(path.parent), "--calibrate", str(photos)]) == 0
    assert predict.load(path).threshold
    assert evaluate.main(evaluate_argv(factory)) == 0                   # is still unfinished
    assert not (path.parent / "metrics.json").exists()
    assert (path.parent / "metrics-step3.json").exists()
    calibrated = predict.load(path).threshold
    assert train.main([*argv_for(factory / "parts"), "--resume"]) == 0  # no step is left
    own = torch.load(path, weights_only=True)["calibration"]
    assert predict.load(path).threshold == calibrated != metrics.threshold(
        metrics.CalibrationScores(**own), Settings().false_alarms)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_damaged_weights_gives_no_verdict(factory, capsys, value):
    run = factory / "runs/parts/bolt"
    state = torch.load(run / "last.pt", weights_only=True)
    for weights in (state["model"], state["ema"]):
        next(v for v in weights.values() if v.ndim == 4).view(-1)[0] = value
    torch.save(state, run / "last.pt")
    assert run_predict(run, write_photos(factory / "line"), "--out", factory / "found") == 2
    assert "not finite numbers; the file is damaged" in capsys.readouterr().err
    assert not (factory / "found").exists()
    before = contents(run)
    for command, argv in ((evaluate.main, evaluate_argv(factory)),
                          (train.main, argv_for(factory / "parts", "--resume", "--steps", "9"))):
        refused(capsys, argv, "last.pt", "not finite numbers", command=command)
    assert contents(run)["last.pt"] == before["last.pt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_of_the_authors_are_refused_by_name(value):
    weights = authors_state()
    weights["model.final.bias"][0] = value
    s = Settings(channels=32, preset="authors", authors_schedule=True, pe="row", device="cpu")
    with pytest.raises(ValueError, match="not finite: model.final.bias"):
        import_authors.load_authors_weights(runs.build_model(s), weights)


def test_the_numbers_are_written_before_the_picture(factory, monkeypatch):
    run = factory / "runs/parts/bolt"
    for name in ("metrics.json", "scores.csv", "maps.npz"):
        (run / name).unlink()
    monkeypatch.delattr(evaluate, "draw_restorations")
    with pytest.raises(NameError):
        evaluate.main(evaluate_argv(factory))
    assert {"metrics.json", "scores.csv", "maps.npz"} <= set(contents(run))


# ---------------------------------------------------------------- several categories

@pytest.mark.parametrize("harm", ["empty image", "in use"])
def test_one_category_that_fails_does_not_stop_the_others(factory, capsys, harm):
    parts = factory / "parts"
    for name in ("clip", "disc"):
        shutil.copytree(parts / "bolt", parts / name)
    argv = argv_for(parts, "--steps", "1", "--name", "new", "--category", "all")
    hold = contextlib.nullcontext()
    if harm == "in use":
        hold = locked_folder(factory / "runs/parts/clip-new")
    else:
        (parts / "clip/test/dent/1.png").write_bytes(b"")
    with hold:
        assert train.main(argv) == 2
    printed = capsys.readouterr()
    for name in ("bolt", "disc"):
        assert (factory / f"runs/parts/{name}-new/metrics.json").exists()
    assert re.search(r"image AUROC.*\nbolt .*\ndisc .*\nmean of 2", printed.out)
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and "1 of 3 categories failed" in errors[1] and "clip" in errors[1]


# ---------------------------------------------------------------- runs of notebooks

def test_the_first_cell_of_a_notebook_continues_after_an_interruption(tmp_path, monkeypatch):
    for name in ("TRAIN", "TEST_GOOD", "PER_DEFECT"):
        monkeypatch.setattr(demo, name, 2)
    monkeypatch.setattr(figures, "SMALL", ["--category", "fabric", "--resize", "16", "--crop", "16",
                                           "--channels", "8", "--steps", "6", "--batch", "2",
                                           "--name", "notebook", "--device", "cpu"])
    make_batch, calls = train.make_batch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return make_batch(*args)

    monkeypatch.setattr(train, "make_batch", interrupted)
    args = ("demo", str(tmp_path / "runs"), str(tmp_path / "data"), "fabric")
    with pytest.raises(InputError, match="no finished run"):
        figures.load_run(*args)
    run = figures.load_run(*args)
    assert run.metrics["step"] == 6 and len(run.scores) == len(run.data.test)


def test_a_notebook_finds_the_users_own_data_from_its_own_folder(factory, monkeypatch):
    """The run was trained a folder higher, with --data parts."""
    path = factory / "runs/parts/bolt/last.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "settings": {**state["settings"], "data": "parts"}}, path)
    (factory / "notebooks").mkdir()
    monkeypatch.chdir(factory / "notebooks")
    run = figures.load_run("parts", "../runs", "../data", "bolt")
    assert run.data.category.root == factory / "parts/bolt" and len(run.scores) == 4
