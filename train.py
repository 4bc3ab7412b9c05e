"""Train TransFusion on a category, score it, and keep both in a run folder.

    python train.py                                     the embedded demo data
    python train.py --data mvtec --category cable       the paper

The command line, the presets, the loop, evaluation and checkpoints; the equations are in
transfusion.py, the synthetic anomalies in perlin.py.
"""
import argparse
import copy
import csv
import dataclasses
import io
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import demo
import metrics
import perlin
from data import InputError
from transfusion import TransFusion, anomaly_score, final_mask, load_authors_weights

FORMAT = 1                                          # version of the checkpoint's layout


def setting(default, help: str, group: str, choices=None):
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on; the defaults are the paper's. Each field is a flag."""
    data: str = setting("demo", "mvtec, visa, btad, demo, or a folder of categories", "run")
    category: str = setting("", "the category, or all (demo: fabric)", "run")
    root: str = setting("", "where the data sets lie (default: $TRANSFUSION_DATA or ./data)", "run")
    out: str = setting("runs", "where run folders go", "run")
    name: str = setting("", "suffix of the run folder, to keep several runs of a category", "run")
    preset: str = setting("", "settings taken together; flags override it", "run",
                          ("paper", "authors", "cpu", "quick"))
    device: str = setting("auto", "cpu, cuda, cuda:1 ...", "run")
    seed: int = setting(0, "seed of everything random", "run")
    memory_gb: float = setting(4.0, "images beyond this are read from disk at every use", "run")

    resize: int = setting(256, "images are resized to this side, in pixels", "training")
    crop: int = setting(224, "then cropped to this centre", "training")
    foreground: str = setting("auto", "where anomalies are put: auto, none or a folder of masks",
                              "training")
    rotation: float = setting(90.0, "rotation augmentation, degrees to either side", "training")
    channels: int = setting(64, "width of the network at full resolution", "training")
    batch: int = setting(8, "images a step, half of them made anomalous", "training")
    epochs: int = setting(1500, "passes over the training images", "training")
    steps: int = setting(0, "optimiser steps; instead of --epochs if not 0", "training")
    init: str = setting("default", "initial weights: torch's, or those that return the input",
                        "training", ("default", "identity"))
    lr: float = setting(1e-5, "AdamW's learning rate", "training")
    attention_lr: float = setting(1.0, "factor on the learning rate of the attention layers",
                                  "training")
    lr_schedule: str = setting("step", "step: x0.1 after --lr-drop epochs; cosine: to 0 at the end",
                               "training", ("step", "cosine"))
    lr_drop: int = setting(800, "epoch of the step schedule's drop", "training")
    warmup: int = setting(0, "steps of linear warm-up", "training")
    weight_decay: float = setting(0.01, "AdamW's weight decay", "training")
    clip: float = setting(0.0, "bound on the gradient's norm; 0 for none", "training")
    ema: float = setting(0.0, "decay of the weights' average, which is scored; 0 for none",
                         "training")
    precision: str = setting("auto", "of the network; auto: bf16 where it is fast", "training",
                             ("auto", "bf16", "float32"))
    hold_out: float = setting(0.0, "share of normal images kept for the threshold", "training")
    checkpoint_every: int = setting(1000, "steps between checkpoints", "training")

    T: int = setting(20, "steps of the transparency process", "method")
    schedule: str = setting("linear", "how the opacity grows with t", "method",
                            ("linear", "quadratic", "root"))
    pe: str = setting("2d", "positional encoding; --no-pe for none", "method",
                      ("2d", "row", "none"))
    sim_mask: bool = setting(True, "the guide: the network sees the previous mask", "method")
    drop_loss: str = setting("", "leave out losses, letters of nmac (Eq. 5-8)", "method")
    authors_schedule: bool = setting(False, "T values of beta, restoration from T - 2", "method")
    anomaly_target: str = setting("eps", "what the anomaly head predicts", "method",
                                  ("eps", "beta_eps"))
    soft_consistency: bool = setting(True, "Eq. 8 on the soft mask, not the binary one", "method")

    infer_steps: int = setting(0, "network calls a restoration; 0: all of the schedule's",
                               "scoring")
    lam: float = setting(0.95, "weight of M_disc in Eq. 10", "scoring")
    kernel: int = setting(7, "side of Eq. 10's mean filter, pixels", "scoring")
    final_mask: str = setting("combined", "which map is scored", "scoring",
                              ("combined", "disc", "recon", "last"))
    false_alarms: float = setting(0.05, "false-alarm rate the threshold aims at", "scoring")
    eval_batch: int = setting(16, "images restored at a time", "scoring")


