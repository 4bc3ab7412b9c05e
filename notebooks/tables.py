"""The tables of the notebooks: the paper's, ours, and the differences of Table 4."""
import csv
import dataclasses
import json
import re
from html import escape
from pathlib import Path

import numpy as np
from scipy import stats

from settings import PRESETS, Settings

HERE = Path(__file__).parent


def find_runs(name: str, runs: str) -> list[Path]:
    """Finished runs of TransFusion on a data set under the default names, one a category."""
    folders = []
    for path in sorted((Path(runs).expanduser() / name).glob("*/metrics.json")):
        config = {"method": "transfusion",
                  **json.loads((path.parent / "config.json").read_text())}
        if config["name"] in ("", "notebook") and config["method"] == "transfusion":
            folders.append(path.parent)
    return folders


def paper_table(name: str) -> list[dict[str, str]]:
    """The rows of a published table, notebooks/paper/NAME.csv, without its first line, a title."""
    with open(HERE / "paper" / f"{name}.csv", newline="") as file:
        next(file)
        return list(csv.DictReader(file))


def our_metrics(name: str, runs: str) -> dict[str, dict]:
    """Our metrics of every category of a data set, and "crop", the side in pixels that is seen.

    They come from metrics.json under `runs`, or else from results/runs.csv (its first seed, at the
    default preset if there is such a row).
    """
    metrics = {}
    with open(HERE.parent / "results" / "runs.csv", newline="") as file:
        for row in sorted(csv.DictReader(file), key=lambda row: "--preset" in row["command"]):
            if row["data"] == name and "--name" not in row["command"]:
                crop_flag = re.search(r"--crop (\d+)", row["command"])
                preset = {**dataclasses.asdict(Settings()), **PRESETS[row["preset"]]}
                metrics.setdefault(row["category"], {
                    "preset": row["preset"],
                    "crop": int(crop_flag[1]) if crop_flag else preset["crop"],
                    **{k: float(row[k]) for k in ("image_auroc", "aupro", "pixel_auroc",
                                                  "pixel_ap", "seconds_train") if row[k]}})
    for folder in find_runs(name, runs):
        row = json.loads((folder / "metrics.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        metrics[row["category"]] = {"crop": config.get("crop"), **row}
    return metrics


def column_title(metrics: dict[str, dict]) -> str:
    """The title of a column of our numbers: the presets, pixels and minutes of training.

    metrics: of `our_metrics`.
    """
    def span(values) -> str:
        values = sorted({round(v) for v in values if v is not None})
        return "-".join(map(str, values[:1] + values[1:][-1:])) or "?"

    if not metrics:
        return "ours: none run"
    presets = "/".join(sorted({m.get("preset") or "?" for m in metrics.values()}))
    minutes = (m["seconds_train"] / 60 for m in metrics.values() if m.get("seconds_train"))
    return (f"ours: {presets} preset, {span(m.get('crop') for m in metrics.values())} px, "
            f"{span(minutes)} min")


class Table:
    """Rows of text under a title and above a note. Jupyter shows them as HTML."""

    def __init__(self, title: str, columns: list[str], rows: list[list], note: str = ""):
        self.title, self.columns, self.note = title, columns, note
        self.rows = [["" if cell is None else str(cell) for cell in row] for row in rows]

    def _repr_html_(self) -> str:
        def cells(row, tag):
            return "".join(f"<{tag}>{cell}</{tag}>" for cell in row)
        body = "".join(f"<tr>{cells(map(render, row), 'td')}</tr>" for row in self.rows)
        return (f"<table><caption>{escape(self.title)}</caption>"
                f"<tr>{cells(map(escape, self.columns), 'th')}</tr>{body}</table>"
                + (f"<p>{escape(self.note)}</p>" if self.note else ""))

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[k]) for line in lines) for k in range(len(self.columns))]
        return "\n".join([self.title] + ["  ".join(c.rjust(w) for c, w in zip(line, widths))
                                         for line in lines]
                         + [self.note] * bool(self.note))


