"""TransFusion: the paper's Eq. 1-11, the network they train and the restoration they run.

Read it beside the paper (Fučka, Zavrtanik, Skočaj, ECCV 2024): section 3.1 is the transparency
process, 3.2 the network and the losses, 3.4 the reverse process. It reads no files and no data.

Symbols are the paper's. Tensors are [B, C, H, W]; images lie in [-1, 1]; M is a mask in {0, 1},
M_a the guide, an imperfect M, M_t a predicted mask in [0, 1]; t counts from T (opaque anomaly) down
to 0 (normal appearance). beta_t is what the paper calls the transparency level; it is an opacity:
1 at t = T, 0 at t = 0.
"""
import math
from typing import Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import sigmoid_focal_loss


# ---------------------------------------------------------------- section 3.1: the process

def compose(N: Tensor, A: Tensor, M: Tensor, beta: float | Tensor) -> Tensor:
    """Eq. 1: I = (1 - M) * N + beta (M * A) + (1 - beta) (M * N).

    N, A: [B, 3, H, W] normal and anomaly appearance; M: [B, 1, H, W] in {0, 1};
    beta: opacity of the anomaly in [0, 1], a number or [B, 1, 1, 1]. Returns [B, 3, H, W].
    """
    return (1 - M) * N + beta * (M * A) + (1 - beta) * (M * N)


def forward_process(n_t: Tensor, eps_t: Tensor, M_t: Tensor, beta_t: float | Tensor) -> Tensor:
    """Eq. 2: x_t is Eq. 1 with N = n_t, A = eps_t, M = M_t and beta = beta_t.

    Eq. 3 is the same function at step t - 1. Shapes as in `compose`.
    """
    return compose(n_t, eps_t, M_t, beta_t)


def reverse_step(x_t: Tensor, M_t: Tensor, eps_t: Tensor, n_t: Tensor,
                 beta_t: float | Tensor, beta_prev: float | Tensor) -> Tensor:
    """Eq. 4: x_{t-1} = x_t - (beta_t - beta_{t-1}) (M_t * eps_t)
                        + (beta_t - beta_{t-1}) (M_t * n_t).

    In a longer step, beta_prev is the opacity at the step that it leads to. x_t, eps_t, n_t:
    [B, 3, H, W]; M_t: [B, 1, H, W]; betas: numbers or [B, 1, 1, 1]. Returns [B, 3, H, W].
    """
    d_beta = beta_t - beta_prev
    return x_t - d_beta * (M_t * eps_t) + d_beta * (M_t * n_t)


def transparency_schedule(T: int, kind: str = "linear", authors: bool = False) -> Tensor:
    """Opacities beta_0 = 0 < ... < beta_last = 1 (section 3.1; kinds: section 4.6, Table 4).

    kind: "linear", "quadratic" (u^2) or "root" (sqrt u), u evenly spaced on [0, 1]. The paper has
    T transitions, so T + 1 values; the authors' code has T values. Computed in float64, returned
    as float32. Raises ValueError for a T that leaves no step of restoration or for an unknown kind.
    """
    least = 3 if authors else 1                    # the authors start at T - 2
    if T < least:
        raise ValueError(f"T = {T} leaves no step of restoration: it must be at least {least}")
    u = torch.linspace(0, 1, T if authors else T + 1, dtype=torch.float64)
    schedules = {"linear": u, "quadratic": u ** 2, "root": u.sqrt()}
    if kind not in schedules:
        raise ValueError(f"unknown schedule {kind!r}: {', '.join(schedules)}")
    return schedules[kind].float()


# ---------------------------------------------------------------- section 3.2: the network

