"""How well the threshold rule works: false alarm and detection rate over random splits.

    python tools/thresholds.py runs/demo/fabric runs/demo/blister --csv results/thresholds.csv

No training of a run has seen its held-out images or the good test images. These are split anew at
random, many times: as many as were held out give a threshold, and it is applied to the others and
to the defective images. The table has two rows for a run: the rule "held-out" takes the threshold
of the held-out images alone, the rule "both" is `metrics.threshold`.
"""
import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

from data import load_run_data
from evaluate import calibration_scores
from metrics import CalibrationScores, synthetic_detection_rate, threshold
from runs import load_model
from support.console import InputError, exit_status
from support.devices import pick_device
from support.files import save_csv


def measure_rules(calibration: CalibrationScores, good: np.ndarray, defective: np.ndarray,
                  false_alarms: float, splits: int) -> list[dict]:
    """A row for each rule. good, defective: the test set's scores, [N] each."""
    unseen, count = np.concatenate([calibration.held_out, good]), len(calibration.held_out)
    rows = []
    for rule, training in (("held-out", []), ("both", calibration.training)):
        rates = []
        for k in range(splits):
            shuffled = np.random.default_rng(k).permutation(unseen)
            split = replace(calibration, held_out=shuffled[:count].tolist(), training=training)
            limit = threshold(split, false_alarms)
            rates.append((limit.rate, np.mean(shuffled[count:] > limit.value),
                          np.mean(defective > limit.value),
                          synthetic_detection_rate(split, limit)))
        promised, alarms, detected, synthetic = np.array(rates).T
        rows.append({"rule": rule, "held_out": count, "training": len(training), "splits": splits,
                     "promised": promised.mean(), "false_alarms_median": np.median(alarms),
                     "false_alarms_mean": alarms.mean(), "false_alarms_max": alarms.max(),
                     "detected_median": np.median(detected), "detected_mean": detected.mean(),
                     "detected_min": detected.min(), "synthetic_found": synthetic.mean()})
    return rows


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Try the threshold rule on finished runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="finished run folders")
    parser.add_argument("--root", help="folder of the data sets (default: each run's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--splits", type=int, default=20, help="number of splits (default 20)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags = command_line().parse_args(argv)
    rows = []
    for folder in flags.runs:
        model, s, _ = load_model(folder / "last.pt", pick_device(flags.device))
        s = replace(s, root=flags.root or s.root)
        if not (folder / "scores.csv").exists():
            raise InputError(f"{folder} holds no scores.csv; give a finished run with a test set")
        with open(folder / "scores.csv", newline="") as file:
            table = list(csv.DictReader(file))
        scores, labels = (np.array([float(row[k]) for row in table]) for k in ("score", "label"))
        calibration = calibration_scores(model, s, load_run_data(s, folder=folder))
        if not calibration:
            raise InputError(f"{folder}: no image was held out")
        for row in measure_rules(calibration, scores[labels == 0], scores[labels == 1],
                                 s.false_alarms, flags.splits):
            rows.append({"data": s.data, "category": s.category, "preset": s.preset,
                         "seed": s.seed, **{k: round(v, 4) if isinstance(v, float) else v
                                            for k, v in row.items()}})
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if flags.csv:
        save_csv(flags.csv, rows)


if __name__ == "__main__":
    sys.exit(main())
