"""The configuration of a layer: what it refuses, and what validating it costs."""

import math
from typing import Any

import pytest
import torch

from common.norms import DomainBatchNorm
from common.norms.config import NormConfig, settings_of
from common.runtime.cli import parse
from common.runtime.errors import UsageError

KINDS = ("bn", "in", "dsbn", "mn", "scb", "scb_base", "ucb")


def test_wrong_values_are_named():
    """As the layers name them, with the field's own name before."""
    cases: Any = (
        ({"kind": "batchnorm"}, "kind: expected one of bn, in, .*, got batchnorm"),
        ({"num_components": 0}, "num_components: expected at least 1, got 0"),
        ({"groups": 0}, "groups: expected at least 1, got 0"),
        ({"groups": 2.0}, "groups: expected a whole number, got 2.0"),
        ({"kind": "bn", "eps": math.nan}, "eps: expected a positive, finite number, got nan"),
        ({"kind": "dsbn", "momentum": math.nan}, "momentum: expected 0 to 1, got nan"),
        ({"backend": "cuda"}, "backend: expected one of 'auto', .*, got 'cuda'"),
        ({"statistics": "learned"}, "statistics: 'learned' needs update='weight', got update='moving_average'"),
        ({"kind": "mn", "variance": "shared"}, "variance: shared means nothing to norm.kind mn; leave it out"),
    )
    for given, message in cases:
        with pytest.raises(ValueError, match=rf"^norm\.{message}$"):
            NormConfig(**given)
    for name, value in (("eps", ".nan"), ("groups", "true"), ("num_components", "2.0")):
        with pytest.raises(UsageError, match=rf"^[^\n]*{name}[^\n]*$"):
            parse(NormConfig, [f"--{name}", value])


SETTINGS: dict[str, Any] = {
    "groups": 1, "update": "moving_average", "statistics": "batch", "average": "em", "scale": "paper",
    "init": "uniform", "momentum": 0.1, "min_weight": 0.01, "variance": "component", "reseed": 0.0,
    "eps": 1e-5, "affine": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["in", "dsbn", "scb", "ucb"])
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


def test_validation_makes_nothing_of_the_size_asked_for():
    """So many components would not fit into any memory, and so many domains would take hours to make."""
    for kind in KINDS:
        groups = 10**14 if kind in ("mn", "ucb") else None
        assert NormConfig(kind=kind, num_components=10**14, groups=groups).groups == groups


def test_the_layer_has_the_seed_and_the_backend_asked_for():
    assert repr(NormConfig(backend="eager").build(4, seed=7)) == "UCBNorm(4, 3, seed=7, backend='eager')"
    layer = NormConfig(min_weight=0.1, variance="shared", reseed=0.05).build(4)
    assert repr(layer) == "UCBNorm(4, 3, variance='shared', reseed=0.05, min_weight=0.1)"


def test_groups_are_held_against_the_channels_when_the_layer_is_made():
    config = NormConfig(kind="ucb", groups=3)
    assert config.build(6)(torch.randn(4, 6)).shape == (4, 6)
    config.check_features(6)
    for act in (config.build, config.check_features):
        with pytest.raises(ValueError, match=r"^norm\.groups: expected a divisor of 4, got 3$"):
            act(4)


def test_resolved_names_what_the_layer_has_by_default():
    for kind in KINDS:
        config = NormConfig(kind=kind)
        layer, resolved = config.build(6), config.resolved()
        for name, value in vars(resolved).items():
            if name in ("kind", "num_components") or value is None:
                continue
            owner = layer.domains[0] if isinstance(layer, DomainBatchNorm) else layer
            assert getattr(owner, name, "auto") == value, f"{kind} {name}"
        assert resolved.eps == 1e-5
        assert resolved.build(6).state_dict().keys() == layer.state_dict().keys()
