"""Building blocks of the other methods: diffusion steps, U-Net, autoencoder, ResNet-34 features.

Tensors are [B, C, H, W], images in [-1, 1]. As in transfusion.py, t counts from T (noise) down to 0
(the clean image), so abar_0 = 1. In code that counts from 0, our abar_t has the index t - 1.
"""
import math
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet34
from torchvision.models.feature_extraction import create_feature_extractor

from support.console import InputError
from transfusion import Attention, Method, Resample, TimeEmbedding, ssim


class Baseline(Method):
    """Base class of the other methods. bf16: `run` calls networks under bfloat16 autocast."""
    last_step = 1000

    def __init__(self, bf16: bool):
        super().__init__()
        self.bf16 = bf16

    def run(self, net, *inputs):
        """net(*inputs), as a float32 tensor or a list of float32 tensors."""
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.bf16):
            outputs = net(*inputs)
        return outputs.float() if isinstance(outputs, Tensor) else [o.float() for o in outputs]

    def path(self, infer_steps: int = 0) -> list[int]:
        """[1, 0], because the method has one pass. Raises ValueError for more inference steps."""
        if infer_steps > 1:
            raise ValueError(f"{infer_steps} inference steps asked for, the method has one pass")
        return [1, 0]


# ---------------------------------------------------------------- diffusion

def noise_schedule(low: float, high: float, kind: str = "linear", T: int = 1000) -> Tensor:
    """abar_0 = 1, ..., abar_T, float32 [T + 1]: abar_t is the product over s <= t of 1 - beta_s.

    kind: "linear" spaces beta_1 = low, ..., beta_T = high evenly, "sqrt" their square roots.
    """
    power = {"linear": 1, "sqrt": 2}[kind]
    beta = torch.linspace(low ** (1 / power), high ** (1 / power), T, dtype=torch.float64) ** power
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)]).float()


def noised(x: Tensor, noise: Tensor, abar: Tensor | float) -> Tensor:
    """The noised x: sqrt(abar) x + sqrt(1 - abar) noise; abar: a number or [B, 1, 1, 1]."""
    abar = torch.as_tensor(abar)
    return abar.sqrt() * x + (1 - abar).sqrt() * noise


