"""DRAEM (Zavrtanik, Kristan, Skočaj, ICCV 2021): reconstruct the damaged image, then compare.

One network reconstructs the clean image from an image with a synthetic anomaly. A second network
sees the image and its reconstruction and segments the anomaly. Both are trained together; the
segmentation loss also trains the first network.

As published: Eq. 1-5, both networks (97.4 M parameters at --channels 128), their initial weights,
equal weights of the losses, half of the images undamaged, Adam with 1e-4 (here AdamW without
decay), a learning rate drop late in the training (theirs x0.2; here x0.1 after 560 of 700 epochs).
Different here: the synthetic anomalies are TransFusion's, so there are structural ones, too, they
lie inside the foreground, and train.py finds the textures. The SSIM has a fixed range and leaves
out the border. The mean filter of Eq. 5 also smooths the map whose pixels are scored.
Cost: 198 GMAC per image at 256 px, in one pass; about 1.2 GMAC with 32 channels at 80 px. A
training step costs three times as much per image.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.common import Baseline
from transfusion import Restoration, compose, reconstruction_error, ssim


# ---------------------------------------------------------------- the networks

def convs(*widths: int) -> nn.Sequential:
    """conv - BatchNorm - ReLU between consecutive widths."""
    return nn.Sequential(*(layer for a, b in zip(widths, widths[1:]) for layer in (
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))))


def initialise(net: nn.Module) -> None:
    """Draw the weights as DRAEM does: convolutions from N(0, 0.02), BatchNorm from N(1, 0.02)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.02)


def enlarge(x: Tensor, side: tuple[int, int]) -> Tensor:
    """Resize x [B, C, h, w] bilinearly to side = (H, W), with aligned corners."""
    return F.interpolate(x, side, mode="bilinear", align_corners=True)


class Reconstructor(nn.Module):
    """An autoencoder without skip connections and with four downsamplings; keeps [B, 3, H, W]."""

    def __init__(self, w: int):
        super().__init__()
        widths = (w, 2 * w, 4 * w, 8 * w, 8 * w)
        self.down = nn.ModuleList(convs(a, b, b) for a, b in zip((3, *widths), widths))
        self.up, c = nn.ModuleList(), 8 * w
        for width in (4 * w, 2 * w, w, w):
            self.up.append(convs(c, c, c, width))
            c = width
        self.end = nn.Conv2d(c, 3, 3, padding=1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        h, sides = self.down[0](x), []
        for layer in self.down[1:]:
            sides.append(h.shape[2:])
            h = layer(F.max_pool2d(h, 2))
        for layer in self.up:
            h = layer(enlarge(h, sides.pop()))
        return self.end(h)


class Segmenter(nn.Module):
    """DRAEM's discriminative U-Net: [B, c_in, H, W] to logits [B, 2, H, W]; class 1: anomalous."""

    def __init__(self, c_in: int, w: int):
        super().__init__()
        widths = [w, 2 * w, 4 * w, 8 * w, 8 * w, 8 * w]
        self.down = nn.ModuleList(convs(a, b, b) for a, b in zip([c_in, *widths], widths))
        self.narrow, self.up, c = nn.ModuleList(), nn.ModuleList(), 8 * w
        for skip, width in zip(widths[-2::-1], (8 * w, 4 * w, 2 * w, w, w)):
            self.narrow.append(convs(c, width))
            self.up.append(convs(width + skip, width, width))
            c = width
        self.end = nn.Conv2d(c, 2, 3, padding=1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.down[0](x)]
        for layer in self.down[1:]:
            skips.append(layer(F.max_pool2d(skips[-1], 2)))
        h = skips.pop()
        for narrow, layer in zip(self.narrow, self.up):
            skip = skips.pop()
            h = layer(torch.cat([skip, narrow(enlarge(h, skip.shape[2:]))], 1))
        return self.end(h)


# ---------------------------------------------------------------- Eq. 1-5

def damaged_image(x: Tensor, A: Tensor, M: Tensor, beta: Tensor) -> Tensor:
    """Eq. 4: I_a = (1 - M) I + (1 - beta) M I + beta M A, TransFusion's Eq. 1 under other names."""
    return compose(x, A, M, beta)


def opacity(t: Tensor, last_step: int) -> Tensor:
    """beta of Eq. 4, [B, 1, 1, 1]: maps t [B] in 1..last_step linearly to [0.1, 1]."""
    return (0.1 + 0.9 * (t - 1) / (last_step - 1))[:, None, None, None]


def reconstruction_loss(x: Tensor, x_r: Tensor) -> Tensor:
    """Eq. 1, 2: L_rec = L_SSIM + l2, both of images in [0, 1]; lambda is 1, as in their code.

    `ssim` has a dynamic range of 2, so it gets images in [0, 2]. L_SSIM is the mean of 1 - SSIM.
    """
    return 1 - ssim(x + 1, x_r + 1) + F.mse_loss(x_r / 2, x / 2)


def focal_loss(logits: Tensor, M: Tensor) -> Tensor:
    """Mean over pixels of -(1 - p)^2 log p, p the softmax probability of the true class; gamma 2,
    no class weights. logits: [B, 2, H, W]; M: [B, 1, H, W] in {0, 1}."""
    log_p = logits.log_softmax(1)
    log_p = torch.where(M > 0.5, log_p[:, 1:], log_p[:, :1])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


class Draem(Baseline):
    PRESETS = {
        "paper": dict(resize=256, crop=256, rotation=90.0, channels=128, epochs=700, lr=1e-4,
                      lr_drop=560, weight_decay=0.0, lam=1.0, kernel=21, attention_norm=True),
        "cpu": dict(init="default", channels=32, steps=4300, weight_decay=0.0, lam=1.0,
                    infer_steps=0),
        "quick": dict(init="default", channels=32, batch=8, steps=680, weight_decay=0.0, lam=1.0),
    }
    USES = {"lam"}

    def __init__(self, s):
        super().__init__(s.precision == "bf16")
        self.reconstruct, self.segment = Reconstructor(s.channels), Segmenter(6, s.channels // 2)

    def losses(self, x: Tensor, eps: Tensor, M: Tensor, M_a: Tensor, t: Tensor,
               drop: str = "") -> dict[str, Tensor]:
        """Eq. 3: L = L_rec + L_seg, L_seg the focal loss; the segmenter's input is not detached.

        Arguments as in TransFusion.losses; t sets the opacity of the anomaly. M_a is not used.
        """
        x_a = damaged_image(x, eps, M, opacity(t, self.last_step))
        x_r = self.run(self.reconstruct, x_a)
        logits = self.run(self.segment, torch.cat([x_r, x_a], 1))
        terms = {"rec": reconstruction_loss(x, x_r), "seg": focal_loss(logits, M)}
        return {"loss": terms["rec"] + terms["seg"], **terms}

    @torch.no_grad()
    def restore(self, x: Tensor, infer_steps: int = 0) -> Restoration:
        """The reconstruction, the segmenter's map as M_disc, and the squared error as M_recon.

        Eq. 5, the score, is TransFusion's Eq. 10 and 11 with --lam 1 and --kernel 21 (at 256 px).
        """
        x_r = self.run(self.reconstruct, x)
        M_o = self.run(self.segment, torch.cat([x_r, x], 1)).softmax(1)[:, 1:]
        return Restoration(x_r, M_o, reconstruction_error(x, x_r), M_o)
