"""Train TransFusion on a category, score it, and keep both in a run folder.

    python train.py                                     the embedded demo data
    python train.py --data mvtec --category cable       the paper

The loop and the commands. The equations are in transfusion.py, the synthetic anomalies in perlin.py,
the flags and presets in settings.py, what is read and kept in runs.py, evaluation in score.py.
"""
import argparse
import copy
import dataclasses
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import demo
import perlin
from data import InputError, exit_status
from runs import (Source, add_to_checkpoint, load_checkpoint, load_model, load_source, load_state,
                  load_torch, locked, read_json, refuse_other_run, run_folder, save_checkpoint,
                  save_csv, save_json, steps_per_epoch)
from score import in_words, normal_scores, score, thresholds, write_results
from settings import NOT_COMPARED, SCORING, Settings, build_model, check, check_steps, parse
from transfusion import TransFusion, load_authors_weights


# torchrun sets these: which of several processes this is. Rank 0 alone prints and writes.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ---------------------------------------------------------------- training

def make_batch(s: Settings, source: Source, last_step: int, step: int, device: torch.device):
    """Training batch number `step`: x, eps, M, M_a, t for `TransFusion.losses`.

    Depends on nothing but the settings, the data and the number, so a run that is resumed, or one
    on another device, sees the same batches. Of several ranks each takes every RANKS-th sample,
    half of them anomalous as in the whole.
    """
    rng = np.random.default_rng([s.seed, step])
    per_epoch = steps_per_epoch(s, source)
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([s.seed, 1 << 32, epoch]).permutation(source.train)
    chosen = np.resize(order, per_epoch * s.batch)[place * s.batch:(place + 1) * s.batch].tolist()
    images, foreground = perlin.rotate_batch(source.images[chosen].to(device),
                                             source.foreground[chosen].to(device, torch.float32),
                                             s.rotation, rng)
    if s.light:
        images = perlin.change_light(images, s.light, rng)
    t = torch.tensor(rng.integers(1, last_step + 1, s.batch).tolist(), device=device)
    textures = source.textures.draw((s.batch + 1) // 2, rng).to(device)
    made = perlin.synthesize(images, foreground, textures, t == last_step, rng)
    batch = perlin.scale(images), made.eps, made.M, made.M_a, t
    return tuple(part[RANK::RANKS] for part in batch)


def learning_rate(s: Settings, step: int, steps: int, per_epoch: int) -> float:
    """The learning rate of a step: warm-up, then section 4.3's drop or a half cosine."""
    rate = s.lr * min(1.0, (step + 1) / (s.warmup + 1))
    if s.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * (0.1 if step // per_epoch >= s.lr_drop else 1.0)


class TrainingPass(torch.nn.Module):
    """`TransFusion.losses` as a forward pass, which is what DistributedDataParallel can wrap."""

    def __init__(self, model: TransFusion, drop: str):
        super().__init__()
        self.model, self.drop = model, drop

    def forward(self, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.model.losses(*batch, drop=self.drop)


def training_pass(model: TransFusion, s: Settings) -> torch.nn.Module:
    """The losses of a batch as a module, its gradients averaged over the ranks if there are some."""
    if RANKS == 1:
        return TrainingPass(model, s.drop_loss)
    return DistributedDataParallel(TrainingPass(model, s.drop_loss),
                                   find_unused_parameters=bool(s.drop_loss))


def train_step(losses_of: torch.nn.Module, ema, optimizer, batch, s: Settings,
               rate: float) -> dict[str, float]:
    """One optimiser step; returns the losses by name."""
    losses = losses_of(*batch)
    optimizer.zero_grad()
    losses["loss"].backward()
    if s.clip:
        torch.nn.utils.clip_grad_norm_(losses_of.parameters(), s.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    optimizer.step()
    if ema:
        ema.update_parameters(getattr(losses_of, "module", losses_of).model)
    return dict(zip(losses, torch.stack(list(losses.values())).tolist()))


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    if RANKS == 1:
        return values
    total = torch.tensor(values, device=device)
    distributed.all_reduce(total)
    return (total / RANKS).tolist()


def check_finite(losses: dict[str, float]) -> None:
    if not math.isfinite(losses["loss"]):
        raise InputError(f"the loss is not finite ({losses}); start again under another --name "
                         f"with half the --lr, --clip 1 or --precision float32")


def make_optimizer(model: TransFusion, s: Settings):
    """AdamW (section 4.3), and the averaged copy of the model where the settings want one.

    The attention layers can have a learning rate of their own: nothing normalises their input, so
    at rates far above the paper's their logits grow past 1e8 within 200 steps and end in NaN.
    """
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[".attn." in name].append(parameter)
    optimizer = torch.optim.AdamW([{"params": groups[False], "factor": 1.0},
                                   {"params": groups[True], "factor": s.attention_lr}],
                                  s.lr, weight_decay=s.weight_decay, fused=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(s.ema)) if s.ema else None
    return optimizer, ema


def seconds_per_step(model: TransFusion, s: Settings, source: Source, device) -> float:
    """Measured on three steps of a throw-away copy, the first of them not counted."""
    model = copy.deepcopy(model)
    optimizer, ema = make_optimizer(model, s)
    for step in range(3):
        if step == 1:
            start = time.perf_counter()
        batch = make_batch(s, source, model.last_step, step, device)
        train_step(TrainingPass(model, s.drop_loss), ema, optimizer, batch, s, 0.0)
    return (time.perf_counter() - start) / 2


class Interruption:
    """Turns the first Ctrl-C (or SIGTERM) into a flag, to stop between two steps."""

    def __enter__(self):
        self.asked = False
        self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(model: TransFusion, s: Settings, source: Source, folder: Path, state: dict | None,
          eval_every: int = 0) -> tuple[TransFusion, dict]:
    """Train to the last step from `state` (a checkpoint's content) or from the start.

    Returns the model to score, averaged where the settings say so, and the progress record.
    """
    device = torch.device(s.device)
    per_epoch = steps_per_epoch(s, source)
    steps = s.steps or s.epochs * per_epoch
    optimizer, ema = make_optimizer(model, s)
    progress = {"step": 0, "seconds": 0.0, "sums": {}, "log": [], "eval": []}
    if state:
        load_state(model, state["model"], folder / "last.pt")
        optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.module.load_state_dict(state["ema"])
            ema.n_averaged.fill_(state["step"])
        progress = {k: state[k] for k in progress}
    seconds = seconds_per_step(model, s, source, device)       # on every rank: BatchNorm may sync
    if RANK == 0:
        announce(model, s, source, steps - progress["step"], per_epoch, seconds)
    if s.compile:
        model.net.compile()
    losses_of = training_pass(model, s)

    def checkpoint():
        if RANK:
            return
        if progress["log"]:
            save_csv(folder / "log.csv", progress["log"])
        save_checkpoint(folder / "last.pt", s, model, ema, optimizer, progress)

    start = time.perf_counter() - progress["seconds"]
    with Interruption() as interruption, tqdm(total=steps, initial=progress["step"],
                                              desc=s.category, unit="step", mininterval=0.5) as bar:
        while progress["step"] < steps:
            step = progress["step"]
            rate = learning_rate(s, step, steps, per_epoch)
            batch = make_batch(s, source, model.last_step, step, device)
            losses = train_step(losses_of, ema, optimizer, batch, s, rate)
            *means, asked = mean_over_ranks([*losses.values(), float(interruption.asked)], device)
            losses = dict(zip(losses, means))
            check_finite(losses)
            sums = progress["sums"]
            progress["sums"] = {k: sums.get(k, 0.0) + v for k, v in losses.items()}
            progress.update(step=step + 1, seconds=time.perf_counter() - start)
            bar.update()
            if (step + 1) % per_epoch == 0 or step + 1 == steps:
                close_epoch(progress, per_epoch, rate)
                row = progress["log"][-1]
                bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "n", "m", "a", "c")})
                if RANK == 0 and eval_every and row["epoch"] % eval_every == 0:
                    scored = ema.module if ema else model
                    found, *_ = score(scored, s, source)
                    model.train()
                    progress["eval"].append({"epoch": row["epoch"], "step": step + 1, **found})
                    save_csv(folder / "eval.csv", progress["eval"])
            if asked or (step + 1) % s.checkpoint_every == 0 or step + 1 == steps:
                checkpoint()
            if asked and step + 1 < steps:
                raise KeyboardInterrupt(f"stopped at step {step + 1} of {steps}; the same command "
                                        f"with --resume goes on from there")
    return (ema.module if ema else model), progress


def close_epoch(progress: dict, per_epoch: int, rate: float) -> None:
    done = (progress["step"] - 1) % per_epoch + 1
    progress["log"].append({"epoch": math.ceil(progress["step"] / per_epoch),
                            "step": progress["step"],
                            **{k: v / done for k, v in progress["sums"].items()},
                            "lr": rate, "seconds": round(progress["seconds"], 1)})
    progress["sums"] = {}


def announce(model, s: Settings, source: Source, steps: int, per_epoch: int,
             seconds: float) -> None:
    """Say what will run; seconds: measured time of a step."""
    for note in source.notes:
        print(f"  {note}")
    if not len(source.held_out):
        print("  nothing is held out: scores, but no threshold and no verdicts (--hold-out 0.1)")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"  {s.preset} preset: {steps} steps of {s.batch} images at {s.crop} px "
          f"({steps / per_epoch:.0f} epochs), {parameters / 1e6:.1f} M parameters, {s.device}, "
          f"{s.precision}: about {duration(steps * seconds)}", flush=True)


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# ---------------------------------------------------------------- commands

