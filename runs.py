"""What a run reads and keeps: its data, its model, its folder, its files, its checkpoints.

A file is written whole or not at all; a checkpoint rebuilds its model by itself.
"""
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from scipy import ndimage
from torch import Tensor

import data
from baselines import METHODS
from settings import NOT_COMPARED, InputError, Settings, fast_bf16
from transfusion import Attention, ResidualBlock, ResUNet, TransFusion

FORMAT = 3                                          # version of the checkpoint's layout
SCORING_GRID = 256                                  # side of an image, uncropped, where scored
RANK = int(os.environ.get("RANK", 0))               # torchrun's number of this process


# ---------------------------------------------------------------- data of a run

@dataclass
class Source:
    """What a run reads: normal images with their foreground, textures, and the test set."""
    category: data.Category
    images: data.Images
    train: np.ndarray                       # indices into images
    held_out: np.ndarray                    # the others
    foreground: Tensor                      # bool [N, 1, H, W]
    textures: data.Textures
    test: data.Images
    masks: np.ndarray | None                # bool [N, grid, grid], None without ground truth
    notes: list[str]


def load_source(s: Settings, training: bool = True, folder: Path | None = None) -> Source:
    """Read and check everything a run needs, before anything is trained. Raises InputError.

    folder: of a run that has begun, whose images for training and held out stay what they were, and
    for training the number of its textures.
    """
    root = data.root_folder(s.root)
    category, kept = data.find_category(s.data, s.category, root), {}
    changes = []
    if folder and (folder / "data.json").exists():
        kept = refuse_other_data(folder, category)
        names = {name_in(category, p): p for p in category.train}
        wanted = (kept["train"] if training else []) + kept["held_out"]
        gone = [name for name in wanted if name not in names]
        if gone:
            raise InputError(f"{category.root / gone[0]}: gone (and {len(gone) - 1} more), but "
                             f"this run was begun with it; put it back, or give another --name")
        every = {*kept["train"], *kept["held_out"]}
        changes = [f"warning: {len(set(names) - every)} normal images were added since this run "
                   f"began: not used"] if set(names) - every else []
        category = dataclasses.replace(category, train=[p for name, p in names.items()
                                                        if name in every])
    limit = s.memory_gb * 1e9
    images = data.Images(category.train, s.resize, s.crop, limit, "training images")
    test = data.Images([item.path for item in category.test], s.resize, s.crop,
                       limit - images.bytes * images.in_memory, "test images")
    masks = None
    if category.annotated and category.test:
        masks = np.stack([data.load_mask(item, SCORING_GRID, scoring_side(s))
                          for item in category.test])
        changes += truth_kept(category.test, masks)
    order = np.random.default_rng(s.seed).permutation(len(images))
    if kept:
        places = {name_in(category, p): k for k, p in enumerate(category.train)}
        held_out = np.array([places[name] for name in kept["held_out"]], int)
        in_training = np.array([places[n] for n in kept["train"] if n in places], int)
    else:
        held = min(max(round(s.hold_out * len(images)), 1), len(images) - 1) if s.hold_out else 0
        held_out, in_training = order[:held], order[held:]
    try:
        foreground, found = data.foreground_masks(images, category, s.foreground)
    except InputError:
        if training:
            raise
        foreground, found = data.foreground_masks(images, category)    # the masks may be gone
    textures = data.Textures(root, s.crop)
    if training and kept.get("textures", textures.count) != textures.count:
        raise InputError(f"this run was begun with {kept['textures']} textures, now there are "
                         f"{textures.count}: {textures.source}; put --root back, or give another "
                         f"--name")
    where = "in memory" if images.in_memory and test.in_memory else "partly read from disk"
    notes = [f"{len(in_training)} normal images to train on, {len(held_out)} held out, {len(test)} "
             f"to test ({(images.bytes + test.bytes) / 1e6:.0f} MB, {where})",
             f"foreground: {found}", f"textures: {textures.source}",
             *(f"note: {note}" for note in category.notes), *changes]
    return Source(category, images, in_training, held_out, foreground, textures, test, masks, notes)


