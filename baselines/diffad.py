"""DiffAD (Zhang et al., ICCV 2023): diffuse a clean latent, decode half-way, compare as DRAEM does.

Three stages, one after the other: an autoencoder of clean images; a diffusion of its latents that
starts from noise and is steered by the latent of the (perhaps damaged) image, which is noised in
training so that defects are not copied; DRAEM's segmenter, which sees the image, the generated one
and one decoded between their latents, which tells it what generation alone changes.

The paper's: Eq. 3-7, the three stages, T 1000, the schedule (roots of beta even from .0015 to .02),
the condition's noise over all of it and none at test, lambda 0.5, DDIM with eta 0 from pure noise
at step 801, five steps as in the supplement, the segmenter's focal loss alone; at --channels 256
and 256 px the U-Net (one attention head here; strided and transposed convolutions).
Stand-ins: the autoencoder learns by L1 + SSIM + KL, without LPIPS (pretrained) and discriminator,
and is a smaller one, of an eighth of the side (below 128 px a quarter); the posterior's mean, taken
to variance 1; one --lr, --batch and schedule for the three, shares of the steps in STAGES; DRAWS
noises for each latent in a step of the diffusion; eps_theta is not the network's output but is made
of it and z_t (`predict`), because near t = 1000 a clean estimate multiplies its error by up to 92;
five DDIM steps in the segmenter's training, too (theirs 50; 10 lose half a point); one noise x_T
for every image; the anomalies and the filter as in draem.py.
Variants of the supplement, --variant: f_and_r generates without condition, from the image's own
latent noised to t = 800; c has a clean condition; no_inter no third image (nor have the first two);
x_a_inter has the image's own decoded latent in its place.
Cost: theirs 1 195 GMAC an image at 256 px (more than half of it two decodings).
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.common import (VAE, Baseline, UNet, at, clean_estimate, ddim_step,
                              noise_schedule, noised)
from baselines.draem import Segmenter, damaged_image, focal_loss, opacity
from transfusion import Restoration, even_path, reconstruction_error

FROM = 800                              # the step that f_and_r starts at
CALLS, DRAWS = 5, 4


class DiffAD(Baseline):
    STAGES = (0.25, 0.6, 1.0)           # autoencoder, diffusion, segmenter
    PRESETS = {
        "paper": dict(resize=256, crop=256, rotation=90.0, channels=256, batch=32, epochs=6000,
                      lr=6.4e-5, lr_schedule="cosine", lam=1.0, kernel=21, attention_norm=True),
        "cpu": dict(init="default", channels=64, steps=3600, lam=1.0, infer_steps=0),
        "quick": dict(init="default", channels=64, steps=1180, lam=1.0),
    }
    USES = {"lam", "infer_steps", "variant"}

    def __init__(self, s):
        super().__init__(s.precision == "bf16")
        large = s.crop >= 128
        if large and s.crop % 32:
            raise ValueError(f"--crop {s.crop}: must be a multiple of 32")
        self.variant = s.variant
        self.steered = s.variant != "f_and_r"
        self.third = s.variant in ("diffad", "x_a_inter")
        self.vae = VAE(s.channels // 2, (1, 2, 4, 4) if large else (1, 2, 2))
        widths, attention = ((1, 2, 4), (0, 1, 2)) if large else ((1, 2), (0, 1))
        self.net = UNet(8 if self.steered else 4, 4, s.channels, widths, 2 if large else 1,
                        attention)
        self.segment = Segmenter(9 if self.third else 6, s.channels // 4)
        self.register_buffer("abar", noise_schedule(0.0015, 0.02, "sqrt"), False)
        side = s.crop // (8 if large else 4)
        self.register_buffer("x_T", torch.randn(1, 4, side, side))

    # ------------------------------------------------------------ Eq. 3-6: the diffusion

    def predict(self, z_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """eps_theta(z_t, t, c), or eps_theta(z_t, t) in f_and_r; all [B, 4, h, w], t [B].

        = sqrt(abar_t) v + sqrt(1 - abar_t) z_t with the network's v, of which the clean estimate is
        sqrt(abar_t) z_t - sqrt(1 - abar_t) v (Salimans and Ho 2022), at every t as exact as v.
        """
        v = self.run(self.net, torch.cat([z_t, c], 1) if self.steered else z_t, t)
        abar = at(self.abar, t)
        return abar.sqrt() * v + (1 - abar).sqrt() * z_t

    def noisy_condition(self, c: Tensor, eps: Tensor, t_c: Tensor) -> Tensor:
        """Eq. 5: c_noisy = sqrt(abar_tc) c + sqrt(1 - abar_tc) eps'; c itself in the variant c."""
        return c if self.variant == "c" else noised(c, eps, at(self.abar, t_c))

    def diffusion_loss(self, z: Tensor, c: Tensor) -> Tensor:
        """Eq. 6: L_LDM = E |eps - eps_theta(z_t, t, c_noisy)|^2, z the clean image's latent."""
        t, t_c = torch.randint(1, self.last_step + 1, (2, len(z)), device=z.device)
        eps, eps_c = torch.randn_like(z), torch.randn_like(z)
        z_t = noised(z, eps, at(self.abar, t))
        return F.mse_loss(self.predict(z_t, t, self.noisy_condition(c, eps_c, t_c)), eps)

    @torch.no_grad()
    def generate(self, c: Tensor, x_T: Tensor, path: list[int]) -> Tensor:
        """z_r: DDIM along the steps of `path`, from x_T, steered by the clean c (t_c = 0)."""
        z_t = x_T.expand_as(c) if self.steered else noised(c, x_T, self.abar[path[0]])
        for t, t_prev in zip(path, path[1:]):
            eps = self.predict(z_t, torch.full((len(c),), t, device=c.device), c)
            z_0 = clean_estimate(z_t, eps, self.abar[t])
            z_t = ddim_step(z_t, z_0, self.abar[t], self.abar[t_prev])
        return z_t

    # ------------------------------------------------------------ Eq. 7: the images to compare

    @torch.no_grad()
    def images(self, x_a: Tensor, x_T: Tensor, path: list[int], lam: float = 0.5) -> list[Tensor]:
        """x_r, x_inter (where the variant has it) and x_a, each [B, 3, H, W].

        Eq. 7: z_inter = lambda c + (1 - lambda) z_r, x_inter = D(z_inter); lambda 1 in x_a_inter.
        """
        c = self.vae.encode(self, x_a)
        z_r = self.generate(c, x_T, path)
        lam = 1.0 if self.variant == "x_a_inter" else lam
        third = [self.vae.decode(self, lam * c + (1 - lam) * z_r)] if self.third else []
        return [self.vae.decode(self, z_r), *third, x_a]

    def path(self, infer_steps: int = 0) -> list[int]:
        """The DDIM steps, as theirs: of 5 calls 801, 601, 401, 201, 1 and 0; in f_and_r evenly from
        FROM. infer_steps 0: CALLS. Raises ValueError where there are fewer steps than calls."""
        calls = infer_steps or CALLS
        if not self.steered:
            return even_path(FROM, calls)
        stride = self.last_step // calls
        return [t - stride + 1 for t in even_path(self.last_step, calls)[:-1]] + [0]

    # ------------------------------------------------------------ training and restoration

    def losses(self, x: Tensor, eps: Tensor, M: Tensor, M_a: Tensor, t: Tensor,
               drop: str = "") -> dict[str, Tensor]:
        """The loss of the stage: the autoencoder's, Eq. 6, or the segmenter's; the others are 0.

        Arguments as TransFusion.losses; t says how opaque the anomaly is. M_a is not used.
        """
        terms = dict.fromkeys(("vae", "diffusion", "segment"), torch.zeros((), device=x.device))
        x_a = damaged_image(x, eps, M, opacity(t, self.last_step))
        if self.stage == 0:
            terms["vae"] = self.vae.loss(self, x)
        elif self.stage == 1:
            with torch.no_grad():
                z, c = self.vae.encode(self, torch.cat([x, x_a])).chunk(2)
            z, c = (part.repeat(DRAWS, 1, 1, 1) for part in (z, c))
            terms["diffusion"] = self.diffusion_loss(z, c if self.steered else z)
        else:
            x_T = torch.randn(len(x), *self.x_T.shape[1:], device=x.device)
            logits = self.run(self.segment, torch.cat(self.images(x_a, x_T, self.path()), 1))
            terms["segment"] = focal_loss(logits, M)
        return {"loss": sum(terms.values()), **terms}

    @torch.no_grad()
    def restore(self, x: Tensor, infer_steps: int = 0) -> Restoration:
        """x_r, the segmenter's map as M_disc, and the squared error of x_r as M_recon."""
        images = self.images(x, self.x_T, self.path(infer_steps))
        M_o = self.run(self.segment, torch.cat(images, 1)).softmax(1)[:, 1:]
        return Restoration(images[0], M_o, reconstruction_error(x, images[0]), M_o)
