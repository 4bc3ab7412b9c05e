"""Maps of other methods: tools/score_maps.py, tools/anomalib_maps.py, notebooks/others.py."""
import dataclasses
import json
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import anomalib_maps
import data
import evaluate
import others
import predict
import score_maps
import tables
from helpers import mvtec_tree, picture, png, refused, rows_of
from settings import Settings
from support.console import InputError
from support.files import save_json
from support.images import read_mask
from support.layouts import find_category

METRICS = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "aupro")


@pytest.fixture
def bolt(tmp_path):
    """A category of one good and two defective test images, parts/bolt."""
    return mvtec_tree(tmp_path / "parts" / "bolt")


def write_map(path, M, dtype=np.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    M = np.asarray(M, dtype)
    np.save(path, M) if path.suffix == ".npy" else Image.fromarray(M).save(path)


def write_truth(bolt, folder, suffix=".tiff", size=32):
    """The ground truth as maps: nothing can score better."""
    for image in sorted(bolt.glob("test/*/*.png")):
        mask = bolt / "ground_truth" / image.parent.name / f"{image.stem}_mask.png"
        M = read_mask(mask) if mask.exists() else np.zeros((32, 32), bool)
        M = np.asarray(Image.fromarray(M.astype(np.float32)).resize((size, size), 0))
        write_map(folder / image.parent.name / f"{image.stem}{suffix}", M)


def argv_for(bolt, folder, *more):
    return [str(folder), "--data", str(bolt.parent), "--category", "bolt", *more]


def score(bolt, folder, *more):
    assert score_maps.main(argv_for(bolt, folder, *more)) == 0
    path, = folder.rglob("metrics.json")
    return json.loads(path.read_text())


def write_run(bolt, folder, **changes):
    """A run's folder without a model: settings, the record of its data, raw maps and metrics."""
    s = Settings(data=str(bolt.parent), category="bolt", **{"kernel": 3, **changes})
    category = find_category(s.data, "bolt", bolt.parent)
    rng = np.random.default_rng(0)
    maps = {name: rng.random((3, s.crop, s.crop), np.float32)
            for name in ("M_disc", "M_recon", "M_last")}
    side = data.scoring_side(s)
    masks = np.stack([data.load_mask(item, 256, side) for item in category.test])
    results, scores = evaluate.score_maps(maps, category.labels, masks, s)
    folder.mkdir(parents=True)
    np.savez(folder / "maps.npz", **maps)
    save_json(folder / "config.json", dataclasses.asdict(s))
    save_json(folder / "data.json", {"root": str(bolt), "files": data.fingerprint(category)})
    return results, maps, scores


# ---------------------------------------------------------------- a run's own maps

@pytest.mark.parametrize("changes", [{"resize": 32, "crop": 32}, {"resize": 32, "crop": 24},
                                     {"resize": 256, "crop": 224}, {"resize": 320, "crop": 320},
                                     {"resize": 32, "crop": 32, "final_mask": "recon"}])
def test_a_runs_own_maps_have_the_runs_own_metrics(bolt, tmp_path, capsys, changes):
    expected, _, scores = write_run(bolt, tmp_path / "run", **changes)
    argv = [str(tmp_path / "maps"), "--run", str(tmp_path / "run")]
    assert score_maps.main([*argv, "--export"]) == 0
    home = tmp_path / "maps" / "bolt"
    row = json.loads((home / "metrics.json").read_text())
    for key in METRICS:
        assert row[key] == pytest.approx(expected[key], abs=1e-9), key
    assert row["method"] == "transfusion" and row["map_size"] == \
        f"{changes['crop']} x {changes['crop']}"
    table = capsys.readouterr().out
    assert f"bolt{100 * row['image_auroc']:>23.1f}" in table
    assert [float(r["score"]) for r in rows_of(home / "scores.csv")] == \
        [pytest.approx(value, rel=1e-7) for value in scores]
    assert score_maps.main([*argv, "--scores", str(home / "scores.csv")]) == 0    # as the maps' own
    assert json.loads((home / "metrics.json").read_text())["image_ap"] == \
        pytest.approx(expected["image_ap"], abs=1e-9)
    (home / "maps.json").unlink()                        # flags in place of the record
    side = str(round(256 * changes["crop"] / changes["resize"]))
    assert score_maps.main([*argv, "--map-crop", side]) == 0
    row = json.loads((home / "metrics.json").read_text())
    assert row["aupro"] == pytest.approx(expected["aupro"], abs=1e-9) and row["method"] == "maps"


def test_a_trained_run_and_its_predictions(factory, tmp_path, capsys):
    """The exported maps give metrics.json. predict.py's TIFFs, of the photo's size, are near it."""
    run, maps = tmp_path / "runs/parts/bolt", tmp_path / "maps"
    parts = tmp_path / "parts"
    assert score_maps.main([str(maps), "--run", str(run), "--export"]) == 0
    written = json.loads((run / "metrics.json").read_text())
    row = json.loads((maps / "bolt" / "metrics.json").read_text())
    for key in METRICS:
        assert row[key] == pytest.approx(written[key], abs=1e-6), key
    found = tmp_path / "found"
    assert predict.main([str(run), str(parts / "bolt/test"), "--out", str(found), "--maps", "tiff",
                         "--device", "cpu"]) == 0
    assert score_maps.main([str(found / "maps"), "--run", str(run), "--scores",
                            str(found / "scores.csv")]) == 0
    row = json.loads((found / "maps/bolt/metrics.json").read_text())
    for key in METRICS:
        assert row[key] == pytest.approx(written[key], abs=1e-6 if "image" in key else 0.03), key


def test_runs_that_cannot_be_exported(bolt, tmp_path, capsys):
    run, maps = tmp_path / "run", tmp_path / "maps"
    refused(capsys, [str(maps), "--run", str(run), "--export"], "not a run folder",
            command=score_maps.main)
    write_run(bolt, run, resize=32, crop=32)
    refused(capsys, [str(run), "--run", str(run)], "no maps of bolt", command=score_maps.main)
    refused(capsys, [str(run.parent), "--run", str(run), "--category", "bolt"], "--category",
            command=score_maps.main)
    png(bolt / "test" / "cut" / "002.png", picture(20))
    png(bolt / "ground_truth" / "cut" / "002_mask.png", np.ones((32, 32)))
    refused(capsys, [str(maps), "--run", str(run), "--export"], "3 maps for 4 test images",
            command=score_maps.main)
    (run / "maps.npz").unlink()
    refused(capsys, [str(maps), "--run", str(run), "--export"], "holds no maps.npz",
            command=score_maps.main)
    assert not maps.exists()


# ---------------------------------------------------------------- maps of other methods

@pytest.mark.parametrize("place", ["bolt/test", "bolt", "test", "."])
@pytest.mark.parametrize("suffix, size", [(".tiff", 32), (".npy", 256), (".TIF", 100)])
def test_the_truth_scores_best_in_every_layout(bolt, tmp_path, place, suffix, size):
    write_truth(bolt, tmp_path / "best" / place, suffix, size)
    row = score(bolt, tmp_path / "best")
    assert row["image_auroc"] == 1 and row["aupro"] > 0.99 and row["pixel_auroc"] > 0.999
    assert row["map_size"] == f"{size} x {size}" and row["method"] == "best"
    assert (row["data"], row["category"], row["images"]) == ("parts", "bolt", 3)


def test_maps_are_brought_to_the_grid_as_a_runs_are():
    rng = np.random.default_rng(0)
    M = rng.random((1, 32, 32), np.float32)
    s = Settings(resize=32, crop=32, lam=1.0, kernel=1)
    ours = evaluate.final_maps({"M_disc": M, "M_recon": M, "M_last": M}, s, 256)[0]
    assert np.array_equal(score_maps.to_grid(M[0], 256, 256), ours)
    whole = score_maps.to_grid(M[0], 256, 224)                 # maps of the image, scored within
    assert np.array_equal(whole, ours[16:240, 16:240])
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32), (32, 32))
    of_crop = np.ascontiguousarray(ramp[2:30, 2:30])           # 28 of 32 is 224 of 256
    inside = slice(4, -4)                                      # bilinear maps are flat at the edge
    assert np.abs(score_maps.to_grid(of_crop, 224, 224) -
                  score_maps.to_grid(np.ascontiguousarray(ramp), 256, 224))[:, inside].max() < 1e-4


