"""Train TransFusion on a category, score it, and keep both in a run folder.

    python train.py                                     the embedded demo data
    python train.py --data mvtec --category cable       the paper

First the loop, then what it calls, then the commands. The equations are in transfusion.py, the
synthetic anomalies in perlin.py, the flags and presets in settings.py, what is read and kept in
runs.py, what is scored in evaluate.py.
"""
import argparse
import copy
import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import demo
import perlin
from evaluate import (draw_preview, in_words, network_calls, normal_scores, prepare, score,
                      synthetic_found, threshold, write_results)
from runs import (FORMAT, RANK, Source, build_model, keep_data, load_authors_weights,
                  load_checkpoint, load_model, load_source, load_state, load_torch, locked,
                  new_progress, read_json, refuse_other_data, refuse_other_run, run_folder,
                  save_atomically, save_checkpoint, save_csv, save_json, steps_per_epoch)
from settings import (NOT_COMPARED, SCORING, InputError, Settings, check, exit_status, parse,
                      progress_bar)
from transfusion import TransFusion

RANKS = int(os.environ.get("WORLD_SIZE", 1))      # torchrun's processes; only rank 0 writes

# A training has run away when more than MAX_OUTLIERS steps, less those that were not, lay
# OUTLIER_FACTOR times above the mean over the last WINDOW; at its end, more than
# MAX_OUTLIERS_AT_END. It goes back to a checkpoint MAX_ROLLBACKS times.
OUTLIER_FACTOR = {"loss": 3, "gradient": 10}
WINDOW, BURN_IN, MAX_OUTLIERS, MAX_OUTLIERS_AT_END, MAX_ROLLBACKS = 100, 20, 20, 3, 3


