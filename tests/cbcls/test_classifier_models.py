"""Every model has the published number of parameters, computes what its source says, and has the layer under test."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbcls.config import ClassifierConfig
from cbcls.models import build_classifier
from cbcls.networks.classifier import Classifier
from cbcls.networks.densenet import DenseNet
from cbcls.networks.oxford_cnn import OxfordCNN
from cbcls.networks.timm_classifier import TimmClassifier
from cbcls.networks.vit import ViT
from cbcls.task import ClassifierTask
from common.norms import BatchNorm, DomainBatchNorm, InstanceNorm, MixtureNorm, SCBNorm, SCBNormBase, UCBNorm
from common.norms.baselines import NoNorm
from common.norms.config import NormConfig
from common.runtime.cli import parse
from common.runtime.errors import UsageError

NONE = NormConfig(kind="none")
SMALL = "timm:test_resnet"
LAYERS = {"none": NoNorm, "bn": BatchNorm, "in": InstanceNorm, "dsbn": DomainBatchNorm, "mn": MixtureNorm,
          "scb": SCBNorm, "scb_base": SCBNormBase, "ucb": UCBNorm}  # fmt: skip


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def pixels(count: int = 4, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def built(*flags: str, classes: int = 5, num_clusters: int = 0) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(parse(ClassifierConfig, list(flags)).resolved(), classes, num_clusters)


def test_published_parameter_counts():
    for name, classes, parameters in (
        ("densenet-40-12", 10, 1_019_722),
        ("densenet-40-12", 100, 1_060_132),
        ("densenet-100-12", 10, 6_979_642),
        ("densenet-100-12", 100, 7_084_852),
        ("densenet-bc-40-12", 100, 188_092),
        ("densenet-bc-100-12", 10, 769_162),
        ("densenet-bc-100-12", 100, 800_032),
        ("vit", 100, 21_759_012),
        ("oxford_cnn", 37, 1_647_493),
    ):
        with torch.device("meta"):
            network = built("--model.name", name, "--norm.kind", "none", "--data.size", "256", classes=classes)
        assert count(network) == parameters
        if name == "vit":
            assert count(network.get_submodule("body")) == 681_920


def test_published_parameters_of_the_layer_under_test():
    for name, kind, clusters, parameters in (
        ("vit", "scb", 20, 120),
        ("vit", "scb_base", 20, 126),
        ("vit", "bn", 0, 6),
        ("densenet-10-4", "ucb", 5, 35),
        ("oxford_cnn", "scb", 2, 1_024),
        ("oxford_cnn", "scb_base", 2, 1_536),
        ("oxford_cnn", "bn", 0, 512),
    ):
        flags = ["--norm.update", "weight", "--norm.affine", "false"] if kind == "ucb" else []
        flags += ["--clusters.by", "superclasses", "--norm.num_components", str(clusters)] if clusters else []
        network = built("--model.name", name, "--data.size", "128", "--norm.kind", kind, *flags, num_clusters=clusters)
        assert count(network.get_submodule("norm")) == parameters


def norm(h: Tensor, layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    return F.batch_norm(h, layer.running_mean, layer.running_var, layer.weight, layer.bias)


@torch.no_grad()
def scattered(network: Classifier) -> Any:
    """Give what starts at 0 or 1 other values, so that nothing is multiplied or added in vain."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.Linear | nn.Conv2d):
            for tensor in (module.bias, getattr(module, "running_mean", None)):
                if tensor is not None:
                    tensor.normal_(0, 0.1, generator=generator)
    return network.eval()


