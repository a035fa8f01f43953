"""The non-saturating logistic GAN losses (Goodfellow et al., 2014), on logits."""

from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return mean -log sigmoid(real) - log(1 - sigmoid(fake)), for logits (N,) each; computed in float32."""
    return softplus(-real.float()).mean() + softplus(fake.float()).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Return mean -log sigmoid(fake), for logits (N,); computed in float32."""
    return softplus(-fake.float()).mean()