def train(model: TransFusion, s: Settings, source: Source, folder: Path,
          state: dict | None = None, eval_every: int = 0) -> tuple[TransFusion, dict, Callable]:
    """Train to the last step, from the start or from `state`, a checkpoint's content.

    A step whose loss or gradient is not finite changes nothing. A training that runs away goes back
    to its last checkpoint, with half the learning rate from there; what is sick is never saved.
    Returns the model to score, averaged where the settings say so, the progress record, and
    save(progress), which writes the checkpoint again with another record.
    Raises InputError where it runs away again after MAX_ROLLBACKS times, KeyboardInterrupt, with
    all saved, where it was asked to stop.
    """
    device, per_epoch = torch.device(s.device), steps_per_epoch(s, source)
    steps = s.steps or s.epochs * per_epoch
    optimizer, average = make_optimizer(model, s), make_average(model, s)
    progress = resume(state, model, optimizer, average, folder)
    announce(model, s, source, steps - progress["step"])
    if s.compile:
        model.net.compile()
    network = model if RANKS == 1 else DistributedDataParallel(
        model, find_unused_parameters=bool(s.drop_loss) or len(stages(model)) > 1)
    scored = average.module if average else model
    start = time.perf_counter() - progress["seconds"]
    due = False
    if not state:
        save_progress(folder, s, model, average, optimizer, progress)
    with Interruption() as interruption, progress_bar(
            total=steps, initial=progress["step"], desc=s.category, unit="step") as bar:
        while progress["step"] < steps:
            model.stage, place, length = find_stage(model, progress["step"], steps)
            if progress["running_mean"].get("stage") != model.stage:
                progress["running_mean"] = {"stage": model.stage}           # other losses
            rate = learning_rate(s, place, length, per_epoch) / 2 ** progress["rollbacks"]
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = make_batch(s, source, model.last_step, progress["step"], device)
            statistics = [buffer.clone() for buffer in model.buffers()]           # BatchNorm's
            torch.manual_seed((s.seed * 1_000_003 + progress["step"] * RANKS + RANK) % 2 ** 63)
            losses = network(*batch, drop=s.drop_loss)      # TransFusion.losses: Eq. 2-9
            optimizer.zero_grad()
            losses["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)
            found = mean_over_ranks({**losses, "gradient": norm})
            if all(map(math.isfinite, found.values())):
                optimizer.step()
                if average:
                    average.update_parameters(model)
            else:
                for buffer, before in zip(model.buffers(), statistics):
                    buffer.copy_(before)

            count_step(progress, found, time.perf_counter() - start)
            at_end = progress["step"] == steps
            if progress["outliers"] > (MAX_OUTLIERS_AT_END if at_end else MAX_OUTLIERS):
                progress = roll_back(progress, found, s, model, optimizer, average, folder)
                bar.update(progress["step"] - bar.n)
                due = False
                continue
            bar.update()
            if progress["step"] % per_epoch == 0 or at_end:
                close_epoch(progress, per_epoch, rate, bar)
                if at_end or not progress["outliers"]:
                    score_epoch(scored, s, source, folder, progress, eval_every)
            asked_to_stop = any_rank(interruption.asked, device)
            due = due or asked_to_stop or at_end or progress["step"] % s.checkpoint_every == 0
            if due and (at_end or not progress["outliers"]):           # else when it is well again
                save_progress(folder, s, model, average, optimizer, progress)
                due = False
                if asked_to_stop and not at_end:
                    raise KeyboardInterrupt(f"stopped at step {progress['step']} of {steps}; the "
                                            f"same command with --resume goes on from there")
    return scored, progress, partial(save_checkpoint, folder / "last.pt", s, model, average,
                                     optimizer)


# ---------------------------------------------------------------- a step

def make_batch(s: Settings, source: Source, last_step: int, step: int, device: torch.device):
    """Training batch number `step`: x, eps, M, M_a, t for `TransFusion.losses`.

    Depends on nothing but the settings, the data and the number, so a run that is resumed, or one
    on another device, sees the same batches. Fewer images than a batch are repeated to one. Of
    several ranks each takes every RANKS-th sample, half of them anomalous as in the whole; an
    epoch's last batch is filled up for that.
    """
    rng = np.random.default_rng([s.seed, step])
    epoch, place = divmod(step, steps_per_epoch(s, source))
    shuffled = np.random.default_rng([s.seed, 1 << 32, epoch])      # 1 << 32: no step's number
    shuffled = shuffled.permutation(source.train)
    shuffled = np.resize(shuffled, max(len(shuffled), s.batch))
    chosen = shuffled[place * s.batch:(place + 1) * s.batch]
    if RANKS > 1:
        chosen = np.resize(chosen, len(chosen) + -len(chosen) % (2 * RANKS))
    images, foreground = perlin.rotate_batch(source.images[chosen].to(device),
                                             source.foreground[chosen].to(device, torch.float32),
                                             s.rotation, rng, s.authors_rotation)
    if s.light:
        images = perlin.change_light(images, s.light, rng)
    t = torch.from_numpy(rng.integers(1, last_step + 1, len(chosen))).to(device)
    textures = source.textures.draw((len(chosen) + 1) // 2, rng).to(device)
    made = perlin.synthesize(images, foreground, textures, t == last_step, rng)
    batch = data.scale(images), data.scale(made.A) * made.M, made.M, made.M_a, t
    return tuple(part[RANK::RANKS] for part in batch)


def stages(model: TransFusion) -> tuple[float, ...]:
    """Shares of the training at which its stages end (see baselines): one, for TransFusion."""
    return getattr(model, "STAGES", (1.0,))


def find_stage(model: TransFusion, step: int, steps: int) -> tuple[int, int, int]:
    """The stage that a step of a training of `steps` is in, its place there, and its length."""
    ends = [0, *(round(share * steps) for share in stages(model))]
    stage = sum(step >= end for end in ends[1:-1])
    return stage, step - ends[stage], ends[stage + 1] - ends[stage]


def learning_rate(s: Settings, step: int, steps: int, per_epoch: int) -> float:
    """The learning rate of a step of `steps` in its stage: warm-up, then section 4.3's drop or a
    half cosine."""
    rate = s.lr * min(1.0, (step + 1) / (s.warmup + 1))
    if s.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * (0.1 if step // per_epoch >= s.lr_drop else 1.0)


def make_optimizer(model: TransFusion, s: Settings) -> torch.optim.AdamW:
    """AdamW (section 4.3)."""
    return torch.optim.AdamW(model.parameters(), s.lr, weight_decay=s.weight_decay, fused=True)


def make_average(model: TransFusion, s: Settings) -> AveragedModel | None:
    """The averaged copy of the model, where the settings want one."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(s.ema)) if s.ema else None


# ---------------------------------------------------------------- several processes

def mean_over_ranks(losses: dict[str, Tensor]) -> dict[str, float]:
    values = torch.stack([loss.detach() for loss in losses.values()])
    if RANKS > 1:
        distributed.all_reduce(values)
    return dict(zip(losses, (values / RANKS).tolist()))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on this rank or another."""
    if RANKS == 1:
        return flag
    up = torch.tensor(float(flag), device=device)
    distributed.all_reduce(up)
    return bool(up)


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
    distributed.init_process_group("nccl" if on_gpu else "gloo",
                                   timeout=timedelta(hours=12))     # ranks wait while rank 0 scores
    return s


# ---------------------------------------------------------------- the progress of a run

def resume(state: dict | None, model: TransFusion, optimizer, average, folder: Path) -> dict:
    """The progress record: new, or a checkpoint's, whose weights and moments are put in place."""
    if not state:
        return new_progress()
    load_state(model, state["model"], folder / "last.pt")
    optimizer.load_state_dict(state["optimizer"])
    if average:
        load_state(average.module, state["ema"], folder / "last.pt")
        average.n_averaged.fill_(state["step"])
    return {k: state[k] for k in new_progress()}


def count_step(progress: dict, found: dict[str, float], seconds: float) -> None:
    """Count a step, by its losses and its gradient's norm before clipping.

    "epoch_steps" keeps them for the log. "running_mean" is the mean of the last hundred steps or
    so, weighted towards the latest, and judged by from BURN_IN steps on; "outliers" counts the
    steps that are far above it, or not finite, less those that are not.
    """
    mean = progress["running_mean"]
    known = mean.get("steps", 0)
    outlier = not all(map(math.isfinite, found.values())) or known >= BURN_IN and any(
        found[k] > n * mean[k] for k, n in OUTLIER_FACTOR.items())
    progress["epoch_steps"].append(found)
    progress.update(step=progress["step"] + 1, seconds=seconds,
                    outliers=max(0, progress["outliers"] + (1 if outlier else -1)))
    if not outlier:
        known = min(known + 1, WINDOW)
        means = {k: (mean.get(k, 0.0) * (known - 1) + found[k]) / known for k in OUTLIER_FACTOR}
        progress["running_mean"] = {**mean, **means, "steps": known}


def roll_back(progress: dict, found: dict[str, float], s: Settings, model: TransFusion, optimizer,
              average, folder: Path) -> dict:
    """After a run-away: the last checkpoint put in place, to go on with half the learning rate.

    Returns its progress record. Raises InputError when this has been done MAX_ROLLBACKS times.
    """
    seen = ", ".join(f"{k} {found[k]:.3g}, usually {progress['running_mean'].get(k, math.nan):.3g}"
                     for k in OUTLIER_FACTOR)
    seen = f"the training ran away at step {progress['step']} ({seen})"
    if progress["rollbacks"] == MAX_ROLLBACKS:
        others = [f"a lower --lr than {s.lr:g}", "--clip 1" if not s.clip else "",
                  "--attention-norm" if not s.attention_norm else "",
                  "--precision float32" if s.precision == "bf16" else ""]
        raise InputError(f"{seen}, as it did {MAX_ROLLBACKS} times before, when it went back to a "
                         f"checkpoint and on with half the learning rate, the last time with "
                         f"1/{2 ** MAX_ROLLBACKS} of it; start again under another --name, with "
                         f"{' or '.join(filter(None, others))}")
    healthy = resume(load_checkpoint(folder / "last.pt")[1], model, optimizer, average, folder)
    healthy["rollbacks"] = progress["rollbacks"] + 1
    tqdm.write(f"  {seen}: back to step {healthy['step']}, and on with "
               f"1/{2 ** healthy['rollbacks']} of the learning rate")
    return healthy


def close_epoch(progress: dict, per_epoch: int, rate: float, bar: tqdm) -> None:
    """Turn the epoch's steps into a row of the log: mean losses, the largest gradient norm and the
    number of steps skipped."""
    steps = progress["epoch_steps"]
    finite = [found for found in steps if all(map(math.isfinite, found.values()))]
    means = {k: math.fsum(found[k] for found in finite) / len(finite) if finite else math.nan
             for k in steps[0] if k != "gradient"}
    progress["log"].append({"epoch": math.ceil(progress["step"] / per_epoch),
                            "step": progress["step"], **means,
                            "gradient": max((found["gradient"] for found in finite),
                                            default=math.nan),
                            "skipped": len(steps) - len(finite), "lr": rate,
                            "seconds": round(progress["seconds"], 1)})
    progress["epoch_steps"] = []
    bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()}, refresh=False)


def score_epoch(model: TransFusion, s: Settings, source: Source, folder: Path, progress: dict,
                eval_every: int) -> None:
    """--eval-every: score the test set where the epoch is due."""
    epoch = progress["log"][-1]["epoch"]
    if RANK == 0 and eval_every and epoch % eval_every == 0:
        prepare(model, s, source)
        found, *_ = score(model, s, source)
        model.train()
        progress["eval"].append({"epoch": epoch, "step": progress["step"], **found})
        save_csv(folder / "eval.csv", progress["eval"])


def save_progress(folder: Path, s: Settings, model, average, optimizer, progress: dict) -> None:
    if RANK == 0:
        if progress["log"]:
            save_csv(folder / "log.csv", progress["log"])
        save_checkpoint(folder / "last.pt", s, model, average, optimizer, progress)


class Interruption:
    """Turns the first Ctrl-C (or SIGTERM, or the terminal's end) into a flag, to stop between two
    steps. In another thread than the main one no signal arrives, and nothing is done."""

    def __enter__(self):
        self.asked, self.usual = False, {}
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)                        # ignored under nohup
            self.usual = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.usual.items():
            signal.signal(number, handler)


