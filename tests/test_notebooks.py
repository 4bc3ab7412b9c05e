"""Every notebook runs from top to bottom on the small model; the paper's tables add up."""
import base64
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import figures
import tables
from conftest import trained
from support.layouts import CATEGORIES
from transfusion import Step

FOLDER = tables.HERE
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# Columns whose printed average is not the mean of their categories: printed, mean. The paper or
# the machine-read text may be at fault.
NOT_THE_MEAN = {
    ("d3ad_table7_mvtec", "D3AD_pro"): ("93.3", "93.2"),
    ("diffad_table2_mvtec_variants_pixel", "x_a_inter_pixel_ap"): ("67.0", "66.9"),
    ("diffad_table3_mvtec_image_auroc", "PaDiM"): ("95.5", "95.4"),
    ("diffad_table3_mvtec_image_auroc", "Score-DD"): ("98.2", "98.3"),
    ("diffad_table4_mvtec_steps", "pixel_auroc_20"): ("97.9", "97.7"),
    ("diffad_table4_mvtec_steps", "pixel_ap_20"): ("72.5", "72.6"),
    ("released_code", "mvtec pixel_auroc"): ("96.8", "96.7"),
    ("released_code", "visa pixel_auroc"): ("98.4", "98.5"),
    ("table1_visa_image_auroc", "AnomDiff"): ("83.7", "82.4"),
    ("table1_visa_image_auroc", "PatchCore"): ("94.3", "95.2"),
    ("table1_visa_image_auroc", "DSR"): ("91.6", "93.0"),
    ("table2_mvtec_image_auroc", "AnoDDPM"): ("83.5", "83.6"),
    ("table2_mvtec_image_auroc", "RD4AD"): ("98.5", "97.5"),
    ("table2_mvtec_image_auroc", "AST"): ("99.2", "99.1"),
    ("table2_mvtec_image_auroc", "SimpleNet"): ("99.6", "99.4"),
}


# What a notebook says of how much it computes, and what is computed here.
LESS = {"01_transfusion": {"batches = 200 ": "batches = 20 ", "\nsteps = 10 ": "\nsteps = 2 ",
                           "calls = [1, 2, 3, 5, 10, 20] ": "calls = [1, 2] "},
        "02_synthetic_anomalies": {"count, side = 2000, 80 ": "count, side = 200, 80 "},
        "04_ablations": {"calls = (1, 2, 5) ": "calls = (1,) "}}

# One kernel executes all notebooks, as its start and its imports take seconds. Each begins without
# the names of those before it and counts its cells from 1.
EXECUTE = f"""
import sys, traceback
import nbformat
from nbclient import NotebookClient

def forget(notebook):
    client.kc.execute("get_ipython().reset()", silent=True)

kernel = None
for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, km=kernel, on_notebook_start=forget,
                            resources={{"metadata": {{"path": {str(FOLDER)!r}}}}})
    try:
        client.execute(cleanup_kc=path == sys.argv[-1])
        nbformat.write(notebook, path)
        kernel = client.km
    except Exception:
        traceback.print_exc()
        kernel = None
"""


@pytest.fixture(scope="session")
def executed(training, data_folder, tmp_path_factory):
    """A folder of the notebooks, and the future of what their execution prints.

    They are executed in the background on one core, one after the other, with the small model's run
    and data in place of ../runs and ../data. tables.ipynb is 03 with the runs of `invent_runs`.
    """
    folder = tmp_path_factory.mktemp("notebooks")
    invent_runs(folder / "runs")

    def execute():
        small = trained(training)[0].parents[1]
        for path in NOTEBOOKS:
            write_notebook(path, folder / path.name, small, data_folder)
        write_notebook(FOLDER / "03_tables.ipynb", folder / "tables.ipynb", folder / "runs",
                       data_folder)
        return subprocess.run([sys.executable, "-c", EXECUTE, *sorted(folder.glob("*.ipynb"))],
                              capture_output=True, text=True, timeout=900,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).stderr

    with ThreadPoolExecutor(1) as pool:
        yield folder, pool.submit(execute)


