"""The folder that predict.py writes: tables that grow, the results of one call, parts, float maps."""
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import predict
from helpers import png, picture, rows_of, run_predict, write_photos
from support import files, page
from support.console import InputError
from support.files import GrowingTable, save_csv_if_possible, save_float_tiff
from support.page import HighestScores, PageRow, web_page


@pytest.fixture
def run(trained_parts):
    return trained_parts / "runs" / "parts" / "bolt"


# ---------------------------------------------------------------- tables

def test_a_growing_table_replaces_an_earlier_one_and_is_whole_after_every_row(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("of an earlier call\n")
    table = GrowingTable(path, ("file", "score"))
    assert path.read_text() == "file,score\n"
    for k in range(3):
        table.append([{"file": f"a, {k}.png", "score": k}])
        assert [row["score"] for row in rows_of(path)] == [str(j) for j in range(k + 1)]
    assert table.close() == "" and rows_of(path)[2]["file"] == "a, 2.png"


def test_rows_wait_while_a_table_cannot_be_written(tmp_path, monkeypatch):
    """Open in a spreadsheet program: nothing ends, and the rows come later, once and in order."""
    path, is_open = tmp_path / "scores.csv", [True]

    def refuse(name, mode="r", *args, **keys):
        if is_open and os.fspath(name).endswith("scores.csv"):
            raise PermissionError(13, "Access is denied", os.fspath(name))
        return open(name, mode, *args, **keys)

    def refuse_replace(source, target, replace=os.replace):
        if is_open and os.fspath(target).endswith("scores.csv"):
            raise PermissionError(13, "Access is denied", os.fspath(target))
        replace(source, target)

    monkeypatch.setattr(files, "open", refuse, raising=False)
    monkeypatch.setattr(files.os, "replace", refuse_replace)
    table = GrowingTable(path, ("file",))
    table.append([{"file": "a"}])
    assert not path.exists()
    is_open.clear()
    table.append([{"file": "b"}])
    is_open.append(True)
    table.append([{"file": "c"}])
    assert [row["file"] for row in rows_of(path)] == ["a", "b"]
    line = table.close()
    assert "scores.csv could not be written" in line and "scores-not-written.csv" in line
    assert (tmp_path / "scores-not-written.csv").read_text() == "c\n"


def test_a_log_that_cannot_be_written_now_is_named_once_and_ends_nothing(tmp_path):
    path = tmp_path / "log.csv"
    path.mkdir()                                                     # no file can replace it
    with pytest.warns(UserWarning, match="log.csv: cannot be written .* tried again later") as told:
        for _ in range(3):
            save_csv_if_possible(path, [{"epoch": 1}])
    assert len(told) == 1


def test_the_advice_fits_the_error(tmp_path):
    with pytest.raises(InputError, match="give the photo a shorter name"):
        files.save_atomically(tmp_path / ("x" * 252 + ".png"), lambda file: file.write(b"x"))
    assert list(tmp_path.iterdir()) == []


def test_predict_goes_on_while_its_table_is_open_elsewhere(run, tmp_path, capsys):
    out = tmp_path / "results"
    (out / "scores.csv").mkdir(parents=True)                         # no file can replace it
    assert run_predict(run, write_photos(tmp_path / "line", 3), "--out", out) == 1
    said = capsys.readouterr()
    assert "3 images inspected" in said.out and "--resume" not in said.err
    assert "its rows are in" in said.err and len(rows_of(out / "scores-not-written.csv")) == 3


def test_a_photo_with_a_name_too_long_does_not_end_the_others(run, tmp_path, capsys):
    line = write_photos(tmp_path / "line", 2)
    png(line / ("x" * 248 + ".png"), picture(50, 40))
    assert run_predict(run, line, "--out", tmp_path / "results") == 1
    said = capsys.readouterr()
    assert "3 images inspected" in said.out and "1 could not be read or written" in said.out
    assert "shorter name" in said.err and len(list((tmp_path / "results/heatmaps").iterdir())) == 2


# ---------------------------------------------------------------- the results of one call

def test_a_call_that_is_stopped_says_so_in_its_page(run, tmp_path, monkeypatch, capsys):
    """And neither the page nor the table of an earlier call is left beside its pictures."""
    out, inspect, seen = tmp_path / "results", predict.Inspector.inspect, []
    assert run_predict(run, write_photos(tmp_path / "monday", 2), "--out", out) == 0

    def stop_after_two(self, images):
        seen.append((out / "index.html").read_text())
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return inspect(self, images)

    monkeypatch.setattr(predict.Inspector, "inspect", stop_after_two)
    tuesday = write_photos(tmp_path / "tuesday", 6)
    assert run_predict(run, tuesday, "--out", out, "--batch", "2") == 130
    assert "unfinished: 0 of 6 photos" in seen[0] and "monday" not in seen[0]
    text = (out / "index.html").read_text()
    assert "<h1>unfinished: 4 of 6 photos inspected; 4 photos" in text and "monday" not in text
    assert len(rows_of(out / "scores.csv")) == 4
    assert "unfinished: 4 of 6 photos inspected" in capsys.readouterr().err


@pytest.mark.parametrize("others", [[], ["elsewhere/9.png"]])
def test_names_are_relative_to_the_folder_on_the_command_line(run, tmp_path, others):
    """Whatever else lies in that folder."""
    for name in ("day 1/0.png", *others):
        png(tmp_path / "line" / name, picture(50, 40))
    assert run_predict(run, tmp_path / "line", "--out", tmp_path / "results") == 0
    assert [row["file"] for row in rows_of(tmp_path / "results/scores.csv")] == ["day 1/0.png",
                                                                                *others]


def test_a_glob_below_a_folder_with_brackets_and_a_name_with_a_tilde_are_found(tmp_path,
                                                                              monkeypatch):
    write_photos(tmp_path / "line [1]", 2)
    png(tmp_path / "~$bolt.png", picture(50, 40))
    monkeypatch.chdir(tmp_path)
    for name, names in (("line [1]/*.png", ["0.png", "1.png"]), ("~$bolt.png", ["~$bolt.png"])):
        files, _ = predict.find_photos([name], tmp_path / "results")
        assert predict.relative_names(files, [name]) == names


def test_a_page_reaches_photos_on_another_drive(monkeypatch, tmp_path):
    def refuse(*_):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(page.os.path, "relpath", refuse)
    photo = tmp_path / "photos of monday" / "bolt 1.png"
    text = web_page([(photo, "bolt 1.png", 0.2, (64, 64), [])], 0.1, tmp_path, 0)
    assert f"src='{photo.as_uri()}'" in text and "%2520" not in text


def test_a_page_shows_the_highest_scores_and_counts_all(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "MAX_ROWS", 3)
    highest = HighestScores()
    for k in range(20):
        highest.add(PageRow(tmp_path / f"{k}.png", f"{k}.png", (7 * k) % 20, (8, 8), [], k != 17),
                    (7 * k) % 20 > 9)
    assert [row.score for row in highest.rows()] == [19, 18, 17]
    text = web_page(highest.rows(), 9.0, tmp_path, 0, highest.count, highest.defective)
    assert "20 photos, 10 defective, 10 normal" in text and text.count("<figure>") == 3
    assert "The 3 photos with the highest scores; scores.csv has all" in text
    assert text.count("heatmaps/") == 2                              # that of 17.png is not there


@pytest.mark.parametrize("which, count", [("none", 0), ("defective", 2), ("all", 5)])
def test_pictures_are_written_of_the_photos_asked_for(run, tmp_path, monkeypatch, which, count):
    monkeypatch.setattr(predict.Inspection, "verdict", property(
        lambda self: "defective" if self.image[0, 0, 0] >= 150 else "normal"))
    out = tmp_path / "results"
    line = write_photos(tmp_path / "line", 5)                        # of values 0, 50 ... 200
    assert run_predict(run, line, "--out", out, "--pictures", which) == 0
    for folder in ("heatmaps", "restored"):
        assert len(list(out.rglob(f"{folder}/*.png"))) == count
    assert len(rows_of(out / "scores.csv")) == 5


# ---------------------------------------------------------------- several photos of a part

def test_the_highest_score_decides_on_a_part_seen_by_several_cameras(run, tmp_path, capsys):
    line, out = tmp_path / "line", tmp_path / "results"
    for part in ("A7", "B2", "B3"):
        for camera in (1, 2):
            png(line / f"{part}_cam{camera}.png", picture(40 * camera + len(part), 40))
    png(line / "overview.png", picture(10, 40))
    assert run_predict(run, line, "--out", out, "--group", "(.*)_cam[0-9]") == 0
    scores = {row["file"]: float(row["score"]) for row in rows_of(out / "scores.csv")}
    parts = rows_of(out / "parts.csv")
    assert sorted(row["part"] for row in parts) == ["A7", "B2", "B3", "overview.png"]
    for row in parts:
        photos = [name for name in scores if name.startswith(row["part"])]
        assert int(row["photos"]) == len(photos) and row["file"] in photos
        assert float(row["score"]) == scores[row["file"]] == max(scores[name] for name in photos)
        above = float(row["score"]) > float(row["threshold"])
        assert row["verdict"] == ("defective" if above else "normal")
    assert [float(row["score"]) for row in parts] == sorted((float(r["score"]) for r in parts),
                                                            reverse=True)
    said = capsys.readouterr().out
    bad = sum(row["verdict"] == "defective" for row in parts)
    assert "--group matches 6 of 7 photos" in said
    rate = predict.load(run).threshold.rate
    assert f"of good parts with 2 photos each, up to {min(100, 200 * rate):.0f} %" in said
    assert f"; 4 parts, {bad} defective, in parts.csv; " in said and "fewer photos" not in said
    text = (out / "index.html").read_text()
    assert "4 parts, " in text and text.index("<table>") < text.index("<figure>")
    assert run_predict(run, line, "--out", out) == 0
    assert not (out / "parts.csv").exists()                          # of the earlier call
    (line / "B2_cam1.png").unlink()
    assert run_predict(run, line, "--out", out, "--group", "(.*)_cam[0-9]") == 0
    assert ("warning: 1 of 3 parts have fewer photos than the usual 2, such as B2; a defect that "
            "only a missing photo shows is not found") in capsys.readouterr().out


@pytest.mark.parametrize("pattern, expected", [
    ("(", "not a regular expression"), ("_cam", "has no group"), ("(x)_cam", "matches no photo")])
def test_a_pattern_of_no_use_is_refused(run, tmp_path, capsys, pattern, expected):
    line = write_photos(tmp_path / "line")
    assert run_predict(run, line, "--out", tmp_path / "results", "--group", pattern) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and expected in error
    assert not (tmp_path / "results").exists()


# ---------------------------------------------------------------- float maps

def inspection(M: np.ndarray, size: tuple[int, int], edge: float) -> predict.Inspection:
    shown = np.zeros((10, 10, 3), np.uint8)                          # smaller than the photo
    return predict.Inspection(shown, size, 1.0, np.zeros((10, 10), np.float32), shown, None, M, edge)


@pytest.mark.parametrize("edge", [0.0, 1 / 16])
@pytest.mark.parametrize("size", [(300, 1001), (64, 64), (31, 7)])
def test_a_float_map_has_the_size_of_its_photo(tmp_path, size, edge):
    """It is that of the whole map brought to the photo's size, whatever strips it is made in."""
    M, (W, H) = np.random.default_rng(0).random((48, 48)).astype(np.float32), size
    inspection(M, size, edge).save_map(tmp_path / "map.tiff")
    with Image.open(tmp_path / "map.tiff") as file:
        assert file.mode == "F" and file.size == size
        written = np.asarray(file)
    (top, bottom), (left, right) = predict.inner_range(H, edge), predict.inner_range(W, edge)
    want = np.zeros((H, W), np.float32)
    want[top:bottom, left:right] = Image.fromarray(M).resize((right - left, bottom - top),
                                                             Image.Resampling.BILINEAR)
    assert np.allclose(written, want, atol=1e-5)


def test_a_float_map_is_made_in_strips(tmp_path):
    asked = []

    def rows(top: int, bottom: int) -> np.ndarray:
        asked.append(bottom - top)
        return np.full((bottom - top, 9), top, np.float32)

    save_float_tiff(tmp_path / "map.tiff", 9, 200, rows)
    assert sum(asked) == 200 and max(asked) <= files.STRIP
    with Image.open(tmp_path / "map.tiff") as file:
        assert np.array_equal(np.asarray(file)[:, 0], np.arange(200) // files.STRIP * files.STRIP)


def test_a_photo_of_two_pixels_keeps_one_of_each_side(run):
    assert predict.inner_range(2, 0.375) == (0, 2) and predict.inner_range(1, 0.4) == (0, 1)
    model = predict.load(run, "cpu", infer_steps=1)
    model.s = SimpleNamespace(**{**vars(model.s), "resize": 64, "crop": 32})
    assert model.inspect(np.zeros((2, 2, 3), np.uint8)).M_final.shape == (2, 2)