def clean_estimate(x_t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """`noised` solved for x: (x_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    return (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()


def ddim_step(x_t: Tensor, x_0: Tensor, abar: Tensor, abar_prev: Tensor) -> Tensor:
    """A DDIM step (Song et al. 2021) with eta 0 from the clean estimate x_0: the noise between x_0
    and x_t is added to x_0 again, at the level abar_prev."""
    eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    return noised(x_0, eps, abar_prev)


def at(values: Tensor, t: Tensor) -> Tensor:
    """values[t] for steps t [B], as [B, 1, 1, 1]."""
    return values[t][:, None, None, None]


# ---------------------------------------------------------------- networks

class ResBlock(nn.Module):
    """GroupNorm - SiLU - conv twice, plus a shortcut; with a time embedding if c_time is not 0.

    A group has four channels or more. With one channel per group, the norm would cancel t.
    """

    def __init__(self, c_in: int, c_out: int, c_time: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(32, c_in // 4), c_in)
        self.norm2 = nn.GroupNorm(math.gcd(32, c_out // 4), c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, c_out) if c_time else None
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            h = h + self.time(time)[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + self.shortcut(x)


class UNet(nn.Module):
    """eps_theta(x_t, t): the U-Net of AnoDDPM, DiffAD and D3AD, in a size for each.

    A level has channels * widths[level] channels. blocks: residual blocks per level on the way down
    (one more on the way up); attention: the levels with attention, which the middle always has. The
    output is 0 at initialisation.
    """

    def __init__(self, c_in: int, c_out: int, channels: int, widths: tuple[int, ...], blocks: int,
                 attention: tuple[int, ...]):
        super().__init__()
        c_time, c, skips = 4 * channels, channels, [channels]
        self.time, self.start = TimeEmbedding(channels), nn.Conv2d(c_in, c, 3, padding=1)

        def level_block(c_in: int, c_out: int, level: int) -> nn.ModuleList:
            attend = Attention(c_out, True) if level in attention else nn.Identity()
            return nn.ModuleList([ResBlock(c_in, c_out, c_time), attend])

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(level_block(c, width * channels, level))
                c = width * channels
                skips.append(c)
            if level < len(widths) - 1:
                self.down.append(Resample(c, up=False))
                skips.append(c)
        self.middle = nn.ModuleList([level_block(c, c, max(attention)), ResBlock(c, c, c_time)])
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(level_block(c + skips.pop(), width * channels, level))
                c = width * channels
            if level:
                self.up.append(Resample(c, up=True))
        self.end = nn.Sequential(nn.GroupNorm(math.gcd(32, c // 4), c), nn.SiLU(),
                                 nn.Conv2d(c, c_out, 3, padding=1))
        nn.init.zeros_(self.end[2].weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, c_in, H, W] and t [B] to [B, c_out, H, W]; 2^(levels - 1) must divide H and W."""
        time = F.silu(self.time(t))

        def apply(layer: nn.Module, h: Tensor) -> Tensor:
            return layer(h, time) if isinstance(layer, Resample) else layer[1](layer[0](h, time))

        h = self.start(x)
        skips = [h]
        for layer in self.down:
            h = apply(layer, h)
            skips.append(h)
        h = self.middle[1](apply(self.middle[0], h), time)
        for layer in self.up:
            h = apply(layer, h if isinstance(layer, Resample) else torch.cat([h, skips.pop()], 1))
        return self.end(h)


class Encoder(nn.Module):
    """Maps an image to the feature maps of all levels, each of half the side of the previous level,
    followed by the mean and log variance of the latent, [B, 8, h, w]."""

    def __init__(self, channels: int, widths: tuple[int, ...]):
        super().__init__()
        self.start, self.levels, c = nn.Conv2d(3, channels, 3, padding=1), nn.ModuleList(), channels
        for level, width in enumerate(widths):
            down = nn.Conv2d(c, c, 3, stride=2, padding=1) if level else nn.Identity()
            self.levels.append(nn.Sequential(down, ResBlock(c, width * channels)))
            c = width * channels
        self.end = nn.Conv2d(c, 8, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.start(x)]
        for level in self.levels:
            maps.append(level(maps[-1]))
        return [*maps[1:], self.end(F.silu(maps[-1]))]


class VAE(nn.Module):
    """A small KL autoencoder; its latent has 4 channels and a side of side / 2^(levels - 1).

    `loss` updates running averages of the latent's `mean` and `std`. `encode` normalises with them,
    so the diffusion sees a latent of mean 0 and variance 1 in each channel.
    """

    def __init__(self, channels: int, widths: tuple[int, ...]):
        super().__init__()
        self.encoder = Encoder(channels, widths)
        c = widths[-1] * channels
        layers = [nn.Conv2d(4, c, 3, padding=1)]
        for level, width in reversed(list(enumerate(widths))):
            layers.append(ResBlock(c, width * channels))
            c = width * channels
            if level:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)]
        self.decoder = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))
        self.register_buffer("mean", torch.zeros(1, 4, 1, 1))
        self.register_buffer("std", torch.ones(1, 4, 1, 1))

    def loss(self, method: Baseline, x: Tensor) -> Tensor:
        """L1 + (1 - SSIM) of x and its reconstruction from a sample, plus 1e-6 KL to N(0, I)."""
        mean, log_var = method.run(self.encoder, x)[-1].chunk(2, 1)
        log_var = log_var.clamp(-30, 20)
        z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        x_r = method.run(self.decoder, z)
        with torch.no_grad():
            self.mean.lerp_(mean.mean((0, 2, 3), keepdim=True), 0.05)
            self.std.lerp_((mean - self.mean).square().mean((0, 2, 3), keepdim=True).sqrt(), 0.05)
        kl = (mean ** 2 + log_var.exp() - 1 - log_var).sum((1, 2, 3)).mean() / 2
        return F.l1_loss(x_r, x) + 1 - ssim(x_r, x) + 1e-6 * kl

    def encode(self, method: Baseline, x: Tensor) -> Tensor:
        """The normalised mean of the posterior, [B, 4, h, w], as `decode` expects it."""
        return (method.run(self.encoder, x)[-1][:, :4] - self.mean) / self.std

    def decode(self, method: Baseline, z: Tensor) -> Tensor:
        """The image [B, 3, H, W], roughly in [-1, 1], of a normalised latent [B, 4, h, w]."""
        return method.run(self.decoder, z * self.std + self.mean)


def resnet(weights: str, required: bool = False) -> nn.Module:
    """torchvision's ResNet-34 with the weights of a file; returns the outputs of layers 1, 2 and 3.

    If the file does not exist, the weights are random. Raises InputError for a file with other
    content, and for a missing file if it is required.
    """
    net = resnet34()
    try:
        if Path(weights).is_file():
            net.load_state_dict(torch.load(weights, weights_only=True))
        elif required:
            raise InputError(f"--resnet34 {weights}: gone since the training began; put it back")
    except (RuntimeError, TypeError, AttributeError, EOFError, UnpicklingError):
        raise InputError(f"--resnet34 {weights}: not the weights of torchvision's resnet34")
    return create_feature_extractor(net, ["layer1", "layer2", "layer3"])
