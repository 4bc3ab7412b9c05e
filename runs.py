"""A run: a training at one of its steps, and the folder that keeps it."""
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from baselines import METHODS
from data import RunData
from settings import LENGTH, Settings, fields_of, names_of
from support import ranks
from support.console import InputError
from support.devices import fast_bf16
from support.files import folder_name, read_json, save_atomically, save_csv_if_possible
from support.flags import flag_of, wrong_types
from support.layouts import FOLDERS
from support.optimizer import MuonAdamW, new_optimizer
from support.weights import load_torch, load_weights
from transfusion import Method

FORMAT = 5               # of checkpoints; from 5 on with time_after_norm, which older code ignores

# A step is an outlier where its loss or gradient norm is more than OUTLIER_FACTOR times the running
# mean over about WINDOW steps. The counter rises with each outlier and falls with each other step.
# Above MAX_OUTLIERS, or MAX_OUTLIERS_AT_END at the last step, the training has diverged.
OUTLIER_FACTOR = {"loss": 3, "gradient": 10}
WINDOW, BURN_IN, MAX_OUTLIERS, MAX_OUTLIERS_AT_END = 100, 20, 20, 3


class Diverged(Exception):
    """The training has left its course; the message names the step, the losses and their means."""


@dataclass
class Run:
    """A training at one of its steps, with all that its checkpoint keeps.

    Without an optimizer it is a model to evaluate. seconds: of training. rollbacks: its returns to
    a checkpoint. outliers, running_mean: see `record`. epoch_steps: the losses of the epoch's
    steps. log, evaluations: rows of log.csv and eval.csv. calibration: after the training, a
    `CalibrationScores` as a dict; user_calibration: that of --calibrate. saved_step: of last.pt.
    """
    folder: Path
    settings: Settings
    data: RunData | None
    model: Method
    optimizer: torch.optim.AdamW | MuonAdamW | None = None
    average: AveragedModel | None = None
    step: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    outliers: int = 0
    running_mean: dict[str, float] = field(default_factory=dict)
    epoch_steps: list[dict[str, float]] = field(default_factory=list)
    log: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    calibration: dict | None = None
    user_calibration: dict | None = None
    saved_step: int = 0

    RECORD = ("step", "seconds", "rollbacks", "outliers", "running_mean", "epoch_steps", "log",
              "evaluations", "calibration", "user_calibration")

    @property
    def steps_per_epoch(self) -> int:
        return self.data.steps_per_epoch(self.settings.batch)

    @property
    def total_steps(self) -> int:
        if not METHODS[self.settings.method].trains:
            return 0
        return self.settings.steps or self.settings.epochs * self.steps_per_epoch

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether a multiple of --checkpoint-every was reached since the last checkpoint."""
        every = self.settings.checkpoint_every
        return self.step // every > self.saved_step // every

    @property
    def scored_model(self) -> Method:
        """The model that is scored: the averaged one where there is one."""
        return self.average.module if self.average else self.model

    def save(self) -> None:
        """Write last.pt, then log.csv if it can be. Raises InputError for a full disk."""
        self.saved_step = self.step
        if ranks.RANK:
            return
        state = {"format": FORMAT, "settings": dataclasses.asdict(self.settings),
                 "model": self.model.state_dict(),
                 "ema": self.average.module.state_dict() if self.average else None,
                 "optimizer": self.optimizer.state_dict(),
                 **{name: getattr(self, name) for name in self.RECORD}}
        save_atomically(self.folder / "last.pt", lambda file: torch.save(state, file))
        if self.log:
            save_csv_if_possible(self.folder / "log.csv", self.log)

    def load(self) -> None:
        """Return to the folder's last checkpoint: weights, moments, average and record.

        Raises InputError for a checkpoint that cannot be read or does not fit.
        """
        path = self.folder / "last.pt"
        _, state = load_checkpoint(path)
        load_weights(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            load_weights(self.average.module, state["ema"], path)
            self.average.n_averaged.fill_(state["step"])
        for name in self.RECORD:
            setattr(self, name, state[name])
        self.saved_step = self.step

    def record(self, losses: dict[str, Tensor]) -> None:
        """Keep a step's losses and its gradient's norm before clipping, both by name.

        Raises Diverged where one of them is not finite, or where too many of the last steps were
        outliers. The running mean weighs later steps more, leaves outliers out, and judges from
        BURN_IN steps on.
        """
        values = ranks.mean(torch.stack([torch.as_tensor(v).detach() for v in losses.values()]))
        losses = dict(zip(losses, values.tolist()))
        count = self.running_mean.get("steps", 0)
        outlier = count >= BURN_IN and any(losses[name] > factor * self.running_mean[name]
                                           for name, factor in OUTLIER_FACTOR.items())
        self.outliers = max(0, self.outliers + (1 if outlier else -1))
        last = self.step + 1 == self.total_steps
        if (not all(map(math.isfinite, losses.values()))
                or self.outliers > (MAX_OUTLIERS_AT_END if last else MAX_OUTLIERS)):
            seen = ", ".join(f"{name} {losses[name]:.3g}, usually "
                             f"{self.running_mean.get(name, math.nan):.3g}"
                             for name in OUTLIER_FACTOR)
            raise Diverged(f"the training diverged at step {self.step + 1} ({seen})")
        if not outlier:
            count = min(count + 1, WINDOW)
            self.running_mean = {
                **self.running_mean,
                **{name: (self.running_mean.get(name, 0.0) * (count - 1) + losses[name]) / count
                   for name in OUTLIER_FACTOR}, "steps": count}
        self.epoch_steps.append(losses)
        self.calibration = self.user_calibration = None      # these were another step's scores

    def close_epoch(self, rate: float) -> dict[str, float]:
        """Turn the epoch's steps into a row of the log: mean losses, the largest gradient norm.

        rate: the learning rate. Returns the mean losses.
        """
        steps, self.epoch_steps = self.epoch_steps, []
        means = {name: math.fsum(losses[name] for losses in steps) / len(steps)
                 for name in steps[0] if name != "gradient"}
        self.log.append({"epoch": math.ceil(self.step / self.steps_per_epoch), "step": self.step,
                         **means, "gradient": max(losses["gradient"] for losses in steps),
                         "rollbacks": self.rollbacks, "lr": rate,
                         "seconds": round(self.seconds, 1)})
        return means


def new_run(folder: Path, s: Settings, data: RunData | None, model: Method) -> Run:
    """A training at step 0, with an averaged model where the settings say so.

    Of several ranks on GPUs, each with a part of the batch, BatchNorm sees the whole one.
    """
    if s.device.startswith("cuda") and ranks.COUNT > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(s.device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(s.ema)) if s.ema else None
    return Run(folder, s, data, model, new_optimizer(model, s), average)


def build_model(s: Settings) -> Method:
    """The model of these settings, seeded, on the CPU.

    Raises InputError for settings of which it cannot be built, such as a T too small.
    """
    if s.method not in METHODS:
        raise InputError(f"method {s.method}: not known here; {', '.join(METHODS)}")
    torch.manual_seed(s.seed)
    model = METHODS[s.method].build(s)
    if s.init == "identity":
        model.net.start_from_identity()
    return model


# ---------------------------------------------------------------- the run folder

def run_folder(s: Settings) -> Path:
    """OUT/DATA/CATEGORY[-METHOD][-NAME].

    DATA is the data set's name, or the last part of a folder's path. The default method is left
    out.
    """
    label = s.data if s.data in FOLDERS else Path(s.data).resolve().name
    method = "" if s.method == Settings.method else s.method
    return Path(s.out) / label / folder_name("-".join(filter(None, (s.category, method, s.name))))


def result_path(folder: Path, s: Settings, trained: Settings, step: int = 0) -> Path:
    """The file of a run's metrics: metrics.json, or metrics-<what differs>.json.

    s, trained: the settings of this evaluation and those of the training. step: the model's, where
    the training has not ended.
    """
    changes = [f"{name}{getattr(s, name)}" for name in sorted(names_of("scoring"))
               if getattr(s, name) != getattr(trained, name)]
    return folder / ("-".join(["metrics", *([f"step{step}"] if step else []), *changes]) + ".json")


def saved_settings(folder: Path) -> Settings | None:
    """The settings in a run folder's config.json, or None. What it lacks has its default."""
    if not (folder / "config.json").exists():
        return None
    config = read_json(folder / "config.json")
    return Settings(**{k: v for k, v in config.items() if k in names_of()})


