"""Table 4 of the paper: every ablation trained and scored with the same short settings.

    python tools/ablations.py                                   demo fabric
    python tools/ablations.py --data mvtec --category bottle    with most other flags of train.py
    python tools/ablations.py --data mvtec --category all --preset paper    210 trainings, on GPUs

Fourteen trainings a category, the full model with three seeds among them, in runs/ablations/
(--out), scored in all steps; finished ones are skipped, interrupted ones go on. Writes a
table4-DATA-CATEGORY.csv a category, which 04_ablations.ipynb reads, and prints the differences to
the full model beside the paper's, of several categories their average at the end.
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "notebooks")]

import tables
import train
from data import find_category, root_folder
from runs import read_json, run_folder, save_csv
from settings import InputError, Settings, exit_status, parse

# Unless a --preset is given: four minutes a run on one core of a server CPU. From torch's initial
# weights, as in the paper's: those that return the input leave nothing to L_n.
SHORT = ["--preset", "quick", "--resize", "64", "--batch", "8", "--steps", "500", "--init",
         "default"]
SEEDS = ("0", "1", "2")                  # of the full model; everything else has the first
KEPT = ("image_auroc", "aupro", "pixel_auroc", "pixel_ap", "seconds_train", "seconds_per_image",
        "step", "precision", "hardware", "torch")


def conditions() -> list[tuple[str, str, str]]:
    """Condition, flag and seed of every row: the full model's seeds, then the paper's rows."""
    rows = [("full model", "", seed) for seed in SEEDS]
    return rows + [(r["condition"], r["flag"], SEEDS[0])
                   for r in tables.paper_table("table4_ablations") if r["flag"]]


def measure(argv: list[str], flag: str, seed: str) -> tuple[Settings, dict]:
    """Settings and metrics of one condition, trained first where that is not done yet.

    A --final-mask is another scoring of the full model, not another training. Raises InputError.
    """
    scoring = flag.startswith("--final-mask")
    name = f"seed-{seed}" if scoring or not flag else "-".join(flag.strip("-").split())
    s, flags = parse([*argv, *flag.split(), "--seed", seed, "--name", name,
                      "--eval" if scoring else "--resume"])
    path = run_folder(s) / (f"metrics-final_mask{s.final_mask}.json" if scoring else "metrics.json")
    if not scoring:
        train.train_category(s, flags)
    elif not path.exists():
        train.score_again(s, flags)
    return s, read_json(path)


def check(argv: list[str]) -> tuple[Settings, list[str]]:
    """Settings with the root of the data, and the categories. Raises InputError for what would fail
    after the first training."""
    s, flags = parse(argv)
    ours = flags.given & {"name", "seed", "final_mask"}
    if ours or flags.eval:
        raise InputError(f"--{' --'.join(sorted(ours) or ['eval'])}: set by ablations.py itself")
    s, names = train.find_categories(s)
    for name in names:
        category = find_category(s.data, name, root_folder(s.root))
        if not (category.annotated and category.test):
            raise InputError(f"{category.root}: Table 4 needs test images with ground truth")
    return s, names


@exit_status
def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    preset = any(word.startswith("--preset") for word in argv)
    argv = ["--out", "runs/ablations", "--infer-steps", "0", *([] if preset else SHORT), *argv]
    s, names = check(argv)
    trained = [row for row in conditions() if not row[1].startswith("--final-mask")]
    print(f"{len(names)} x {len(trained)} trainings, {' '.join(names)}")
    every = []
    for name in names:
        rows = []
        for k, (condition, flag, seed) in enumerate(conditions()):
            print(f"--- {name}, {k + 1} of {len(conditions())}: {condition} {flag} (seed {seed})",
                  flush=True)
            s, found = measure([*argv, "--root", s.root, "--category", name], flag, seed)
            label = run_folder(s).parent.name              # the data set, or the user's folder
            rows.append({"data": label, "category": name, "condition": condition, "flag": flag,
                         "seed": seed, **{key: found[key] for key in KEPT}})
        path = Path(s.out) / f"table4-{label}-{name}.csv"
        save_csv(path, rows)
        print(f"{tables.table4(rows)}\n\n{path}")
        every += rows
    if len(names) > 1:
        print(tables.table4(every))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
