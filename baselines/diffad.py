"""DiffAD (Zhang et al., ICCV 2023): generate a clean image by diffusion, compare as DRAEM does.

The stages are trained one after the other: an autoencoder of clean images; a diffusion of its
latents that starts from noise; DRAEM's segmenter. The diffusion is conditioned on the latent of the
image, damaged or not, which is noised in training so that defects are not copied. The segmenter
sees the image, the generated image, and a third image that is decoded from the interpolation of
their latents and shows it the changes due to generation alone.

As published: Eq. 3-7, the stages, T 1000, the schedule (square roots of beta evenly spaced, beta
from .0015 to .02), a condition noised to any t in training and clean at test, lambda 0.5, DDIM with
eta 0 from pure noise at step 801, five steps (supplement), only the focal loss for the segmenter;
at --channels 256 and 256 px the U-Net (here one attention head, strided and transposed
convolutions).
Different here: the autoencoder learns by L1 + SSIM + KL, without LPIPS (which is pretrained) and
discriminator. It is smaller, with latents of 1/8 of the side (1/4 below 128 px). The latent is the
posterior's mean, normalised to variance 1. All stages share --lr, --batch and the schedule; STAGES
says when each one ends. A step of the diffusion uses DRAWS noises for each latent. eps_theta
is computed from the network's output and z_t (`predict`), because near t = 1000 a clean estimate
would multiply its error by up to 92. The segmenter is also trained with five DDIM steps (theirs:
50; 10 were half a point worse). All test images start from one noise x_T. The anomalies and the
filter are those of draem.py.
Variants of the supplement (--variant): f_and_r generates without a condition, from the image's own
latent noised to t = 800; c has a clean condition in training, too; no_inter has no third image, and
neither have f_and_r and c; in x_a_inter the third image is the decoded latent of the image itself.
Cost: theirs needs 1 195 GMAC per image at 256 px, more than half of it for two decodings.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.common import (VAE, Baseline, UNet, at, clean_estimate, ddim_step,
                              noise_schedule, noised)
from baselines.draem import Segmenter, damaged_image, focal_loss, opacity
from support.console import InputError
from transfusion import Restoration, even_path, reconstruction_error

FROM = 800                              # the step at which f_and_r starts
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
            raise InputError(f"--crop {s.crop}: must be a multiple of 32")
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

        eps_theta = sqrt(abar_t) v + sqrt(1 - abar_t) z_t with the network's output v (Salimans and
        Ho 2022). Its clean estimate, sqrt(abar_t) z_t - sqrt(1 - abar_t) v, is as exact as v.
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
        """z_r: DDIM from x_T along the steps of `path`, conditioned on the clean c (t_c = 0)."""
        z_t = x_T.expand_as(c) if self.steered else noised(c, x_T, self.abar[path[0]])
        for t, t_prev in zip(path, path[1:]):
            eps = self.predict(z_t, torch.full((len(c),), t, device=c.device), c)
            z_0 = clean_estimate(z_t, eps, self.abar[t])
            z_t = ddim_step(z_t, z_0, self.abar[t], self.abar[t_prev])
        return z_t

    # ------------------------------------------------------------ Eq. 7: the images to compare

    @torch.no_grad()
    def images(self, x_a: Tensor, x_T: Tensor, path: list[int], lam: float = 0.5) -> list[Tensor]:
        """x_r, x_inter (if the variant has it) and x_a, each [B, 3, H, W].

        Eq. 7: z_inter = lambda c + (1 - lambda) z_r, x_inter = D(z_inter); lambda 1 in x_a_inter.
        """
        c = self.vae.encode(self, x_a)
        z_r = self.generate(c, x_T, path)
        lam = 1.0 if self.variant == "x_a_inter" else lam
        third = [self.vae.decode(self, lam * c + (1 - lam) * z_r)] if self.third else []
        return [self.vae.decode(self, z_r), *third, x_a]

    def path(self, infer_steps: int = 0) -> list[int]:
        """The DDIM steps, as in the authors' code: 801, 601, 401, 201, 1, 0 for 5 calls; in f_and_r
        even steps from FROM. infer_steps 0 means CALLS. Raises ValueError for too many calls."""
        calls = infer_steps or CALLS
        if not self.steered:
            return even_path(FROM, calls)
        stride = self.last_step // calls
        return [t - stride + 1 for t in even_path(self.last_step, calls)[:-1]] + [0]

    # ------------------------------------------------------------ training and restoration

    def losses(self, x: Tensor, eps: Tensor, M: Tensor, M_a: Tensor, t: Tensor,
               drop: str = "") -> dict[str, Tensor]:
        """The loss of the stage: the autoencoder's, Eq. 6, or the segmenter's; the others are 0.

        Arguments as in TransFusion.losses; t sets the opacity of the anomaly. M_a is not used.
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
