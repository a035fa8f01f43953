"""Health of mixture layers: known states, no side effects, warnings."""

import math

import pytest
import torch
from norm_cases import assert_state, batch, state
from torch import nn

from common.norms import Health, MixtureNorm, UCBNorm, collect_health, health, log_scalars, mixture_layers
from common.norms.backends.reference import posterior


def layer_at(*means: float, channels: int = 1, **options) -> UCBNorm:
    """Make a layer of two components or more at means that all channels share."""
    layer = UCBNorm(channels, len(means), **options)
    layer.mean.copy_(torch.tensor(means)[:, None].expand_as(layer.mean))
    return layer


def two_clouds() -> tuple[UCBNorm, torch.Tensor]:
    """A layer whose components hold a quarter and three quarters of x, each for certain."""
    layer = UCBNorm(2, 2, groups=1)
    layer.mean.copy_(torch.tensor([[-50.0, 0.0], [50.0, 0.0]]))
    member = torch.tensor([0, 1, 1, 1]).repeat(25)
    x = layer.mean[member] + 0.1 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    return layer, x


QUARTER = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
"""Entropy of a quarter and three quarters."""


def test_certain_components():
    layer, x = two_clouds()
    found = health(layer, x)
    assert found.usage == pytest.approx((0.25, 0.75), rel=1e-6)
    assert found.effective == pytest.approx(math.exp(QUARTER), rel=1e-5)
    assert found.information == pytest.approx(QUARTER, rel=1e-5)
    # rms over two channels of 100 / 1 and 0 / 1.
    assert found.distance == pytest.approx(100 / math.sqrt(2), rel=1e-4)
    assert found.drift < 0.1
    assert found.warnings() == []


def test_drift_is_the_distance_to_the_batch():
    layer, x = two_clouds()
    layer.log_var.fill_(math.log(0.01))
    x[:, 0] += torch.where(x[:, 0] < 0, 0.2, 0.0)  # the first quarter moved by two deviations in one channel
    moved = health(layer, x).drift
    assert moved == pytest.approx(0.25 * 2 / math.sqrt(2), abs=0.1)


def test_posteriors_that_do_not_depend_on_x_carry_no_information():
    """Of components that agree, and of channels that each chose one, where usage is even too."""
    x = batch(0, (50, 2))
    alike = health(layer_at(0, 0, channels=2), x)
    assert alike.effective == pytest.approx(2)
    assert alike.distance == 0
    chosen = UCBNorm(2, 2)
    chosen.mean.copy_(torch.tensor([[0.0, 99.0], [99.0, 0.0]]))
    for found in (alike, health(chosen, x)):
        assert found.usage == pytest.approx((0.5, 0.5), abs=1e-6)
        assert found.information == pytest.approx(0, abs=1e-6)
        assert any("information" in line for line in found.warnings())


def certain(component: torch.Tensor) -> Health:
    """Measure a layer of two components on x whose locations belong to these, (N, L), for certain."""
    return health(layer_at(-50, 50), 100.0 * component.float()[:, None] - 50)


def test_sample_information_is_what_posteriors_tell_of_the_sample_at_one_position():
    for component, information, of_sample in (
        (torch.tensor([[0, 1, 1, 1]] * 6), QUARTER, 0.0),  # what position tells, whatever the sample
        (torch.tensor([[0] * 5, [1] * 5, [1] * 5, [1] * 5]), QUARTER, QUARTER),  # what sample tells
        (torch.tensor([[0, 0], [1, 0]] * 3), QUARTER, math.log(2) / 2),  # at one position in two
        (torch.tensor([[0, 1], [1, 0]]), math.log(2), math.log(2)),
    ):
        found = certain(component)
        assert found.information == pytest.approx(information, abs=1e-6)
        assert found.sample_information == pytest.approx(of_sample, abs=1e-6)
        assert len([line for line in found.warnings() if line.startswith("sample")]) == (of_sample == 0)
    alone = certain(torch.tensor([[0, 1, 0, 1]]))
    assert alone.sample_information is None
    assert alone.warnings() == []
    assert "health/0/sample_information" not in log_scalars({"0": alone})