def test_only_the_crop_counts(bolt, tmp_path):
    write_truth(bolt, tmp_path / "maps")
    M = np.zeros((32, 32))
    M[0] = 9                                                   # a false alarm at the border
    write_map(tmp_path / "maps" / "good" / "000.tiff", M)
    assert score(bolt, tmp_path / "maps")["image_auroc"] == 0
    row = score(bolt, tmp_path / "maps", "--crop", "224")
    assert row["image_auroc"] == 1 and row["aupro"] > 0.99 and row["scored_side"] == 224


def test_image_scores_of_a_table(bolt, tmp_path, capsys):
    write_truth(bolt, tmp_path / "maps")
    table = tmp_path / "scores.csv"
    lines = ["file,label,score", "somewhere/test/good/000.png,0,3", "cut/000.png,1,2",
             "bolt/test/cut/001,1,4", "train/good/000.png,0,9"]
    table.write_text("\n".join(lines))
    row = score(bolt, tmp_path / "maps", "--scores", str(table))
    assert row["image_auroc"] == 0.5 and row["image_score"] == "scores.csv"
    for change, expected in (({3: ""}, "1 of 3 test images of bolt have no score, the first "
                                       "test/cut/001.png"),
                             ({4: "good/000.png,0,1"}, "two scores of good/000.png"),
                             ({2: "cut/000.png,1,nan"}, "is nan"),
                             ({2: "cut/000.png,1,high"}, "not a table"),
                             ({0: "name,label,score"}, "not a table")):
        table.write_text("\n".join(change.get(k, line) for k, line in enumerate(lines)))
        refused(capsys, argv_for(bolt, tmp_path / "maps", "--scores", str(table)), expected,
                command=score_maps.main)
    refused(capsys, argv_for(bolt, tmp_path / "maps", "--scores", str(tmp_path / "gone.csv")),
            "gone.csv", command=score_maps.main)


