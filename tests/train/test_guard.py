import copy
import math

import pytest
import torch
from torch import Tensor, nn

from common.runtime.errors import NonFiniteError
from common.train.guard import StepGuard

DEVICE = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


class _Spoil(torch.autograd.Function):
    """The identity with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return torch.full_like(gradients[0], ctx.value), None


def one_step(net, guard, optimizer, scaler, step: int, *, loss_value=None, gradient_value=None) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    guard.begin(step)
    y = net(x)
    if gradient_value is not None:
        y = _Spoil.apply(y, gradient_value)
    assert isinstance(y, Tensor)
    loss = y.square().mean()
    if loss_value is not None:
        loss = loss * 0 + loss_value
    guard.update("loss/d", [loss], 1, optimizer, scaler)
    guard.finish()


def snapshot(net, optimizer) -> list[Tensor]:
    moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return [t.clone() for t in [*net.state_dict().values(), *moments]]


def setup(fp16: bool = False):
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
    return (
        net,
        StepGuard([net], ["loss/d", "loss/g"], DEVICE),
        optimizer,
        torch.amp.GradScaler("cpu", enabled=fp16),
    )


BAD = [{"loss_value": math.nan}, {"loss_value": math.inf}, {"gradient_value": math.nan}, {"gradient_value": -math.inf}]


@pytest.mark.parametrize("fp16", [False, True])
def test_a_bad_step_changes_nothing_then_or_later(fp16):
    for bad in BAD[:2] if fp16 else BAD:  # a gradient that overflows float16 lowers its scale
        net, guard, optimizer, scaler = setup(fp16)
        one_step(net, guard, optimizer, scaler, 1)
        guard.check()
        before = snapshot(net, optimizer)
        one_step(net, guard, optimizer, scaler, 2, **bad)
        one_step(net, guard, optimizer, scaler, 3)  # the host has not looked yet: the flag must hold by itself
        for was, now in zip(before, snapshot(net, optimizer), strict=True):
            assert torch.equal(was, now)
        term = "loss/d" if "loss_value" in bad else "gradient/d"
        with pytest.raises(NonFiniteError, match=rf"{term} is not finite in step 2"):
            guard.check()


def test_float16_lowers_its_scale_and_gives_up_only_far_down():
    net, guard, optimizer, scaler = setup(fp16=True)
    one_step(net, guard, optimizer, scaler, 1)
    weights = copy.deepcopy(list(net.parameters()))
    scale = scaler.get_scale()
    one_step(net, guard, optimizer, scaler, 2, gradient_value=math.inf)
    guard.check()
    assert scaler.get_scale() == scale / 2
    for was, now in zip(weights, net.parameters(), strict=True):
        assert torch.equal(was, now)
    with pytest.raises(NonFiniteError, match="gradient/d"):  # noqa: PT012 - which step gives up is not the point
        for number in range(3, 60):
            one_step(net, guard, optimizer, scaler, number, gradient_value=math.inf)
            guard.check()
    assert scaler.get_scale() < 2**-10


def test_good_steps_are_those_of_a_plain_loop():
    net, guard, optimizer, scaler = setup()
    plain = network()
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=0.1, fused=True)
    for number in range(1, 6):
        one_step(net, guard, optimizer, scaler, number)
        guard.check()
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        plain_optimizer.zero_grad()
        plain(x).square().mean().backward()
        plain_optimizer.step()
    for ours, theirs in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_huge_but_finite_gradients_pass():
    net, guard, optimizer, scaler = setup()
    one_step(net, guard, optimizer, scaler, 1, gradient_value=1e25)  # its square overflows float32
    guard.check()
