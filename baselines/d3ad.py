"""D3AD (Tebbe and Tayyub, CVPR Workshops 2024): the starting step T' adapts to the image.

A latent diffusion of normal images. At test a latent is scaled as if it were noised to step T', but
no noise is added. Ten DDIM steps denoise it, guided towards the input. T' grows with the distance
of the image's features from those of the training images. The anomaly map compares latents and
features before and after. Equation numbers are those of the text submitted to ICLR.

As published: Eq. 6-10, Algorithms 1 and 2, Eq. 12 of the supplement (--omega; 0 performs best), T
1000, beta .0015 to .0195, T_max 80, ten bins (the second or higher is used), ten steps, K 20,
lambda 0.85 (--lam), AdamW with 1e-4; from the code: T' rounded to tens, and the guidance.
Different here: the autoencoder is not Stable Diffusion's but a small one, trained on this
category's images. Some of them are damaged, so that it reproduces defects, as theirs does. Without
ResNet-34's weights (--resnet34), the features are three levels of a copy of its encoder, adapted by
Eq. 10: the second level for the neighbours, the second and third for the map. The U-Net is smaller
(theirs: 281 M parameters). The two distances of Eq. 9 are scaled by their ranges on training images
(theirs: on the whole test set), so that an image can be scored alone. A training image is not its
own neighbour. The map's filter is a mean filter, not a Gaussian. At most 256 training images serve
as neighbours. The latent is the posterior's mean (theirs: a sample).
Cost: theirs needs 668 GMAC per image at 256 px.
"""
import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import normalize

from baselines.common import (VAE, Baseline, UNet, at, clean_estimate, ddim_step,
                              noise_schedule, noised, resnet)
from baselines.draem import damaged_image, opacity
from support.console import InputError
from transfusion import Restoration, even_path

T_MAX, BINS, LEAST, NEIGHBOURS, POOL = 80, 10, 2, 20, 8
BANK_SIZE = 256                         # training images in the bank, at most


def guided(eps: Tensor, z_t: Tensor, z_0: Tensor, abar: Tensor, w: float) -> Tensor:
    """Eq. 8: eps^ = eps_theta - w sqrt(1 - abar) (z~_t - z_t), z~_t = z_0 noised with eps_theta.

    The clean estimate becomes (1 - g) f_theta + g z_0 with g = w (1 - abar). It overshoots the
    input z_0 if w exceeds 1 / (1 - abar), which is 6 at step 80.
    """
    return eps - w * (1 - abar).sqrt() * (noised(z_0, eps, abar) - z_t)


def level(distance: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Algorithm 2: T' = b / BINS T_MAX, rounded to tens, int64 [B], for distances [B]. The bin b is
    LEAST or higher, of BINS equal bins over low..high."""
    b = ((distance - low) / (high - low).clamp(min=1e-12) * BINS).ceil().clamp(LEAST, BINS)
    return (b / BINS * T_MAX / 10).round().long() * 10


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine similarity of the channel vectors of two [B, C, h, w] maps: [B, 1, h, w]."""
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
            raise InputError(f"--crop {s.crop}: must be a multiple of 32")
        self.omega, self.guidance, self.resnet34 = s.omega, s.guidance, s.resnet34
        self.vae = VAE(s.channels // 2, (1, 2, 4, 4) if large else (1, 2, 2))
        self.phi = resnet(s.resnet34) if s.resnet34 else copy.deepcopy(self.vae.encoder)
        width = 128 if s.resnet34 else s.channels                           # of phi's second level
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
        """The loss of the stage: the autoencoder's, on damaged and normal images, or Eq. 6, mean
        (eps - eps_theta(z_t, t))^2, on normal images. The other term is 0. Arguments as in
        TransFusion.losses; t also sets the opacity of the anomaly."""
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
        """The steps from the smallest T', 20, to 0 in infer_steps network calls; 0 means ten."""
        return even_path(20, infer_steps or 10)

    @torch.no_grad()
    def reconstruct(self, z_0: Tensor, T: Tensor, calls: int = 10) -> Tensor:
        """Algorithm 1 for latents z_0 [B, 4, h, w], each from its own T' in T [B] down to 0.

        It starts at z_T' = sqrt(abar_T') z_0 + omega sqrt(1 - abar_T') eps (Eq. 12). Each step
        applies Eq. 8, then Eq. 7, a DDIM step with eta 0.
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
        """Mean L1 distance [B] to the K nearest of the bank; itself = 1 skips the image itself."""
        count = int(self.count)
        itself = min(itself, count - 1)
        K = max(1, min(NEIGHBOURS, count // 4))
        near = torch.cdist(features, self.bank[:count], p=1).topk(K + itself, largest=False).values
        return near[:, itself:].mean(1)

    def pooled(self, features: list[Tensor]) -> Tensor:
        """The second level [B, C, h, w], average-pooled to POOL x POOL cells: [B, C POOL^2]."""
        return F.adaptive_avg_pool2d(features[1], POOL).flatten(1)

    # ------------------------------------------------------------ Eq. 9, 10: the maps

    def compare(self, x: Tensor, T: Tensor, calls: int) -> tuple[Tensor, Tensor, Tensor]:
        """The restoration x_0 and the two distances of Eq. 9, [B, 1, H, W] each. Latents: the mean
        of |z_0 - z^_0| over channels; features: the cosine distance, summed over two levels."""
        z_0 = self.vae.encode(self, x)
        z = self.reconstruct(z_0, T, calls)
        x_0 = self.vae.decode(self, z)
        distances = [(z_0 - z).abs().mean(1, keepdim=True)]
        distances += [cosine_distance(a, b) for a, b in zip(self.features(x)[1:],
                                                        self.features(x_0)[1:])]
        L, *Fs = (F.interpolate(distance, x.shape[2:], mode="bilinear") for distance in distances)
        return x_0, L, sum(Fs)

    def adaptation_loss(self, x: Tensor, x_0: Tensor) -> Tensor:
        """Eq. 10: L_DA = sum over levels of the mean over pixels of 1 - cos(phi(x), phi(x^_0))."""
        return sum(cosine_distance(a, b).mean()
                   for a, b in zip(self.features(x), self.features(x_0)))

    def after_training(self, images: Tensor) -> None:
        """Adapt phi for one epoch by Eq. 10, from its unadapted weights; then compute the bank and
        all ranges. images: training images [N, 3, H, W] in [-1, 1]. Raises InputError if the file
        of --resnet34 no longer exists."""
        rng = torch.Generator().manual_seed(0)
        unadapted = resnet(self.resnet34, required=True) if self.resnet34 else self.vae.encoder
        self.phi.load_state_dict(unadapted.state_dict())
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
        """x^_0 and the two distances of Eq. 9, scaled by their ranges: latents as M_disc (--lam is
        the lambda of Eq. 9), features as M_recon. Before `after_training`, T' is T_MAX and the
        ranges are 0..1."""
        T = torch.full((len(x),), T_MAX, device=x.device)
        ranges = self.ranges if self.count else torch.tensor([[0.0, 1.0]] * 2, device=x.device)
        if self.count:
            T = level(self.distance(self.pooled(self.features(x))), *self.distances)
        x_0, *parts = self.compare(x, T, len(self.path(infer_steps)) - 1)
        L, Fs = ((part - low) / (high - low) for part, (low, high) in zip(parts, ranges))
        return Restoration(x_0, L, Fs, L)