def test_the_table_of_methods(bolt, tmp_path, capsys):
    write_truth(bolt, tmp_path / "maps")
    out = tmp_path / "results" / "others.csv"
    score(bolt, tmp_path / "maps", "--out", str(out), "--method", "a")
    score(bolt, tmp_path / "maps", "--out", str(out), "--method", "b")
    score(bolt, tmp_path / "maps", "--out", str(out), "--method", "a", "--crop", "128")
    rows = rows_of(out)
    assert [row["method"] for row in rows] == ["b", "a"] and rows[1]["scored_side"] == "128"
    assert float(rows[0]["image_auroc"]) == 1 and tuple(rows[0]) == score_maps.COLUMNS
    out.write_text("method,score\na,1\n")
    refused(capsys, argv_for(bolt, tmp_path / "maps", "--out", str(out)), "other columns",
            command=score_maps.main)


def test_without_ground_truth_or_good_images(tmp_path, capsys):
    bolt = mvtec_tree(tmp_path / "parts" / "bolt", masks=False)
    write_truth(bolt, tmp_path / "maps")
    (bolt / "test/good/000.png").unlink()
    row = score(bolt, tmp_path / "maps")
    said = capsys.readouterr()
    assert row["aupro"] is None and row["image_auroc"] is None
    assert "pixel metrics are undefined" in said.err and "belong to no test image" in said.err


