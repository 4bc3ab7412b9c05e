"""What starts without torch, whose import takes seconds."""
import subprocess
import sys

import pytest

from helpers import ROOT


def python(*argv) -> subprocess.CompletedProcess:
    process = subprocess.run([sys.executable, *argv], cwd=ROOT, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process


@pytest.mark.parametrize("module", ["support.console", "support.files", "support.layouts",
                                    "support.ranks", "metrics"])
def test_modules_that_import_no_torch(module):
    python("-c", f"import sys, {module}; assert 'torch' not in sys.modules")


def test_the_help_of_the_download_imports_no_torch():
    process = python("-X", "importtime", "tools/download.py", "--help")
    assert "usage: download.py" in process.stdout
    imported = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    assert "argparse" in imported and "support.console" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "torchvision")}
