"""The README's pictures, drawn with the models of one run or several.

    python tools/readme_figures.py runs/demo/fabric runs/demo/blister runs/demo/gear

docs/method.png is one reverse step with the model of the first run: x_t, M_t, eps_t, n_t and
x_{t-1} as in Eq. 4. x_t is a training image with a synthetic anomaly at t = T. The step goes half
the way at once, because one step of twenty changes too little to be seen. docs/demo.png shows two
test images of every run: the first of its first and of its last kind of defect, by name.
docs/restoration.gif shows how those of the first run are restored, one frame a step;
docs/restoration.png has five of these frames below each other, for paper.
"""
import argparse
import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))     # the modules lie one folder up

from data import RunData, load_run_data, scale
from evaluate import draw_restorations
from runs import load_model
from settings import Settings
from support.console import exit_status
from support.pictures import pick_rows
from train import make_batch
from transfusion import (Step, TransFusion, final_mask, forward_process, reconstruction_error,
                         reverse_step)

PANEL, GAP, ABOVE, BELOW, DPI = 256, 26, 84, 66, 100                     # pixels


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Draw the README's pictures.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders")
    parser.add_argument("--root", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--batch", type=int, default=3, help="number of the training batch, whose "
                        "first image is drawn")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures")
    return parser


@exit_status
def main(argv: list[str] | None = None) -> None:
    """The command line. `exit_status` makes its end 0, 2 (a user's mistake) or 130 (Ctrl-C)."""
    flags = command_line().parse_args(argv)
    pictures = []
    for folder in flags.runs:
        model, s, _ = load_model(folder / "last.pt", torch.device("cpu"))
        run_data = load_run_data(dataclasses.replace(s, root=flags.root, device="cpu"))
        items = run_data.category.test
        defective = [k for k in pick_rows([item.defect for item in items], 1) if items[k].label]
        shown = [defective[0], defective[-1]]
        if not pictures:
            draw_step(*half_way_back(model, s, run_data, flags.batch), flags.out / "method.png")
            frames = restoration_frames(model, s, run_data.test[shown],
                                        [items[k].defect for k in shown])
            save_animation(frames, flags.out)
        file = io.BytesIO()
        draw_restorations(file, model, s, run_data.test[shown],
                          [f"{s.category}\n{items[k].defect}" for k in shown],
                          [run_data.masks[k] for k in shown])
        pictures.append(np.asarray(Image.open(file).convert("RGB")))
    Image.fromarray(np.concatenate(pictures)).save(flags.out / "demo.png", optimize=True)


def restoration_frames(model: TransFusion, s: Settings, images: Tensor,
                       names: list[str]) -> list[Image.Image]:
    """A frame for the images as they are and for each step of their restorations.

    images: uint8 [B, 3, H, W]; names: what stands beside their rows. A row of a frame is x_t, the
    mask M_t that led to it, and the map of Eq. 10 over the steps so far.
    """
    x, masks = scale(images), []
    states = [(x, torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1]))]
    for step in model.reverse_process(x):
        masks.append(step.M_t)
        error = reconstruction_error(x, step.x_prev)
        M_so_far = final_mask(torch.stack(masks).mean(0), error, s.lam, s.kernel)
        states.append((step.x_prev, step.M_t, M_so_far))
    largest = states[-1][2].amax((1, 2, 3)).tolist()             # the colours of a row's maps
    return [draw_frame(state, largest, names, f"$t = {t}$,   " rf"$\beta_t = {model.beta[t]:.2f}$")
            for state, t in zip(states, model.path())]


def draw_frame(state: tuple[Tensor, Tensor, Tensor], largest: list[float], names: list[str],
               title: str) -> Image.Image:
    """A frame of x_t, M_t and the maps, [B, C, H, W]; a row's maps have colours up to `largest`."""
    left = 2 * GAP                                                       # for the names
    width = left + 3 * (PANEL + GAP)
    height = ABOVE + len(largest) * (PANEL + GAP)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    for row, limit in enumerate(largest):
        for column, pictures in enumerate(state):
            axis = figure.add_axes([(left + column * (PANEL + GAP)) / width,
                                    (GAP + (len(largest) - 1 - row) * (PANEL + GAP)) / height,
                                    PANEL / width, PANEL / height])
            show(axis, pictures[row:row + 1],
                 *(("gray", 1.0) if column == 1 else ("inferno", limit)))
            if column == 0:
                axis.set_ylabel(names[row], fontsize=14)
    for column, words in enumerate(("image $x_t$", "mask $M_t$", "anomaly map")):
        figure.text((left + column * (PANEL + GAP) + PANEL / 2) / width, 1 - 65 / height, words,
                    ha="center", va="center", fontsize=14)
    figure.text(0.5, 1 - 26 / height, title, ha="center", va="center", fontsize=16)
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI)
    return Image.open(file).convert("RGB")


