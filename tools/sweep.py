"""Whether training is stable on data that no preset was tuned on: short trainings on many kinds.

    python tools/sweep.py --root data                   the demo, and what lies under the root
    python tools/sweep.py --root data --workers 15      15 trainings at a time, a core each

Trains 800 steps of the cpu preset on each category: the demo's, MVTec AD's, and the classes of DTD,
with every image cut in four. Then it trains 500 steps on the first five of them at three times the
learning rate, once in bfloat16 and once in float32. Flags of train.py apply to every training.
Writes sweep.csv to --out (default runs/sweep), a row for each training: the largest attention
logit, the largest gradient norm before clipping, the number of returns to a checkpoint, and the
mean losses of the last epoch.
"""
import argparse
import dataclasses
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

import demo
from data import load_run_data
from runs import build_model, new_run
from settings import Settings, parse
from support.console import InputError, exit_status, progress_bar
from support.devices import hardware
from support.files import make_folder, save_csv
from support.images import open_image
from support.layouts import list_categories, root_folder
from train import train
from transfusion import Attention

STEPS = 800
# The trainings at a high learning rate: on how many categories, their steps, the factor of --lr.
HARD_CATEGORIES, HARD_STEPS, HARD_FACTOR = 5, 500, 3.0
COLUMNS = ("data", "category", "lr", "precision", "steps", "seed", "end", "returns",
           "largest_logit", "largest_gradient", "L_n", "L_m", "L_a", "L_c", "hardware", "torch")


def cut_textures(dtd_images: Path, out: Path) -> None:
    """Make a category of each class of DTD: every image's four quarters as normal images."""
    classes = sorted(path for path in dtd_images.iterdir() if path.is_dir())
    for folder in progress_bar(classes, desc="cutting"):
        category = out / folder.name
        if category.exists():
            continue
        part = out / f"{folder.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        make_folder(part / "train" / "good")
        for path in sorted(folder.glob("*.jpg")):
            image = open_image(path).convert("RGB")
            w, h = image.width // 2, image.height // 2
            for k in range(4):
                x, y = k % 2 * w, k // 2 * h
                image.crop((x, y, x + w, y + h)).save(part / "train/good" / f"{path.stem}_{k}.png")
        part.rename(category)


def conditions(s: Settings, out: Path) -> list[Settings]:
    """The settings of every training: each category, then those at a high learning rate."""
    root = root_folder(s.root)
    demo.write(Path("data/demo"))
    categories = [("demo", name, "data") for name in demo.DEFECTS]
    try:
        categories += [("mvtec", name, s.root) for name in list_categories("mvtec", root)]
    except InputError as error:
        print(f"without MVTec AD: {error}")
    if (root / "dtd" / "images").is_dir():
        cut_textures(root / "dtd" / "images", out / "dtd")
        cut = str(out / "dtd")
        categories += [(cut, name, s.root) for name in list_categories(cut, root)]
    each = [dataclasses.replace(s, data=data, category=name, root=folder)
            for data, name, folder in categories]
    hard = [dataclasses.replace(one, lr=HARD_FACTOR * s.lr, steps=HARD_STEPS, precision=precision)
            for one in each[:HARD_CATEGORIES] for precision in ("bf16", "float32")]
    return each + hard


def measure(work: tuple[Settings, Path]) -> dict:
    """Train with these settings, in a folder of their own in `out`. Returns a row of the table."""
    s, out = work
    torch.set_num_threads(1)
    folder = out / f"{Path(s.data).name}-{s.category}-lr{s.lr:g}-{s.precision}"
    make_folder(folder)
    largest_logit = torch.zeros((), device=s.device)

    def watch(layer, inputs, output):
        q, k, _ = output.detach().float().chunk(3, dim=-1)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        largest_logit.copy_(torch.maximum(largest_logit, logits.abs().amax()))       # NaN stays

    row = {"data": Path(s.data).name, "category": s.category, "lr": s.lr,
           "precision": s.precision, "steps": s.steps, "seed": s.seed}
    try:
        with open(folder / "log.txt", "w") as file, redirect_stdout(file), redirect_stderr(file):
            run = new_run(folder, s, load_run_data(s), build_model(s))
            for module in run.model.modules():
                if isinstance(module, Attention):
                    module.projection.register_forward_hook(watch)
            train(run)
        row |= {"end": "finished", "returns": run.rollbacks,
                "largest_gradient": f"{max(epoch['gradient'] for epoch in run.log):.4g}",
                **{f"L_{k}": f"{run.log[-1][k]:.4g}" for k in "nmac"}}
    except InputError as error:
        row |= {"end": str(error)[:60]}
    return row | {"largest_logit": f"{largest_logit.item():.4g}", "hardware": hardware(s.device),
                  "torch": torch.__version__}


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Short trainings on many kinds of data.",
                                     epilog="Any flag of train.py, too.")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time (default 2)")
    parser.add_argument("--out", type=lambda text: Path(text).expanduser(),
                        default=Path("runs/sweep"),
                        help="folder of the table and the runs (default runs/sweep)")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags, train_flags = command_line().parse_known_args(argv)
    s, _ = parse(["--preset", "cpu", "--steps", str(STEPS), "--category", "each", *train_flags])
    make_folder(flags.out)
    work = [(one, flags.out) for one in conditions(s, flags.out)]
    rows = []
    with get_context("spawn").Pool(flags.workers) as pool:
        for row in pool.imap(measure, work):
            rows.append(row)
            print(", ".join(f"{k} {row[k]}" for k in COLUMNS[:-2] if k in row), flush=True)
            save_csv(flags.out / "sweep.csv", rows, COLUMNS)
    stable = sum(row["end"] == "finished" and not row["returns"] for row in rows)
    print(f"{stable} of {len(rows)} trainings ended without a return to a checkpoint; "
          f"{flags.out / 'sweep.csv'}")


if __name__ == "__main__":
    sys.exit(main())
