import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbda.networks.wide_resnet import Variant, WideResNet
from common.norms import BatchNorm

VARIANTS: tuple[Variant, ...] = ("official", "keras")


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_published_parameter_counts():
    for variant, parameters in zip(VARIANTS, (1_469_642, 1_467_610), strict=True):
        network = WideResNet(28, 2, 10, variant)
        assert count(network) == parameters
        # The page of Keras prints 1,471,226 with the moving averages.
        averages = sum(2 * m.num_features for m in network.modules() if isinstance(m, BatchNorm))
        assert variant == "official" or parameters + averages == 1_471_226


def by_hand(network: WideResNet, x: Tensor, variant: Variant) -> Tensor:
    """Compute a network of one block a group from its weights, in evaluation mode."""
    state = network.state_dict()

    def active(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        y = F.batch_norm(x, mean, var, weight, bias, eps={"official": 1e-6, "keras": 1e-3}[variant])
        return y.clamp(min=0) + (0.1 if variant == "official" else 0.0) * y.clamp(max=0)

    def convolve(name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride, padding)

    h = convolve("stem", x)
    for group, stride in enumerate((1, 2, 2)):
        place = f"groups.{group}.0"
        wide = active(f"{place}.norm1", h)
        residual = convolve(f"{place}.conv1", wide, stride)
        residual = convolve(f"{place}.conv2", active(f"{place}.norm2", residual))
        # Official: what is activated feeds the first group's shortcut alone. Keras: each that changes the channels.
        given = wide if (group == 0) == (variant == "official") else h
        h = (given if group == 0 else convolve(f"{place}.shortcut", given, stride, 0)) + residual
    return active("norm", h).mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_pass_is_the_published_one(variant):
    network = WideResNet(10, 1, 7, variant).eval().double()
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value) * 0.5)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(network(x), by_hand(network, x, variant))


def test_convolutions_start_as_published():
    torch.manual_seed(0)
    official, keras = (
        WideResNet(28, 2, 10, variant).get_parameter("groups.2.0.conv1.weight").detach() for variant in VARIANTS
    )
    assert float(official.std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert float(keras.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_averages_move_at_the_forms_own_speed_unless_told():
    def momenta(*args) -> set[float | None]:
        return {m.momentum for m in WideResNet(10, 1, 10, *args).modules() if isinstance(m, BatchNorm)}

    assert (momenta("official"), momenta("keras"), momenta("keras", 0.1)) == ({0.001}, {0.01}, {0.1})
