"""What a step makes of a loss and its micro-batches."""

import contextlib
import copy
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.data import Batch
from common.runtime.distributed import Env
from common.train.config import RunConfig
from common.train.guard import StepGuard
from common.train.state import TrainState
from common.train.step import Metrics, MicroBatch, Step

DEVICE = torch.device("cpu")


def state(ddp: object = None) -> TrainState:
    """One linear map, wrapped for ranks as ``ddp`` is."""
    torch.manual_seed(0)
    networks = {"net": nn.Linear(2, 1, bias=False), "other": nn.Linear(1, 1)}
    optimizers = {"net": torch.optim.SGD(networks["net"].parameters(), 1.0, fused=True)}
    made = TrainState(
        RunConfig(seed=11), DEVICE, Env(), networks, {}, cast(Any, {"net": ddp, "other": object()}), optimizers
    )
    made.run.step = 5
    return made


def guard(made: TrainState) -> StepGuard:
    guard = StepGuard(made.networks.values(), ["loss/net"], DEVICE)
    guard.begin(1)
    return guard


def batches(count: int) -> list[dict[str, Batch]]:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    return [
        {"train": Batch((images + number,), torch.tensor([number, number]), torch.arange(2))} for number in range(count)
    ]


class Wrapper(DistributedDataParallel):
    """Says when ranks would leave their gradients apart."""

    apart = False

    def __init__(self) -> None:
        pass

    @contextlib.contextmanager
    def no_sync(self) -> Any:
        self.apart = True
        yield
        self.apart = False


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_average_gradients_once_a_step_in_its_last_micro_batch(count):
    wrapper = Wrapper()
    made = state(wrapper)
    net = cast(nn.Linear, made.networks["net"])
    before, seen = net.weight.detach().clone(), []
    step = Step(made, guard(made), batches(count), RunConfig())
    assert [micro["train"].labels.tolist() for micro in step.micro_batches] == [[n, n] for n in range(count)]

    def loss(micro: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        value = net(torch.ones(1, 2)).sum() * (micro.number + 1)
        value.register_hook(lambda gradient: seen.append(wrapper.apart))  # when it goes backward
        rare = {"number": torch.tensor(float(micro.number))} if micro is step.micro_batches[-1] else {}
        return value, Metrics({"twice": 2 * value}, rare)

    metrics = step.optimize("net", loss)
    assert seen == [True] * (count - 1) + [False]
    # The mean over the micro-batches, numbered through the run: step 5 has 5 * count, ...
    factors = [5 * count + number + 1 for number in range(count)]
    assert [(micro.number, micro.seed) for micro in step.micro_batches] == [(factor - 1, 11) for factor in factors]
    mean = sum(factors) / count
    torch.testing.assert_close(net.weight.detach(), before - mean)
    assert metrics.step.keys() == {"loss/net", "gradient/net", "twice"}
    assert float(metrics.step["loss/net"]) == pytest.approx(float(before.sum()) * mean, rel=1e-5)
    assert float(metrics.step["twice"]) == pytest.approx(2 * float(before.sum()) * mean, rel=1e-5)
    assert not metrics.step["twice"].requires_grad
    assert metrics.epoch == {"number": factors[-1] - 1}  # of those that have it
    assert float(metrics.step["gradient/net"]) == pytest.approx(2**0.5 * mean)


def test_a_frozen_network_has_no_gradients_and_learns_again_afterwards_even_after_an_error():
    made = state()
    net, other = (cast(nn.Linear, made.networks[name]) for name in ("net", "other"))
    step = Step(made, guard(made), batches(1), RunConfig())
    before = net.weight.detach().clone()
    step.optimize("net", lambda _: other(net(torch.ones(1, 2))).sum(), frozen=["other"])
    assert not torch.equal(net.weight, before)  # gradients flow through it
    assert other.weight.grad is None
    assert all(p.requires_grad for p in other.parameters())
    with pytest.raises(ZeroDivisionError):
        step.optimize("net", lambda _: torch.tensor(1 / 0), frozen=["other"])
    assert all(p.requires_grad for p in other.parameters())


def test_averages_take_counters_over_and_nothing_from_a_step_that_was_refused():
    network = nn.BatchNorm1d(2)
    average = copy.deepcopy(network)
    made = TrainState(RunConfig(), DEVICE, Env(), {"net": network}, {"net": average}, {}, {})
    assert network.num_batches_tracked is not None
    assert average.num_batches_tracked is not None
    for good, weight, count in ((True, 2.0, 7), (False, 2.0, 7), (True, 2.75, 9)):
        with torch.no_grad():
            network.weight.fill_(5.0)
            network.num_batches_tracked.fill_(count if good else 8)
            average.requires_grad_(False)
        made.update_averages(0.75, torch.tensor(good))
        assert average.weight.tolist() == [weight] * 2  # 1, 1 + (5 - 1) / 4, 2 + (5 - 2) / 4
        assert average.num_batches_tracked.item() == count
