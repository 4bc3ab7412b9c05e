"""Several processes train as one: torchrun with two CPU processes over gloo."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import train
from test_train import argv_for, parts, write_parts  # noqa: F401  (a fixture)

HERE = Path(train.__file__).parent
STEPS = 20
SCRIPT = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch, train
from runs import load_source, make_folder, run_folder
from settings import parse

out, *argv = sys.argv[1:]
s, _ = parse([*argv, "--steps", "{STEPS}"])
if train.RANKS > 1:
    s = train.join_ranks(s)
source = load_source(s)
make_folder(run_folder(s))
make_batch, mean_over_ranks = train.make_batch, train.mean_over_ranks
for batchnorm in ("frozen", "split"):
    model, batches, losses = train.start_model(s, ""), [], []
    if batchnorm == "frozen":
        model.net.mask_head[0].eval()
    train.make_batch = lambda *which: batches.append(make_batch(*which)) or batches[-1]
    train.mean_over_ranks = lambda each: losses.append(mean_over_ranks(each)) or losses[-1]
    train.seconds_per_step(model, s, source)                    # which all ranks measure together
    train.train(model, s, source, run_folder(s))
    torch.save({{"model": dict(model.named_parameters()), "batches": batches[-{STEPS}:],
                "losses": [list(each.values()) for each in losses]}},
               out + batchnorm + str(train.RANK))
"""


def launch(ranks, *argv):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run([sys.executable, *(torchrun if ranks > 1 else []), *argv], text=True,
                          capture_output=True, timeout=300, cwd=HERE,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with what one process and two have trained on, how, and to what."""
    folder = tmp_path_factory.mktemp("ranks")
    write_parts(folder)
    script = folder / "ranks.py"
    script.write_text(SCRIPT)
    with ThreadPoolExecutor() as pool:
        for done in pool.map(lambda ranks: launch(
                ranks, str(script), str(folder / f"{ranks}-"), *argv_for(
                    folder / "parts", "--batch", "8", "--hold-out", "0.33", "--name", str(ranks))),
                (1, 2)):
            assert done.returncode == 0, done.stderr[-2000:]
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
    with ThreadPoolExecutor() as pool:
        done, uneven = pool.map(lambda more: launch(2, "train.py", *argv_for(parts, *more)),
                                ((), ("--batch", "6", "--name", "uneven")))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("image AUROC") == 1
    folder = parts.parent / "runs" / "parts" / "bolt"
    assert {"metrics.json", "last.pt", "log.csv"} <= {p.name for p in folder.iterdir()}
    assert "--batch 6: 2 processes share it" in uneven.stderr and uneven.stderr.count("error:") == 1