def refuse_other_settings(folder: Path, s: Settings, typed: set[str]) -> None:
    """Raise InputError if the folder holds a run with other settings than these.

    typed: the flags of the command line; a precision that it does not name is the machine's choice.
    `data.refuse_other_data` compares the images.
    """
    saved = saved_settings(folder)
    ignored = names_of("machine") | ({"precision"} - typed)
    if not {saved.data, s.data} & set(FOLDERS):
        ignored |= {"data"}
    different = [k for k in sorted(names_of() - ignored) if getattr(saved, k) != getattr(s, k)]
    if different and set(different) <= LENGTH:
        raise InputError(f"{folder} holds a run of {saved.steps or saved.epochs} "
                         f"{'steps' if saved.steps else 'epochs'}; --resume trains it to this "
                         f"command's length, --name NAME begins another from the start")
    if different:
        words = [f"{k} {getattr(saved, k)} there, {getattr(s, k)} here" for k in different]
        raise InputError(f"{folder} holds a run with other settings ({'; '.join(words[:4])}); "
                         f"give this one a --name")


def resumed_settings(folder: Path, s: Settings, typed: set[str]) -> Settings:
    """The settings with which --resume continues the run in a folder.

    They are the folder's, but for the machine's flags, the path of the data, and the length where
    the command line names it. Raises InputError where it names another value for anything else.
    """
    saved = saved_settings(folder)
    for name in sorted(typed - names_of("machine") - LENGTH - {"data"}):
        if getattr(s, name) != getattr(saved, name):
            raise InputError(f"{flag_of(name)}: {name} {getattr(saved, name)} there, "
                             f"{getattr(s, name)} here; --resume takes the settings of {folder}, "
                             f"so leave it out, or give this run a --name")
    # root, checkpoint_every and recompute remain the run's unless they are typed
    machine = {name: getattr(s, name) for name in names_of("machine")
               if name in typed or name not in ("root", "checkpoint_every", "recompute")}
    length = {name: getattr(s, name) for name in LENGTH if typed & LENGTH}
    precision = saved.precision
    if precision == "bf16" and not fast_bf16(torch.device(s.device)):
        precision = "float32"
        print("  continues in float32; the run was begun in bf16")
    return dataclasses.replace(saved, **machine, **length, data=s.data, precision=precision)


