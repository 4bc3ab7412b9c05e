"""What several test modules share: small data, small models, commands and what they leave behind."""
import csv
import json
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

import data
import metrics
import predict
import train
from settings import Settings
from support import layouts
from transfusion import PE_CHANNELS, Block, ResUNet, TimeEmbedding, TransFusion

HERE = Path(__file__).parent
ROOT = HERE.parent                                       # of the repository

# Flags of a training that takes a second.
TINY = ["--resize", "32", "--crop", "32", "--channels", "8", "--precision", "float32", "--device",
        "cpu", "--batch", "4", "--preset", "quick", "--infer-steps", "2"]
# The authors' reading, as arguments of TransFusion.
AUTHORS = dict(pe="row", authors_schedule=True, anomaly_target="beta_eps", soft_consistency=False)


# ---------------------------------------------------------------- files

def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name, without its lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def files_in(folder: Path) -> dict[str, bytes]:
    """The files of a folder and of those in it, by path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path) as file:
        return list(csv.DictReader(file))


def png(path: Path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def picture(value=100, size=32) -> np.ndarray:
    return np.full((size, size, 3), value)


# ---------------------------------------------------------------- data

def mvtec_tree(root: Path, masks: bool = True) -> Path:
    """A category of four good training images, a good one and two defective ones for the test."""
    for k in range(4):
        png(root / "train" / "good" / f"{k:03}.png", picture(k + 1))
    png(root / "test" / "good" / "000.png", picture(10))
    for k in range(2):
        png(root / "test" / "cut" / f"{k:03}.png", picture(20))
        if masks:
            mask = np.zeros((32, 32))
            mask[4:8, 4:8] = 1 + k
            png(root / "ground_truth" / "cut" / f"{k:03}_mask.png", mask)
    return root


def write_parts(folder: Path) -> None:
    """A small category of the user's own, folder/parts/bolt."""
    rng = np.random.default_rng(0)
    root = folder / "parts" / "bolt"

    def normal():
        return rng.integers(90, 110, (40, 40, 3))

    for k in range(12):
        png(root / f"train/good/{k}.png", normal())
    for k in range(2):
        png(root / f"test/good/{k}.png", normal())
        image, mask = normal(), np.zeros((40, 40))
        image[8:16, 8:16], mask[8:16, 8:16] = 220, 255
        png(root / f"test/dent/{k}.png", image)
        png(root / f"ground_truth/dent/{k}_mask.png", mask)


def settings_for(category: Path, **changes) -> Settings:
    """Settings of a tiny run of a category's folder."""
    return Settings(data=str(category.parent), category=category.name, root=str(category.parent),
                    resize=16, crop=16, foreground="none", **changes)


def write_photos(folder: Path, count: int = 2) -> Path:
    """Photos to inspect: 0.png, 1.png ..."""
    for k in range(count):
        png(folder / f"{k}.png", picture(50 * k, 40))
    return folder


# ---------------------------------------------------------------- commands

def run_predict(run, *argv) -> int:
    """predict.py with one network call an image. Returns its exit status."""
    return predict.main([str(run), *map(str, argv), "--device", "cpu", "--infer-steps", "1"])


def argv_for(parts: Path, *more: str) -> list[str]:
    """Arguments of a tiny training of parts/bolt; its folder is parts/../runs/parts/bolt."""
    return ["--data", str(parts), "--category", "bolt", "--out", str(parts.parent / "runs"), *TINY,
            "--steps", "3", "--root", str(parts.parent), *more]


def run_of(parts: Path, name: str = "") -> Path:
    """The folder of the run that `argv_for` makes, or of the one with this --name."""
    return parts.parent / "runs" / "parts" / "-".join(filter(None, ("bolt", name)))


def moments_of(state: dict) -> list[torch.Tensor]:
    """The moments and step counts in the state of an optimizer, or of two that are used as one."""
    return [moment for value in state.values() for moment in
            (moments_of(value) if isinstance(value, dict) else [value])
            if isinstance(moment, torch.Tensor)]