def announce(model: TransFusion, s: Settings, source: Source, steps: int) -> None:
    """Say what will run and, unless it is a few steps, how long by the measured time of one."""
    about = ""
    if steps > 20:                                             # on every rank: BatchNorm may sync
        about = f": about {duration(steps * seconds_per_step(model, s, source))}"
    if RANK:
        return
    for note in source.notes:
        print(f"  {note}")
    if not len(source.held_out):
        print("  nothing is held out: scores, but no threshold and no verdicts (--hold-out 0.1)")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"  {s.preset} preset: {steps} steps of {s.batch} images at {s.crop} px "
          f"({steps / steps_per_epoch(s, source):.0f} epochs), {parameters / 1e6:.1f} M "
          f"parameters, {s.device}, {s.precision}{about}", flush=True)


def seconds_per_step(model: TransFusion, s: Settings, source: Source) -> float:
    """Measured on three steps, of each stage, of a throw-away copy; the first is not counted."""
    model, device = copy.deepcopy(model), torch.device(s.device)
    optimizer = make_optimizer(model, s)
    seconds = begin = 0.0
    for model.stage, end in enumerate(stages(model)):
        times = []
        for step in range(3):
            batch = make_batch(s, source, model.last_step, step, device)
            optimizer.zero_grad()
            model.losses(*batch, drop=s.drop_loss)["loss"].backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter())
        seconds, begin = seconds + (end - begin) * (times[2] - times[0]) / 2, end
    return seconds


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# ---------------------------------------------------------------- commands

