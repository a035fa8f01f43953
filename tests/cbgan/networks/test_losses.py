import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from cbgan.networks.losses import discriminator_loss, generator_loss, gradient_penalty


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


def test_the_hinge_stops_at_a_margin_of_1_on_both_sides():
    real, fake = torch.tensor([3.0, 1.0, 0.5, -1.0]), torch.tensor([-3.0, -1.0, 0.5])
    # (0 + 0 + 0.5 + 2) / 4 + (0 + 0 + 1.5) / 3
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.625 + 0.5)
    assert generator_loss(fake, "hinge").item() == pytest.approx(3.5 / 3)


def test_r1_of_squares_is_the_mean_over_images():
    images = torch.tensor([[1.0, 2.0], [0.0, 3.0]])[:, :, None, None].requires_grad_()
    penalty = gradient_penalty(images.square().flatten(1).sum(1), images)  # |2x|^2: 20 and 36
    assert penalty.item() == pytest.approx(28.0)


def test_r1_differentiates_through_batch_normalization():
    """Hold the gradient of the penalty against differences of it, in float64."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 1)
    ).double()
    weight = network.get_parameter("0.weight")
    images = torch.randn(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def penalty(weight: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(network, {"0.weight": weight}, (images,)).squeeze(1)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.square().sum() / 3

    assert torch.autograd.gradcheck(penalty, (weight,))
    logits = network(images).squeeze(1)
    torch.testing.assert_close(gradient_penalty(logits, images).double(), penalty(weight), rtol=1e-5, atol=0)
