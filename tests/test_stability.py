"""Trainings that would run away: what holds them, what is skipped, what is gone back on."""
import csv
import dataclasses
import math
import os
import signal

import pytest
import torch

import runs
import train
from settings import InputError, Settings, parse
from test_train import argv_for, parts, refused  # noqa: F401  (parts is a fixture)
from transfusion import Attention


def healthy(loss=0.1, gradient=2.0):
    return {"loss": loss, "n": 0.0, "m": 0.0, "a": 0.0, "c": 0.0, "gradient": gradient}


def last(parts, name):  # noqa: F811
    return parts.parent / "runs" / "parts" / f"bolt-{name}" / "last.pt"


def same(a, b):
    """Whether two checkpoints hold the same weights, averages and moments, bit for bit."""
    moments = [(x, y) for k, state in a["optimizer"]["state"].items()
               for x, y in zip(state.values(), b["optimizer"]["state"][k].values())]
    return all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part]) \
        and all(torch.equal(x, y) for x, y in moments)


# ---------------------------------------------------------------- the norm before attention

@pytest.mark.parametrize("flag, holds", [
    ("--attention-norm", True),
    pytest.param("--no-attention-norm", False, marks=pytest.mark.slow)])
def test_attention_holds_at_a_rate_it_ran_away_at(flag, holds, demo_root, tmp_path):
    """Ten times the preset's rate: logits of 350 to 500 with the norm, 1e10 and more without it."""
    s, _ = parse(["--preset", "quick", "--category", "fabric", "--resize", "32", "--channels", "8",
                  "--precision", "float32", "--lr", "1e-2", "--lr-schedule", "step", "--steps",
                  "90", flag, "--device", "cpu", "--root", str(demo_root)])
    model = train.start_model(s, "")
    largest = [0.0]

    def watch(layer, inputs, output):
        q, k, _ = output.detach().chunk(3, dim=-1)
        largest.append((q @ k.transpose(-2, -1)).abs().max().item() * q.shape[-1] ** -0.5)

    for module in model.modules():
        if isinstance(module, Attention):
            module.projection.register_forward_hook(watch)
    train.train(model, s, runs.load_source(s), tmp_path)
    assert (max(largest) < 5e3) == holds and (max(largest) > 1e6) == (not holds)


# ---------------------------------------------------------------- a step that is skipped

