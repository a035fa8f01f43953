"""Health of mixture layers: known states, no side effects, warnings."""

import math

import pytest
import torch
from norm_cases import mixture_case
from torch import nn

from common.norms import Health, MixtureNorm, UCBNorm, collect_health, health, log_scalars, mixture_layers
from common.norms.backends.reference import posterior


def two_clouds() -> tuple[UCBNorm, torch.Tensor]:
    """A layer whose components hold a quarter and three quarters of x, each for certain."""
    layer = UCBNorm(2, 2, groups=1)
    layer.mean.copy_(torch.tensor([[-50.0, 0.0], [50.0, 0.0]]))
    member = torch.tensor([0, 1, 1, 1]).repeat(25)
    x = layer.mean[member] + 0.1 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    return layer, x


def test_certain_components():
    layer, x = two_clouds()
    found = health(layer, x)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found.usage == pytest.approx((0.25, 0.75), rel=1e-6)
    assert found.effective == pytest.approx(math.exp(entropy), rel=1e-5)
    assert found.information == pytest.approx(entropy, rel=1e-5)
    # rms over two channels of 100 / 1 and 0 / 1.
    assert found.distance == pytest.approx(100 / math.sqrt(2), rel=1e-4)
    assert found.drift < 0.1
    assert found.warnings() == []


def test_drift_is_the_distance_to_the_batch():
    layer, x = two_clouds()
    layer.log_var.fill_(math.log(0.01))
    x[:, 0] += torch.where(x[:, 0] < 0, 0.2, 0.0)  # the first quarter moved by two deviations in one channel
    moved = health(layer, x).drift
    layer.log_var.fill_(math.log(x[25:, 1].var()))
    assert moved == pytest.approx(0.25 * 2 / math.sqrt(2), abs=0.1)


def test_identical_components_carry_no_information():
    layer = UCBNorm(2, 2)
    layer.mean.zero_()
    found = health(layer, mixture_case((50, 2), num=1, dtype=torch.float32)[0])
    assert found.usage == pytest.approx((0.5, 0.5))
    assert found.effective == pytest.approx(2)
    assert found.information == pytest.approx(0, abs=1e-6)
    assert found.distance == 0
    assert any("information" in line for line in found.warnings())


def test_channels_that_each_chose_one_component_carry_no_information():
    """Usage is even, yet no posterior depends on x: each channel is BatchNorm."""
    layer = UCBNorm(2, 2)
    layer.mean.copy_(torch.tensor([[0.0, 99.0], [99.0, 0.0]]))
    found = health(layer, mixture_case((50, 2), num=1, dtype=torch.float32)[0])
    assert found.usage == pytest.approx((0.5, 0.5), abs=1e-6)
    assert found.information == pytest.approx(0, abs=1e-6)


def test_warnings_begin_below_a_hundredth_of_the_locations_and_a_twentieth_of_a_nat():
    def state(least: float, information: float) -> Health:
        return Health((least, 1 - least), effective=1.5, information=information, distance=1, drift=0)

    assert state(0.011, 0.051).warnings() == []
    assert state(0.009, 0.051).warnings() == ["component 0 holds 0.9 % of the locations, less than 1 %"]
    assert state(0.011, 0.049).warnings() == ["information is 0.049 nats, less than 0.05: the layer acts as BatchNorm"]
    assert len(state(math.nan, math.nan).warnings()) == 3


def certain(component: torch.Tensor) -> Health:
    """Measure a layer of two components on x whose locations belong to these, (N, L), for certain."""
    layer = UCBNorm(1, 2)
    layer.mean.copy_(torch.tensor([[-50.0], [50.0]]))
    return health(layer, 100.0 * component.float()[:, None] - 50)


QUARTER = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))


@pytest.mark.parametrize(
    ("component", "information", "content"),
    [
        (torch.tensor([[0, 1, 1, 1]] * 6), QUARTER, 0.0),  # what position tells, whatever the sample
        (torch.tensor([[0] * 5, [1] * 5, [1] * 5, [1] * 5]), QUARTER, QUARTER),  # what sample tells
        (torch.tensor([[0, 0], [1, 0]] * 3), QUARTER, math.log(2) / 2),  # at one position in two
        (torch.tensor([[0, 1], [1, 0]]), math.log(2), math.log(2)),
    ],
    ids=["position", "sample", "one position", "both"],
)
def test_content_is_what_is_told_of_the_sample_at_one_position(component, information, content):
    found = certain(component)
    assert found.information == pytest.approx(information, abs=1e-6)
    assert found.sample_information == pytest.approx(content, abs=1e-6)
    lines = [line for line in found.warnings() if line.startswith("sample")]
    assert len(lines) == (content == 0)


