"""Train TransFusion on a category, score it, and keep both in a run folder.

    python train.py                                     the embedded demo data
    python train.py --data mvtec --category cable       the paper

First the loop, then what it calls, then the command. The flags and presets are in settings.py, the
run and its checkpoint in runs.py, the scores in evaluate.py.
"""
import argparse
import contextlib
import dataclasses
import math
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch.nn.parallel import DistributedDataParallel

import perlin
from baselines import METHODS
from data import (RunData, find_categories, load_run_data, refuse_other_data, save_data_record,
                  scale)
from evaluate import finish, network_calls, score_epoch
from runs import (Diverged, Run, build_model, load_checkpoint, new_run,
                  refuse_other_settings, resumed_settings, run_folder, saved_settings)
from settings import Settings, check, growing_sides, parse
from support import ranks
from support.console import InputError, StepBar, StopRequest, exit_status, progress_bar
from support.files import locked_folder, read_json, save_json
from support.layouts import find_category, root_folder
from support.report import print_next_steps, print_table

MAX_ROLLBACKS = 3                       # returns to a checkpoint, after which the training fails


def train(run: Run, eval_every: int = 0) -> None:
    """Train to the last step. A training that diverges returns to its last checkpoint.

    From there it continues with half the learning rate and with other batches, so that a single
    bad batch does not end it. A diverging model is never saved. Raises InputError where it diverges
    again after MAX_ROLLBACKS returns, and KeyboardInterrupt, with all saved, where asked to stop.
    """
    if run.step == 0:
        run.save()
    with StopRequest() as stop, progress_bar(kind=StepBar, total=run.total_steps, initial=run.step,
                                             desc=run.settings.category, unit="step") as bar:
        costs = [image_side(run.settings, step, run.total_steps) ** 1.5      # about, on CPUs
                 for step in range(run.step, run.total_steps)]
        bar.work = sum(costs) / costs[0] if costs else None
        while True:
            try:
                train_steps(run, stop, bar, eval_every)
                break
            except Diverged as error:
                if run.rollbacks == MAX_ROLLBACKS:
                    raise InputError(f"{error}, after {MAX_ROLLBACKS} returns to a checkpoint; "
                                     f"{advice_after_divergence(run.settings)}")
                seconds, rollbacks = run.seconds, run.rollbacks + 1
                run.load()
                run.seconds, run.rollbacks = seconds, rollbacks
                bar.write(f"  {error}: back to step {run.step}, and on with 1/{2 ** rollbacks} of "
                          f"the learning rate")
                bar.update(run.step - bar.n)
    if run.step < run.total_steps:
        raise KeyboardInterrupt(f"stopped at step {run.step} of {run.total_steps}; the same "
                                f"command with --resume continues from there")


def train_steps(run: Run, stop: StopRequest, bar, eval_every: int = 0) -> None:
    """Train until the last step, or save and return when asked to stop.

    Nothing is saved while recent steps are outliers. Raises Diverged: then the run has to return to
    its last checkpoint.
    """
    s, model, device = run.settings, run.model, torch.device(run.settings.device)
    network = model if ranks.COUNT == 1 else DistributedDataParallel(
        model, find_unused_parameters=bool(s.drop_loss) or len(model.STAGES) > 1)
    start = perf_counter() - run.seconds
    while run.step < run.total_steps:
        model.stage, stage_step, stage_steps = find_stage(model.STAGES, run.step, run.total_steps)
        side = image_side(s, run.step, run.total_steps)
        if [run.running_mean.get(key) for key in ("stage", "side")] != [model.stage, side]:
            run.running_mean = {"stage": model.stage, "side": side}     # each with its own losses
        rate = learning_rate(s, stage_step, stage_steps, run.steps_per_epoch, run.rollbacks)
        run.optimizer.param_groups[0]["lr"] = rate
        batch = make_batch(s, run.data, model.last_step, run.step, device, run.rollbacks, side)
        torch.manual_seed((s.seed * 1_000_003 + run.step * ranks.COUNT + ranks.RANK) % 2 ** 63)
        losses = network(*batch, drop=s.drop_loss)          # TransFusion.losses: Eq. 2-9
        run.optimizer.zero_grad()
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)
        run.record({**losses, "gradient": norm})            # raises Diverged
        run.optimizer.step()
        if run.average:
            run.average.update_parameters(model)
        run.step, run.seconds = run.step + 1, perf_counter() - start
        bar.advance()
        finished = run.step == run.total_steps
        if finished or run.step % run.steps_per_epoch == 0:
            bar.set_postfix(run.close_epoch(rate), refresh=False)
            score_epoch(run, eval_every)
        asked = ranks.any_rank(stop.asked, device)
        if finished or (not run.outliers and (asked or run.is_checkpoint_due)):
            run.save()
            if asked:
                return