def positional_encoding(H: int, W: int, kind: str, device=None, side: int = 0) -> Tensor:
    """PE of section 3.2 [1, channels, H, W]; the channels for each kind are in PE_CHANNELS.

    "2d": sin and cos of the row index at the four frequencies 10000^(-k/4), k = 0..3, then of the
    column index (the paper's reference 34). "row": sin(row index), the authors' one channel.
    side: that of the image whose rows and columns are meant, shrunk or enlarged to H x W, so that
    a place has about the same encoding at each size; 0: the H x W image itself.
    """
    rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in (H, W))
    if side:
        rows, columns = (rows + 0.5) * (side / H) - 0.5, (columns + 0.5) * (side / W) - 0.5
    if kind == "row":
        return rows.sin()[None, None, :, None].expand(1, 1, H, W)
    frequencies = 10000.0 ** (-torch.arange(4, device=device, dtype=torch.float32) / 4)

    def waves(index: Tensor) -> Tensor:                                       # [8, len(index)]
        angle = frequencies[:, None] * index
        return torch.cat([angle.sin(), angle.cos()])

    return torch.cat([waves(rows)[:, :, None].expand(8, H, W),
                      waves(columns)[:, None, :].expand(8, H, W)])[None]      # [1, 16, H, W]


PE_CHANNELS = {"2d": 16, "row": 1, "none": 0}


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of gcd(32, channels) groups: for 16 or 32 channels, each channel is a group."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


class TimeEmbedding(nn.Module):
    """Integer step t [B] -> [B, 4 channels]: sinusoids through two linear layers."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        frequencies = torch.exp(-torch.arange(half) * (math.log(10000) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None].float() * self.frequencies                          # [B, channels / 2]
        return self.linear_2(F.silu(self.linear_1(torch.cat([angle.sin(), angle.cos()], 1))))


class ResidualBlock(nn.Module):
    """GroupNorm - SiLU - conv twice, the time embedding added in between, and a shortcut.

    The embedding is one constant per channel, which the second norm cancels where each channel is a
    group. time_after_norm: add it behind that norm; the authors add it before.
    """
    time_after_norm = False

    def __init__(self, c_in: int, c_out: int, c_time: int):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb = nn.Linear(c_time, c_out)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h, time = self.conv1(F.silu(self.norm1(x))), self.time_emb(time)[:, :, None, None]
        h = self.norm2(h) + time if self.time_after_norm else self.norm2(h + time)
        return self.conv2(F.silu(h)) + self.shortcut(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v, each (B, heads, pixels, C).

    Written out where it is trained on a CPU: there the backward pass of torch's fused kernel takes
    about twice as long in bfloat16 (docs/speed.md).
    """
    if q.is_cuda or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


class Attention(nn.Module):
    """Self-attention of one head over all pixels, added to its input.

    normalised: the input passes a GroupNorm first, as in DDPM (Ho et al. 2020). The authors'
    network has no such norm. Without it, large activations amplify themselves through the eleven
    attention layers.
    """

    def __init__(self, channels: int, normalised: bool):
        super().__init__()
        self.norm = norm(channels) if normalised else nn.Identity()
        self.projection = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)                       # (B, H W, C)
        q, k, v = self.projection(pixels)[:, None].chunk(3, dim=-1)            # (B, 1, H W, C) each
        mixed = attend(q, k, v)[:, 0]                                          # (B, H W, C)
        return x + self.output(mixed).transpose(1, 2).view(B, C, H, W)


class Block(nn.Module):
    """A residual block, followed by attention where `attention` is set."""

    def __init__(self, c_in: int, c_out: int, c_time: int, attention: bool, attention_norm: bool):
        super().__init__()
        self.res = ResidualBlock(c_in, c_out, c_time)
        self.attn = Attention(c_out, attention_norm) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.attn(self.res(x, time))