def test_information_is_content_and_what_is_told_of_the_position():
    layer = UCBNorm(4, 3, groups=2, momentum=0.0)
    x = mixture_case((5, 4, 6), num=1, dtype=torch.float32)[0] + torch.linspace(-1, 1, 6)
    tau = layer.posterior(x).double()
    found = health(layer, x)
    content = position = 0.0
    for group in range(2):
        for at in range(6):
            mean = tau[:, :, group, at].mean(1)
            for row in tau[:, :, group, at].T:
                content += sum(float(p * (p / m).log()) for p, m in zip(row, mean, strict=True)) / 60
            overall = tau[:, :, group].mean((1, 2))
            position += sum(float(m * (m / o).log()) for m, o in zip(mean, overall, strict=True)) / 12
    assert min(content, position) > 0.01
    assert found.sample_information == pytest.approx(content, rel=1e-4)
    assert found.information == pytest.approx(content + position, rel=1e-4)


def test_one_sample_has_no_content_and_no_warning_of_it():
    found = certain(torch.tensor([[0, 1, 0, 1]]))
    assert found.sample_information is None
    assert found.warnings() == []
    assert "health/0/sample_information" not in log_scalars({"0": found})


def test_dead_channels_are_those_whose_least_component_is_hardly_used():
    layer = UCBNorm(8, 2)
    layer.mean.copy_(torch.tensor([[-50.0] * 8, [50.0] * 8]))
    member = torch.zeros(200, 8).long()
    for channel, used in enumerate((100, 100, 100, 100, 4, 1, 0, 0)):  # of 200; three of these hold below 1 %
        member[:used, channel] = 1
    found = health(layer, 100.0 * member.float() - 50)
    assert found.dead_channels == pytest.approx(3 / 8)
    assert found.warnings() == [
        "38 % of the channel groups have a component that holds less than 1 % of their locations, more than 10 %"
    ]
    joint = UCBNorm(8, 2, groups=2)
    joint.mean.copy_(layer.mean)
    assert health(joint, 100.0 * member.float() - 50).dead_channels == 0.5
    assert health(UCBNorm(8, 1), torch.randn(9, 8)).dead_channels == 0


def test_what_follows_from_a_warning_is_not_said_again():
    def lines(least: float = 0.4, information: float = 1.0, content: float | None = 1.0, dead: float = 0.0) -> list:
        found = Health((least, 1 - least), 1.5, information, 1, 0, content, dead).warnings()
        return [line.split(" ")[0] for line in found]

    assert lines(content=0.021, dead=0.1) == []
    assert lines(content=None) == []
    assert lines(content=0.019) == ["sample"]
    assert lines(content=math.nan) == ["sample"]
    assert lines(information=0.01, content=0.0) == ["information"]
    assert lines(dead=0.11) == ["11"]
    assert lines(dead=1.0, least=0.001) == ["component"]
    assert lines(dead=1.0, content=0.0) == ["sample"]
    (line,) = Health((0.5, 0.5), 2, 1, 1, 0, 0.0125).warnings()
    assert line == (
        "sample information is 0.013 nats, less than 0.02: the posteriors tell where a location is, not what is there"
    )


def test_the_distance_is_the_least():
    layer = UCBNorm(2, 3, eps=1.0)
    layer.mean.copy_(torch.tensor([[0.0, 0.0], [9.0, 9.0], [6.0, 6.0]]))
    assert health(layer, torch.randn(9, 2)).distance == pytest.approx(3 / math.sqrt(2))  # variances of 1 + eps


def test_posteriors_are_those_of_the_stored_mixture():
    layer = UCBNorm(4, 3, groups=2, eps=0.5, channel_dim=-1)
    layer.logits.copy_(torch.tensor([0.0, 1.0, 2.0]))
    x = mixture_case((5, 4, 6), num=1, dtype=torch.float32)[0]
    want = posterior(x, layer.log_weights(), layer.mean, torch.full((3, 4), 1.5), groups=2)
    torch.testing.assert_close(layer.posterior(x.movedim(1, -1)), want)


def test_one_component_warns_of_nothing_and_has_no_distance():
    found = health(UCBNorm(2, 1), torch.randn(9, 2))
    assert found.warnings() == []
    assert found.distance == math.inf
    scalars = log_scalars({"layer": found})
    assert "health/layer/distance" not in scalars
    assert all(math.isfinite(value) for value in scalars.values())