PRESETS = {
    "paper": {},
    "authors": dict(crop=256, rotation=20.0, pe="row", authors_schedule=True,
                    anomaly_target="beta_eps", soft_consistency=False),
    "cpu": dict(resize=128, crop=128, channels=16, init="identity", steps=2400, lr=1e-3,
                attention_lr=0.1, lr_schedule="cosine", warmup=100, clip=1.0, ema=0.995,
                hold_out=0.1, checkpoint_every=200),
    "quick": dict(resize=96, crop=96, rotation=10.0, channels=16, init="identity", steps=800,
                  lr=1e-3, attention_lr=0.1, lr_schedule="cosine", warmup=50, clip=1.0, ema=0.99,
                  hold_out=0.1, checkpoint_every=200),
}
# What does not change a run's numbers, so a finished run stays the same run under other values.
NOT_COMPARED = {"root", "out", "device", "memory_gb", "eval_batch", "checkpoint_every"}
SCORING = [f.name for f in dataclasses.fields(Settings)
           if f.metadata["group"] == "scoring" and f.name != "eval_batch"]


# ---------------------------------------------------------------- settings and command line

def parse(argv: list[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """Settings of the command line, and the flags that say what to do with them.

    Raises InputError; argparse's own errors exit with status 2.
    """
    presets = "\n".join(f"  {name}: " + (", ".join(f"{k} {v}" for k, v in changes.items())
                                         or "the values above") for name, changes in PRESETS.items())
    parser = argparse.ArgumentParser(
        description="Train and score TransFusion.", argument_default=argparse.SUPPRESS,
        epilog=f"presets, where they differ from the paper:\n{presets}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {name: parser.add_argument_group(name)
              for name in ("run", "training", "method", "scoring")}
    for f in dataclasses.fields(Settings):
        meta, flag = f.metadata, "--" + f.name.replace("_", "-")
        source = "default" if meta["group"] == "run" else "paper"
        shown = f"{meta['help']} ({source}: {f.default})" if f.default != "" else meta["help"]
        if f.type is bool:
            groups[meta["group"]].add_argument(flag, action=argparse.BooleanOptionalAction,
                                               help=shown)
        else:
            groups[meta["group"]].add_argument(flag, type=f.type, choices=meta["choices"],
                                               help=shown, metavar=None if meta["choices"] else
                                               f.type.__name__.upper())
    groups["method"].add_argument("--no-pe", dest="pe", action="store_const", const="none",
                                  help="take the positional encoding out")
    does = parser.add_argument_group("what to do")
    does.add_argument("--eval", action="store_true", default=False,
                      help="score the run's model again instead of training")
    does.add_argument("--eval-every", type=int, default=0, metavar="N",
                      help="also score every N epochs, to eval.csv")
    does.add_argument("--resume", action="store_true", default=False,
                      help="go on with the run where its last checkpoint stands")
    does.add_argument("--weights", default="", metavar="FILE",
                      help="start from a state dict in the authors' format")
    given = vars(parser.parse_args(argv))
    flags = argparse.Namespace(**{k: given.pop(k)
                                  for k in ("eval", "eval_every", "resume", "weights")})
    flags.given = set(given)
    device = pick_device(given.get("device", "auto"))
    preset = given.get("preset") or default_preset(given.get("data", "demo"), device)
    if given.get("data", "demo") == "demo":
        given.setdefault("category", "fabric")
    settings = Settings(**{**PRESETS[preset], **given, "preset": preset, "device": str(device)})
    if settings.precision == "auto":
        settings = dataclasses.replace(settings,
                                       precision="bf16" if fast_bf16(device) else "float32")
    check(settings)
    return settings, flags


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine has no CUDA device; use --device cpu")
    return device


def default_preset(name: str, device: torch.device) -> str:
    if name == "demo":
        return "quick"
    if device.type == "cuda":
        return "paper"
    print("no GPU: taking the cpu preset (--preset paper insists)")
    return "cpu"


def check(s: Settings) -> None:
    """Refuse settings that cannot work. Raises InputError."""
    for name in ("resize", "crop"):
        value = getattr(s, name)
        if value < 16 or value % 8:
            raise InputError(f"--{name} {value}: must be a multiple of 8, at least 16; "
                             f"the nearest is {max(16, round(value / 8) * 8)}")
    if s.crop > s.resize:
        raise InputError(f"--crop {s.crop} is larger than --resize {s.resize}")
    for name, low in (("batch", 2), ("epochs", 1), ("steps", 0), ("lr", 0), ("attention_lr", 0),
                      ("T", 1), ("warmup", 0), ("eval_batch", 1), ("infer_steps", 0),
                      ("checkpoint_every", 1), ("clip", 0), ("seed", 0)):
        if not getattr(s, name) >= low:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: "
                             f"must be at least {low}")
    for name, high in (("lam", 1), ("hold_out", 0.9), ("ema", 1), ("false_alarms", 1)):
        if not 0 <= getattr(s, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: "
                             f"must lie in 0..{high}")
    if s.channels < 8 or s.channels % 8:
        raise InputError(f"--channels {s.channels}: must be a multiple of 8")
    if s.kernel < 1 or s.kernel % 2 == 0:
        raise InputError(f"--kernel {s.kernel}: must be odd and positive")
    if set(s.drop_loss) - set("nmac") or len(set(s.drop_loss)) == 4:
        raise InputError(f"--drop-loss {s.drop_loss}: up to three letters of nmac")
    try:
        build_model(dataclasses.replace(s, channels=8)).steps(s.infer_steps)
    except ValueError as error:
        raise InputError(f"--T {s.T} --infer-steps {s.infer_steps}: {error}")


# ---------------------------------------------------------------- the model and its checkpoints

def fast_bf16(device: torch.device) -> bool:
    """Whether this processor multiplies in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def build_model(s: Settings) -> TransFusion:
    """The model of these settings, seeded, on the CPU."""
    torch.manual_seed(s.seed)
    model = TransFusion(s.channels, s.T, s.schedule, s.pe, s.sim_mask, s.authors_schedule,
                        s.anomaly_target, s.soft_consistency, bf16=s.precision == "bf16")
    if s.init == "identity":
        model.net.start_from_identity()
    return model


def save_atomically(path: Path, write) -> None:
    """write(file) into a neighbour of `path`, then rename: `path` is whole, old or new.

    Raises InputError when the disk does not take it; the neighbour is removed.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        cause = (isinstance(error, RuntimeError) and error.__context__) or error
        raise InputError(f"{path}: cannot be written ({cause}); make room and use --resume")


def save_json(path: Path, content: dict) -> None:
    text = json.dumps({k: None if isinstance(v, float) and math.isnan(v) else v
                       for k, v in content.items()}, indent=2)
    save_atomically(path, lambda file: file.write(text.encode() + b"\n"))


def save_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    save_atomically(path, lambda file: file.write(text.getvalue().encode()))


def load_torch(path: Path) -> dict:
    """torch.load of plain types and tensors only. Raises InputError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist")
    except Exception as error:
        first = str(error).split("\n")[0][:120]
        raise InputError(f"{path} is not a checkpoint ({type(error).__name__}: {first})")


def save_checkpoint(path: Path, s: Settings, model: TransFusion, ema, optimizer, progress: dict):
    state = {"format": FORMAT, "settings": dataclasses.asdict(s), "model": model.state_dict(),
             "ema": ema.module.state_dict() if ema else None,
             "optimizer": optimizer.state_dict() if optimizer else None, **progress}
    save_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> tuple[Settings, dict]:
    """Settings and content of a checkpoint of ours. Raises InputError that says what it is not."""
    state = load_torch(path)
    if not isinstance(state, dict) or "format" not in state or "settings" not in state:
        raise InputError(f"{path} is not a checkpoint of train.py; the authors' go to --weights")
    if state["format"] > FORMAT:
        raise InputError(f"{path} was written by a newer version (format {state['format']}, this "
                         f"one reads up to {FORMAT}); update the code")
    known = {f.name for f in dataclasses.fields(Settings)}
    return Settings(**{k: v for k, v in state["settings"].items() if k in known}), state


def load_state(model: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise InputError(f"{path} holds another architecture: {first[:160]}")


def load_model(path: Path, device: torch.device) -> tuple[TransFusion, Settings, dict]:
    """The trained model of a checkpoint (its averaged weights where it has them), to be used."""
    s, state = load_checkpoint(path)
    model = build_model(s)
    load_state(model, state["ema"] or state["model"], path)
    return model.to(device).eval(), s, state


# ---------------------------------------------------------------- data of a run

@dataclass
class Source:
    """What a run reads: normal images with their foreground, textures, and the test set."""
    category: data.Category
    images: data.Images
    train: np.ndarray                       # indices into images, and those held out
    held_out: np.ndarray
    foreground: Tensor                      # bool [N, 1, H, W]
    textures: data.Textures
    test: data.Images
    masks: np.ndarray | None                # bool [N, grid, grid], None without ground truth
    notes: list[str]


def load_source(s: Settings, training: bool = True) -> Source:
    """Read and check everything a run needs, before anything is trained. Raises InputError."""
    root = Path(s.root) if s.root else data.default_root()
    category = data.find_category(s.data, s.category, root)
    limit = s.memory_gb * 1e9
    images = data.Images(category.train, s.resize, s.crop, limit, "training images", True)
    test = data.Images([item.path for item in category.test], s.resize, s.crop,
                       limit - images.bytes, "test images", True)
    grid, side = 256, scoring_side(s)
    masks = None
    if category.annotated and category.test:
        masks = np.stack([data.load_mask(item, grid, side) for item in category.test])
    held = round(s.hold_out * len(images))
    if s.hold_out and len(images) > 1:
        held = min(max(held, 1), len(images) - 1)
    order = np.random.default_rng(s.seed).permutation(len(images))
    foreground, found = torch.ones(len(images), 1, 1, 1, dtype=torch.bool), ""
    if training:
        foreground, found = data.foreground_masks(images, category.train, s.category, s.foreground,
                                                  True)
    textures = data.Textures(root, s.crop)
    kept = "in memory" if images.in_memory and test.in_memory else "partly read from disk"
    notes = [f"{len(images) - held} normal images to train on, {held} held out, {len(test)} to "
             f"test ({(images.bytes + test.bytes) / 1e6:.0f} MB, {kept})", f"foreground: {found}",
             f"textures: {textures.source}"]
    return Source(category, images, order[held:], order[:held], foreground, textures, test, masks,
                  notes)


def scoring_side(s: Settings) -> int:
    """Side of the scoring grid: 256, less what the crop takes away."""
    return round(256 * s.crop / s.resize)


def make_batch(s: Settings, source: Source, last_step: int, step: int, device: torch.device):
    """Training batch number `step`: x, eps, M, M_a, t for `TransFusion.losses`.

    Depends on nothing but the settings, the data and the number, so a run that is resumed, or one
    on another device, sees the same batches.
    """
    rng = np.random.default_rng([s.seed, step])
    per_epoch = steps_per_epoch(s, source)
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([s.seed, 1 << 32, epoch]).permutation(source.train)
    chosen = np.resize(order, per_epoch * s.batch)[place * s.batch:(place + 1) * s.batch].tolist()
    images, foreground = perlin.rotate_batch(source.images[chosen].to(device),
                                             source.foreground[chosen].to(device, torch.float32),
                                             s.rotation, rng)
    t = torch.tensor(rng.integers(1, last_step + 1, s.batch).tolist(), device=device)
    textures = source.textures.draw((s.batch + 1) // 2, rng).to(device)
    made = perlin.synthesize(images, foreground, textures, t == last_step, rng)
    return perlin.scale(images), made.eps, made.M, made.M_a, t


def steps_per_epoch(s: Settings, source: Source) -> int:
    return max(1, len(source.train) // s.batch)


# ---------------------------------------------------------------- training

def learning_rate(s: Settings, step: int, steps: int, per_epoch: int) -> float:
    """The learning rate of a step: warm-up, then section 4.3's drop or a half cosine."""
    rate = s.lr * min(1.0, (step + 1) / (s.warmup + 1))
    if s.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * (0.1 if step // per_epoch >= s.lr_drop else 1.0)


def train_step(model, ema, optimizer, batch, s: Settings, rate: float) -> dict[str, float]:
    """One optimiser step; returns the losses by name. Raises InputError if one is not finite."""
    losses = model.losses(*batch, drop=s.drop_loss)
    optimizer.zero_grad()
    losses["loss"].backward()
    if s.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    optimizer.step()
    if ema:
        ema.update_parameters(model)
    values = {name: float(value.detach()) for name, value in losses.items()}
    if not math.isfinite(values["loss"]):
        raise InputError(f"the loss is not finite ({values}); try a lower --lr, --clip 1 or "
                         f"--precision float32, from the last checkpoint with --resume")
    return values


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
        train_step(model, ema, optimizer, batch, s, 0.0)
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
    announce(model, s, source, steps - progress["step"], per_epoch, device)

    def checkpoint():
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
            losses = train_step(model, ema, optimizer, batch, s, rate)
            sums = progress["sums"]
            progress["sums"] = {k: sums.get(k, 0.0) + v for k, v in losses.items()}
            progress.update(step=step + 1, seconds=time.perf_counter() - start)
            bar.update()
            if (step + 1) % per_epoch == 0 or step + 1 == steps:
                close_epoch(progress, per_epoch, rate)
                row = progress["log"][-1]
                bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "n", "m", "a", "c")})
                if eval_every and row["epoch"] % eval_every == 0:
                    scored = ema.module if ema else model
                    found, *_ = score(scored, s, source)
                    model.train()
                    progress["eval"].append({"epoch": row["epoch"], "step": step + 1, **found})
                    save_csv(folder / "eval.csv", progress["eval"])
            if interruption.asked or (step + 1) % s.checkpoint_every == 0 or step + 1 == steps:
                checkpoint()
            if interruption.asked and step + 1 < steps:
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


