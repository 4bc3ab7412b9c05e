"""Trainings that would diverge: what prevents it, what counts as it, and what happens then."""
import math
import os
import signal

import pytest
import torch

import runs
import train
from data import load_run_data
from helpers import argv_for, moments_of, refused, rows_of, run_of
from runs import Diverged, Run
from settings import Settings, parse
from support.console import InputError
from transfusion import Attention


def checkpoint(parts, name) -> dict:
    """The content of the last checkpoint of the run with this --name."""
    return torch.load(run_of(parts, name) / "last.pt", weights_only=True)


def tensors_of(state) -> list[torch.Tensor]:
    """The weights, averages, moments and step counts of a checkpoint."""
    return [*state["model"].values(), *state["ema"].values(), *moments_of(state["optimizer"])]


def same(a, b) -> bool:
    """Whether two checkpoints hold the same weights, averages and moments, bit for bit."""
    a, b = tensors_of(a), tensors_of(b)
    return len(a) == len(b) and all(map(torch.equal, a, b))


# ---------------------------------------------------------------- the norm before attention

@pytest.mark.slow
@pytest.mark.parametrize("flag, holds", [("--attention-norm", True),
                                         ("--no-attention-norm", False)])
def test_attention_holds_at_a_rate_it_ran_away_at(flag, holds, demo_root, tmp_path):
    """Ten times the preset's rate: logits of 350 to 500 with the norm, 1e10 and more without it."""
    s, _ = parse(["--preset", "quick", "--category", "fabric", "--resize", "32", "--channels", "8",
                  "--precision", "float32", "--lr", "1e-2", "--lr-schedule", "step", "--steps",
                  "90", flag, "--device", "cpu", "--root", str(demo_root)])
    run = runs.new_run(tmp_path, s, load_run_data(s), runs.build_model(s))
    largest = [0.0]

    def watch(layer, inputs, output):
        q, k, _ = output.detach().chunk(3, dim=-1)
        largest.append((q @ k.transpose(-2, -1)).abs().max().item() * q.shape[-1] ** -0.5)

    for module in run.model.modules():
        if isinstance(module, Attention):
            module.projection.register_forward_hook(watch)
    train.train(run)
    assert (max(largest) < 5e3) == holds and (max(largest) > 1e6) == (not holds)


# ---------------------------------------------------------------- what counts as a divergence

def count(run, steps, **changes) -> int:
    """Record steps of a healthy training but for these changes. Returns the outliers counted."""
    losses = {"loss": 0.1, "n": 0.0, "m": 0.0, "a": 0.0, "c": 0.0, "gradient": 2.0, **changes}
    for _ in range(steps):
        run.record(losses)
        run.step += 1
    return run.outliers


def run_without_data(folder, **changes) -> Run:
    return Run(folder, Settings(**{"steps": 10_000, **changes}), None, None)


def test_what_counts_as_an_outlier(tmp_path):
    run = run_without_data(tmp_path)
    count(run, runs.BURN_IN)
    assert count(run, 3, loss=50.0) == 3 and count(run, 3) == 0                # a spike passes
    for change in (dict(loss=0.29), dict(gradient=19.0)):                # below OUTLIER_FACTOR
        assert count(run, 5, **change) == 0
    for change in (dict(loss=0.5), dict(gradient=50.0)):
        run.outliers = 0
        assert count(run, 9, **change) == 9, change
    assert run.running_mean["loss"] < 0.2 and run.running_mean["gradient"] < 10


