"""Conversion of models that have BatchNorm, and its reversal."""

import contextlib
import copy
import io
from typing import Any

import pytest
import timm
import torch
from convert_cases import EXACT, IDS, close, images, lived, routed, small
from norm_cases import mixture_case
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torchvision.models import resnet18

from common.norms import DomainBatchNorm, SCBNorm, UCBNorm, clusters, convert_norms, converted, make_norm, revert_norms


@pytest.mark.parametrize(("kind", "num", "type_"), EXACT)
def test_evaluation_is_batch_norms(kind, num, type_):
    model = small().eval()
    x = images()
    want = model(x)
    assert convert_norms(model, kind, num_components=num) is model
    assert converted(model) == ["1", "3.1", "6"]
    for layer in (model[1], model[3][1], model[6]):
        assert isinstance(layer, type_)
    with routed(kind):
        close(model(x), want)
    if kind in ("scb", "scb_base"):  # alike as they are, unknown clusters change nothing
        close(model(x), want)


@pytest.mark.parametrize("kind", ["scb", "scb_base"])
def test_instance_statistics_take_the_place_of_batch_norms(kind):
    model = small().eval()
    twin, x = copy.deepcopy(model), images()
    for place, key in ((twin, 1), (twin[3], 1)):
        norm = place[key]
        place[key] = nn.InstanceNorm2d(norm.num_features, norm.eps, affine=True)
        place[key].load_state_dict({name: getattr(norm, name) for name in ("weight", "bias")})
    convert_norms(model, kind, where=[0, 1], statistics="instance")
    for training in (False, True):
        model.train(training)
        twin.train(training)
        with routed(kind):
            close(model(x), twin(x))


@pytest.mark.parametrize(("kind", "num"), [("ucb", 2), ("mn", 3)])
def test_a_mixture_starts_with_batch_norms_total_moments(kind, num):
    model = small()
    norm = model[1]
    convert_norms(model, kind, 0, num, groups=1)
    layer = model[1]
    weight = layer.logits.double().softmax(0)[:, None]
    mean, var = layer.mean.double(), layer.log_var.double().exp()
    total = (weight * mean).sum(0)
    torch.testing.assert_close(total.float(), norm.running_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close((weight * (var + (mean - total) ** 2)).sum(0).float(), norm.running_var)
    steps = mean.diff(dim=0)
    assert (steps > 0).all()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-5, atol=1e-6)
    assert layer.eps == 1e-3
    assert layer.momentum == 0.2
    if kind == "mn":  # EM starts there too
        assert torch.equal(layer.fit_mean, layer.mean)
        assert torch.equal(layer.fit_log_var, layer.log_var)
    assert layer.is_initialized()


def test_one_component_goes_on_training_as_batch_norm():
    model = small().train()
    twin = copy.deepcopy(model)
    convert_norms(model, "ucb", num_components=1)
    x = images()
    for seed in range(3):
        close(model(images(seed)), twin(images(seed)))
    for layer, norm in ((model[1], twin[1]), (model[6], twin[6])):
        torch.testing.assert_close(layer.mean[0], norm.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.log_var[0].exp(), norm.running_var, rtol=1e-5, atol=1e-6)
    close(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("kind", ["mn", "dsbn"])
def test_revert_puts_the_originals_back(kind):
    model = small().train()
    originals = [model[1], model[3][1], model[6]]
    before = copy.deepcopy(model.state_dict())
    assert converted(model) == []
    convert_norms(model, kind)
    assert converted(model) == ["1", "3.1", "6"]
    assert not any("running" in key or "converted" in key for key in model.state_dict() if kind != "dsbn")
    with routed(kind):
        model(images()).square().sum().backward()
    model.eval()
    assert revert_norms(model) is model
    assert converted(model) == []
    assert all(a is b for a, b in zip([model[1], model[3][1], model[6]], originals, strict=True))
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="model: expected at least one converted layer"):
        revert_norms(model)
    convert_norms(model, kind)  # and it can begin again


