import torch
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from cbgan.losses import discriminator_loss, generator_loss


def test_losses_are_torchs_binary_cross_entropy():
    real, fake = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).mul(5)
    one, zero = torch.ones(50), torch.zeros(50)
    torch.testing.assert_close(discriminator_loss(real, fake), cross_entropy(real, one) + cross_entropy(fake, zero))
    torch.testing.assert_close(generator_loss(fake), cross_entropy(fake, one))


def test_the_generator_still_learns_where_the_discriminator_is_sure():
    fake = torch.tensor([-100.0], requires_grad=True)
    generator_loss(fake).backward()
    torch.testing.assert_close(fake.grad, torch.tensor([-1.0]))  # the saturating loss would give 0


def test_half_precision_logits_are_computed_in_float32():
    logits = torch.tensor([9.0], dtype=torch.float16)  # softplus(-9) = 1.2340e-4, below float16's precision at 1
    assert discriminator_loss(logits, -logits).dtype == torch.float32
    torch.testing.assert_close(float(generator_loss(logits)), 1.23402e-4, rtol=1e-4, atol=0)
