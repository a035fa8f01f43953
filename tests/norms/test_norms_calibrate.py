"""``calibrate`` and ``recalibrate``: what each layer is fitted to, what stays, and what is refused."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from norm_cases import assert_state, batch, state
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from common.norms import (
    MixtureNorm,
    UCBNorm,
    calibrate,
    make_norm,
    mixture,
    preserved_statistics,
    recalibrate,
    statistics_layers,
)
from common.norms.backends import reference
from common.norms.calibrate import POOLED
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
        model(images(99))
    model.parts[2].eval()
    return model


def images(seed: int, size: int = 6) -> Tensor:
    return batch(seed, (size, 3, 4, 4))


def fed(model: nn.Module, layer: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Return what a layer is fed in evaluation."""
    caught = []
    handle = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        for x in batches:
            model.eval()(x)
    handle.remove()
    return caught


def assert_untouched(model: nn.Module, before: dict[str, Tensor], modes: list[bool]) -> None:
    assert_state(model, before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_each_layer_is_fitted_to_what_evaluation_feeds_it():
    model, batches = network(), [images(0, 30)]
    before = copy.deepcopy(model)
    assert calibrate(model, batches) == ["parts.3", "parts.0.1"]
    for name in ("parts.3", "parts.0.1"):
        layer, alone = model.get_submodule(name), before.get_submodule(name)
        assert isinstance(alone, MixtureNorm)
        alone.calibrate(fed(model, layer, batches))
        assert_state(layer, state(alone))
        assert not torch.equal(layer.state_dict()["mean"], network().get_submodule(name).state_dict()["mean"])


def test_nothing_else_changes():
    model = network()
    before, modes, rng = state(model), [module.training for module in model.modules()], torch.get_rng_state()
    calibrate(model, [images(0), images(1)])
    assert torch.equal(torch.get_rng_state(), rng)
    fitted = {f"{layer}.{name}" for layer in ("parts.3", "parts.0.1") for name in ("logits", "mean", "log_var")}
    fitted |= {name.replace(kept, "fit_" + kept) for name in fitted if (kept := name.rsplit(".", 1)[1])}
    assert_untouched(model, before | {name: model.state_dict()[name] for name in fitted}, modes)


def test_batches_may_have_any_form_a_loader_gives():
    x, plain = images(0, 12), network()
    calibrate(plain, list(x.split(4)))
    for made in (
        [(part, "label") for part in x.split(4)],
        [[part] for part in x.split(4)],
        DataLoader(TensorDataset(x, torch.arange(12)), batch_size=4),
    ):
        ours = network()
        calibrate(ours, made)
        assert_state(ours, state(plain))


def test_no_more_batches_are_taken_than_asked():
    class Counted(list):
        taken = 0

        def __iter__(self) -> Iterator:
            for item in super().__iter__():
                Counted.taken += 1
                yield item

    few, all_ = network(), network()
    calibrate(few, Counted(images(step) for step in range(9)), batches=3)
    assert Counted.taken == 3  # one pass for both layers
    calibrate(all_, (images(step) for step in range(3)))  # which can be gone through once
    assert_state(few, state(all_))


def test_a_layer_that_runs_twice_is_fitted_to_both_inputs():
    torch.manual_seed(0)
    layer, x = MixtureNorm(4, 2), batch(0, (30, 4))
    model, first, want = nn.Sequential(layer, nn.Linear(4, 4), layer), copy.deepcopy(layer), copy.deepcopy(layer)
    first.calibrate([x])  # by which it hands on what it is fed later
    want.calibrate([x, model[1](first.eval()(x)).detach()])
    calibrate(model, [x])
    assert torch.equal(layer.mean, want.mean)


def test_after_an_error_the_model_is_as_it_was():
    model = network()
    before, modes = state(model), [module.training for module in model.modules()]
    for loader, batches, match in (
        ([], 1, "loader: expected at least one batch, got none"),
        ([images(0)], 0, "batches: expected a whole number of at least 1, got 0"),
        ([images(0)], 1.5, "batches: expected a whole number of at least 1, got 1.5"),
        (images(0), 1, "loader: expected a DataLoader or a list of batches, got Tensor"),
        (None, 1, "loader: expected a DataLoader or a list of batches, got NoneType"),
        ([{"x": images(0)}], 1, "loader: expected tensors, or tuples or lists that begin with one, got dict"),
        ([()], 1, "loader: expected tensors, or tuples or lists that begin with one, got tuple"),
        ([images(0), images(1) * math.nan], 2, "loader: expected finite activations, but batch 1 feeds parts.3 others"),
        ([images(0), images(1)[:, :2]], 2, "expected input"),  # the model's own error
        ([images(0)[:0]], 1, "batches: expected at least two locations, got 0 in all"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=match):
            calibrate(model, loader, batches)  # pyright: ignore[reportArgumentType]
        assert_untouched(model, before, modes)
    with torch.no_grad():
        model.get_parameter("parts.1.weight").fill_(math.inf)
    before = state(model)
    with pytest.raises(ValueError, match=r"batch 0 feeds parts\.0\.1 others"):  # which undoes the earlier layer
        calibrate(model, [images(0)])
    assert_untouched(model, before, modes)


def test_a_model_without_a_layer_to_estimate_is_refused():
    with pytest.raises(ValueError, match="model: expected at least one MixtureNorm layer, found none"):
        calibrate(nn.Sequential(UCBNorm(3, 2)), [images(0)])
    learned = UCBNorm(3, 2, update="weight")
    clustered = [make_norm("scb", 3, 2, statistics=statistics) for statistics in ("learned", "instance")]
    for model in (nn.LayerNorm(3), learned, *clustered):
        assert not statistics_layers(model)
        with pytest.raises(ValueError, match="model: expected at least one layer that stores statistics, found none"):
            recalibrate(model, [images(0)])
    with pytest.raises(ValueError, match=r"^update: expected 'moving_average'"):
        learned.calibrate([images(0)])


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
    before = state(model)
    calibrate(wanted, [images(0), images(1)])
    with preserved_statistics(model):
        calibrate(model, [images(0), images(1)])
        assert_state(model, state(wanted))
    assert_state(model, before)


def test_a_model_is_what_it_was_after_an_error_inside_the_block():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), MixtureNorm(4, 2))  # not seeded yet
    before = state(model)

    def fails() -> None:
        with preserved_statistics(model):
            calibrate(model, [images(0)])
            assert model[1].initialized
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert_state(model, before)
    model.train()(images(0))  # seeds it, which it would not if it still took itself for seeded
    assert not torch.equal(model.state_dict()["1.mean"], before["1.mean"])


