"""The layers in the constructors of torchvision and timm."""

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from convert_cases import images
from timm.layers import BatchNormAct2d, DropBlock2d  # pyright: ignore[reportPrivateImportUsage]
from timm.models import MobileNetV3
from timm.models._efficientnet_builder import decode_arch_def
from torch import nn
from torchvision import models

from common.norms import MixtureNorm, NormAct, SCBNorm, UCBNorm, norm_act


def mobile_net(**options: Any) -> nn.Module:
    """A small one; ``timm.create_model`` passes MobileNetV3 a norm_layer of its own."""
    blocks = [["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r1_k3_s2_e4.5_c24_nre"], ["cn_r1_k1_s1_c64"]]
    return MobileNetV3(decode_arch_def(blocks), num_classes=7, act_layer=nn.Hardswish, **options)


Norm = Callable[..., nn.Module]
MODELS: dict[str, tuple[Callable[[Norm], nn.Module], Any, int]] = {
    # How the model is made of a norm_layer, with which activation or channel_dim, and how many norms it has.
    "torchvision vit": (lambda norm: models.VisionTransformer(32, 8, 2, 2, 16, 32, norm_layer=norm), -1, 5),
    "timm mobilenetv3": (lambda norm: mobile_net(norm_layer=norm), nn.Hardswish, 7),
    "timm convnext_atto": (lambda norm: timm.create_model("convnext_atto", conv_mlp=True, norm_layer=norm), None, 17),
}


class TokenBatchNorm(nn.BatchNorm1d):
    """torch's BatchNorm with the channels last."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.flatten(0, -2)).view_as(input)


def built(name: str, layer: Norm, **options: Any) -> Any:
    """Make a model with a layer of this package, or with BatchNorm."""
    make, how, _ = MODELS[name]
    torch.manual_seed(0)
    if layer is nn.BatchNorm2d:
        norm = TokenBatchNorm if how == -1 else layer if how is None else norm_act(layer, how)
    elif how == -1:
        norm = partial(layer, channel_dim=-1, **options)
    else:
        norm = partial(layer, **options) if how is None else norm_act(layer, how, **options)
    model = make(norm).double()
    for module in model.modules():  # so that two models draw no different masks
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.nn.init.normal_(list(model.parameters())[-2], std=0.1)  # the head's weight: torchvision's ViT has 0
    return model


@pytest.mark.parametrize(
    ("name", "layer"),
    [("torchvision vit", MixtureNorm), ("timm mobilenetv3", MixtureNorm), ("timm convnext_atto", UCBNorm)],
)
def test_a_constructor_takes_the_layers(name, layer):
    """One component is BatchNorm, in training and in evaluation, and so are clusters that are alike."""
    x = images(n=4, size=32).double()
    plain = built(name, nn.BatchNorm2d)
    model = built(name, layer, num_components=1)
    clustered = built(name, SCBNorm, num_clusters=3, affine=True)
    for net, type_ in ((model, layer), (clustered, SCBNorm)):
        assert sum(isinstance(module, type_) for module in net.modules()) == MODELS[name][2]
    torch.testing.assert_close(clustered.eval()(x), plain.eval()(x), rtol=1e-6, atol=1e-8)
    want, y = plain.train()(x), model.train()(x)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-8)
    for out in (want, y):
        out.square().mean().backward()
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-8, msg=key)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-6)


def test_a_norm_with_activation_is_timms():
    """What it makes does what BatchNormAct2d does, for all that timm passes."""
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    passed: dict[str, Any] = {"inplace": True, "device": None, "dtype": torch.float64, "eps": 1e-3, "momentum": 0.2}
    make = norm_act(UCBNorm, nn.LeakyReLU, num_components=1)
    for options in (
        {},
        {"apply_act": False},
        {"act_kwargs": {"negative_slope": 0.5}},
        {"drop_layer": partial(DropBlock2d, drop_prob=0.3, block_size=1)},
        {"affine": False},
    ):
        ours = make(4, **passed, **options)
        theirs = BatchNormAct2d(4, act_layer=nn.LeakyReLU, **passed, **options)
        outputs = []
        for layer in (ours, theirs):
            torch.manual_seed(0)
            y = [layer(x.double())]
            outputs.append([*y, layer.eval()(x.double())])
        for y, want in zip(*outputs, strict=True):
            torch.testing.assert_close(y, want, rtol=1e-8, atol=1e-8)
        assert isinstance(ours, NormAct)
        if ours.weight is not None:
            assert ours.weight is ours.norm.weight
            assert ours.bias is ours.norm.bias
            assert set(dict(ours.named_parameters())) == {"norm.weight", "norm.bias"}


def test_a_norm_layer_with_activation_can_be_pickled_and_makes_what_it_can_in_place():
    make = pickle.loads(pickle.dumps(norm_act(UCBNorm, nn.SiLU, num_components=2)))
    layer = pickle.loads(pickle.dumps(make(4)))
    assert (type(layer.norm), type(layer.act)) == (UCBNorm, nn.SiLU)
    assert isinstance(norm_act(UCBNorm, nn.GELU, num_components=2)(4, inplace=True).act, nn.GELU)  # knows no in place
    assert isinstance(norm_act(UCBNorm, None, num_components=2)(4).act, nn.Identity)
    assert norm_act(UCBNorm, nn.ReLU, num_components=2)(4, inplace=True).act.inplace
    assert not norm_act(UCBNorm, nn.ReLU, num_components=2)(4).act.inplace


def test_what_makes_no_layer_is_refused():
    make: Any = norm_act
    for run in (
        lambda: make(UCBNorm, nn.ReLU, num_components=3)(4, colour=1),
        lambda: make(UCBNorm, nn.ReLU, num_components=3, colour=1)(4),
        lambda: make(UCBNorm, nn.ReLU, num_components=3)(4, act_kwargs={"colour": 1}),
    ):
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'colour'"):
            run()
    for wrong in ("ucb", None):
        with pytest.raises(ValueError, match=f"norm_layer: expected a class such as UCBNorm, got {wrong!r}"):
            make(wrong, nn.SiLU)
    with pytest.raises(ValueError, match=r"act_layer: expected a class such as nn.SiLU, or None, got 'silu'"):
        make(UCBNorm, "silu")
