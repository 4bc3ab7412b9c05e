"""How well the threshold rule works: false alarm and detection rate over random deals.

    python tools/thresholds.py runs/demo/fabric runs/demo/blister --csv results/thresholds.csv

No training of a run has seen its held-out images or the good test images. These are dealt anew at
random, many times: as many as were held out give a threshold, and it is applied to the others and
to the defective images. Three rules are compared: "held-out"
takes the held-out images alone; "higher", the earlier rule, the higher one of that threshold and of
that of the held-out and training images together; "present" is `metrics.threshold`. The table has a
row for each rule of a run; --deals-csv writes a row for each deal, with the rates of "higher" and
"present" side by side. For the columns with an odd one, the highest held-out score of every deal is
doubled.
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
from metrics import (CalibrationScores, Threshold, normal_threshold, synthetic_detection_rate,
                     threshold)
from runs import load_model
from support.console import InputError, exit_status
from support.devices import pick_device
from support.files import rounded, save_csv


def higher_threshold(scores: CalibrationScores, false_alarms: float) -> Threshold:
    """The rule up to commit b15b77d: never below the threshold of the held-out images alone."""
    return max((normal_threshold(np.array(some), false_alarms)
                for some in (scores.held_out, scores.held_out + scores.training)),
               key=lambda limit: (limit.value, limit.rate))


def held_out_threshold(scores: CalibrationScores, false_alarms: float) -> Threshold:
    return normal_threshold(np.array(scores.held_out), false_alarms)


RULES = {"held-out": held_out_threshold, "higher": higher_threshold, "present": threshold}


def deal(calibration: CalibrationScores, good: np.ndarray, seed: int, odd: bool):
    """Held-out and good test images dealt anew: CalibrationScores, and the scores of the others.

    odd: the highest of the new held-out scores counts twice.
    """
    count = len(calibration.held_out)
    shuffled = np.random.default_rng(seed).permutation([*calibration.held_out, *good])
    held_out = sorted(shuffled[:count].tolist())
    if odd:
        held_out[-1] *= 2
    return replace(calibration, held_out=held_out), shuffled[count:]


def measure_rules(calibration: CalibrationScores, good: np.ndarray, defective: np.ndarray,
                  false_alarms: float, deals: int) -> list[dict]:
    """A row for each rule and deal. good, defective: the test set's scores, [N] each."""
    rows = []
    for seed in range(deals):
        for rule, function in RULES.items():
            dealt, others = deal(calibration, good, seed, odd=False)
            limit = function(dealt, false_alarms)
            odd = function(deal(calibration, good, seed, odd=True)[0], false_alarms)
            rows.append({"deal": seed, "rule": rule, "promised": limit.rate,
                         "false_alarms": np.mean(others > limit.value),
                         "detected": np.mean(defective > limit.value),
                         "synthetic": synthetic_detection_rate(dealt, limit),
                         "detected_odd": np.mean(defective > odd.value)})
    return rows


def summarise(rows: list[dict], calibration: CalibrationScores) -> list[dict]:
    """A row for each rule, over all deals."""
    summary = []
    for rule in RULES:
        promised, alarms, detected, synthetic, odd = (
            np.array([row[name] for row in rows if row["rule"] == rule])
            for name in ("promised", "false_alarms", "detected", "synthetic", "detected_odd"))
        summary.append({
            "rule": rule, "held_out": len(calibration.held_out),
            "training": 0 if rule == "held-out" else len(calibration.training),
            "deals": len(promised), "promised": promised.mean(),
            "false_alarms_median": np.median(alarms), "false_alarms_mean": alarms.mean(),
            "false_alarms_max": alarms.max(), "detected_median": np.median(detected),
            "detected_mean": detected.mean(), "detected_min": detected.min(),
            "synthetic_found": synthetic.mean(), "detected_with_an_odd_one": odd.mean()})
    return summary


def side_by_side(rows: list[dict]) -> list[dict]:
    """A row for each deal: the rates of the earlier and the present rule."""
    table = {}
    for row in rows:
        columns = table.setdefault(row["deal"], {"deal": row["deal"]})
        if row["rule"] != "held-out":
            columns.update({f"{name}_{row['rule']}": row[name]
                            for name in ("false_alarms", "detected", "detected_odd")})
    return list(table.values())


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Try the threshold rule on finished runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="finished run folders")
    parser.add_argument("--root", help="folder of the data sets (default: each run's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--deals", type=int, default=20, help="deals of a run (default 20)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--deals-csv", type=Path, metavar="FILE", help="write a row for each deal")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags = command_line().parse_args(argv)
    rows, deals = [], []
    for folder in flags.runs:
        model, s, state = load_model(folder / "last.pt", pick_device(flags.device))
        s = replace(s, root=flags.root or s.root)
        if not (folder / "scores.csv").exists():
            raise InputError(f"{folder} holds no scores.csv; give a finished run with a test set")
        with open(folder / "scores.csv", newline="") as file:
            table = list(csv.DictReader(file))
        scores, labels = (np.array([float(row[k]) for row in table]) for k in ("score", "label"))
        saved = state.get("calibration")                   # the training's, or computed again
        calibration = CalibrationScores(**saved) if saved else \
            calibration_scores(model, s, load_run_data(s, folder=folder))
        if not calibration:
            raise InputError(f"{folder}: no image was held out")
        run = {"data": s.data, "category": s.category, "method": s.method, "preset": s.preset,
               "seed": s.seed}
        measured = measure_rules(calibration, scores[labels == 0], scores[labels == 1],
                                 s.false_alarms, flags.deals)
        deals += [rounded({**run, **row}) for row in side_by_side(measured)]
        for row in summarise(measured, calibration):
            rows.append(rounded({**run, **row}))
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if flags.csv:
        save_csv(flags.csv, rows)
    if flags.deals_csv:
        save_csv(flags.deals_csv, deals)


if __name__ == "__main__":
    sys.exit(main())