# ---------------------------------------------------------------- a step

def make_batch(s: Settings, run_data: RunData, last_step: int, step: int, device: torch.device,
               rollbacks: int = 0, side: int = 0):
    """Training batch number `step`: x, eps, M, M_a, t for `TransFusion.losses`.

    It depends on nothing but its arguments, so a resumed run, or one on another device, sees the
    same batches. A data set smaller than a batch is repeated until it fills one. side: of the
    images in pixels; 0: s.crop. Each of several ranks takes every COUNT-th sample, with the same
    share of anomalous ones as the whole; an epoch's last batch is filled up for that.
    """
    again = [rollbacks] if rollbacks else []
    rng = np.random.default_rng([s.seed, step, *again])
    epoch, step_in_epoch = divmod(step, run_data.steps_per_epoch(s.batch))
    shuffle = np.random.default_rng([s.seed, 1 << 32, epoch, *again])    # 1 << 32: no step's number
    shuffled = shuffle.permutation(run_data.train_indices)
    shuffled = np.resize(shuffled, max(len(shuffled), s.batch))
    chosen = shuffled[step_in_epoch * s.batch:(step_in_epoch + 1) * s.batch]
    if ranks.COUNT > 1:
        chosen = np.resize(chosen, len(chosen) + -len(chosen) % (2 * ranks.COUNT))
    images, foreground = perlin.rotate_batch(run_data.images[chosen].to(device),
                                             run_data.foreground[chosen].to(device, torch.float32),
                                             s.rotation, rng, s.authors_rotation)
    if s.light:
        images = perlin.change_light(images, s.light, rng)
    t = torch.from_numpy(rng.integers(1, last_step + 1, len(chosen))).to(device)
    textures = run_data.textures.draw(math.ceil(s.anomalous * len(chosen) - 1e-9), rng).to(device)
    if side not in (0, s.crop):
        images, textures = (TF.resize(part, [side, side]) for part in (images, textures))
        foreground = TF.resize(foreground, [side, side], TF.InterpolationMode.NEAREST_EXACT)
    anomalies = perlin.synthesize(images, foreground, textures, t == last_step, rng)
    batch = (scale(images), scale(anomalies.A) * anomalies.M, anomalies.M, anomalies.M_a, t)
    return tuple(part[ranks.RANK::ranks.COUNT] for part in batch)


def image_side(s: Settings, step: int, steps: int) -> int:
    """The side in pixels of the images at a step of `steps`: --grow's, then the crop."""
    return next((side for side, share in growing_sides(s) if step < share * steps), s.crop)


def find_stage(stages: tuple[float, ...], step: int, steps: int) -> tuple[int, int, int]:
    """The stage of a step in a training of `steps`, the step's number in it, and its length.

    stages: the shares of the training at which its stages end (`Method.STAGES`).
    """
    ends = [0, *(round(share * steps) for share in stages)]
    stage = sum(step >= end for end in ends[1:-1])
    return stage, step - ends[stage], ends[stage + 1] - ends[stage]


