"""Kinds of layers by name: the built-in ones, one of a user's own, and no layer at all."""

import pytest
import torch
from torch import nn

from cbcls.config import ClassifierConfig
from cbgan.config import GanConfig
from common.norms import make_norm, register_norm, registry
from common.norms.config import NormConfig
from common.runtime.cli import parse
from common.runtime.errors import UsageError


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


def groups_of(num_features: int, num_components: int, *, eps: float = 1e-3, affine: bool = True) -> nn.Module:
    return nn.GroupNorm(num_components, num_features, eps=eps, affine=affine)


def test_a_kind_of_ones_own_is_made_configured_and_resolved_as_the_built_in_ones_are():
    register_norm("grouped", groups_of)
    x = torch.randn(5, 6, 4)
    expected = torch.nn.functional.group_norm(x, 3, eps=0.5)
    torch.testing.assert_close(make_norm("grouped", 6, 3, eps=0.5, affine=False)(x), expected)
    config = NormConfig(kind="grouped", num_components=3, eps=0.5, affine=False)
    torch.testing.assert_close(config.build(6, seed=3)(x), expected)
    assert (NormConfig(kind="grouped").resolved().eps, NormConfig(kind="grouped").resolved().affine) == (1e-3, True)
    with pytest.raises(ValueError, match=r"^norm\.momentum: 0\.5 means nothing to norm\.kind grouped; leave it out$"):
        NormConfig(kind="grouped", momentum=0.5)


@pytest.mark.parametrize("config", [GanConfig, ClassifierConfig])
def test_applications_take_it_and_are_told_of_sizes_it_refuses(config):
    register_norm("grouped", groups_of)
    assert parse(config, ["--norm.kind", "grouped", "--norm.num_components", "8"]).norm.kind == "grouped"
    with pytest.raises(UsageError, match=r"^norm\.kind: grouped for (32|128) channels: num_channels .* divisible"):
        parse(config, ["--norm.kind", "grouped", "--norm.num_components", "5"])


def test_a_kind_that_takes_clusters_is_refused_where_there_are_none():
    register_norm("by_cluster", groups_of, takes_clusters=True)
    given = ["--norm.kind", "by_cluster", "--norm.num_components", "8"]
    with pytest.raises(UsageError, match=r"^norm\.kind: by_cluster needs a cluster for each image"):
        parse(ClassifierConfig, given)
    assert parse(GanConfig, given).conditional  # its clusters are the classes


def test_a_wrong_or_taken_name_is_refused():
    register_norm("grouped", groups_of)
    for name in ("none", "grouped"):
        with pytest.raises(ValueError, match=f"^name: {name} is taken; the kinds are bn, .*, grouped$"):
            register_norm(name, groups_of)
    assert isinstance(make_norm("grouped", 6, 3), nn.GroupNorm)
    for name in ("", "Mine", "my norm", "3d", "a/b", "mine\n", None, 3):
        with pytest.raises(ValueError, match=r"^name: expected lower-case letters"):
            register_norm(name, groups_of)  # pyright: ignore[reportArgumentType]


def test_what_two_sizes_cannot_call_is_refused():
    for build in (lambda num_features: None, lambda a, b, eps: None, lambda *, a, b: None, "mine"):
        with pytest.raises(ValueError, match=r"^build: expected a function of num_features, num_components"):
            register_norm("mine", build)  # pyright: ignore[reportArgumentType]
    assert "mine" not in registry.kinds()
    register_norm("mine", lambda num_features, num_components: num_features)
    with pytest.raises(ValueError, match=r"^kind: expected mine to make a torch\.nn\.Module, got int$"):
        make_norm("mine", 4, 3)


def test_a_wrong_kind_lists_the_known_ones_and_the_nearest():
    register_norm("grouped", groups_of)
    listed = "bn, in, dsbn, mn, scb, scb_base, ucb, none, grouped"
    for wrong, hint in (("gruoped", "; did you mean grouped?"), ("ubc", "; did you mean ucb?"), ("layer", "")):
        with pytest.raises(UsageError) as caught:
            parse(NormConfig, ["--kind", wrong])
        assert str(caught.value) == f"norm.kind: expected one of {listed}, got {wrong}{hint}"


def test_the_help_lists_kinds_with_those_of_ones_own(capsys):
    register_norm("grouped", groups_of)
    with pytest.raises(SystemExit, match="0"):
        parse(ClassifierConfig, ["--help"])
    assert "--norm.kind {bn,in,dsbn,mn,scb,scb_base,ucb,none,grouped}" in " ".join(capsys.readouterr().out.split())


def test_no_layer_gives_back_what_it_is_given_and_ignores_clusters():
    layer, x = NormConfig(kind="none").build(4), torch.randn(3, 4, 2)
    assert layer(x) is x
    assert layer(x, torch.tensor([0, 7, -1])) is x
    assert not list(layer.parameters()) + list(layer.buffers())
    with pytest.raises(ValueError, match=r"^norm\.eps: 0\.1 means nothing to norm\.kind none; leave it out$"):
        NormConfig(kind="none", eps=0.1)
