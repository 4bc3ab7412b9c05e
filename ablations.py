"""Table 4 of the paper: every ablation trained and scored with the same short settings.

    python ablations.py                                     demo fabric
    python ablations.py --data mvtec --category bottle      with most other flags of train.py
    python ablations.py --data mvtec --category bottle --preset paper       a day a run, on a GPU

Fourteen runs, the full model with three seeds among them, in runs/ablations/ (--out). A finished
run is skipped, an interrupted one goes on where it stood. Ends in table4-DATA-CATEGORY.csv, which
04_ablations.ipynb reads, and prints the differences to the full model beside the paper's.
"""
import sys
from pathlib import Path

import figures
import train
from data import InputError, exit_status, find_category, root_folder
from runs import read_json, run_folder, save_csv
from settings import Settings, parse

# Unless a --preset is given: four minutes a run on one core of a server CPU.
SHORT = ["--preset", "quick", "--resize", "64", "--crop", "64", "--batch", "8", "--steps", "500"]
SEEDS = ("0", "1", "2")                  # of the full model; everything else has the first
KEPT = ("image_auroc", "aupro", "pixel_auroc", "pixel_ap", "seconds_train", "seconds_per_image",
        "step", "precision", "hardware", "torch")


def conditions() -> list[tuple[str, str, str]]:
    """Condition, flag and seed of every row: the full model's seeds, then the paper's rows."""
    rows = [("full model", "", seed) for seed in SEEDS]
    return rows + [(r["condition"], r["flag"], SEEDS[0])
                   for r in figures.paper_table("table4_ablations") if r["flag"]]


def measure(argv: list[str], flag: str, seed: str) -> tuple[Settings, dict]:
    """Settings and metrics of one condition, trained first where that is not done yet.

    A --final-mask is another scoring of the full model, not another training. Raises InputError.
    """
    scoring = flag.startswith("--final-mask")
    name = f"seed-{seed}" if scoring or not flag else "-".join(flag.strip("-").split())
    doing = "--eval" if scoring else "--resume"
    s, flags = parse([*argv, *flag.split(), "--seed", seed, "--name", name, doing])
    path = run_folder(s) / (f"metrics-final_mask{s.final_mask}.json" if scoring else "metrics.json")
    if not (scoring and path.exists()):
        train.command(s, flags)
    return s, read_json(path)


def check(argv: list[str]) -> None:
    """Refuse what would fail after the first training. Raises InputError."""
    s, flags = parse(argv)
    ours = flags.given & {"name", "seed", "final_mask"}
    if ours or flags.eval:
        raise InputError(f"--{' --'.join(sorted(ours) or ['eval'])}: set by ablations.py itself")
    if s.category in ("", "all"):
        raise InputError("--category: Table 4 is made for one category at a time")
    if s.data != "demo":                                   # which is drawn when it is needed
        category = find_category(s.data, s.category, root_folder(s.root))
        if not (category.annotated and category.test):
            raise InputError(f"{category.root}: Table 4 needs test images with ground truth")


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    preset = any(word.startswith("--preset") for word in argv)
    argv = ["--out", "runs/ablations", *([] if preset else SHORT), *argv]
    check(argv)
    rows = []
    for k, (condition, flag, seed) in enumerate(conditions()):
        print(f"--- {k + 1} of {len(conditions())}: {condition} {flag} (seed {seed})", flush=True)
        s, found = measure(argv, flag, seed)
        label = run_folder(s).parent.name                  # the data set, or the user's folder
        rows.append({"data": label, "category": s.category, "condition": condition, "flag": flag,
                     "seed": seed, **{key: found[key] for key in KEPT}})
    path = Path(s.out) / f"table4-{label}-{s.category}.csv"
    save_csv(path, rows)
    print(figures.table4(rows))
    print(f"\n{path}")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
