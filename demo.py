"""The embedded demo data: three products drawn by code, in MVTec AD's layout.

fabric is a texture, gear a rigid object, blister a pack of several parts. Pose, light, colour and
sensor noise vary from image to image. Fixed seeds determine every image. No photograph is used, and
the defects share no code with perlin.py's synthetic anomalies.
"""
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from support.console import InputError, progress_bar

SIZE = 256
TRAIN, TEST_GOOD, PER_DEFECT = 80, 24, 11
Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
Drawn = tuple[np.ndarray, np.ndarray]               # an image and the mask of its defect
DEFECTS = {"fabric": ("cut", "hole", "pulled_thread", "stain"),
           "gear": ("broken_tooth", "missing_hole", "rust", "scratch"),
           "blister": ("broken", "missing", "scratch", "wrong_pill")}


# ---------------------------------------------------------------- drawing tools

def cover(distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
    """Pixel coverage in [0, 1] of a shape, from its signed distance in pixels (negative inside)."""
    return np.clip(0.5 - distance / softness, 0, 1)


def smooth_noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """A random field [256, 256] of unit variance, smoothed by a Gaussian of `sigma` pixels."""
    noise = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), sigma, mode="wrap")
    return noise / noise.std()


def polar(cy: float, cx: float, y: np.ndarray = Y,
          x: np.ndarray = X) -> tuple[np.ndarray, np.ndarray]:
    return np.hypot(y - cy, x - cx), np.arctan2(y - cy, x - cx)


def blob(rng: np.random.Generator, cy: float, cx: float, radius: float) -> np.ndarray:
    """Approximate signed distance in pixels, [256, 256], of a blob with an irregular outline."""
    r, angle = polar(cy, cx)
    outline = sum(rng.normal() * 0.25 / k * np.cos(k * angle + rng.uniform(0, 6.3))
                  for k in range(2, 7))
    return r - radius * np.clip(1 + outline, 0.4, 1.6)


def curve(rng: np.random.Generator, cy: float, cx: float, length: float, angle: float,
          bend: float) -> np.ndarray:
    """Distance in pixels, [256, 256], to a bent stroke of `length` pixels around (cy, cx)."""
    u = np.linspace(-0.5, 0.5, 48)
    along, across = length * u, bend * length * (u ** 2 - 0.1) * rng.choice([-1, 1])
    py = cy + along * np.sin(angle) + across * np.cos(angle)
    px = cx + along * np.cos(angle) - across * np.sin(angle)
    return np.sqrt(((Y[..., None] - py) ** 2 + (X[..., None] - px) ** 2).min(-1))


def paint(image: np.ndarray, colour, alpha: np.ndarray) -> np.ndarray:
    return image + alpha[..., None] * (np.asarray(colour, dtype=float) - image)


def photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add uneven light, slight blur and sensor noise; float RGB in 0..255 to uint8."""
    slope = rng.normal(0, 0.04, 2)
    light = rng.normal(1, 0.03) + slope[0] * (Y / SIZE - 0.5) + slope[1] * (X / SIZE - 0.5)
    image = image * light[..., None] * rng.normal(1, 0.006, 3)
    image = ndimage.gaussian_filter(image, (0.6, 0.6, 0))
    image = image + rng.normal(0, 2.5, image.shape) + rng.normal(0, 1.5, (SIZE, SIZE, 1))
    return image.clip(0, 255).round().astype(np.uint8)


# ---------------------------------------------------------------- products
# healed: draw the same random numbers as for the defect, but leave the defect out.

def fabric(rng: np.random.Generator, defect: str | None, healed: bool) -> Drawn:
    """Plain-woven cloth seen from above."""
    angle, pitch = rng.normal(0, 0.02), rng.normal(9.0, 0.15)
    wobble = 0.6 * smooth_noise(rng, 20), 0.6 * smooth_noise(rng, 20)
    u = (X * np.cos(angle) + Y * np.sin(angle) + wobble[0]) / pitch + rng.uniform()
    v = (Y * np.cos(angle) - X * np.sin(angle) + wobble[1]) / pitch + rng.uniform()
    lift = np.zeros((SIZE, SIZE))
    alpha = np.zeros((SIZE, SIZE))
    cy, cx = rng.uniform(40, SIZE - 40, 2)
    if defect == "pulled_thread":                     # one warp thread lies loose on the cloth
        alpha = cover(curve(rng, cy, cx, rng.uniform(70, 150), np.pi / 2 + angle,
                            rng.uniform(0, 0.06)) - rng.uniform(2.2, 3.2))
        lift = ndimage.gaussian_filter(alpha, 4)
        u = u if healed else u + 0.5 * lift
    warp = np.abs(np.sin(np.pi * u)) ** 0.6
    weft = np.abs(np.sin(np.pi * v)) ** 0.6
    warp_on_top = (np.floor(u) + np.floor(v)) % 2 == 0
    crown_u = 0.75 + 0.25 * np.abs(np.sin(np.pi * v))
    crown_v = 0.75 + 0.25 * np.abs(np.sin(np.pi * u))
    fibres = 1 + 0.05 * ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), (2, 0.5)) \
        + 0.05 * ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), (0.5, 2))
    warp_colour = np.array([92, 112, 150]) + rng.normal(0, 3, 3)
    weft_colour = np.array([128, 145, 176]) + rng.normal(0, 3, 3)
    shade = np.where(warp_on_top, warp * crown_u, weft * crown_v) * fibres
    image = np.where(warp_on_top[..., None], warp_colour, weft_colour) \
        * (0.35 + 0.65 * shade)[..., None]
    image *= (1 + 0.03 * smooth_noise(rng, 30))[..., None]
    normal = image.copy()

    if defect == "pulled_thread":
        twist = 0.85 + 0.15 * np.sin(0.9 * Y + 0.5 * X)
        image *= (1 - 0.35 * (lift - alpha).clip(0))[..., None]
        image = paint(image, warp_colour * 1.25, alpha) * np.where(alpha > 0, twist, 1)[..., None]
    elif defect == "hole":
        distance = blob(rng, cy, cx, rng.uniform(6, 15)) + 2.5 * (np.maximum(warp, weft) - 0.7)
        alpha = cover(distance, 2)
        image = paint(image, [26, 25, 28], alpha)
        image *= (1 + 0.25 * cover(np.abs(distance - 2) - 1.5, 2))[..., None]
    elif defect == "cut":
        stroke = curve(rng, cy, cx, rng.uniform(25, 70), rng.uniform(0, np.pi),
                       rng.uniform(0, 0.2))
        alpha = cover(stroke - rng.uniform(1.2, 2.0))
        image = paint(image, [38, 38, 44], 0.85 * alpha)
    elif defect == "stain":
        radius = rng.uniform(10, 26)
        alpha = cover(blob(rng, cy, cx, radius), 0.35 * radius)
        tint = rng.choice([[0.80, 0.72, 0.62], [0.70, 0.70, 0.74], [1.14, 1.12, 1.05]])
        image *= 1 + alpha[..., None] * (tint - 1)
    return photograph(normal if healed else image, rng), alpha >= 0.5


def gear(rng: np.random.Generator, defect: str | None, healed: bool) -> Drawn:
    """A machined steel gear on a light bench."""
    cy, cx = SIZE / 2 + rng.normal(0, 4, 2)
    rotation, teeth = rng.uniform(0, 2 * np.pi), 20
    r, angle = polar(cy, cx)
    angle = angle - rotation
    wave = np.cos(teeth * angle)
    height = 8.0 * np.clip(2.2 * wave, -1, 1)
    fracture = np.zeros((SIZE, SIZE))
    outline = r - (88 + height)
    mask = np.zeros((SIZE, SIZE))
    if defect == "broken_tooth":
        tooth_angle = rng.integers(0, teeth) * 2 * np.pi / teeth
        at_tooth = np.abs(np.angle(np.exp(1j * (angle - tooth_angle)))) < np.pi / teeth
        fracture = r - (rng.uniform(78, 90) + 1.5 * smooth_noise(rng, 3))
        mask = cover(outline) * np.where(at_tooth, 1 - cover(fracture), 0)
        outline = np.where(at_tooth & (not healed), np.maximum(outline, fracture), outline)
    distance = np.maximum(outline, 22 - r)                          # the bore
    keyway = np.maximum(np.abs(r * np.sin(angle)) - 5, np.maximum(r * np.cos(angle) - 29,
                                                                  -r * np.cos(angle)))
    distance = np.maximum(distance, -keyway)
    filled_hole = rng.integers(0, 6) if defect == "missing_hole" else -1
    for k in range(6):
        a = rotation + (k + 0.5) * np.pi / 3
        hole = np.hypot(Y - cy - 53 * np.sin(a), X - cx - 53 * np.cos(a)) - 11
        if k == filled_hole:
            mask = cover(hole)
        if k != filled_hole or healed:
            distance = np.maximum(distance, -hole)

    bench = np.array([196, 192, 184]) + rng.normal(0, 1.5, 3)
    image = bench + (1.5 * smooth_noise(rng, 1.5) + 3 * smooth_noise(rng, 40))[..., None]
    shadow = ndimage.shift(cover(distance), (5, 6), order=1, mode="nearest")
    image *= (1 - 0.45 * ndimage.gaussian_filter(shadow, 5))[..., None]

    highlight_angle = rng.normal(0.6, 0.15)                         # on lathe-turned metal
    sheen = np.cos(2 * (angle + rotation - highlight_angle)) ** 2 * 0.22
    rings = 0.03 * np.interp(r, np.arange(0, 260, 0.5), rng.normal(size=520))
    edge = np.clip(1 + distance / 5, 0, 1)                          # bevel towards the edges
    metal = 118 * (0.9 + sheen + rings) + 12 * smooth_noise(rng, 50) * 0.3
    metal = metal * (1 - 0.35 * edge)
    ring = cover(np.abs(r - 36) - 1.2, 1.5) + cover(np.abs(r - 72) - 1.2, 1.5)
    metal = metal * (1 - 0.25 * ring)
    image = paint(image, [0, 0, 0], cover(distance)) \
        + cover(distance)[..., None] * metal[..., None] * np.array([0.98, 1.0, 1.04])
    normal = image.copy()

    if defect in ("rust", "scratch"):
        a, offset = rng.uniform(0, 2 * np.pi), rng.uniform(40, 72)
        py, px = cy + offset * np.sin(a), cx + offset * np.cos(a)
        if defect == "rust":
            radius = rng.uniform(8, 18)
            mask = cover(blob(rng, py, px, radius), 0.4 * radius)
            grain = 1 + 0.18 * smooth_noise(rng, 1.2)
            colour = np.array([132, 84, 52]) * grain[..., None]
            image = image + (rng.uniform(0.45, 0.85) * mask * cover(distance))[..., None] \
                * (colour - image)
        else:
            stroke = curve(rng, py, px, rng.uniform(25, 60), rng.uniform(0, np.pi),
                           rng.uniform(0, 0.3))
            mask = cover(stroke - rng.uniform(1.0, 1.6))
            image = paint(image, rng.choice([[205, 207, 212], [58, 58, 60]]),
                          rng.uniform(0.6, 0.9) * mask * cover(distance))
        mask = mask * cover(distance)
    return photograph(normal if healed else image, rng), mask >= 0.5


def blister(rng: np.random.Generator, defect: str | None, healed: bool) -> Drawn:
    """A blister pack of eight round tablets."""
    tilt = rng.normal(0, 0.025)
    oy, ox = SIZE / 2 + rng.normal(0, 3, 2)

    def pocket_centre(row: int, column: int) -> tuple[float, float]:
        y, x = (row - 1.5) * 56, (column - 0.5) * 84
        return oy + y * np.cos(tilt) + x * np.sin(tilt), ox + x * np.cos(tilt) - y * np.sin(tilt)

    v = (Y - oy) * np.cos(tilt) - (X - ox) * np.sin(tilt)
    u = (X - ox) * np.cos(tilt) + (Y - oy) * np.sin(tilt)
    corner = 14
    card = np.hypot((np.abs(u) - 92 + corner).clip(0), (np.abs(v) - 116 + corner).clip(0)) - corner
    table = np.array([74, 88, 92]) + rng.normal(0, 1, 3)
    image = table + (1.5 * smooth_noise(rng, 1) + 3 * smooth_noise(rng, 45))[..., None]
    shadow = ndimage.shift(cover(card), (4, 5), order=1, mode="nearest")
    image *= (1 - 0.5 * ndimage.gaussian_filter(shadow, 4))[..., None]
    knurl = 4 * np.sign(np.sin(u * 1.05) * np.sin(v * 1.05))
    foil = 176 + knurl + 7 * smooth_noise(rng, 25) + 10 * np.sin((u + v) / 60 + rng.uniform(0, 6))
    image = paint(image, [0, 0, 0], cover(card)) \
        + (cover(card) * foil)[..., None] * np.array([0.98, 1.0, 1.02])

    mask = np.zeros((SIZE, SIZE))
    defective_pocket = rng.integers(0, 8)
    tablet_colour = np.array([226, 214, 190]) + rng.normal(0, 2.5, 3)
    light_angle = rng.normal(-2.2, 0.15)
    for k in range(8):
        py, px = pocket_centre(k // 2, k % 2)
        window = tuple(slice(max(int(c) - 36, 0), int(c) + 37) for c in (py, px))
        patch, y, x = image[window], Y[window], X[window]            # holds the whole pocket
        r, angle = polar(py, px, y, x)
        rim = np.cos(angle - light_angle)
        patch *= (1 + 0.22 * rim * cover(np.abs(r - 24) - 2.0, 2))[..., None]        # pocket's edge
        patch *= (1 - 0.10 * cover(r - 22, 2))[..., None]
        py, px = py + rng.normal(0, 1.3), px + rng.normal(0, 1.3)   # loose in its pocket
        r, angle = polar(py, px, y, x)
        distance, colour = r - 17.5, tablet_colour + rng.normal(0, 1.5, 3)
        score_line = rng.uniform(0, np.pi)
        if k == defective_pocket and defect == "missing":
            mask[window] = cover(distance)
            if not healed:
                patch *= (1 + 0.05 * rim * cover(np.abs(r - 14) - 3, 3))[..., None]
                continue
        if k == defective_pocket and defect == "broken":
            break_angle = rng.uniform(0, 2 * np.pi)
            chord = (x - px) * np.cos(break_angle) + (y - py) * np.sin(break_angle)
            crack = chord - rng.uniform(-4, 9) - 1.2 * smooth_noise(rng, 2.5)[window]
            mask[window] = cover(distance) * cover(-crack)
            distance = distance if healed else np.maximum(distance, crack)
        if k == defective_pocket and defect == "wrong_pill":
            mask[window] = cover(distance)
            if rng.random() < 0.5:
                tint = rng.choice([[0.93, 0.80, 0.74], [0.82, 0.92, 0.86], [0.84, 0.86, 1.0]])
                colour = colour if healed else colour * tint
            else:                                                   # a smaller tablet
                smaller = r - rng.uniform(12.5, 14.5)
                mask[window] *= 1 - cover(smaller)
                distance = distance if healed else smaller
        body = cover(distance)
        patch *= (1 - 0.35 * ndimage.gaussian_filter(
            ndimage.shift(body, (2, 2), order=1) * (1 - body), 1.5))[..., None]
        dome = 1 + 0.10 * np.cos(angle - light_angle) * np.clip(r / 17.5, 0, 1) ** 3 \
            - 0.06 * np.clip(r / 17.5, 0, 1) ** 6
        groove = np.abs((x - px) * np.sin(score_line) - (y - py) * np.cos(score_line)) - 0.8
        empty = k == defective_pocket and defect == "missing"       # then the defect draws no grain
        grain = smooth_noise(np.random.default_rng(0) if empty else rng, 0.8)[window]
        dome = dome * (1 - 0.14 * cover(groove, 1.5)) + 0.01 * grain
        patch += body[..., None] * (colour * dome[..., None] - patch)
        gloss = np.hypot(y - py - 9 * np.sin(light_angle), x - px - 9 * np.cos(light_angle))
        patch += (24 * np.exp(-(gloss / 3.5) ** 2))[..., None]       # gloss of the plastic

    if defect == "scratch":
        stroke = curve(rng, oy + rng.uniform(-85, 85), ox + rng.uniform(-65, 65),
                       rng.uniform(30, 80), rng.uniform(0, np.pi), rng.uniform(0, 0.25))
        mask = cover(stroke - rng.uniform(1.1, 1.8)) * cover(card)
        scratched = paint(image, rng.choice([[236, 238, 240], [96, 97, 100]]),
                          rng.uniform(0.55, 0.85) * mask)
        image = image if healed else scratched
    return photograph(image, rng), mask >= 0.5


PRODUCTS = {"fabric": fabric, "gear": gear, "blister": blister}


# ---------------------------------------------------------------- the data set

def draw(category: str, defect: str | None, number: int, healed: bool = False) -> Drawn:
    """An image, uint8 [256, 256, 3], and the exact mask of its defect, bool [256, 256].

    defect: one of DEFECTS[category], or None for a good product; number: index of the image. The
    same arguments give the same pixels. A defect of fewer than 25 pixels is drawn again. healed:
    return the image without its defect (the N of Eq. 1), with the mask of that defect.
    """
    kind = 0 if defect is None else 1 + DEFECTS[category].index(defect)
    for attempt in range(20):
        rng = np.random.default_rng([list(PRODUCTS).index(category), kind, number, attempt])
        image, mask = PRODUCTS[category](rng, defect, healed)
        if defect is None or mask.sum() >= 25:
            break
    return image, mask


def write(folder: Path, category: str = "all") -> None:
    """Draw a category into `folder` unless it exists; for any other name, draw all three.

    A category is written completely or not at all. Several processes may draw at the same time: the
    first one to finish a category wins. Raises InputError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in [category] if category in PRODUCTS else PRODUCTS:
            if not (folder / name).is_dir():
                write_category(folder, name)
    except OSError as error:
        raise InputError(f"the demo data cannot be drawn into {folder} ({error}); "
                         f"choose another --root")


def write_category(folder: Path, category: str) -> None:
    jobs = [("train/good", None, k) for k in range(TRAIN)]
    jobs += [("test/good", None, TRAIN + k) for k in range(TEST_GOOD)]
    jobs += [(f"test/{d}", d, k) for d in DEFECTS[category] for k in range(PER_DEFECT)]
    with tempfile.TemporaryDirectory(prefix=f"{category}.", suffix=".part", dir=folder) as temp, \
            ThreadPoolExecutor(os.cpu_count()) as pool:
        new_folder = Path(temp) / category
        pictures = [pool.submit(draw, category, defect, number) for _, defect, number in jobs]
        try:
            bar = progress_bar(jobs, desc=f"drawing {category}", unit="image", leave=False)
            for (subfolder, defect, number), picture in zip(bar, pictures):
                image, mask = picture.result()
                save(new_folder / subfolder / f"{number:03}.png", image)
                if defect:
                    save(new_folder / "ground_truth" / defect / f"{number:03}_mask.png",
                         mask.astype(np.uint8) * 255)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        try:
            os.replace(new_folder, folder / category)
        except OSError:
            if not (folder / category).is_dir():
                raise


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