def announce(model, s: Settings, source: Source, steps: int, per_epoch: int, device) -> None:
    for note in source.notes:
        print(f"  {note}")
    parameters = sum(p.numel() for p in model.parameters())
    seconds = steps * seconds_per_step(model, s, source, device)
    print(f"  {s.preset} preset: {steps} steps of {s.batch} images at {s.crop} px "
          f"({steps / per_epoch:.0f} epochs), {parameters / 1e6:.1f} M parameters, {device}, "
          f"{s.precision}: about {duration(seconds)}", flush=True)


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# ---------------------------------------------------------------- evaluation

def restore_all(model: TransFusion, images: data.Images, indices, s: Settings):
    """Restore images[indices] batch by batch: yields each batch's place and its Restoration."""
    device = next(model.parameters()).device
    model.eval()
    with tqdm(total=len(indices), desc="restoring", unit="image", leave=False) as bar:
        for start in range(0, len(indices), s.eval_batch):
            chosen = indices[start:start + s.eval_batch]
            x = perlin.scale(images[chosen].to(device))
            yield slice(start, start + len(chosen)), model.restore(x, s.infer_steps)
            bar.update(len(chosen))


def raw_maps(model: TransFusion, images: data.Images, indices,
             s: Settings) -> dict[str, np.ndarray]:
    """Unfiltered M_disc, M_recon and last M of images[indices], float32 [N, H, W], by name."""
    maps = {name: np.empty((len(indices), s.crop, s.crop), np.float32)
            for name in ("M_disc", "M_recon", "M_last")}
    for place, restored in restore_all(model, images, indices, s):
        for name in maps:
            maps[name][place] = getattr(restored, name)[:, 0].cpu().numpy()
    return maps


