"""The README says what is there: its commands parse, its functions, tests and files exist."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import download
import predict
import train
import transfusion
from settings import Settings, parse

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def test_the_first_two_commands():
    assert commands()[:4] == ["pip install -r requirements.txt", "python train.py",
                              "pip install -r requirements.txt", "pytest"]


@pytest.mark.parametrize("command", [c for c in commands() if "train.py" in c])
def test_training_commands_parse(command):
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"]
    settings, _ = parse(words[2:])
    assert settings.category


@pytest.mark.parametrize("module", [download, predict, bench])
def test_other_commands_are_those_of_the_readme(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    usage = capsys.readouterr().out
    mine = [c for c in commands() + re.findall(r"`(python [^`]+)`", README)
            if module.__name__ + ".py" in c]
    assert mine
    for flag in re.findall(r"(--[a-z-]+)", " ".join(mine)):
        assert flag in usage, flag


def test_every_notebook_and_section_of_the_index_exists():
    rows = re.findall(r"^\| [^|]*(?:Fig|Table)[^|]* \| (\d\d_\w+)(?:, ([^;|]+?))?(?:;[^|]*)? \|", README,
                      re.M)
    assert len(rows) > 8
    for name, section in rows:
        text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
        assert not section or section.startswith("without") or f"## {section}" in text, section


def test_every_equation_is_where_the_index_says():
    rows = re.findall(r"^\| (\d+(?:, \d+)*) \| .*? \| (.*?) \| (.*?) \|$", README, re.M)
    assert [int(n) for row in rows for n in row[0].split(", ")] == list(range(1, 12))
    tests = (ROOT / "tests" / "test_transfusion.py").read_text()
    for numbers, functions, names in rows:
        for name in re.findall(r"`(\w+)`", functions):
            doc = getattr(transfusion, name).__doc__
            assert name == "ssim" or f"Eq. {numbers.split(',')[0]}" in doc, name
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in tests, name


def test_flags_and_links_exist():
    fields = {name.replace("_", "-") for name in Settings.__dataclass_fields__}
    fields |= {"no-pe", "no-sim-mask", "eval", "eval-every", "resume", "weights", "help"}
    fields |= {"check", "maps", "calibrate", "nproc_per_node"}                                      # of download.py, predict.py
    assert set(re.findall(r"--([a-zA-Z][\w-]*)", README)) <= fields
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    assert "@@" not in README


@pytest.mark.slow
def test_the_first_command_reaches_its_numbers(tmp_path):
    """`python train.py` as a newcomer runs it, in a folder of its own."""
    import json
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout[done.stdout.index("image AUROC"):]
    found = [json.loads(path.read_text()) for path in tmp_path.glob("runs/demo/*/metrics.json")]
    assert found and all(f"\n{row['category']} " in table for row in found)
    for row in found:
        assert row["image_auroc"] >= 0.95 and row["aupro"] >= 0.80, row
    assert len(list(tmp_path.glob("runs/demo/*/qualitative.png"))) == len(found)
