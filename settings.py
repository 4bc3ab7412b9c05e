"""The settings of a run: one dataclass whose fields are the flags, the presets, the command line.

The defaults are the paper's (3.4, 4.3) where it names a value. Presets and flags change them.
"""
import argparse
import dataclasses
import math
import os
import re
from dataclasses import dataclass, field

import torch

from baselines import METHODS, OURS_ALONE, accepts_flag
from support.console import InputError
from support.devices import fast_bf16, pick_device
from support.flags import add_flags, flag_of
from support.layouts import FOLDERS, clean_data


# ---------------------------------------------------------------- settings and presets

def setting(default, help: str, group: str, choices=None, low=-math.inf, high=math.inf):
    """A field of Settings; low and high: the smallest and the largest value that it takes."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices,
                                            "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on; each field is a flag.

    The groups "run" and "machine" say which run it is and where it computes; the values of the
    group "machine" change no result. Those of "scoring" can be changed after the training.
    """
    data: str = setting("demo", "mvtec, visa, btad, demo, or a folder of categories", "run")
    category: str = setting("", "the category, or all (demo: fabric)", "run")
    name: str = setting("", "suffix of the run folder, to keep several runs of a category", "run")
    method: str = setting("transfusion", "the method to train", "run", tuple(METHODS))
    preset: str = setting("", "named settings (default: demo quick, GPU paper, else cpu)", "run",
                          ("paper", "authors", "fast", "cpu", "quick"))
    seed: int = setting(0, "seed of all random numbers", "run", low=0, high=2 ** 63 - 1)

    root: str = setting("", "folder of the data sets (default: $TRANSFUSION_DATA or ./data; the "
                        "demo's: ./data)", "machine")
    out: str = setting("runs", "folder of the run folders", "machine")
    device: str = setting("auto", "cpu, cuda, cuda:1 ...", "machine")
    memory_gb: float = setting(4.0, "memory for images; others are read at every use", "machine")
    eval_batch: int = setting(16, "number of images restored at a time", "machine", low=1)
    checkpoint_every: int = setting(1000, "steps between checkpoints", "machine", low=1)
    recompute: bool = setting(False, "train with less memory, in a third more time", "machine")

    resize: int = setting(256, "side in pixels to which images are resized", "training")
    crop: int = setting(224, "side of the centre crop after that; if only --resize is given, it is "
                        "scaled by the preset's ratio", "training")
    grow: str = setting("", "SIDE:SHARE,... smaller images first: of SIDE times the crop until "
                        "SHARE of the steps are done", "training")
    foreground: str = setting("auto", "where synthetic anomalies are placed: auto, none (anywhere) "
                              "or a folder of masks, DIR/CATEGORY or DIR", "training")
    rotation: float = setting(90.0, "rotation augmentation, degrees each way", "training", low=0)
    authors_rotation: bool = setting(False, "rotate as the authors' code does: nearest neighbour "
                                     "on grey, in place of bilinear on black", "training")
    light: float = setting(0.0, "light augmentation, which the paper lacks: the brightness of an "
                           "image times 1 - LIGHT to 1 + LIGHT", "training", low=0, high=1)
    channels: int = setting(64, "channels of the network at full resolution", "training")
    attention_norm: bool = setting(False, "a GroupNorm before each attention layer, which neither "
                                   "the paper nor the authors' code has", "training")
    time_after_norm: bool = setting(False, "add t behind a block's second norm", "training")
    batch: int = setting(8, "images a step", "training", low=2)
    anomalous: float = setting(0.5, "anomalous share of a batch", "training", low=0.01, high=1)
    epochs: int = setting(1500, "passes over the training images", "training", low=1)
    steps: int = setting(0, "optimiser steps; if not 0, they replace --epochs", "training", low=0)
    init: str = setting("default", "initial weights: torch's, or weights that return the input",
                        "training", ("default", "identity"))
    lr: float = setting(1e-5, "learning rate", "training", low=0)
    muon: bool = setting(False, "Muon, at 3 x --lr, for convolutions; AdamW else", "training")
    lr_schedule: str = setting("step", "step: x0.1 after --lr-drop epochs; cosine: to 0 at the end",
                               "training", ("step", "cosine"))
    lr_drop: int = setting(800, "epoch after which the step schedule drops", "training")
    warmup: int = setting(0, "steps of linear warm-up", "training", low=0)
    weight_decay: float = setting(0.01, "weight decay", "training", low=0)
    clip: float = setting(0.0, "largest norm of the gradient; 0 for no clipping", "training", low=0)
    ema: float = setting(0.0, "decay of the moving average of the weights, which is the model that "
                         "is scored; 0 for no average", "training", low=0, high=1)
    precision: str = setting("float32", "precision of the network; auto: bfloat16 where it is fast",
                             "training", ("auto", "bf16", "float32"))
    compile: bool = setting(False, "compile the network: slow to start, then faster", "training")
    hold_out: float = setting(0.0, "share of the normal images kept out of training, for the "
                              "threshold (own folders: 0.1)", "training", low=0, high=0.9)

    T: int = setting(20, "steps of the transparency process", "method", low=1)
    schedule: str = setting("linear", "how the opacity grows with t", "method",
                            ("linear", "quadratic", "root"))
    pe: str = setting("2d", "positional encoding; --no-pe for none", "method",
                      ("2d", "row", "none"))
    sim_mask: bool = setting(True, "the guide: the network sees the previous mask", "method")
    drop_loss: str = setting("", "losses to leave out, as letters of nmac (Eq. 5-8)", "method")
    authors_schedule: bool = setting(False, "T values of beta, restoration from T - 2", "method")
    anomaly_target: str = setting("eps", "the anomaly head's target", "method", ("eps", "beta_eps"))
    soft_consistency: bool = setting(True, "Eq. 8 on the soft mask, not the binary one", "method")

    variant: str = setting("diffad", "DiffAD: the variant, of those in its supplement",
                           "other methods", ("diffad", "f_and_r", "c", "no_inter", "x_a_inter"))
    omega: float = setting(0.0, "D3AD: share of noise at the start", "other methods", low=0)
    guidance: float = setting(4.0, "D3AD: how strongly a restoration is kept near the image",
                              "other methods", low=0)
    resnet34: str = setting("", "D3AD: file of torchvision's ResNet-34 weights, for its features",
                            "other methods")
    weights_file: str = setting("", "PatchCore: file of torchvision's WideResNet-50-2 weights "
                                "(default: a package's EfficientNet-Lite0)", "other methods")
    coreset: float = setting(0.1, "PatchCore: share of the training patches that the memory bank "
                             "keeps, or from 1 on their number", "other methods", low=0)

    infer_steps: int = setting(0, "network calls of a restoration; 0: as many as the schedule has",
                               "scoring", low=0)
    lam: float = setting(0.95, "weight of M_disc in Eq. 10", "scoring", low=0, high=1)
    kernel: int = setting(7, "side of Eq. 10's mean filter, in pixels", "scoring", low=1)
    final_mask: str = setting("combined", "the map that is scored; last: M_1, the last call's mask",
                              "scoring", ("combined", "disc", "recon", "last"))
    false_alarms: float = setting(0.05, "false alarm rate at which the threshold aims", "scoring",
                                  low=0, high=1)


