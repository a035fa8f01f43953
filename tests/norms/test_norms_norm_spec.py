"""Conversion of layers that are more than a BatchNorm: with an activation, over processes, or another norm."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from convert_cases import EXACT, IDS, close, images, lived, routed
from norm_cases import assert_state, state
from timm.layers import (
    BatchNormAct2d,  # pyright: ignore[reportPrivateImportUsage]
    LayerNorm,  # pyright: ignore[reportPrivateImportUsage]
    LayerNorm2d,  # pyright: ignore[reportPrivateImportUsage]
    LayerNormAct,  # pyright: ignore[reportPrivateImportUsage]
    LayerNormAct2d,  # pyright: ignore[reportPrivateImportUsage]
    convert_sync_batchnorm,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision.models import convnext

from common.norms import MixtureNorm, NormAct, UCBNorm, clusters, convert_norms, converted, revert_norms


class Double(nn.Module):
    """An activation with which dropout does not commute, and that shows whether it ran."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * x + 1).relu()


def activated(**options: Any) -> Any:
    torch.manual_seed(0)
    return lived(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, **options)))


@pytest.mark.parametrize(
    ("kind", "num", "type_", "options"),
    [
        *((*exact, {"act_layer": Double}) for exact in EXACT),
        *(("ucb", 1, UCBNorm, options) for options in ({}, {"apply_act": False})),
    ],
)
def test_an_activation_is_kept(kind, num, type_, options):
    model = activated(**options).eval()
    x, norm, act, before = images(), model[1], model[1].act, state(model)
    want = model(x)
    convert_norms(model, kind, num_components=num)
    assert converted(model) == ["1"]
    assert isinstance(model[1], NormAct)
    assert isinstance(model[1].norm, type_)
    assert model[1].act is act
    with routed(kind):
        close(model(x), want)
        model.train()(x).square().sum().backward()
    assert revert_norms(model.eval())[1] is norm
    assert_state(model, before)
    assert torch.equal(model(x), want)


def test_dropout_comes_between_norm_and_activation():
    model = activated(drop_layer=partial(nn.Dropout, 0.5), act_layer=Double).train()
    twin = copy.deepcopy(model)
    convert_norms(model, "ucb", num_components=1)
    outputs = []
    for net in (model, twin):
        net[1].drop.train()
        torch.manual_seed(3)
        outputs.append(net(images()))
    close(*outputs)
    assert (outputs[0] == 1).float().mean() > 0.4  # what dropout takes; dropout after it would give 0


class ActThenNorm(nn.BatchNorm2d):
    """Looks like timm's, but for the order."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(self.act(input))


class Gated(nn.BatchNorm2d):
    """Holds one module more."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act, self.gate = nn.ReLU(), nn.Conv2d(channels, channels, 1)


class Centred(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input - input.mean(1, keepdim=True))


class LayerGated(nn.LayerNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = nn.Linear(channels, channels)


def test_what_only_looks_alike_is_refused():
    for norm, match in (
        (ActThenNorm(4), r"0 \(ActThenNorm\) does more than torch's BatchNorm, .* leave it out by `where`"),
        (Gated(4), r"0 \(Gated\) holds gate, which would be lost; leave it out by `where`"),
        (Centred(4), r"0 \(Centred\) does more than torch's LayerNorm, which would be lost"),
        (LayerGated(4), r"0 \(LayerGated\) holds gate, which would be lost"),
        (
            prune.l1_unstructured(nn.LayerNorm(4), "weight", amount=1),
            r"0 \(LayerNorm\) has parameters or buffers of its own \(pruning\?\), which would be lost",
        ),
        (nn.LayerNorm([2, 4]), r"0 \(LayerNorm\) normalises over \(2, 4\), of which none alone is the channels"),
    ):
        model = nn.Sequential(norm).train()
        before = state(model)
        with pytest.raises(ValueError, match=f"where: {match}"):
            convert_norms(model, "ucb", type(norm))
        assert model[0] is norm
        assert all(module.training for module in model.modules())
        assert_state(model, before)  # looking changed nothing


@pytest.mark.parametrize(("kind", "fused"), [("ucb", False), ("ucb", True), ("scb", False)])
def test_a_synchronised_batch_norm_is_converted(kind, fused):
    model = activated() if fused else lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    synchronised: Any = convert_sync_batchnorm if fused else nn.SyncBatchNorm.convert_sync_batchnorm
    model = synchronised(model).eval()
    assert isinstance(model[1], nn.SyncBatchNorm)
    want = model(images())
    convert_norms(model, kind, num_components=1 if kind == "ucb" else 3)
    if kind == "ucb":
        assert (model[1].norm if fused else model[1]).process_group == "world"
    with routed(kind):
        close(model(images()), want)


def test_a_synchronised_batch_norm_becomes_no_layer_of_one_process_unless_told():
    model: Any = nn.Sequential(nn.SyncBatchNorm(4))
    for kind in ("mn", "dsbn"):
        with pytest.raises(ValueError, match=rf"kind: expected 'ucb', .* for 0 \(SyncBatchNorm\), .* got '{kind}'"):
            convert_norms(model, kind)
        assert isinstance(model[0], nn.SyncBatchNorm)
    assert isinstance(convert_norms(copy.deepcopy(model), "mn", process_group=None)[0], MixtureNorm)
    assert convert_norms(model, "ucb", process_group=None)[0].process_group is None


def test_domains_are_not_synchronised():
    for synchronised in (convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm):
        model = convert_norms(lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), "dsbn", num_components=2)
        with pytest.raises(ValueError, match=r"^DomainBatchNorm: .* SyncBatchNorm, .*; take kind 'scb', .*"):
            synchronised(model)


