"""bench.py prints its table and writes the same numbers."""
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

import bench
import demo
from settings import Settings

pytestmark = pytest.mark.network


def test_table_and_json(tmp_path, monkeypatch, capsys):
    """On a demo of a few images."""
    for name, count in (("TRAIN", 10), ("TEST_GOOD", 2), ("PER_DEFECT", 1)):
        monkeypatch.setattr(demo, name, count)
    monkeypatch.setattr(bench, "SIDE", 1024)
    argv = ["--preset", "quick", "--batch", "2", "--channels", "8", "--resize", "32", "--repeats",
            "1", "--device", "cpu", "--precision", "float32", "--root", str(tmp_path)]
    assert bench.main([*argv, "--json", str(tmp_path / "bench.json")]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["matmul_gflop_per_second"] > 1 and all(r["seconds"] > 0 for r in results["rows"])
    rows = {r["what"]: r for r in results["rows"]}
    assert all(what in out for what in rows)
    calls = [rows[f"image restored in {k} calls, batch 2"]["gflop"] for k in (1, 5, 20)]
    assert calls[1] / calls[0] == 5 and calls[2] / calls[0] == 20
    assert rows["backward"]["gflop"] > 1.8 * rows["forward and losses"]["gflop"]
    assert bench.main([*argv, "--json", str(tmp_path / "absent" / "bench.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_cost_of_size_width_and_calls(monkeypatch):
    monkeypatch.setattr(bench, "COST", {"crop": (32, 128), "channels": (8,), "calls": (1, 20)})
    s = Settings(channels=8, crop=32, resize=32, device="cpu", precision="float32")
    rows = bench.cost_rows(s, 1)
    assert {r["varied"] for r in rows} == {"crop", "channels", "calls"}
    seconds = {(r["varied"], r[r["varied"]]): float(r["seconds_per_image"]) for r in rows}
    assert seconds["crop", 128] > seconds["crop", 32]
    assert seconds["calls", 20] > 4 * seconds["calls", 1]


@pytest.mark.slow
def test_recomputing_takes_less_memory():
    s = Settings(channels=16, crop=128, resize=128, device="cpu", precision="float32")
    cases = ((s, True), (dataclasses.replace(s, recompute=True), True), (s, False))
    with ThreadPoolExecutor(3) as pool:                     # each is a process of its own
        training, recomputing, restoring = pool.map(lambda case: bench.peak_gb(*case), cases)
    assert recomputing < 0.8 * training and restoring < training
