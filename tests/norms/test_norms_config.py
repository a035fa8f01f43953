"""The configuration of a layer: what it refuses, and what validating it costs."""

import math
from typing import Any

import pytest
import torch

from common.cli.arguments import parse
from common.errors import UsageError
from common.norms import DomainBatchNorm
from common.norms.config import NormConfig, settings_of

KINDS = ("bn", "in", "dsbn", "mn", "scb", "scb_base", "ucb")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_components", value) for value in (0, -1, True, 2.0, math.nan)),
        *(("groups", value) for value in (0, -1, True, 2.0, math.nan)),
        *(("eps", value) for value in (0, -1.0, math.nan, math.inf, True)),
        *(("momentum", value) for value in (-0.1, 1.1, math.nan, math.inf)),
        ("kind", "batchnorm"),
        ("backend", "cuda"),
        ("statistics", "learned"),  # by default, averages move
    ],
)
def test_wrong_values_are_named(name, value):
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"^norm\.{name}: expected |^norm\.{name}: 'learned' needs"):
        NormConfig(**wrong)


SETTINGS: dict[str, Any] = {
    "groups": 1, "update": "moving_average", "statistics": "batch", "average": "em", "scale": "paper",
    "init": "uniform", "momentum": 0.1, "min_weight": 0.01, "variance": "component", "reseed": 0.0,
    "eps": 1e-5, "affine": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_mean_something_are_those_a_kind_does_not_refuse(kind):
    meant = settings_of(kind)
    for name, value in SETTINGS.items():
        given: dict[str, Any] = {name: "identity" if name == "init" and kind.startswith("scb") else value}
        if name in meant:
            NormConfig(kind=kind, **given)
        else:
            with pytest.raises(ValueError, match=f"means nothing to norm.kind {kind}"):
                NormConfig(kind=kind, **given)
    few, many = (sum(p.numel() for p in NormConfig(kind=kind, num_components=k).build(4).state_dict().values())
                 for k in (2, 3))  # fmt: skip
    assert ("num_components" in meant) == (few != many)
    assert {"kind", "backend"} <= meant <= {"kind", "backend", "num_components", *SETTINGS}


@pytest.mark.parametrize("kind", ["bn", "in", "dsbn"])
def test_torchs_layers_are_checked_too(kind):
    with pytest.raises(ValueError, match=r"^norm\.eps: expected a positive, finite number, got nan$"):
        NormConfig(kind=kind, eps=math.nan)
    with pytest.raises(ValueError, match=r"^norm\.momentum: expected 0 to 1, got nan$"):
        NormConfig(kind=kind, momentum=math.nan)


@pytest.mark.parametrize(
    "flag",
    ["eps .nan", "eps .inf", "momentum .nan", "groups true", "num_components true", "num_components 2.0"],
)
def test_a_command_line_is_told_in_one_line(flag):
    name, value = flag.split()
    with pytest.raises(UsageError) as caught:
        parse(NormConfig, [f"--{name}", value])
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_makes_nothing_of_the_size_asked_for(kind):
    """So many components would not fit into any memory, and so many domains would take hours to make."""
    groups = 10**14 if kind in ("mn", "ucb") else None
    assert NormConfig(kind=kind, num_components=10**14, groups=groups).groups == groups


def test_the_layer_has_the_seed_and_the_backend_asked_for():
    assert repr(NormConfig(backend="eager").build(4, seed=7)) == "UCBNorm(4, 3, seed=7, backend='eager')"


def test_groups_are_held_against_the_channels_when_the_layer_is_made():
    config = NormConfig(kind="ucb", groups=3)
    assert config.build(6)(torch.randn(4, 6)).shape == (4, 6)
    config.check_features(6)
    for act in (config.build, config.check_features):
        with pytest.raises(ValueError, match=r"^norm\.groups: expected a divisor of 4, got 3$"):
            act(4)


@pytest.mark.parametrize("kind", KINDS)
def test_resolved_names_what_the_layer_has_by_default(kind):
    config = NormConfig(kind=kind)
    layer, resolved = config.build(6), config.resolved()
    for name, value in vars(resolved).items():
        if name in ("kind", "num_components") or value is None:
            continue
        owner = layer.domains[0] if isinstance(layer, DomainBatchNorm) else layer
        assert getattr(owner, name, "auto") == value, name
    assert resolved.eps == 1e-5
    assert resolved.build(6).state_dict().keys() == layer.state_dict().keys()
