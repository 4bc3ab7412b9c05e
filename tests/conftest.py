"""Fixtures shared by the tests: the demo data and one small trained model."""
from pathlib import Path

import pytest

import demo
import train

# A model that trains in a minute or two: what the tests of everything behind training share.
SMALL = ["--category", "fabric", "--resize", "64", "--crop", "64", "--channels", "16", "--batch",
         "4", "--steps", "300", "--infer-steps", "3", "--checkpoint-every", "100", "--precision",
         "float32", "--device", "cpu"]


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A folder that holds the demo data as demo/CATEGORY."""
    root = tmp_path_factory.mktemp("data")
    demo.write(root / "demo")
    return root


@pytest.fixture(scope="session")
def small(demo_root, tmp_path_factory) -> tuple[Path, list[str]]:
    """The run folder of a small trained model, and the arguments that made it."""
    out = tmp_path_factory.mktemp("small") / "runs"
    argv = [*SMALL, "--root", str(demo_root), "--out", str(out)]
    assert train.main(argv) == 0
    return out / "demo" / "fabric", argv