def test_revert_follows_a_model_that_has_moved():
    model = small()
    convert_norms(model, "ucb")
    model.double()
    revert_norms(model)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64, torch.int64}
    model(images().double())


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("save", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_reverts_too(save):
    model = small().eval()
    x = images()
    want = model(x)
    convert_norms(model, "scb")
    twin = save(model)
    assert torch.equal(twin(x), model(x))
    revert_norms(twin)
    assert torch.equal(twin(x), want)
    assert isinstance(model[1], SCBNorm)


def test_where():
    for where, names in (
        (None, ["1", "3.1", "6"]),
        ("3.1", ["3.1"]),
        (2, ["6"]),
        (-3, ["1"]),
        (["6", 0], ["1", "6"]),
        (["6", 0, 2], ["1", "6"]),
        (nn.BatchNorm2d, ["1", "3.1"]),
        ([nn.BatchNorm1d, "3.1"], ["3.1", "6"]),
        (lambda name, module: isinstance(module, nn.BatchNorm2d), ["1", "3.1"]),
        (lambda name, module: name.startswith("3"), ["3.1"]),
    ):
        model = small()
        convert_norms(model, "ucb", where=where)
        assert converted(model) == names
        found = {name for name, module in model.named_modules() if isinstance(module, UCBNorm)}
        assert found == set(names)


@pytest.mark.parametrize("kind", ["ucb", "scb"])
def test_a_constant_channel_of_the_packages_own_batch_norm_converts(kind):
    model = nn.Sequential(make_norm("bn", 4, 1)).eval()
    model[0].get_buffer("running_var")[1] = 0
    x = mixture_case((6, 4, 5), num=1, dtype=torch.float32)[0]
    want = model(x)
    assert converted(convert_norms(model, kind, num_components=1)) == ["0"]
    with routed(kind, torch.zeros(6, dtype=torch.int64)):
        close(model(x), want)
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_a_converted_layer_is_not_seeded_unless_told_to():
    for kind in ("mn", "ucb"):
        seeded, unseeded = small(), small()
        convert_norms(seeded, kind)
        convert_norms(unseeded, kind, init="kmeans++")
        assert seeded[1].is_initialized()
        assert not unseeded[1].is_initialized()


def test_a_domain_layer_of_the_models_own_is_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(4), DomainBatchNorm(4, 2))
    assert converted(convert_norms(model, "ucb")) == ["0"]
    with pytest.raises(ValueError, match="model: expected at least one BatchNorm layer inside"):
        convert_norms(model[1:], "ucb")


def test_an_index_stays_what_it_was():
    model = small()
    assert converted(convert_norms(model, "ucb", 0)) == ["1"]
    assert converted(convert_norms(model, "dsbn", 1, momentum=None)) == ["1", "3.1"]
    assert converted(convert_norms(model, "scb", nn.BatchNorm1d)) == ["1", "3.1", "6"]
    for layer, kind in ((model[1], UCBNorm), (model[3][1], DomainBatchNorm), (model[6], SCBNorm)):
        assert isinstance(layer, kind)


class Custom(nn.BatchNorm2d):
    pass


