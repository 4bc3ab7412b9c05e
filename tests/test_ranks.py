"""Several processes train as one: torchrun with two CPU processes over gloo."""
import dataclasses
import importlib
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
import transfusion
from data import load_run_data
from helpers import HERE, ROOT, argv_for, run_of, write_parts
from runs import Run, build_model, new_run, run_folder
from settings import parse
from support import ranks
from support.files import make_folder

STEPS = 5
SCRIPT = f"""
import runpy, sys
sys.path[:0] = {[str(ROOT), str(HERE)]}
import train
from support import ranks
from test_ranks import join_and_load, train_both_ways, train_with_a_bad_batch

command, out, *argv = sys.argv[1:]
assert train.main([*argv, "--batch", "6"]) == 2
sys.argv = ["train.py", *command.split()]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0

ranks.join = lambda device, batch: device                       # the command has joined already
s, run_data = join_and_load(argv)
train_both_ways(out, s, run_data)
train_with_a_bad_batch(out, s, run_data)
"""


def join_and_load(argv):
    """The settings of a training of STEPS steps, when all ranks are there, and its data."""
    s, _ = parse([*argv, "--steps", str(STEPS)])
    s = dataclasses.replace(s, device=ranks.join(s.device, s.batch))
    make_folder(run_folder(s))
    return s, load_run_data(s)


def smooth_normal_loss(n_t, x):
    """Eq. 5 with a smooth L1 loss.

    The gradient of the L1 loss is the sign of n_t - x. Where that is about 0, which it is often as
    the training starts with n_t = x, the rounding decides it, and one sign changes the gradient's
    norm by up to 2e-4 of it. A smooth loss changes as little as what is rounded.
    """
    return 1 - transfusion.ssim(n_t, x) + F.smooth_l1_loss(n_t, x)


def train_both_ways(out, s, run_data):
    """Train with the mask head's BatchNorm frozen and a smooth Eq. 5, and then as it is, with a
    BatchNorm that sees only its rank's share."""
    make_batch, record = train.make_batch, Run.record
    for batchnorm in ("frozen", "split"):
        run, batches, losses = new_run(run_folder(s), s, run_data, build_model(s)), [], []
        if batchnorm == "frozen":
            run.model.net.mask_head[0].eval()

        def watched_record(run, step_losses):
            record(run, step_losses)
            losses.append(list(run.epoch_steps[-1].values()))          # means over the ranks

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "make_batch",
                          lambda *which: batches.append(make_batch(*which)) or batches[-1])
            patch.setattr(Run, "record", watched_record)
            if batchnorm == "frozen":
                patch.setattr(transfusion, "normal_loss", smooth_normal_loss)
            train.train(run)
        torch.save({"model": dict(run.model.named_parameters()), "batches": batches,
                    "losses": losses}, f"{out}{batchnorm}{ranks.RANK}")


def train_with_a_bad_batch(out, s, run_data):
    """Train where the last rank alone gets a NaN, until it has returned to a checkpoint once."""
    s = dataclasses.replace(s, checkpoint_every=2)
    run, make_batch = new_run(run_folder(s), s, run_data, build_model(s)), train.make_batch

    def nan_at_step_3(s, run_data, last_step, step, device, rollbacks, side):
        x, *others = make_batch(s, run_data, last_step, step, device, rollbacks, side)
        sick = (step, rollbacks, ranks.RANK) == (3, 0, ranks.COUNT - 1)
        return x * (math.nan if sick else 1), *others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_batch", nan_at_step_3)
        train.train(run)
    torch.save({"model": run.model.state_dict(), "step": run.step, "rollbacks": run.rollbacks},
               f"{out}returned{ranks.RANK}")


def torchrun(*argv):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", "2", *argv], text=True, capture_output=True,
                          timeout=600, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def trained_both_ways(tmp_path_factory) -> Path:
    """A folder with what one process and two have trained on, how, and to what; in it the run that
    the command has made under torchrun, and as "printed" what that printed."""
    folder = tmp_path_factory.mktemp("ranks")
    write_parts(folder)
    script = folder / "ranks.py"
    script.write_text(SCRIPT)
    one, two = ([str(folder / f"{count}-"),
                 *argv_for(folder / "parts", "--batch", "8", "--hold-out", "0.33", "--anomalous",
                           "0.5", "--name", count)] for count in "12")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(torchrun, str(script), " ".join(argv_for(folder / "parts")), *two)
        out, *argv = one
        train_both_ways(out, *join_and_load(argv))
        process = other.result()
    assert process.returncode == 0, process.stderr[-2000:]
    assert "--batch 6: 2 processes share it" in process.stderr
    assert process.stderr.count("error:") == 1
    (folder / "printed").write_text(process.stdout)
    return folder


