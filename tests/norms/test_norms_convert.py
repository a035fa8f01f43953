"""Conversion of models that have BatchNorm, its reversal, and state dicts that become those of other layers."""

import contextlib
import copy
import io
from typing import Any

import pytest
import timm
import torch
from convert_cases import EXACT, IDS, close, images, lived, routed, small
from norm_cases import CLUSTERED, assert_state, batch, in_full, state
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torchvision.models import resnet18

from common.norms import (
    DomainBatchNorm,
    SCBNorm,
    SCBNormBase,
    UCBNorm,
    clusters,
    convert_norms,
    converted,
    make_norm,
    revert_norms,
    scb_state_from_base,
    ucb_state_from_batch_norm,
)


@pytest.mark.parametrize(("kind", "num", "type_"), EXACT)
def test_evaluation_is_batch_norms_and_revert_puts_the_originals_back(kind, num, type_):
    model, x = small().eval(), images()
    want, originals, before = model(x), [model[1], model[3][1], model[6]], state(model)
    assert converted(model) == []
    assert convert_norms(model, kind, num_components=num) is model
    assert converted(model) == ["1", "3.1", "6"]
    assert all(isinstance(layer, type_) for layer in (model[1], model[3][1], model[6]))
    assert not any("running" in key or "converted" in key for key in model.state_dict() if kind != "dsbn")
    with routed(kind):
        close(model(x), want)
        model.train()(x).square().sum().backward()
    if kind in ("scb", "scb_base"):  # alike as they are, unknown clusters change nothing
        close(model.eval()(x), want)
    model.eval()
    assert revert_norms(model) is model
    assert converted(model) == []
    assert all(a is b for a, b in zip([model[1], model[3][1], model[6]], originals, strict=True))
    assert list(model.state_dict()) == list(before)
    assert_state(model, before)
    assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="model: expected at least one converted layer"):
        revert_norms(model)
    convert_norms(model, kind)  # and it can begin again


def test_instance_statistics_take_the_place_of_batch_norms():
    model = small().eval()
    twin, x = copy.deepcopy(model), images()
    for place, key in ((twin, 1), (twin[3], 1)):
        norm = place[key]
        place[key] = nn.InstanceNorm2d(norm.num_features, norm.eps, affine=True)
        place[key].load_state_dict({name: getattr(norm, name) for name in ("weight", "bias")})
    convert_norms(model, "scb", where=[0, 1], statistics="instance")
    for training in (False, True):
        with clusters(IDS):
            close(model.train(training)(x), twin.train(training)(x))


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
    assert (layer.eps, layer.momentum) == (1e-3, 0.2)
    if kind == "mn":  # EM starts there too
        assert torch.equal(layer.fit_mean, layer.mean)
        assert torch.equal(layer.fit_log_var, layer.log_var)
    assert layer.is_initialized()
    assert not convert_norms(small(), kind, init="kmeans++")[1].is_initialized()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"scale": "sqrt_k", "num_components": 5}, {"groups": 2}], ids=str)
def test_a_mixture_starts_with_batch_norms_slope_on_gaussian_activations(options):
    """Of 1.35 deviations; where no channels share a posterior it departs from BatchNorm by 1.2 % of its deviation at 1.

    A slope of 40,000 draws has noise of about 0.012 / 200; that of a group holds for channels that are independent.
    """
    model = lived(nn.Sequential(nn.BatchNorm2d(4)), channels=4).eval()
    norm = model[0]
    nn.init.zeros_(norm.bias)
    x = torch.randn(40_000, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    mean, deviation = (t[:, None, None] for t in (norm.running_mean, norm.running_var.sqrt()))
    layer = convert_norms(model, "ucb", backend="eager", **options)[0]
    for width in (1.35, 1.0):
        given = mean + width * deviation * x
        want, found = norm(given), layer(given)
        slope = (found * want).sum((0, 2, 3)) / want.square().sum((0, 2, 3))
        if width > 1:
            torch.testing.assert_close(slope, torch.ones(4), rtol=0, atol=2e-3)
        elif not options:
            off = (found - slope[:, None, None] * want).std((0, 2, 3)) / want.std((0, 2, 3))
            assert float(off.max()) < 0.015
    assert not convert_norms(nn.Sequential(nn.BatchNorm2d(4, affine=False)), "ucb")[0].weight.requires_grad


def test_one_component_goes_on_training_as_batch_norm():
    """Converted, and from a state dict that was converted."""
    twin, x = small(), images()
    model, loaded = copy.deepcopy(twin), copy.deepcopy(twin)
    convert_norms(model, "ucb", num_components=1)
    for place, i, norm in ((loaded, 1, twin[1]), (loaded[3], 1, twin[3][1]), (loaded, 6, twin[6])):
        place[i] = UCBNorm(norm.num_features, 1, eps=norm.eps, momentum=norm.momentum)
    turned = ucb_state_from_batch_norm(twin.state_dict())
    assert {name: t.dtype for name, t in turned.items()} == {name: t.dtype for name, t in loaded.state_dict().items()}
    loaded.load_state_dict(turned)
    for seed in range(3):
        for net in (model, loaded):
            close(net.train()(images(seed)), (twin if net is loaded else copy.deepcopy(twin)).train()(images(seed)))
    for layer, norm in ((model[1], twin[1]), (loaded[6], twin[6])):
        torch.testing.assert_close(layer.mean[0], norm.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.log_var[0].exp(), norm.running_var, rtol=1e-5, atol=1e-6)
    for net in (model, loaded):
        close(net.eval()(x), twin.eval()(x))
    with pytest.raises(ValueError, match="state: expected the state of at least one BatchNorm, found none"):
        ucb_state_from_batch_norm(loaded.state_dict())


def test_state_of_a_base_layer_becomes_scbs_exactly():
    base = nn.Sequential(nn.Conv2d(3, 4, 1), SCBNormBase(4, 3, affine=True)).eval()
    scb = nn.Sequential(nn.Conv2d(3, 4, 1), SCBNorm(4, 3, affine=True)).eval()
    for p in base.parameters():
        nn.init.normal_(p)
    scb.load_state_dict(scb_state_from_base(base.state_dict()))
    x = images()
    for ids in (IDS, torch.tensor([-1, 0, 1, -1, 2, 2])):
        assert torch.equal(scb[1](scb[0](x), ids), base[1](base[0](x), ids))
    SCBNorm(4, 3, affine=True).load_state_dict(scb_state_from_base(base[1].state_dict()))
    with pytest.raises(ValueError, match="state: expected the state of at least one SCBNormBase, found none"):
        scb_state_from_base(scb.state_dict())


def test_revert_follows_a_model_that_has_moved():
    model = convert_norms(small(), "ucb").double()
    revert_norms(model)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64, torch.int64}
    model(images().double())


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_copy_reverts_too():
    for save in (copy.deepcopy, pickled):
        model, x = small().eval(), images()
        want = model(x)
        twin = save(convert_norms(model, "scb"))
        assert torch.equal(twin(x), model(x))
        assert torch.equal(revert_norms(twin)(x), want)
        assert isinstance(model[1], SCBNorm)