def learning_rate(s: Settings, step: int, steps: int, per_epoch: int, rollbacks: int = 0) -> float:
    """The learning rate of a step of `steps` in its stage: warm-up, then section 4.3's drop or a
    half cosine. Each rollback halves it."""
    rate = s.lr / 2 ** rollbacks * min(1.0, (step + 1) / (s.warmup + 1))
    if s.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * (0.1 if step // per_epoch >= s.lr_drop else 1.0)


def advice_after_divergence(s: Settings) -> str:
    """What to change where a training diverges again and again: only what is not set already."""
    changes = [f"a lower --lr than {s.lr:g}", "--clip 1" if not s.clip else "",
               "--attention-norm" if not s.attention_norm else "", "--no-muon" if s.muon else "",
               "--precision float32" if s.precision == "bf16" else ""]
    return (f"the last of them to 1/{2 ** MAX_ROLLBACKS} of the learning rate; start again under "
            f"another --name, with {' or '.join(filter(None, changes))}")


def announce(run: Run) -> None:
    """Print what will be trained, on what, and where."""
    s, steps = run.settings, run.total_steps
    for note in run.data.notes:
        print(f"  {note}")
    if not len(run.data.held_out):
        print("  nothing is held out: scores, but no threshold and no verdicts (--hold-out 0.1)")
    parameters = sum(p.numel() for p in run.model.parameters())
    rest = f"{steps - run.step} of " if run.step else ""
    sides = "".join(f"{side} px until step {round(share * steps)}, then "
                    for side, share in growing_sides(s))
    length = (f"{rest}{steps} steps of {s.batch} images at {sides}{s.crop} px "
              f"({steps / run.steps_per_epoch:.0f} epochs)") if run.model.TRAINS else \
        f"no training, one pass over the images at {s.crop} px"
    print(f"  {s.preset} preset: {length}, {parameters / 1e6:.1f} M parameters, {s.device}, "
          f"{s.precision}", flush=True)


# ---------------------------------------------------------------- the command

def train_category(s: Settings, flags: argparse.Namespace) -> dict:
    """Train and score one category, or skip it where that is done. Returns its metrics.

    flags: `resume`, `eval_every` and `typed` of settings.parse. Raises InputError.
    """
    folder = run_folder(s)
    saved = saved_settings(folder)
    if saved and flags.resume:
        s = resumed_settings(folder, s, flags.typed)
    elif saved:
        refuse_other_settings(folder, s, flags.typed)
    check(s)
    if (folder / "data.json").exists():
        refuse_other_data(folder, find_category(s.data, s.category, root_folder(s.root)))
    if (folder / "metrics.json").exists():
        metrics = read_json(folder / "metrics.json")
        same_length = saved and (saved.steps, saved.epochs) == (s.steps, s.epochs)
        imported = metrics.get("step") == 0 and METHODS[s.method].trains     # scored, not trained
        if same_length and not imported:
            print(f"{folder} is finished with these settings: skipped (python evaluate.py {folder} "
                  f"scores it again)")
            return metrics
    unfinished = (folder / "last.pt").exists()
    if unfinished and load_checkpoint(folder / "last.pt")[1]["format"] < 4:      # another layout
        raise InputError(f"{folder / 'last.pt'} was begun by an earlier version, which alone can "
                         f"continue it; start again with --name")
    if unfinished and not flags.resume:
        raise InputError(f"{folder} holds an unfinished run: --resume continues it, --name NAME "
                         f"starts another")
    if flags.resume and not unfinished:
        print(f"{folder}: no checkpoint yet, starting from the beginning")

    print(f"{s.data} {s.category} -> {folder}")
    model = build_model(s)
    network_calls(model, s)                                # refused now, not after the training
    if not unfinished:
        model.before_training()
    run = new_run(folder, s, load_run_data(s, folder=folder), model)
    if unfinished:
        run.load()
    if run.total_steps < run.step:
        raise InputError(f"{folder} is {run.step} steps long already; --resume only makes it "
                         f"longer")
    if flags.eval_every and not run.data.test:
        raise InputError(f"--eval-every {flags.eval_every}: {run.data.category.root} has no test "
                         f"images to score")
    with contextlib.nullcontext() if ranks.RANK else locked_folder(folder):
        if not ranks.RANK:
            (folder / "metrics.json").unlink(missing_ok=True)        # of a shorter training
            save_json(folder / "config.json", dataclasses.asdict(s))
            save_data_record(folder, run.data)
        announce(run)
        if s.compile:
            model.net.compile()
        if model.TRAINS:
            train(run, flags.eval_every)
        return {"category": s.category} if ranks.RANK else finish(run)


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    ranks.silence_others()
    if ranks.NOTE:
        print(ranks.NOTE)
    s, flags = parse(argv)
    s, names = find_categories(dataclasses.replace(s, device=ranks.join(s.device, s.batch)))
    rows, trained, failed = [], [], []
    for one in (dataclasses.replace(s, category=name) for name in names):
        try:
            rows.append(train_category(one, flags))
            trained.append(run_folder(one))
        except InputError as error:
            if len(names) == 1 or ranks.COUNT > 1:         # other ranks are further, perhaps
                raise
            print(f"error: {error}", file=sys.stderr)
            failed.append(one.category)
    if any("image_auroc" in row for row in rows):
        print_table(rows)
    if trained and not ranks.RANK:
        print_next_steps(trained, Path(read_json(trained[0] / "data.json")["root"]))
    if failed:
        raise InputError(f"{len(failed)} of {len(names)} categories failed, for the reasons above: "
                         f"{', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(main())
