"""compare_metrics.py runs with the packages that are there, and docs/metrics.md shows its table."""
import csv

import numpy as np
import pytest

import compare_metrics
from helpers import ROOT, rows_of

PLAIN = ("brute force", "scikit-learn", "scipy", "torchvision")        # with requirements.txt alone


@pytest.fixture
def plain(monkeypatch):
    """The packages of requirements.txt, and maps that are compared in a second."""
    cases = compare_metrics.draw_cases(8, 64)
    monkeypatch.setattr(compare_metrics, "draw_cases", lambda: cases)
    installed = {k: v for k, v in compare_metrics.versions().items() if k in PLAIN}
    monkeypatch.setattr(compare_metrics, "versions", lambda: installed)


def test_what_is_installed_is_compared_and_the_rest_is_named(plain, tmp_path, capsys):
    assert compare_metrics.main(["--csv", str(tmp_path / "table.csv")]) == 0
    out = capsys.readouterr().out
    rows = rows_of(tmp_path / "table.csv")
    assert {row["package"] for row in rows} == {*PLAIN}
    assert {row["maps"] for row in rows} == {*compare_metrics.KINDS}
    assert {row["metric"] for row in rows} == {*compare_metrics.METRICS} - {"SSIM"}
    assert all(abs(float(row["difference"])) < 1e-6 for row in rows)
    missing = [p for p in compare_metrics.PACKAGES if p not in PLAIN]
    assert len(missing) >= 10 and "  pip install " + " ".join(missing) in out
    assert compare_metrics.main(["--csv", str(tmp_path / "absent" / "table.csv")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_call_that_raises_is_a_row_without_a_value(plain, monkeypatch):
    def broken(case):
        yield "AUPRO", "its call", lambda: np.removed_function()

    monkeypatch.setitem(compare_metrics.PACKAGES, "scipy", broken)
    rows = compare_metrics.rows_of(compare_metrics.draw_cases()[0], {"scipy": "1.0"})
    assert [row["value"] for row in rows] == [""] and "AttributeError" in rows[0]["note"]
    assert compare_metrics.table(rows)[-1].startswith("| scipy 1.0, its call | error |")


def test_the_kinds_of_maps_are_what_the_page_says():
    smooth, levels, near_zero = (case.maps for case in compare_metrics.draw_cases())
    assert len(np.unique(smooth)) > 0.9 * smooth.size
    assert len(np.unique(levels)) == 21
    assert (near_zero < 0.005).mean() == pytest.approx(0.97, abs=1e-3)


def test_the_page_shows_the_table_of_results():
    with open(ROOT / "results" / "compare_metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "docs" / "metrics.md").read_text().splitlines()
    shown = [line for line in compare_metrics.table(rows) if line.startswith("|")]
    assert [line for line in page if line.startswith("|") and line in shown] == shown
