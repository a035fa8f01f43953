import torch
from tasks import made
from torch import nn

from cbcls.config import ClassifierConfig
from cbcls.networks.shallow_cnn import ShallowCNN
from cbcls.task import ClassifierTask
from common.norms.config import NormConfig

BN = NormConfig(kind="bn")


def built(cfg: ClassifierConfig) -> ShallowCNN:
    """Build a run's classifier as training does."""
    network = made(ClassifierTask, cfg).networks["network"]
    assert isinstance(network, ShallowCNN)
    return network


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_published_parameters():
    for classes, parameters in ((10, 918_410), (100, 941_540), (200, 967_240)):
        assert count(ShallowCNN(classes, BN)) == parameters
    for norm, parameters in (
        (BN, 256),
        (NormConfig(kind="scb"), 768),
        (NormConfig(kind="scb_base"), 1_024),
        (NormConfig(kind="ucb", update="weight", affine=False), 771),
    ):
        network = ShallowCNN(10, norm)
        assert count(network.norm3) == parameters
        assert count(network) == 918_410 - 256 + parameters


def test_feature_maps_have_the_published_sizes():
    network, sizes = ShallowCNN(10, BN), {}

    def note(name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, x: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            sizes[name, x[0].shape[-1]] = y.shape[1:]

        module.register_forward_hook(hook)

    for name, module in network.named_children():
        note(name, module)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sizes["conv1", 32] == (64, 32, 32)
    assert sizes["pool", 32] == (64, 16, 16)
    assert sizes["conv2", 16] == (128, 16, 16)
    assert sizes["pool", 16] == (128, 8, 8)
    assert sizes["conv3", 8] == (128, 8, 8)
    assert sizes["pool", 8] == (128, 4, 4)
    assert sizes["conv4", 4] == (256, 4, 4)


def test_all_other_weights_are_the_same_with_and_without_a_mixture():
    bn, ucb = (built(ClassifierConfig(norm=NormConfig(kind=kind))) for kind in ("bn", "ucb"))
    for name, weight in bn.named_parameters():
        if not name.startswith("norm3"):
            assert torch.equal(weight, ucb.get_parameter(name)), name


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    same, again, other = (built(ClassifierConfig(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(same.conv3.weight, again.conv3.weight)
    assert not torch.equal(same.conv3.weight, other.conv3.weight)
    assert torch.equal(same.norm3.get_buffer("mean"), again.norm3.get_buffer("mean"))
    assert not torch.equal(same.norm3.get_buffer("mean"), other.norm3.get_buffer("mean"))
    assert torch.equal(before, torch.get_rng_state())