def test_where():
    for where, names in (
        (None, ["1", "3.1", "6"]),
        ("3.1", ["3.1"]),
        (2, ["6"]),
        (-3, ["1"]),
        (["6", 0, 2], ["1", "6"]),
        (nn.BatchNorm2d, ["1", "3.1"]),
        ([nn.BatchNorm1d, "3.1"], ["3.1", "6"]),
        (lambda name, module: isinstance(module, nn.BatchNorm2d), ["1", "3.1"]),
        (lambda name, module: name.startswith("3"), ["3.1"]),
    ):
        model = convert_norms(small(), "ucb", where=where)
        assert converted(model) == names
        assert {name for name, module in model.named_modules() if isinstance(module, UCBNorm)} == set(names)


@pytest.mark.parametrize("kind", ["ucb", "scb"])
def test_every_batch_norm_converts(kind):
    """Of every rank, and the package's own, with a channel that is constant."""
    for norm, shape in (
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4), (6, 4, 5)),
        (nn.BatchNorm3d(4), (6, 4, 2, 1, 3)),
        (make_norm("bn", 4, 1), (6, 4, 5)),
    ):
        model, x = nn.Sequential(norm), batch(0, shape)
        x[:, 1] = 2.0
        model(x)
        if not isinstance(norm, nn.BatchNorm3d):
            model[0].get_buffer("running_var")[1] = 0
        want = model.eval()(x)
        assert converted(convert_norms(model, kind, num_components=1)) == ["0"]
        with routed(kind, torch.zeros(6, dtype=torch.int64)):
            close(model(x), want)
        assert all(t.isfinite().all() for t in model.state_dict().values())


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


def own_forward() -> nn.Module:
    norm: Any = nn.BatchNorm2d(4)
    norm.forward = lambda x: x
    return norm


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_layer_whose_behaviour_would_be_lost_is_refused():
    for norm, match in (
        (nn.LazyBatchNorm2d(), r"where: 1 \(LazyBatchNorm2d\) does more than torch's"),
        (Custom(4), r"where: 1 \(Custom\) does more than torch's"),
        (prune.l1_unstructured(nn.BatchNorm2d(4), "weight", amount=1), "has parameters or buffers of its own"),
        (own_forward(), "has a forward of its own"),
        (nn.BatchNorm2d(4, track_running_stats=False), "keeps no running statistics"),
        (nn.BatchNorm2d(4, momentum=None), "momentum: expected a number, since 1 averages over all"),
    ):
        model = nn.Sequential(nn.BatchNorm2d(4), norm)
        first = model[0]
        with pytest.raises(ValueError, match=match):
            convert_norms(model, "ucb")
        assert model[0] is first  # nothing was converted
        assert converted(convert_norms(model, "ucb", "0")) == ["0"]