@pytest.mark.parametrize("sick", ["batch", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(sick, parts, monkeypatch):  # noqa: F811
    argv = argv_for(parts, "--lr-schedule", "step", "--warmup", "0")
    assert train.main([*argv, "--steps", "4", "--name", "three", "--checkpoint-every", "3"]) == 0
    make_batch, clip = train.make_batch, torch.nn.utils.clip_grad_norm_
    clipped = []

    def nan_at_step_3(s, source, last_step, step, device):
        x, *others = make_batch(s, source, last_step, step, device)
        return x * (math.nan if step == 3 else 1), *others

    def infinite_at_step_3(*args):
        clipped.append(clip(*args))
        return clipped[-1] * (math.inf if len(clipped) == 4 else 1)

    if sick == "batch":
        monkeypatch.setattr(train, "make_batch", nan_at_step_3)
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite_at_step_3)
    assert train.main([*argv, "--steps", "4", "--name", "skipped"]) == 0
    monkeypatch.undo()
    assert train.main([*argv, "--steps", "3", "--name", "short"]) == 0
    skipped, short = (torch.load(last(parts, n), weights_only=True) for n in ("skipped", "short"))
    assert skipped["step"] == 4 and same(skipped, short)
    with open(last(parts, "skipped").with_name("log.csv")) as file:
        rows = list(csv.DictReader(file))
    assert [row["skipped"] for row in rows] == ["0", "1"]           # 3 steps an epoch


# ---------------------------------------------------------------- a run-away

def count(progress, steps, **found):
    for _ in range(steps):
        train.count_step(progress, healthy(**found), 1.0)
    return progress["outliers"]


def test_what_counts_as_a_run_away():
    progress = runs.new_progress()
    count(progress, train.BURN_IN)
    assert count(progress, 3, loss=50.0) == 3 and count(progress, 3) == 0      # a spike passes
    for change in (dict(loss=0.29), dict(gradient=19.0)):                # below OUTLIER_FACTOR
        assert count(progress, 5, **change) == 0
    for change in (dict(loss=0.5), dict(gradient=50.0), dict(loss=math.nan),
                   dict(gradient=math.inf)):
        progress["outliers"] = 0
        assert count(progress, 9, **change) == 9, change
    assert progress["running_mean"]["loss"] < 0.2 and progress["running_mean"]["gradient"] < 10


def test_a_slow_change_is_no_run_away():
    progress = runs.new_progress()
    for step in range(1000):                                             # both grow 100 times
        assert count(progress, 1, loss=0.1 * 1.0046 ** step, gradient=1.0046 ** step) == 0


@pytest.fixture
def runs_away(monkeypatch):
    """Make the steps from 8 on sick, as often as asked; a run-away is told after five of them."""
    for name, value in (("BURN_IN", 6), ("MAX_OUTLIERS_AT_END", 1), ("MAX_OUTLIERS", 4)):
        monkeypatch.setattr(train, name, value)
    make_batch, save_checkpoint, counted, saved = train.make_batch, train.save_checkpoint, [], []

    def sick(times):
        counted.clear()

        def make(s, source, last_step, step, device):
            x, *others = make_batch(s, source, last_step, step, device)
            counted.extend([step] if step == 8 else [])
            return x * (1e3 if step >= 8 and len(counted) <= times else 1), *others
        monkeypatch.setattr(train, "make_batch", make)

    def watched(path, s, model, average, optimizer, progress):
        saved.append((progress["step"], progress["outliers"]))
        save_checkpoint(path, s, model, average, optimizer, progress)

    monkeypatch.setattr(train, "save_checkpoint", watched)
    sick.saved = saved
    return sick


def test_a_run_away_goes_back_and_ends_well(parts, runs_away, capsys):  # noqa: F811
    runs_away(1)
    argv = argv_for(parts, "--steps", "16", "--checkpoint-every", "3", "--lr-schedule", "step",
                    "--warmup", "0")
    assert train.main([*argv, "--name", "whole"]) == 0
    out = capsys.readouterr().out
    assert "ran away at step 13 (loss " in out
    assert "back to step 6, and on with 1/2 of the learning rate" in out
    whole = torch.load(last(parts, "whole"), weights_only=True)
    assert whole["rollbacks"] == 1 and whole["step"] == 16
    assert all(v.isfinite().all() for v in whole["model"].values())
    assert [step for step, _ in runs_away.saved] == [0, 3, 6, 9, 12, 15, 16, 16]   # with threshold
    assert all(outliers == 0 for _, outliers in runs_away.saved)
    with open(last(parts, "whole").with_name("log.csv")) as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == [1e-3, 1e-3] + [5e-4] * 4
    assert all(float(row["loss"]) < 3 for row in rows)                   # nothing of the sick steps


def test_bit_identical_when_resumed_after_a_run_away(parts, runs_away, monkeypatch):  # noqa: F811
    argv = argv_for(parts, "--steps", "16", "--checkpoint-every", "3")
    runs_away(1)
    assert train.main([*argv, "--name", "whole"]) == 0
    score_epoch = train.score_epoch

    def interrupted(model, s, source, folder, progress, eval_every):
        if progress["rollbacks"] and progress["step"] == 12:
            os.kill(os.getpid(), signal.SIGINT)
        score_epoch(model, s, source, folder, progress, eval_every)

    monkeypatch.setattr(train, "score_epoch", interrupted)
    runs_away(1)
    assert train.main([*argv, "--name", "broken"]) == 130
    monkeypatch.undo()
    assert train.main([*argv, "--name", "broken", "--resume"]) == 0
    assert same(*(torch.load(last(parts, n), weights_only=True) for n in ("whole", "broken")))


def test_three_returns_and_then_the_error(parts, runs_away, capsys):  # noqa: F811
    runs_away(9)
    argv = argv_for(parts, "--steps", "16", "--checkpoint-every", "3", "--name", "sick")
    refused(capsys, argv, "ran away at step 13", "1/8 of it", "another --name",
            "with a lower --lr than 0.001")
    state = torch.load(last(parts, "sick"), weights_only=True)
    assert state["step"] == 6 and state["outliers"] == 0


@pytest.mark.parametrize("changes, advice", [
    ({}, "a lower --lr than 1e-05 or --clip 1 or --attention-norm"),
    (dict(clip=1.0, attention_norm=True), "a lower --lr than 1e-05"),
    (dict(precision="bf16", clip=1.0), "1e-05 or --attention-norm or --precision float32")])
def test_the_error_names_only_what_is_not_set(changes, advice, tmp_path):
    progress = {**runs.new_progress(), "rollbacks": train.MAX_ROLLBACKS}
    with pytest.raises(InputError, match=f"{advice}$"):
        train.roll_back(progress, healthy(), Settings(**changes), None, None, None, tmp_path)


# ---------------------------------------------------------------- checkpoints of before

def test_a_checkpoint_of_before_loads_as_what_it_was(parts, capsys):  # noqa: F811
    argv = argv_for(parts, "--no-attention-norm", "--name", "old", "--steps", "9",
                    "--checkpoint-every", "3")
    assert train.main(argv) == 0
    path = last(parts, "old")
    state = torch.load(path, weights_only=True)
    for key in ("epoch_steps", "running_mean", "outliers", "rollbacks"):
        del state[key]
    torch.save({**state, "format": 2, "sums": {}, "usual": {}, "high": 0, "returns": 0}, path)
    assert train.main([*argv, "--eval"]) == 0
    path.with_name("metrics.json").unlink()                         # as if it had not ended
    for words in ([], ["--resume"]):
        refused(capsys, [*argv, *words], "begun by an earlier version", "--name")
    del state["settings"]["attention_norm"]
    state["settings"]["attention_lr"] = 0.1
    torch.save({**state, "format": 1}, path)
    model, s, _ = runs.load_model(path, torch.device("cpu"))
    assert not s.attention_norm and isinstance(model.net.middle.attn.norm, torch.nn.Identity)
    refused(capsys, [*argv, "--resume"], "begun by an earlier version", "--name")
    assert dataclasses.asdict(s)["steps"] == 9
