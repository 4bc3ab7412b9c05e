"""The losses of trained models on held-out normal images with synthetic anomalies.

    python tools/held_out_loss.py runs/demo/gear runs/demo/gear-other

This measures how far a training has come, without the test set. The images are those that the run
has held out, half of them with an anomaly, at the size of the model and with t going through all
steps. The samples depend on nothing but the images, so runs of the same seed and size, trained in
different ways, are measured on the same samples.
"""
import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

import perlin
from data import RunData, load_run_data, scale
from runs import load_model
from support.console import InputError, exit_status, progress_bar
from support.devices import pick_device
from support.files import save_csv
from transfusion import Method

BATCH, SEED = 32, 12345


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Losses of trained models on held-out normal "
                                                 "images with synthetic anomalies.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders")
    parser.add_argument("--samples", type=int, default=512, help="number of samples (default 512)")
    parser.add_argument("--root", help="folder of the data sets (default: that of the run)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the losses there")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags = command_line().parse_args(argv)
    if flags.samples < 1:
        raise InputError(f"--samples {flags.samples}: must be at least 1")
    rows = []
    for folder in flags.runs:
        device = pick_device(flags.device)
        model, s, state = load_model(folder / "last.pt", device)
        s = dataclasses.replace(s, root=flags.root or s.root)
        run_data = load_run_data(s, training=False, folder=folder)
        if not len(run_data.held_out):
            raise InputError(f"{folder} holds no images out; train with --hold-out 0.1")
        losses = held_out_losses(model, run_data, flags.samples, device)
        rows.append({"run": folder.as_posix(), "step": state["step"],
                     **{name: f"{value:.5f}" for name, value in losses.items()}})
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if flags.csv:
        save_csv(flags.csv, rows)


def held_out_losses(model: Method, run_data: RunData, samples: int,
                    device: torch.device) -> dict[str, float]:
    """The mean of `TransFusion.losses` over so many samples, by name."""
    rng, means = np.random.default_rng(SEED), {}
    chosen = np.resize(run_data.held_out, samples)
    for first in progress_bar(range(0, samples, BATCH), desc="losses", unit="batch"):
        batch = chosen[first:first + BATCH]
        images = run_data.images[batch].to(device)
        foreground = run_data.foreground[batch].to(device, torch.float32)
        t = torch.arange(first, first + len(batch), device=device) % model.last_step + 1
        textures = run_data.textures.draw((len(batch) + 1) // 2, rng).to(device)
        anomalies = perlin.synthesize(images, foreground, textures, t == model.last_step, rng)
        with torch.no_grad():
            losses = model.losses(scale(images), scale(anomalies.A) * anomalies.M, anomalies.M,
                                  anomalies.M_a, t)
        for name, value in losses.items():
            means[name] = means.get(name, 0.0) + value.item() * len(batch) / samples
    return means


if __name__ == "__main__":
    sys.exit(main())