def test_information_is_that_of_the_sample_and_that_of_the_position():
    layer = UCBNorm(4, 3, groups=2, momentum=0.0)
    x = batch(0, (5, 4, 6)) + torch.linspace(-1, 1, 6)
    tau = layer.posterior(x).double()
    found = health(layer, x)
    of_sample = of_position = 0.0
    for group in range(2):
        for at in range(6):
            mean = tau[:, :, group, at].mean(1)
            for row in tau[:, :, group, at].T:
                of_sample += sum(float(p * (p / m).log()) for p, m in zip(row, mean, strict=True)) / 60
            overall = tau[:, :, group].mean((1, 2))
            of_position += sum(float(m * (m / o).log()) for m, o in zip(mean, overall, strict=True)) / 12
    assert min(of_sample, of_position) > 0.01
    assert found.sample_information == pytest.approx(of_sample, rel=1e-4)
    assert found.information == pytest.approx(of_sample + of_position, rel=1e-4)


def test_dead_channels_are_those_whose_least_component_is_hardly_used():
    member = torch.zeros(200, 8).long()
    for channel, used in enumerate((100, 100, 100, 100, 4, 1, 0, 0)):  # of 200; three of these hold below 1 %
        member[:used, channel] = 1
    found = health(layer_at(-50, 50, channels=8), 100.0 * member.float() - 50)
    assert found.dead_channels == pytest.approx(3 / 8)
    assert found.warnings() == [
        "38 % of the channel groups have a component that holds less than 1 % of their locations, more than 10 %"
    ]
    assert health(layer_at(-50, 50, channels=8, groups=2), 100.0 * member.float() - 50).dead_channels == 0.5
    assert health(UCBNorm(8, 1), torch.randn(9, 8)).dead_channels == 0


def test_warnings_have_their_limits_and_what_follows_from_one_is_not_said_again():
    def lines(least=0.4, information=1.0, of_sample: float | None = 1.0, dead=0.0) -> list[str]:
        return Health((least, 1 - least), 1.5, information, 1, 0, of_sample, dead).warnings()

    assert lines(0.011, 0.051) == lines(of_sample=0.021, dead=0.1) == lines(of_sample=None) == []
    assert lines(0.009, 0.051) == ["component 0 holds 0.9 % of the locations, less than 1 %"]
    acts = "information is 0.049 nats, less than 0.05: the layer acts as BatchNorm"
    assert lines(0.011, 0.049) == lines(0.011, 0.049, 0.0) == [acts]
    assert lines(of_sample=0.0125) == [
        "sample information is 0.013 nats, less than 0.02: the posteriors tell where a location is, not what is there"
    ]
    assert [line.split()[0] for line in lines(math.nan, math.nan)] == ["component", "component", "information"]
    for found, first in (
        (lines(of_sample=0.019), "sample"),
        (lines(of_sample=math.nan), "sample"),
        (lines(dead=0.11), "11"),
        (lines(dead=1.0, least=0.001), "component"),
        (lines(dead=1.0, of_sample=0.0), "sample"),
    ):
        assert [line.split()[0] for line in found] == [first]


def test_the_distance_is_the_least():
    layer = layer_at(0, 9, 6, channels=2, eps=1.0)
    assert health(layer, torch.randn(9, 2)).distance == pytest.approx(3 / math.sqrt(2))  # variances of 1 + eps


def test_posteriors_are_those_of_the_stored_mixture():
    layer = UCBNorm(4, 3, groups=2, eps=0.5, channel_dim=-1)
    layer.logits.copy_(torch.tensor([0.0, 1.0, 2.0]))
    x = batch(0, (5, 4, 6))
    want = posterior(x, layer.log_weights(), layer.mean, torch.full((3, 4), 1.5), groups=2)
    torch.testing.assert_close(layer.posterior(x.movedim(1, -1)), want)