def interrupt(monkeypatch, batch: int) -> None:
    """Let Ctrl-C arrive while a training makes this batch of its own, counted from 1."""
    make_batch, steps = train.make_batch, []

    def interrupted(*args):
        steps.append(args)
        if len(steps) == batch:
            signal.raise_signal(signal.SIGINT)
        return make_batch(*args)

    monkeypatch.setattr(train, "make_batch", interrupted)


def refused(capsys, argv: list[str], *expected: str, command=train.main) -> None:
    """The command says one line that holds all of `expected`, and exits with 2."""
    try:
        status = command(argv)
    except SystemExit as stop:                                       # argparse
        status = stop.code
    error = capsys.readouterr().err.split("\r")[-1].strip()
    lines = [line for line in error.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and "Traceback" not in error, error
    for part in expected:
        assert part in lines[0], lines[0]


# ---------------------------------------------------------------- models

class ShallowUNet(ResUNet):
    """A `ResUNet` of two residual blocks at full resolution and a tenth of its time.

    For the tests of what surrounds a network: commands, files, checkpoints, the loop.
    """

    def __init__(self, channels: int = 64, pe: str = "2d", guide: bool = True,
                 attention_norm: bool = False, recompute: bool = False, side: int = 0):
        torch.nn.Module.__init__(self)
        self.pe, self.guide, self.recompute, self.side = pe, guide, recompute, side
        c, c_time = channels, 4 * channels
        self.image_proj = conv(3 + int(guide) + PE_CHANNELS[pe], c)
        self.time_emb = TimeEmbedding(c)
        self.down = torch.nn.ModuleList()
        self.middle = Block(c, c, c_time, False, attention_norm)
        self.up = torch.nn.ModuleList([Block(2 * c, c, c_time, False, attention_norm)])
        self.anomaly_head = torch.nn.Sequential(torch.nn.GroupNorm(8, c), torch.nn.SiLU(),
                                                conv(c, 3))
        self.normal_head = conv(c, 3)
        self.mask_head = torch.nn.Sequential(torch.nn.BatchNorm2d(c), torch.nn.SiLU(), conv(c, 1))


def conv(c_in: int, c_out: int) -> torch.nn.Conv2d:
    return torch.nn.Conv2d(c_in, c_out, 3, padding=1)


def tiny(**kw) -> TransFusion:
    torch.manual_seed(0)
    return TransFusion(8, **kw)


def authors_state(channels: int = 32) -> dict[str, torch.Tensor]:
    """The fixture's weights, filled by the rule under which its numbers were computed."""
    state = {}
    keys = json.loads((HERE / f"authors_keys_ch{channels}.json").read_text())
    for k, (name, (shape, kind)) in enumerate(keys.items()):
        r = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + k))
        if kind == "int64":
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith(("running_var", "inv_freq")):
            state[name] = torch.ones(shape)
        elif len(shape) >= 2:
            state[name] = r * r[0].numel() ** -0.5 * (0.1 if "projection" in name else 0.7)
        else:
            state[name] = 1 + 0.1 * r if name.endswith("weight") else 0.1 * r
    return state


def mean_std_model(root: Path, category: str, size: int = 128):
    """A model without a network: each pixel's deviation from the training images' mean.

    Returns the category and its metrics.
    """
    category = layouts.find_category("demo", category, root)
    normal = data.Images(category.train, size, size)[:].float()
    test = data.Images([item.path for item in category.test], size, size)[:].float()
    deviation = ((test - normal.mean(0)).abs() / (normal.std(0) + 1)).mean(1).numpy()
    maps = ndimage.uniform_filter(deviation, (0, 7, 7))
    maps = np.repeat(np.repeat(maps, 256 // size, 1), 256 // size, 2)
    masks = np.stack([data.load_mask(item, 256, 256) for item in category.test])
    return category, metrics.evaluate(category.labels, maps.max((1, 2)), maps, masks)
