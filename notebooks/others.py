"""Maps and scores of methods that were trained elsewhere, for 03_tables and 05_qualitative.

tools/score_maps.py scores them and writes the rows; a folder of them is METHOD/CATEGORY/test/
DEFECT/NNN.tiff. Nothing here trains.
"""
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from score_maps import (COLUMNS, RECORD, find_maps_folder, load_maps, match_maps, read_scores)
from data import SCORING_GRID
from support.console import InputError
from support.files import read_json
from support.layouts import Category
from tables import Table, mark_best, percent

# What a notebook prints where there are no rows and no maps. The tool prints the second command.
COMMAND = ("no scores or maps of other methods yet; to make some: python tools/anomalib_maps.py "
           "--model Patchcore --data mvtec --category bottle --out maps/patchcore")


def other_rows(maps: str = "../maps", results: str = "../results") -> list[dict]:
    """The rows of RESULTS/others.csv and of every MAPS/METHOD/CATEGORY/metrics.json.

    Of one data set, category and method the last one counts. Numbers are floats, what is missing
    is left out.
    """
    rows = {}
    table = Path(results) / "others.csv"
    if table.exists():
        with open(table, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values = {key: float(value) if key in COLUMNS[3:9] else value
                          for key, value in row.items() if value}
                rows[row["data"], row["category"], row["method"]] = values
    for path in sorted(Path(maps).expanduser().glob("*/*/metrics.json")):
        row = {key: value for key, value in json.loads(path.read_text()).items()
               if value is not None}
        if {"data", "category", "method", "scored_side"} <= set(row):     # not a run's
            rows[row["data"], row["category"], row["method"]] = row
    return list(rows.values())


def other_metrics(data: str, rows: list[dict]) -> dict[str, dict[str, dict]]:
    """The rows of a data set by method and category."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["data"] == data:
            found.setdefault(row["method"], {})[row["category"]] = row
    return found


def other_table(title: str, data: str, metric: str, rows: list[dict],
                ours: dict[str, dict]) -> Table:
    """A metric of our runs and of other methods' maps, a row a category, the best marked.

    ours: metrics.json by category, as `tables.our_metrics` gives it.
    """
    methods = {"ours": ours, **other_metrics(data, rows)}
    categories = sorted({name for found in list(methods.values())[1:] for name in found})
    cells = [[name, *mark_best([percent(found.get(name, {}).get(metric))
                                for found in methods.values()])] for name in categories]
    cropped = sorted({row["method"] for row in rows if row["data"] == data
                      and row.get("scored_side") not in (SCORING_GRID, str(SCORING_GRID))})
    note = f"scored on the centre crop only: {', '.join(cropped)}" if cropped else ""
    return Table(title, ["category", *methods], cells, note)


@dataclass
class OtherMaps:
    """What a figure needs of another method: M_final [N, side, side] on the scoring grid, and the
    image scores [N]."""
    M_final: np.ndarray
    scores: np.ndarray


def other_maps(category: Category, maps: str = "../maps",
               side: int = SCORING_GRID) -> dict[str, OtherMaps]:
    """The maps of a category by method, of every MAPS/METHOD that has them.

    side: of the scoring grid, less the crop of the run beside which they are shown. Image scores
    are those of scores.csv, or the largest value of each map. A method whose maps are not complete
    is left out with a line that says why.
    """
    found = {}
    for folder in sorted(p for p in Path(maps).expanduser().glob("*") if p.is_dir()):
        home = folder / category.name
        if not home.is_dir():
            continue
        try:
            record = read_json(home / RECORD) if (home / RECORD).exists() else {}
            map_side = record.get("map_side", SCORING_GRID)
            if map_side < side:
                raise InputError(f"the maps show only the centre {map_side} of {SCORING_GRID} "
                                 f"pixels")
            loaded = load_maps(match_maps(find_maps_folder(folder, category), category), map_side,
                               side)
            scores = loaded.peaks
            if (home / "scores.csv").exists():
                scores = read_scores(home / "scores.csv", category)
            found[record.get("method", folder.name)] = OtherMaps(loaded.on_grid, scores)
        except InputError as error:
            print(f"{folder.name}: not shown ({error})")
    return found