def inputs(shift: float = 0.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(3000, 2, generator=rng, dtype=torch.float64)
    x[:1000] += torch.tensor([4.0, -2.0], dtype=torch.float64)
    return x * torch.tensor([1.0, 3.0], dtype=torch.float64) + shift


def stored(layer):
    return layer.logits.softmax(0), layer.mean, layer.log_var.exp()


def one_em_step(x, weight, mean, var):
    mixture = GaussianMixture(
        len(weight),
        covariance_type="diag",
        reg_covar=0,
        max_iter=1,
        weights_init=weight.numpy(),
        means_init=mean.numpy(),
        precisions_init=(1 / var).numpy(),
    )
    with pytest.warns(UserWarning, match="did not converge"):
        mixture.fit(x.numpy())
    return (torch.from_numpy(t) for t in (mixture.weights_, mixture.means_, mixture.covariances_))


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_it_is_one_step_of_em_from_the_stored_mixture_moved_onto_the_inputs(shift):
    x = inputs(shift)
    layer = UCBNorm(2, 3, groups=1, eps=1e-12, dtype=torch.float64)
    with torch.no_grad():
        layer.logits.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
        layer.log_var.copy_(torch.tensor([[0.0, 1.0], [0.5, 0.2], [1.0, 0.4]]))
    weight, mean, var = (t.clone() for t in stored(layer))
    centre = weight @ mean
    total = weight @ (var + (mean - centre).square())
    scale = x.std(0, correction=0) / total.sqrt()
    wanted = one_em_step(x, weight, x.mean(0) + (mean - centre) * scale, var * scale.square())
    recalibrate(layer, [x[:1500], x[1500:]])
    for found, want in zip(stored(layer), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_the_shared_variance_is_the_mean_by_weight():
    x = inputs()
    layers = [UCBNorm(2, 3, groups=1, variance=variance, dtype=torch.float64) for variance in ("component", "shared")]
    for layer in layers:
        recalibrate(layer, [x])
    weight, _, var = stored(layers[0])
    torch.testing.assert_close(stored(layers[1])[2], (weight @ var).expand(3, 2))


def test_the_usage_that_reseeding_watches_is_the_share_of_each_component():
    x = inputs()
    layer = UCBNorm(2, 2, reseed=0.01, dtype=torch.float64)
    layer.usage.fill_(7)
    recalibrate(layer, [x])
    torch.testing.assert_close(layer.usage, layer.posterior(x).mean((1, 3)))


def test_layers_that_nothing_has_seeded_are_seeded():
    x = inputs()
    layer = UCBNorm(2, 2, groups=1, init="kmeans++", dtype=torch.float64)
    recalibrate(layer, [x])
    assert layer.is_initialized()
    weight, mean, _ = stored(layer)
    small = int(weight.argmin())
    torch.testing.assert_close(weight[small], torch.tensor(1 / 3, dtype=torch.float64), atol=0.03, rtol=0)
    torch.testing.assert_close(mean[small], torch.tensor([4.0, -6.0], dtype=torch.float64), atol=0.4, rtol=0)


def test_each_layer_is_fed_what_those_before_it_give_after_their_own_estimate():
    torch.manual_seed(0)
    x = inputs()
    model = nn.Sequential(UCBNorm(2, 1), nn.Linear(2, 3), UCBNorm(3, 1)).double()
    twin = nn.Sequential(nn.BatchNorm1d(2), model[1], nn.BatchNorm1d(3)).double()
    torch.optim.swa_utils.update_bn([x], twin)
    names = recalibrate(model, [x])
    assert names == ["0", "2"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-3, atol=1e-3)  # its variance is unbiased


def test_a_layer_hands_each_batch_on_by_all_of_its_locations_however_many_batches_there_are():
    torch.manual_seed(0)
    x = 3 * torch.randn(400, 400, 2) + 5
    model = nn.Sequential(UCBNorm(2, 1), nn.BatchNorm1d(2))
    recalibrate(model, list(x), 400)
    torch.testing.assert_close(model.state_dict()["1.running_mean"], torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.state_dict()["1.running_var"], torch.ones(2), atol=1e-4, rtol=0)


def test_the_locations_kept_of_many_batches_are_bounded_and_all_batches_have_their_share(monkeypatch):
    torch.manual_seed(0)
    fitted = []
    fit = UCBNorm.calibrate_to
    monkeypatch.setattr(UCBNorm, "calibrate_to", lambda layer, points: (fitted.append(points), fit(layer, points)))
    recalibrate(UCBNorm(1, 1), (torch.full((mixture.MAX_POINTS, 1), float(i % 40)) for i in range(40)))
    kept = fitted[-1].flatten().long().bincount(minlength=40)
    assert len(fitted[-1]) == POOLED
    share = POOLED / 40
    assert (kept - share).abs().max() < 5 * share**0.5


def test_a_batch_of_one_location_joins_the_others():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), UCBNorm(4, 3)), torch.randn(33, 5)
    wanted = copy.deepcopy(model)
    recalibrate(wanted, [x])
    recalibrate(model, list(x.split(16)))
    torch.testing.assert_close(dict(model.state_dict()), dict(wanted.state_dict()))
    with pytest.raises(ValueError, match="expected at least two locations, got 1 in all"):
        recalibrate(model, [x[:1]])


