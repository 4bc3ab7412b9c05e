"""D3AD (Tebbe and Tayyub, CVPR Workshops 2024): as many steps as an image looks to need.

A latent diffusion of normal images. At test a latent is scaled as if noised to step T', with no
noise added, and walked back in ten DDIM steps that are held near it; T' grows with the distance of
the image's features from those of the training images. Latents and features before and after are
compared. Equation numbers are those of the text submitted to ICLR.

The paper's: Eq. 6-10, Algorithms 1 and 2, Eq. 12 of the supplement (--omega; 0 is its best), T
1000, beta .0015 to .0195, T_max 80, ten bins, at least the second, ten steps, K 20,
lambda 0.85 (--lam), AdamW 1e-4; the code's rounding of T' to tens and its guidance.
Stand-ins: no Stable Diffusion autoencoder: a small one of this category's images, undamaged and
damaged, which keeps defects, as theirs does; no ResNet-34, unless --resnet34 names its weights:
three levels of that encoder, a copy of it adapted by Eq. 10 (for neighbours the second, for the map
the second and third); a smaller U-Net (281 M parameters theirs); the ranges that bring the two
distances of Eq. 9 together are those of training images, theirs the whole test set's, so that one
image can be scored alone; a training image is not its own neighbour; the mean filter in place of a
Gaussian. At most 256 training images are kept for the neighbours; the latent's mean is taken,
theirs is a sample. Cost: theirs 668 GMAC an image at 256 px.
"""
import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import normalize

from baselines.common import (VAE, Baseline, UNet, at, clean_estimate, ddim_step,
                              noise_schedule, noised, resnet)
from baselines.draem import damaged_image, opacity
from transfusion import Restoration, even_path

T_MAX, BINS, LEAST, NEIGHBOURS, POOL = 80, 10, 2, 20, 8
BANK_SIZE = 256                         # training images in the bank, at most


def guided(eps: Tensor, z_t: Tensor, z_0: Tensor, abar: Tensor, w: float) -> Tensor:
    """Eq. 8: eps^ = eps_theta - w sqrt(1 - abar) (z~_t - z_t), z~_t = z_0 noised with eps_theta.

    The same as a clean estimate (1 - g) f_theta + g z_0 with g = w (1 - abar): for w over
    1 / (1 - abar), 6 at step 80, it would overshoot the input.
    """
    return eps - w * (1 - abar).sqrt() * (noised(z_0, eps, abar) - z_t)