def test_maps_that_say_nothing(bolt, tmp_path, capsys):
    for k, name in enumerate(("good/000", "cut/000", "cut/001")):
        write_map(tmp_path / "maps" / f"{name}.tiff", np.zeros((8, 8 + k)))
    row = score(bolt, tmp_path / "maps")
    assert row["image_auroc"] == 0.5 and row["map_size"] == "various"
    assert "every map has the value 0 everywhere" in capsys.readouterr().err


def test_visa_and_names_that_two_images_share(tmp_path):
    """The images of VisA lie in no folder test; a.png and a.bmp need their suffix."""
    root = tmp_path / "data" / "visa"
    rows = []
    for kind, folder, split in (("normal", "Normal", "train"), ("normal", "Normal", "test"),
                                ("anomaly", "Anomaly", "test")):
        name = f"candle/Data/Images/{folder}/{split}.png"
        mask = f"candle/Data/Masks/{folder}/{split}.png"
        png(root / name, picture(9))
        png(root / mask, np.eye(32))
        rows.append(f"candle,{split},{kind},{name},{mask if kind == 'anomaly' else ''}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(["object,split,label,image,mask", *rows]))
    category = find_category("visa", "candle", tmp_path / "data")
    assert [names[0] for names in score_maps.image_names(category)] == ["good/test", "bad/test"]
    for layout in (("good", "bad"), ("Normal", "Anomaly")):
        folder = tmp_path / layout[0]
        for name, value in zip(layout, (0, 1)):
            write_map(folder / "candle" / "test" / name / "test.tiff", value * np.eye(32))
        argv = [str(folder), "--data", "visa", "--category", "candle", "--root",
                str(tmp_path / "data")]
        assert score_maps.main(argv) == 0
        assert json.loads((folder / "candle/metrics.json").read_text())["image_auroc"] == 1
    bolt = mvtec_tree(tmp_path / "parts" / "bolt", masks=False)
    Image.fromarray(picture(7).astype(np.uint8)).save(bolt / "test/cut/000.bmp")
    category = find_category(str(bolt.parent), "bolt", bolt.parent)
    assert [names[0] for names in score_maps.image_names(category)] == \
        ["cut/000.bmp", "cut/000.png", "cut/001", "good/000"]


# ---------------------------------------------------------------- bad input

BAD_MAPS = [
    ("000.tiff", lambda M: (255 * M).astype(np.uint8), "8-bit grey"),
    ("000.tiff", lambda M: M.astype(np.uint16), "Pillow mode I;16"),
    ("000.tiff", lambda M: np.stack([M] * 3, 2).astype(np.uint8), "Pillow mode RGB"),
    ("000.tiff", lambda M: np.where(M > 0, np.nan, M), "16 of its values are not finite"),
    ("000.npy", lambda M: np.where(M > 0, np.inf, M), "16 of its values are not finite"),
    ("000.npy", lambda M: np.where(M > 0, 1e300, M.astype(float)), "16 of its values are not fin"),
    ("000.npy", lambda M: (255 * M).astype(int), "an array [32, 32] of int64"),
    ("000.npy", lambda M: np.stack([M] * 3), "an array [3, 32, 32] of float32"),
    ("000.npy", lambda M: M[:0], "size 0 x 32"),
    ("000.npy", lambda M: np.array([None]), "cannot be read as an array"),
]


@pytest.mark.parametrize("name, change, expected", BAD_MAPS)
def test_bad_maps(bolt, tmp_path, capsys, name, change, expected):
    folder = tmp_path / "maps" / "bolt" / "test"
    write_truth(bolt, folder)
    path = folder / "cut" / name
    M = np.asarray(Image.open(folder / "cut" / "000.tiff"))
    (folder / "cut" / "000.tiff").unlink()
    M = change(M)
    np.save(path, M) if path.suffix == ".npy" else Image.fromarray(M).save(path)
    refused(capsys, argv_for(bolt, tmp_path / "maps"), str(path), expected,
            command=score_maps.main)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_files_that_are_no_maps(bolt, tmp_path, capsys, content):
    folder = tmp_path / "maps" / "bolt" / "test"
    write_truth(bolt, folder)
    path = folder / "cut" / "000.tiff"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    refused(capsys, argv_for(bolt, tmp_path / "maps"), str(path), "cannot be read",
            command=score_maps.main)
    path.unlink()
    pages = [Image.fromarray(np.zeros((4, 4), np.float32))] * 2
    pages[0].save(path, save_all=True, append_images=pages[1:])
    refused(capsys, argv_for(bolt, tmp_path / "maps"), str(path), "2 pages",
            command=score_maps.main)


def test_missing_maps_and_maps_of_something_else(bolt, tmp_path, capsys):
    folder = tmp_path / "maps" / "bolt" / "test"
    write_truth(bolt, folder)

    def refuse(*expected, more=()):
        refused(capsys, argv_for(bolt, tmp_path / "maps", *more), *expected,
                command=score_maps.main)

    write_map(folder / "cut" / "000.npy", np.zeros((4, 4)))
    refuse("a second map of one image")
    (folder / "cut" / "000.npy").unlink()
    refuse("--crop 250: the maps show the centre 224", more=["--crop", "250", "--map-crop", "224"])
    refuse("8 is not in 16..256", more=["--crop", "8"])
    refuse("--export needs --run", more=["--export"])
    (folder / "cut" / "000.tiff").rename(folder / "cut" / "000.png")
    refuse("1 of 3 test images of bolt have no map, the first test/cut/000.png", "1 .png")
    (folder / "cut").rename(folder / "bent_wire")
    refuse("2 of 3 test images of bolt have no map", "1 maps belong to no test image", "bent_wire")
    (tmp_path / "maps" / "bolt").rename(tmp_path / "maps" / "cable")
    refuse("no maps of bolt; there are maps of cable")
    refused(capsys, argv_for(bolt, tmp_path / "gone"), "no such folder", command=score_maps.main)
    refused(capsys, [str(tmp_path / "maps")], "give --data and --category",
            command=score_maps.main)
    (tmp_path / "maps" / "good").mkdir()
    (tmp_path / "maps" / "config.json").touch()
    refuse("holds a training's results")


# ---------------------------------------------------------------- the notebooks

def test_the_notebooks_take_rows_and_maps(bolt, tmp_path, capsys):
    write_truth(bolt, tmp_path / "maps" / "best" / "bolt" / "test")
    write_truth(bolt, tmp_path / "maps" / "worse" / "bolt" / "test")
    write_map(tmp_path / "maps" / "worse" / "bolt" / "test" / "good" / "000.tiff",
              np.full((32, 32), 0.5))
    (tmp_path / "maps" / "broken" / "bolt" / "test" / "good").mkdir(parents=True)
    out = tmp_path / "results" / "others.csv"
    for method in ("best", "worse"):
        assert score_maps.main(argv_for(bolt, tmp_path / "maps" / method, "--out", str(out))) == 0
    quoted = out.read_text().replace("best", "quoted")
    out.write_text(quoted)
    rows = others.other_rows(tmp_path / "maps", tmp_path / "results")
    assert sorted(row["method"] for row in rows) == ["best", "quoted", "worse"]
    assert {row["image_auroc"] for row in rows} == {1.0}
    table = others.other_table("AUPRO", "parts", "aupro", rows, {"bolt": {"aupro": 0.5}})
    assert table.columns == ["category", "ours", "quoted", "worse", "best"]
    assert table.rows[0][0] == "bolt" and table.rows[0][4].startswith("**")
    category = find_category(str(bolt.parent), "bolt", bolt.parent)
    capsys.readouterr()
    maps = others.other_maps(category, tmp_path / "maps", 224)
    assert list(maps) == ["best", "worse"] and "broken: not shown" in capsys.readouterr().out
    assert maps["worse"].M_final.shape == (3, 224, 224)
    assert maps["worse"].scores.tolist() == [1, 1, 0.5]


def cell(notebook, cell_id):
    """The source of a notebook's cell."""
    source, = [c["source"] for c in
               json.loads((tables.HERE / f"{notebook}.ipynb").read_text())["cells"]
               if c["id"] == cell_id]
    return "".join(source)


def test_the_cells_of_the_notebooks_show_rows_and_maps(bolt, tmp_path, capsys, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")                       # which has no ../results
    shown, pictures = [], []
    category = find_category(str(bolt.parent), "bolt", bolt.parent)
    run = SimpleNamespace(
        settings=Settings(category="bolt", resize=256, crop=224), data=SimpleNamespace(
            category=category), metrics={"infer_steps": 3, "seconds_per_image": 1.0, "hardware": "",
                                         "precision": "float32"},
        scores=np.ones(3), M_final=np.zeros((3, 8, 8)), truth=lambda k: np.zeros((8, 8), bool),
        original=lambda k: torch.zeros(3, 8, 8))
    names = {"MAPS": "../maps", "RUNS": "../runs", "others": others, "tables": tables, "run": run,
             "column_title": tables.column_title, "display": shown.append, "all_runs": [run],
             "scoring_side": data.scoring_side, "method_runs": {"bolt": {}}, "plt": plt,
             "kinds": {"bolt": ["hole"]}, "best_median_worst": lambda r, kind: [0, 1, 2],
             "outline": lambda *_: None, "grid": lambda rows, **more: pictures.append((rows, more))}

    def run_cells():
        for notebook, cell_id in (("03_tables", "03-11b"), ("05_qualitative", "05-07m"),
                                  ("05_qualitative", "q08new")):
            exec(cell(notebook, cell_id), names)

    run_cells()
    out = capsys.readouterr().out
    assert out == 2 * f"{others.COMMAND}\n" and not shown
    assert [len(row) for row in pictures.pop()[0]] == [3]           # photo, truth, ours
    write_truth(bolt, tmp_path / "maps" / "best" / "bolt" / "test")
    assert score_maps.main(argv_for(bolt, tmp_path / "maps" / "best", "--crop", "224")) == 0
    record = tmp_path / "maps" / "best" / "bolt" / "metrics.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "package": "anomalib 2.7.0",
                                  "seconds_per_image": 0.25, "hardware": "a core"}))
    capsys.readouterr()
    run_cells()
    assert others.COMMAND not in capsys.readouterr().out
    assert [table.columns for table in shown] == 2 * [["category", "ours", "best"]]
    (rows, more), = pictures
    assert more["columns"][2:] == ["ours, 0 to 1", "best, 0 to 1"]
    assert rows[0][3][0].shape == (224, 224)
    source = cell("04_ablations", "04-11").replace("../results/bench",
                                                   f"{tables.HERE.parent}/results/bench")
    exec(source.replace('Table("seconds', 'timed = Table("seconds'),
         {**names, "Table": tables.Table, "paper_table": tables.paper_table, "json": json}, names)
    assert names["timed"].rows[-1] == ["best, anomalib 2.7.0, on bolt", "0.25", "one image",
                                       "a core, measured"]