def final_maps(maps: dict[str, np.ndarray], s: Settings) -> Tensor:
    """M_final [N, 1, H, W] of Eq. 10, or one of its parts alone (Table 4), from raw maps."""
    M_disc, M_recon, M_last = (torch.from_numpy(maps[name])[:, None]
                               for name in ("M_disc", "M_recon", "M_last"))
    if s.final_mask == "last":
        M_disc = M_last
    lam = {"combined": s.lam, "recon": 0.0}.get(s.final_mask, 1.0)
    return final_mask(M_disc, M_recon, lam, s.kernel)


def score_maps(maps: dict[str, np.ndarray], labels: np.ndarray, masks: np.ndarray | None,
               s: Settings) -> tuple[dict[str, float], np.ndarray]:
    """Metrics of raw maps, and the image scores [N]. Pixels are compared on the scoring grid."""
    M_final = final_maps(maps, s)
    scores = anomaly_score(M_final).numpy()
    side = scoring_side(s)
    on_grid = F.interpolate(M_final, (side, side), mode="bilinear")[:, 0].numpy()
    return metrics.evaluate(labels, scores, on_grid, masks), scores


def score(model: TransFusion, s: Settings, source: Source):
    """Restore and score the test set: metrics, raw maps, image scores, seconds an image."""
    labels = np.array([item.label for item in source.category.test])
    start = time.perf_counter()
    maps = raw_maps(model, source.test, range(len(source.test)), s)
    seconds = (time.perf_counter() - start) / len(source.test)
    found, scores = score_maps(maps, labels, source.masks, s)
    return found, maps, scores, seconds