def test_one_component_warns_of_nothing_and_has_no_distance():
    found = health(UCBNorm(2, 1), torch.randn(9, 2))
    assert found.warnings() == []
    assert found.distance == math.inf
    scalars = log_scalars({"layer": found})
    assert "health/layer/distance" not in scalars
    assert all(math.isfinite(value) for value in scalars.values())
    with pytest.raises(ValueError, match="x: expected at least one location"):
        health(UCBNorm(2, 2), torch.empty(0, 2))


def network(**options) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        UCBNorm(4, 3, **options),
        nn.BatchNorm2d(4),
        nn.Sequential(MixtureNorm(4, 2), nn.ReLU()),
    )


@pytest.mark.parametrize(
    ("training", "options"),
    [(False, {}), (True, {"init": "kmeans++", "update": "weight"}), (True, {"reseed": 0.3, "momentum": 1.0})],
    ids=["eval", "weight", "reseed"],
)
def test_collecting_changes_nothing(training, options):
    torch.manual_seed(0)
    model, twin = (network(**options).train(training) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = batch(0, (6, 3, 4, 4))
    with collect_health(model) as found, torch.no_grad():
        model(x)
    assert set(found) == {"1", "3.0"} == set(mixture_layers(model))
    assert_state(model, state(twin))
    assert torch.equal(model(x), twin(x))
    assert_state(model, state(twin))
    assert len(found) == 2
    before = state(model)

    def interrupted() -> None:
        with collect_health(model):
            model(x)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert_state(model, before)
    assert not any(layer._forward_pre_hooks for layer in mixture_layers(model).values())


def test_collecting_between_steps_leaves_later_draws_as_they_were():
    """More locations than a fit takes: which ones it draws follows from the batches counted."""
    layer, twin = MixtureNorm(2, 2), MixtureNorm(2, 2)
    x = batch(0, (3, 2, 2000))
    for _ in range(3):
        with collect_health(layer), torch.no_grad():
            layer(x)
        assert torch.equal(layer(x), twin(x))
    assert int(layer.step) == 3


def test_collected_health_is_that_of_the_layers_own_input():
    model, x = network(), batch(0, (6, 3, 4, 4))
    with collect_health(model) as found, torch.no_grad():
        model(x)
    assert found["1"] == health(mixture_layers(model)["1"], model[0](x))
    tags = log_scalars(found)
    assert tags["health/3.0/usage_min"] == min(found["3.0"].usage)
    names = {"effective", "information", "sample_information", "dead_channels", "distance", "drift"}
    assert all(tags[f"health/1/{name}"] == getattr(found["1"], name) for name in names)
    assert set(tags) == {f"health/{layer}/{name}" for layer in ("1", "3.0") for name in names | {"usage_min"}}


def test_a_layer_called_by_keyword_is_measured_and_one_fed_nothing_is_not():
    layer, x = UCBNorm(4, 2).eval(), batch()
    with collect_health(layer) as found:
        layer(x=x)
    assert found == {"UCBNorm": health(layer, x)}
    with collect_health(layer) as found:
        layer(torch.empty(0, 4, 2))
    assert found == {}


def test_a_layer_not_yet_seeded_is_measured_as_its_first_batch_would_seed_it_and_in_evaluation_as_it_is():
    x = batch().movedim(1, -1)
    layer, twin = (UCBNorm(4, 3, init="kmeans++", channel_dim=-1, momentum=momentum) for momentum in (0.1, 0.0))
    with collect_health(layer) as found, torch.no_grad():
        layer(x)
    twin(x)
    want = health(twin, x)
    assert found["UCBNorm"].usage == pytest.approx(want.usage, rel=1e-5)
    assert found["UCBNorm"].distance == pytest.approx(want.distance, rel=1e-5)
    assert not layer.is_initialized()
    with collect_health(layer) as found, torch.no_grad():
        layer.eval()(x)
    assert found["UCBNorm"] == health(layer, x)


def test_a_graph_made_while_collecting_still_has_its_gradients():
    layer = UCBNorm(4, 3, update="weight").eval()
    with collect_health(layer):
        loss = layer(batch()).square().sum()
    loss.backward()
    assert layer.mean.grad is not None
