"""Does the threshold keep its promise? False alarms of fresh good photos, by how many set it.

    python tools/threshold_promise.py runs/demo/fabric --csv results/threshold_promise.csv

For the demo's products, whose good photos can be drawn without end. Fresh ones are scored once.
Many times, n of them are dealt at random and set a threshold by `metrics.threshold`, as held-out
photos do; the others are new photos, also under brighter and darker light. A row of the table is an
n and a light, with the false alarm rate over all deals beside the promised one. The last rows of a
run deal as many as the run itself holds out, and add the scores of its training images, as a
training does.
"""
import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

import demo
from data import load_run_data, preprocess
from evaluate import calibration_scores, network_calls, scores_of
from metrics import CalibrationScores, threshold
from photo_quality import light
from runs import load_model
from support.console import InputError, exit_status, progress_bar
from support.devices import pick_device
from support.files import rounded, save_csv

FIRST = 10000                           # number of the first fresh photo; the demo has 104 good
COUNTS = (8, 20, 50, 100, 200, 400, 1000, 2000)
LIGHTS = (0.95, 0.97, 1, 1.03, 1.05)    # the brightness of new photos, as a factor


def promise_rows(scores: dict[float, np.ndarray], false_alarms: float, deals: int,
                 counts: tuple[int, ...] = COUNTS, training: Sequence[float] = ()) -> list[dict]:
    """A row for each number of photos and each light. scores: of the same photos, [N], by light.

    The threshold is set under the light 1, by at most two thirds of the photos. training: scores
    of training images that take part in each threshold.
    """
    rows, N = [], len(scores[1])
    for count in (n for n in counts if 3 * n <= 2 * N):
        rng, rates = np.random.default_rng(count), {factor: [] for factor in scores}
        promised = []
        for _ in range(deals):
            order = rng.permutation(N)
            dealt = CalibrationScores(scores[1][order[:count]].tolist(), list(training), [], 0)
            limit = threshold(dealt, false_alarms)
            promised.append(limit.rate)
            for factor in scores:
                rates[factor].append(np.mean(scores[factor][order[count:]] > limit.value))
        for factor, values in rates.items():
            low, high = np.quantile(values, (0.05, 0.95))
            rows.append({"photos": count, "training_scores": len(training), "light": factor,
                         "fresh": N, "deals": deals,
                         "promised": np.median(promised), "false_alarms_mean": np.mean(values),
                         "false_alarms_5": low, "false_alarms_95": high,
                         "share_above_10": np.mean(np.array(values) > 0.1)})
    return rows


def table(rows: list[dict]) -> list[str]:
    """The page's table: mean false alarm rate (5 % and 95 % quantile) in per cent by light."""
    lights = list(dict.fromkeys(float(row["light"]) for row in rows))
    titles = ["product, good photos + training photos", "promised",
              *(f"light x {light:g}" for light in lights)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["category"], row["photos"], row["training_scores"],
                           row["promised"]), []).append(row)
    for (category, photos, training, promised), group in groups.items():
        cells = ("{:.0f} ({:.0f} to {:.0f})".format(*(100 * float(row[f"false_alarms_{k}"])
                                                      for k in ("mean", "5", "95")))
                 for row in group)
        count = f"{photos} + {training}" if int(training) else photos
        lines.append(f"| {category}, {count} | {100 * float(promised):.1f} | "
                     f"{' | '.join(cells)} |")
    return lines


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Try the threshold's promise on fresh photos.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path,
                        help="runs of the demo's products")
    parser.add_argument("--photos", type=int, default=600, metavar="N",
                        help="fresh photos to draw (default 600)")
    parser.add_argument("--deals", type=int, default=2000, metavar="N",
                        help="random deals for each number of photos (default 2000)")
    parser.add_argument("--infer-steps", type=int, default=1, metavar="K",
                        help="network calls per photo (default 1: of good photos, the score hardly "
                             "depends on them)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags = command_line().parse_args(argv)
    if flags.photos < 12 or flags.deals < 1:
        raise InputError("--photos must be at least 12, --deals at least 1")
    rows = []
    for folder in flags.runs:
        model, s, _ = load_model(folder / "last.pt", pick_device(flags.device))
        if s.category not in demo.DEFECTS:
            raise InputError(f"{folder}: a run of {s.category}; only photos of the demo's products "
                             f"can be drawn")
        s = replace(s, infer_steps=flags.infer_steps)
        network_calls(model, s)
        photos = [Image.fromarray(demo.draw(s.category, None, FIRST + k)[0]) for k in
                  progress_bar(range(flags.photos), desc="drawing", unit="image", leave=False)]
        scores = {}
        for factor in LIGHTS:
            images = torch.tensor(np.stack([preprocess(light(photo, factor), s.resize, s.crop)
                                            for photo in photos]))
            scores[factor] = np.array(scores_of(model, s, images, range(len(images))))
        run_data = load_run_data(s, folder=folder)
        own = calibration_scores(model, s, run_data)
        new_rows = promise_rows(scores, s.false_alarms, flags.deals)
        if own:
            new_rows += promise_rows(scores, s.false_alarms, flags.deals, (len(own.held_out),),
                                     own.training)
        for row in new_rows:
            rows.append({"category": s.category, "preset": s.preset, "seed": s.seed,
                         "infer_steps": flags.infer_steps,
                         "trained_on": len(run_data.train_indices), **rounded(row)})
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
        if flags.csv:
            save_csv(flags.csv, rows)
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
