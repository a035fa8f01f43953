"""GAN losses on logits: non-saturating logistic (Goodfellow et al., 2014), hinge (Lim and Ye, 2017), R1."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

Loss = Literal["logistic", "hinge"]


def discriminator_loss(real: Tensor, fake: Tensor, kind: Loss = "logistic") -> Tensor:
    """Return a discriminator's loss for logits (N,) each, a scalar computed in float32.

    Logistic: mean -log sigmoid(real) - log(1 - sigmoid(fake)); hinge: mean max(0, 1 - real) + max(0, 1 + fake).
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return relu(1 - real).mean() + relu(1 + fake).mean()
    return softplus(-real).mean() + softplus(fake).mean()


def generator_loss(fake: Tensor, kind: Loss = "logistic") -> Tensor:
    """Return mean -log sigmoid(fake), or mean -fake for hinge; logits (N,), a scalar computed in float32."""
    return -fake.float().mean() if kind == "hinge" else softplus(-fake.float()).mean()


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Return the mean squared 2-norm of each image's gradient of its logit, differentiable once more.

    R1 of Mescheder et al. (2018), without its factor gamma / 2.

    Args:
        logits: (N,), computed from ``images``.
        images: (N, 3, H, W), which require a gradient.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()