@pytest.mark.parametrize("bottleneck", [False, True])
@torch.no_grad()
def test_densely_connected_networks_compute_what_the_paper_says(bottleneck):
    depth = 16 if bottleneck else 10
    network = scattered(DenseNet(depth, 4, 5, NONE, bottleneck=bottleneck))
    bn = iter([m for m in network.modules() if isinstance(m, BatchNorm)])
    maps = iter([m.weight for m in network.modules() if isinstance(m, nn.Conv2d)])
    x = pixels()

    def layer(h: Tensor) -> Tensor:
        weight = next(maps)
        return F.conv2d(F.relu(norm(h, next(bn))), weight, padding=weight.shape[-1] // 2)

    h = F.conv2d(x, next(maps), padding=1)
    assert h.shape[1] == (24 if bottleneck else 16)
    for block in range(3):
        if block:
            before = h.shape[1]
            h = F.avg_pool2d(layer(h), 2)
            assert h.shape[1] == (before // 2 if bottleneck else before)
        for _ in range(2):
            new = layer(h)
            if bottleneck:
                assert new.shape[1] == 16
                new = layer(new)
            assert new.shape[1] == 4
            h = torch.cat([h, new], 1)
    assert h.shape[2:] == (2, 2)
    want = F.relu(norm(h, next(bn))).mean((2, 3)) @ network.linear.weight.T + network.linear.bias
    torch.testing.assert_close(network(x), want)
    deviation = torch.cat([m.weight.flatten() * (9 * m.out_channels / 2) ** 0.5 for m in network.modules()
                           if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]).std()  # fmt: skip
    assert float(deviation) == pytest.approx(1, abs=0.08)


@torch.no_grad()
def test_the_transformer_computes_what_the_page_of_keras_says():
    network = scattered(ViT(7, NONE))
    x, body, tokens = pixels(2, 12), network.body, 144
    assert body.pos_embed is not None
    assert 0.045 < float(body.pos_embed.abs().max()) <= 0.05
    grid = F.interpolate(x, (72, 72), mode="bilinear").unfold(2, 6, 6).unfold(3, 6, 6)  # (N, 3, 12, 12, 6, 6)
    patches = grid.permute(0, 2, 3, 1, 4, 5).reshape(2, tokens, 108)
    embed = body.patch_embed.proj
    assert isinstance(embed, nn.Conv2d)
    h = F.linear(patches, embed.weight.flatten(1), embed.bias) + body.pos_embed

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def standardised(h: Tensor, layer: nn.Module) -> Tensor:
        z = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return z * layer.get_parameter("weight") + layer.get_parameter("bias")

    assert len(body.blocks) == 8
    for block in body.blocks:
        get = block.get_submodule
        q, k, v = (t.view(2, tokens, 4, 64) for t in get("attn.qkv")(standardised(h, get("norm1"))).chunk(3, -1))
        weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) / 64**0.5).softmax(-1)
        h = h + get("attn.proj")(torch.einsum("nhqk,nkhd->nqhd", weights, v).reshape(2, tokens, 256))
        h = h + gelu(get("mlp.fc2")(gelu(get("mlp.fc1")(standardised(h, get("norm2"))))))
    h = standardised(h, body.norm).flatten(1)
    for number in (2, 5):
        h = gelu(network.head[number](h))
    torch.testing.assert_close(network(x), network.linear(h), rtol=1e-4, atol=1e-4)
    attention = body.blocks[0].get_submodule("attn")
    maps = (*attention.get_parameter("qkv.weight").chunk(3), attention.get_parameter("proj.weight"), embed.weight)
    kernels = [(64, 4, 64)] * 3 + [(4, 64, 64), (108, 64)]
    assert [float(each.abs().max()) for each in maps] == pytest.approx([glorots_bound(*k) for k in kernels], rel=0.02)
    rates = [m.p for m in network.modules() if isinstance(m, nn.Dropout) and m.p]
    assert sorted(rates) == [0.1] * 24 + [0.5] * 3  # attention, and after both maps
    assert {block.get_submodule("attn").attn_drop.p for block in body.blocks} == {0.1}


def glorots_bound(*kernel: int) -> float:
    """The bound of Glorot's uniform weights with the fans that Keras' `compute_fans` takes of a kernel's shape."""
    positions = math.prod(kernel[:-2])
    return math.sqrt(6 / (kernel[-2] * positions + kernel[-1] * positions))


