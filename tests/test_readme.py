"""The README and docs/ say what is there: commands parse, functions, tests, links and files exist."""
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

import bench
import download
import readme_figures
import predict
import train
import transfusion
from settings import Settings, parse

ROOT = Path(train.__file__).parent
PAGES = ["README.md", *sorted(f"{folder}/{path.name}" for folder in ("docs", "results")
                              for path in (ROOT / folder).glob("*.md"))]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README, REPRODUCE = TEXT["README.md"], TEXT["docs/reproduce.md"]
SHOWN = [page for page in PAGES if not page.startswith("results/")]      # which has old commands


def commands(page):
    """The commands of a page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT[page], re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def inline(page):
    """The commands between a page's backticks."""
    return re.findall(r"`(python [^`]+)`", TEXT[page])


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", outside, re.M)}


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 140
    for page in PAGES:
        for line in TEXT[page].splitlines():
            assert len(line) <= 120 or line.startswith("|"), (page, line)


def test_long_pages_begin_with_their_contents():
    """A page of more than two screens names its sections before the first of them."""
    for page in PAGES[1:]:
        sections = re.findall(r"^## (.*)$", TEXT[page], re.M)
        if TEXT[page].count("\n") > 80:
            top = TEXT[page].split("\n## ")[0]
            assert sections == re.findall(r"\[([^]]+)\]\(#", top), page


def test_the_first_commands():
    assert commands("README.md")[:5] == [
        "python -m venv venv", ". venv/bin/activate", "pip install -r requirements.txt",
        "python train.py", "python predict.py runs/demo/fabric data/demo/fabric/test --out found/"]
    assert "`pytest` runs the tests" in README


@pytest.mark.parametrize("page, command", [(page, c) for page in SHOWN
                                           for c in commands(page) + inline(page)
                                           if c.startswith(("python train.py",
                                                            "python tools/ablations.py"))
                                           and not c.endswith("--help")])
def test_training_commands_parse(page, command):
    settings, _ = parse(shlex.split(command)[2:])
    assert settings.category


@pytest.mark.parametrize("module", [download, predict, bench, readme_figures])
def test_other_commands_have_the_flags_that_are_shown(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    usage = capsys.readouterr().out
    mine = [c for page in SHOWN for c in commands(page) + inline(page)
            if module.__name__ + ".py" in c]
    assert mine
    for command in mine:
        script = shlex.split(command)[1]
        assert (ROOT / script).exists(), script
        for flag in re.findall(r"(--[a-z-]+)", command):
            assert flag in usage, flag


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


def test_flags_exist():
    fields = {name.replace("_", "-") for name in Settings.__dataclass_fields__}
    fields |= {"no-pe", "no-sim-mask", "eval", "eval-every", "resume", "weights", "help"}
    fields |= {"check", "maps", "calibrate", "nproc_per_node"}      # of download.py, predict.py ...
    fields |= {"method"}                                            # docs/baselines.md
    for page in SHOWN:
        assert set(re.findall(r"--([a-zA-Z][\w-]*)", TEXT[page])) <= fields, page


def test_links_and_anchors_exist():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXT[page]):
            name, _, anchor = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), (page, link)
            assert not anchor or anchor in anchors(target.read_text()), (page, link)


def test_the_method_figure_is_five_panels_of_256_pixels(small, demo_root, tmp_path):
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


def test_the_lines_of_python_run(small, demo_root, tmp_path, monkeypatch, capsys):
    """A finished run as the user's own, and a photo."""
    (tmp_path / "runs" / "parts").mkdir(parents=True)
    (tmp_path / "runs" / "parts" / "bolt").symlink_to(small[0])
    photo = next((demo_root / "demo" / "fabric" / "test" / "hole").iterdir())
    shutil.copy(photo, tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    lines, = re.findall(r"```python\n(.*?)```", README, re.S)
    found: dict = {}
    exec(lines, found)
    assert capsys.readouterr().out.startswith(f"{found['found'].score} {found['found'].verdict} [")
    with Image.open("map.png") as picture:
        assert picture.size == (256, 256)


@pytest.mark.slow
def test_the_first_command_reaches_its_numbers(tmp_path):
    """`python train.py` as a newcomer runs it, in a folder of its own."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]:
        copied = tmp_path / path.relative_to(ROOT)
        copied.parent.mkdir(exist_ok=True)
        copied.write_text(path.read_text())
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout[done.stdout.index("image AUROC"):]
    found = [json.loads(path.read_text()) for path in tmp_path.glob("runs/demo/*/metrics.json")]
    assert found and all(f"\n{row['category']} " in table for row in found)
    for row in found:
        assert row["image_auroc"] >= 0.95 and row["aupro"] >= 0.80, row
    assert len(list(tmp_path.glob("runs/demo/*/qualitative.png"))) == len(found)
