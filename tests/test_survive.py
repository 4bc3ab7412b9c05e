"""Runs that are killed, run folders that are shared, files that are damaged."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import data
import predict
import runs
import train
from helpers import ROOT, argv_for, run_of
from settings import Settings
from support.console import InputError
from support.files import locked_folder
from support.layouts import read_visa

STEPS = 400


def start(argv):
    return subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def newer(path, than):
    try:
        return path.stat().st_mtime_ns >= than
    except FileNotFoundError:
        return False


# A moment to kill a run: the file that is awaited, and the longest wait after it in seconds.
MOMENTS = {"writing": ("last.pt.part", 0),                 # amid a checkpoint
           "any": ("config.json", 1.5),                    # written as training starts
           "written": ("last.pt", 0.3)}


def killing(argv, folder, rng, moment):
    """Start a run and kill it at a moment of MOMENTS; returns whether it was still running then."""
    def wait_for(name, since):
        while not newer(folder / name, since):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)

    awaited, wait = MOMENTS[moment]
    began = time.time_ns()
    process = start(argv)
    if awaited != "config.json":                  # not the first checkpoint, which is that of step 0
        wait_for("last.pt", began)
        began = (folder / "last.pt").stat().st_mtime_ns + 1
    wait_for(awaited, began)
    time.sleep(rng.uniform(0, wait))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    return alive


@pytest.mark.slow
def test_killed_at_twenty_moments_and_still_bit_identical(parts):
    """Two runs, one on each core, are killed ten times each."""
    base = argv_for(parts, "--steps", str(STEPS), "--checkpoint-every", "3")
    process = start([*base, "--name", "whole"])
    assert process.communicate()[0] and process.returncode == 0
    whole = run_of(parts, "whole")

    def killed_ten_times(seed):
        rng = random.Random(seed)
        argv, reached = [*base, "--name", f"killed{seed}", "--resume"], []
        killed = whole.with_name(f"bolt-killed{seed}")
        for k in range(10):
            assert killing(argv, killed, rng, list(MOMENTS)[k % 3]), f"kill {k} came too late"
            if (killed / "last.pt").exists():                # readable after every single kill
                reached.append(runs.load_checkpoint(killed / "last.pt")[1]["step"])
        assert reached == sorted(reached) and 0 < reached[-1] < STEPS
        process = start(argv)
        out, error = process.communicate()
        assert process.returncode == 0, error
        return killed

    with ThreadPoolExecutor(2) as pool:
        for killed in pool.map(killed_ten_times, (0, 1)):
            a, b = (torch.load(run / "last.pt", weights_only=True) for run in (whole, killed))
            for part in ("model", "ema"):
                assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
            assert (whole / "scores.csv").read_bytes() == (killed / "scores.csv").read_bytes()
            one, two = (json.loads((run / "metrics.json").read_text()) for run in (whole, killed))
            assert {k: v for k, v in one.items() if "seconds" not in k} \
                == {k: v for k, v in two.items() if "seconds" not in k}


def test_a_folder_in_use_is_refused(parts, capsys):
    folder = run_of(parts)
    with locked_folder(folder):
        assert train.main(argv_for(parts)) == 2
    error = capsys.readouterr().err
    assert "in use by another process" in error and [p.name for p in folder.iterdir()] == [".lock"]
    assert train.main(argv_for(parts)) == 0


def corrupted(rng, content):
    """Some bytes overwritten, cut off, doubled or inserted."""
    content, kind = bytearray(content), rng.integers(4)
    place = int(rng.integers(len(content)))
    if kind == 0:
        for _ in range(int(rng.integers(1, 20))):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        content[place:place] = rng.bytes(int(rng.integers(1, 200)))
    else:
        del content[place:place + int(rng.integers(1, 200))]
    return bytes(content)


@pytest.mark.filterwarnings("ignore")                       # Pillow's, on damaged metadata
def test_five_hundred_damaged_files(tmp_path):
    """Each damaged image, table or checkpoint is read, or raises the one error of a user's mistake."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (24, 24, 3)).astype(np.uint8)
    good = tmp_path / "good"
    good.mkdir()
    for suffix in ("png", "jpg", "tif", "bmp"):
        Image.fromarray(pixels).save(good / f"image.{suffix}")
    s = Settings(resize=32, crop=32, channels=8, T=2, device="cpu")
    runs.new_run(good, s, None, runs.build_model(s)).save()
    visa = tmp_path / "visa"
    (visa / "split_csv").mkdir(parents=True)
    (visa / "nut").mkdir()
    Image.fromarray(pixels).save(visa / "nut" / "0.png")
    table = "object,split,label,image,mask\n" + "".join(
        f"nut,{part},normal,nut/0.png,\n" for part in ("train", "train", "test"))

    read = {".pt": lambda p: runs.load_model(p, torch.device("cpu")),
            ".csv": lambda p: read_visa("visa", "nut", visa / "nut")}
    outcome = {"read": 0, "refused": 0}
    for k in range(500):
        suffix = ("png", "jpg", "tif", "bmp", "csv", "pt")[k % 6]
        path = visa / "split_csv/1cls.csv" if suffix == "csv" else tmp_path / f"damaged.{suffix}"
        content = table.encode() if suffix == "csv" else (
            good / ("last.pt" if suffix == "pt" else f"image.{suffix}")).read_bytes()
        path.write_bytes(corrupted(rng, content))
        try:
            read.get(path.suffix, lambda p: data.load_image(p, 16, 16))(path)
            outcome["read"] += 1
        except InputError as error:
            assert "\n" not in str(error) and str(path.name) in str(error)
            outcome["refused"] += 1
    assert outcome["read"] > 50 and outcome["refused"] > 50, outcome


def test_predict_refuses_a_pickle_that_runs_code(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Malicious:
        def __reduce__(self):
            return os.system, ("touch executed",)

    torch.save({"format": 1, "settings": Malicious()}, tmp_path / "model.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert predict.main(["model.pt", "a.png", "--out", "output"]) == 2
    assert "model.pt is not a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "output").exists()
