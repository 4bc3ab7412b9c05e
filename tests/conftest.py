"""Fixtures shared by the tests: the demo data and one small trained model."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import demo
import evaluate
import train
import transfusion
from helpers import ShallowUNet, argv_for, mvtec_tree, write_parts

torch.set_num_threads(1)        # most models here are so small that two threads wait for each other

# A model that trains in a minute or two: what the tests of everything behind training share.
SMALL = ["--category", "fabric", "--resize", "64", "--crop", "64", "--channels", "16", "--batch",
         "4", "--steps", "400", "--infer-steps", "3", "--checkpoint-every", "100", "--precision",
         "float32", "--device", "cpu", "--grow", "", "--anomalous", "0.5"]
SYNTHETIC = 8                   # in place of 64: most tests score a model that has learned nothing


# Fixtures of what is made in another process beside the tests that do without it.
LATE = {"small", "executed", "whole_demo"}


@pytest.fixture(scope="session", autouse=True)
def few_synthetic_defects():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "SYNTHETIC", SYNTHETIC)
        yield


@pytest.fixture(autouse=True)
def stand_ins(request):
    """What takes most of a small training's time is replaced where a test is not about it.

    Without the mark "network", a network has two blocks in place of 23; tests with the mark "slow",
    and those that read what another process has trained, have the whole one. Without the mark
    "picture", the picture of a run holds other bytes every time.
    """
    marks = {mark.name for mark in request.node.iter_markers()}
    with pytest.MonkeyPatch.context() as patch:
        if "picture" not in marks:
            patch.setattr(evaluate, "draw_restorations",
                          lambda file, *_: file.write(os.urandom(16)))
        if not marks & {"network", "slow"} and not LATE & {*request.fixturenames}:
            patch.setattr(transfusion, "ResUNet", ShallowUNet)
        yield


@pytest.fixture
def parts(tmp_path) -> Path:
    """A small category of the user's own, parts/bolt, as the current folder's neighbour."""
    write_parts(tmp_path)
    return tmp_path / "parts"


@pytest.fixture
def bolt(tmp_path) -> Path:
    """A category of four good training images, a good one and two defective ones for the test."""
    return mvtec_tree(tmp_path / "parts" / "bolt")


@pytest.fixture(scope="session")
def trained_parts(tmp_path_factory) -> Path:
    """A folder with parts/bolt and a finished run of it, runs/parts/bolt; tests copy it."""
    folder = tmp_path_factory.mktemp("trained")
    write_parts(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "draw_restorations", lambda file, *_: file.write(os.urandom(16)))
        patch.setattr(transfusion, "ResUNet", ShallowUNet)
        assert train.main(argv_for(folder / "parts")) == 0
    return folder


@pytest.fixture
def factory(trained_parts, tmp_path) -> Path:
    """A copy of `trained_parts`, as if the run had been made there."""
    shutil.copytree(trained_parts, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs/parts/bolt/data.json"
    path.write_text(json.dumps({**json.loads(path.read_text()),
                                "root": str(tmp_path / "parts/bolt")}))
    return tmp_path


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def demo_root(data_folder) -> Path:
    """A folder that holds the demo's fabric as demo/fabric."""
    demo.write(data_folder / "demo", "fabric")
    return data_folder


@pytest.fixture(scope="session")
def whole_demo(training, data_folder) -> Path:
    """A folder that holds the demo data as demo/CATEGORY."""
    trained(training)
    return data_folder


@pytest.fixture(scope="session", autouse=True)
def training(request, data_folder, tmp_path_factory):
    """The small model's training, then the drawing of the demo's other products, on one core beside
    the tests that do without; the training's arguments and the file of what it prints."""
    if not any(LATE & {*item.fixturenames} for item in request.session.items):
        yield
        return
    demo.write(data_folder / "demo", "fabric")
    out = tmp_path_factory.mktemp("small") / "runs"
    argv = [*SMALL, "--root", str(data_folder), "--out", str(out)]
    code = (f"import pathlib, sys, demo, evaluate, train; evaluate.SYNTHETIC = {SYNTHETIC}; "
            f"failed = train.main(sys.argv[1:]); demo.write(pathlib.Path({str(data_folder)!r}) / "
            "'demo'); sys.exit(failed)")
    log = out.parent / "log"
    with open(log, "w") as printed, subprocess.Popen(
            [sys.executable, "-c", code, *argv], cwd=Path(train.__file__).parent, stdout=printed,
            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        yield process, argv, log
        process.kill()


@pytest.fixture(scope="session")
def small(training, demo_root) -> tuple[Path, list[str]]:
    """The run folder of a small trained model, and the arguments that made it."""
    return trained(training)


def trained(training) -> tuple[Path, list[str]]:
    """What `small` is, for who waits in a thread."""
    process, argv, log = training
    assert process.wait() == 0, log.read_text()
    return Path(argv[-1]) / "demo" / "fabric", argv


def pytest_collection_modifyitems(items):
    """Last come the tests of what is made beside the others: of the small model, then of the
    notebooks, which the first test has run as soon as that model is trained. By then both cores are
    free for the tests of several ranks."""
    items.sort(key=lambda item: (item.name != "test_there_are_notebooks",
                                 bool(LATE & {*item.fixturenames}) or item.path.stem == "test_ranks",
                                 item.name.startswith("test_notebook_runs")))