def write_notebook(path, copy, runs, root):
    """Write a copy without outputs whose runs and data lie in `runs` and `root`.

    It computes less, as LESS has it.
    """
    notebook = json.loads(path.read_text())
    for cell in code_cells(notebook):
        cell.update(outputs=[], execution_count=None)
    setup = code_cells(notebook)[0]
    source = "".join(setup["source"])
    assert source.count('"../data"') == source.count('"../runs"') == 1
    setup["source"] = source.replace('"../data"', repr(str(root))).replace('"../runs"',
                                                                           repr(str(runs)))
    cells = code_cells(notebook)
    for words, fewer in LESS.get(path.stem, {}).items():
        cell, = (cell for cell in cells if words in "\n" + "".join(cell["source"]))
        cell["source"] = ("\n" + "".join(cell["source"])).replace(words, fewer)[1:]
    copy.write_text(json.dumps(notebook))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def was_executed(notebook):
    code = code_cells(notebook)
    return [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))


def test_there_are_notebooks(executed):
    """From here on they run in the background, as soon as the small model is trained."""
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, executed):
    folder, printed = executed
    printed = printed.result()
    assert was_executed(json.loads((folder / path.name).read_text())), printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_executed_on_the_demo_data(path):
    notebook = json.loads(path.read_text())
    assert was_executed(notebook)
    assert 'DATA = "demo"' in "".join(code_cells(notebook)[0]["source"])
    assert any(cell["outputs"] for cell in code_cells(notebook))
    assert not any(f"/{name}/" in str(notebook) for name in ("home", "root", "work", "tmp"))
    assert all(len(line) < 100 for cell in notebook["cells"]
               for line in "".join(cell["source"]).splitlines())


def test_a_notebook_starts_in_the_projects_folder_too():
    """The first cell goes to notebooks/. That it stays there is seen where they are executed."""
    setups = {"".join(code_cells(json.loads(path.read_text()))[0]["source"]).split("DATA")[0]
              for path in NOTEBOOKS}
    setup, = setups
    printed = subprocess.run(
        [sys.executable, "-"], input=setup + "import tables\nprint(os.getcwd())",
        cwd=FOLDER.parent, capture_output=True, text=True)
    assert printed.stdout.strip() == str(FOLDER), printed.stderr


def test_a_slider_shows_the_steps_and_a_strip_where_there_are_no_widgets(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda bundle, raw: shown.append(bundle))
    M, x = torch.rand(6, 1, 1, 8, 8), torch.rand(6, 3, 1, 3, 8, 8)
    figures.step_slider([Step(6 - k, x[k, 0], M[k], x[k, 0], x[k, 1], x[k, 2]) for k in range(6)])
    bundle, = shown
    strip = Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"])))
    assert strip.width > strip.height and not figures.plt.get_fignums()
    view = bundle["application/vnd.jupyter.widget-view+json"]["model_id"]
    slider, frames = figures.ipywidgets.Widget.widgets[view].children
    assert slider.options == (6, 5, 4, 3, 2, 1) and len(frames.children) == 6
    links = [w for w in figures.ipywidgets.Widget.widgets.values() if w._model_name == "LinkModel"]
    assert (links[-1].source, links[-1].target) == ((slider, "index"), (frames, "selected_index"))
    pixels = np.array(Image.open(io.BytesIO(frames.children[2].value)))
    assert pixels.shape == (8, 24, 3)
    assert abs(pixels[:, :8].mean() - (x[2, 0].mean() / 2 + 0.5) * 255) < 10


def test_one_first_line_names_every_table():
    for path in sorted((FOLDER / "paper").glob("*.csv")):
        first = path.read_text().splitlines()[0]
        assert first.startswith("# ") and ("Table" in first or path.stem == "released_code"), path


