"""How commands speak and end: standard streams that are missing, full or closed, warnings, exit
status, signals, and the home folder."""
import errno
import importlib.util
import io
import json
import os
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import download
import evaluate
import figures
import import_authors
import predict
import runs
import train
from helpers import argv_for, contents, refused, run_predict, write_photos
from settings import parse
from support import report
from support.console import InputError, StopRequest, TolerantStream, exit_status, progress_bar
from support.images import open_image
from support.layouts import root_folder


# ---------------------------------------------------------------- standard streams

class Full(io.TextIOBase):
    """A log whose disk is full."""
    encoding = "utf-8"

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        self.write("")


class Closed(Full):
    """The terminal or the pipe of a command is gone."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise ValueError("I/O operation on closed file")


def missing() -> None:
    """No stream at all, as under pythonw."""


@pytest.mark.parametrize("stream", [Full, Closed, missing])
def test_a_stream_that_takes_nothing_ends_no_training(factory, monkeypatch, stream):
    streams = stream(), stream()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    run = factory / "runs/parts/bolt"
    assert train.main(argv_for(factory / "parts", "--resume", "--steps", "8")) == 0
    assert runs.load_checkpoint(run / "last.pt")[1]["step"] == 8
    assert run_predict(run, write_photos(factory / "line"), "--out", factory / "found") == 0
    assert (sys.stdout, sys.stderr) == streams                      # put back


def test_a_command_without_streams_runs_and_keeps_its_exit_status(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    @exit_status
    def command(fault: bool):
        for _ in progress_bar(range(3)):
            print("done", flush=True)
        print("done", file=sys.stderr)
        if fault:
            raise InputError("wrong")

    assert command(False) == 0 and command(True) == 2
    assert sys.stdout is None and sys.stderr is None


def test_a_missing_stream_takes_everything_and_shows_nothing():
    stream = TolerantStream(None)
    assert stream.write("零件\n") == 3 and not stream.isatty()
    stream.flush()
    stream.final_flush()
    stream.close()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_letters_that_the_output_lacks_are_written_as_escape_sequences(monkeypatch, encoding):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding))

    @exit_status
    def command():
        print("零件: done")

    assert command() == 0
    assert output.getvalue() == rb"\u96f6\u4ef6: done" + os.linesep.encode()


# ---------------------------------------------------------------- warnings and errors

def test_of_many_warnings_three_are_shown_and_the_others_are_counted(tmp_path, capsys):
    for k in range(9):
        dark = np.arange(4096, dtype=np.uint16).reshape(64, 64)
        Image.fromarray(dark).save(tmp_path / f"{k}.png")

    @exit_status
    def command():
        for k in range(9):
            open_image(tmp_path / f"{k}.png")

    assert command() == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "2.png" in lines[2] and lines[3].startswith(
        "warning: 6 more like this: no 16-bit value passes 4095, so the image is ")


def test_a_full_gpu_is_said_in_one_line(capsys):
    @exit_status
    def command():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert command() == 2
    line, = capsys.readouterr().err.splitlines()
    assert "memory is full (CUDA out of memory)" in line and "--batch" in line


# ---------------------------------------------------------------- signals

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
           if hasattr(signal, name)]


@pytest.fixture(params=SIGNALS)
def number(request):
    """A signal, which does not end the tests where nothing handles it."""
    handler = signal.signal(request.param, lambda *_: None)
    yield request.param
    signal.signal(request.param, handler)


def test_the_first_signal_asks_to_stop_and_the_second_one_interrupts(number):
    handler = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is handler                      # put back


def test_what_is_ignored_under_nohup_stays_ignored_and_ctrl_c_is_heard(number):
    """A script's background job begins with Ctrl-C ignored, but `kill -INT` is meant for it."""
    signal.signal(number, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked == (number != signal.SIGHUP)


def test_a_training_that_is_asked_to_stop_saves_its_step_and_is_continued(factory, monkeypatch,
                                                                          capsys, number):
    run = factory / "runs/parts/bolt-stopped"
    argv = argv_for(factory / "parts", "--steps", "9", "--name", "stopped")
    make_batch = train.make_batch

    def signalled(s, run_data, last_step, step, *args):
        if step == 4:
            os.kill(os.getpid(), number)
        return make_batch(s, run_data, last_step, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_batch", signalled)
        assert train.main(argv) == 130
    assert "stopped at step 5 of 9; the same command with --resume continues from there" in \
        capsys.readouterr().err
    assert runs.load_checkpoint(run / "last.pt")[1]["step"] == 5
    assert "metrics.json" not in contents(run)
    assert train.main([*argv, "--resume"]) == 0
    assert runs.load_checkpoint(run / "last.pt")[1]["step"] == 9


def test_a_training_runs_in_a_worker_thread(factory):
    statuses = []
    argv = argv_for(factory / "parts", "--resume", "--steps", "7")
    worker = threading.Thread(target=lambda: statuses.append(train.main(argv)))
    worker.start()
    worker.join()
    assert statuses == [0]


# ---------------------------------------------------------------- where commands run

def test_the_download_needs_no_module_of_unix(monkeypatch):
    for name in ("fcntl", "resource", "pwd"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("download_elsewhere", download.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.main


def test_a_tilde_is_the_home_folder_in_every_command(factory, monkeypatch, capsys):
    here = factory / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(factory))
    s = parse(["--data=~/parts", "--category", "bolt", "--out=~/runs", "--root=~/data",
               "--foreground=~/fg", "--preset", "cpu"])[0]
    assert [s.data, s.out, s.root, s.foreground] == [str(factory / name) for name in
                                                     ("parts", "runs", "data", "fg")]
    monkeypatch.setenv("TRANSFUSION_DATA", "~/data")
    assert root_folder() == root_folder("~/data") == factory / "data"
    write_photos(factory / "line")
    assert run_predict("~/runs/parts/bolt", "~/line", "--out=~/found") == 0
    assert (factory / "found/scores.csv").exists()
    assert run_predict("~/runs/parts/bolt", "~/line/*.png", "--out=~/found") == 0
    assert predict.load("~/runs/parts/bolt", "cpu").inspect("~/line/0.png").score >= 0
    assert evaluate.main(["~/runs/parts/bolt", "--data=~/parts", "--root=~", "--device=cpu"]) == 0
    assert download.main(["--check=~/parts"]) == 0
    assert figures.load_run("parts", "~/runs", "~").folder == factory / "runs/parts/bolt"
    refused(capsys, ["~/w.pkl", "~/runs/parts/bolt-w", "--data=~/parts", "--device=cpu"],
            f"{factory / 'w.pkl'} does not exist", command=import_authors.main)
    assert bench.main(["--json=~/none/a.json"]) == 2
    assert str(factory / "none") in capsys.readouterr().err
    monkeypatch.setattr(download, "fetch", lambda name, root: print(root))
    assert download.main(["visa", "--root=~/data"]) == 0
    assert capsys.readouterr().out == f"{factory / 'data'}\n"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("metrics, named", [
    ({"threshold": 0.1, "epoch": 301}, True), ({"threshold": 0.1, "epoch": 300}, False),
    ({"threshold": 0.1, "epoch": 301, "data": "demo"}, False),
    ({"threshold": None, "epoch": 1500}, False), ({"threshold": 0.1}, False)])
def test_a_training_of_many_passes_asks_for_new_photos(tmp_path, capsys, metrics, named):
    """The scores of its own photos are then too low for a threshold."""
    (tmp_path / "metrics.json").write_text(json.dumps({"data": "parts", **metrics}))
    report.print_next_steps([tmp_path], tmp_path)
    assert ("trained on 301 times" in capsys.readouterr().out) == named