def test_too_many_outliers_are_a_divergence_and_fewer_at_the_end(tmp_path):
    run = run_without_data(tmp_path, steps=100)
    count(run, runs.BURN_IN)
    assert count(run, runs.MAX_OUTLIERS, loss=50.0) == runs.MAX_OUTLIERS
    means = dict(run.running_mean)
    with pytest.raises(Diverged, match=r"^the training diverged at step 41 \(loss 50, usually 0.1, "
                                       r"gradient 2, usually 2\)$"):
        count(run, 1, loss=50.0)
    assert run.step == 40 and run.running_mean == means
    for outliers, ends_well in ((runs.MAX_OUTLIERS_AT_END, True),
                                (runs.MAX_OUTLIERS_AT_END + 1, False)):
        run.step, run.outliers = 100 - outliers, 0
        if ends_well:
            assert count(run, outliers, loss=50.0) == outliers
        else:
            with pytest.raises(Diverged, match="at step 100 "):
                count(run, outliers, loss=50.0)


@pytest.mark.parametrize("name", ["loss", "c", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_a_divergence_at_once(name, value, tmp_path):
    """From the first step on, before there are means to compare with."""
    run = run_without_data(tmp_path)
    for _ in range(2):
        with pytest.raises(Diverged, match=f"diverged at step {run.step + 1} "):
            count(run, 1, **{name: value})
        count(run, runs.BURN_IN)
    assert math.isfinite(run.running_mean["loss"] + run.running_mean["gradient"])


def test_a_slow_change_is_no_divergence(tmp_path):
    run = run_without_data(tmp_path)
    for step in range(1000):                                             # both grow 100 times
        assert count(run, 1, loss=0.1 * 1.0046 ** step, gradient=1.0046 ** step) == 0


def test_the_usual_losses_of_small_images_are_no_measure_for_larger_ones(parts, monkeypatch):
    """On fabric, the first losses at 96 px are twenty times those at 56 px, and soon fall."""
    record, seen = Run.record, []

    def watched(run, losses):
        seen.append((run.step, run.running_mean["side"], run.running_mean.get("steps", 0)))
        record(run, losses)

    monkeypatch.setattr(Run, "record", watched)
    assert train.main(argv_for(parts, "--grow", "0.5:0.5", "--steps", "4")) == 0
    assert seen == [(0, 16, 0), (1, 16, 1), (2, 32, 0), (3, 32, 1)]


# ---------------------------------------------------------------- a step that is not finite

STEADY = ["--lr-schedule", "step", "--warmup", "0", "--checkpoint-every", "3", "--grow", ""]


@pytest.fixture
def nan_batch(monkeypatch):
    """Make the batch of step 5 NaN as long as the training returned to a checkpoint fewer than so
    many times; the steps of which batches were made, each with the number of returns."""
    make_batch, made_for = train.make_batch, []

    def make_nan(returns):
        def make(s, run_data, last_step, step, device, rollbacks=0, side=0):
            x, *others = make_batch(s, run_data, last_step, step, device, rollbacks, side)
            made_for.append((step, rollbacks))
            return x * (math.nan if step == 5 and rollbacks < returns else 1), *others

        monkeypatch.setattr(train, "make_batch", make)
        return made_for

    return make_nan


def test_one_bad_batch_at_the_same_place_does_not_end_the_training(parts, nan_batch, capsys):
    """It returns to the checkpoint, and on with half the rate and other batches."""
    steps = nan_batch(1)
    assert train.main(argv_for(parts, *STEADY, "--steps", "9", "--name", "sick")) == 0
    assert "  the training diverged at step 6 (loss nan, usually " in capsys.readouterr().out
    assert steps == [*((k, 0) for k in range(6)), *((k, 1) for k in range(3, 9))]
    state = checkpoint(parts, "sick")
    assert (state["step"], state["rollbacks"], state["outliers"]) == (9, 1, 0)
    assert all(value.isfinite().all() for value in tensors_of(state))
    rows = rows_of(run_of(parts, "sick") / "log.csv")
    assert [(row["step"], row["rollbacks"], float(row["lr"])) for row in rows] == [
        ("3", "0", 1e-3), ("6", "1", 5e-4), ("9", "1", 5e-4)]           # 3 steps an epoch


@pytest.mark.parametrize("sick", ["batch", "gradient"])
def test_after_the_return_the_training_is_that_of_the_checkpoint(sick, parts, monkeypatch, capsys):
    """Bit for bit, before the next step: weights, BatchNorm's statistics, moments, average."""
    new_run, make_batch, clip = train.new_run, train.make_batch, torch.nn.utils.clip_grad_norm_
    run, norms, returns = [], [], []

    def watched_batch(s, run_data, last_step, step, device, rollbacks=0, side=0):
        batch = make_batch(s, run_data, last_step, step, device, rollbacks, side)
        if rollbacks and not returns:
            live = {"model": run[0].model.state_dict(), "ema": run[0].average.module.state_dict(),
                    "optimizer": run[0].optimizer.state_dict()}
            saved = torch.load(run[0].folder / "last.pt", weights_only=True)
            for name in set(Run.RECORD) - {"seconds", "rollbacks"}:
                assert getattr(run[0], name) == saved[name], name
            assert run[0].seconds >= saved["seconds"] and run[0].rollbacks == 1
            other = make_batch(s, run_data, last_step, step, device, 0, side)
            returns.append((step, saved["step"], same(live, saved),
                            torch.equal(batch[0], other[0])))
        return batch[0] * (math.nan if sick == "batch" and step == 5 and not rollbacks else 1), \
            *batch[1:]

    def watched_clip(*args):
        norms.append(clip(*args))
        return norms[-1] * (math.inf if sick == "gradient" and len(norms) == 6 else 1)

    monkeypatch.setattr(train, "new_run", lambda *args: run.append(new_run(*args)) or run[0])
    monkeypatch.setattr(train, "make_batch", watched_batch)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
    assert train.main(argv_for(parts, *STEADY, "--steps", "9", "--rotation", "0")) == 0
    assert returns == [(3, 3, True, False)] and len(norms) == 6 + 6
    out = capsys.readouterr().out
    assert {"batch": "(loss nan, ", "gradient": ", gradient inf, "}[sick] in out
    assert "back to step 3, and on with 1/2 of the learning rate" in out


def test_three_bad_batches_at_the_same_place_are_survived_and_the_fourth_is_the_end(
        parts, nan_batch, capsys):
    steps = nan_batch(3)
    assert train.main(argv_for(parts, *STEADY, "--steps", "9", "--name", "survives")) == 0
    assert checkpoint(parts, "survives")["rollbacks"] == 3 and steps[-1] == (8, 3)
    out = capsys.readouterr().out
    assert [f"on with 1/{n} of the learning rate" in out for n in (2, 4, 8, 16)] == [True] * 3 + [
        False]
    nan_batch(4)
    refused(capsys, argv_for(parts, *STEADY, "--steps", "9", "--name", "ends"),
            "the training diverged at step 6 (loss nan", "after 3 returns to a checkpoint; the "
            "last of them to 1/8 of the learning rate", "another --name, with a lower --lr than "
            "0.001")
    state = checkpoint(parts, "ends")
    assert (state["step"], state["rollbacks"]) == (3, 0)
    assert all(value.isfinite().all() for value in tensors_of(state))


# ---------------------------------------------------------------- a divergence by outliers

@pytest.fixture
def diverges(monkeypatch):
    """Make the steps from 8 on sick, as often as asked; five of them are a divergence. `saved`: the
    step and the outliers of every checkpoint."""
    for name, value in (("BURN_IN", 6), ("MAX_OUTLIERS_AT_END", 1), ("MAX_OUTLIERS", 4)):
        monkeypatch.setattr(runs, name, value)
    make_batch, save, counted, saved = train.make_batch, Run.save, [], []

    def sick(times):
        counted.clear()

        def make(s, run_data, last_step, step, device, rollbacks=0, side=0):
            x, *others = make_batch(s, run_data, last_step, step, device, rollbacks, side)
            counted.extend([step] if step == 8 else [])
            return x * (1e3 if step >= 8 and len(counted) <= times else 1), *others
        monkeypatch.setattr(train, "make_batch", make)

    def watched(run):
        saved.append((run.step, run.outliers))
        save(run)

    monkeypatch.setattr(Run, "save", watched)
    sick.saved = saved
    return sick


def test_a_divergence_returns_to_the_checkpoint_and_ends_well(parts, diverges, capsys):
    diverges(1)
    argv = argv_for(parts, "--steps", "16", *STEADY)
    assert train.main([*argv, "--name", "whole"]) == 0
    out = capsys.readouterr().out
    assert "the training diverged at step 13 (loss " in out
    assert "back to step 6, and on with 1/2 of the learning rate" in out
    whole = checkpoint(parts, "whole")
    assert whole["rollbacks"] == 1 and whole["step"] == 16
    assert all(v.isfinite().all() for v in whole["model"].values())
    assert [step for step, _ in diverges.saved] == [0, 3, 6, 9, 12, 15, 16, 16]    # with threshold
    assert all(outliers == 0 for _, outliers in diverges.saved)
    rows = rows_of(run_of(parts, "whole") / "log.csv")
    assert [float(row["lr"]) for row in rows] == [1e-3, 1e-3] + [5e-4] * 4
    assert [row["rollbacks"] for row in rows] == ["0", "0"] + ["1"] * 4
    assert all(float(row["loss"]) < 3 for row in rows)                   # nothing of the sick steps


def test_bit_identical_when_resumed_after_a_divergence(parts, diverges, monkeypatch):
    argv = argv_for(parts, "--steps", "16", "--checkpoint-every", "3", "--grow", "")
    diverges(1)
    assert train.main([*argv, "--name", "whole"]) == 0
    score_epoch = train.score_epoch

    def interrupted(run, every):
        if run.rollbacks and run.step == 12:
            os.kill(os.getpid(), signal.SIGINT)
        score_epoch(run, every)

    monkeypatch.setattr(train, "score_epoch", interrupted)
    diverges(1)
    assert train.main([*argv, "--name", "broken"]) == 130
    monkeypatch.undo()
    assert checkpoint(parts, "broken")["step"] == 12
    assert train.main([*argv, "--name", "broken", "--resume"]) == 0
    whole, broken = (checkpoint(parts, name) for name in ("whole", "broken"))
    assert same(whole, broken) and whole["rollbacks"] == broken["rollbacks"] == 1


def test_three_returns_and_then_the_error(parts, diverges, capsys):
    diverges(9)
    argv = argv_for(parts, "--steps", "16", "--checkpoint-every", "3", "--name", "sick",
                    "--grow", "")
    refused(capsys, argv, "the training diverged at step 13", "after 3 returns to a checkpoint",
            "to 1/8 of the learning rate", "another --name", "with a lower --lr than 0.001")
    state = checkpoint(parts, "sick")
    assert state["step"] == 6 and state["outliers"] == 0


@pytest.mark.parametrize("changes, advice", [
    ({}, "a lower --lr than 1e-05 or --clip 1 or --attention-norm"),
    (dict(clip=1.0, attention_norm=True), "a lower --lr than 1e-05"),
    (dict(clip=1.0, attention_norm=True, muon=True), "a lower --lr than 1e-05 or --no-muon"),
    (dict(precision="bf16", clip=1.0), "1e-05 or --attention-norm or --precision float32")])
def test_the_error_names_only_what_is_not_set(changes, advice, tmp_path, monkeypatch):
    def diverge(run, *_):
        raise Diverged("the training diverged at step 8")

    monkeypatch.setattr(train, "train_steps", diverge)
    run = run_without_data(tmp_path, **changes)
    run.step, run.rollbacks = 7, train.MAX_ROLLBACKS
    with pytest.raises(InputError, match=f"^the training diverged at step 8, .*{advice}$"):
        train.train(run)