def train_category(s: Settings, flags: argparse.Namespace) -> dict:
    """Train and score one category, or skip it where that is done. Returns its metrics."""
    folder = run_folder(s)
    refuse_other_run(folder, s, flags.given, longer=flags.resume)
    if (folder / "data.json").exists():
        refuse_other_data(folder, data.find_category(s.data, s.category, data.root_folder(s.root)))
    if (folder / "metrics.json").exists():
        there, found = (read_json(folder / f"{name}.json") for name in ("config", "metrics"))
        if found.get("step") != 0 and (there["steps"], there["epochs"]) == (s.steps, s.epochs):
            print(f"{folder} is finished with these settings: skipped (--eval scores it again)")
            return found
    state = None
    if (folder / "last.pt").exists():
        begun, state = load_checkpoint(folder / "last.pt")
        if not state["optimizer"]:
            raise InputError(f"{folder} holds scored --weights; give this training a --name")
        if state["format"] < FORMAT:
            raise InputError(f"{folder / 'last.pt'} was begun by an earlier version, which alone "
                             f"can go on with it; start again with --name")
        if not flags.resume:
            raise InputError(f"{folder} holds an unfinished run: --resume goes on with it, --name "
                             f"NAME starts another")
        if begun.precision != s.precision:
            print(f"  goes on in {s.precision}; it was begun in {begun.precision}")
    elif flags.resume:
        print(f"{folder}: no checkpoint yet, starting from the beginning")

    print(f"{s.data} {s.category} -> {folder}")
    model = start_model(s, flags.weights)
    network_calls(model, s)                                # refused now, not after the training
    source = load_source(s, folder=folder)
    if state and (s.steps or s.epochs * steps_per_epoch(s, source)) < state["step"]:
        raise InputError(f"{folder} is {state['step']} steps long already; --resume goes on only "
                         f"to more")
    if flags.eval_every and not source.test:
        raise InputError(f"--eval-every {flags.eval_every}: {source.category.root} has no test "
                         f"images to score")
    with locked(folder):
        if RANK == 0:
            (folder / "metrics.json").unlink(missing_ok=True)        # of a shorter training
            save_json(folder / "config.json", dataclasses.asdict(s))
            if not (folder / "data.json").exists():
                keep_data(folder, source)
        model, progress, save = train(model, s, source, folder, state, flags.eval_every)
        if state and state["step"] == progress["step"] and "calibrated" in state:
            progress["calibrated"] = state["calibrated"]           # --calibrate's, of this model
        return {"category": s.category} if RANK else finish(model, s, source, folder, progress,
                                                            save)