class ByKeyword(nn.Module):
    """Calls its layers by keyword, or by position."""

    def __init__(self, keyword):
        super().__init__()
        self.keyword, self.ucb, self.bn = keyword, UCBNorm(2, 2), nn.BatchNorm1d(2)
        self.scb = make_norm("scb", 2, 2, statistics="batch")

    def forward(self, x):
        ids = torch.zeros(len(x), dtype=torch.long)
        if self.keyword:
            return self.scb(cluster=ids, x=self.bn(input=self.ucb(x=x)))
        return self.scb(self.bn(self.ucb(x)), ids)


def test_layers_may_be_called_by_keyword():
    x, models = inputs().float(), [ByKeyword(keyword) for keyword in (True, False)]
    for model in models:
        assert recalibrate(model, [x]) == ["ucb", "bn", "scb"]
    torch.testing.assert_close(*(dict(model.state_dict()) for model in models), rtol=0, atol=0)


def of_all(x, ids=None):
    """Return mean and unbiased variance of locations (N, C, L) in one float64 pass, of those with an id."""
    points = (x if ids is None else x[ids]).double().movedim(1, 2).flatten(0, 1).numpy()
    return torch.from_numpy(points.mean(0)), torch.from_numpy(points.var(0, ddof=1))


def test_batch_norms_statistics_are_those_of_one_pass_in_float64():
    torch.manual_seed(0)
    x = 1e3 + torch.randn(70, 3, 8)
    x[:35] += 2.0  # batches whose means differ: the mean of their variances is another one
    ids = (torch.arange(70) % 3 == 0).long()
    for layer, wanted in (
        (nn.BatchNorm1d(3), {"": None}),
        (make_norm("dsbn", 3, 2), {"domains.0.": ids == 0, "domains.1.": ids == 1}),
        (make_norm("scb", 3, 2, statistics="batch"), {"": None}),
    ):
        model = nn.Sequential(nn.Identity(), layer)
        takes = () if isinstance(layer, nn.BatchNorm1d) else (ids,)
        parts = list(zip(*(t.split(32) for t in (x, *takes)), strict=True))
        recalibrate(model, parts, forward=lambda part, layer=layer: layer(*part))
        for prefix, members in wanted.items():
            for name, want in zip(("running_mean", "running_var"), of_all(x, members), strict=True):
                torch.testing.assert_close(layer.state_dict()[prefix + name].double(), want, rtol=1e-4, atol=0)


