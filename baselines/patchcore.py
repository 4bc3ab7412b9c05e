"""PatchCore (Roth et al., CVPR 2022): compare each patch of an image with patches of good images.

A network with ImageNet weights computes features of every patch. The memory bank holds the features
of the training images' patches, reduced to a coreset. The anomaly score of a patch is its distance
to the nearest neighbour in the bank. Nothing is trained: one pass over the training images fills
the bank.

As published: Eq. 1-7, Algorithm 1 with its random projection, two levels of features (strides 8 and
16), 3 x 3 neighbourhoods, bilinear upsampling, a Gaussian of sigma 4 px; with --preset paper the
image size (256 px, cropped to 224) and the size of the bank (10 % of the patches). The authors'
code omits Eq. 7, averages the concatenated channels down to 1024 (here: all) and projects to 128
dimensions (here: 32, which is faster).
Different here: EfficientNet-Lite0 replaces WideResNet-50-2 unless --weights-file is given. The bank
of the presets `cpu` and `quick` has 4000 patches. There is no restoration: x_0 is the input. The
image score of this folder is the maximum of the map (Eq. 11); each map is multiplied by one number
that makes it PatchCore's score (Eq. 7).
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.common import Baseline
from baselines.pretrained import EfficientNetLite0, WideResNet50
from transfusion import Restoration

NEIGHBOURS = 9                        # b of Eq. 7; the paper names no value, anomalib has 9


# ---------------------------------------------------------------- Eq. 1-3: the features of a patch

def aggregate(phi: Tensor) -> Tensor:
    """Eq. 1, 2: the mean of phi [B, C, h, w] over the 3 x 3 neighbourhood N_p of each position; phi
    is 0 outside of the map."""
    return F.avg_pool2d(phi, 3, stride=1, padding=1)


def patch_features(levels: list[Tensor]) -> Tensor:
    """Eq. 3: P(phi) of several levels [B, C_j, h_j, w_j] at the size of the first, [B, h, w, C].

    C is the sum of the C_j. The factor gives each level the weight that it would have with as many
    channels as the widest level; the authors' code repeats channels for this purpose.
    """
    side, widest = levels[0].shape[2:], max(phi.shape[1] for phi in levels)
    maps = [(widest / phi.shape[1]) ** 0.5 * F.interpolate(aggregate(phi), side, mode="bilinear")
            for phi in levels]
    return torch.cat(maps, 1).permute(0, 2, 3, 1)


# ---------------------------------------------------------------- Eq. 5: the coreset

def project(M: Tensor, dimensions: int, generator: torch.Generator) -> Tensor:
    """psi of Algorithm 1, a random linear map: M [N, C] to [N, dimensions]. It roughly keeps all
    distances (Johnson-Lindenstrauss), to about an eighth for 32 dimensions."""
    psi = torch.randn(M.shape[1], dimensions, generator=generator) / dimensions ** 0.5
    return M @ psi.to(M.device)


def coreset(psi_M: Tensor, count: int, first: int = 0) -> Tensor:
    """Eq. 5: M_C = argmin over subsets of max over m in M of min over n in M_C of |m - n|.

    Algorithm 1, greedily: m <- argmax over M - M_C of min over n in M_C of |psi(m) - psi(n)|.
    psi_M: [N, d]; first: the index of the first one. Returns `count` indices.
    """
    squares, columns = psi_M.square().sum(1), psi_M.T.contiguous()  # [d, N] is the faster layout
    distance = torch.full_like(squares, torch.inf)                  # squared, to the coreset so far
    chosen = [torch.tensor(first, device=psi_M.device)]
    while len(chosen) < count:
        new = chosen[-1]
        distance = torch.minimum(distance, squares + squares[new] - 2 * (psi_M[new] @ columns))
        distance[new] = -torch.inf                                  # despite rounding
        chosen.append(distance.argmax())
    return torch.stack(chosen)


# ---------------------------------------------------------------- Eq. 6, 7: the scores

def nearest(patches: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """min and argmin over m in the bank of |m_test - m|: for patches [P, C], two tensors [P]."""
    return torch.cdist(patches, bank).min(1)


def image_score(patches: Tensor, bank: Tensor, distance: Tensor, match: Tensor,
                b: int = NEIGHBOURS) -> Tensor:
    """Eq. 6: m_test*, m* = argmax over patches of argmin over the bank; s* = |m_test* - m*|.
    Eq. 7: s = (1 - exp(|m_test* - m*|) / sum over m in N_b(m*) of exp(|m_test* - m|)) s*.

    N_b(m*): the b patches of the bank that are nearest to m*, itself among them. patches [P, C],
    bank [N, C]; distance, match: of `nearest`. Returns a scalar.
    """
    worst = distance.argmax()
    m_test, m_star = patches[worst], bank[match[worst]]
    s_star = (m_test - m_star).norm()
    N_b = (bank - m_star).norm(dim=1).topk(min(b, len(bank)), largest=False).indices
    exponents = (bank[N_b] - m_test).norm(dim=1)
    return (1 - (s_star - exponents.logsumexp(0)).exp()) * s_star


def anomaly_map(distance: Tensor, side: tuple[int, int], sigma: float = 4.0) -> Tensor:
    """Distances [1, 1, h, w] brought to side = (H, W) bilinearly, then smoothed: [1, 1, H, W]. The
    Gaussian reaches four sigma, or as far as the reflected map does."""
    M, reach = F.interpolate(distance, side, mode="bilinear"), min(round(4 * sigma), min(side) - 1)
    offsets = torch.arange(-reach, reach + 1, device=M.device)
    window = torch.exp(-offsets ** 2 / (2 * sigma ** 2))
    window = window / window.sum()
    M = F.pad(M, [reach] * 4, mode="reflect")
    return F.conv2d(F.conv2d(M, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))


class PatchCore(Baseline):
    """s: the settings. Buffer `bank`: M_C, [patches, C], which is empty until `after_training`."""
    TRAINS = False
    IMAGES_AFTER_TRAINING = 1000      # 2 MB of memory each
    CPU = dict(resize=256, crop=256, init="default", epochs=1, steps=0, ema=0.0, lam=1.0, kernel=1,
               infer_steps=0, precision="float32", coreset=4000.0)
    PRESETS = {"paper": dict(resize=256, crop=224, epochs=1, lam=1.0, kernel=1, coreset=0.1),
               "cpu": CPU, "quick": CPU}
    USES = {"weights_file", "coreset"}

    def __init__(self, s):
        super().__init__(bf16=False)
        self.weights_file, self.coreset, self.seed = s.weights_file, s.coreset, s.seed
        self.net = WideResNet50() if s.weights_file else EfficientNetLite0()
        self.register_buffer("bank", torch.zeros(0, sum(self.net.widths)))

    def _load_from_state_dict(self, state: dict, prefix: str, *args) -> None:
        bank = state.get(prefix + "bank")
        if bank is not None and bank.shape[1:] == self.bank.shape[1:]:
            self.bank = torch.empty_like(bank, device=self.bank.device)
        super()._load_from_state_dict(state, prefix, *args)

    def before_training(self) -> None:
        self.net.load(self.weights_file)

    def patches(self, image: Tensor) -> Tensor:
        """Patch features [h, w, C] of one image [3, H, W]. On a CPU a batch would take longer."""
        return patch_features(self.net(image[None]))[0]

    @torch.no_grad()
    def after_training(self, images: Tensor) -> None:
        """Eq. 4: M, the union of the images' patches; the bank is its coreset (Eq. 5)."""
        M = torch.cat([self.patches(image).flatten(0, 1) for image in images])
        count = round(self.coreset * len(M)) if self.coreset < 1 else int(self.coreset)
        count = min(max(count, NEIGHBOURS), len(M))
        generator = torch.Generator().manual_seed(self.seed)
        first = int(torch.randint(len(M), (), generator=generator))
        self.bank = M[coreset(project(M, 32, generator), count, first)]

    @torch.no_grad()
    def restore(self, x: Tensor, infer_steps: int = 0) -> Restoration:
        """x itself, and the anomaly map as M_disc. The maximum of each map is the score of Eq. 7,
        divided by the mean norm of the bank's patches."""
        maps, unit = [], self.bank.norm(dim=1).mean()
        for image in x:
            patches = self.patches(image)
            distance, match = nearest(patches.flatten(0, 1), self.bank)
            M = anomaly_map(distance.view(1, 1, *patches.shape[:2]), x.shape[2:])
            s = image_score(patches.flatten(0, 1), self.bank, distance, match)
            maps.append(M / M.max().clamp_min(1e-12) * s / unit)
        M_disc = torch.cat(maps)
        return Restoration(x, M_disc, torch.zeros_like(M_disc), M_disc)