def alarm_rates(model: TransFusion, s: Settings, source: Source, labels: np.ndarray,
                scores: np.ndarray) -> dict:
    """The threshold from the held-out normal images, and what it does on the test set."""
    found = dict(threshold=None, threshold_images=len(source.held_out), false_alarms_promised=None,
                 false_alarm_rate=None, detection_rate=None)
    if len(source.held_out) == 0:
        return found
    maps = raw_maps(model, source.images, source.held_out, s)
    normal = anomaly_score(final_maps(maps, s)).numpy()
    threshold, promised = metrics.normal_threshold(normal, s.false_alarms)
    rate = {label: float((scores[labels == label] > threshold).mean())
            if (labels == label).any() else None for label in (0, 1)}
    found.update(threshold=threshold, false_alarms_promised=promised, false_alarm_rate=rate[0],
                 detection_rate=rate[1])
    return found


def write_results(folder: Path, model: TransFusion, s: Settings, source: Source, progress: dict,
                  suffix: str = "") -> dict:
    """Score the model and write metrics[suffix].json; without a suffix the other files too."""
    labels = np.array([item.label for item in source.category.test])
    found, maps, scores, seconds = score(model, s, source)
    found.update(alarm_rates(model, s, source, labels, scores))
    per_epoch = steps_per_epoch(s, source)
    found.update(data=source.category.data, category=s.category, preset=s.preset, seed=s.seed,
                 step=progress["step"], epoch=math.ceil(progress["step"] / per_epoch),
                 seconds_train=round(progress["seconds"], 1), seconds_per_image=seconds,
                 infer_steps=len(model.steps(s.infer_steps)) - 1, precision=s.precision,
                 device=s.device, hardware=hardware(s), torch=torch.__version__)
    if not suffix:
        save_csv(folder / "scores.csv",
                 [{"file": item.path.relative_to(source.category.root).as_posix(),
                   "label": item.label, "score": f"{value:.9g}"}
                  for item, value in zip(source.category.test, scores)])
        save_atomically(folder / "maps.npz", lambda file: np.savez_compressed(file, **maps))
        save_atomically(folder / "qualitative.png",
                        lambda file: draw_qualitative(file, model, s, source, maps))
    save_json(folder / f"metrics{suffix}.json", found)
    return found