def test_a_domain_without_images_keeps_its_statistics():
    layer = make_norm("dsbn", 3, 2)
    before = copy.deepcopy(layer.state_dict())
    recalibrate(layer, [torch.randn(8, 3, 4) + 5], forward=lambda x: layer(x, torch.zeros(8, dtype=torch.long)))
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items() if name.startswith("domains.1"))
    assert float(layer.state_dict()["domains.0.running_mean"].min()) > 4


def test_a_compiled_model_is_estimated_as_one_that_is_not_and_compiles_nothing_more():
    torch.manual_seed(0)
    x = inputs().float()
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), UCBNorm(3, 2))
    plain = copy.deepcopy(model)
    recalibrate(plain, [x])
    graphs = []
    model.eval().compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    model(x)
    compiled = len(graphs)
    recalibrate(model, [x])
    model(x)
    assert len(graphs) == compiled > 0
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(model(x), plain.eval()(x))


def test_both_kinds_are_estimated_and_others_left_alone():
    torch.manual_seed(0)
    learned = UCBNorm(2, 2, update="weight")
    model = nn.Sequential(nn.LayerNorm(2), UCBNorm(2, 2), MixtureNorm(2, 2), learned, nn.Dropout())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.train()
    assert recalibrate(model, [inputs().float()]) == ["1", "2"]
    assert all(module.training for module in model.modules())
    changed = {name.split(".")[0] for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"1", "2"}
    assert calibrate(model, [inputs().float()]) == ["2"]