SHORT_TRAINING = dict(grow="0.6:0.6", anomalous=0.75, attention_norm=True, init="identity",
                      muon=True, warmup=100, lr_schedule="cosine", clip=1.0, ema=0.995,
                      precision="auto", hold_out=0.1)
SMALL_NET = SHORT_TRAINING | dict(channels=16, time_after_norm=True, lr=1e-3, checkpoint_every=200)
PRESETS = {
    "paper": {},
    "authors": dict(crop=256, rotation=20.0, authors_rotation=True, pe="row", authors_schedule=True,
                    anomaly_target="beta_eps", soft_consistency=False),
    "fast": SHORT_TRAINING | dict(steps=6000, lr=1e-4, infer_steps=5),
    "cpu": SMALL_NET | dict(resize=96, crop=96, steps=4800, infer_steps=3),
    "quick": SMALL_NET | dict(resize=80, crop=80, rotation=10.0, batch=4, steps=1200, warmup=50,
                          ema=0.99),
}
LENGTH = {"steps", "epochs"}


def fields_of(*groups: str) -> list[dataclasses.Field]:
    """The fields of Settings in these groups, or all fields."""
    return [f for f in dataclasses.fields(Settings) if not groups or f.metadata["group"] in groups]


def names_of(*groups: str) -> set[str]:
    """The names of the fields in these groups."""
    return {f.name for f in fields_of(*groups)}