def truth_kept(items: list[data.Item], masks: np.ndarray) -> list[str]:
    """What the scoring grid and the centre crop leave of the ground truth, in a line; a second one
    names the masks that are empty from the start."""
    there, outside, regions, empty = 0, 0, np.zeros(2, int), []
    for item, mask in zip(items, masks):
        if item.mask:
            whole = data.read_mask(item.mask)
            there += 1
            regions += [ndimage.label(part, np.ones((3, 3)))[1] for part in (whole, mask)]
            outside += bool(whole.any()) and not mask.any()
            if not whole.any():
                empty.append(item.mask)
    notes = [f"ground truth: {regions[0]} regions in {there} masks, {regions[1]} where they are "
             f"scored" + (f"; {outside} masks lie outside the crop" if outside else "")]
    if empty:
        notes.append(f"warning: {len(empty)} masks of defects are empty, so these defects are not "
                     f"scored: {', '.join(map(str, empty[:9]))}")
    return notes


def name_in(category: data.Category, path: Path) -> str:
    """An image's path within its category."""
    return path.relative_to(category.root).as_posix() if path.is_relative_to(category.root) else \
        os.path.relpath(path, category.root)


def fingerprint(category: data.Category) -> str:
    """A hash of the names and sizes of a category's images."""
    digest = hashlib.sha1()
    for path in [*category.train, *(item.path for item in category.test)]:
        digest.update(os.fsencode(name_in(category, path)) + b" %d\n" % path.stat().st_size)
    return digest.hexdigest()


def keep_data(folder: Path, source: Source) -> None:
    """Write down which data a run is of, how many textures there are, and which of its images are
    held out."""
    category, paths = source.category, source.images.paths
    save_json(folder / "data.json", {
        "root": str(category.root.resolve()), "files": fingerprint(category),
        "textures": source.textures.count,
        **{title: [name_in(category, paths[k]) for k in indices]
           for title, indices in (("train", source.train), ("held_out", source.held_out))}})


def refuse_other_data(folder: Path, category: data.Category) -> dict:
    """The content of a run's data.json. Raises InputError where the run is of another folder, and
    not of the same files moved."""
    kept = read_json(folder / "data.json")
    if kept["root"] != str(category.root.resolve()) and kept["files"] != fingerprint(category):
        raise InputError(f"{folder} holds a run of {kept['root']}, not of {category.root}; give "
                         f"another --name or --out")
    return kept


def scoring_side(s: Settings) -> int:
    """Side of the scoring grid, less what the crop takes away."""
    return round(SCORING_GRID * s.crop / s.resize)


def steps_per_epoch(s: Settings, source: Source) -> int:
    """Steps in an epoch, whose last batch is what is left."""
    return math.ceil(len(source.train) / s.batch)


# ---------------------------------------------------------------- the model of a run

def build_model(s: Settings) -> TransFusion:
    """The model of these settings, seeded, on the CPU. Raises InputError for settings that it
    cannot be built of, as a T too small."""
    if s.method not in METHODS:
        raise InputError(f"method {s.method}: not known here; {', '.join(METHODS)}")
    torch.manual_seed(s.seed)
    try:
        model = METHODS[s.method](s)
    except ValueError as error:
        raise InputError(str(error))
    if s.init == "identity":
        start_from_identity(model.net)
    return model


@torch.no_grad()
def start_from_identity(net: ResUNet) -> None:
    """Initialise so that n_t = x_t and M_t is small everywhere, every residual branch silent.

    Most of an image is normal, so this is most of the answer; from torch's default values
    hundreds of steps pass before it is learned. The paper says nothing on initialisation.
    """
    for module in net.modules():
        if isinstance(module, (ResidualBlock, Attention)):
            last = module.conv2 if isinstance(module, ResidualBlock) else module.output
            last.weight.zero_()
            last.bias.zero_()
    last = net.up[-1].res.shortcut                     # sees [h, the input convolution]
    skip = last.in_channels - net.image_proj.out_channels
    for layer, source in ((net.image_proj, 0), (last, skip), (net.normal_head, 0)):
        layer.weight[:3].zero_()
        layer.bias[:3].zero_()
        centre = layer.kernel_size[0] // 2
        for channel in range(3):
            layer.weight[channel, source + channel, centre, centre] = 1
    net.mask_head[2].weight.mul_(0.1)
    net.mask_head[2].bias.fill_(-2)                    # M_t = 0.12, near the share of M


# ---------------------------------------------------------------- files

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
        if isinstance(error, torch.OutOfMemoryError):                # of a model that drew it
            raise
        cause = (isinstance(error, RuntimeError) and error.__context__) or error    # torch wraps it
        raise InputError(f"{path}: cannot be written ({cause}); make room and run it again, a "
                         f"training with --resume")