def hardware(s: Settings) -> str:
    if s.device.startswith("cuda"):
        return torch.cuda.get_device_name(s.device)
    found = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line] \
        if Path("/proc/cpuinfo").exists() else [platform.processor()]
    return f"{found[0] if found else platform.machine()}, {torch.get_num_threads()} threads"


def draw_qualitative(file, model: TransFusion, s: Settings, source: Source, maps: dict,
                     of_each: int = 2) -> None:
    """For some test images of each kind: input, restoration, map over image, map, truth."""
    from matplotlib.figure import Figure
    items = source.category.test
    kinds = sorted({item.defect for item in items}, key=lambda kind: (kind in data.GOOD, kind))
    shown = [k for kind in kinds
             for k in [k for k, item in enumerate(items) if item.defect == kind][:of_each]]
    M_final = final_maps(maps, s)[:, 0].numpy()
    top = float(M_final.max())
    restored = torch.cat([part.x_0.cpu() for _, part in restore_all(model, source.test, shown, s)])

    def picture(image: Tensor) -> np.ndarray:
        return image.permute(1, 2, 0).numpy()

    titles = ["image", "restoration", "map over image", "anomaly map", "ground truth"]
    figure = Figure(figsize=(10, 2 * len(shown) + 0.8), layout="constrained")
    axes = figure.subplots(len(shown), 5, squeeze=False)
    for row, k, image, x_0 in zip(axes, shown, source.test[shown], restored):
        truth = source.masks[k] if source.masks is not None else None
        row[0].imshow(picture(image))
        row[1].imshow(picture(x_0.clamp(-1, 1) / 2 + 0.5))
        row[2].imshow(picture(image).mean(-1), cmap="gray", vmin=0, vmax=255)
        row[2].imshow(M_final[k], cmap="inferno", vmin=0, vmax=top,
                      alpha=0.8 * np.sqrt(M_final[k] / top))
        shade = row[3].imshow(M_final[k], cmap="inferno", vmin=0, vmax=top)
        if truth is not None:
            row[4].imshow(truth, cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(f"{items[k].defect}\n{items[k].path.stem}", fontsize=8)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    figure.colorbar(shade, ax=axes, location="bottom", shrink=0.4, aspect=30, pad=0.01,
                    label="M_final (Eq. 10)")
    figure.savefig(file, format="png", dpi=80)


# ---------------------------------------------------------------- runs

def run_folder(s: Settings) -> Path:
    label = s.data if s.data in data.FOLDERS else Path(s.data).resolve().name
    return Path(s.out) / label / (s.category + (f"-{s.name}" if s.name else ""))


def refuse_other_run(folder: Path, s: Settings) -> None:
    """Raise InputError if the folder holds a run with other settings than these."""
    if not (folder / "config.json").exists():
        return
    there, here = read_json(folder / "config.json"), dataclasses.asdict(s)
    other = [f"{k} {there[k]} there, {here[k]} here" for k in here
             if k not in NOT_COMPARED and k in there and there[k] != here[k]]
    if other:
        raise InputError(f"{folder} holds a run with other settings ({'; '.join(other[:4])}); "
                         f"give this one a --name")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it or give --name")


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
    make_folder(folder)
    save_json(folder / "config.json", dataclasses.asdict(s))
    scored, progress = train(model, s, source, folder, state, flags.eval_every)
    if not source.test:
        print("  no test images: trained, but not scored")
        return {"category": s.category}
    return write_results(folder, scored, s, source, progress)


def start_model(s: Settings, weights: str) -> TransFusion:
    model = build_model(s)
    if weights:
        try:
            load_authors_weights(model, load_torch(Path(weights)))
        except (ValueError, AttributeError) as error:
            raise InputError(f"--weights {weights}: {error} (their network: --preset authors)")
    layout = torch.channels_last if s.device.startswith("cuda") else torch.contiguous_format
    return model.to(s.device, memory_format=layout)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error}); choose another --out")