class Resample(nn.Module):
    """Halves the resolution (3x3 conv of stride 2) or doubles it (4x4 transposed conv)."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.conv = (nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1) if up
                     else nn.Conv2d(channels, channels, 3, stride=2, padding=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:      # called like a Block
        return self.conv(x)


class Middle(nn.Module):
    def __init__(self, channels: int, c_time: int, attention_norm: bool):
        super().__init__()
        self.res1 = ResidualBlock(channels, channels, c_time)
        self.attn = Attention(channels, attention_norm)
        self.res2 = ResidualBlock(channels, channels, c_time)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.res2(self.attn(self.res1(x, time)), time)


class ResUNet(nn.Module):
    """The network of section 3.2: x_t, the guide M_a, PE and t in; eps_t, n_t and M_t's logit out.

    The paper says only "ResUNet"; the layers are the authors': four levels of 1, 2, 4, 8 x
    `channels` channels, two residual blocks per level on the way down and three on the way up,
    attention at the two lowest resolutions, 54.6 M parameters at 64 channels. The GroupNorm and the
    SiLU of the anomaly head are theirs, too (in the paper it is a convolution alone).

    channels: a multiple of 8. pe: a key of PE_CHANNELS; guide: whether the network sees the
    previous mask estimate (Table 4's ablations take either out of it). attention_norm: see
    Attention. recompute: in training, keep only the blocks' inputs and recompute the rest in the
    backward pass, which needs less memory and a third more time. side: see positional_encoding.
    """

    def __init__(self, channels: int = 64, pe: str = "2d", guide: bool = True,
                 attention_norm: bool = False, recompute: bool = False, side: int = 0):
        super().__init__()
        self.pe, self.guide, self.recompute, self.side = pe, guide, recompute, side
        widths = [channels, 2 * channels, 4 * channels, 8 * channels]
        c_time = 4 * channels
        self.image_proj = nn.Conv2d(3 + int(guide) + PE_CHANNELS[pe], channels, 3, padding=1)
        self.time_emb = TimeEmbedding(channels)

        self.down, skips, c = nn.ModuleList(), [channels], channels
        for level, width in enumerate(widths):
            for _ in range(2):
                self.down.append(Block(c, width, c_time, level >= 2, attention_norm))
                c = width
                skips.append(c)
            if level < 3:
                self.down.append(Resample(c, up=False))
                skips.append(c)

        self.middle = Middle(c, c_time, attention_norm)

        self.up = nn.ModuleList()
        for level in (3, 2, 1, 0):
            for width in (widths[level], widths[level], widths[max(level - 1, 0)]):
                self.up.append(Block(c + skips.pop(), width, c_time, level >= 2, attention_norm))
                c = width
            if level > 0:
                self.up.append(Resample(c, up=True))

        def conv(c_out: int) -> nn.Conv2d:
            return nn.Conv2d(c, c_out, 3, padding=1)

        self.anomaly_head = nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), conv(3))
        self.normal_head = conv(3)
        self.mask_head = nn.Sequential(nn.BatchNorm2d(c), nn.SiLU(), conv(1))

    def output_of(self, layer: nn.Module, h: Tensor, time: Tensor) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(layer, h, time, use_reentrant=False)
        return layer(h, time)

    def forward(self, x_t: Tensor, M_a: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t [B, 3, H, W] in [-1, 1]; M_a [B, 1, H, W] in {0, 1}; t [B] integer steps.

        H and W must be multiples of 8. Returns the three heads: eps_t (in the authors' reading
        beta_t eps_t) and n_t, [B, 3, H, W] around [-1, 1], and the logit of M_t, [B, 1, H, W], all
        in float32 whatever autocast is on.
        """
        B, _, H, W = x_t.shape
        inputs = [x_t]
        if self.guide:
            inputs.append(M_a)
        if self.pe != "none":
            encoding = positional_encoding(H, W, self.pe, x_t.device, self.side)
            inputs.append(encoding.expand(B, -1, H, W))
        h = self.image_proj(torch.cat(inputs, 1))
        time = self.time_emb(t)
        skips = [h]
        for layer in self.down:
            h = self.output_of(layer, h, time)
            skips.append(h)
        h = self.output_of(self.middle, h, time)
        for layer in self.up:
            if not isinstance(layer, Resample):
                h = torch.cat([h, skips.pop()], 1)
            h = self.output_of(layer, h, time)
        return self.anomaly_head(h).float(), self.normal_head(h).float(), self.mask_head(h).float()

    @torch.no_grad()
    def start_from_identity(self) -> None:
        """Initialise so that n_t = x_t, M_t is small everywhere, and residual branches are silent.

        Most of an image is normal, so this is close to the solution; from torch's default weights,
        training takes hundreds of steps to reach it. The paper does not mention initialisation.
        """
        for module in self.modules():
            if isinstance(module, (ResidualBlock, Attention)):
                last = module.conv2 if isinstance(module, ResidualBlock) else module.output
                last.weight.zero_()
                last.bias.zero_()
        last = self.up[-1].res.shortcut                # its input is [h, image_proj's output]
        skip = last.in_channels - self.image_proj.out_channels
        for layer, first in ((self.image_proj, 0), (last, skip), (self.normal_head, 0)):
            layer.weight[:3].zero_()
            layer.bias[:3].zero_()
            centre = layer.kernel_size[0] // 2
            for channel in range(3):
                layer.weight[channel, first + channel, centre, centre] = 1
        self.mask_head[2].weight.mul_(0.1)
        self.mask_head[2].bias.fill_(-2)               # M_t = 0.12, near the share of M


# ---------------------------------------------------------------- section 3.2: the losses

def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity (Wang et al. 2004) of two [B, C, H, W] images in [-1, 1].

    11 x 11 Gaussian window of sigma 1.5, dynamic range 2, over windows inside the image, so H and
    W are at least 11. Returns a scalar in [-1, 1], 1 for equal images.
    """
    offsets = torch.arange(11, device=a.device, dtype=a.dtype) - 5
    window = torch.exp(-offsets ** 2 / (2 * 1.5 ** 2))
    window = window / window.sum()
    C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2

    stack = torch.cat([a, b, a * a, b * b, a * b], 1)                          # [B, 5 C, H, W]
    channels = stack.shape[1]
    stack = F.conv2d(stack, window.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
    stack = F.conv2d(stack, window.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)
    mu_a, mu_b, aa, bb, ab = stack.chunk(5, 1)
    var_a, var_b, cov = aa - mu_a ** 2, bb - mu_b ** 2, ab - mu_a * mu_b
    similarity = ((2 * mu_a * mu_b + C1) * (2 * cov + C2)
                  / ((mu_a ** 2 + mu_b ** 2 + C1) * (var_a + var_b + C2)))
    return similarity.mean()


def normal_loss(n_t: Tensor, x: Tensor) -> Tensor:
    """Eq. 5: L_n = (1 - SSIM(n_t, x)) + L1(n_t, x); the paper's SSIM stands for the SSIM loss."""
    return (1 - ssim(n_t, x)) + F.l1_loss(n_t, x)


def mask_loss(logit: Tensor, M: Tensor, alpha: float = 5.0) -> Tensor:
    """Eq. 6: L_m = alpha L_focal(M_t, M) + L_smooth1(M_t, M), M_t = sigmoid(logit).

    The focal loss (its own alpha 0.25, gamma 2) is computed from the logit [B, 1, H, W].
    """
    return (alpha * sigmoid_focal_loss(logit, M, alpha=0.25, gamma=2, reduction="mean")
            + F.smooth_l1_loss(logit.sigmoid(), M))


def anomaly_loss(eps_t: Tensor, eps: Tensor) -> Tensor:
    """Eq. 7: L_a = L2(eps_t, eps), the mean squared error; eps is 0 outside M (their code)."""
    return F.mse_loss(eps_t, eps)


def consistency_loss(x_t: Tensor, M_t: Tensor, eps_t: Tensor, n_t: Tensor, beta_t: Tensor,
                     beta_prev: Tensor, x_prev: Tensor) -> Tensor:
    """Eq. 8: L_c = L2(x_{t-1}, x~_{t-1}): Eq. 4 on the predictions against the true x_prev."""
    return F.mse_loss(reverse_step(x_t, M_t, eps_t, n_t, beta_t, beta_prev), x_prev)


def total_loss(L_n: Tensor, L_m: Tensor, L_a: Tensor, L_c: Tensor) -> Tensor:
    """Eq. 9: L = L_n + L_m + L_a + L_c."""
    return L_n + L_m + L_a + L_c


# ---------------------------------------------------------------- training and restoration

class Step(NamedTuple):
    """One step of the restoration, [B, C, H, W]: M_t in [0, 1]; x_prev computed with M_t > 0.5."""
    t: int
    x_t: Tensor
    M_t: Tensor
    eps_t: Tensor
    n_t: Tensor
    x_prev: Tensor


class Restoration(NamedTuple):
    """x_0 [B, 3, H, W], in about [-1, 1]; the maps [B, 1, H, W], in [0, 1] or about it."""
    x_0: Tensor
    M_disc: Tensor
    M_recon: Tensor
    M_last: Tensor


def even_path(first: int, calls: int) -> list[int]:
    """The steps t_k = round(first - k first / calls), k = 0..calls, that a restoration visits.

    Raises ValueError for a number of calls that is not in 1..first.
    """
    if not 1 <= calls <= first:
        raise ValueError(f"{calls} inference steps asked for, the schedule has 1 to {first}")
    return [round(first - k * first / calls) for k in range(calls + 1)]


class Method(nn.Module):
    """The interface of a method, TransFusion or one of baselines/, for training and evaluation.

    A method has `losses`, `path`, `restore`, `last_step` and `net` as TransFusion does. STAGES are
    the shares of the training at which its stages end; the learning rate runs through its schedule
    in each, and `stage`, from 0, is the current one. `after_training` wants to see
    IMAGES_AFTER_TRAINING training images. TRAINS is false if a method has no training steps and
    memorises these images instead; then their scores are not used for the threshold.
    """
    TRAINS = True
    STAGES: tuple[float, ...] = (1.0,)
    IMAGES_AFTER_TRAINING = 0
    stage = 0

    def forward(self, *batch: Tensor, drop: str = "") -> dict[str, Tensor]:
        """`losses`, under the name that DistributedDataParallel wraps."""
        return self.losses(*batch, drop=drop)

    def before_training(self) -> None:
        """Called once before a new training. Raises InputError where something is missing."""

    def after_training(self, images: Tensor) -> None:
        """Called once when the weights are final, with training images [N, 3, H, W] in [-1, 1];
        results go to buffers. Raises InputError where something is missing."""


class TransFusion(Method):
    """The network with its transparency schedule, and the switches between paper and authors' code.

    T, schedule: section 4.3 and Table 4. authors_schedule: T values instead of T + 1, and the
    restoration starts one step late, as the authors' code does. anomaly_target: what the anomaly
    head predicts, "eps" (Eq. 7) or "beta_eps", beta_t * eps. soft_consistency: Eq. 8 uses the
    predicted M_t with its gradient; if false, M_t > 0.5. bf16: run the network, not the losses,
    under bfloat16 autocast. time_after_norm: see ResidualBlock. attention_norm, recompute, side:
    see ResUNet. Buffer `beta`: [last step + 1] float32.
    """

    def __init__(self, channels: int = 64, T: int = 20, schedule: str = "linear", pe: str = "2d",
                 guide: bool = True, authors_schedule: bool = False, anomaly_target: str = "eps",
                 soft_consistency: bool = True, bf16: bool = False, attention_norm: bool = False,
                 time_after_norm: bool = False, recompute: bool = False, side: int = 0):
        super().__init__()
        self.net = ResUNet(channels, pe, guide, attention_norm, recompute, side)
        for module in self.net.modules():
            if isinstance(module, ResidualBlock):
                module.time_after_norm = time_after_norm
        self.bf16 = bf16
        self.register_buffer("beta", transparency_schedule(T, schedule, authors_schedule), False)
        self.authors_schedule, self.anomaly_target = authors_schedule, anomaly_target
        self.soft_consistency = soft_consistency

    @property
    def last_step(self) -> int:
        """The step of the opaque anomaly: T, or T - 1 in the authors' schedule."""
        return len(self.beta) - 1

    def beta_at(self, t: Tensor) -> Tensor:
        """beta_t of the steps t [B], as [B, 1, 1, 1]."""
        return self.beta[t][:, None, None, None]

    def anomaly_scale(self, t: Tensor) -> float | Tensor:
        """The anomaly head predicts eps_t times this: 1, or beta_t in the authors' reading."""
        return self.beta_at(t) if self.anomaly_target == "beta_eps" else 1.0

    def predict(self, x_t: Tensor, M_a: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """eps_t, n_t and the logit of M_t at the steps t [B], from 1 on; shapes as in ResUNet."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            head, n_t, logit = self.net(x_t, M_a, t)
        return head / self.anomaly_scale(t), n_t, logit

    def losses(self, x: Tensor, eps: Tensor, M: Tensor, M_a: Tensor, t: Tensor,
               drop: str = "") -> dict[str, Tensor]:
        """One training pass: the loss of Eq. 9 and each of its terms, by name.

        x, eps: [B, 3, H, W] normal and anomaly appearance, eps zero outside M; M, M_a:
        [B, 1, H, W] in {0, 1}; t: [B] integers in 1..last_step. `drop`: letters of the terms left
        out of the sum (Table 4), of "nmac". Returns {"loss", "n", "m", "a", "c"}, each a scalar.
        """
        beta_t, beta_prev, scale = self.beta_at(t), self.beta_at(t - 1), self.anomaly_scale(t)
        x_t = forward_process(x, eps, M, beta_t)                               # Eq. 2
        x_prev = forward_process(x, eps, M, beta_prev)                         # Eq. 3
        eps_t, n_t, logit = self.predict(x_t, M_a, t)
        M_t = logit.sigmoid() if self.soft_consistency else (logit > 0).float()
        terms = {"n": normal_loss(n_t, x),
                 "m": mask_loss(logit, M),
                 "a": anomaly_loss(scale * eps_t, scale * eps),                # on the head itself
                 "c": consistency_loss(x_t, M_t, eps_t, n_t, beta_t, beta_prev, x_prev)}
        summands = {f"L_{name}": 0.0 if name in drop else term for name, term in terms.items()}
        return {"loss": total_loss(**summands), **terms}                       # Eq. 9

    def path(self, infer_steps: int = 0) -> list[int]:
        """The steps that a restoration visits, from T (T - 2 in the authors' schedule) to 0.

        infer_steps: the number of network calls; 0 for all steps of the schedule. Raises ValueError
        for more calls than the schedule has steps.
        """
        first = self.last_step - 1 if self.authors_schedule else self.last_step
        return even_path(first, infer_steps or first)

    @torch.no_grad()
    def reverse_process(self, x: Tensor, infer_steps: int = 0) -> Iterator[Step]:
        """Section 3.4: walk from the image x [B, 3, H, W] to its restoration x_0, step by step."""
        path = self.path(infer_steps)
        x_t, guide = x, torch.zeros_like(x[:, :1])
        for t, t_prev in zip(path, path[1:]):
            eps_t, n_t, logit = self.predict(x_t, guide, torch.full(x.shape[:1], t, device=x.device))
            binary = (logit > 0).float()                                       # M_t > 0.5
            x_prev = reverse_step(x_t, binary, eps_t, n_t, self.beta[t], self.beta[t_prev])  # Eq. 4
            yield Step(t, x_t, logit.sigmoid(), eps_t, n_t, x_prev)
            x_t, guide = x_prev, binary

    def restore(self, x: Tensor, infer_steps: int = 0) -> Restoration:
        """x_0 and the maps that Eq. 10 needs, for a batch of images x [B, 3, H, W] in [-1, 1]."""
        M_sum, calls = torch.zeros_like(x[:, :1]), 0
        for step in self.reverse_process(x, infer_steps):
            M_sum += step.M_t
            calls += 1
        M_disc = M_sum / (calls + 1 if self.authors_schedule else calls)    # theirs: one too many
        return Restoration(step.x_prev, M_disc, reconstruction_error(x, step.x_prev), step.M_t)


# ---------------------------------------------------------------- Eq. 10, 11: map and score

def reconstruction_error(x: Tensor, x_0: Tensor) -> Tensor:
    """M_recon [B, 1, H, W]: mean over channels of (x - x_0)^2, both in [0, 1], x_0 clipped."""
    return ((x - x_0.clamp(-1, 1)) / 2).square().mean(1, keepdim=True)


def final_mask(M_disc: Tensor, M_recon: Tensor, lam: float = 0.95, n: int = 7) -> Tensor:
    """Eq. 10: M_final = (lam M_disc + (1 - lam) M_recon) * f_n, maps [B, 1, H, W].

    f_n is the n x n mean filter, zeros outside the image. Raises ValueError for an even n.
    """
    if n < 1 or n % 2 == 0:
        raise ValueError(f"mean filter of size {n}: its size must be odd and positive")
    blend = lam * M_disc + (1 - lam) * M_recon
    return F.avg_pool2d(blend, n, stride=1, padding=n // 2, count_include_pad=True)


def anomaly_score(M_final: Tensor) -> Tensor:
    """Eq. 11: AS = max(M_final), one number per image, [B]."""
    return M_final.flatten(1).amax(1)