class Wrapped(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(4)
        self.norm = norm


def own_forward() -> nn.Module:
    norm: Any = nn.BatchNorm2d(4)
    norm.forward = lambda x: x
    return norm


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.BatchNorm2d(4), "weight", amount=1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (nn.LazyBatchNorm2d, r"where: norm \(LazyBatchNorm2d\) does more than torch's"),
        (lambda: Custom(4), r"where: norm \(Custom\) does more than torch's"),
        (pruned, "has parameters or buffers of its own"),
        (own_forward, "has a forward of its own"),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), "keeps no running statistics"),
        (lambda: nn.BatchNorm2d(4, momentum=None), "momentum: expected a number, since norm averages over all"),
    ],
    ids=["lazy", "custom", "pruned", "forward", "statistics", "momentum"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_layer_whose_behaviour_would_be_lost_is_refused(make, match):
    model = Wrapped(make())
    first = model.first
    with pytest.raises(ValueError, match=match):
        convert_norms(model, "ucb")
    assert model.first is first  # nothing was converted
    assert converted(convert_norms(model, "ucb", "first")) == ["first"]


def test_wrong_conversions_are_named():
    for act, match in (
        (lambda m: convert_norms(m, "bn"), "kind: expected one of 'mn', 'ucb', 'scb', 'scb_base', 'dsbn', got 'bn'"),
        (
            lambda m: convert_norms(m, "ucb", "conv1"),
            r"where: expected the name of a BatchNorm, LayerNorm or InstanceNorm \(1, 3.1, 6\), got 'conv1'",
        ),
        (lambda m: convert_norms(m, "ucb", "0"), "where: expected the name of a BatchNorm, LayerNorm or"),
        (lambda m: convert_norms(m, "ucb", 3), "where: expected an index below the 3 BatchNorm layers, got 3"),
        (lambda m: convert_norms(m, "ucb", -4), "where: expected an index below the 3 BatchNorm layers, got -4"),
        (lambda m: convert_norms(m, "ucb", lambda *_: False), "where: expected to match at least one of 3"),
        (lambda m: convert_norms(m, "ucb", []), "where: expected to match at least one of 3"),
        (lambda m: convert_norms(m, "ucb", nn.Conv2d), "where: expected to match at least one of 3 BatchNorm layers"),
        (lambda m: convert_norms(m[0], "ucb"), "model: expected at least one BatchNorm layer inside"),
        (
            lambda _: convert_norms(DistributedDataParallel.__new__(DistributedDataParallel), "ucb"),
            "model: expected one not yet wrapped, got DistributedDataParallel; convert, then wrap",
        ),
        (revert_norms, "model: expected at least one converted layer"),
        (lambda m: convert_norms(m, "ucb", colour=3), "colour: 3 is no option of kind 'ucb'"),
        (lambda m: convert_norms(m, "dsbn", groups=1), "groups: 1 is no option of kind 'dsbn'"),
        (lambda m: convert_norms(m, "ucb", num_components=0), "num_components: expected at least 1, got 0"),
        (lambda m: convert_norms(m, "ucb", affine=False), "affine: expected True, since 1 has a weight"),
    ):
        with pytest.raises(ValueError, match=match):
            act(small())


def test_a_where_of_another_kind_is_one_sentence():
    for where, match in (
        (1.5, "expected a name, an index, a type, several of these or a predicate, got 1.5"),
        (True, "expected a name, .* got True"),
        (b"ab", "expected a name, .* got b'ab'"),
        (int, "expected a name, .* got <class 'int'>"),
        (nn.BatchNorm2d(4), "expected a name, .* got a BatchNorm2d"),
        (["1", nn.BatchNorm1d(6)], "expected a name, .* got a BatchNorm1d"),
        (torch.ones(3), "expected a name, .* got a Tensor"),
        (lambda name: True, r"expected a predicate of \(name, module\), got one of \(name\)"),
    ):
        with pytest.raises(ValueError, match=f"where: {match}$"):
            convert_norms(small(), "ucb", where)  # pyright: ignore[reportArgumentType]


def test_a_layer_itself_is_converted_and_returned():
    for where in (None, 0, nn.BatchNorm2d, lambda name, _: name == ""):
        norm = nn.BatchNorm2d(3)
        lived(norm).eval()
        x = images()
        want = norm(x)
        layer = convert_norms(norm, "ucb", where, num_components=1)
        assert isinstance(layer, UCBNorm)
        assert converted(layer) == [""]
        close(layer(x), want)
        with pytest.raises(ValueError, match=r"where: the model \(UCBNorm\) is converted already"):
            convert_norms(layer, "ucb")
        assert revert_norms(layer) is norm
        assert converted(norm) == []


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.BatchNorm2d(3)
        self.b = nn.Sequential(self.a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) * 2 + 1)


def test_a_shared_layer_stays_shared():
    for where in (None, "a", "b.0", 0):
        model = Shared()
        norm = model.a
        assert converted(convert_norms(model, "ucb", where)) == ["a"]
        assert isinstance(model.a, UCBNorm)
        assert model.b[0] is model.a
        revert_norms(model)
        assert model.a is norm is model.b[0]


