"""DRAEM (Zavrtanik, Kristan, Skočaj, ICCV 2021): reconstruct the damaged image, then compare.

One network turns an image with a synthetic anomaly back into the clean one; a second sees the
image and that reconstruction and segments where they disagree. Both are trained together, and the
second's loss shapes the first, too.

The paper's: Eq. 1-5, both networks (at --channels 128, 97.4 M parameters), their initial weights,
the losses' equal weights, half of the images undamaged, Adam at 1e-4 (here AdamW without decay),
x0.2 late in the training (here the loop's x0.1 after 560 of 700 epochs).
Stand-ins: the anomalies are this folder's, so TransFusion's own (structural ones, too, inside the
foreground, textures as train.py finds them); the SSIM's range is fixed, and it leaves out the
border; the mean filter of Eq. 5 smooths the map before the pixels are scored, too, not for the
image's score alone. Cost: 198 GMAC an image at 256 px, one pass; with 32 channels at 80 px about
1.2, a training step three times that for an image.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.common import Baseline
from transfusion import Restoration, compose, reconstruction_error, ssim


# ---------------------------------------------------------------- the networks

def convs(*widths: int) -> nn.Sequential:
    """conv - BatchNorm - ReLU from each width to the next."""
    return nn.Sequential(*(layer for a, b in zip(widths, widths[1:]) for layer in (
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))))


def initialise(net: nn.Module) -> None:
    """Weights of convolutions N(0, 0.02), of BatchNorm N(1, 0.02), as DRAEM's."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.02)


def enlarge(x: Tensor, side: tuple[int, int]) -> Tensor:
    """x [B, C, h, w] brought to side = (H, W), corners on corners."""
    return F.interpolate(x, side, mode="bilinear", align_corners=True)


class Reconstructor(nn.Module):
    """An autoencoder without skips: [B, 3, H, W] to the same, four times halved and enlarged."""

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
    """DRAEM's discriminative U-Net: [B, c_in, H, W] to two logits, [B, 2, H, W]; 1 is anomalous."""

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
    """beta of Eq. 4, uniform over [0.1, 1] as t is over 1..last_step; [B, 1, 1, 1]."""
    return (0.1 + 0.9 * (t - 1) / (last_step - 1))[:, None, None, None]


def reconstruction_loss(x: Tensor, x_r: Tensor) -> Tensor:
    """Eq. 1, 2: L_rec = L_SSIM + l2, both of images in [0, 1]: lambda is the code's 1.

    ssim's range is 2, so it is given twice the images. L_SSIM is its mean over pixels of 1 - SSIM.
    """
    return 1 - ssim(x + 1, x_r + 1) + F.mse_loss(x_r / 2, x / 2)


def focal_loss(logits: Tensor, M: Tensor) -> Tensor:
    """Mean over pixels of -(1 - p)^2 log p, p the softmax's share of the true class; gamma 2, no
    class weights. logits [B, 2, H, W], M [B, 1, H, W] in {0, 1}."""
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

        Arguments as TransFusion.losses; t says how opaque the anomaly is. M_a is not used.
        """
        x_a = damaged_image(x, eps, M, opacity(t, self.last_step))
        x_r = self.run(self.reconstruct, x_a)
        logits = self.run(self.segment, torch.cat([x_r, x_a], 1))
        terms = {"rec": reconstruction_loss(x, x_r), "seg": focal_loss(logits, M)}
        return {"loss": terms["rec"] + terms["seg"], **terms}

    @torch.no_grad()
    def restore(self, x: Tensor, infer_steps: int = 0) -> Restoration:
        """The reconstruction, the segmenter's map as M_disc, and the squared error as M_recon.

        Eq. 5, the score, is TransFusion's Eq. 10 and 11 with lam 1 and --kernel 21 (at 256 px).
        """
        x_r = self.run(self.reconstruct, x)
        M_o = self.run(self.segment, torch.cat([x_r, x], 1)).softmax(1)[:, 1:]
        return Restoration(x_r, M_o, reconstruction_error(x, x_r), M_o)
