"""The settings of a run: one dataclass whose fields are the flags, the presets, the command line.

Defaults are the paper's (3.4, 4.3) where it names a value; a preset changes some, a flag any.
Here is also what every command has in common: the machine it runs on, and how it ends.
"""
import argparse
import contextlib
import dataclasses
import functools
import os
import platform
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from baselines import METHODS, has_use_of, presets


# ---------------------------------------------------------------- what every command has

class InputError(ValueError):
    """Something the user gave is wrong: one line that says what, where, and what to do."""


class Unbroken:
    """A text stream that writes what it can: a log whose disk is full, a closed terminal or pipe, a
    name that its encoding lacks cost no training. Where it is no terminal, a progress bar's lines
    follow each other."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if not self.stream.isatty():
            text = text.replace("\r", "\n")
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            known = self.stream.encoding
            return self.stream.write(text.encode(known, "backslashreplace").decode(known))
        except (OSError, ValueError):                                # full, or closed
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            pass

    def leave(self) -> None:
        """Flush for the last time; what cannot be written is given up, or Python's own last flush
        would fail."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def unbroken_streams():
    usual = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Unbroken(stream) for stream in usual)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Unbroken):
                stream.leave()
        sys.stdout, sys.stderr = usual


def exit_status(command: Callable[..., int | None]) -> Callable[..., int]:
    """Decorates a command: it returns its exit status, 0 if it returns nothing itself, 2 for a
    user's mistake or a full GPU, which is said in one line, and 130 for Ctrl-C. Of warnings of a
    kind the first three are shown, then their number."""
    @functools.wraps(command)
    def ended(*args) -> int:
        kinds: Counter = Counter()

        def show(message, *_, **__) -> None:
            kind = str(message).split(": ")[-1][:12]
            kinds[kind] += 1
            if kinds[kind] <= 3:
                print(f"warning: {message}", file=sys.stderr)

        with unbroken_streams():
            try:
                with warnings.catch_warnings():
                    warnings.showwarning = show
                    return command(*args) or 0
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except torch.OutOfMemoryError as error:
                if os.environ.get("RANK", "0") != "0":             # whose streams are closed
                    raise
                first = str(error).split(". ")[0]
                print(f"error: the GPU's memory is full ({first}); --recompute and a smaller "
                      f"--eval-batch take less, and so does a smaller --batch, for a training with "
                      f"another --name", file=sys.stderr)
                return 2
            except KeyboardInterrupt as interrupt:
                print(f"\n{str(interrupt) or 'interrupted'}", file=sys.stderr)
                return 130
            finally:
                for kind, count in kinds.items():
                    if count > 3:
                        print(f"warning: {count - 3} more like this: {kind}...", file=sys.stderr)
    return ended


def progress_bar(*args, leave: bool = True, **kwargs) -> tqdm:
    """A progress bar; where standard error is no terminal, a line a minute for the lasting ones."""
    terminal = sys.stderr.isatty()
    return tqdm(*args, leave=leave, disable=not (terminal or leave),
                mininterval=0.5 if terminal else 60, **kwargs)


