"""Fixtures shared by the tests: the demo data and one small trained model."""
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import demo
import evaluate
import train

THREADS = torch.get_num_threads()
torch.set_num_threads(1)        # most models here are so small that two threads wait for each other

# A model that trains in a minute or two: what the tests of everything behind training share.
SMALL = ["--category", "fabric", "--resize", "64", "--crop", "64", "--channels", "16", "--batch",
         "4", "--steps", "400", "--infer-steps", "3", "--checkpoint-every", "100", "--precision",
         "float32", "--device", "cpu"]


@contextmanager
def all_cores():
    """What `small` is trained and scored with."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def few_synthetic_defects():
    """8 in place of 64: most tests score a model that has learned nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "SYNTHETIC", 8)
        yield


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
    with all_cores():
        assert train.main(argv) == 0
    return out / "demo" / "fabric", argv


def pytest_collection_modifyitems(items):
    """The notebooks run beside the other tests: what became of them is asked last."""
    items.sort(key=lambda item: item.name.startswith("test_notebook_runs"))