def run(s: Settings, flags: argparse.Namespace) -> dict:
    """Train and score one category, or skip it where that is done. Returns its metrics."""
    folder = run_folder(s)
    checkpoint, state = folder / "last.pt", None
    refuse_other_run(folder, s)
    if (folder / "metrics.json").exists():
        print(f"{folder} is finished with these settings: skipped (--eval scores it again)")
        return read_json(folder / "metrics.json")
    if checkpoint.exists() and not flags.resume:
        raise InputError(f"{folder} holds an unfinished run: --resume goes on with it, --name NAME "
                         f"starts another")
    if flags.resume and not checkpoint.exists():
        print(f"{folder}: no checkpoint yet, starting from the beginning")
    elif flags.resume:
        state = load_checkpoint(checkpoint)[1]

    print(f"{s.data} {s.category} -> {folder}")
    model = start_model(s, flags.weights)
    source = load_source(s)
    if flags.eval_every and not source.test:
        raise InputError(f"--eval-every {flags.eval_every}: {source.category.root} has no test "
                         f"images to score")
    with locked(folder):
        return train_and_score(model, s, source, folder, state, flags.eval_every)


def train_and_score(model: TransFusion, s: Settings, source: Source, folder: Path,
                    state: dict | None, eval_every: int) -> dict:
    checkpoint = folder / "last.pt"
    if RANK == 0:
        save_json(folder / "config.json", dataclasses.asdict(s))
    scored, progress = train(model, s, source, folder, state, eval_every)
    if RANK:
        return {"category": s.category}
    normal = normal_scores(scored, s, source)
    add_to_checkpoint(checkpoint, normal=normal)
    if normal:
        print(f"  {in_words(thresholds(normal, s)[0], len(normal['images']))}")
    if not source.test:
        print("  no test images: trained, but not scored")
        found = {"data": s.data, "category": s.category, "seed": s.seed, "step": progress["step"],
                 "threshold": thresholds(normal, s)[0].value if normal else None}
        save_json(folder / "metrics.json", found)
        return found
    found = write_results(folder, scored, s, source, progress, normal)
    if normal and not math.isnan(found["image_f1max"]):
        print(f"  at that threshold the test set's F1 is {100 * found['image_f1']:.1f} %; the best "
              f"threshold for this very test set would give {100 * found['image_f1max']:.1f} %")
        print(f"  the test set's defective images against the held-out normal ones: an AUROC of "
              f"{100 * found['image_auroc_held_out']:.1f} %")
    return found