@torch.no_grad()
def test_oxford_cnn_computes_what_its_page_says():
    network, x = scattered(OxfordCNN(37, NONE, size=128)), pixels(2, 128)
    convolutions = iter([m for m in network.modules() if isinstance(m, nn.Conv2d)])
    bn = [m for m in network.modules() if isinstance(m, BatchNorm)]
    h, shapes = x, []
    for number in range(7):
        for slope in (1.0, 0.5):
            conv = next(convolutions)
            before, after = {5: (2, 2), 4: (1, 2), 3: (1, 1), 2: (0, 1)}[conv.kernel_size[0]]
            padded = F.pad(h, (before, after, before, after))
            h = F.leaky_relu(F.conv2d(padded, conv.weight, conv.bias), slope)
        h = F.max_pool2d(h, 2)
        h = norm(h, bn[0]) if number == 2 else h
        shapes.append((*h.shape[1:], conv.kernel_size[0]))
    assert shapes == [(32, 64, 64, 5), (32, 32, 32, 4), (64, 16, 16, 4), (64, 8, 8, 3), (128, 4, 4, 3), (128, 2, 2, 2),
                      (256, 1, 1, 2)]  # fmt: skip
    h = norm(h.flatten(1), bn[1])
    for number in (3, 6):
        h = torch.sigmoid(network.dense[number](h))
    torch.testing.assert_close(network(x), network.linear(h))
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.2, 0.1]
    largest = [float(network.get_parameter(f"{name}.weight").abs().max()) for name in ("blocks.1.conv1", "dense.6")]
    assert largest == pytest.approx([(6 / (16 * 64)) ** 0.5, (6 / 768) ** 0.5], rel=0.02)  # Glorot's bounds


def test_models_take_every_kind_of_layer():
    """The smallest model all of them; the others one that takes clusters and one that does not."""
    others = ("shallow_cnn", "oxford_cnn", "vit", SMALL)
    seen: list[tuple[int, ...]] = []
    for name, kind in [("densenet-10-4", kind) for kind in LAYERS] + [(n, k) for n in others for k in ("scb", "ucb")]:
        size = 128 if name == "oxford_cnn" else 32
        flags = ["--model.name", name, "--data.size", str(size), "--norm.kind", kind, "--clusters.by", "classes"]
        network = built(*flags, classes=5, num_clusters=3)
        place = network.get_submodule("norm3" if name == "shallow_cnn" else "norm")
        assert isinstance(place, LAYERS[kind])
        seen.clear()
        place.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[1:])))
        x, cluster = pixels(6, size), torch.tensor([0, 0, 1, 1, 2, 2])
        logits = network(x, cluster)
        assert logits.shape == (6, 5)
        assert logits.isfinite().all()
        assert seen == [{"shallow_cnn": (128, 8, 8), "oxford_cnn": (256,)}.get(name, (3, size, size))]
        logits.sum().backward()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
        assert network.eval().features(network.pixels(x), cluster).shape == (6, network.linear.in_features)


def test_chosen_batch_norms_of_timms_networks_become_the_layer():
    names = ["layer2.0.bn1", "layer4.0.bn1"]
    for kind, wanted in (("scb", SCBNorm), ("ucb", UCBNorm), ("bn", nn.BatchNorm2d)):
        flags = ["--model.name", SMALL, "--norm.kind", kind, "--clusters.by", "classes"]
        network = built(*flags, "--model.convert", *names, num_clusters=3)
        assert isinstance(network, TimmClassifier)
        assert all(isinstance(network.network.get_submodule(name), wanted) for name in names)
        assert isinstance(network.network.get_submodule("layer1.0.bn1"), nn.BatchNorm2d)
        assert isinstance(network.norm, nn.Identity)
        assert network(pixels(6, 32), torch.tensor([0, 0, 1, 1, 2, 2])).shape == (6, 5)
    every = built("--model.name", SMALL, "--norm.kind", "ucb", "--model.convert", "all")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in every.modules())