def evaluate(s: Settings, flags: argparse.Namespace) -> dict:
    """--eval: score the model of a run folder, or of --weights, with this command's scoring."""
    folder = run_folder(s)
    if flags.weights:
        refuse_other_run(folder, s)
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
        used = dataclasses.replace(trained, **given, root=s.root, out=s.out, device=s.device,
                                   memory_gb=s.memory_gb, eval_batch=s.eval_batch)
        suffix = "".join(f"-{k}{getattr(used, k)}" for k in SCORING
                         if getattr(used, k) != getattr(trained, k))
        s = used
    source = load_source(s, training=False)
    if not source.test:
        raise InputError(f"{source.category.root}: no test images to score")
    make_folder(folder)
    if flags.weights:
        save_json(folder / "config.json", dataclasses.asdict(s))
        save_checkpoint(folder / "last.pt", s, model, None, None, progress)
    return write_results(folder, model, s, source, progress, suffix)


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


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}",
                                                                   file=sys.stderr)
            command(*parse(argv))
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt or 'interrupted'}", file=sys.stderr)
        return 130


def command(s: Settings, flags: argparse.Namespace) -> None:
    """Train or score the category asked for, or all of them, and print the table."""
    if s.data == "demo":
        s = dataclasses.replace(s, root=s.root or "data")
        demo.write(Path(s.root) / "demo")
    root = Path(s.root) if s.root else data.default_root()
    known = data.list_categories(s.data, root)
    if not s.category:
        raise InputError(f"--category: one of {', '.join(known)}, or all")
    names = known if s.category == "all" else [s.category]
    work = evaluate if flags.eval else run
    rows = [work(dataclasses.replace(s, category=name), flags) for name in names]
    print_table(rows)
    print("\nmetrics.json, scores.csv and qualitative.png are in "
          + ", ".join(str(run_folder(dataclasses.replace(s, category=name))) for name in names))


if __name__ == "__main__":
    sys.exit(main())