# ---------------------------------------------------------------- tools/anomalib_maps.py

def test_without_anomalib_one_line_says_how_to_get_it(bolt, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "anomalib", None)
    refused(capsys, ["--model", "Padim", "--data", str(bolt.parent), "--category", "bolt", "--out",
                     str(tmp_path / "maps")], "anomalib is not installed", "pip install",
            command=anomalib_maps.main)
    refused(capsys, ["--model", "Padim", "--out", "x", "--epochs", "-1"], "--epochs -1",
            command=anomalib_maps.main)
    refused(capsys, ["--model", "Padim", "--out", "x", "--set", "backbone"], "NAME=VALUE",
            command=anomalib_maps.main)


def test_the_training_images_are_those_of_the_run(factory, tmp_path):
    run = tmp_path / "runs/parts/bolt"
    category, side = score_maps.find_run_category(run)
    record = json.loads((run / "data.json").read_text())
    train, held_out = anomalib_maps.normal_images(run, category)
    assert side == 256 and len(train) == 11 and len(held_out) == 1
    assert [data.name_in(category, path) for path in train] == record["train"]
    assert anomalib_maps.normal_images(None, category) == (category.train, [])
    photos = anomalib_maps.Photos(train, None)
    assert photos.image(0).shape == (3, 40, 40) and 0.3 < photos.image(0).mean() < 0.5
    with pytest.raises(InputError, match="missing"):
        anomalib_maps.normal_images(run, dataclasses.replace(category, train=train))


