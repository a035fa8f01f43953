"""``recalibrate``: the stored statistics of a model, estimated anew from what its layers are fed."""

import copy

import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import nn

from common.norms import MixtureNorm, UCBNorm, calibrate, make_norm, mixture, recalibrate, statistics_layers
from common.norms.calibrate import POOLED


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


def test_one_component_takes_the_inputs_mean_and_variance():
    x = inputs(50.0)
    layer = UCBNorm(2, 1, dtype=torch.float64)
    assert recalibrate(layer, [x]) == ["UCBNorm"]
    torch.testing.assert_close(layer.mean[0], x.mean(0))
    torch.testing.assert_close(layer.log_var[0].exp(), x.var(0, correction=0))


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


def test_learned_and_instance_statistics_of_clusters_are_not_estimated():
    for statistics in ("learned", "instance"):
        assert not statistics_layers(make_norm("scb", 3, 2, statistics=statistics))
        with pytest.raises(ValueError, match="expected at least one layer that stores statistics"):
            recalibrate(make_norm("scb", 3, 2, statistics=statistics), [torch.randn(4, 3, 5)])


def test_batch_norms_of_a_network_come_out_as_by_update_bn():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    x = torch.randn(240, 3, 12, 12)
    twin = copy.deepcopy(model)
    twin[3] = nn.Identity()  # for the dropout that evaluation leaves out, and update_bn does not
    for batches in (list(x.split(80)), [x]):
        torch.optim.swa_utils.update_bn(batches, twin)
        recalibrate(model, batches)
        for name, want in twin.state_dict().items():
            if "running" in name:
                torch.testing.assert_close(model.state_dict()[name], want, rtol=2e-3, atol=2e-4)


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


def test_a_mixture_learned_by_gradients_is_no_estimate():
    with pytest.raises(ValueError, match="expected at least one layer that stores statistics"):
        recalibrate(UCBNorm(2, 2, update="weight"), [inputs()])
    with pytest.raises(ValueError, match=r"^update: expected 'moving_average'"):
        UCBNorm(2, 2, update="weight").calibrate([inputs()])