def save_json(path: Path, content: dict) -> None:
    text = json.dumps({k: None if isinstance(v, float) and math.isnan(v) else v
                       for k, v in content.items()}, indent=2)
    save_atomically(path, lambda file: file.write(text.encode() + b"\n"))


def save_csv(path: Path, rows: list[dict], columns: Sequence[str] = ()) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, columns or rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    content = text.getvalue().encode(errors="backslashreplace")      # a name that is no UTF-8
    save_atomically(path, lambda file: file.write(content))


def read_json(path: Path) -> dict:
    """Raises InputError for a file that is gone or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it or give --name")


# ---------------------------------------------------------------- the run folder

def run_folder(s: Settings) -> Path:
    """OUT/DATA/CATEGORY[-METHOD][-NAME]; DATA is a data set's name or the last of a folder's; no
    METHOD for the default one."""
    label = s.data if s.data in data.FOLDERS else Path(s.data).resolve().name
    method = "" if s.method == Settings.method else s.method
    return Path(s.out) / label / "-".join(filter(None, (s.category, method, s.name)))


def refuse_other_run(folder: Path, s: Settings, given: Sequence[str] = ("precision",),
                     longer: bool = False) -> None:
    """Raise InputError if the folder holds a run with other settings than these.

    given: the flags of the command line; a precision that was not asked for is not compared.
    longer: neither is the length. Where a run's data lies is `refuse_other_data`'s.
    """
    if not (folder / "config.json").exists():
        return
    # a setting the run is older than had its default
    there = {**dataclasses.asdict(Settings()), **read_json(folder / "config.json")}
    here = dataclasses.asdict(s)
    aside = {*NOT_COMPARED, *({"steps", "epochs"} if longer else ()),
             *({"precision"} if "precision" not in given else ()),
             *({"data"} if not {there["data"], s.data} & set(data.FOLDERS) else ())}
    other = [k for k in here if k not in aside and there[k] != here[k]]
    if other and set(other) <= {"steps", "epochs"}:
        raise InputError(f"{folder} holds a run of {there['steps'] or there['epochs']} "
                         f"{'steps' if there['steps'] else 'epochs'}; --resume trains it to this "
                         f"command's length, --name NAME begins another from the start")
    other = [f"{k} {there[k]} there, {here[k]} here" for k in other]
    if other:
        raise InputError(f"{folder} holds a run with other settings ({'; '.join(other[:4])}); "
                         f"give this one a --name")


@contextmanager
def locked(folder: Path):
    """Make the folder and hold it: a second process that wants it is refused with InputError.

    The lock, on `.lock` in it, ends with the process, however it ends. Of several ranks the first
    holds it. Where the file system has no locks nothing is held.
    """
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    if not RANK:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{folder} is in use by another process; wait for it, or choose "
                             f"another name")
        except (OSError, NotImplementedError):
            pass
    try:
        yield
    finally:
        lock.release()


def make_folder(folder: Path) -> None:
    """Raises InputError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error}); choose another --out")


# ---------------------------------------------------------------- checkpoints

def load_torch(path: Path) -> dict:
    """torch.load of plain types and tensors only. Raises InputError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist")
    except pickle.UnpicklingError:
        raise InputError(f"{path} is not a checkpoint: it holds other things than plain values and "
                         f"tensors, and was not opened, as that could run code")
    except Exception as error:
        first = str(error).split("\n")[0][:120]
        raise InputError(f"{path} is not a checkpoint ({type(error).__name__}: {first})")


def new_progress() -> dict:
    """What a checkpoint holds of a training beside the weights: steps done, seconds, the losses of
    the epoch's steps, a row for every epoch and for every evaluation; then what `count_step` keeps
    to tell a run-away, and how often the training went back."""
    return {"step": 0, "seconds": 0.0, "epoch_steps": [], "log": [], "eval": [],
            "running_mean": {}, "outliers": 0, "rollbacks": 0}


def save_checkpoint(path: Path, s: Settings, model: TransFusion, average, optimizer,
                    progress: dict) -> None:
    """Write a training's whole state, for `load_checkpoint`; progress: what goes beside the
    weights, `new_progress`'s at least. Raises InputError where the disk does not take it."""
    state = {"format": FORMAT, "settings": dataclasses.asdict(s), "model": model.state_dict(),
             "ema": average.module.state_dict() if average else None,
             "optimizer": optimizer.state_dict() if optimizer else None, **progress}
    save_atomically(path, lambda file: torch.save(state, file))