def finish(model: TransFusion, s: Settings, source: Source, folder: Path, progress: dict,
           save: Callable) -> dict:
    """Give a trained model its threshold, `save` it with it, and score it, as far as there are
    images for that.

    Without defective ones the picture is a preview, of synthetic defects on held-out images.
    """
    prepare(model, s, source)
    normal = normal_scores(model, s, source)
    save({**progress, "normal": normal})
    image = threshold(normal, s) if normal else None
    if normal:
        print(f"  {in_words(normal, image)}")
    if source.test:
        found = write_results(folder, model, s, source, progress, normal)
    else:
        found = {"data": source.category.data, "category": s.category, "seed": s.seed,
                 "step": progress["step"], "threshold": image.value if normal else None,
                 "synthetic_found": synthetic_found(normal, image) if normal else None}
        save_json(folder / "metrics.json", found)
        print("  no test images: trained, but not scored")
    if normal and not any(item.label for item in source.category.test):
        save_atomically(folder / "preview.png",
                        lambda file: draw_preview(file, model, s, source))
        print(f"  no defective parts to test on; {folder / 'preview.png'} shows synthetic defects "
              f"on held-out images instead, a preview and no result")
    elif normal and not math.isnan(found["image_f1max"]):
        print(f"  at that threshold the test set's F1 is {100 * found['image_f1']:.1f} %; the best "
              f"threshold for this very test set would give {100 * found['image_f1max']:.1f} %")
        print(f"  the test set's defective images against the held-out normal ones: an AUROC of "
              f"{100 * found['image_auroc_held_out']:.1f} %")
    return found


def start_model(s: Settings, weights: str) -> TransFusion:
    """The model to train, on its device, with --weights where given. Raises InputError for weights
    that do not fit."""
    model = build_model(s)
    if weights and not isinstance(model, TransFusion):
        raise InputError(f"--weights {weights}: the authors' weights are TransFusion's")
    if weights:
        state = load_torch(Path(weights).expanduser())
        try:
            load_authors_weights(model, state)
        except ValueError as error:
            raise InputError(f"--weights {weights}: {error} (their network: --preset authors)")
    if s.device.startswith("cuda") and RANKS > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(s.device)