def test_an_empty_batch_is_refused():
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
    [
        (False, {}),
        (True, {"init": "kmeans++", "update": "weight"}),
        (True, {"reseed": 0.3, "momentum": 1.0}),
    ],
    ids=["eval", "weight", "reseed"],
)
def test_collecting_changes_nothing(training, options):
    torch.manual_seed(0)
    model = network(**options).train(training)
    twin = network(**options).train(training)
    twin.load_state_dict(model.state_dict())
    x = mixture_case((6, 3, 4, 4), num=1, dtype=torch.float32)[0]
    with collect_health(model) as found, torch.no_grad():
        model(x)
    assert set(found) == {"1", "3.0"} == set(mixture_layers(model))
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model(x), twin(x))
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        model(x)
    assert len(found) == 2


def test_collecting_between_steps_leaves_later_draws_as_they_were():
    """More locations than a fit takes: which ones it draws follows from the batches counted."""
    layer, twin = MixtureNorm(2, 2), MixtureNorm(2, 2)
    x = mixture_case((3, 2, 2000), num=1, dtype=torch.float32)[0]
    for _ in range(3):
        with collect_health(layer), torch.no_grad():
            layer(x)
        assert torch.equal(layer(x), twin(x))
    assert int(layer.step) == 3


def test_collected_health_is_that_of_the_layers_own_input():
    model = network()
    x = mixture_case((6, 3, 4, 4), num=1, dtype=torch.float32)[0]
    with collect_health(model) as found, torch.no_grad():
        model(x)
    first = mixture_layers(model)["1"]
    assert found["1"] == health(first, model[0](x))
    tags = log_scalars(found)
    assert tags["health/1/information"] == found["1"].information
    assert tags["health/3.0/usage_min"] == min(found["3.0"].usage)
    names = {"usage_min", "effective", "information", "sample_information", "dead_channels", "distance", "drift"}
    assert set(tags) == {f"health/{layer}/{name}" for layer in ("1", "3.0") for name in names}
    assert tags["health/1/sample_information"] == found["1"].sample_information
    assert tags["health/1/dead_channels"] == found["1"].dead_channels


def test_a_layer_called_by_keyword_is_measured():
    layer, x = UCBNorm(4, 2).eval(), mixture_case((6, 4, 5), num=1, dtype=torch.float32)[0]
    with collect_health(layer) as found:
        layer(x=x)
    assert found == {"UCBNorm": health(layer, x)}


def test_a_layer_not_yet_seeded_is_measured_as_its_first_batch_would_seed_it():
    x = mixture_case((6, 4, 5), num=1, dtype=torch.float32)[0].movedim(1, -1)
    layer, twin = (UCBNorm(4, 3, init="kmeans++", channel_dim=-1, momentum=momentum) for momentum in (0.1, 0.0))
    with collect_health(layer) as found, torch.no_grad():
        layer(x)
    twin(x)
    want = health(twin, x)
    assert found["UCBNorm"].usage == pytest.approx(want.usage, rel=1e-5)
    assert found["UCBNorm"].distance == pytest.approx(want.distance, rel=1e-5)
    assert not layer.is_initialized()


def test_in_evaluation_a_layer_not_yet_seeded_is_measured_as_it_is():
    x = mixture_case((6, 4, 5), num=1, dtype=torch.float32)[0]
    layer = UCBNorm(4, 3, init="kmeans++").eval()
    with collect_health(layer) as found, torch.no_grad():
        layer(x)
    assert found["UCBNorm"] == health(layer, x)


def test_a_layer_that_is_fed_nothing_has_no_health():
    layer = UCBNorm(4, 3)
    with collect_health(layer) as found, torch.no_grad():
        layer(torch.empty(0, 4, 2))
    assert found == {}


def test_a_graph_made_while_collecting_still_has_its_gradients():
    layer = UCBNorm(4, 3, update="weight").eval()
    with collect_health(layer):
        loss = layer(mixture_case((6, 4, 5), num=1, dtype=torch.float32)[0]).square().sum()
    loss.backward()
    assert layer.mean.grad is not None


def test_an_exception_still_puts_everything_back():
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = mixture_case((6, 3, 4, 4), num=1, dtype=torch.float32)[0]

    def interrupted() -> None:
        with collect_health(model):
            model(x)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(layer._forward_pre_hooks for layer in mixture_layers(model).values())