def test_the_length_of_a_training():
    epochs_of = anomalib_maps.epochs_of
    assert epochs_of("Padim", 0, 0, 72, 32, {"max_epochs": 1}) == 1
    assert epochs_of("ReverseDistillation", 0, 0, 72, 16, {}) == 200         # the authors'
    assert epochs_of("Dsr", 0, 0, 209, 8, {}) == 150         # 100, and 50 of its upsampling
    assert epochs_of("EfficientAd", 0, 0, 72, 1, {}) == 973                  # 70000 steps
    assert epochs_of("EfficientAd", 0, 100, 72, 1, {}) == 2 and epochs_of("Cfa", 3, 0, 9, 4, {}) == 3
    for name, epochs, own, expected in (("Padim", 2, {"max_epochs": 1}, "always trains for 1"),
                                        ("Cfa", 0, {}, "give --epochs or --steps")):
        with pytest.raises(InputError, match=expected):
            epochs_of(name, epochs, 0, 72, 32, own)
    assert anomalib_maps.option("layers=['layer1']") == ("layers", ["layer1"])
    assert anomalib_maps.option("backbone=resnet18") == ("backbone", "resnet18")


@pytest.mark.slow
def test_a_model_of_anomalib_is_trained_and_scored(demo_root, factory, tmp_path, capsys):
    """Padim with random weights, which needs no network: on the demo, then on a run's own split."""
    pytest.importorskip("anomalib")
    out = tmp_path / "maps"
    base = ["--data", "demo", "--category", "fabric", "--root", str(demo_root)]
    argv = ["--model", "Padim", "--no-pre-trained", "--size", "128", "--device", "cpu"]
    assert anomalib_maps.main([*argv, *base, "--out", str(out)]) == 0
    home = out / "fabric"
    for more in ([], ["--scores", str(home / "scores.csv")]):
        assert score_maps.main([str(out), *base, *more]) == 0
        row = json.loads((home / "metrics.json").read_text())
        assert row["image_auroc"] > 0.7 and row["aupro"] > 0.7, row          # 0.85 and 0.85 at 256
        assert row["method"] == "Padim" and row["training_images"] == 80
        assert row["map_size"] == "128 x 128" and row["pre_trained"] is False
    with Image.open(home / "test/hole/000.tiff") as M:
        assert np.array(M).max() > 2                    # a distance, not anomalib's 0 to 1
    run = tmp_path / "runs/parts/bolt"
    assert anomalib_maps.main([*argv, "--run", str(run), "--out", str(out)]) == 0
    assert score_maps.main([str(out), "--run", str(run)]) == 0
    row = json.loads((out / "bolt/metrics.json").read_text())
    assert (row["training_images"], row["validation"]) == (11, "1 held out")
    capsys.readouterr()
    for more, expected in ((["--model", "Padin"], "did you mean Padim?"),
                           (["--model", "Padim", "--set", "depth=3"], "--set depth: Padim has"),
                           ([*argv, "--epochs", "3"], "Padim always trains for 1"),
                           (["--model", "Draem", "--pre-trained"], "no such choice")):
        refused(capsys, [*base, "--out", str(out), *more], expected, command=anomalib_maps.main)
