"""Synthetic anomalies (paper, section 3.3): Perlin masks, simulated guides, anomaly appearances.

Masks are generated for a batch at once, as tensors on the device of the images. All random
numbers come from a NumPy generator on the CPU, so a seed means the same on every device. No value
is read back from the device. docs/differences.md lists how open points of the paper are read.
"""
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

LATTICE = 64            # > 32 sqrt(2) + 3, so a rotated map of 32 periods stays inside
TEXTURAL = 0.5          # share of textural anomalies; the others are structural (MemSeg)
GRID = 8                # blocks along each axis of a structural anomaly


class Synthetic(NamedTuple):
    """Anomalies for a batch; M and M_a [B, 1, H, W] in {0, 1}, the appearance A uint8 [B, 3, H, W].

    A covers the whole image. The eps of Eq. 2 is A, scaled to [-1, 1], inside M and zero outside.
    """
    M: Tensor
    M_a: Tensor
    A: Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, torch.float32)


# ---------------------------------------------------------------- masks

def perlin_noise(gradients: Tensor, periods: Tensor, angles: Tensor, phases: Tensor,
                 H: int, W: int) -> Tensor:
    """Gradient noise (Perlin 1985) on maps of any size, [B, 1, H, W], roughly within [-1, 1].

    gradients: [B, LATTICE, LATTICE] directions in radians; periods: [B, 2] lattice cells along the
    height and the width, at most 32; angles: [B] rotation of the whole map in radians; phases:
    [B, 2] in [0, 1), position of the map's centre within its lattice cell. The noise is zero at
    every lattice point: with phase 0, the image centre would never be anomalous.
    """
    device = gradients.device
    y = ((torch.arange(H, device=device) + 0.5) / H - 0.5)[None, :, None]      # [1, H, 1]
    x = ((torch.arange(W, device=device) + 0.5) / W - 0.5)[None, None, :]      # [1, 1, W]
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    stretch, origin = periods[:, :, None, None], (phases + LATTICE / 2)[:, :, None, None]
    u = (cos * y - sin * x) * stretch[:, 0] + origin[:, 0]                       # [B, H, W]
    v = (sin * y + cos * x) * stretch[:, 1] + origin[:, 1]
    u0, v0 = u.floor(), v.floor()
    du, dv = u - u0, v - v0
    flat = gradients.flatten(1)

    def corner(i: int, j: int) -> Tensor:
        """Dot product of the gradient at a corner of each pixel's cell and the offset from it."""
        index = ((u0 + i) * LATTICE + v0 + j).long().flatten(1)
        direction = flat.gather(1, index).view_as(u)
        return direction.cos() * (du - i) + direction.sin() * (dv - j)

    def fade(d: Tensor) -> Tensor:
        return d ** 3 * (d * (6 * d - 15) + 10)

    top = torch.lerp(corner(0, 0), corner(0, 1), fade(dv))
    bottom = torch.lerp(corner(1, 0), corner(1, 1), fade(dv))
    return (2 ** 0.5 * torch.lerp(top, bottom, fade(du)))[:, None]


def random_perlin(rng: np.random.Generator, B: int, H: int, W: int, device) -> Tensor:
    """Perlin noise: 2^{0..5} periods per axis, shifted at random, rotated by U(-90, 90) degrees."""
    gradients = to_device(rng.uniform(0, 2 * np.pi, (B, LATTICE, LATTICE)), device)
    periods = to_device(2.0 ** rng.integers(0, 6, (B, 2)), device)
    angles = to_device(rng.uniform(-np.pi / 2, np.pi / 2, B), device)
    phases = to_device(rng.random((B, 2)), device)
    return perlin_noise(gradients, periods, angles, phases, H, W)


