"""The oldest versions of the packages that requirements.txt admits."""
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_test_passes_with_the_oldest_packages(tmp_path):
    """Takes twenty minutes, four gigabytes and the network."""
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"

    def run(*words) -> None:
        subprocess.run([python, "-m", *words], cwd=HERE, check=True)

    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    run("pip", "install", "-q", "uv")
    run("uv", "pip", "install", "-q", "--python", python, "--resolution", "lowest-direct", "-r",
        "requirements.txt")
    run("pytest", "-q")
