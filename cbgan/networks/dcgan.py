"""The DCGAN of the paper's section IV-D, at any width (docs/paper.md has the recipe)."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from common.norms.config import NormConfig
from common.norms.registry import kinds
from common.runtime.seeding import derive

_SLOPE = 0.2
_WEIGHT_STD = 0.02
UNDER_TEST = ("norm1.", "norm2.")
"""How the names of the generator's weights begin that belong to the layers under test."""


class Generator(nn.Module):
    """A linear map and four deconvolutions, from noise to an image in [-1, 1].

    Deconvolutions 1 and 2 are followed by the normalization under test, 3 by BatchNorm, each with LeakyReLU 0.2;
    the last ends in tanh. With width 512 and BatchNorm it has 3,812,355 parameters.

    Where the normalization takes clusters (scb, scb_base, dsbn), these are the classes, as many as the layer has
    components, and the generator is conditional: it makes an image of the class it is asked for.

    Args:
        width: channels of the first feature map, halved by each deconvolution; a multiple of 8.
        latent_dim: length of the noise vector.
        norm: the layer after deconvolutions 1 and 2.
        image_size: side of the image, ``8 * base_size`` (the last deconvolution keeps the size) or
            ``16 * base_size`` (it doubles it too).
        base_size: side of the first feature map; 0 means ``image_size / 8``.
        seed: of the mixtures' own generators; everything else is drawn from torch's global one.

    Attributes:
        num_classes: of a conditional generator; 0 of another.

    Shape: (N, latent_dim), and labels (N,) where it is conditional, to (N, 3, image_size, image_size).
    """

    def __init__(
        self, width: int, latent_dim: int, norm: NormConfig, image_size: int = 32, base_size: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        base = base_size or image_size // 8
        self.latent_dim = latent_dim
        self.num_classes = norm.num_components if norm.kind in kinds(takes_clusters=True) else 0
        self.width, self.base_size = width, base
        channels = [width, width // 2, width // 4, width // 8]
        bn = NormConfig(kind="bn")
        self.linear = nn.Linear(latent_dim, width * base**2)
        self.activation = nn.LeakyReLU(_SLOPE)
        self.deconv1 = nn.ConvTranspose2d(channels[0], channels[1], 4, 2, 1)
        self.norm1 = norm.build(channels[1], derive(seed, "norm1"))
        self.deconv2 = nn.ConvTranspose2d(channels[1], channels[2], 4, 2, 1)
        self.norm2 = norm.build(channels[2], derive(seed, "norm2"))
        self.deconv3 = nn.ConvTranspose2d(channels[2], channels[3], 4, 2, 1)
        self.norm3 = bn.build(channels[3])
        last = (3, 1, 1) if image_size == 8 * base else (4, 2, 1)
        self.deconv4 = nn.ConvTranspose2d(channels[3], 3, *last)
        _initialise(self)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map noise (N, latent_dim), and classes (N,) int64, to images (N, 3, S, S) in [-1, 1]."""
        clusters = (labels,) if self.num_classes else ()
        h = self.activation(self.linear(z)).view(-1, self.width, self.base_size, self.base_size)
        h = self.activation(self.norm1(self.deconv1(h), *clusters))
        h = self.activation(self.norm2(self.deconv2(h), *clusters))
        h = self.activation(self.norm3(self.deconv3(h)))
        return torch.tanh(self.deconv4(h))


class Discriminator(nn.Module):
    """Seven convolutions and a linear map, from an image to the logit of its being real.

    BatchNorm follows all convolutions but the first, LeakyReLU 0.2 every one. With width 512 and images of
    32 x 32 it has 5,864,449 parameters.

    With classes it is a projection discriminator (Miyato and Koyama, 2018): the logit of x as an image of class y gains
    the inner product of y's learned vector and the last feature maps summed over positions.

    Args:
        width: channels of the last feature maps; a multiple of 8.
        image_size: side of the image, a multiple of 8.
        num_classes: of a conditional GAN; 0 asks for no labels.
        spectral: divide each weight by its largest singular value (Miyato et al., 2018); BatchNorm, which would undo
            the bound on slopes, is left out then.

    Shape: (N, 3, image_size, image_size), and labels (N,) where there are classes, to (N,).
    """

    def __init__(self, width: int, image_size: int = 32, num_classes: int = 0, *, spectral: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width // 8, 3, 1, 1), nn.LeakyReLU(_SLOPE)]
        norm = NormConfig(kind="none" if spectral else "bn")
        for channels in (width // 8, width // 4, width // 2):
            for inner, kernel, stride in ((channels, 4, 2), (2 * channels, 3, 1)):
                layers += [
                    nn.Conv2d(inner, 2 * channels, kernel, stride, 1),
                    norm.build(2 * channels),
                    nn.LeakyReLU(_SLOPE),
                ]
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(width * (image_size // 8) ** 2, 1)
        self.embedding = nn.Embedding(num_classes, width) if num_classes else None
        _initialise(self)
        if spectral:
            for layer in [m for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]:
                spectral_norm(layer)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images (N, 3, S, S) in [-1, 1], and their classes (N,) int64, to logits (N,)."""
        h = self.features(x)
        logits = self.linear(h.flatten(1)).squeeze(1)
        if self.embedding is not None:
            logits = logits + (self.embedding(labels) * h.sum((2, 3))).sum(1)
        return logits


def _initialise(network: nn.Module) -> None:
    """Draw the weights of linear maps, convolutions and class vectors from N(0, 0.02), zero biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
            nn.init.normal_(layer.weight, 0.0, _WEIGHT_STD)
            if not isinstance(layer, nn.Embedding) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
