"""Calibrating a model: what each layer is fitted to, what stays, and what is refused."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from norm_cases import mixture_case
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from common.norms import (
    MixtureNorm,
    SCBNorm,
    calibrate,
    clusters,
    convert_norms,
    mixture,
    preserved_statistics,
    recalibrate,
)
from common.norms.backends import reference
from common.runtime.seeding import generator


class Backwards(nn.Module):
    """Runs what it holds from the last to the first."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.head = nn.Sequential(nn.Dropout(), MixtureNorm(4, 2))  # never runs

    def forward(self, x: Tensor) -> Tensor:
        for part in reversed(self.parts):
            x = part(x)
        return x


def network() -> Backwards:
    """Two MixtureNorms that have trained a little; the one that runs first stands last."""
    torch.manual_seed(0)
    model = Backwards(
        nn.Sequential(nn.Dropout(), MixtureNorm(6, 2)),
        nn.Conv2d(4, 6, 1),
        nn.BatchNorm2d(4),
        MixtureNorm(4, 3, groups=None),
        nn.Conv2d(3, 4, 1),
    )
    with torch.no_grad():
        model(batch(99))
    model.parts[2].eval()
    return model


def batch(seed: int, size: int = 6) -> Tensor:
    return mixture_case((size, 3, 4, 4), num=1, dtype=torch.float32, seed=seed)[0]


