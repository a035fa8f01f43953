import warnings

import pytest
import torch

from cbda.networks.classifier import SOURCE, TARGET, UNKNOWN, Classifier, own_parameters
from cbda.networks.wide_resnet import WideResNet
from common.metrics.logits import evaluating
from common.norms import BatchNorm, DomainBatchNorm, InstanceNorm, MixtureNorm, SCBNorm, SCBNormBase, UCBNorm
from common.norms.config import NormConfig

LAYERS = {
    "bn": BatchNorm, "in": InstanceNorm, "dsbn": DomainBatchNorm, "scb": SCBNorm, "scb_base": SCBNormBase,
    "ucb": UCBNorm, "mn": MixtureNorm,
}  # fmt: skip
CLUSTER = torch.tensor([SOURCE] * 4 + [TARGET] * 4)


def classifier(kind: str, convert=()) -> Classifier:
    torch.manual_seed(0)
    return Classifier(WideResNet(10, 1, 5), NormConfig(kind=kind, num_components=2), convert)


def images(seed: int = 1) -> torch.Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_layer_under_test_is_the_first():
    x, seen = images(), []
    for kind, layer in LAYERS.items():
        network = classifier(kind)
        assert isinstance(network.norm, layer)
        network.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        assert network(x, CLUSTER).shape == (8, 5)
        fresh = classifier(kind).norm
        torch.testing.assert_close(seen[-1], fresh(x, CLUSTER) if kind in ("scb", "scb_base", "dsbn") else fresh(x))


def test_layers_deep_inside_are_converted_and_told_the_clusters():
    for kind in ("scb", "dsbn", "ucb"):
        names = ["groups.0.0.norm1", "norm"]
        network = classifier(kind, names)
        kinds = {name: isinstance(network.network.get_submodule(name), LAYERS[kind]) for name in names}
        assert kinds == dict.fromkeys(names, True)
        assert isinstance(network.network.get_submodule("groups.0.0.norm2"), BatchNorm)
        assert network(images(), CLUSTER).shape == (8, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing holds the scale of activations with scb at every layer
            every = classifier(kind, ["all"])
        assert sum(isinstance(m, LAYERS[kind]) for m in every.modules()) == 7
        assert sum(isinstance(m, BatchNorm) for m in every.modules()) == (14 if kind == "dsbn" else 0)


def test_own_weights_are_those_of_the_layer_under_test_wherever_it_is():
    for kind, convert, places in (
        ("scb", (), ["norm"]),
        ("bn", (), ["norm"]),
        ("scb", ["groups.0.0.norm1", "norm"], ["network.groups.0.0.norm1", "network.norm"]),
    ):
        network = classifier(kind, convert)
        want = {id(p) for place in places for p in network.get_submodule(place).parameters()}
        assert {id(p) for p in own_parameters(network)} == want != set()
    assert own_parameters(classifier("none")) == []


def test_clusters_change_what_an_scb_layer_does_and_unknown_is_evaluated():
    network = classifier("scb")
    assert isinstance(network.norm, SCBNorm)
    with torch.no_grad():
        network.norm.mean[TARGET] += 3.0
    x = images()[:4]
    with evaluating(network):
        as_source, as_target, unknown = (network(x, torch.full((4,), k)) for k in (SOURCE, TARGET, UNKNOWN))
    assert not torch.allclose(as_source, as_target)
    assert unknown.isfinite().all()
    assert network.training
    assert as_source.grad_fn is None


def test_the_pass_alone_sees_the_first_images_only_and_leaves_no_trace():
    for kind in ("none", *LAYERS):
        x = images()
        network = classifier(kind)
        network(images(2), CLUSTER)  # so that nothing starts from the batches below
        before = {name: value.clone() for name, value in network.state_dict().items()}
        together, alone = network(x, CLUSTER, alone=4)
        after = {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(before)
        torch.testing.assert_close(together, network(x, CLUSTER), rtol=0, atol=0)
        torch.testing.assert_close(dict(network.state_dict()), after, rtol=0, atol=0)  # the joint pass's trace alone
        by_itself = network(x[:4], CLUSTER[:4])
        if kind not in ("ucb",):  # whose posterior is that of the stored mixture, here after the joint pass
            torch.testing.assert_close(alone, by_itself, rtol=0, atol=1e-6)
        assert not torch.allclose(alone, together[:4])  # BatchNorm's statistics are others


def test_in_inference_mode_the_second_pass_uses_what_the_joint_one_left():
    for kind in ("bn", "scb", "ucb", "dsbn"):
        x, network, other = images(), classifier(kind), classifier(kind)
        together, alone = network(x, CLUSTER, alone=4, inference=True)
        torch.testing.assert_close(together, other(x, CLUSTER), rtol=0, atol=0)
        torch.testing.assert_close(dict(network.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
        assert all(module.training for module in network.modules())
        torch.testing.assert_close(alone, other.eval()(x[:4], CLUSTER[:4]), rtol=0, atol=0)
        in_training = classifier(kind)(x, CLUSTER, alone=4)[1]
        assert not torch.allclose(alone, in_training)
        weight = network.network.get_parameter("stem.weight")
        assert torch.autograd.grad(alone.square().sum(), weight)[0].any()


def test_gradients_flow_through_both_passes():
    network, x = classifier("scb"), images()
    together, alone = network(x, CLUSTER, alone=4)
    weight = network.network.get_parameter("stem.weight")
    both, joint = (
        torch.autograd.grad(value, weight, retain_graph=True)[0]
        for value in (together.square().sum() + alone.square().sum(), together.square().sum())
    )
    again = torch.autograd.grad(network(x[:4], CLUSTER[:4]).square().sum(), weight)[0]
    torch.testing.assert_close(both - joint, again, rtol=1e-4, atol=1e-4)


def test_a_third_domain_is_refused_whatever_the_layer():
    for kind, wrong in (("none", 2), ("scb", 2), ("scb", -2)):
        network = classifier(kind).eval()
        with pytest.raises(
            ValueError, match=rf"^cluster: expected 0 for the source, 1 for the .* -1 for unknown, got {wrong}$"
        ):
            network(images(), torch.tensor([SOURCE] * 4 + [TARGET] * 3 + [wrong]))
        assert network(images(), torch.tensor([SOURCE] * 4 + [TARGET] * 4)).shape == (8, 5)