# ---------------------------------------------------------------- the command line

def command_line() -> argparse.ArgumentParser:
    """The parser of train.py: a flag for each field of Settings, and what to do with them."""
    table = PRESETS | {f"{name}, {method}": changes for method, entry in METHODS.items()
                       for name, changes in (entry.presets or {}).items()}
    table = "\n".join(f"  {name}: " + (", ".join(f"{k} {v}" for k, v in changes.items())
                                       or "the values above") for name, changes in table.items())
    parser = argparse.ArgumentParser(
        description="Train and score TransFusion or another method.",
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        epilog=f"presets, where they differ from these defaults (another method's: from "
               f"TransFusion's of this name without {', '.join(OURS_ALONE)}):\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "machine", "training", "method", "scoring", "other methods"):
        group = parser.add_argument_group(name)
        add_flags(group, fields_of(name))
        if name == "method":
            group.add_argument("--no-pe", dest="pe", action="store_const", const="none",
                               help="no positional encoding")
    action = parser.add_argument_group("what to do")
    action.add_argument("--eval-every", type=int, default=0, metavar="N",
                        help="also score every N epochs, to eval.csv")
    action.add_argument("--resume", action="store_true", default=False,
                        help="continue the run from its last checkpoint, with the settings of its "
                        "folder")
    return parser


def parse(argv: list[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """Settings of the command line, and the flags that say what to do with them.

    The namespace has `resume`, `eval_every` and `typed`, the names of the fields that the command
    line sets itself. Raises InputError; argparse's own errors exit with status 2.
    """
    values = vars(command_line().parse_args(argv))
    flags = argparse.Namespace(**{k: values.pop(k) for k in ("eval_every", "resume")})
    flags.typed = {k for k, value in values.items() if (k, value) != ("precision", "auto")}
    if flags.eval_every < 0:
        raise InputError(f"--eval-every {flags.eval_every}: must be at least 0, which is never")
    data = values["data"] = clean_data(values.get("data", "demo"))
    if data == "demo":
        values.setdefault("category", "fabric")
    for name in {"root", "out", "foreground", "resnet34", "weights_file"} & set(values):
        values[name] = os.path.expanduser(values[name])
    if values["data"] not in FOLDERS:
        values.setdefault("hold_out", 0.1)                # own parts get a threshold everywhere
    device = pick_device(values.get("device", "auto"))
    preset = values.get("preset") or default_preset(data, device, quiet=flags.resume)
    defaults = Settings(**preset_values(values.get("method", Settings.method), preset))
    values = with_all_steps(values)
    if "resize" in values:                                # the same share is cropped away
        values.setdefault("crop", max(16, values["resize"] * defaults.crop // defaults.resize
                                      // 8 * 8))
    if "epochs" in values:
        values.setdefault("steps", 0)                     # the flag beats a preset's steps
    s = dataclasses.replace(defaults, **{**values, "preset": preset, "device": str(device)})
    if s.precision == "auto":
        s = dataclasses.replace(s, precision="bf16" if fast_bf16(device) else "float32")
    if not flags.resume:                                  # else the folder's settings are checked
        check(s)
    for name in ("resnet34", "weights_file"):
        path = getattr(s, name)
        if path and not os.path.isfile(path):
            raise InputError(f"{flag_of(name)} {path}: no such file; torchvision keeps what it "
                             "downloads in ~/.cache/torch/hub/checkpoints")
    for f in fields_of():
        if f.name in values and not accepts_flag(s.method, f.name, f.metadata["group"]):
            raise InputError(f"{flag_of(f.name)}: means nothing to --method {s.method}; leave it "
                             f"out")
    if flags.eval_every and not METHODS[s.method].trains:
        raise InputError(f"--eval-every: means nothing to --method {s.method}; leave it out")
    return s, flags


def preset_values(method: str, preset: str) -> dict:
    """A preset's values for a method. Raises InputError for a preset that the method lacks."""
    own = METHODS[method].presets
    if own is not None and preset not in own:
        raise InputError(f"--preset {preset}: --method {method} has {', '.join(own)}")
    values = {**PRESETS[preset], "method": method}
    return values if own is None else values | OURS_ALONE | own.get(preset, {})


def default_preset(data: str, device: torch.device, quiet: bool = False) -> str:
    """The preset where --preset is not given. quiet: say nothing of the choice."""
    if data == "demo":
        return "quick"
    if device.type == "cuda":
        return "paper"
    if not quiet:
        print("no GPU: taking the cpu preset (--preset paper takes the paper's)")
    return "cpu"


def with_all_steps(values: dict) -> dict:
    """Settings by name. The map "last", M_1, exists only if a restoration visits every step."""
    return {"infer_steps": 0, **values} if values.get("final_mask") == "last" else values


def growing_sides(s: Settings) -> list[tuple[int, float]]:
    """--grow's smaller sides in pixels (multiples of 8), each with the share at which it ends.

    Raises InputError for another form than SIDE:SHARE,... with numbers that rise within (0, 1).
    """
    form = r"0?\.\d+:0?\.\d+"
    pairs = [[float(number) for number in pair.split(":")] for pair in re.findall(form, s.grow)]
    rising = all(sorted({0.0, *column}) == [0.0, *column] for column in zip(*pairs))
    if not rising or not re.fullmatch(f"({form}(,{form})*)?", s.grow):
        raise InputError(f"--grow {s.grow}: must be SIDE:SHARE,... such as 0.5:0.4,0.75:0.7, with "
                         f"sides and shares that rise between 0 and 1")
    return [(max(16, round(side * s.crop / 8) * 8), share) for side, share in pairs]


def check(s: Settings) -> None:
    """Refuse settings that cannot work. Raises InputError."""
    for name, low in (("resize", 16), ("crop", 16), ("channels", 8)):
        value = getattr(s, name)
        if value < low or value % 8:
            raise InputError(f"--{name} {value}: must be a multiple of 8, at least {low}; "
                             f"the nearest is {max(low, round(value / 8) * 8)}")
    if s.crop > s.resize:
        raise InputError(f"--crop {s.crop} is larger than --resize {s.resize}")
    for f in fields_of():
        value, low, high, choices = (getattr(s, f.name),
                                     *(f.metadata[key] for key in ("low", "high", "choices")))
        if f.type in (int, float) and not low <= value <= high:
            limits = f"be at least {low}" if high == math.inf else f"lie in {low}..{high}"
            raise InputError(f"{flag_of(f.name)} {value}: must {limits}")
        if choices and value not in (*choices, f.default):      # argparse has checked the flags
            raise InputError(f"{f.name} {value!r}: one of {', '.join(choices)}")
    if s.ema == 1:
        raise InputError("--ema 1: the average would stay at the first step's weights; below 1")
    growing_sides(s)
    if s.kernel % 2 == 0:
        raise InputError(f"--kernel {s.kernel}: must be odd")
    if set(s.drop_loss) - set("nmac") or len(set(s.drop_loss)) == 4:
        raise InputError(f"--drop-loss {s.drop_loss}: up to three letters of nmac")
