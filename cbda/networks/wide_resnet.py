"""Wide residual networks, as AdaMatch's authors build them and as the page of Keras does that the paper follows."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from common.norms import BatchNorm

Variant = Literal["official", "keras"]


@dataclass(frozen=True)
class _Details:
    """What the two forms differ in."""

    slope: float
    """Of the activation below zero."""
    biases: bool
    """Of convolutions."""
    momentum: float
    eps: float


_DETAILS: dict[Variant, _Details] = {
    "official": _Details(slope=0.1, biases=True, momentum=0.001, eps=1e-6),
    "keras": _Details(slope=0.0, biases=False, momentum=0.01, eps=1e-3),
}


class WideResNet(nn.Module):
    """A pre-activation residual network of three groups, with 16, 32 and 64 times ``width`` channels.

    google-research/adamatch (``official``): LeakyReLU, convolutions with biases, and the first block of the first group
    alone feeds its shortcut what is activated. keras.io's AdaMatch (``keras``): ReLU, no biases, and every block that
    changes the number of channels does so. WRN-28-2 for 10 classes has 1,469,642 and 1,467,610 parameters.

    Args:
        depth: weight layers, 6 n + 4 for n blocks a group.
        width: factor of the channels.
        num_classes: length of the output.
        variant: see above.
        momentum: weight of the new batch in BatchNorm's averages; None is the variant's own, 0.001 and 0.01, which is
            for runs of many thousand steps.

    Shape: (N, 3, H, W) to (N, num_classes).

    Raises:
        ValueError: if there is no network of this depth or width.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.
    """

    def __init__(
        self, depth: int, width: int, num_classes: int, variant: Variant = "official", momentum: float | None = None
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth: expected 6 n + 4 with n from 1 on, got {depth}")
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        details = _DETAILS[variant]
        momentum = details.momentum if momentum is None else momentum
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=details.biases)
        groups, channels = [], 16
        for group, out in enumerate((16 * width, 32 * width, 64 * width)):
            members = []
            for number in range(blocks):
                stride = 2 if group and not number else 1
                shared = channels != out if variant == "keras" else group == number == 0
                members.append(_Block(channels, out, stride, details, momentum, shared))
                channels = out
            groups.append(nn.Sequential(*members))
        self.groups = nn.Sequential(*groups)
        self.norm = BatchNorm(channels, details.eps, momentum)
        self.activation = nn.LeakyReLU(details.slope, inplace=True)
        self.linear = nn.Linear(channels, num_classes)
        self._initialise(variant)

    def _initialise(self, variant: Variant) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if variant == "official":  # N(0, 2 / (k k out))
                    nn.init.normal_(
                        module.weight, std=math.sqrt(2 / (module.weight[0, 0].numel() * len(module.weight)))
                    )
                else:
                    nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.Linear):
                (nn.init.xavier_normal_ if variant == "official" else nn.init.xavier_uniform_)(module.weight)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to what the linear map is given, (N, 64 width)."""
        return self.activation(self.norm(self.groups(self.stem(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        return self.linear(self.features(x))


class _Block(nn.Module):
    """Two convolutions, each after BatchNorm and activation, beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int, details: _Details, momentum: float, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.norm1 = BatchNorm(channels, details.eps, momentum)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=details.biases)
        self.norm2 = BatchNorm(out, details.eps, momentum)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=details.biases)
        self.activation = nn.LeakyReLU(details.slope, inplace=True)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride, bias=details.biases)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.norm1(x))
        residual = self.conv2(self.activation(self.norm2(self.conv1(active))))
        return self.shortcut(active if self.shared else x) + residual