def ablation_runs(runs: str) -> list[list[dict]]:
    """The rows of every table4-*.csv of tools/ablations.py under `runs` or in results/.

    A list for each category, then one of all categories together for each data set with several.
    """
    files = {path.name: path for folder in (HERE.parent / "results", Path(runs) / "ablations")
             for path in sorted(folder.glob("table4-*.csv"))}
    by_category, by_data = [], {}
    for path in files.values():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        by_category.append(rows)
        by_data.setdefault(rows[0]["data"], []).append(rows)
    return by_category + [sum(each, []) for each in by_data.values() if len(each) > 1]


def table4(rows: list[dict]) -> Table:
    """Table 4: the paper's differences to the full model, and ours, of tools/ablations.py's rows.

    They are in percentage points of image AUROC (det) and AUPRO (loc); for several categories they
    are averages. Ours are differences to the mean over the seeds of the full model. The standard
    deviation over these seeds says what is noise; * marks a difference beyond it (Student's t,
    95 %). A row with another final mask scores the same model as the first seed does, so its
    difference to that seed has no such noise; = marks it.
    """
    def values(condition: str, key: str) -> np.ndarray:
        """The average over the categories for each seed, in %."""
        seeds = {}
        for r in rows:
            if r["condition"] == condition:
                seeds.setdefault(r["seed"], []).append(100 * float(r[key]))
        return np.array([np.mean(each) for each in seeds.values()])

    def noise(seeds: np.ndarray) -> float:
        """The difference of a single run to the mean of these that is no longer noise."""
        n = len(seeds)
        return stats.t.ppf(0.975, n - 1) * seeds.std(ddof=1) * np.sqrt(1 + 1 / n)

    full = {key: values("full model", key) for key in ("image_auroc", "aupro")}
    table = []
    for paper in paper_table("table4_ablations"):
        cells = [paper[k] for k in ("mvtec_det", "mvtec_loc", "visa_det", "visa_loc")]
        for key, seeds in full.items():
            ours = values(paper["condition"], key)
            base = seeds[0] if paper["group"] == "final mask" else seeds.mean()
            if not paper["flag"]:
                cells.append(f"{seeds.mean():.1f} ± {seeds.std(ddof=1):.1f}")
            elif not len(ours):
                cells.append("not run")
            else:
                mark = "=" if paper["group"] == "final mask" else \
                    "*" if abs(ours[0] - base) > noise(seeds) else ""
                cells.append(f"{ours[0] - base:+.1f}{mark}")
        table.append([paper["group"], paper["condition"], *cells, paper["flag"]])
    names = sorted({r["category"] for r in rows})
    name = names[0] if len(names) == 1 else f"(average of {', '.join(names)})"
    return Table(f"Table 4: differences in percentage points; ours on {rows[0]['data']} {name}, "
                 f"{rows[0]['step']} training steps",
                 ["group", "condition", "MVTec det", "MVTec loc", "VisA det", "VisA loc",
                  "ours det", "ours loc", "flag"], table,
                 f"* beyond the noise of the full model's {len(full['aupro'])} seeds, "
                 f"{noise(full['image_auroc']):.1f} points det and {noise(full['aupro']):.1f} loc; "
                 f"= the same model scored otherwise, no noise")


MARKS = ("**", "__", "//")                          # first, second and third of a row


def render(cell: str) -> str:
    """A cell of `mark_best` as HTML: bold, underlined or italic."""
    for mark, tag in zip(MARKS, ("b", "u", "i")):
        if len(cell) > 4 and cell.startswith(mark) and cell.endswith(mark):
            return f"<{tag}>{escape(cell[2:-2])}</{tag}>"
    return escape(cell)


def mark_best(cells: list[str]) -> list[str]:
    """The cells of a row, as "97.5" or "97.5 ± 2.0", with the first, second and third value marked.
    Equal values have the same mark."""
    values = [float(c.split()[0]) if c else None for c in cells]
    ranked = sorted({value for value in values if value is not None}, reverse=True)[:3]
    mark = dict(zip(ranked, MARKS))
    return [f"{mark[value]}{c}{mark[value]}" if value in mark else c or ""
            for c, value in zip(cells, values)]


def percent(value: float | None) -> str:
    """A fraction in %, "" for None."""
    return "" if value is None else f"{100 * value:.1f}"


def difference(ours: float | None, published: str) -> str:
    """Ours (a fraction) less a published value (in %), in percentage points."""
    return "" if ours is None or not published else f"{100 * ours - float(published):+.1f}"