def test_wrong_conversions_are_named():
    def convert(*args: Any, **options: Any) -> Any:
        return lambda model: convert_norms(model, *args, **options)

    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    for act, match in (
        (convert("bn"), "kind: expected one of 'mn', 'ucb', 'scb', 'scb_base', 'dsbn', got 'bn'"),
        (
            convert("ucb", "conv1"),
            r"where: expected the name of a BatchNorm, LayerNorm or InstanceNorm \(1, 3.1, 6\), got 'conv1'",
        ),
        (convert("ucb", "0"), "where: expected the name of a BatchNorm, LayerNorm or"),
        (convert("ucb", 3), "where: expected an index below the 3 BatchNorm layers, got 3"),
        (convert("ucb", -4), "where: expected an index below the 3 BatchNorm layers, got -4"),
        (convert("ucb", lambda *_: False), "where: expected to match at least one of 3"),
        (convert("ucb", []), "where: expected to match at least one of 3"),
        (convert("ucb", nn.Conv2d), "where: expected to match at least one of 3 BatchNorm layers"),
        (lambda m: convert_norms(m[0], "ucb"), "model: expected at least one BatchNorm layer inside"),
        (
            lambda _: convert_norms(wrapped, "ucb"),
            "model: expected one not yet wrapped, got DistributedDataParallel; convert, then wrap",
        ),
        (convert("ucb", colour=3), "colour: 3 is no option of kind 'ucb'"),
        (convert("dsbn", groups=1), "groups: 1 is no option of kind 'dsbn'"),
        (convert("ucb", num_components=0), "num_components: expected at least 1, got 0"),
        (convert("ucb", affine=False), "affine: expected True, since 1 has a weight"),
        (convert("ucb", 1.5), "expected a name, an index, a type, several of these or a predicate, got 1.5$"),
        (convert("ucb", True), "where: expected a name, .* got True$"),
        (convert("ucb", b"ab"), "where: expected a name, .* got b'ab'$"),
        (convert("ucb", int), "where: expected a name, .* got <class 'int'>$"),
        (convert("ucb", ["1", nn.BatchNorm1d(6)]), "where: expected a name, .* got a BatchNorm1d$"),
        (convert("ucb", torch.ones(3)), "where: expected a name, .* got a Tensor$"),
        (convert("ucb", lambda name: True), r"where: expected a predicate of \(name, module\), got one of \(name\)$"),
    ):
        with pytest.raises(ValueError, match=match):
            act(small())


def test_a_layer_itself_is_converted_and_returned():
    for where in (None, 0, nn.BatchNorm2d, lambda name, _: name == ""):
        norm, x = lived(nn.BatchNorm2d(3)).eval(), images()
        want = norm(x)
        layer = convert_norms(norm, "ucb", where, num_components=1)
        assert isinstance(layer, UCBNorm)
        assert converted(layer) == [""]
        close(layer(x), want)
        with pytest.raises(ValueError, match=r"where: the model \(UCBNorm\) is converted already"):
            convert_norms(layer, "ucb")
        assert revert_norms(layer) is norm
        assert converted(norm) == []


def test_a_shared_layer_stays_shared():
    for where in (None, "a", "b.0", 0):
        norm = nn.BatchNorm2d(3)
        model: Any = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
        assert converted(convert_norms(model, "ucb", where)) == ["a"]
        assert isinstance(model["a"], UCBNorm)
        assert model["b"][0] is model["a"]
        revert_norms(model)
        assert model["a"] is norm is model["b"][0]


@pytest.mark.parametrize("kind", ["ucb", "dsbn"])
def test_dtype_mode_and_frozen_parameters_are_kept(kind):
    model = small().to(torch.bfloat16)
    model[1].eval()
    model[1].weight.requires_grad_(False)
    convert_norms(model, kind)
    assert not model[1].training
    assert model[6].training
    floats = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    assert {t.dtype for name, t in floats.items() if not name.endswith("initialized")} == {torch.bfloat16}
    affine = model[1].domains[0] if kind == "dsbn" else model[1]
    assert not affine.weight.requires_grad
    assert affine.bias.requires_grad
    with routed(kind):
        assert model.eval()(images().bfloat16()).isfinite().all()


def test_data_taken_starts_are_kept():
    model, x = convert_norms(small(), "scb", init="data"), images()
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


@pytest.mark.parametrize(
    ("kind", "name"), [("mn", "resnet18"), ("scb", "mobilenetv3_small_100"), *in_full(("ucb", "efficientnet_b0"))]
)
def test_published_backbones(kind, name):
    """Torchvision's with BatchNorms, and timm's with BatchNorms that hold activations."""
    torch.manual_seed(0)
    model = resnet18(weights=None) if name == "resnet18" else timm.create_model(name, num_classes=7)
    model, x = lived(model, 32).double().eval(), images(size=32).double()
    want, norms, before = model(x), [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)], state(model)
    options: Any = {"statistics": "batch"} if kind == "scb" else {}
    convert_norms(model, kind, num_components=3 if kind in CLUSTERED else 1, **options)
    assert converted(model) == norms
    assert len(norms) >= 20
    with routed(kind):
        torch.testing.assert_close(model(x), want, rtol=1e-8, atol=1e-10)
        model.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(revert_norms(model).eval()(x), want)
    assert_state(model, before)
