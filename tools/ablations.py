"""Table 4 of the paper: every ablation trained and scored with the same short settings.

    python tools/ablations.py                                   demo fabric
    python tools/ablations.py --data mvtec --category bottle    with most other flags of train.py
    python tools/ablations.py --data mvtec --category all --preset paper    210 trainings, on GPUs

A category takes fourteen trainings, three of them of the full model with different seeds. Their run
folders go to runs/ablations/ (--out), and they are scored with all steps. Finished trainings are
skipped, interrupted ones continue. Each category gets a table4-DATA-CATEGORY.csv, which
04_ablations.ipynb reads. Its differences to the full model are printed beside the paper's; for
several categories the average of their differences follows.
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "notebooks")]

import tables
from data import find_categories
from evaluate import evaluate_run
from runs import refuse_other_settings, result_path, run_folder, saved_settings
from settings import Settings, names_of, parse
from support.console import InputError, exit_status
from support.files import read_json, save_csv
from support.layouts import find_category, root_folder
from train import train_category

# Unless --preset is given. One training takes four minutes on one core of a server CPU. The initial
# weights are torch's, as in the paper: weights that return the input leave nothing to L_n.
SHORT = ["--preset", "quick", "--resize", "64", "--batch", "8", "--steps", "500", "--init",
         "default"]
SEEDS = ("0", "1", "2")                     # of the full model; every ablation has the first
COLUMNS = ("image_auroc", "aupro", "pixel_auroc", "pixel_ap", "seconds_train", "seconds_per_image",
           "step", "precision", "hardware", "torch")           # of metrics.json, in the table


def conditions() -> list[tuple[str, str, str]]:
    """Condition, flag and seed of every row: the full model's seeds, then the paper's rows."""
    rows = [("full model", "", seed) for seed in SEEDS]
    return rows + [(row["condition"], row["flag"], SEEDS[0])
                   for row in tables.paper_table("table4_ablations") if row["flag"]]


def settings_of(argv: list[str]) -> tuple[Settings, list[str]]:
    """The settings, with the root of the data, and the categories.

    Raises InputError for whatever would fail only after the first training.
    """
    s, flags = parse(argv)
    reserved = sorted(flags.typed & {"name", "seed", "final_mask"})
    if reserved:
        raise InputError(f"--{' --'.join(reserved)}: set by ablations.py itself")
    s, names = find_categories(s)
    for name in names:
        category = find_category(s.data, name, root_folder(s.root))
        if not (category.annotated and category.test):
            raise InputError(f"{category.root}: Table 4 needs test images with ground truth")
    return s, names


def train_and_score(argv: list[str], flag: str, seed: str) -> tuple[Settings, dict]:
    """Settings and metrics of a condition, trained first unless that is done. Raises InputError."""
    name = "-".join(flag.strip("-").split()) or f"seed-{seed}"
    s, flags = parse([*argv, *flag.split(), "--seed", seed, "--name", name, "--resume"])
    if saved_settings(run_folder(s)):                      # of an earlier version, perhaps
        refuse_other_settings(run_folder(s), s, flags.typed)
    return s, train_category(s, flags)


def score_again(argv: list[str], flag: str, seed: str) -> tuple[Settings, dict]:
    """Settings and metrics of the full model with another --final-mask, which needs no training.

    Raises InputError.
    """
    full_model = [*argv, "--seed", seed, "--name", f"seed-{seed}"]
    (trained, _), (s, _) = parse(full_model), parse([*full_model, *flag.split()])
    folder = run_folder(trained)
    path = result_path(folder, s, trained)
    if path.exists():
        return s, read_json(path)
    names = (names_of("scoring", "machine") | {"data"}) - {"device"}
    return s, evaluate_run(folder, {name: getattr(s, name) for name in names}, s.device)


@exit_status
def main(argv: list[str]) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    if {"-h", "--help"} & set(argv):
        return print(__doc__)
    has_preset = any(word.startswith("--preset") for word in argv)
    argv = ["--out", "runs/ablations", "--infer-steps", "0", *([] if has_preset else SHORT), *argv]
    s, names = settings_of(argv)
    trainings = [row for row in conditions() if not row[1].startswith("--final-mask")]
    print(f"{len(names)} x {len(trainings)} trainings, {' '.join(names)}")
    all_rows = []
    for name in names:
        rows = []
        for k, (condition, flag, seed) in enumerate(conditions()):
            print(f"--- {name}, {k + 1} of {len(conditions())}: {condition} {flag} (seed {seed})",
                  flush=True)
            measure = score_again if flag.startswith("--final-mask") else train_and_score
            s, metrics = measure([*argv, "--root", s.root, "--category", name], flag, seed)
            label = run_folder(s).parent.name               # the data set, or the user's folder
            rows.append({"data": label, "category": name, "condition": condition, "flag": flag,
                         "seed": seed, **{key: metrics[key] for key in COLUMNS}})
        path = Path(s.out) / f"table4-{label}-{name}.csv"
        save_csv(path, rows)
        print(f"{tables.table4(rows)}\n\n{path}")
        all_rows += rows
    if len(names) > 1:
        print(tables.table4(all_rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