def start_model(s: Settings, weights: str) -> TransFusion:
    model = build_model(s)
    if weights:
        state = load_torch(Path(weights))
        try:
            load_authors_weights(model, state)
        except ValueError as error:
            raise InputError(f"--weights {weights}: {error} (their network: --preset authors)")
    layout = torch.channels_last if s.device.startswith("cuda") else torch.contiguous_format
    if RANKS > 1 and s.device.startswith("cuda"):
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(s.device, memory_format=layout)


def evaluate(s: Settings, flags: argparse.Namespace) -> dict:
    """--eval: score the model of a run folder, or of --weights, with this command's scoring."""
    folder = run_folder(s)
    if RANKS > 1:
        raise InputError("--eval: one process scores; start it without torchrun")
    if flags.weights:
        refuse_other_run(folder, s)
        refuse_trained_run(folder)
        model, suffix = start_model(s, flags.weights), ""
        progress = {"step": 0, "seconds": 0.0, "sums": {}, "log": [], "eval": []}
    else:
        model, trained, progress = load_model(folder / "last.pt", torch.device(s.device))
        given = {k: getattr(s, k) for k in flags.given if k in SCORING}
        fixed = [k for k in flags.given if k not in SCORING and k not in NOT_COMPARED
                 and k not in ("data", "category", "name", "preset")
                 and getattr(s, k) != getattr(trained, k)]
        if fixed:
            raise InputError(f"--eval: {', '.join(fixed)} cannot be changed after training")
        used = dataclasses.replace(trained, **given, data=s.data, root=s.root, out=s.out,
                                   device=s.device, memory_gb=s.memory_gb,
                                   eval_batch=s.eval_batch)
        check(used)
        check_steps(used)
        suffix = "".join(f"-{k}{getattr(used, k)}" for k in SCORING
                         if getattr(used, k) != getattr(trained, k))
        if "normal" not in progress:                   # written when the training is over
            suffix = f"-step{progress['step']}{suffix}"
        s = used
    source = load_source(s, training=False)
    if not source.test:
        raise InputError(f"{source.category.root}: no test images to score")
    with locked(folder):
        normal = normal_scores(model, s, source)
        if flags.weights:
            save_json(folder / "config.json", dataclasses.asdict(s))
            save_checkpoint(folder / "last.pt", s, model, None, None, progress)
            add_to_checkpoint(folder / "last.pt", normal=normal)
        return write_results(folder, model, s, source, progress, normal, suffix)


