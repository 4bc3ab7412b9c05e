"""AnoDDPM (Wyatt et al., CVPR Workshops 2022): noise an image partially, denoise it, subtract.

A DDPM of normal images in pixel space. Its noise is not Gaussian but simplex noise of several
octaves, whose large blobs also destroy large defects. At test an image is noised for 250 of 1000
steps and denoised again; the difference is the anomaly map. Synthetic anomalies are not used.

The equations carry letters, A to F, because the paper's numbers could not be checked here.
As published: A-F, T 1000, beta 1e-4 to 0.02, 250 steps, new noise in every reverse step, six
octaves of persistence 0.8 that start at a quarter of the side; the network (125 M parameters at
--channels 128; theirs has 131.7 M), AdamW with 1e-4 and no decay, clip 1, averaged weights.
Different here: each octave is separate 2-D noise with its own origin; the authors' code cuts slices
from 3-D noise, whose octaves share an origin in one corner. Below 128 px there are four octaves,
because a fifth would be finer than two pixels. Training uses only the steps of the restoration, t
in 1..250 (theirs: up to 800). Strided and transposed convolutions change the resolution. All test
images get the same noise, so that a score does not depend on the other images. The image score is
the maximum after the mean filter (the authors have no image score). The squared error is averaged
over the colours of images in [0, 1] (theirs in [-1, 1] is four times as large).
Cost: theirs makes 250 calls of 281 GMAC per image at 256 px, and trains on 300 100 batches of 1 for
any data. Here the small network needs 2.2 GMAC per call at 80 px and makes 25 longer steps.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.common import Baseline, UNet, at, clean_estimate, noise_schedule, noised
from support.console import InputError
from transfusion import Restoration, even_path, reconstruction_error

SCALE = 57.4            # gives an octave the standard deviation of the authors' noise, 0.31


# ---------------------------------------------------------------- Eq. B: the noise

def simplex_noise(u: Tensor, v: Tensor, angles: Tensor) -> Tensor:
    """Simplex noise (Perlin 2001) at P points (u, v) of each of N maps, [N, P] within +-0.58.

    u, v: [N, P] in lattice units; angles: [N, cells, cells], directions in radians of the lattice
    points' gradients, repeated periodically.
    """
    cells = angles.shape[-1]
    skew, unskew = (3 ** 0.5 - 1) / 2, (3 - 3 ** 0.5) / 6
    i, j = (u + (u + v) * skew).floor(), (v + (u + v) * skew).floor()
    x, y = u - i + (i + j) * unskew, v - j + (i + j) * unskew      # offset from corner 0
    lower_half = (x > y).float()
    noise = 0.0
    for a, b, shift in ((0, 0, 0.0), (lower_half, 1 - lower_half, unskew), (1, 1, 2 * unskew)):
        dx, dy = x - a + shift, y - b + shift
        cell = ((i + a) % cells * cells + (j + b) % cells).long()
        angle = angles.flatten(1).gather(1, cell)
        falloff = (0.5 - dx ** 2 - dy ** 2).clamp(min=0)
        noise = noise + falloff ** 4 * (angle.cos() * dx + angle.sin() * dy)
    return SCALE * noise


def octave_noise(shape: tuple[int, int, int, int], octaves: int, persistence: float = 0.8,
                 device=None, generator: torch.Generator | None = None) -> Tensor:
    """Eq. B: sum over k = 0..K-1 of p^k n(u / (nu 2^-k)), nu a quarter of the side, [B, C, H, W].

    As in the authors' code, its variance is not 1: the standard deviation is about 0.48. Random
    numbers are drawn on the CPU.
    """
    B, C, H, W = shape
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    noise = torch.zeros(B * C, H * W, device=device)
    for k in range(octaves):
        cells = 8 * 2 ** k                             # more than the map spans, so none repeats
        angles = 2 * math.pi * torch.rand(B * C, cells, cells, generator=generator)
        origin = cells * torch.rand(2, B * C, 1, generator=generator)
        wavelength = H / 4 / 2 ** k
        u, v = (axis.flatten() / wavelength + start for axis, start in zip((rows, columns), origin))
        noise += persistence ** k * simplex_noise(u.to(device), v.to(device), angles.to(device))
    return noise.view(shape)


# ---------------------------------------------------------------- Eq. A, C-F

def reverse_step(x_t: Tensor, eps: Tensor, abar: Tensor, abar_prev: Tensor,
                 noise: Tensor) -> Tensor:
    """Eq. D, E: x_{t-1} = mean + sigma n, with beta = 1 - abar_t / abar_{t-1} and

        x0_hat = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps_theta, clamped to [-1, 1],
        mean = beta sqrt(abar_{t-1}) / (1 - abar_t) x0_hat
               + (1 - abar_{t-1}) sqrt(1 - beta) / (1 - abar_t) x_t,
        sigma^2 = beta, 0 for the last step.

    In a longer step, abar_prev belongs to the step that it leads to.
    """
    x_0 = clean_estimate(x_t, eps, abar).clamp(-1, 1)
    beta = 1 - abar / abar_prev
    mean = (beta * abar_prev.sqrt() * x_0 + (1 - abar_prev) * (1 - beta).sqrt() * x_t) / (1 - abar)
    return mean + (beta.sqrt() * noise if abar_prev < 1 else 0.0)


class AnoDDPM(Baseline):
    last_step = 250         # of T = 1000: the noise level at test, the largest one in training
    PRESETS = {
        "paper": dict(resize=256, crop=256, rotation=0.0, channels=128, batch=2, epochs=1250,
                      lr=1e-4, lr_drop=1250, weight_decay=0.0, clip=1.0, ema=0.9999, lam=0.0,
                      kernel=13, attention_norm=True),
        "cpu": dict(init="default", rotation=0.0, channels=32, steps=3000, weight_decay=0.0,
                    lam=0.0, infer_steps=25),
        "quick": dict(init="default", rotation=0.0, channels=32, steps=900, weight_decay=0.0,
                      lam=0.0, infer_steps=25),
    }
    USES = {"infer_steps"}

    def __init__(self, s):
        super().__init__(s.precision == "bf16")
        large = s.crop >= 128
        widths, attention = ((1, 1, 2, 2, 4, 4), (3, 4, 5)) if large else ((1, 2, 2, 4), (2, 3))
        if s.crop % (2 ** (len(widths) - 1)):
            raise InputError(f"--crop {s.crop}: must be a multiple of {2 ** (len(widths) - 1)}")
        self.net = UNet(3, 3, s.channels, widths, 2 if large else 1, attention)
        self.octaves = 6 if large else 4
        self.register_buffer("abar", noise_schedule(1e-4, 0.02), False)

    def losses(self, x: Tensor, eps: Tensor, M: Tensor, M_a: Tensor, t: Tensor,
               drop: str = "") -> dict[str, Tensor]:
        """Eq. C: mean (eps - eps_theta(x_t, t))^2, x_t by Eq. A with simplex noise.

        x: [B, 3, H, W], normal images; t: [B] in 1..250. The anomaly (eps, M, M_a) is not used.
        """
        noise = octave_noise(x.shape, self.octaves, device=x.device)
        x_t = noised(x, noise, at(self.abar, t))                               # Eq. A
        return {"loss": F.mse_loss(self.run(self.net, x_t, t), noise)}

    def path(self, infer_steps: int = 0) -> list[int]:
        """The steps from 250 to 0 in infer_steps network calls; 0 stands for all 250."""
        return even_path(self.last_step, infer_steps or self.last_step)

    @torch.no_grad()
    def restore(self, x: Tensor, infer_steps: int = 0) -> Restoration:
        """Noise x to step 250 at once, then denoise it; every map is Eq. F, the squared error."""
        generator, path = torch.Generator().manual_seed(0), self.path(infer_steps)

        def noise() -> Tensor:
            return octave_noise((1, *x.shape[1:]), self.octaves, device=x.device,
                                generator=generator)

        x_t = noised(x, noise(), self.abar[path[0]])                           # Eq. A
        for t, t_prev in zip(path, path[1:]):
            eps = self.run(self.net, x_t, torch.full((len(x),), t, device=x.device))
            x_t = reverse_step(x_t, eps, self.abar[t], self.abar[t_prev], noise())
        error = reconstruction_error(x, x_t)                                   # Eq. F
        return Restoration(x_t, error, error, error)
