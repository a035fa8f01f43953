"""Reduced precision and NHWC memory change the rounding, not the computation."""

import math

import pytest
import torch
from tasks import made
from torch import nn

from cbgan.config import GanConfig
from cbgan.networks.losses import discriminator_loss, generator_loss
from cbgan.noise import noise
from cbgan.task import GanTask
from common.data import DataConfig
from common.data.image_set import to_float
from common.data.sets.digits import digits
from common.norms.config import NormConfig
from common.runtime.device import autocast, memory_format

CPU = torch.device("cpu")
SIZE = 16


def built(cfg: GanConfig) -> tuple[nn.Module, nn.Module]:
    """Build a run's generator and discriminator as training does."""
    networks = made(GanTask, cfg).networks
    return networks["g"], networks["d"]


def losses_and_gradients(norm: NormConfig, dtype=torch.float32, **options) -> dict[str, torch.Tensor]:
    """Return both losses and every gradient of one batch, without an update."""
    cfg = GanConfig(width=16, latent_dim=16, norm=norm, spectral=False, data=DataConfig(size=SIZE), **options)
    g, d = built(cfg)
    for network in (g, d):
        network.to(dtype)
        for layer in network.modules():
            if isinstance(layer, nn.LeakyReLU):
                layer.negative_slope = 1.0  # a rounding error that crosses the kink would change a gradient by 5x
    real = to_float(digits(SIZE).train.images[:64]).to(dtype)
    real = real.contiguous(memory_format=memory_format(cfg.channels_last))
    with autocast(CPU, cfg.precision):
        fake = g(noise(cfg, 0, 64, CPU).to(dtype))
        loss_d = discriminator_loss(d(real), d(fake.detach()))
        loss_g = generator_loss(d(fake))
    found = {"loss/d": loss_d, "loss/g": loss_g}
    for name, loss, network in (("d", loss_d, d), ("g", loss_g, g)):
        names, parameters = zip(*network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        found |= {f"{name}.{key}": gradient for key, gradient in zip(names, gradients, strict=True)}
    return {name: value.detach().double() for name, value in found.items()}


def errors(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return each value's error relative to its own norm, but for gradients that normalization makes zero."""
    scale = max(float(value.norm()) for name, value in exact.items() if "/" not in name)
    return {
        name: float((ours[name] - value).norm() / value.norm())
        for name, value in exact.items()
        if float(value.norm()) > 1e-6 * scale
    }


def test_channels_last_equals_contiguous_within_rounding():
    norm = NormConfig(kind="ucb")
    exact = losses_and_gradients(norm, torch.float64)
    contiguous = errors(losses_and_gradients(norm), exact)
    nhwc = errors(losses_and_gradients(norm, channels_last=True), exact)
    # The order of sums differs between layouts, and with the number of threads. One after another, the 64 * 16 * 16
    # terms of a bias's gradient round by about sqrt(16,384) ulp; twice that leaves room for the layers in between.
    # Where terms cancel, as in the bias before a normalization, the contiguous error shows how much that costs.
    budget = 2 * math.sqrt(64 * SIZE * SIZE) * torch.finfo(torch.float32).eps
    for name, error in nhwc.items():
        assert error <= max(budget, 4 * contiguous[name]), name
    assert sorted(nhwc.values())[len(nhwc) // 2] <= budget  # the usual value does not cancel


def test_channels_last_reaches_the_convolutions():
    _, d = built(GanConfig(width=16, channels_last=True, spectral=False))
    assert d.state_dict()["features.2.weight"].is_contiguous(memory_format=torch.channels_last)
    features = d.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    features = features[:5](torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_in_reduced_precision_are_those_of_float32_within_its_rounding(precision):
    norm = NormConfig(kind="ucb")
    exact = losses_and_gradients(norm, torch.float64)
    reduced = losses_and_gradients(norm, precision=precision)
    # Ten layers, each rounded to 8 (bfloat16) or 11 (float16) bits: relative errors of up to sqrt(10) ulp a layer
    # that normalization amplifies where it divides by small deviations; 16 ulp leaves room for that.
    ulp = {"bf16": 2.0**-8, "fp16": 2.0**-11}[precision]
    for name in ("loss/d", "loss/g"):
        assert abs(float(reduced[name] - exact[name])) <= 16 * ulp * abs(float(exact[name]))