WARNED = r"keeps no statistics for 'ucb' to start from, .*: call recalibrate\(model, loader\) .*, and train it on$"


@pytest.mark.parametrize(
    ("norm", "shape", "dim"),
    [
        (nn.LayerNorm(4), (6, 2, 3, 4), -1),
        (LayerNorm(4), (6, 5, 4), -1),
        (LayerNorm2d(4), (6, 4, 2, 3), 1),
        (convnext.LayerNorm2d(4), (6, 4, 2, 3), 1),
        (LayerNorm2d(2), (6, 2, 2, 3), 1),  # as many channels as the probe has rows
    ],
    ids=str,
)
def test_a_layer_norm_is_replaced_over_its_channels(norm, shape, dim):
    norm, rng = copy.deepcopy(norm).eval(), torch.Generator().manual_seed(0)
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5, rng)
    model = nn.Sequential(norm)
    with pytest.warns(UserWarning, match=f"^0: a LayerNorm {WARNED}"):
        convert_norms(model, "ucb", nn.LayerNorm, num_components=1)
    layer = model[0]
    assert isinstance(layer, UCBNorm)
    assert layer.eps == norm.eps
    # As by BatchNorm at mean 0 and variance 1, and in training by the batch's own moments.
    x = torch.randn(shape, generator=rng) + 3
    scale = norm.weight / (1 + norm.eps) ** 0.5
    torch.testing.assert_close(layer(x), (x.movedim(dim, -1) * scale + norm.bias).movedim(-1, dim))
    first = x.movedim(dim, 1)
    want = F.batch_norm(first, None, None, norm.weight, norm.bias, training=True, eps=norm.eps).movedim(1, dim)
    torch.testing.assert_close(layer.train()(x), want, rtol=1e-4, atol=1e-5)
    assert revert_norms(model)[0] is norm


@pytest.mark.parametrize("norm", [LayerNormAct(4, act_layer=nn.GELU), LayerNormAct2d(4, act_layer=nn.GELU)])
def test_an_activation_after_a_layer_norm_is_kept(norm):
    model = nn.Sequential(norm).eval()
    with pytest.warns(UserWarning, match=WARNED):
        convert_norms(model, "ucb", nn.LayerNorm, num_components=1)
    x = images()[:, :1].expand(-1, 4, -1, -1) if isinstance(norm, LayerNormAct2d) else images()[..., :4]
    torch.testing.assert_close(model(x), F.gelu(x / (1 + norm.eps) ** 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}], ids=str)
def test_what_a_layer_norm_does_without_is_not_learned(options):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, **options)).double()
    with pytest.warns(UserWarning, match=WARNED):
        convert_norms(model, "ucb", nn.LayerNorm)
    names = {name for name, p in model[1].named_parameters() if p.requires_grad}
    assert names == ({"weight"} if "bias" in options else set())
    model.double()(torch.randn(6, 4, dtype=torch.float64)).sum().backward()


def test_layer_norms_are_left_alone_unless_asked_for():
    def mixed() -> Any:
        return nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.LayerNorm(4))

    assert converted(convert_norms(mixed(), "ucb")) == ["0", "2"]
    assert converted(convert_norms(mixed(), "ucb", -1)) == ["2"]
    with pytest.warns(UserWarning, match="^1 and 1 more: a LayerNorm keeps"):
        assert converted(convert_norms(mixed(), "ucb", nn.LayerNorm)) == ["1", "3"]
    for where in ("3", lambda name, _: name == "3"):
        with pytest.warns(UserWarning, match="^3: a LayerNorm keeps"):
            model = convert_norms(mixed(), "ucb", where)
        assert converted(model) == ["3"]
        assert converted(convert_norms(model, "ucb", 1)) == ["2", "3"]
    with pytest.warns(UserWarning, match=r"'mn' to start from, .*: call recalibrate\(model, loader\)"):
        convert_norms(mixed(), "mn", nn.LayerNorm)
    with pytest.raises(ValueError, match="model: expected at least one BatchNorm layer inside, found 2 LayerNorms, wh"):
        convert_norms(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)), "ucb")
    with pytest.raises(ValueError, match="where: expected to match at least one of 2 BatchNorm layers or 2 LayerNorms"):
        convert_norms(mixed(), "ucb", nn.Conv2d)