@pytest.mark.parametrize("kind", ["ucb", "dsbn"])
def test_dtype_mode_and_frozen_parameters_are_kept(kind):
    model = small().to(torch.bfloat16)
    model[1].eval()
    model[1].weight.requires_grad_(False)
    convert_norms(model, kind)
    assert not model[1].training
    assert model[6].training
    state = model.state_dict().items()
    floats = [t for name, t in state if t.is_floating_point() and not name.endswith("initialized")]
    assert {t.dtype for t in floats} == {torch.bfloat16}
    affine = model[1].domains[0] if kind == "dsbn" else model[1]
    assert not affine.weight.requires_grad
    assert affine.bias.requires_grad
    model.eval()
    with routed(kind):
        assert model(images().bfloat16()).isfinite().all()


def test_data_taken_starts_are_kept():
    model = small()
    convert_norms(model, "scb", init="data")
    x = images()
    with clusters(IDS):
        model(x)
    inner = model[0](x)
    torch.testing.assert_close(model[1].mean[0], inner[IDS == 0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ucb", "scb"])
def test_hooks_are_kept_and_their_handles_remove_them(kind):
    model, calls = small(), []
    norm = model[1]
    handles = [
        norm.register_forward_pre_hook(lambda module, args: calls.append("pre")),
        norm.register_forward_hook(lambda module, args, kwargs, y: calls.append("post"), with_kwargs=True),
        norm.register_full_backward_pre_hook(lambda module, g: calls.append("backward pre")),
        norm.register_full_backward_hook(lambda module, gx, gy: calls.append("backward")),
        norm.register_state_dict_pre_hook(lambda *args: calls.append("state pre")),
        norm.register_load_state_dict_post_hook(lambda *args: calls.append("loaded")),
    ]

    def run() -> list[str]:
        calls.clear()
        with routed(kind) if norm is not model[1] else contextlib.nullcontext():
            model(images()).square().sum().backward()
        model.load_state_dict(model.state_dict())
        return list(calls)

    want = ["pre", "post", "backward pre", "backward", "state pre", "loaded"]
    assert run() == want
    convert_norms(model, kind)
    assert run() == want
    handles.pop(3).remove()
    want.remove("backward")
    assert run() == want
    handles.append(model[1].register_forward_hook(lambda module, args, y: calls.append("later")))
    revert_norms(model)
    assert run() == [*want[:2], "later", *want[2:]]
    for handle in handles:
        handle.remove()
    assert run() == []


def test_a_first_backward_hook_registered_after_conversion_outlives_it():
    model, calls = small(), []
    convert_norms(model, "ucb")
    model[1].register_full_backward_hook(lambda module, gx, gy: calls.append(type(module)))
    model(images()).square().sum().backward()
    revert_norms(model)
    model(images()).square().sum().backward()
    assert calls == [UCBNorm, nn.BatchNorm2d]


@pytest.mark.parametrize(("kind", "name"), [("mn", "torchvision"), ("scb", "timm"), ("dsbn", "timm")])
def test_published_backbones(kind, name):
    torch.manual_seed(0)
    model = resnet18(weights=None) if name == "torchvision" else timm.create_model("resnet10t", pretrained=False)
    model = lived(model, 32).eval()
    x = images(size=32)
    want, norms = model(x), sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    before = copy.deepcopy(model.state_dict())
    options = {"statistics": "batch"} if kind in ("scb", "scb_base") else {}
    convert_norms(model, kind, num_components=1 if kind in ("mn", "ucb") else 3, **options)
    assert len(converted(model)) == norms > 10
    with routed(kind):
        close(model(x), want, depth=20)
        model.train()
        model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    revert_norms(model)
    assert torch.equal(model.eval()(x), want)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["ucb", "scb"])
def test_every_rank_of_batch_norm_converts(kind):
    for norm, shape in (
        (nn.BatchNorm1d, (6, 4)),
        (nn.BatchNorm1d, (6, 4, 5)),
        (nn.BatchNorm2d, (6, 4, 2, 3)),
        (nn.BatchNorm3d, (6, 4, 2, 1, 3)),
    ):
        model = nn.Sequential(norm(4))
        x = mixture_case(shape, num=1, dtype=torch.float32)[0]
        model(x)
        want = model.eval()(x)
        convert_norms(model, kind, num_components=1)
        with routed(kind, torch.zeros(6, dtype=torch.int64)):
            close(model(x), want)
