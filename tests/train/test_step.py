"""What an update makes of a loss and the parts of a step."""

import contextlib
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.data import Batch
from common.runtime.distributed import Env
from common.train.config import RunConfig
from common.train.guard import StepGuard, Update, frozen
from common.train.state import Parts as Parts_

DEVICE = torch.device("cpu")


class Parts:
    """One linear map, wrapped as `wrapped` says."""

    def __init__(self, wrapped: object) -> None:
        torch.manual_seed(0)
        self.networks = {"net": nn.Linear(2, 1, bias=False)}
        self.optimizers = {"net": torch.optim.SGD(self.networks["net"].parameters(), 1.0, fused=True)}
        self.scalers = {"net": torch.amp.GradScaler("cpu", enabled=False)}
        self.wrapped, self.at, self.seed = {"net": wrapped, "other": object()}, {"step": 5}, 11


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
def test_ranks_average_gradients_once_a_step_in_its_last_part(count):
    wrapper = Wrapper()
    parts = cast(Any, Parts(wrapper))
    net = parts.networks["net"]
    before, seen = net.weight.detach().clone(), []
    guard = StepGuard([net], ["loss/net"], DEVICE)
    update = Update(parts, guard, batches(count), DEVICE, "fp32", None)
    guard.begin(1)

    def loss(part):
        value = net(torch.ones(1, 2)).sum() * (part.number + 1)
        value.register_hook(lambda gradient: seen.append(wrapper.apart))  # when it goes backward
        return value

    update.descend("net", loss)
    assert seen == [True] * (count - 1) + [False]
    # The mean over the parts, numbered through the run: step 5 has parts 5 * count, ...
    factors = [5 * count + number + 1 for number in range(count)]
    assert [(part.number, part.seed) for part in update.parts] == [(factor - 1, 11) for factor in factors]
    mean = sum(factors) / count
    torch.testing.assert_close(net.weight.detach(), before - mean)
    assert update.values.keys() == {"loss/net", "gradient/net"}
    assert float(update.values["loss/net"]) == pytest.approx(float(before.sum()) * mean, rel=1e-5)
    assert float(update.values["gradient/net"]) == pytest.approx(2**0.5 * mean)


def test_parts_hold_their_own_batches():
    update = Update(cast(Any, Parts(None)), cast(Any, None), batches(2), DEVICE, "fp32", None)
    assert [part["train"].labels.tolist() for part in update.parts] == [[0, 0], [1, 1]]


def test_what_is_frozen_learns_again_afterwards_even_after_an_error():
    net = nn.Linear(1, 1)
    with frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ZeroDivisionError), frozen(net):
        _ = 1 / 0
    assert all(p.requires_grad for p in net.parameters())


def test_averages_take_counters_over_and_nothing_from_a_step_that_was_refused():
    cfg = RunConfig(ema=0.75)
    parts = Parts_(cfg, DEVICE, Env(), lambda: {"net": nn.BatchNorm1d(2)}, lambda _: {}, ("net",))
    network, average = cast(nn.BatchNorm1d, parts.networks["net"]), cast(nn.BatchNorm1d, parts.averages["net"])
    assert network.num_batches_tracked is not None
    assert average.num_batches_tracked is not None
    assert not any(parameter.requires_grad for parameter in average.parameters())
    for good, weight, count in ((True, 2.0, 7), (False, 2.0, 7), (True, 2.75, 9)):
        with torch.no_grad():
            network.weight.fill_(5.0)
            network.num_batches_tracked.fill_(count if good else 8)
        parts.average(0.75, torch.tensor(good))
        assert average.weight.tolist() == [weight] * 2  # 1, 1 + (5 - 1) / 4, 2 + (5 - 2) / 4
        assert average.num_batches_tracked.item() == count
