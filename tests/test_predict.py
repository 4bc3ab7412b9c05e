"""predict.py on a small trained model: photos, files that it writes, thresholds, bad arguments."""
import dataclasses
import json
import ntpath
import os
import re
import shutil
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import data
import download
import evaluate
import predict
import runs
import train
from helpers import argv_for, contents, files_in, picture, png, rows_of, run_predict, write_photos
from settings import Settings
from support.console import InputError
from support.files import locked_folder
from support.page import address_of


@pytest.fixture
def photos(demo_root, tmp_path):
    """Eight test images of the demo as a user's photographs: two good ones, six defective."""
    test = demo_root / "demo" / "fabric" / "test"
    kinds = [p for p in sorted(test.iterdir()) if p.name != "good"]
    chosen = sorted((test / "good").iterdir())[:2] + [sorted(k.iterdir())[j]
                                                      for k in kinds[:3] for j in (0, 1)]
    folder = tmp_path / "photos"
    for k, path in enumerate(chosen):
        target = folder / ("day 1" if k % 2 else "day 2") / f"{k}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def test_tables_and_pictures_are_written_for_every_photo(small, photos, tmp_path, capsys):
    out = tmp_path / "found"
    run = small[0]
    assert predict.main([str(run), str(photos), "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "8 held-out and 72 training images" in printed and "8 images inspected" in printed
    scores = rows_of(out / "scores.csv")
    assert [row["file"] for row in scores] == sorted(
        p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    for row in scores:
        above = float(row["score"]) > float(row["threshold"])
        assert row["verdict"] == ("defective" if above else "normal")
        for kind in ("heatmaps", "restored"):
            with Image.open(out / kind / (row["file"] + ".png")) as picture:
                assert picture.size == (256, 256)
    written = json.loads((run / "metrics.json").read_text())
    assert float(scores[0]["threshold"]) == pytest.approx(written["threshold"], rel=1e-5)
    test_scores = [float(row["score"]) for row in rows_of(run / "scores.csv")]
    assert float(scores[0]["score"]) in [pytest.approx(score, abs=1e-4) for score in test_scores]


def test_the_same_input_gives_the_same_files(small, photos, tmp_path):
    for name in ("a", "b"):
        assert predict.main([str(small[0] / "last.pt"), str(photos), "--out", str(tmp_path / name),
                             "--infer-steps", "2", "--maps", "tiff"]) == 0
    a, b = files_in(tmp_path / "a"), files_in(tmp_path / "b")
    assert {k: v for k, v in a.items() if k != ".lock"} == {k: v for k, v in b.items()
                                                            if k != ".lock"}
    assert len(a) == 4 + 3 * 8                    # tables, page and lock; three pictures of each


def test_pictures_of_a_first_call_are_not_inspected_by_a_second_one(small, photos):
    for _ in range(2):
        assert predict.main([str(small[0]), str(photos), "--out", str(photos / "found"),
                             "--infer-steps", "1"]) == 0
        assert len(rows_of(photos / "found" / "scores.csv")) == 8


@pytest.mark.parametrize("fast, precision", [(True, "bf16"), (False, "float32")])
def test_a_model_trained_in_bfloat16_runs_where_that_is_slow(small, tmp_path, monkeypatch, fast,
                                                             precision):
    state = torch.load(small[0] / "last.pt", weights_only=True)
    state["settings"]["precision"] = "bf16"
    torch.save(state, tmp_path / "bf16.pt")
    monkeypatch.setattr(runs, "fast_bf16", lambda device: fast)
    model, s, _ = runs.load_model(tmp_path / "bf16.pt", torch.device("cpu"))
    assert s.precision == precision and model.bf16 == (precision == "bf16")
    inspector = predict.load(tmp_path / "bf16.pt", "cpu")
    weights = {p.dtype for p in inspector.model.parameters()}
    assert (torch.bfloat16 in weights) == fast           # converted once, not in each call
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for ours, theirs in zip(inspector.model.restore(x, 2), model.restore(x, 2)):
        assert torch.equal(ours, theirs)


def test_regions_are_those_of_the_map(small, photos, tmp_path):
    out = tmp_path / "found"
    assert predict.main([str(small[0]), str(photos), "--out", str(out), "--maps", "tiff",
                         "--infer-steps", "3", "--false-alarms", "0.3"]) == 0
    regions, count = rows_of(out / "regions.csv"), 0
    for row in rows_of(out / "scores.csv"):
        file = row["file"]
        full = np.asarray(Image.open(out / "maps" / (file + ".tiff")))
        level = min(predict.load(small[0], false_alarms=0.3).threshold.value, 0.999 * full.max())
        labels, number = ndimage.label(full > level, np.ones((3, 3)))
        own = [region for region in regions if region["file"] == file]
        assert len(own) == (number if row["verdict"] == "defective" else 0)
        assert bool(own) == (row["verdict"] == "defective")
        count += number
        for region in own:
            x, y, w, h = (int(region[k]) for k in ("x", "y", "width", "height"))
            box = full[y:y + h, x:x + w]
            assert box.max() >= float(region["peak"]) * (1 - 1e-5)
            assert int(region["area"]) <= (box > level).sum()
    assert count > 0


def test_maps_are_written_in_the_layout_of_mvtecs_evaluation(small, demo_root, tmp_path):
    test = demo_root / "demo" / "fabric" / "test"
    image = sorted((test / "good").iterdir())[0]
    assert predict.main([str(small[0]), str(image), "--out", str(tmp_path), "--maps", "tiff",
                         "--infer-steps", "1"]) == 0
    with Image.open(tmp_path / "maps/fabric/test/good" / f"{image.stem}.tiff") as picture:
        assert picture.mode == "F" and picture.size == (256, 256)


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (97, 131), (8, 8)])
def test_the_crop_and_the_resize_are_undone(size):
    """A bright square stays where it is; what the crop leaves out is NaN and the image itself."""
    W, H = size
    s = Settings(resize=64, crop=48)
    image = np.full((H, W, 3), 100, np.uint8)
    M_final, x_0 = np.zeros((48, 48), np.float32), torch.zeros(3, 48, 48)
    M_final[12:24, 24:36] = 1
    edge = (s.resize - s.crop) / 2 / s.resize
    full, restored = predict.uncrop(image, M_final, x_0, edge)
    assert full.shape == (H, W) and restored.shape == image.shape
    rows, columns = np.indices((H, W)) + 0.5
    outside = (rows < H / 8 - 1) | (rows > H * 7 / 8 + 1) | (columns < W / 8 - 1)
    assert np.isnan(full[outside]).all() and (restored[outside] == 100).all()
    if min(size) > 50:
        y, x = ndimage.center_of_mass(np.nan_to_num(full))
        assert y + 0.5 == pytest.approx(H * (8 + 18) / 64, abs=1)
        assert x + 0.5 == pytest.approx(W * (8 + 30) / 64, abs=1)
        inside = ~np.isnan(full)
        assert (restored[inside] == 128).all() and inside.mean() == pytest.approx(0.5625, abs=0.03)


def test_images_inspected_together_get_the_score_of_each_alone(small, demo_root):
    """Whatever their sizes; the results have the size of their image."""
    model, s, _ = runs.load_model(small[0] / "last.pt", torch.device("cpu"))
    path = sorted((demo_root / "demo/fabric/test/good").iterdir())[0]
    image = np.array(Image.open(path).convert("RGB"))
    small_image = np.array(Image.fromarray(image).resize((90, 70)))
    inspector = predict.Inspector(model, dataclasses.replace(s, infer_steps=2), None)
    first, second = inspector.inspect([image, small_image])
    alone = inspector.inspect(image)
    assert first.score == pytest.approx(alone.score, rel=1e-3)
    assert first.M_final.shape == (256, 256) and second.M_final.shape == (70, 90)
    assert second.restored.shape == (70, 90, 3) and second.restored.dtype == np.uint8
    assert np.nanmax(first.M_final) == pytest.approx(first.score, rel=0.05)


def test_unreadable_images_are_counted_and_the_rest_goes_on(small, photos, tmp_path, capsys):
    (photos / "day 1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    (photos / "day 1" / "empty.jpg").touch()
    status = predict.main([str(small[0]), str(photos), "--out", str(tmp_path / "found"),
                           "--infer-steps", "1"])
    printed = capsys.readouterr()
    assert status == 1 and "8 images inspected" in printed.out
    assert "2 could not be read" in printed.out
    errors = [line for line in printed.err.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(errors) == 2 and "broken.png" in errors[0] and "empty.jpg" in errors[1]
    assert len(rows_of(tmp_path / "found" / "scores.csv")) == 8


def test_nothing_is_written_outside_of_out(small, photos, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    before = files_in(photos)
    assert predict.main([str(small[0]), "../../photos/day 1", "../../photos/day 2", "--out",
                         "found"]) == 0
    assert files_in(photos) == before
    assert len(list((tmp_path / "a" / "b" / "found").rglob("*.png"))) == 16


def test_the_map_that_is_inspected_is_the_one_that_the_run_scores(small):
    model, s, _ = runs.load_model(small[0] / "last.pt", torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for kind in ("recon", "disc", "last"):
        s = dataclasses.replace(s, final_mask=kind)
        inspection = predict.Inspector(model, s, None).inspect(image)
        x = data.scale(torch.tensor(image).permute(2, 0, 1)[None])
        restored = model.restore(x, s.infer_steps)
        M = {"recon": restored.M_recon, "disc": restored.M_disc, "last": restored.M_last}[kind]
        expected = torch.nn.functional.avg_pool2d(M, 7, 1, 3).amax().item()
        assert inspection.score == pytest.approx(expected, rel=1e-4)


def test_a_final_mask_that_does_not_exist_is_refused(small):
    with pytest.raises(ValueError, match="final_mask 'first': one of combined, disc, recon, last"):
        predict.load(small[0], final_mask="first")


def test_a_long_list_goes_through_the_network_in_parts(small, photos, monkeypatch):
    model, sizes = predict.load(small[0], infer_steps=1), []
    restore = model.model.restore
    monkeypatch.setattr(model.model, "restore",
                        lambda x, steps: sizes.append(len(x)) or restore(x, steps))
    files = [str(file) for file in sorted(photos.rglob("*.png"))]
    scores = [inspection.score for inspection in model.inspect(files + files[:3])]
    assert sizes == [8, 3] and scores[8:] == pytest.approx(scores[:3], rel=1e-4)
    assert model.inspect([]) == []


def test_no_picture_outside_the_folder_is_removed(tmp_path):
    (tmp_path / "mine.png").touch(), (tmp_path / "out" / "heatmaps").mkdir(parents=True)
    (tmp_path / "out" / "heatmaps" / "old.png").touch()
    (tmp_path / "out" / "scores.csv").write_text(f"file\n{tmp_path / 'mine'}\n../mine\nold\n")
    predict.remove_old_pictures(tmp_path / "out" / ".." / "out")
    assert (tmp_path / "mine.png").exists() and not list((tmp_path / "out").rglob("*.png"))


def test_another_false_alarm_rate_moves_the_threshold(small, photos, tmp_path, capsys):
    limits = []
    for rate in ("0.01", "0.5"):
        out = tmp_path / rate
        assert predict.main([str(small[0]), str(photos / "day 1"), "--out", str(out),
                             "--false-alarms", rate]) == 0
        limits.append(float(rows_of(out / "scores.csv")[0]["threshold"]))
    assert limits[0] > limits[1]
    rates = re.findall("expected false alarm rate: ([0-9]+) % of good", capsys.readouterr().out)
    assert rates[0] in ("1", "11") and rates[1] in ("49", "44")        # of the held-out ones


def untrained(folder: Path) -> Path:
    """The checkpoint, outside of a run folder, of a model that has no threshold."""
    s = Settings(resize=32, crop=32, channels=8, T=2, device="cpu")
    runs.new_run(folder, s, None, runs.build_model(s)).save()
    return (folder / "last.pt").rename(folder / "model.pt")


def test_without_held_out_images_there_are_scores_but_no_verdict(photos, tmp_path, capsys):
    model = untrained(tmp_path)
    assert predict.main([str(model), str(photos), "--out", str(tmp_path / "o")]) == 0
    assert "--calibrate GOOD_PHOTOS gives it one" in capsys.readouterr().out
    rows = rows_of(tmp_path / "o" / "scores.csv")
    assert len(rows) == 8 and all(row["verdict"] == row["threshold"] == "" for row in rows)
    assert rows_of(tmp_path / "o" / "regions.csv") == []


def test_good_photos_give_a_finished_model_its_threshold(photos, tmp_path, capsys, monkeypatch):
    model = untrained(tmp_path)
    assert predict.load(model).inspect(str(next(photos.rglob("*.png")))).verdict == ""
    assert predict.main([str(model), "--calibrate", str(photos)]) == 0
    printed = capsys.readouterr().out
    assert "from 8 held-out images" in printed and "no threshold before" in printed
    assert ("8 photos and 0 scores of the training cannot promise 5 % false alarms; 19 scores can"
            in printed)
    scores = [predict.load(model).inspect(file).score for file in photos.rglob("*.png")]
    assert predict.load(model).threshold.value == pytest.approx(max(scores), rel=1e-5)
    assert predict.main([str(model), str(photos), "--out", str(tmp_path / "o")]) == 0
    assert {row["verdict"] for row in rows_of(tmp_path / "o" / "scores.csv")} == {"normal"}
    one = str(min(photos.rglob("*.png"), key=lambda file: predict.load(model).inspect(file).score))
    assert predict.main([str(model), "--calibrate", one]) == 0               # in place of the eight
    assert predict.load(model).threshold.value == pytest.approx(min(scores), rel=1e-5)
    for _ in range(2):
        assert predict.main([str(model), "--calibrate", str(photos)]) == 0
        assert predict.load(model).threshold.value == pytest.approx(max(scores), rel=1e-5)
        assert "from 8 held-out images" in capsys.readouterr().out
    (tmp_path / "maps").mkdir()                         # a name of ours, but nothing of ours in it
    shutil.copy(one, tmp_path / "maps")
    monkeypatch.chdir(tmp_path)
    assert predict.main([str(model), "--calibrate", "maps"]) == 0
    with pytest.raises(SystemExit):
        predict.main([str(model), "--calibrate", one, "--false-alarms", "0.5"])
    assert "are for IMAGES" in capsys.readouterr().err
    assert "Inspection(score" in repr(predict.load(model).inspect(one))


def test_photos_for_a_threshold_that_stand_out_are_named_and_do_not_set_it(
        tmp_path, capsys, monkeypatch):
    """Here the score is the brightest pixel."""
    model, good = untrained(tmp_path), tmp_path / "good"
    monkeypatch.setattr(predict, "scores_of", lambda model, s, images, indices: [
        images[[k]].max().item() / 255 for k in indices])
    for k in range(25):
        png(good / f"{k}.png", picture(100 + k, 40))
    assert predict.main([str(model), "--calibrate", str(good)]) == 0
    assert "none of the 25 photos of good parts that were scored" in capsys.readouterr().out
    assert predict.load(model).threshold.value == pytest.approx(124 / 255)
    png(good / "odd.png", picture(250, 40)), png(good / "odd 2.png", picture(240, 40))
    assert predict.main([str(model), "--calibrate", str(good)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  expected false alarm rate: 11 % of good parts (plausible range 2 to 24 %)" in lines
    start = next(k for k, line in enumerate(lines) if line.startswith("  look at these 2 photos: "))
    assert lines[start].endswith(f"drawn in {tmp_path / 'odd-calibrate.png'}")
    assert [line.split(":")[0].strip() for line in lines[start + 1:start + 3]] == [
        str(good / "odd.png"), str(good / "odd 2.png")]
    assert predict.load(model).threshold.value == pytest.approx(124 / 255)
    assert Image.open(tmp_path / "odd-calibrate.png").format == "PNG"


@pytest.mark.parametrize("change, expected", [
    ({"run": "nowhere"}, "nowhere does not exist"),
    ({"images": "nothing/*.png"}, "nothing/*.png: no image there"),
    ({"images": "."}, ".: no image there"),
    ({"more": ["--infer-steps", "99"]}, "--infer-steps 99"),
    ({"more": ["--batch", "0"]}, "--batch 0"),
    ({"more": ["--false-alarms", "2"]}, "--false-alarms 2"),
    ({"more": ["--device", "toaster"]}, "--device toaster"),
])
def test_a_wrong_argument_is_refused_in_one_line_and_nothing_is_written(
        small, photos, tmp_path, monkeypatch, capsys, change, expected):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    argv = [change.get("run", str(small[0])), change.get("images", str(photos)), "--out", "found",
            *change.get("more", [])]
    assert predict.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and expected in error and "Traceback" not in error
    assert not (empty / "found").exists()


def test_an_out_folder_that_is_a_file_is_refused(small, photos, tmp_path, capsys):
    (tmp_path / "found").touch()
    assert predict.main([str(small[0]), str(photos), "--out", str(tmp_path / "found")]) == 2
    assert "found cannot be made" in capsys.readouterr().err


# ---------------------------------------------------------------- photos in any folder

def test_pictures_of_any_call_are_not_inspected(tmp_path):
    """Results beside the photos, of this call or another, by whatever path."""
    line = write_photos(tmp_path / "line", 3)
    (tmp_path / "link").symlink_to(line)
    for folder in (line / "monday", line):
        (folder / "regions.csv").parent.mkdir(exist_ok=True)
        (folder / "regions.csv").touch()
        for name in predict.PICTURES:
            png(folder / name / "0.png.png", picture())
    png(line / "tuesday/heatmaps/0.png", picture())                 # of a call under way
    for folder in (line, tmp_path / "link"):
        for out in (line / "tuesday", tmp_path / "link/tuesday"):
            photos, notes = predict.find_photos([str(folder)], out)
            assert [p.name for p in photos] == ["0.png", "1.png", "2.png"] and not notes
    assert len(predict.find_photos([str(line)], tmp_path / "elsewhere")[0]) == 4
    assert len(predict.find_photos([str(line), str(tmp_path / "link"), str(line / "*.png")],
                                   line / "tuesday")[0]) == 3       # each photo once


def test_pictures_of_the_photos_of_an_earlier_call_are_removed(trained_parts, tmp_path):
    run, out = trained_parts / "runs/parts/bolt", tmp_path / "found"
    for count, name in ((3, "first"), (1, "second")):
        assert run_predict(run, write_photos(tmp_path / name, count), "--out", out) == 0
    for folder in ("heatmaps", "restored"):
        assert [p.name for p in (out / folder).iterdir()] == ["0.png.png"]
    assert len(rows_of(out / "scores.csv")) == 1


def test_no_map_is_written_over_that_of_another_image(tmp_path):
    names = ["line1/bolt/test/hole/000.png", "line1/bolt/test/hole/000.jpg",
             "line1/bolt/test/hole/001.png", "line2/bolt/test/hole/000.png",
             "line2/bolt/test/hole/002.png", "line2/nut/test/hole/002.png"]
    paths = predict.tiff_paths([tmp_path / name for name in names], names)
    assert len(set(paths)) == 6
    assert paths[2] == "bolt/test/hole/001.tiff" and paths[5] == "nut/test/hole/002.tiff"
    assert paths[1] == "line1/bolt/test/hole/000.jpg.tiff"


def test_photos_on_several_drives_of_windows_have_names_and_addresses(monkeypatch):
    monkeypatch.setattr(predict, "folder_of", PureWindowsPath)
    monkeypatch.setattr(os.path, "abspath", ntpath.abspath)
    monkeypatch.setattr(os.path, "commonpath", ntpath.commonpath)
    monkeypatch.setattr(os.path, "relpath", ntpath.relpath)
    files = [PureWindowsPath(name) for name in (r"C:\line1\a.png", r"D:\line2\a.png")]
    assert predict.relative_names(files, [r"C:\line1", r"D:\line2"]) == ["C/line1/a.png", "D/line2/a.png"]
    assert address_of(files[1], PureWindowsPath(r"C:\found")) == "file:///D:/line2/a.png"


def test_a_large_photo_gets_pictures_of_bounded_size(trained_parts):
    model = predict.load(trained_parts / "runs/parts/bolt", "cpu", infer_steps=1)
    model.threshold = SimpleNamespace(value=-1.0)                   # all of it is one region
    inspection = model.inspect(np.zeros((1500, 4096), np.uint8))
    assert inspection.size == (4096, 1500) and inspection.heat_map().size == (2048, 750)
    box = inspection.regions[0]
    assert [box[k] for k in ("x", "y", "width", "height")] == [0, 0, 4096, 1500]
    assert box["area"] == 4096 * 1500


def test_a_second_call_into_the_same_folder_is_refused(trained_parts, tmp_path, capsys):
    run, out = trained_parts / "runs/parts/bolt", tmp_path / "found"
    with locked_folder(out):
        assert run_predict(run, write_photos(tmp_path / "line"), "--out", out) == 2
    assert "found is in use by another process" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == [".lock"]


def test_results_are_not_written_into_the_folder_of_a_run(factory, capsys):
    run = factory / "runs/parts/bolt"
    before = contents(run)
    assert run_predict(run, write_photos(factory / "line"), "--out", run) == 2
    assert "holds a training's results; choose another folder" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.picture
def test_names_that_are_no_utf_8_are_written_even_in_the_picture(factory):
    """As from an archive of another system: inspected, checked, trained on and scored."""
    name = os.fsdecode(b"caf\xe9")
    root, line = factory / "parts/bolt", write_photos(factory / "line", 3)
    try:
        (line / "1.png").rename(line / f"{name}.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    assert run_predict(factory / "runs/parts/bolt", line, "--out", factory / "found",
                       "--maps", "tiff") == 0
    files = [row["file"] for row in rows_of(factory / "found/scores.csv")]
    assert len(files) == 3 and r"caf\udce9.png" in files
    page = (factory / "found/index.html").read_text(encoding="utf-8")
    assert "heatmaps/caf%E9.png.png" in page and r"caf\xe9.png" in page
    for place in ("test/dent/1{}.png", "ground_truth/dent/1{}_mask.png", "train/good/3{}.png"):
        old = root / place.format("")
        old.rename(old.with_name(old.name.replace("1", name).replace("3", name)))
    assert download.main(["--check", str(root)]) == 0
    argv = argv_for(factory / "parts", "--name", "again", "--steps", "1")
    assert train.main(argv) == 0
    run = factory / "runs/parts/bolt-again"
    assert {"metrics.json", "scores.csv"} <= set(contents(run))
    assert Image.open(run / "qualitative.png").format == "PNG"
    s, _ = runs.load_checkpoint(run / "last.pt")
    assert len(data.load_run_data(s, folder=run).images) == 12
    (run / "metrics.json").unlink()
    assert train.main([*argv, "--resume"]) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_an_error_everywhere(trained_parts, monkeypatch, value):
    """Whatever makes it so: below a threshold it would pass for a good part's."""
    model = predict.load(trained_parts / "runs/parts/bolt", "cpu", infer_steps=1)
    s = dataclasses.replace(model.s, data=str(trained_parts / "parts"), root=str(trained_parts))
    restore = model.model.restore

    def damaged(x, steps):
        restored = restore(x, steps)
        restored.M_disc[0, 0, 3, 3] = value
        return restored

    monkeypatch.setattr(model.model, "restore", damaged)
    with pytest.raises(InputError, match="a score is no number"):
        model.inspect(picture().astype(np.uint8))
    with pytest.raises(InputError, match="a score is no number"):
        evaluate.score(model.model, s, data.load_run_data(s, training=False))


def test_a_photo_that_looks_like_a_mask_is_warned_of_once(factory, capsys):
    photo = factory / "mask_like.png"
    png(photo, np.repeat(np.repeat([[0, 255], [255, 0]], 24, 0), 24, 1).astype(np.uint8))
    assert run_predict(factory / "runs/parts/bolt", photo, "--out", factory / "out", "--pictures",
                       "none", "--maps", "tiff") == 0
    printed = capsys.readouterr()
    assert printed.err.count("at most two grey values") == 1
    assert printed.out.endswith("; index.html, scores.csv, regions.csv and maps are in "
                                f"{factory / 'out'}\n")


def test_the_last_mask_alone_is_that_of_all_steps(trained_parts):
    model = predict.load(trained_parts / "runs/parts/bolt", "cpu", final_mask="last")
    assert model.s.infer_steps == 0
