"""Does a training hold on data that nobody tuned on? Short trainings on many kinds of it.

    python tools/sweep.py --root data                   the demo, and what is found under the root
    python tools/sweep.py --root data --workers 15      so many at a time (default 2, a core each)

800 steps of the cpu preset on each category: the demo's, MVTec AD's, and DTD's classes, each image
cut in four; then 500 steps of five of them at three times the learning rate, in bfloat16 and in
float32. Other flags of train.py go to every training. Writes sweep.csv to --out (default
runs/sweep), a row a training: the largest attention logit, the largest norm of a gradient before
clipping, steps skipped, returns to a checkpoint, and the last epoch's mean losses.
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
import train
from data import list_categories, open_image, root_folder
from runs import load_source, make_folder, save_csv
from settings import InputError, Settings, exit_status, hardware, parse, progress_bar
from transfusion import Attention

STEPS, HARD_STEPS, HARDER = 800, 500, 3.0               # steps, steps of the hard ones, their rate
HARD = 5                                                # so many categories also go the hard way


def cut_textures(source: Path, out: Path) -> None:
    """A category of each of DTD's classes: every image's four quarters as normal images."""
    for folder in progress_bar(sorted(p for p in source.iterdir() if p.is_dir()), desc="cutting"):
        normal = out / folder.name / "train" / "good"
        if normal.exists():
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
        part.rename(normal.parents[1])


def conditions(s: Settings, out: Path) -> list[Settings]:
    """The settings of every training: each category, then the hard ones."""
    root = root_folder(s.root)
    demo.write(Path("data/demo"))
    found = [("demo", name, "data") for name in demo.DEFECTS]
    try:
        found += [("mvtec", name, s.root) for name in list_categories("mvtec", root)]
    except InputError as error:
        print(f"without MVTec AD: {error}")
    if (root / "dtd" / "images").is_dir():
        cut_textures(root / "dtd" / "images", out / "dtd")
        cut = str(out / "dtd")
        found += [(cut, name, s.root) for name in list_categories(cut, root)]
    each = [dataclasses.replace(s, data=data, category=name, root=where)
            for data, name, where in found]
    hard = [dataclasses.replace(one, lr=HARDER * s.lr, steps=HARD_STEPS, precision=precision)
            for one in each[:HARD] for precision in ("bf16", "float32")]
    return each + hard


def measure(work: tuple[Settings, Path]) -> dict:
    """Train with these settings: a row of the table."""
    s, out = work
    torch.set_num_threads(1)
    model = train.start_model(s, "")
    largest = torch.zeros((), device=s.device)

    def watch(layer, inputs, output):
        q, k, _ = output.detach().float().chunk(3, dim=-1)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        largest.copy_(torch.maximum(largest, logits.abs().amax()))       # NaN stays

    for module in model.modules():
        if isinstance(module, Attention):
            module.projection.register_forward_hook(watch)
    folder = out / f"{Path(s.data).name}-{s.category}-lr{s.lr:g}-{s.precision}"
    make_folder(folder)
    row = {"data": Path(s.data).name, "category": s.category, "lr": s.lr,
           "precision": s.precision, "steps": s.steps, "seed": s.seed}
    try:
        with open(folder / "log.txt", "w") as file, redirect_stdout(file), redirect_stderr(file):
            _, progress, _ = train.train(model, s, load_source(s), folder)
        log = progress["log"]
        row |= {"end": "finished", "returns": progress["rollbacks"],
                "skipped": sum(epoch["skipped"] for epoch in log),
                "largest_gradient": f"{max(epoch['gradient'] for epoch in log):.4g}",
                **{f"L_{k}": f"{log[-1][k]:.4g}" for k in "nmac"}}
    except InputError as error:
        row |= {"end": str(error)[:60]}
    return row | {"largest_logit": f"{largest.item():.4g}", "hardware": hardware(s.device),
                  "torch": torch.__version__}


COLUMNS = ("data", "category", "lr", "precision", "steps", "seed", "end", "returns", "skipped",
           "largest_logit", "largest_gradient", "L_n", "L_m", "L_a", "L_c", "hardware", "torch")


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    parser = argparse.ArgumentParser(description="Short trainings on many kinds of data.",
                                     epilog="Any flag of train.py, too.")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time (default 2)")
    parser.add_argument("--out", type=lambda text: Path(text).expanduser(),
                        default=Path("runs/sweep"),
                        help="where the table and the runs go (default runs/sweep)")
    flags, others = parser.parse_known_args(argv)
    s, _ = parse(["--preset", "cpu", "--steps", str(STEPS), "--category", "each", *others])
    make_folder(flags.out)
    work = [(one, flags.out) for one in conditions(s, flags.out)]
    rows = []
    with get_context("spawn").Pool(flags.workers) as pool:
        for row in pool.imap(measure, work):
            rows.append(row)
            print(", ".join(f"{k} {row[k]}" for k in COLUMNS[:-2] if k in row), flush=True)
            save_csv(flags.out / "sweep.csv", rows, COLUMNS)
    held = sum(row["end"] == "finished" and not row["returns"] for row in rows)
    print(f"{held} of {len(rows)} trainings held; {flags.out / 'sweep.csv'}")


if __name__ == "__main__":
    sys.exit(main())
