"""tools/export.py: the file gives the run's scores in both runtimes; what is refused."""
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import predict
import runs
from data import preprocess
from helpers import TINY, files_in, refused, rows_of
from settings import Settings, parse
from support import onnx_file

onnx = pytest.importorskip("onnx")
import export                                                        # noqa: E402, needs onnx

INSTALLED = [name for name in onnx_file.RUNTIMES if importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(not INSTALLED, reason="neither onnxruntime nor openvino")
RUNTIMES = [pytest.param(name, marks=[] if name in INSTALLED else pytest.mark.skip(name))
            for name in onnx_file.RUNTIMES]


@pytest.fixture(scope="module")
def exported(trained_parts, tmp_path_factory) -> Path:
    """The run of `trained_parts` as an ONNX file."""
    path = tmp_path_factory.mktemp("exported") / "bolt.onnx"
    with pytest.MonkeyPatch.context() as patch:
        from helpers import ShallowUNet
        import transfusion
        patch.setattr(transfusion, "ResUNet", ShallowUNet)
        assert export.main([str(trained_parts / "runs/parts/bolt"), str(path)]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["bolt.onnx"]    # weights inside
    return path


def images(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_predict_gives_the_runs_scores_verdicts_and_files(exported, trained_parts, tmp_path,
                                                          runtime, capsys):
    run, printed = trained_parts / "runs/parts/bolt", []
    for model, device in ((run, "cpu"), (exported, runtime)):
        assert predict.main([str(model), str(trained_parts / "parts/bolt/test"), "--out",
                             str(tmp_path / device), "--device", device, "--batch", "3", "--maps",
                             "tiff", "--group", "([0-9]).png", "--false-alarms", "0.3"]) == 0
        printed.append(capsys.readouterr().out.replace(str(tmp_path / device), ""))
    assert printed[0] == printed[1]
    assert files_in(tmp_path / "cpu").keys() == files_in(tmp_path / runtime).keys()
    for table in ("scores.csv", "parts.csv"):
        for ours, theirs in zip(rows_of(tmp_path / "cpu" / table),
                                rows_of(tmp_path / runtime / table), strict=True):
            assert ours["verdict"] == theirs["verdict"] and ours["file"] == theirs["file"]
            assert float(ours["score"]) == pytest.approx(float(theirs["score"]), abs=1e-5)
    for name in ("maps/bolt/test/dent/0.tiff", "restored/dent/0.png.png"):
        ours, theirs = (np.asarray(Image.open(tmp_path / out / name), float)
                        for out in ("cpu", runtime))
        assert np.abs(ours - theirs).max() <= (1 if name.endswith("png") else 1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_batch_of_any_size_has_the_results_of_its_photos(exported, runtime, monkeypatch):
    """OpenVINO compiles a graph for single photos and one for the largest batch so far."""
    sizes = []
    if runtime == "openvino":
        core = onnx_file.openvino_core()
        monkeypatch.setattr(onnx_file, "openvino_core", lambda: SimpleNamespace(
            compile_model=lambda model, *rest: sizes.append(model.input().shape[0])
            or core.compile_model(model, *rest)))
    _, run = onnx_file.load_onnx(exported, runtime)
    photos = images(5)
    single = [run(photos[k:k + 1]) for k in range(5)]
    for count in (3, 2, 5, 4, 1):
        outputs = run(photos[:count])
        for name, values in outputs.items():
            expected = np.concatenate([one[name] for one in single[:count]]).astype(float)
            assert np.abs(values - expected).max() <= (1 if name == "restored" else 0.01), name
    assert sizes == ([1, 3, 5] if runtime == "openvino" else [])


@pytest.mark.network
@pytest.mark.parametrize("changes", [[], ["--batch", "4", "--pe", "row", "--authors-schedule",
                                          "--anomaly-target", "beta_eps", "--T", "4"]])
def test_the_whole_network_in_any_batch(tmp_path, changes):
    s, _ = parse([*TINY, "--resize", "40", "--crop", "32", *changes])
    runs.new_run(tmp_path, s, None, runs.build_model(s)).save()
    path = tmp_path / "model.onnx"
    assert export.main([str(tmp_path), str(path)]) == 0
    expected = predict.load(tmp_path, "cpu").inspect(list(images(5, 50)))
    for name in INSTALLED:
        model = predict.load(path, name)
        for batch in (1, 5):
            model.batch = batch
            for ours, theirs in zip(expected, model.inspect(list(images(5, 50))), strict=True):
                assert theirs.score == pytest.approx(ours.score, abs=1e-5) and theirs.verdict == ""
                assert theirs.edge == ours.edge
                assert np.abs(theirs.restored.astype(int) - ours.restored).max() <= 1


def test_the_metadata_suffice_for_a_program_of_ones_own(exported, trained_parts):
    """`load_onnx` stands for onnxruntime in any language; Pillow for its resize."""
    metadata, run = onnx_file.load_onnx(exported)
    photo = trained_parts / "parts/bolt/test/dent/0.png"
    array = preprocess(Image.open(photo), int(metadata["resize"]), int(metadata["crop"]))
    outputs = run(np.ascontiguousarray(array.transpose(1, 2, 0)[None]))
    model = predict.load(trained_parts / "runs/parts/bolt", "cpu")
    expected = model.inspect(photo)
    assert outputs["score"] == pytest.approx([expected.score], abs=1e-5)
    assert float(metadata["threshold"]) == pytest.approx(model.threshold.value)
    assert metadata["infer_steps"] == "2" and "centre crop" in metadata["preprocessing"]
    assert outputs["restored"].dtype == np.uint8 and outputs["map"].shape == (1, 32, 32)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_bad_files_are_refused_in_one_line(exported, tmp_path, capfd, runtime):
    content = exported.read_bytes()
    files = {f"cut{k}": content[:k * len(content) // 7] for k in range(7)}
    files["cut_at_the_end"] = content[:-1]
    files["text"] = b"hello " * 100
    model = onnx.load(exported)
    for name, changes in (("without", {}), ("newer", {"format": "99"}), ("few", {"format": "1"}),
                          ("wrong", {"format": "1", "calibration": "{", "crop": "x"})):
        onnx.helper.set_model_props(model, changes)
        files[name] = model.SerializeToString()
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_model(onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "other", [value],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])]), ir_version=8,
        opset_imports=[onnx.helper.make_opsetid("", 18)])
    files["another"] = other.SerializeToString()
    for name, data in files.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(data)
        refused(capfd, [str(path), ".", "--out", str(tmp_path / "o"), "--device", runtime],
                path.name, command=predict.main)
        assert not (tmp_path / "o").exists()
    refused(capfd, [str(tmp_path / "no.onnx"), ".", "--out", "o"], "no.onnx does not exist",
            command=predict.main)


def test_what_such_a_file_does_not_allow_is_refused(exported, trained_parts, tmp_path, capsys,
                                                    monkeypatch):
    photos = str(trained_parts / "parts/bolt/test/good")
    for argv, *expected in (
            (["--calibrate", photos], "--calibrate", "the run folder"),
            ([photos, "--out", "o", "--infer-steps", "1"], "infer_steps: fixed in"),
            ([photos, "--out", "o", "--device", "cuda"], "--device cuda", "or openvino"),
            ([photos, "--out", "o", "--false-alarms", "2"], "--false-alarms 2")):
        refused(capsys, [str(exported), *argv], *expected, command=predict.main)
    refused(capsys, [str(exported), str(tmp_path / "a.onnx")], "an ONNX file already",
            command=export.main)
    for name in ("model.pt", "nowhere/model.onnx"):
        refused(capsys, [str(trained_parts / "runs/parts/bolt"), str(tmp_path / name)],
                "ends in .onnx, in a folder", command=export.main)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(capsys, [str(exported), photos, "--out", "o"], "pip install onnxruntime",
            command=predict.main)
    refused(capsys, [str(trained_parts / "runs/parts/bolt"), str(tmp_path / "a.onnx")],
            "pip install onnx onnxruntime", command=export.main)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method, expected", [("draem", ""), ("anoddpm", "cannot be exported"),
                                              ("d3ad", "cannot be exported")])