def test_averages_are_the_means_of_their_categories():
    different = {}
    for path in sorted((FOLDER / "paper").glob("*.csv")):
        rows = tables.paper_table(path.stem)
        if "category" not in rows[0]:
            continue
        for group in sorted({r.get("data", "") for r in rows}):
            in_group = [r for r in rows if r.get("data", "") == group]
            average, = [r for r in in_group if r["category"] == "average"]
            for column in average:
                if column in ("category", "data") or not average[column]:
                    continue
                values = [Decimal(r[column]) for r in in_group if r["category"] != "average"]
                mean = (sum(values) / len(values)).quantize(Decimal("0.1"), ROUND_HALF_UP)
                if mean != Decimal(average[column]):
                    name = path.stem, f"{group} {column}".strip()
                    different[name] = average[column], str(mean)
    assert different == NOT_THE_MEAN


def test_categories_are_complete():
    def names(table):
        return [r["category"] for r in tables.paper_table(table)]

    for table in ("table2_mvtec_image_auroc", "tableS2_mvtec_aupro", "d3ad_table7_mvtec"):
        assert sorted(names(table)) == sorted([*CATEGORIES["mvtec"], "average"]), table
    for table in ("table1_visa_image_auroc", "tableS1_visa_aupro", "tableS3_visa_best_epoch"):
        assert sorted(names(table)) == sorted([*CATEGORIES["visa"], "average"]), table


def test_without_runs_our_numbers_are_of_the_default_preset(tmp_path):
    """Gear also has rows of `--preset cpu`, and they come first."""
    metrics = tables.our_metrics("demo", str(tmp_path))
    assert {row["preset"] for row in metrics.values()} == {"quick"} and len(metrics) == 3
    assert {row["preset"] for row in tables.our_metrics("mvtec", str(tmp_path)).values()} == {"cpu"}


def test_marks():
    assert tables.mark_best(["1", "3", "", "2", "3", "0.5"]) == ["//1//", "**3**", "", "__2__",
                                                                "**3**", "0.5"]
    assert tables.mark_best(["9.5 ± 1.0", "10.0"]) == ["__9.5 ± 1.0__", "**10.0**"]
    assert tables.render("**100**") == "<b>100</b>" and tables.render("<a>") == "&lt;a&gt;"


@pytest.fixture(scope="module")
def loaded(small, demo_root):
    return figures.load_run("demo", str(small[0].parents[1]), str(demo_root))


@pytest.fixture
def run(loaded):
    """The small model's run, with a copy of its metrics that a test may change."""
    return dataclasses.replace(loaded, metrics={**loaded.metrics})


def test_failures_are_found_by_their_rules(run):
    labels, scores = run.labels, run.scores
    # a threshold at the median of the good images, and just above the lowest defective one
    for level in (float(np.median(scores[labels == 0])), float(scores[labels == 1].min()) + 1e-6):
        run.metrics["threshold"] = level
        by_rule = {}
        for case in figures.failures(run, each=2):
            by_rule.setdefault(case.rule, []).append(case)
            assert case.region.shape == (256, 256)
        alarms = np.flatnonzero((labels == 0) & (scores > level))
        indices = [case.index for case in by_rule.get("false alarm", [])]
        assert indices == alarms[scores[alarms].argsort()[::-1]].tolist()[:2]
        missed = np.flatnonzero((labels == 1) & (scores <= level))
        indices = [case.index for case in by_rule.get("missed", [])]
        assert indices == missed[scores[missed].argsort()].tolist()[:2]
        assert all(labels[case.index] and scores[case.index] > level
                   for case in by_rule["masks disagree"])
        assert len(by_rule["masks disagree"]) == 2


def test_no_false_alarm_where_none_passes_the_threshold(run):
    run.metrics["threshold"] = float(run.scores.max())
    rules = [case.rule for case in figures.failures(run)]
    assert "false alarm" not in rules and rules.count("missed") == 2


def test_best_median_and_worst(run):
    chosen = [4, 1, 7, 2, 9]
    order = sorted(chosen, key=lambda k: run.scores[k])
    assert [figures.at_score_quantile(run, chosen, quantile) for quantile in (0, 0.5, 1)] == [
        order[0], order[2], order[4]]