def test_converted_layers_take_over_what_nobody_asked_for():
    flags = ["--model.name", SMALL, "--model.convert", "bn1"]
    for kind in ("scb", "ucb"):
        own = [*flags, "--norm.kind", kind, "--clusters.by", "classes"]
        layer: Any = built(*own, num_clusters=3).get_submodule("network.bn1")
        assert layer.weight is not None
        assert layer.eps == 1e-5
        assert built(*own, "--norm.eps", "0.01", num_clusters=3).get_submodule("network.bn1").eps == 0.01
    with pytest.raises(UsageError, match=r"^norm.affine: expected True, since bn1 has a weight and bias"):
        built(*flags, "--norm.kind", "ucb", "--norm.affine", "false")


def test_biases_start_at_zero():
    for network, count, drawn in ((DenseNet(10, 4, 5, NONE), 1, 0), (OxfordCNN(5, NONE, size=128), 17, 1)):
        biases = [m.bias for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None]
        assert len(biases) == count
        assert not any(bias.any() for bias in biases[: count - drawn])  # but those of the last map, which torch draws


def test_timms_networks_are_given_clusters_where_they_end_and_keep_their_last_map_otherwise():
    flags = ["--model.name", SMALL, "--norm.kind", "none"]
    plain, x = built(*flags), pixels(2, 32)
    torch.manual_seed(0)
    import timm  # noqa: PLC0415

    torch.testing.assert_close(plain.eval()(x), timm.create_model("test_resnet", num_classes=5).eval()(x))
    onehot = built(*flags, "--model.onehot_cluster", "--clusters.by", "classes", num_clusters=4)
    assert onehot.linear.in_features == plain.linear.in_features + 4
    assert onehot(x, torch.tensor([3, 0])).shape == (2, 5)


def test_dropout_is_as_asked_for():
    for name in ("densenet-10-4", "densenet-bc-16-4"):  # the original drops after each convolution but the first
        network = built("--model.name", name, "--model.dropout", "0.3", "--norm.kind", "none")
        steps = [m for m in network.get_submodule("body").modules() if isinstance(m, nn.Conv2d | nn.Dropout)]
        assert [type(m) for m in steps] == [nn.Conv2d, nn.Dropout] * (len(steps) // 2)
        assert {m.p for m in steps if isinstance(m, nn.Dropout)} == {0.3}


def test_runs_are_named_by_their_network():
    for flags, name in (
        ((), "digits-ucb-seed0"),
        (("--model.name", "densenet-bc-16-4", "--norm.kind", "bn", "--seed", "3"), "digits-densenet-bc-16-4-bn-seed3"),
        (("--model.name", SMALL, "--norm.kind", "none"), "digits-timm-test_resnet-none-seed0"),
        (("--model.name", "timm:hf_hub:some/net", "--norm.kind", "none"), "digits-timm-hf_hub-some-net-none-seed0"),
    ):
        cfg = parse(ClassifierConfig, list(flags))
        assert ClassifierTask.default_name(cfg) == name


def test_a_network_of_timm_that_does_not_end_in_a_linear_map_is_refused():
    class Odd(nn.Module):
        def get_classifier(self) -> nn.Module:
            return nn.Conv2d(3, 5, 1)

    with pytest.raises(ValueError, match=r"^name: expected a network that ends in a linear map, got Conv2d"):
        TimmClassifier(Odd(), NONE)


def test_a_network_of_timm_whose_features_are_not_what_its_last_map_takes_is_refused():
    network = built("--model.name", SMALL, "--norm.kind", "none")
    assert isinstance(network, TimmClassifier)
    network.train().check_size(32)
    assert network.network.training  # as it was
    network.linear = nn.Linear(7, 5)
    with pytest.raises(ValueError, match=r"^it makes \(1, \d+\) of one image, its last map takes 7"):
        network.check_size(32)
