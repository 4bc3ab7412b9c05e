"""predict.py on a small trained model: the files it writes, places, thresholds, bad input."""
import csv
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import metrics
import predict
import runs
from data import scale
from settings import Settings


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def files_in(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


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


def test_what_is_written(small, photos, tmp_path, capsys):
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
    known = {row["file"]: float(row["score"]) for row in rows_of(run / "scores.csv")}
    assert float(scores[0]["score"]) in [pytest.approx(v, abs=1e-4) for v in known.values()]


def test_same_input_same_files(small, photos, tmp_path):
    for name in ("a", "b"):
        assert predict.main([str(small[0] / "last.pt"), str(photos), "--out", str(tmp_path / name),
                             "--infer-steps", "2", "--maps", "tiff"]) == 0
    a, b = files_in(tmp_path / "a"), files_in(tmp_path / "b")
    assert {k: v for k, v in a.items() if k != ".lock"} == {k: v for k, v in b.items()
                                                            if k != ".lock"}
    assert len(a) == 4 + 3 * 8                    # tables, page and lock; three pictures of each


def test_its_own_pictures_are_no_images_to_inspect(small, photos):
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


def test_regions_are_those_of_the_map(small, photos, tmp_path):
    out = tmp_path / "found"
    assert predict.main([str(small[0]), str(photos), "--out", str(out), "--maps", "tiff",
                         "--infer-steps", "3", "--false-alarms", "0.3"]) == 0
    found, count = rows_of(out / "regions.csv"), 0
    for row in rows_of(out / "scores.csv"):
        file = row["file"]
        full = np.asarray(Image.open(out / "maps" / (file + ".tiff")))
        level = min(predict.load(small[0], false_alarms=0.3).threshold.value, 0.999 * full.max())
        labels, number = ndimage.label(full > level, np.ones((3, 3)))
        mine = [region for region in found if region["file"] == file]
        assert len(mine) == (number if row["verdict"] == "defective" else 0)
        assert bool(mine) == (row["verdict"] == "defective")
        count += number
        for row in mine:
            x, y, w, h = (int(row[k]) for k in ("x", "y", "width", "height"))
            box = full[y:y + h, x:x + w]
            assert box.max() >= float(row["peak"]) * (1 - 1e-5)
            assert int(row["area"]) <= (box > level).sum()
    assert count > 0


def test_maps_in_the_layout_of_mvtecs_evaluation(small, demo_root, tmp_path):
    test = demo_root / "demo" / "fabric" / "test"
    image = sorted((test / "good").iterdir())[0]
    assert predict.main([str(small[0]), str(image), "--out", str(tmp_path), "--maps", "tiff",
                         "--infer-steps", "1"]) == 0
    with Image.open(tmp_path / "maps/fabric/test/good" / f"{image.stem}.tiff") as picture:
        assert picture.mode == "F" and picture.size == (256, 256)


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (97, 131), (8, 8)])
def test_crop_and_resize_are_undone(size):
    """A bright square stays where it is; what the crop leaves out is NaN and the image itself."""
    W, H = size
    s = Settings(resize=64, crop=48)
    image = np.full((H, W, 3), 100, np.uint8)
    M_final, x_0 = np.zeros((48, 48), np.float32), torch.zeros(3, 48, 48)
    M_final[12:24, 24:36] = 1
    full, restored = predict.uncrop(image, M_final, x_0, s)
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


def test_inspect_an_array(small, demo_root):
    """One array through the function gives what the command gives; any mixture of sizes works."""
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
    said = capsys.readouterr()
    assert status == 1 and "8 images inspected" in said.out and "2 could not be read" in said.out
    errors = [line for line in said.err.replace("\r", "\n").splitlines() if "error:" in line]
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


