"""What the README, docs/, notebooks and docstrings say is so.

Their commands parse; the functions, tests, flags, links and files that they name exist.
"""
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import anomalib_maps
import bench
import compare_metrics
import download
import evaluate
import export
import held_out_loss
import import_authors
import photo_quality
import predict
import readme_figures
import score_maps
import settings
import sweep
import threshold_promise
import thresholds
import transfusion
from helpers import ROOT

PAGES = ["README.md", *sorted(f"{folder}/{path.name}" for folder in ("docs", "results")
                              for path in (ROOT / folder).glob("*.md"))]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README, REPRODUCE = TEXT["README.md"], TEXT["docs/reproduce.md"]
# The commands and flags of results/ are those of earlier versions, by which the numbers were made.
CURRENT = [page for page in PAGES if not page.startswith("results/")]


# ---------------------------------------------------------------- commands

def block_commands(text):
    """The commands of a page's blocks, without their comments."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, re.S)
    lines = [re.split(r"\s#", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def inline_commands(text):
    """The commands between a page's backticks."""
    return [" ".join(command.split()) for command in re.findall(r"`(python [^`]+)`", text)]


def docstring_commands(path):
    """The commands in a module's docstring, where two spaces and a remark may follow each."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    commands = re.findall(r"^ {4}(python (?:tools/)?\w+\.py.*)$", text, re.M)
    return [re.split(r"\s{2,}", command)[0] for command in commands if "|" not in command]


def notebook_text(path):
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
                     if cell["cell_type"] == "markdown")


def all_commands():
    """Where each command of this repository is shown, and the command."""
    texts = {page: TEXT[page] for page in CURRENT}
    texts |= {f"notebooks/{path.name}": notebook_text(path)
              for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    shown = [(page, command) for page, text in texts.items()
             for command in block_commands(text) + inline_commands(text)]
    shown += [(str(path.relative_to(ROOT)), command)
              for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")])
              for command in docstring_commands(path)]
    return [(page, command) for page, command in shown
            if re.match(r"(python|torchrun .*) \S*\.py\b", command)]


def parse_train_flags(command_line, *flags):
    """A parser of a command that takes flags of its own, then those of train.py after `flags`."""
    def parse(argv):
        _, others = command_line().parse_known_args(argv)
        settings.parse([*flags, *others])
    return parse


def parse_import(argv):
    flags, others = import_authors.command_line().parse_known_args(argv)
    import_authors.settings_of(Path(flags.run), others)


def parse_training(argv):
    s, _ = settings.parse(argv)
    assert s.category


PARSERS = {
    "train.py": parse_training,
    "evaluate.py": lambda argv: evaluate.command_line().parse_args(argv),
    "predict.py": predict.parse,
    "tools/ablations.py": parse_training,                               # its flags are train.py's
    "tools/anomalib_maps.py": lambda argv: anomalib_maps.command_line().parse_args(argv),
    "tools/bench.py": parse_train_flags(bench.command_line),
    "tools/compare_metrics.py": lambda argv: compare_metrics.command_line().parse_args(argv),
    "tools/download.py": lambda argv: download.command_line().parse_args(argv),
    "tools/export.py": lambda argv: export.command_line().parse_args(argv),
    "tools/held_out_loss.py": lambda argv: held_out_loss.command_line().parse_args(argv),
    "tools/import_authors.py": parse_import,
    "tools/photo_quality.py": lambda argv: photo_quality.command_line().parse_args(argv),
    "tools/readme_figures.py": lambda argv: readme_figures.command_line().parse_args(argv),
    "tools/score_maps.py": lambda argv: score_maps.command_line().parse_args(argv),
    "tools/sweep.py": parse_train_flags(sweep.command_line),
    "tools/threshold_promise.py": lambda argv: threshold_promise.command_line().parse_args(argv),
    "tools/thresholds.py": lambda argv: thresholds.command_line().parse_args(argv),
}


@pytest.mark.parametrize("page, command", all_commands())
def test_commands_parse(page, command):
    """Each by its own command."""
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    argv = words[words.index(script) + 1:]
    assert (ROOT / script).exists()
    if argv != ["--help"]:
        PARSERS[script](argv)


def test_every_command_is_shown():
    scripts = {re.search(r"\S+\.py", command)[0] for _, command in all_commands()}
    assert scripts == PARSERS.keys()


def test_the_first_commands():
    assert block_commands(README)[:4] == ["python -m venv venv", ". venv/bin/activate",
                                          "pip install -r requirements.txt", "python train.py"]
    assert "python predict.py runs/demo/fabric data/demo/fabric/test --out found/" in \
        block_commands(README)
    assert "`pytest` runs the tests" in README


def test_flags_exist(capsys):
    """Every flag that a page names belongs to a command."""
    with pytest.raises(SystemExit):
        predict.parse(["--help"])
    flags = set(re.findall(r"--([a-z-]+)", capsys.readouterr().out))
    for module in (settings, evaluate, anomalib_maps, bench, compare_metrics, download,
                   held_out_loss, photo_quality, readme_figures, score_maps, sweep, threshold_promise,
                   thresholds):
        actions = module.command_line()._actions
        flags |= {option[2:] for action in actions for option in action.option_strings}
    flags -= {"eval", "weights"}                                        # commands of their own now
    flags |= {"nproc_per_node"}                                         # torchrun's
    for page in CURRENT:
        assert set(re.findall(r"--([a-zA-Z][\w-]*)", TEXT[page])) <= flags, page


# ---------------------------------------------------------------- files, functions and links

def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", outside, re.M)}


def test_every_module_is_in_the_readme():
    table = README.split("## Files")[1]
    modules = {path.name for folder in (ROOT, ROOT / "tools", ROOT / "support")
               for path in folder.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\w+\.py\b", table)) == modules


def test_every_notebook_and_section_of_the_index_exists():
    rows = re.findall(r"^\| [^|]*(?:Fig|Table)[^|]* \| (\d\d_\w+)(?:, ([^;|]+?))?(?:;[^|]*)? \|",
                      REPRODUCE, re.M)
    assert len(rows) > 8
    for name, section in rows:
        text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
        assert not section or section.startswith("without") or f"## {section}" in text, section


def test_every_equation_is_where_the_index_says():
    rows = re.findall(r"^\| (\d+(?:, \d+)*) \| .*? \| (.*?) \| (.*?) \| (.*?) \|$", README, re.M)
    assert [int(n) for row in rows for n in row[0].split(", ")] == list(range(1, 12))
    tests = (ROOT / "tests" / "test_transfusion.py").read_text()
    notebook, = re.findall(r"`(01_\w+\.ipynb)`", README)
    cells = json.loads((ROOT / "notebooks" / notebook).read_text())["cells"]
    headings = [line for cell in cells if cell["cell_type"] == "markdown"
                for line in "".join(cell["source"]).splitlines() if line.startswith("#")]
    for numbers, functions, names, section in rows:
        numbers = numbers.split(", ")
        functions = [name for name in re.findall(r"`(\w+)`", functions) if name != "ssim"]
        assert len(functions) in (1, len(numbers))
        for number, name in zip(numbers, functions):
            assert f"Eq. {number}" in getattr(transfusion, name).__doc__, name
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in tests, name
        assert any(section.lower() in line.lower() for line in headings), section


def test_links_and_anchors_exist():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXT[page]):
            name, _, anchor = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), (page, link)
            assert not anchor or anchor in anchors(target.read_text()), (page, link)


# ---------------------------------------------------------------- pictures and examples

@pytest.mark.picture
def test_the_pictures_of_the_readme(small, demo_root, tmp_path):
    flags = [str(small[0]), str(small[0]), "--root", str(demo_root), "--out", str(tmp_path)]
    assert readme_figures.main(flags) == 0
    with Image.open(tmp_path / "demo.png") as drawn:
        assert drawn.size == (800, 2 * 384)                              # two defects of each run
    drawn = Image.open(tmp_path / "method.png")
    with Image.open(ROOT / "docs" / "method.png") as committed:
        assert np.abs(np.subtract(drawn.size, committed.size)).max() <= 1    # fonts differ a little
    pixels = np.asarray(drawn.convert("RGB"), float)
    top = readme_figures.ABOVE
    columns = pixels[top:top + readme_figures.PANEL].mean((0, 2))                # white in the gaps
    line = (columns < 250).astype(int)
    starts, ends = (np.flatnonzero(np.diff(line) == step) for step in (1, -1))
    assert len(starts) == 5 and np.abs(ends - starts - readme_figures.PANEL).max() <= 3
    with Image.open(tmp_path / "restoration.gif") as film, \
            Image.open(tmp_path / "restoration.png") as still:
        assert film.n_frames == 21 and film.info["loop"] == 0               # T = 20 steps
        assert still.size == (film.width, 5 * film.height)
        first = np.asarray(film.convert("RGB"), float)
        film.seek(20)
        assert np.abs(np.asarray(film.convert("RGB"), float) - first).max() > 50
    assert (tmp_path / "restoration.gif").stat().st_size < 1.5e6


def test_the_lines_of_python_run(small, demo_root, tmp_path, monkeypatch, capsys):
    """On a finished run in place of the user's own, and a photo."""
    (tmp_path / "runs" / "parts").mkdir(parents=True)
    (tmp_path / "runs" / "parts" / "bolt").symlink_to(small[0])
    photo = next((demo_root / "demo" / "fabric" / "test" / "hole").iterdir())
    shutil.copy(photo, tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    lines, = re.findall(r"```python\n(.*?)```", README, re.S)
    variables: dict = {}
    exec(lines, variables)
    result = variables["result"]
    assert capsys.readouterr().out.startswith(f"{result.score} {result.verdict} [")
    with Image.open("map.png") as picture:
        assert picture.size == (256, 256)


@pytest.mark.slow
def test_the_first_command_reaches_its_numbers(tmp_path):
    """`python train.py` in a folder that holds only the code."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py"), *ROOT.glob("support/*.py")]:
        copied = tmp_path / path.relative_to(ROOT)
        copied.parent.mkdir(exist_ok=True)
        copied.write_text(path.read_text())
    process = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    table = process.stdout[process.stdout.index("image AUROC"):]
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/demo/*/metrics.json")]
    assert results and all(f"\n{metrics['category']} " in table for metrics in results)
    for metrics in results:
        assert metrics["image_auroc"] >= 0.95 and metrics["aupro"] >= 0.80, metrics
    assert len(list(tmp_path.glob("runs/demo/*/qualitative.png"))) == len(results)