def refuse_trained_run(folder: Path) -> None:
    """Raise InputError if the folder holds a trained model, which --weights would replace."""
    if (folder / "last.pt").exists() and load_checkpoint(folder / "last.pt")[1]["step"] > 0:
        raise InputError(f"{folder} holds a trained model; give the --weights a --name")


def print_table(rows: list[dict]) -> None:
    columns = {"image_auroc": "image AUROC", "aupro": "AUPRO", "pixel_auroc": "pixel AUROC",
               "pixel_ap": "pixel AP", "false_alarm_rate": "false alarms",
               "detection_rate": "detected"}

    def cell(value) -> str:
        return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"

    print("\n" + f"{'%':<14}" + "".join(f"{title:>13}" for title in columns.values()))
    for row in rows:
        print(f"{row['category']:<14}" + "".join(f"{cell(row.get(k)):>13}" for k in columns))
    if len(rows) > 1:
        means = {k: [row[k] for row in rows if cell(row.get(k)) != "-"] for k in columns}
        print(f"{'mean of ' + str(len(rows)):<14}"
              + "".join(f"{cell(np.mean(v) if v else None):>13}" for v in means.values()))


def join_ranks(s: Settings) -> Settings:
    """Meet the other processes that torchrun started, each on a device of its own.

    Raises InputError for a batch that the ranks cannot share evenly, half of it anomalous.
    """
    if s.batch % (2 * RANKS):
        raise InputError(f"--batch {s.batch}: {RANKS} processes share it evenly, half of it "
                         f"anomalous, only if it is a multiple of {2 * RANKS}")
    on_gpu = s.device.startswith("cuda")
    if on_gpu:
        s = dataclasses.replace(s, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(s.device)
    if not distributed.is_initialized():                   # ranks wait while rank 0 scores
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=12))
    return s


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    return exit_status(lambda: command(*parse(argv)))


def command(s: Settings, flags: argparse.Namespace) -> None:
    """Train or score the category asked for, or all of them, and print the table."""
    if RANKS > 1:
        s = join_ranks(s)
    if s.data == "demo":
        s = dataclasses.replace(s, root=s.root or "data")
        if RANK == 0:
            demo.write(Path(s.root) / "demo", s.category)
    if RANKS > 1:
        distributed.barrier()
    known = data.list_categories(s.data, data.root_folder(s.root))
    if not s.category:
        raise InputError(f"--category: one of {', '.join(known)}, or all")
    names = known if s.category == "all" else [s.category]
    work = evaluate if flags.eval else run
    rows = [work(dataclasses.replace(s, category=name), flags) for name in names]
    print_table(rows)
    print("\nresults are in "
          + ", ".join(str(run_folder(dataclasses.replace(s, category=name))) for name in names))


if __name__ == "__main__":
    sys.exit(main())