def test_the_network_is_drawn_as_it_is(run):
    """Every layer once, in the order of the calls, with the shape of its output."""
    layers = figures.layers(run.model.net, 64)
    assert len(layers) == 1 + 11 + 1 + 15 + 3
    assert [layer.shape[1] for layer in layers if layer.kind == "half the size"] == [32, 16, 8]
    assert {layer.shape[1] for layer in layers if layer.kind.endswith("attention")} == {16, 8}
    assert [layer.shape for layer in layers[-3:]] == [(3, 64, 64), (3, 64, 64), (1, 64, 64)]
    assert not any(module._forward_hooks for module in run.model.modules())
    figures.draw_network(layers)


def test_runs_of_other_methods_are_kept_apart(small, demo_root, tmp_path):
    """They are not taken for TransFusion's, and are found by the names of their folders."""
    for name in ("fabric", "fabric-draem"):
        shutil.copytree(small[0], tmp_path / "demo" / name)
    config = tmp_path / "demo" / "fabric-draem" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "method": "draem"}))
    assert [f.name for f in tables.find_runs("demo", str(tmp_path))] == ["fabric"]
    run = figures.load_run("demo", str(tmp_path), str(demo_root))
    others = figures.other_methods(run, str(demo_root))
    assert list(others) == ["draem"] and others["draem"].folder.name == "fabric-draem"


def test_the_true_normal_image_is_the_photo_but_for_its_defect(run):
    good, bad = (np.flatnonzero(run.labels == label)[::11] for label in (0, 1))
    assert torch.equal(run.normal(good), run.images(good))
    change = (run.normal(bad) - run.images(bad)).abs().mean(1)
    truth = torch.from_numpy(np.stack([run.truth(k) for k in bad]))[:, None].float()
    near = F.adaptive_max_pool2d(F.max_pool2d(truth, 41, 1, 20), run.settings.crop)[:, 0] > 0
    assert change[near].mean() > 0.01 and change[~near].max() < 0.02


def test_a_restoration_in_the_notebooks_is_that_of_the_runs_scores(run):
    """It takes as many network calls, 3 here, so the maps are those of maps.npz."""
    assert run.settings.infer_steps == 3
    restored = run.restore([0, 5])
    for name in ("M_disc", "M_recon", "M_last"):
        maps, saved = getattr(restored, name)[:, 0].numpy(), run.maps[name][[0, 5]]
        assert np.allclose(maps, saved, atol=1e-5), name


def invent_runs(out):
    """Write runs with invented results: the n-th category of a data set scores n per cent, and at
    its best epoch one more."""
    for name in ("mvtec", "visa"):
        for n, category in enumerate(CATEGORIES[name]):
            folder = out / name / category
            folder.mkdir(parents=True)
            (folder / "config.json").write_text('{"name": ""}')
            (folder / "metrics.json").write_text(json.dumps(
                {"category": category, "image_auroc": n / 100, "aupro": n / 50}))
            (folder / "eval.csv").write_text(f"epoch,image_auroc\n1,{n / 100}\n"
                                             f"2,{(n + 1) / 100}\n")


def test_notebook_runs_and_averages_complete_data_sets(executed):
    """Table 3's averages and those of the supplement's Tables 3 and 4."""
    folder, printed = executed
    printed = printed.result()
    notebook = json.loads((folder / "tables.ipynb").read_text())
    assert was_executed(notebook), printed
    shown = "\n".join("".join(output["data"].get("text/plain", "")) for cell in code_cells(notebook)
                      for output in cell["outputs"] if "data" in output)
    rows = [line.split() for line in shown.splitlines()]
    # visa 0..11: 5.5 and 11; mvtec 0..14: 7 and 14; the mean of both 6.25 and 12.5
    assert ["ours", "yes", "5.5", "11.0", "7.0", "14.0", "6.2", "12.5"] in rows
    assert ["average", "99.0", "6.5"] in rows and [r for r in rows if r[-1:] == ["8.0"]
                                                   and r[:1] == ["average"]]