def level(distance: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Algorithm 2's T' of distances [B]: bin b of BINS even ones over low..high, LEAST or more,
    T' = b / BINS T_MAX, to the nearest ten; int64 [B]."""
    b = ((distance - low) / (high - low).clamp(min=1e-12) * BINS).ceil().clamp(LEAST, BINS)
    return (b / BINS * T_MAX / 10).round().long() * 10


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of the channels of [B, C, h, w] at each place: [B, 1, h, w]."""
    return 1 - F.cosine_similarity(a, b, 1)[:, None]


class D3AD(Baseline):
    STAGES = (0.4, 1.0)                 # autoencoder, diffusion
    IMAGES_AFTER_TRAINING = BANK_SIZE
    PRESETS = {
        "paper": dict(resize=256, crop=256, rotation=0.0, channels=192, batch=30, epochs=500,
                      lr=1e-4, lr_schedule="cosine", lam=0.85, kernel=13, attention_norm=True),
        "cpu": dict(init="default", rotation=0.0, channels=64, steps=7700, lam=0.85, kernel=5,
                    infer_steps=0),
        "quick": dict(init="default", rotation=0.0, channels=64, steps=2250, lam=0.85, kernel=5),
    }
    USES = {"lam", "infer_steps", "omega", "guidance", "resnet34"}

    def __init__(self, s):
        super().__init__(s.precision == "bf16")
        large = s.crop >= 128
        if large and s.crop % 32:
            raise ValueError(f"--crop {s.crop}: must be a multiple of 32")
        self.omega, self.guidance, self.resnet34 = s.omega, s.guidance, s.resnet34
        self.vae = VAE(s.channels // 2, (1, 2, 4, 4) if large else (1, 2, 2))
        self.phi = resnet(s.resnet34) if s.resnet34 else copy.deepcopy(self.vae.encoder)
        width = 128 if s.resnet34 else s.channels                           # of its second level
        widths, attention = ((1, 2, 4), (0, 1, 2)) if large else ((1, 2), (0, 1))
        self.net = UNet(4, 4, s.channels, widths, 2 if large else 1, attention)
        self.register_buffer("abar", noise_schedule(0.0015, 0.0195), False)
        side = s.crop // (8 if large else 4)
        for name, shape in (("noise", (1, 4, side, side)), ("bank", (BANK_SIZE, width * POOL ** 2)),
                            ("count", ()), ("distances", (2,)), ("ranges", (2, 2))):
            self.register_buffer(name, torch.zeros(shape))
        self.noise.normal_()

    def losses(self, x: Tensor, eps: Tensor, M: Tensor, M_a: Tensor, t: Tensor,
               drop: str = "") -> dict[str, Tensor]:
        """The stage's loss: the autoencoder's, of damaged images, too; or Eq. 6 on normal ones,
        mean (eps - eps_theta(z_t, t))^2. The other is 0. Arguments as TransFusion.losses."""
        terms = dict.fromkeys(("vae", "diffusion"), torch.zeros((), device=x.device))
        if self.stage == 0:
            x_a = damaged_image(x, eps, M, opacity(t, self.last_step))
            terms["vae"] = self.vae.loss(self, x_a)
        else:
            with torch.no_grad():
                z = self.vae.encode(self, x)
            noise = torch.randn_like(z)
            z_t = noised(z, noise, at(self.abar, t))
            terms["diffusion"] = F.mse_loss(self.run(self.net, z_t, t), noise)
        return {"loss": sum(terms.values()), **terms}

    # ------------------------------------------------------------ Algorithm 1: the reconstruction

    def path(self, infer_steps: int = 0) -> list[int]:
        """The steps from the smallest T' on, 20: ten calls, or infer_steps."""
        return even_path(20, infer_steps or 10)

    @torch.no_grad()
    def reconstruct(self, z_0: Tensor, T: Tensor, calls: int = 10) -> Tensor:
        """Algorithm 1 for latents z_0 [B, 4, h, w], each from its own T' in T [B] down to 0.

        The start is z_T' = sqrt(abar_T') z_0 + omega sqrt(1 - abar_T') eps (Eq. 12), each step
        Eq. 8, then Eq. 7, DDIM with eta 0.
        """
        z_t = noised(z_0, 0 * z_0, at(self.abar, T))
        z_t = z_t + self.omega * (1 - at(self.abar, T)).sqrt() * self.noise
        for k in range(calls):
            t, t_prev = ((T * left / calls).round().long() for left in (calls - k, calls - k - 1))
            abar = at(self.abar, t)
            eps = guided(self.run(self.net, z_t, t), z_t, z_0, abar, self.guidance)
            z_t = ddim_step(z_t, clean_estimate(z_t, eps, abar), abar, at(self.abar, t_prev))
        return z_t

    # ------------------------------------------------------------ Algorithm 2: how many steps

    def features(self, x: Tensor) -> list[Tensor]:
        """The first three levels of phi, [B, C, h, w] each."""
        if self.resnet34:
            x = normalize((x + 1) / 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            return self.run(lambda x: list(self.phi(x).values()), x)
        return self.run(self.phi, x)[:3]

    def distance(self, features: Tensor, itself: int = 0) -> Tensor:
        """Mean L1 distance [B] to the K nearest in the bank; itself 1: but for the nearest."""
        count = int(self.count)
        itself = min(itself, count - 1)
        K = max(1, min(NEIGHBOURS, count // 4))
        near = torch.cdist(features, self.bank[:count], p=1).topk(K + itself, largest=False).values
        return near[:, itself:].mean(1)

    def pooled(self, features: list[Tensor]) -> Tensor:
        """Of the second level's [B, C, h, w] the means over POOL x POOL parts, [B, C POOL^2]."""
        return F.adaptive_avg_pool2d(features[1], POOL).flatten(1)

    # ------------------------------------------------------------ Eq. 9, 10: the maps

    def compare(self, x: Tensor, T: Tensor, calls: int) -> tuple[Tensor, Tensor, Tensor]:
        """The restoration x_0 and the two distances of Eq. 9, [B, 1, H, W] each: of latents, the
        mean of |z_0 - z^_0| over channels; of features, the sum over levels of the cosine's."""
        z_0 = self.vae.encode(self, x)
        z = self.reconstruct(z_0, T, calls)
        x_0 = self.vae.decode(self, z)
        parts = [(z_0 - z).abs().mean(1, keepdim=True)]
        parts += [cosine_distance(a, b) for a, b in zip(self.features(x)[1:],
                                                        self.features(x_0)[1:])]
        L, *Fs = (F.interpolate(part, x.shape[2:], mode="bilinear") for part in parts)
        return x_0, L, sum(Fs)

    def adaptation_loss(self, x: Tensor, x_0: Tensor) -> Tensor:
        """Eq. 10: L_DA = sum over levels of the mean over places of 1 - cos(phi(x), phi(x^_0))."""
        return sum(cosine_distance(a, b).mean()
                   for a, b in zip(self.features(x), self.features(x_0)))

    def after_training(self, images: Tensor) -> None:
        """One epoch of Eq. 10 on phi as it was before; then, from training images [N, 3, H, W],
        neighbours and all ranges. Raises ValueError where --resnet34's file is gone."""
        rng = torch.Generator().manual_seed(0)
        before = resnet(self.resnet34, required=True) if self.resnet34 else self.vae.encoder
        self.phi.load_state_dict(before.state_dict())
        optimizer = torch.optim.AdamW(self.phi.parameters(), 1e-4)
        for x in images.split(8):
            T = level(torch.randint(1, BINS + 1, (1,), generator=rng), torch.zeros(1),
                      torch.full((1,), float(BINS))).to(x.device).expand(len(x))
            with torch.no_grad():
                x_0 = self.vae.decode(self, self.reconstruct(self.vae.encode(self, x), T))
            optimizer.zero_grad()
            self.adaptation_loss(x, x_0).backward()
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            pooled = torch.cat([self.pooled(self.features(x)) for x in images.split(8)])
            self.bank[:len(pooled)] = pooled
            self.count.fill_(len(pooled))
            distance = self.distance(pooled, 1)
            self.distances.copy_(torch.stack([distance.min(), distance.max()]))
            maps = [self.compare(x, level(d, *self.distances), 10)[1:]
                    for x, d in zip(images.split(8), distance.split(8))]
            for limits, part in zip(self.ranges, map(torch.cat, zip(*maps))):
                limits.copy_(torch.stack([part.min(), part.max()]))

    @torch.no_grad()
    def restore(self, x: Tensor, infer_steps: int = 0) -> Restoration:
        """x^_0, and Eq. 9's two parts in their ranges: the latents' as M_disc, so that --lam is its
        lambda, the features' as M_recon. Before `after_training` T' is the largest one and the ranges
        are 0..1."""
        T = torch.full((len(x),), T_MAX, device=x.device)
        ranges = self.ranges if self.count else torch.tensor([[0.0, 1.0]] * 2, device=x.device)
        if self.count:
            T = level(self.distance(self.pooled(self.features(x))), *self.distances)
        x_0, *parts = self.compare(x, T, len(self.path(infer_steps)) - 1)
        L, Fs = ((part - low) / (high - low) for part, (low, high) in zip(parts, ranges))
        return Restoration(x_0, L, Fs, L)