@pytest.mark.network
@pytest.mark.parametrize("batchnorm", ["frozen", "split"])
def test_two_ranks_train_as_one(trained_both_ways, batchnorm):
    one = torch.load(trained_both_ways / f"1-{batchnorm}0")
    a, b = (torch.load(trained_both_ways / f"2-{batchnorm}{rank}") for rank in (0, 1))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert len(one["batches"]) == len(a["batches"]) == len(b["batches"]) == STEPS
    for whole, left, right in zip(one["batches"], a["batches"], b["batches"]):
        for part, x, y in zip(whole, left, right):
            assert torch.equal(part[0::2], x) and torch.equal(part[1::2], y)
        assert left[2].flatten(1).any(1).tolist() == [True, True, False, False]     # M
    alone, shared = torch.tensor(one["losses"]), torch.tensor(a["losses"])
    assert torch.equal(shared, torch.tensor(b["losses"])) and shared.shape == (STEPS, 6)
    if batchnorm == "frozen":
        assert torch.allclose(alone, shared, rtol=1e-5, atol=1e-6)     # the gradient's norm, too
    else:                                      # only the mask head's BatchNorm sees half a batch
        assert torch.allclose(alone[0, [1, 3]], shared[0, [1, 3]], rtol=1e-5)       # n, a
        assert not torch.allclose(alone[0, 2], shared[0, 2], rtol=1e-6)             # m
        assert torch.allclose(alone, shared, rtol=0.05)


@pytest.mark.network
def test_all_ranks_return_to_the_checkpoint_where_one_diverges(trained_both_ways):
    a, b = (torch.load(trained_both_ways / f"2-returned{rank}") for rank in (0, 1))
    assert (a["step"], a["rollbacks"]) == (b["step"], b["rollbacks"]) == (STEPS, 1)
    names = [name for name in a["model"] if "running" not in name]   # statistics of its own batch
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in names)
    assert all(value.isfinite().all() for state in (a, b) for value in state["model"].values())


@pytest.mark.network
def test_the_command_under_torchrun(trained_both_ways):
    assert (trained_both_ways / "printed").read_text().count("image AUROC") == 1
    folder = run_of(trained_both_ways / "parts")
    assert {"metrics.json", "last.pt", "log.csv"} <= {p.name for p in folder.iterdir()}


# ---------------------------------------------------------------- torchrun's environment

WHOLE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0"}


def test_torchruns_variables_count_where_all_are_set_and_agree():
    assert ranks.read_environment({**WHOLE, "HOME": "/root"}) == (5, 8, 1, "")
    assert ranks.read_environment({**WHOLE, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) \
        == (0, 1, 0, "")


@pytest.mark.parametrize("environment", [{}, {"HOME": "/root"}, {"MASTER_ADDR": "node0"},
                                         {"RANK": ""}])
def test_without_torchruns_variables_one_process_runs(environment):
    """MASTER_ADDR alone says nothing of ranks: clusters export it in every shell."""
    assert ranks.read_environment(environment) == (0, 1, 0, "")


@pytest.mark.parametrize("changes", [
    *({name: ""} for name in WHOLE),                                     # one of them is not set
    {"RANK": "8"}, {"RANK": "-1"}, {"RANK": "five"}, {"LOCAL_RANK": "6"}, {"WORLD_SIZE": "0"},
    {"WORLD_SIZE": "8.0"}, {"WORLD_SIZE": "²"}])
def test_of_variables_that_are_missing_or_disagree_one_process_is_left_and_a_note(changes):
    environment = {**WHOLE, **changes}
    rank, count, local_rank, note = ranks.read_environment(environment)
    assert (rank, count, local_rank) == (0, 1, 0)
    assert note.startswith("note: ") and note.endswith("one process runs") and "\n" not in note
    assert all(f"{name}={value}" in note for name, value in environment.items() if value)


@pytest.fixture
def inside_another_job(monkeypatch):
    """Three of torchrun's variables, as srun leaves them, where a process starts."""
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    importlib.reload(ranks)
    yield
    monkeypatch.undo()
    importlib.reload(ranks)


def test_a_shell_inside_another_job_trains_with_one_process_and_prints_the_note(
        parts, inside_another_job, capsys):
    """It waits for nobody."""
    assert (ranks.RANK, ranks.COUNT, ranks.LOCAL_RANK) == (0, 1, 0)
    assert train.main(argv_for(parts)) == 0
    out = capsys.readouterr().out
    assert out.startswith("note: RANK=3, WORLD_SIZE=4, LOCAL_RANK=3 in the environment ignored")
    assert out.count("image AUROC") == 1