# ---------------------------------------------------------------- checkpoints

def load_checkpoint(path: Path) -> tuple[Settings, dict]:
    """Settings and content of a checkpoint of ours.

    Raises InputError for another file, a newer version, or settings of a wrong type.
    """
    state = load_torch(path)
    parts = {"format": int, "settings": dict, "model": dict}
    if not isinstance(state, dict) or any(not isinstance(state.get(k), kind)
                                          for k, kind in parts.items()):
        raise InputError(f"{path} is not a checkpoint of train.py; the authors' are read by "
                         f"tools/import_authors.py")
    if state["format"] > FORMAT:
        raise InputError(f"{path} was written by a newer version (format {state['format']}, this "
                         f"one reads up to {FORMAT}); update the code")
    settings = {k: v for k, v in state["settings"].items() if k in names_of()}
    wrong = wrong_types(fields_of(), settings)
    if wrong:
        raise InputError(f"{path} holds settings of a wrong type ({', '.join(wrong)[:100]})")
    if state["format"] < 4:                                # other names for the same scores
        names = {"images": "held_out", "trained": "training"}
        for new, old in (("calibration", "normal"), ("user_calibration", "calibrated")):
            scores = {names.get(k, k): v for k, v in (state.get(old) or {}).items()}
            state.setdefault(new, scores and {"training": [], "synthetic": [], **scores})
    return Settings(**settings), state


def load_model(path: Path, device: torch.device) -> tuple[Method, Settings, dict]:
    """The trained model of a checkpoint, its averaged weights where it has them, in eval mode.

    A model trained in bfloat16 computes in float32 where the device has no fast bfloat16: the
    scores hardly change, and the emulation takes many times as long.
    """
    s, state = load_checkpoint(path)
    if s.precision == "bf16" and not fast_bf16(device):
        s = dataclasses.replace(s, precision="float32")
    with torch.random.fork_rng([]):                        # the caller's random numbers go on
        model = build_model(s)
    load_weights(model, state["ema"] or state["model"], path)
    return model.to(device).eval(), s, state