def score_again(s: Settings, flags: argparse.Namespace) -> dict:
    """--eval: score the model of a run folder, or of --weights, with this command's scoring."""
    folder = run_folder(s)
    if RANKS > 1:
        raise InputError("--eval: one process scores; start it without torchrun")
    if flags.weights:
        refuse_other_run(folder, s, flags.given)
        if (folder / "last.pt").exists() and load_checkpoint(folder / "last.pt")[1]["step"] > 0:
            raise InputError(f"{folder} holds a trained model; give the --weights a --name")
        model, progress, suffix = start_model(s, flags.weights), new_progress(), ""
    else:
        model, trained, progress = load_model(folder / "last.pt", torch.device(s.device))
        aside = {*SCORING, *NOT_COMPARED, "data", "category", "name"}
        changed = [k for k in sorted(flags.given - aside) if getattr(s, k) != getattr(trained, k)]
        if changed:
            raise InputError(f"--eval: {', '.join(changed)} cannot be changed after training")
        scoring = {k: getattr(s, k) for k in flags.given if k in SCORING}
        s = dataclasses.replace(trained, **scoring, data=s.data, root=s.root, out=s.out,
                                device=s.device, memory_gb=s.memory_gb, eval_batch=s.eval_batch)
        check(s)
        suffix = "".join(f"-{k}{getattr(s, k)}" for k in SCORING
                         if getattr(s, k) != getattr(trained, k))
        config = folder / "config.json"                      # of a longer training, perhaps
        begun = read_json(config) if config.exists() else dataclasses.asdict(trained)
        if "normal" not in progress or any(begun[k] != getattr(trained, k)
                                           for k in ("steps", "epochs")):
            suffix = f"-step{progress['step']}{suffix}"
    network_calls(model, s)
    source = load_source(s, training=False, folder=folder)
    for note in source.notes:
        if note.startswith("warning"):
            print(f"  {note}")
    if not source.test:
        raise InputError(f"{source.category.root}: no test images to score")
    with locked(folder):
        if "normal" not in progress:
            prepare(model, s, source)
        normal = normal_scores(model, s, source)
        if flags.weights:
            save_json(folder / "config.json", dataclasses.asdict(s))
            content = {**progress, "normal": normal}
            save_checkpoint(folder / "last.pt", s, model, None, None, content)
            keep_data(folder, source)
        return write_results(folder, model, s, source, progress, normal, suffix)


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


def find_categories(s: Settings) -> tuple[Settings, list[str]]:
    """The categories asked for, where they are found; the demo's are drawn first.

    Raises InputError where there are none, or where several are to share one folder of masks.
    """
    if s.data == "demo":
        s = dataclasses.replace(s, root=s.root or "data")
        if RANK == 0:
            demo.write(Path(s.root) / "demo", s.category)
    if RANKS > 1:
        distributed.barrier()
    known = data.list_categories(s.data, data.root_folder(s.root))
    if not s.category:
        raise InputError(f"--category: one of {', '.join(known)}, or all")
    if s.category != "all":
        return s, [s.category]
    if s.foreground not in ("auto", "none"):
        lacking = [name for name in known if not data.is_texture(s.data, name)
                   and not (Path(s.foreground) / name).is_dir()]
        if lacking:
            raise InputError(f"--foreground {s.foreground}: no folder {lacking[0]} in it (nor for "
                             f"{len(lacking) - 1} more); each category needs one of its own there")
    return s, known


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    s, flags = parse(argv)
    if RANKS > 1:
        s = join_ranks(s)
    s, names = find_categories(s)
    rows, failed = [], []
    for one in (dataclasses.replace(s, category=name) for name in names):
        try:
            rows.append(score_again(one, flags) if flags.eval else train_category(one, flags))
        except InputError as error:
            if len(names) == 1 or RANKS > 1:               # other ranks may have gone on
                raise
            print(f"error: {error}", file=sys.stderr)
            failed.append(one.category)
    if any("image_auroc" in row for row in rows):
        print_table(rows)
    if rows:
        print("\nresults are in " + ", ".join(str(run_folder(dataclasses.replace(s, category=name)))
                                              for name in names if name not in failed))
    if failed:
        raise InputError(f"{len(failed)} of {len(names)} categories failed, for the reasons above: "
                         f"{', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(main())