def pick_device(name: str) -> torch.device:
    """The device of --device, auto: a GPU where there is one. Raises InputError for another."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: no such device; cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine has no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                         f"devices, counted from 0")
    return device


def fast_bf16(device: torch.device) -> bool:
    """Whether this processor multiplies in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def hardware(device: str) -> str:
    """The processor's name, and on a CPU how many threads compute."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------- settings and presets

def setting(default, help: str, group: str, choices=None):
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on; each field is a flag."""
    data: str = setting("demo", "mvtec, visa, btad, demo, or a folder of categories", "run")
    category: str = setting("", "the category, or all (demo: fabric)", "run")
    root: str = setting("", "where the data sets lie (default: $TRANSFUSION_DATA or ./data; the "
                        "demo's: ./data)", "run")
    out: str = setting("runs", "where run folders go", "run")
    name: str = setting("", "suffix of the run folder, to keep several runs of a category", "run")
    method: str = setting("transfusion", "what is trained", "run", tuple(METHODS))
    preset: str = setting("", "settings taken together; flags override it (default: quick for the "
                          "demo, else paper on a GPU, cpu without one)", "run",
                          ("paper", "authors", "cpu", "quick"))
    device: str = setting("auto", "cpu, cuda, cuda:1 ...", "run")
    seed: int = setting(0, "seed of everything random", "run")
    memory_gb: float = setting(4.0, "images beyond this are read from disk at every use", "run")
    eval_batch: int = setting(16, "images restored at a time", "run")

    resize: int = setting(256, "images are resized to this side, in pixels", "training")
    crop: int = setting(224, "then cropped to this centre; follows --resize, in the preset's share",
                        "training")
    foreground: str = setting("auto", "where anomalies are put: auto, none or a folder of masks, "
                              "DIR/CATEGORY or DIR", "training")
    rotation: float = setting(90.0, "rotation augmentation, degrees to either side", "training")
    authors_rotation: bool = setting(False, "turned by nearest neighbour on grey, not linearly on "
                                     "black", "training")
    light: float = setting(0.0, "light augmentation, not in the paper: the brightness of every "
                           "image times 1 - LIGHT to 1 + LIGHT", "training")
    channels: int = setting(64, "width of the network at full resolution", "training")
    attention_norm: bool = setting(False, "a GroupNorm before each attention layer, which neither "
                                   "the paper nor the authors have", "training")
    batch: int = setting(8, "images a step, half of them made anomalous", "training")
    epochs: int = setting(1500, "passes over the training images", "training")
    steps: int = setting(0, "optimiser steps; instead of --epochs if not 0", "training")
    init: str = setting("default", "initial weights: torch's, or those that return the input",
                        "training", ("default", "identity"))
    lr: float = setting(1e-5, "AdamW's learning rate", "training")
    lr_schedule: str = setting("step", "step: x0.1 after --lr-drop epochs; cosine: to 0 at the end",
                               "training", ("step", "cosine"))
    lr_drop: int = setting(800, "epoch of the step schedule's drop", "training")
    warmup: int = setting(0, "steps of linear warm-up", "training")
    weight_decay: float = setting(0.01, "AdamW's weight decay", "training")
    clip: float = setting(0.0, "bound on the gradient's norm; 0 for none", "training")
    ema: float = setting(0.0, "decay of the weights' average, which is scored; 0 for none",
                         "training")
    precision: str = setting("float32", "of the network; auto: bf16 where it is fast", "training",
                             ("auto", "bf16", "float32"))
    recompute: bool = setting(False, "less memory in training, for a third more time", "training")
    compile: bool = setting(False, "compile the network: minutes to start, a tenth faster after "
                            "that on a CPU", "training")
    hold_out: float = setting(0.0, "share of normal images kept for the threshold (a folder of "
                              "your own: 0.1)", "training")
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

    variant: str = setting("diffad", "DiffAD's: which of its supplement's", "other methods",
                           ("diffad", "f_and_r", "c", "no_inter", "x_a_inter"))
    omega: float = setting(0.0, "D3AD's: share of noise at the start of a restoration",
                           "other methods")
    guidance: float = setting(4.0, "D3AD's: how strongly a restoration is held near the image",
                              "other methods")
    resnet34: str = setting("", "D3AD's: file of torchvision's ResNet-34 weights, for its features",
                            "other methods")

    infer_steps: int = setting(0, "network calls a restoration; 0: all of the schedule's",
                               "scoring")
    lam: float = setting(0.95, "weight of M_disc in Eq. 10", "scoring")
    kernel: int = setting(7, "side of Eq. 10's mean filter, pixels", "scoring")
    final_mask: str = setting("combined", "which map is scored; last: the last call's mask, M_1 "
                              "as all steps are walked then", "scoring",
                              ("combined", "disc", "recon", "last"))
    false_alarms: float = setting(0.05, "false-alarm rate the threshold aims at", "scoring")


PRESETS = {
    "paper": {},
    "authors": dict(crop=256, rotation=20.0, authors_rotation=True, pe="row", authors_schedule=True,
                    anomaly_target="beta_eps", soft_consistency=False),
    "cpu": dict(resize=96, crop=96, channels=16, attention_norm=True, init="identity", steps=4400,
                lr=1e-3, lr_schedule="cosine", warmup=100, clip=1.0, ema=0.995, precision="auto",
                hold_out=0.1, checkpoint_every=200, infer_steps=3),
    "quick": dict(resize=80, crop=80, rotation=10.0, channels=16, attention_norm=True, batch=4,
                  init="identity", steps=1200, lr=1e-3, lr_schedule="cosine", warmup=50, clip=1.0,
                  ema=0.99, precision="auto", hold_out=0.1, checkpoint_every=200),
}
KNOWN_DATA = ("mvtec", "visa", "btad", "demo")
# What does not change a run's numbers, so a finished run stays the same run under other values.
NOT_COMPARED = {"root", "out", "device", "memory_gb", "eval_batch", "checkpoint_every",
                "recompute"}
SCORING = [f.name for f in dataclasses.fields(Settings) if f.metadata["group"] == "scoring"]


def command_line() -> argparse.ArgumentParser:
    """The flags: a field of Settings each, and what to do with them."""
    table = PRESETS | {f"{name}, {method}": changes for method in METHODS
                       for name, changes in (presets(method) or {}).items()}
    table = "\n".join(f"  {name}: " + (", ".join(f"{k} {v}" for k, v in changes.items())
                                       or "the values above") for name, changes in table.items())
    parser = argparse.ArgumentParser(
        description="Train and score TransFusion or another method.",
        argument_default=argparse.SUPPRESS,
        epilog=f"presets, where they differ from these defaults (another method's: from "
               f"TransFusion's preset of that name):\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {name: parser.add_argument_group(name)
              for name in ("run", "training", "method", "scoring", "other methods")}
    for f in dataclasses.fields(Settings):
        meta, flag = f.metadata, "--" + f.name.replace("_", "-")
        shown = f"{meta['help']} (default {f.default})" if f.default != "" else meta["help"]
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
    return parser