@pytest.mark.parametrize(("kind", "affine"), [("scb", False), ("scb_base", True)])
def test_an_instance_norm_becomes_one_of_clusters_that_computes_the_same(kind, affine):
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4, eps=1e-3, affine=affine)
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.BatchNorm2d(4)).eval()
    x = images()
    want = model[:2](x)
    convert_norms(model, kind, nn.InstanceNorm2d, statistics="instance")
    assert converted(model) == ["1"]
    assert model[1].affine == affine
    for training in (True, False):
        with routed(kind):
            close(model.train(training)[:2](x), want)
    assert revert_norms(model)[1] is norm


def test_an_instance_norm_is_refused_where_it_would_be_lost():
    model = nn.Sequential(nn.InstanceNorm1d(4), nn.BatchNorm1d(4))
    cases: Any = (("ucb", {}, "None with kind 'ucb'"), ("scb", {"statistics": "batch"}, "'batch' with"))
    for kind, options, found in cases:
        expected = r"statistics: expected 'instance', with kind 'scb' or 'scb_base', for 0 \(InstanceNorm1d\), .* got "
        with pytest.raises(ValueError, match=f"^{expected}{found}"):
            convert_norms(model, kind, "0", **options)
    assert converted(convert_norms(model, "ucb")) == ["1"]
    tracked = nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True))
    with pytest.raises(ValueError, match=r"0 \(InstanceNorm1d\) evaluates by running statistics .* leave it out"):
        convert_norms(tracked, "scb", nn.InstanceNorm1d, statistics="instance")
    with pytest.raises(ValueError, match="expected at least one BatchNorm layer inside, found 1 InstanceNorms, "):
        convert_norms(tracked, "scb", statistics="instance")


@pytest.mark.parametrize(
    ("kind", "norm", "options", "eps"),
    [
        ("scb", nn.InstanceNorm2d(3, eps=1.0), {"statistics": "instance"}, "1.0"),
        ("scb_base", nn.BatchNorm2d(3), {"statistics": "batch", "eps": 2}, "2.0"),
    ],
)
def test_an_eps_that_leaves_clusters_no_variance_to_start_at_is_refused(kind, norm, options, eps):
    model = nn.Sequential(norm)
    start = f"^eps: expected less than 1 for 0 with statistics='{options['statistics']}'"
    with pytest.raises(ValueError, match=f"{start}, .* variance 1 - eps, got {eps}$"):
        convert_norms(model, kind, "0", **options)
    assert model[0] is norm
    convert_norms(nn.Sequential(nn.BatchNorm2d(3, eps=1.0)), kind)  # learned: starts at the BatchNorm's own variance


def test_clusters_start_at_layer_norms_inputs():
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"init: expected 'data' for kind 'scb' at 0 \(LayerNorm\), .* got 'identity'"):
        convert_norms(model, "scb", nn.LayerNorm)
    with pytest.raises(ValueError, match=r"kind: expected 'ucb' or 'mn' for 0 \(LayerNorm\), got 'dsbn'"):
        convert_norms(model, "dsbn", nn.LayerNorm)
    x = torch.randn(6, 50, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    starts: Any = ({"init": "data"}, {"statistics": "instance"})
    for options in starts:
        with clusters(IDS):
            y = convert_norms(copy.deepcopy(model), "scb", nn.LayerNorm, **options)(x)
        for own in (y[k::3] for k in range(3)):
            torch.testing.assert_close(own.mean((0, 1)), torch.zeros(4), rtol=0, atol=1e-5)
            torch.testing.assert_close(own.var((0, 1), correction=0), torch.ones(4), rtol=1e-4, atol=0)
        if "statistics" in options:
            close(y, F.instance_norm(x.movedim(-1, 1)).movedim(1, -1))


@pytest.mark.filterwarnings("ignore:layers.* a LayerNorm keeps:UserWarning")
def test_a_transformer_encoder_that_goes_past_its_norms_is_refused():
    """Its fast path in evaluation, without gradients, reads their weights and computes LayerNorm, silently."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False).eval()
    with pytest.raises(ValueError, match=r"where: layers.0.norm1 \(LayerNorm\) belongs to torch's TransformerEncoderL"):
        convert_norms(model, "ucb", nn.LayerNorm)
    assert converted(model) == []
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        convert_norms(model, "ucb", nn.LayerNorm)
        x = torch.randn(4, 5, 16) * 3 + 1
        want = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), want)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    with torch.no_grad():  # what is refused for: not the same
        assert (model(x) - want).abs().max() > 0.1