def add_to_checkpoint(path: Path, **content) -> None:
    """Write the checkpoint again with more in it."""
    state = {**load_torch(path), **content}
    save_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> tuple[Settings, dict]:
    """Settings and content of a checkpoint of ours. Raises InputError for another file, a newer
    version, or settings of a wrong type."""
    state = load_torch(path)
    parts = {"format": int, "settings": dict, "model": dict}
    if not isinstance(state, dict) or any(not isinstance(state.get(k), kind)
                                          for k, kind in parts.items()):
        raise InputError(f"{path} is not a checkpoint of train.py; the authors' go to --weights")
    if state["format"] > FORMAT:
        raise InputError(f"{path} was written by a newer version (format {state['format']}, this "
                         f"one reads up to {FORMAT}); update the code")
    known = {f.name: f.type for f in dataclasses.fields(Settings)}
    settings = {k: v for k, v in state["settings"].items() if k in known}
    wrong = [f"{k} {v!r}" for k, v in settings.items()
             if type(v) is not known[k] and not (known[k] is float and type(v) is int)]
    if wrong:
        raise InputError(f"{path} holds settings of a wrong type ({', '.join(wrong)[:100]})")
    return Settings(**settings), state


def load_state(model: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put weights into the model. Raises InputError for those of another one, and for NaN."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise InputError(f"{path} holds another architecture: {first[:160]}")
    if not all(weight.isfinite().all() for weight in state.values()):
        raise InputError(f"{path} holds weights that are not finite numbers; the file is damaged: "
                         f"train again, or use another checkpoint")


def load_model(path: Path, device: torch.device) -> tuple[TransFusion, Settings, dict]:
    """The trained model of a checkpoint, its averaged weights where it has them, in eval mode.

    One trained in bfloat16 computes in float32 where the device has no fast bfloat16: the scores
    hardly change, and the emulation takes many times as long.
    """
    s, state = load_checkpoint(path)
    if s.precision == "bf16" and not fast_bf16(device):
        s = dataclasses.replace(s, precision="float32")
    model = build_model(s)
    load_state(model, state["ema"] or state["model"], path)
    return model.to(device).eval(), s, state


# ---------------------------------------------------------------- the authors' checkpoints

# Our name of a head's parameter -> theirs; the trunk's names are the same, behind "model.".
AUTHORS_HEADS = {"anomaly_head.0.": "norm.", "anomaly_head.2.": "final.",
                 "normal_head.": "final_mean.", "mask_head.0.": "final_seg.norm.",
                 "mask_head.2.": "final_seg.conv."}


def authors_name(name: str) -> str:
    """Name of a ResUNet parameter in a state dict of the authors' format."""
    for ours, theirs in AUTHORS_HEADS.items():
        if name.startswith(ours):
            return "model." + theirs + name[len(ours):]
    return "model." + name


def load_authors_weights(model: TransFusion, state: dict[str, Tensor]) -> None:
    """Copy a state dict in the authors' format into `model` (which the authors' settings built).

    Raises ValueError that names every key missing, left over, of another shape or with values that
    are not finite; the model is not touched then.
    """
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("the weights are no state dict, names with a tensor each")
    ours = model.net.state_dict()
    theirs = {k: v for k, v in state.items() if not k.endswith("inv_freq")}    # a constant
    names = {name: authors_name(name) for name in ours}
    missing = sorted(set(names.values()) - set(theirs))
    extra = sorted(set(theirs) - set(names.values()))
    shapes = [f"{k} is {list(theirs[k].shape)}, not {list(ours[name].shape)}"
              for name, k in names.items() if k in theirs and theirs[k].shape != ours[name].shape]
    broken = [k for k, value in theirs.items() if not value.isfinite().all()]
    problems = [f"{title}: {', '.join(found)}" for title, found in
                (("missing", missing), ("not known", extra), ("of another shape", shapes),
                 ("not finite", broken)) if found]
    if problems:
        raise ValueError("the weights do not fit the network; " + "; ".join(problems))
    model.net.load_state_dict({name: theirs[k] for name, k in names.items()})