def save_animation(frames: list[Image.Image], folder: Path) -> None:
    """Save restoration.gif, which pauses at its first and last frame, and restoration.png."""
    times = [1500, *[150] * (len(frames) - 2), 2500]                     # milliseconds
    colours = frames[len(frames) // 2].quantize(255, Image.Quantize.MAXCOVERAGE)    # for all
    frames_of_256 = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    frames_of_256[0].save(folder / "restoration.gif", save_all=True, duration=times, loop=0,
                          append_images=frames_of_256[1:], optimize=True)
    still = np.linspace(0, len(frames) - 1, 5).round().astype(int)
    Image.fromarray(np.concatenate([np.asarray(frames[k]) for k in still])).save(
        folder / "restoration.png", optimize=True)


def half_way_back(model: TransFusion, s: Settings, run_data: RunData,
                  batch: int) -> tuple[Step, float, float]:
    """Eq. 4 from t = T to the middle, for the first image of a training batch: the step, and beta
    before and after it."""
    x, eps, M, _, _ = make_batch(s, run_data, model.last_step, batch, torch.device("cpu"))
    x, eps, M = x[:1], eps[:1], M[:1]
    t, t_prev = model.path(2)[:2]
    beta, beta_prev = model.beta[t], model.beta[t_prev]
    x_t = forward_process(x, eps, M, beta)                                          # Eq. 2
    with torch.no_grad():
        eps_t, n_t, logit = model.predict(x_t, torch.zeros_like(M), torch.tensor([t]))
    x_prev = reverse_step(x_t, (logit > 0).float(), eps_t, n_t, beta, beta_prev)    # Eq. 4
    return Step(t, x_t, logit.sigmoid(), eps_t, n_t, x_prev), beta.item(), beta_prev.item()


def show(axis: Axes, picture: Tensor, colours: str = "gray", largest: float = 1.0) -> None:
    """Draw an image [1, 3, H, W] in [-1, 1] or a map [1, 1, H, W] in 0..largest."""
    if len(picture[0]) == 3:
        axis.imshow((picture[0].clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0), interpolation="bilinear")
    else:
        axis.imshow(picture[0, 0], cmap=colours, vmin=0, vmax=largest, interpolation="bilinear")
    axis.set(xticks=[], yticks=[])


def draw_step(step: Step, beta_t: float, beta_prev: float, out: Path) -> None:
    """Five panels of PANEL pixels, with the paper's symbols above them and Eq. 4 below."""
    panels = [("$x_t$", rf"$t = T$, $\beta_t$ = {beta_t:.2g}", step.x_t),
              ("$M_t$", "where the anomaly is", step.M_t),
              (r"$\epsilon_t$", "how it looks (grey: none)", step.eps_t),
              ("$n_t$", "what is beneath it", step.n_t),
              ("$x_{t-1}$", rf"one step on, $\beta_{{t-1}}$ = {beta_prev:.2g}", step.x_prev)]
    width = len(panels) * (PANEL + GAP) + GAP
    height = ABOVE + PANEL + BELOW
    figure = Figure(figsize=(width / DPI, height / DPI), facecolor="white")
    for k, (symbol, words, picture) in enumerate(panels):
        left = GAP + k * (PANEL + GAP)
        axis = figure.add_axes([left / width, BELOW / height, PANEL / width, PANEL / height])
        show(axis, picture)
        middle = (left + PANEL / 2) / width
        figure.text(middle, 1 - 28 / height, symbol, ha="center", va="center", fontsize=23)
        figure.text(middle, 1 - 65 / height, words, ha="center", va="center", fontsize=14)
    figure.text(0.5, 28 / height, r"Eq. 4:   $x_{t-1} \;=\; x_t \;-\; (\beta_t - \beta_{t-1})"
                r"\;M_t \odot \epsilon_t \;+\; (\beta_t - \beta_{t-1})\;M_t \odot n_t$",
                ha="center", va="center", fontsize=19)
    figure.savefig(out, dpi=DPI)


if __name__ == "__main__":
    sys.exit(main())
