"""What a threshold is worth: false alarms and detections where the held-out images are dealt anew.

    python tools/thresholds.py runs/demo/fabric runs/demo/blister --csv results/thresholds.csv

The images that no training of a run has seen, its held-out ones and the test set's good ones, are
dealt anew: as many as were held out give a threshold, the others and the defective ones are judged
by it. A row for each run and rule: "held-out", the threshold of the held-out images alone, and
"both", that of `evaluate.threshold`.
"""
import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from evaluate import normal_scores, threshold
from runs import load_model, load_source, save_csv
from settings import InputError, exit_status, pick_device


def deal(normal: dict, good: np.ndarray, bad: np.ndarray, s, deals: int) -> list[dict]:
    """Two rows, of the rule with held-out images alone and of the one with the training's too."""
    unseen, count = np.concatenate([normal["images"], good]), len(normal["images"])
    synthetic = np.array(normal["synthetic"])
    rows = []
    for rule, trained in (("held-out", []), ("both", normal["trained"])):
        seen = []
        for k in range(deals):
            order = np.random.default_rng(k).permutation(unseen)
            found = threshold({"images": order[:count].tolist(), "trained": trained}, s)
            seen.append((found.rate, *(np.mean(scores > found.value)
                                       for scores in (order[count:], bad, synthetic))))
        promised, alarms, detected, share = np.array(seen).T
        rows.append({"rule": rule, "held_out": count, "training": len(trained), "deals": deals,
                     "promised": promised.mean(), "false_alarms_median": np.median(alarms),
                     "false_alarms_mean": alarms.mean(), "false_alarms_max": alarms.max(),
                     "detected_median": np.median(detected), "detected_mean": detected.mean(),
                     "detected_min": detected.min(), "synthetic_found": share.mean()})
    return rows


@exit_status
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Try the threshold's rule on finished runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run folders")
    parser.add_argument("--root", help="where the data lies (default: each run's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--deals", type=int, default=20, help="times dealt anew (default 20)")
    parser.add_argument("--csv", help="file to write")
    flags = parser.parse_args(argv)
    rows = []
    for folder in map(Path, flags.runs):
        model, s, _ = load_model(folder / "last.pt", pick_device(flags.device))
        s = replace(s, root=flags.root or s.root)
        if not (folder / "scores.csv").exists():
            raise InputError(f"{folder} holds no scores.csv; give a finished run with a test set")
        with open(folder / "scores.csv", newline="") as file:
            table = list(csv.DictReader(file))
        scores, labels = (np.array([float(row[k]) for row in table]) for k in ("score", "label"))
        normal = normal_scores(model, s, load_source(s, folder=folder))
        if not normal:
            raise InputError(f"{folder}: no image was held out")
        for row in deal(normal, scores[labels == 0], scores[labels == 1], s, flags.deals):
            rows.append({"data": s.data, "category": s.category, "preset": s.preset,
                         "seed": s.seed, **{k: round(v, 4) if isinstance(v, float) else v
                                            for k, v in row.items()}})
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if flags.csv:
        save_csv(Path(flags.csv), rows)


if __name__ == "__main__":
    sys.exit(main())