def fed(model: nn.Module, layer: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Return what a layer is fed in evaluation."""
    caught = []
    handle = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        for x in batches:
            model.eval()(x)
    handle.remove()
    return caught


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor], modes: list[bool]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_each_layer_is_fitted_to_what_evaluation_feeds_it():
    model, batches = network(), [batch(0, 30)]
    before = copy.deepcopy(model)
    assert calibrate(model, batches) == ["parts.3", "parts.0.1"]
    for name in ("parts.3", "parts.0.1"):
        layer, alone = model.get_submodule(name), before.get_submodule(name)
        assert isinstance(alone, MixtureNorm)
        alone.calibrate(fed(model, layer, batches))
        for key, tensor in alone.state_dict().items():
            assert torch.equal(layer.state_dict()[key], tensor), f"{name}.{key}"
        assert not torch.equal(layer.state_dict()["mean"], network().get_submodule(name).state_dict()["mean"])


def test_the_first_layer_is_fitted_to_all_batches_together():
    model, alone, batches = network(), network(), [batch(step) for step in range(5)]
    calibrate(model, batches)
    layer, first = model.get_submodule("parts.3"), alone.get_submodule("parts.3")
    assert isinstance(first, MixtureNorm)
    first.calibrate(fed(alone, first, batches))
    torch.testing.assert_close(dict(layer.state_dict()), dict(first.state_dict()), rtol=0, atol=0)


def test_nothing_else_changes():
    model = network()
    before, modes, rng = state(model), [module.training for module in model.modules()], torch.get_rng_state()
    calibrate(model, [batch(0), batch(1)])
    assert torch.equal(torch.get_rng_state(), rng)
    fitted = {f"{layer}.{name}" for layer in ("parts.3", "parts.0.1") for name in ("logits", "mean", "log_var")}
    fitted |= {name.replace(kept, "fit_" + kept) for name in fitted if (kept := name.rsplit(".", 1)[1])}
    assert_untouched(model, before | {name: model.state_dict()[name] for name in fitted}, modes)


def test_batches_may_have_any_form_a_loader_gives():
    x, plain = batch(0, 12), network()
    calibrate(plain, list(x.split(4)))
    for made in (
        [(part, "label") for part in x.split(4)],
        [[part] for part in x.split(4)],
        DataLoader(TensorDataset(x, torch.arange(12)), batch_size=4),
    ):
        ours = network()
        calibrate(ours, made)
        for name, tensor in plain.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_no_more_batches_are_taken_than_asked():
    class Counted(list):
        taken = 0

        def __iter__(self) -> Iterator:
            for item in super().__iter__():
                Counted.taken += 1
                yield item

    few, all_ = network(), network()
    calibrate(few, Counted(batch(step) for step in range(9)), batches=3)
    assert Counted.taken == 3  # one pass for both layers
    calibrate(all_, (batch(step) for step in range(3)))  # which can be gone through once
    for name, tensor in all_.state_dict().items():
        assert torch.equal(few.state_dict()[name], tensor), name


def test_a_layer_that_runs_twice_is_fitted_to_both_inputs():
    torch.manual_seed(0)
    layer, x = MixtureNorm(4, 2), mixture_case((30, 4), num=1, dtype=torch.float32)[0]
    model, first, want = nn.Sequential(layer, nn.Linear(4, 4), layer), copy.deepcopy(layer), copy.deepcopy(layer)
    first.calibrate([x])  # by which it hands on what it is fed later
    want.calibrate([x, model[1](first.eval()(x)).detach()])
    calibrate(model, [x])
    assert torch.equal(layer.mean, want.mean)


def test_ids_reach_the_layers_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), MixtureNorm(4, 2))
    convert_norms(model, "scb", num_components=2)
    scb, layer = model
    assert isinstance(scb, SCBNorm)
    assert isinstance(layer, MixtureNorm)
    with torch.no_grad():
        scb.mean[1] = 50.0
    x, ids = mixture_case((40, 4), num=1, dtype=torch.float32)[0], torch.arange(40) % 2
    x[1::2] += 50
    want = copy.deepcopy(layer)
    with clusters(ids):
        calibrate(model, [x])
    want.calibrate([x - 50 * ids[:, None]])
    torch.testing.assert_close(layer.mean, want.mean, atol=1e-3, rtol=1e-3)


def test_after_an_error_the_model_is_as_it_was():
    model = network()
    before, modes = state(model), [module.training for module in model.modules()]
    for loader, batches, match in (
        ([], 1, "loader: expected at least one batch, got none"),
        ([batch(0)], 0, "batches: expected a whole number of at least 1, got 0"),
        ([batch(0)], 1.5, "batches: expected a whole number of at least 1, got 1.5"),
        (batch(0), 1, "loader: expected a DataLoader or a list of batches, got Tensor"),
        (None, 1, "loader: expected a DataLoader or a list of batches, got NoneType"),
        ([{"x": batch(0)}], 1, "loader: expected tensors, or tuples or lists that begin with one, got dict"),
        ([()], 1, "loader: expected tensors, or tuples or lists that begin with one, got tuple"),
        ([batch(0), batch(1) * math.nan], 2, "loader: expected finite activations, but batch 1 feeds parts.3 others"),
        ([batch(0), batch(1)[:, :2]], 2, "expected input"),  # the model's own error
        ([batch(0)[:0]], 1, "batches: expected at least two locations, got 0 in all"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=match):
            calibrate(model, loader, batches)  # pyright: ignore[reportArgumentType]
        assert_untouched(model, before, modes)


def test_a_model_without_a_layer_to_estimate_is_refused():
    model = nn.Sequential(nn.LayerNorm(3))
    for run, what in ((calibrate, "MixtureNorm layer"), (recalibrate, "layer that stores statistics")):
        with pytest.raises(ValueError, match=f"model: expected at least one {what}, found none"):
            run(model, [batch(0)])


def test_an_error_at_a_later_layer_undoes_the_earlier():
    model = network()
    with torch.no_grad():
        model.get_parameter("parts.1.weight").fill_(math.inf)
    before, modes = state(model), [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=r"batch 0 feeds parts\.0\.1 others"):
        calibrate(model, [batch(0)])
    assert_untouched(model, before, modes)


@pytest.mark.parametrize(("groups", "offset"), [(1, 1e3), (2, 0.0)])
def test_em_in_parts_is_em(groups, offset):
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(3 * mixture.MAX_POINTS + 5, 4, generator=rng, dtype=torch.float64) + offset
    points[: mixture.MAX_POINTS] += 40  # so that a component holds nothing of the other parts
    fit = mixture.seed_mixture(points, 3, groups, generator(0))
    got = mixture.em_step(points, fit, groups, eps=1e-5)
    tau = reference.posterior(points.T[None], fit.weight.log(), fit.mean, fit.var + 1e-5, groups)
    want = reference.batch_moments(points.T[None], tau)
    assert (want.var > mixture.variance_floor(points)).all()  # which would hide all else
    torch.testing.assert_close(got.weight, want.mass.mean(1) / len(points))
    torch.testing.assert_close(got.mean, want.mean)
    torch.testing.assert_close(got.var, want.var)


def test_em_in_parts_survives_an_offset_of_a_million():
    """A part's mean rounds to 0.03, and variances are 0.4: 0.03^2 / 0.4 = 2.4e-3, twice which is allowed.

    With their mean as first summed, from shares that each round by 6e-8, a variance errs by 1.4e-2.
    """
    fit = mixture.Components(
        torch.tensor([0.5, 0.3, 0.2]), 1e6 + torch.tensor([[0.0, 0], [1, 1], [-1, 1]]), torch.ones(3, 2)
    )
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        points = torch.randn(3 * mixture.MAX_POINTS + 11 * seed, 2, generator=rng) + 1e6
        got = mixture.em_step(points, fit, 1, eps=1e-5)
        want = mixture.em_step(points.double(), mixture.Components(*(t.double() for t in fit)), 1, eps=1e-5)
        torch.testing.assert_close(got.var.double(), want.var, rtol=4.8e-3, atol=0)


def test_a_model_is_calibrated_inside_a_block_alone():
    model, wanted = network(), network()
    before = copy.deepcopy(model.state_dict())
    calibrate(wanted, [batch(0), batch(1)])
    with preserved_statistics(model):
        calibrate(model, [batch(0), batch(1)])
        torch.testing.assert_close(dict(model.state_dict()), dict(wanted.state_dict()), rtol=0, atol=0)
        assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_model_is_what_it_was_after_an_error_inside_the_block():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), MixtureNorm(4, 2))  # not seeded yet
    before = copy.deepcopy(model.state_dict())

    def fails() -> None:
        with preserved_statistics(model):
            calibrate(model, [batch(0)])
            assert model[1].initialized
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    model.train()(batch(0))  # seeds it, which it would not if it still took itself for seeded
    assert not torch.equal(model.state_dict()["1.mean"], before["1.mean"])
