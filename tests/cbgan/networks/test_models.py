import pytest
import torch
from tasks import made
from torch import nn

from cbgan.config import GanConfig
from cbgan.networks.dcgan import Discriminator, Generator
from cbgan.task import GanTask
from common.norms.config import NormConfig

BN = NormConfig(kind="bn")


def built(cfg: GanConfig) -> GanTask:
    """Build a run's networks as training does."""
    return made(GanTask, cfg)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_published_parameter_counts_at_full_width():
    assert count(Generator(512, 128, BN)) == 3_812_355
    assert count(Discriminator(512)) == 5_864_449


def test_ucb_adds_1539_and_771_where_batchnorm_had_512_and_256():
    ucb = NormConfig(kind="ucb", update="weight", affine=False, groups=1)
    assert count(Generator(512, 128, ucb)) == 3_812_355 - 512 - 256 + 1_539 + 771


@pytest.mark.parametrize("kind", ["scb", "scb_base"])
def test_classes_are_the_clusters_of_the_generators_layers(kind):
    g = Generator(16, 8, NormConfig(kind=kind, num_components=5))
    added = {"scb": 2 * 5, "scb_base": 2 * (5 + 1)}[kind] * (8 + 4)  # norm1 has 8 channels, norm2 4; BatchNorm 2 each
    assert count(g) == count(Generator(16, 8, BN)) - 2 * (8 + 4) + added
    assert g.num_classes == 5
    with torch.no_grad():
        for layer in ("norm1.mean", "norm2.mean"):
            mean = g.get_parameter(layer if kind == "scb" else f"{layer}.weight")
            mean.normal_(generator=torch.Generator().manual_seed(0))
    z = torch.randn(1, 8).expand(5, 8)
    images = g.eval()(z, torch.arange(5))
    assert torch.pdist(images.flatten(1)).min() > 1e-3  # the same noise, another image of each class
    torch.testing.assert_close(g(z[:2], torch.tensor([3, 3])), images[[3, 3]])
    with torch.no_grad():  # both layers hear of the class
        once = g.norm1.register_forward_pre_hook(lambda _, args: (args[0], torch.zeros_like(args[1])))
        assert torch.pdist(g(z, torch.arange(5)).flatten(1)).min() > 1e-3
        once.remove()
        g.norm2.register_forward_pre_hook(lambda _, args: (args[0], torch.zeros_like(args[1])))
        assert torch.pdist(g(z, torch.arange(5)).flatten(1)).min() > 1e-3


def test_a_projection_discriminator_adds_the_inner_product_with_its_classs_vector():
    d = Discriminator(16, 16, num_classes=3).eval()
    x, labels = torch.randn(4, 3, 16, 16), torch.tensor([2, 0, 1, 1])
    vectors = d.state_dict()["embedding.weight"]
    assert vectors.shape == (3, 16)
    features = d.features(x).detach()
    plain = d.linear(features.flatten(1)).squeeze(1)
    inner = [float((vectors[label] * features[i].sum((1, 2))).sum()) for i, label in enumerate(labels)]
    torch.testing.assert_close(d(x, labels), plain + torch.tensor(inner))
    assert min(abs(value) for value in inner) > 1e-3 * max(abs(value) for value in inner) > 0
    big = Discriminator(512, 8, num_classes=200).state_dict()["embedding.weight"]  # N(0, 0.02), as other weights
    assert abs(float(big.std()) - 0.02) < 0.0003


def test_spectral_normalization_gives_every_weight_norm_1_and_leaves_batchnorm_out():
    d = Discriminator(16, 16, num_classes=3, spectral=True)
    for _ in range(50):  # the power iteration goes a step at each use
        d(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))
    layers = [m for m in d.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
    assert len(layers) == 7 + 1 + 1
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)  # pyright: ignore[reportCallIssue]
        assert float(largest) == pytest.approx(1, abs=0.02)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in d.features)
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in Discriminator(16, 16).modules())


def test_a_run_gives_its_options_to_the_networks():
    cfg = GanConfig(width=16, spectral=True, norm=NormConfig(kind="scb", num_components=10))
    d = built(cfg).networks["d"]
    assert d.get_submodule("embedding").num_embeddings == 10
    assert "features.0.parametrizations.weight.original" in d.state_dict()
    plain = built(GanConfig(width=16, spectral=False)).networks["d"]
    assert plain.embedding is None
    assert "features.0.weight" in plain.state_dict()


def test_images_have_the_asked_size_and_range():
    for size, base in ((32, 0), (32, 4), (32, 2), (64, 0), (64, 4), (16, 1), (24, 3)):
        images = Generator(16, 8, BN, size, base)(torch.randn(3, 8))
        assert images.shape == (3, 3, size, size)
        assert images.abs().max() <= 1
        assert Discriminator(16, size)(images).shape == (3,)


def test_weights_follow_from_the_seed_and_are_drawn_from_n_0_002():
    networks = [built(GanConfig(seed=seed, width=128)).networks["g"] for seed in (0, 0, 1)]
    same, again, other = (network.get_parameter("deconv1.weight") for network in networks)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    # 131,072 draws: the standard error of the standard deviation is 0.02 / sqrt(2 n) = 0.00004
    assert abs(float(same.detach().std()) - 0.02) < 0.0002


def test_all_other_weights_are_the_same_with_and_without_a_mixture():
    bn, ucb = (built(GanConfig(width=16, norm=NormConfig(kind=kind))).networks for kind in ("bn", "ucb"))
    for name in ("linear.weight", "deconv1.weight", "deconv3.weight", "deconv4.weight"):
        assert torch.equal(bn["g"].get_parameter(name), ucb["g"].get_parameter(name))
    for ours, theirs in zip(bn["d"].parameters(), ucb["d"].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_mixtures_start_apart_and_follow_from_the_seed():
    def means(seed: int) -> list[torch.Tensor]:
        g = built(GanConfig(seed=seed, width=16)).networks["g"]
        return [g.get_submodule(layer).get_buffer("mean").flatten() for layer in ("norm1", "norm2")]

    first, second = means(0)
    for ours, same, other in zip((first, second), means(0), means(1), strict=True):
        assert torch.equal(ours, same)
        assert not torch.equal(ours, other)
    # Had both layers one generator's seed, the second, smaller one would repeat what the first one drew first.
    assert not torch.equal(first[: len(second)], second)


def test_adam_gets_the_betas_in_their_order_and_decays_no_bias_and_no_normalization():
    optimizers = built(GanConfig(width=16, beta1=0.3, beta2=0.7, weight_decay=0.1, lr=3e-4)).optimizers
    for optimizer in optimizers.values():
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert [group["betas"] for group in optimizer.param_groups] == [(0.3, 0.7)] * 2
        assert [group["lr"] for group in optimizer.param_groups] == [3e-4] * 2
        assert decays == [0.1, 0.0]
        assert all(p.ndim > 1 for p in optimizer.param_groups[0]["params"])  # weights of maps and convolutions
        assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])
