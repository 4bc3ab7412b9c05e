"""Figures of images, restorations and anomaly maps, drawn from plain arrays."""
import numpy as np

from support.console import printable
from support.layouts import is_good

MAX_ROWS = 24                                           # at most, in the figure of a run


def over_grey(image: np.ndarray, M: np.ndarray, top: float) -> np.ndarray:
    """A map [H, W], coloured from 0 to `top`, over the grey image; [H, W, 3] in 0..255."""
    from matplotlib import colormaps
    fraction = np.clip(M / top, 0, 1)[..., None]
    alpha = 0.8 * np.sqrt(fraction)
    colours = colormaps["inferno"](fraction[..., 0])[..., :3] * 255
    return (1 - alpha) * image.mean(-1, keepdims=True) + alpha * colours


def pick_rows(kinds: list[str], of_each: int = 2) -> list[int]:
    """Indices of up to `of_each` images of each kind, good parts last; at most MAX_ROWS in all.

    kinds: the defect of every image, or "good".
    """
    names = sorted(set(kinds), key=lambda kind: (is_good(kind), kind))
    each = max(1, min(of_each, MAX_ROWS // len(names)))
    shown = [k for name in names
             for k in [k for k, kind in enumerate(kinds) if kind == name][:each]]
    return shown if len(shown) <= MAX_ROWS else shown[:MAX_ROWS - 1] + shown[-1:]


def draw_rows(file, photos: np.ndarray, restored: np.ndarray, M_final: np.ndarray,
              names: list[str], truths: list) -> None:
    """Write a PNG with a row per image: input, restoration, map over image, map, ground truth.

    photos, restored: [N, H, W, 3] in 0..255; M_final: [N, H, W]; truths: N masks [H, W] or None. If
    all are None, there is no such column.
    """
    from matplotlib.figure import Figure
    top = float(M_final.max())
    overlays = [over_grey(photo, M, top) for photo, M in zip(photos, M_final)]
    columns = {"image": photos, "restoration": restored, "map over image": overlays,
               "anomaly map": M_final}
    if any(M is not None for M in truths):
        columns["ground truth"] = [np.full_like(M_final[0], np.nan) if M is None else top * M
                                   for M in truths]

    figure = Figure(figsize=(2 * len(columns), 2 * len(photos) + 0.8), layout="constrained")
    axes = figure.subplots(1, len(columns))
    for axis, (title, pictures) in zip(axes, columns.items()):         # each column is one image
        side, white = len(pictures[0]), 255 if pictures[0].ndim == 3 else np.nan
        gap = side // 16
        rows = [np.pad(picture, ((0, gap), *[(0, 0)] * (picture.ndim - 1)), constant_values=white)
                for picture in pictures]
        column = np.concatenate(rows)[:-gap]
        shade = axis.imshow(column / 255 if column.ndim == 3 else column, cmap="inferno", vmin=0,
                            vmax=top)
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[], frame_on=False)
    side = photos.shape[1]
    axes[0].set_yticks([side / 2 + k * (side + side // 16) for k in range(len(photos))],
                       [printable(name) for name in names], fontsize=8, rotation=90, va="center",
                       ha="center", parse_math=False)
    axes[0].tick_params(length=0, pad=12)
    figure.colorbar(shade, ax=axes, location="bottom", shrink=0.4, aspect=30, pad=0.01,
                    label="M_final (Eq. 10)")
    figure.savefig(file, format="png", dpi=80)