def test_another_method_is_exported_or_refused(tmp_path, capsys, method, expected):
    s, _ = parse(["--method", method, "--device", "cpu", "--preset", "quick", "--channels", "16",
                  "--resize", "32", "--crop", "32", "--precision", "float32"])
    runs.new_run(tmp_path, s, None, runs.build_model(s)).save()
    path = tmp_path / "model.onnx"
    if expected:
        refused(capsys, [str(tmp_path), str(path)], f"--method {method}", expected,
                command=export.main)
        assert not path.exists()
    else:
        assert export.main([str(tmp_path), str(path)]) == 0


def test_bench_compares_pytorch_with_the_installed_runtimes(exported, trained_parts, capsys):
    assert bench.main(["--onnx", str(trained_parts / "runs/parts/bolt"), str(exported),
                       "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    for name in ("PyTorch", *INSTALLED):
        assert f"photo by {name}, 2 calls, batch 8" in printed


def test_a_file_with_other_scores_is_not_written(trained_parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "anomaly_score", lambda M: M.flatten(1).amax(1) * torch.rand(1))
    refused(capsys, [str(trained_parts / "runs/parts/bolt"), str(tmp_path / "a.onnx")],
            "the file gives other scores", command=export.main)
    assert not list(tmp_path.iterdir())


def test_a_part_of_eq_10_alone_is_refused(tmp_path, capsys):
    s = Settings(resize=32, crop=32, channels=8, T=2, device="cpu", final_mask="last")
    runs.new_run(tmp_path, s, None, runs.build_model(s)).save()
    refused(capsys, [str(tmp_path), str(tmp_path / "a.onnx")], "--final-mask last",
            command=export.main)