def test_the_map_of_the_run_is_the_one_inspected(small):
    model, s, _ = runs.load_model(small[0] / "last.pt", torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for kind in ("recon", "disc", "last"):
        s = dataclasses.replace(s, final_mask=kind)
        found = predict.Inspector(model, s, None).inspect(image)
        x = scale(torch.tensor(image).permute(2, 0, 1)[None])
        restored = model.restore(x, s.infer_steps)
        M = {"recon": restored.M_recon, "disc": restored.M_disc, "last": restored.M_last}[kind]
        want = torch.nn.functional.avg_pool2d(M, 7, 1, 3).amax().item()
        assert found.score == pytest.approx(want, rel=1e-4)


def test_a_final_mask_that_does_not_exist_is_refused(small):
    with pytest.raises(ValueError, match="final_mask 'first': one of combined, disc, recon, last"):
        predict.load(small[0], final_mask="first")


def test_a_long_list_goes_through_the_network_in_parts(small, photos, monkeypatch):
    model, sizes = predict.load(small[0], infer_steps=1), []
    restore = model.model.restore
    monkeypatch.setattr(model.model, "restore", lambda x, *a: sizes.append(len(x)) or restore(x, *a))
    files = [str(file) for file in sorted(photos.rglob("*.png"))]
    found = model.inspect(files + files[:3])
    assert sizes == [8, 3] and [f.score for f in found[8:]] == \
        pytest.approx([f.score for f in found[:3]], rel=1e-4)
    assert model.inspect([]) == []


def test_old_pictures_outside_the_folder_stay(tmp_path):
    (tmp_path / "mine.png").touch(), (tmp_path / "out" / "heatmaps").mkdir(parents=True)
    (tmp_path / "out" / "heatmaps" / "old.png").touch()
    (tmp_path / "out" / "scores.csv").write_text(f"file\n{tmp_path / 'mine'}\n../mine\nold\n")
    predict.remove_old(tmp_path / "out" / ".." / "out")
    assert (tmp_path / "mine.png").exists() and not list((tmp_path / "out").rglob("*.png"))


def test_another_false_alarm_rate_moves_the_threshold(small, photos, tmp_path, capsys):
    limits = []
    for rate in ("0.01", "0.5"):
        out = tmp_path / rate
        assert predict.main([str(small[0]), str(photos / "day 1"), "--out", str(out),
                             "--false-alarms", rate]) == 0
        limits.append(float(rows_of(out / "scores.csv")[0]["threshold"]))
    assert limits[0] > limits[1]
    promised = re.findall("of 100 good parts like these about ([0-9]+)", capsys.readouterr().out)
    assert promised[0] in ("1", "11") and promised[1] in ("49", "44")  # the held-out ones


def test_without_held_out_images_there_are_scores_but_no_verdict(photos, tmp_path, capsys):
    s = Settings(resize=32, crop=32, channels=8, T=2)
    runs.save_checkpoint(tmp_path / "model.pt", s, runs.build_model(s), None, None,
                         {"normal": None})
    assert predict.main([str(tmp_path / "model.pt"), str(photos), "--out", str(tmp_path / "o")]) == 0
    assert "--calibrate GOOD_PHOTOS gives it one" in capsys.readouterr().out
    rows = rows_of(tmp_path / "o" / "scores.csv")
    assert len(rows) == 8 and all(row["verdict"] == row["threshold"] == "" for row in rows)
    assert rows_of(tmp_path / "o" / "regions.csv") == []


def test_good_photos_give_a_finished_model_its_threshold(photos, tmp_path, capsys, monkeypatch):
    s = Settings(resize=32, crop=32, channels=8, T=2)
    model = tmp_path / "model.pt"
    runs.save_checkpoint(model, s, runs.build_model(s), None, None, {"normal": None})
    assert predict.load(model).inspect(str(next(photos.rglob("*.png")))).verdict == ""
    assert predict.main([str(model), "--calibrate", str(photos)]) == 0
    said = capsys.readouterr().out
    assert "from 8 held-out images" in said and "no threshold before" in said
    assert "8 photos cannot promise 5 % false alarms, 19 can" in said
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


@pytest.mark.parametrize("change, expected", [
    ({"run": "nowhere"}, "nowhere does not exist"),
    ({"images": "nothing/*.png"}, "nothing/*.png: no image there"),
    ({"images": "."}, ".: no image there"),
    ({"more": ["--infer-steps", "99"]}, "--infer-steps 99"),
    ({"more": ["--batch", "0"]}, "--batch 0"),
    ({"more": ["--false-alarms", "2"]}, "--false-alarms 2"),
    ({"more": ["--device", "toaster"]}, "--device toaster"),
])
def test_bad_arguments(small, photos, tmp_path, monkeypatch, capsys, change, expected):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    argv = [change.get("run", str(small[0])), change.get("images", str(photos)), "--out", "found",
            *change.get("more", [])]
    assert predict.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and expected in error and "Traceback" not in error
    assert not (empty / "found").exists()


def test_out_that_is_a_file(small, photos, tmp_path, capsys):
    (tmp_path / "found").touch()
    assert predict.main([str(small[0]), str(photos), "--out", str(tmp_path / "found")]) == 2
    assert "found cannot be made" in capsys.readouterr().err
