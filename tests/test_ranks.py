"""Several processes train as one: torchrun with two CPU processes over gloo."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import train
from runs import load_source, make_folder, run_folder
from settings import parse
from test_train import argv_for, parts, write_parts  # noqa: F401  (a fixture)

HERE = Path(train.__file__).parent
STEPS = 20
SCRIPT = f"""
import sys
sys.path[:0] = {[str(HERE), str(HERE / "tests")]}
import train
from test_ranks import train_both_ways

assert train.main([*sys.argv[2:], "--batch", "6"]) == 2
train_both_ways(*sys.argv[1:])
"""


def train_both_ways(out, *argv):
    """Train with the mask head's BatchNorm frozen, and with one that sees only its rank's share."""
    s, _ = parse([*argv, "--steps", str(STEPS)])
    if train.RANKS > 1:
        s = train.join_ranks(s)
    source = load_source(s)
    make_folder(run_folder(s))
    make_batch, mean_over_ranks = train.make_batch, train.mean_over_ranks
    for batchnorm in ("frozen", "split"):
        model, batches, losses = train.start_model(s, ""), [], []
        if batchnorm == "frozen":
            model.net.mask_head[0].eval()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "make_batch",
                          lambda *which: batches.append(make_batch(*which)) or batches[-1])
            patch.setattr(train, "mean_over_ranks",
                          lambda each: losses.append(mean_over_ranks(each)) or losses[-1])
            train.seconds_per_step(model, s, source)            # which all ranks measure together
            train.train(model, s, source, run_folder(s))
        torch.save({"model": dict(model.named_parameters()), "batches": batches[-STEPS:],
                    "losses": [list(each.values()) for each in losses]},
                   f"{out}{batchnorm}{train.RANK}")


def torchrun(*argv):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", "2", *argv], text=True, capture_output=True,
                          timeout=300, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with what one process and two have trained on, how, and to what."""
    folder = tmp_path_factory.mktemp("ranks")
    write_parts(folder)
    script = folder / "ranks.py"
    script.write_text(SCRIPT)
    one, two = ([str(folder / f"{ranks}-"),
                 *argv_for(folder / "parts", "--batch", "8", "--hold-out", "0.33", "--name", ranks)]
                for ranks in "12")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(torchrun, str(script), *two)
        train_both_ways(*one)
        done = other.result()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--batch 6: 2 processes share it" in done.stderr and done.stderr.count("error:") == 1
    return folder


@pytest.mark.parametrize("batchnorm", ["frozen", "split"])
def test_two_ranks_train_as_one(trained, batchnorm):
    one = torch.load(trained / f"1-{batchnorm}0")
    a, b = (torch.load(trained / f"2-{batchnorm}{rank}") for rank in (0, 1))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for whole, left, right in zip(one["batches"], a["batches"], b["batches"]):
        for part, x, y in zip(whole, left, right):
            assert torch.equal(part[0::2], x) and torch.equal(part[1::2], y)
        assert left[2].flatten(1).any(1).tolist() == [True, True, False, False]     # M
    alone, shared = torch.tensor(one["losses"]), torch.tensor(a["losses"])
    assert torch.equal(shared, torch.tensor(b["losses"]))
    if batchnorm == "frozen":
        assert torch.allclose(alone, shared, rtol=1e-4, atol=1e-4)
    else:                                      # only the mask head's BatchNorm sees half a batch
        assert torch.allclose(alone[0, [1, 3]], shared[0, [1, 3]], rtol=1e-5)       # n, a
        assert not torch.allclose(alone[0, 2], shared[0, 2], rtol=1e-6)             # m
        assert torch.allclose(alone, shared, rtol=0.05)


def test_the_command_under_torchrun(parts):  # noqa: F811
    done = torchrun("train.py", *argv_for(parts))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("image AUROC") == 1
    folder = parts.parent / "runs" / "parts" / "bolt"
    assert {"metrics.json", "last.pt", "log.csv"} <= {p.name for p in folder.iterdir()}