def parse(argv: list[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """Settings of the command line, and the flags that say what to do with them.

    Raises InputError; argparse's own errors exit with status 2.
    """
    given = vars(command_line().parse_args(argv))
    flags = argparse.Namespace(**{k: given.pop(k)
                                  for k in ("eval", "eval_every", "resume", "weights")})
    if flags.eval_every < 0:
        raise InputError(f"--eval-every {flags.eval_every}: must be at least 0, which is never")
    if given.get("final_mask") == "last":
        given.setdefault("infer_steps", 0)                # M_1 is the last of all steps alone
    flags.given = set(given)
    device = pick_device(given.get("device", "auto"))
    preset = given.get("preset") or default_preset(given.get("data", "demo"), device)
    if given.get("data", "demo") == "demo":
        given.setdefault("category", "fabric")
    for name in {"data", "root", "out", "foreground", "resnet34"} & set(given):
        given[name] = os.path.expanduser(given[name])
    if "data" in given:
        a_path = os.path.dirname(given["data"]) or given["data"].startswith(".")
        given["data"] = os.path.normpath(given["data"])   # parts/, ./parts and parts are one run
        if a_path and given["data"] in KNOWN_DATA:
            given["data"] = os.path.join(".", given["data"])           # ./demo is no data set
    if given.get("data", "demo") not in KNOWN_DATA:
        given.setdefault("hold_out", 0.1)                 # own parts get a threshold everywhere
    usual = Settings(**usual_values(given.get("method", "transfusion"), preset))
    if "resize" in given:                                 # the same share is left out
        given.setdefault("crop", max(16, given["resize"] * usual.crop // usual.resize // 8 * 8))
    if "epochs" in given:
        given.setdefault("steps", 0)                      # the flag beats a preset's steps
    settings = dataclasses.replace(usual, **{**given, "preset": preset, "device": str(device)})
    if settings.precision == "auto":
        settings = dataclasses.replace(settings,
                                       precision="bf16" if fast_bf16(device) else "float32")
    check(settings)
    if settings.resnet34 and not os.path.isfile(settings.resnet34):
        raise InputError(f"--resnet34 {settings.resnet34}: no such file; torchvision keeps what it "
                         "downloads in ~/.cache/torch/hub/checkpoints")
    for f in dataclasses.fields(Settings):
        if f.name in given and not has_use_of(settings.method, f.name, f.metadata["group"]):
            raise InputError(f"--{f.name.replace('_', '-')}: means nothing to --method "
                             f"{settings.method}; leave it out")
    return settings, flags


def usual_values(method: str, preset: str) -> dict:
    """A preset's values for a method. Raises InputError for a preset that the method lacks."""
    own = presets(method)
    if own is not None and preset not in own:
        raise InputError(f"--preset {preset}: --method {method} has {', '.join(own)}")
    return {**PRESETS[preset], **(own or {}).get(preset, {}), "method": method}


def default_preset(name: str, device: torch.device) -> str:
    if name == "demo":
        return "quick"
    if device.type == "cuda":
        return "paper"
    print("no GPU: taking the cpu preset (--preset paper takes the paper's)")
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
    for name, low in (("batch", 2), ("epochs", 1), ("steps", 0), ("lr", 0), ("T", 1),
                      ("warmup", 0), ("eval_batch", 1), ("infer_steps", 0), ("checkpoint_every", 1),
                      ("clip", 0), ("seed", 0), ("weight_decay", 0), ("omega", 0), ("guidance", 0),
                      ("rotation", 0)):
        if not getattr(s, name) >= low:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: "
                             f"must be at least {low}")
    for name, high in (("lam", 1), ("light", 1), ("hold_out", 0.9), ("ema", 1),
                       ("false_alarms", 1)):
        if not 0 <= getattr(s, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: "
                             f"must lie in 0..{high}")
    if s.ema == 1:
        raise InputError("--ema 1: the average would stay at the first step's weights; below 1")
    if s.channels < 8 or s.channels % 8:
        raise InputError(f"--channels {s.channels}: must be a multiple of 8")
    if s.kernel < 1 or s.kernel % 2 == 0:
        raise InputError(f"--kernel {s.kernel}: must be odd and positive")
    for f in dataclasses.fields(s):                  # of values that came by no command line
        choices = f.metadata["choices"]
        if choices and getattr(s, f.name) not in (*choices, f.default):
            raise InputError(f"{f.name} {getattr(s, f.name)!r}: one of {', '.join(choices)}")
    if set(s.drop_loss) - set("nmac") or len(set(s.drop_loss)) == 4:
        raise InputError(f"--drop-loss {s.drop_loss}: up to three letters of nmac")