def anomaly_mask(noise: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
    """M = |noise| > 0.5 inside the foreground, and the threshold that was used, [B, 1, 1, 1].

    noise, foreground ({0, 1}): [B, 1, H, W]. The threshold is 0.5, or 0.9 of the largest |noise| in
    the foreground if that is smaller, so M is empty only if the foreground is empty.
    """
    magnitude = noise.abs() * foreground
    threshold = (0.9 * magnitude.amax((1, 2, 3), keepdim=True)).clamp(max=0.5)
    return (magnitude > threshold).float(), threshold


def simulated_previous_mask(noise: Tensor, foreground: Tensor, threshold: Tensor,
                            case: Tensor, u: Tensor) -> Tensor:
    """M_a, a simulated mask of the previous step: M with a changed threshold, [B, 1, H, W].

    case: [B, 1, 1, 1] in 0..3; u: [B, 1, 1, 1] in [0, 1), the relative change of the threshold.
    """
    magnitude = noise.abs() * foreground
    level = torch.where(case == 1, threshold * (1 + u), threshold)      # 1: raised, often empty
    level = torch.where(case == 3, threshold * (1 - u), level)          # 3: lowered; 2: M_a = M
    return ((magnitude > level) & (case != 0)).float()                  # 0: M_a is empty


# ---------------------------------------------------------------- appearances

# The ten operations of the authors' code (by imgaug), in the ranges that torchvision accepts. Each
# maps a uint8 image [3, H, W] to a uint8 image of the same shape.

def gamma(image: Tensor, rng: np.random.Generator) -> Tensor:
    return torch.cat([TF.adjust_gamma(channel, g)
                      for channel, g in zip(image.split(1), rng.uniform(0.5, 2, 3).tolist())])


def brightness(image: Tensor, rng: np.random.Generator) -> Tensor:
    factor, offset = rng.uniform(0.8, 1.2), rng.uniform(-30, 30)
    return (image * factor + offset).clamp(0, 255).to(torch.uint8)


def sharpness(image: Tensor, rng: np.random.Generator) -> Tensor:
    return TF.adjust_sharpness(image, rng.uniform(0.1, 1.9))


def hue_saturation(image: Tensor, rng: np.random.Generator) -> Tensor:
    image = TF.adjust_hue(image, rng.uniform(-0.14, 0.14))
    return TF.adjust_saturation(image, rng.uniform(0.6, 1.4))


def solarize(image: Tensor, rng: np.random.Generator) -> Tensor:
    threshold = rng.uniform(32, 128)
    return TF.solarize(image, threshold) if rng.random() < 0.5 else image


def posterize(image: Tensor, rng: np.random.Generator) -> Tensor:
    return TF.posterize(image, int(rng.integers(1, 8)))


def invert(image: Tensor, rng: np.random.Generator) -> Tensor:
    return TF.invert(image)


def autocontrast(image: Tensor, rng: np.random.Generator) -> Tensor:
    return TF.autocontrast(image)


def equalize(image: Tensor, rng: np.random.Generator) -> Tensor:
    return TF.equalize(image)


def rotate(image: Tensor, rng: np.random.Generator) -> Tensor:
    return TF.rotate(image, rng.uniform(-45, 45))


OPERATIONS = (gamma, brightness, sharpness, hue_saturation, solarize, posterize, invert,
              autocontrast, equalize, rotate)


def three_operations(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply three different OPERATIONS, chosen at random, to a uint8 image [3, H, W]."""
    for index in rng.choice(len(OPERATIONS), 3, replace=False):
        image = OPERATIONS[index](image, rng)
    return image


def shuffle_blocks(image: Tensor, order: list[int]) -> Tensor:
    """Cut [C, H, W] into GRID x GRID blocks; position k gets block order[k]. GRID divides H, W."""
    C, H, W = image.shape
    h, w = H // GRID, W // GRID
    blocks = image.view(C, GRID, h, GRID, w).permute(1, 3, 0, 2, 4).reshape(GRID ** 2, C, h, w)
    blocks = torch.stack([blocks[k] for k in order]).view(GRID, GRID, C, h, w)
    return blocks.permute(2, 0, 3, 1, 4).reshape(C, H, W)


def anomaly_appearance(image: Tensor, texture: Tensor, rng: np.random.Generator) -> Tensor:
    """The appearance A, uint8 [3, H, W]: textural (from `texture`) or structural (from `image`)."""
    if rng.random() < TEXTURAL:
        return three_operations(texture, rng)
    return shuffle_blocks(three_operations(image, rng), rng.permutation(GRID ** 2).tolist())


# ---------------------------------------------------------------- a training batch

def synthesize(images: Tensor, foreground: Tensor, textures: Tensor, opaque: Tensor,
               rng: np.random.Generator) -> Synthetic:
    """Anomalies for the first n images of a batch; the others stay normal (section 4.3: one half).

    images: uint8 [B, 3, H, W]; foreground: [B, 1, H, W] in {0, 1}; textures: uint8 [n, 3, H, W],
    one for each anomaly; opaque: bool [B], true where t is the last step, for which M_a is always
    empty. H and W must be multiples of 8.
    """
    B, _, H, W = images.shape
    n, device = len(textures), images.device
    noise = random_perlin(rng, n, H, W, device)
    M, threshold = anomaly_mask(noise, foreground[:n])
    case = to_device(rng.integers(0, 4, (n, 1, 1, 1)), device)      # 0: the paper's 25 %
    u = to_device(rng.random((n, 1, 1, 1)), device)
    M_a = simulated_previous_mask(noise, foreground[:n], threshold, case, u)
    M_a = M_a * (~opaque[:n, None, None, None])
    A = torch.stack([anomaly_appearance(image, texture, rng)
                     for image, texture in zip(images[:n], textures)])
    return Synthetic(*(torch.cat([part, part.new_zeros(B - n, *part.shape[1:])])
                       for part in (M, M_a, A)))


# ---------------------------------------------------------------- augmentation of normal images

def rotate_batch(images: Tensor, foreground: Tensor, degrees: float, rng: np.random.Generator,
                 authors: bool = False, p: float = 0.3) -> tuple[Tensor, Tensor]:
    """Rotate each sample with probability p by U(-degrees, degrees), as in section 4.3.

    images: uint8 [B, 3, H, W], interpolated linearly on black as in DRAEM's augmentation library;
    authors: nearest neighbour on mid-grey, as in their code. foreground: [B, 1, H, W] in {0, 1}.
    Anomalies are added afterwards, so they lie on the rotated image and are not rotated themselves.
    """
    options = (dict(interpolation=TF.InterpolationMode.NEAREST, fill=128) if authors
           else dict(interpolation=TF.InterpolationMode.BILINEAR))   # fill=0 darkens the border
    selected, angles = rng.random(len(images)) < p, rng.uniform(-degrees, degrees, len(images))
    images, foreground = images.clone(), foreground.clone()
    for k in np.flatnonzero(selected):
        images[k] = TF.rotate(images[k], float(angles[k]), **options)
        foreground[k] = TF.rotate(foreground[k], float(angles[k]))
    return images, foreground


def change_light(images: Tensor, light: float, rng: np.random.Generator) -> Tensor:
    """Multiply each image by a factor U(1 - light, 1 + light). The paper has no such augmentation.

    images: uint8 [B, 3, H, W]; light in [0, 1]. Anomalies are added afterwards, so the network
    learns the changed brightness as normal.
    """
    factors = rng.uniform(1 - light, 1 + light, len(images)).tolist()
    return torch.stack([TF.adjust_brightness(image, f) for image, f in zip(images, factors)])
