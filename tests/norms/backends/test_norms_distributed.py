"""Statistics over ranks: two gloo processes against one process with the joined batch."""

import itertools
import math
import multiprocessing
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from norm_cases import any_norm, assert_state, assert_within_budget, batch, mixture_case, state
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from common.norms import DomainBatchNorm, UCBNorm, convert_norms
from common.norms.backends import distributed

TIMEOUT = 600
"""Seconds: many times what a busy machine takes, and yet an end to a rank that waits for one that does not come."""
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
COLLECTIVES = (GATHER, "all_gather", "all_reduce", "broadcast", "all_gather_object", "barrier")
STEPS = 2

# Options of the layer; samples of the two ranks; shape of a sample; what is done to x.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, ...], str]] = {
    "channel by channel": ({}, (3, 3), (4, 5), ""),
    "groups, sqrt_k, plain average": ({"groups": 2, "scale": "sqrt_k", "average": "paper"}, (3, 3), (4, 5), ""),
    "learned joint": ({"update": "weight", "groups": 1}, (2, 4), (4, 5), ""),
    "uneven, of a group": ({"groups": 1, "process_group": "a group"}, (1, 5), (4, 2, 3), ""),
    "one location here": ({}, (1, 7), (4,), ""),
    "nothing here": ({"update": "weight"}, (0, 6), (4, 5), ""),
    "nothing there": ({}, (6, 0), (4, 5), ""),
    "a component empty here": ({"groups": 1}, (3, 4), (4, 5), "apart"),
    "offset": ({"groups": 1}, (3, 4), (4, 5), "offset"),
    "kmeans++": ({"init": "kmeans++"}, (2, 4), (4, 5), ""),
    "kmeans++, nothing here": ({"init": "kmeans++", "update": "weight"}, (0, 4), (4, 5), ""),
    "one component, channels last": ({"num_components": 1, "channel_dim": -1}, (3, 4), (5, 4), ""),
}
DTYPES = (torch.float64, torch.float32)


def layer_of(case: str, dtype: torch.dtype, **process_group: Any) -> UCBNorm:
    options, _, _, change = CASES[case]
    full: dict[str, Any] = {"num_components": 3} | options | process_group
    layer = UCBNorm(4, **full)
    if change == "apart":
        layer.mean.copy_(torch.tensor([-50.0, 0.0, 50.0])[:, None].expand(3, 4))
    if change == "offset":
        layer.mean.add_(1000)
    return layer.to(dtype)


def joined_batch(case: str, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the joined batch of a step, and the gradient of its output."""
    _, counts, shape, change = CASES[case]
    x, *_, g = mixture_case((sum(counts), *shape), num=1, dtype=torch.float32, seed=step)
    if change == "apart":  # rank 0 sees the first component alone, no rank the last
        x[: counts[0]] -= 50
    if change == "offset":  # each rank's own on top of one that takes four digits
        x += 1000
        x[counts[0] :] += 3
    return x.to(dtype), g.to(dtype)


def train(layer: UCBNorm, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Take some steps; return outputs and gradients, stacked, and the state."""
    found: dict[str, list[Tensor]] = {"y": [], "dx": []}
    for x, g in batches:
        x.requires_grad_()
        y = layer(x)
        parameters = dict(layer.named_parameters())
        dx, *gradients = torch.autograd.grad(y, [x, *parameters.values()], g)
        for name, value in zip(("y", "dx", *parameters), (y, dx, *gradients), strict=True):
            found.setdefault(name, []).append(value.detach())
    stacked = {name: torch.stack(values, 1) if name in ("y", "dx") else sum(values) for name, values in found.items()}
    return stacked | {f"state {name}": value for name, value in state(layer).items()}  # pyright: ignore[reportReturnType]


class Network(nn.Sequential):
    """A model in a checkpoint, if it is checkpointed."""

    checkpointed = False

    def forward(self, input: Tensor) -> Tensor:
        run = super().forward
        return checkpoint(run, input, use_reentrant=False) if self.checkpointed else run(input)


def network(**options: Any) -> Network:
    torch.manual_seed(0)
    return Network(nn.Conv1d(3, 4, 2), UCBNorm(4, 3, **options), nn.ReLU(), nn.Conv1d(4, 2, 2)).double()


def two_forwards(model: nn.Module, rank: int | None) -> dict[str, Tensor]:
    x = batch(0, (8, 2, 3, 6), torch.float64)
    first, second = (x[:, i] if rank is None else x[4 * rank : 4 * rank + 4, i] for i in (0, 1))
    (model(first).square().mean() + model(second).pow(3).mean()).backward()
    module = model.module if isinstance(model, DistributedDataParallel) else model
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return gradients | {f"state {name}": value for name, value in state(module).items()}


SEEDED: dict[str, dict[str, Any]] = {
    "scb": {"init": "data"},
    "scb_base": {"init": "data"},
    "ucb": {"init": "kmeans++", "update": "weight"},
}


def ids_of(kind: str) -> list[Tensor]:
    return [] if kind == "ucb" else [torch.tensor([0, 0, 0, 0, 0, 2])]


def seeded(kind: str, rank: int | None) -> dict[str, Tensor]:
    """Return what two batches leave of a fresh layer; one cluster is in neither, and rank 1 has none of the second."""
    layer = any_norm(kind, 4, 3, **SEEDED[kind]).double()
    for step in range(2):
        x = batch(step, (6, 4, 5), torch.float64)
        mine = slice(None) if rank is None else [slice(2 * step + 4), slice(2 * step + 4, None)][rank]
        layer(x[mine], *(ids[mine] for ids in ids_of(kind)))
    return state(layer)


def numerics(rank: int, group: Any, calls: Counter) -> dict[Any, Any]:
    """Run every case on this rank's share."""
    results: dict[Any, Any] = {}
    for case, (options, counts, _, _) in CASES.items():
        for dtype in DTYPES:
            share = slice(0, counts[0]) if rank == 0 else slice(counts[0], None)
            process_group = group if "process_group" in options else "world"
            batches = [
                (x[share].clone(), g[share]) for x, g in (joined_batch(case, step, dtype) for step in range(STEPS))
            ]
            calls.clear()
            results[case, dtype] = train(layer_of(case, dtype, process_group=process_group), batches)
            results[case, dtype, "calls"] = dict(calls)
    return results


def behaviour(rank: int, calls: Counter) -> dict[Any, Any]:
    """Run what concerns evaluation, batches without numbers, and wrapped models."""
    results: dict[Any, Any] = {}
    x = batch(rank, (4, 4, 5))
    for name in ("not finite", "nothing anywhere"):
        layer = UCBNorm(4, 3, process_group="world")
        layer(x)
        before = state(layer)
        layer(x[:0] if name == "nothing anywhere" else torch.where(torch.tensor(rank == 0), math.nan, x))
        results[name] = before, layer
    layer = UCBNorm(4, 3, process_group="world")
    calls.clear()
    if rank == 0:  # alone: a collective would wait for the other rank
        layer.eval()(x)
        learned = UCBNorm(4, 3, process_group="world", update="weight", statistics="learned")
        learned(x).sum().backward()
    results["evaluation calls"] = dict(calls)
    layer = DomainBatchNorm(4, 2)
    model = DistributedDataParallel(layer)
    for _ in range(2):  # a second pass is refused where the first one left a parameter without a gradient
        model.zero_grad()
        model(x, torch.tensor([0, 0, rank, rank])).square().sum().backward()
    results["domains"] = x, [[p.grad for p in domain.parameters()] for domain in layer.domains]
    placed: Any = UCBNorm(4, 3, update="weight", device="meta")
    fully_shard(placed, mesh=init_device_mesh("cpu", (2,)))
    placed.to_empty(device="cpu").reset_parameters()
    start = {name: t.full_tensor() for name, t in placed.named_parameters()}
    placed(x).square().sum().backward()
    results["from meta"] = x, start, {name: p.grad.full_tensor() for name, p in placed.named_parameters()}
    alone = [dist.new_group([member]) for member in range(2)][rank]
    calls.clear()
    y = UCBNorm(4, 3, process_group=alone)(x)
    results["group of one"] = dict(calls), y, UCBNorm(4, 3)(x)
    for update in ("moving_average", "weight"):
        model = DistributedDataParallel(network(process_group="world", update=update))
        results["two forwards", update] = two_forwards(model, rank)
        model = network(process_group="world", update=update)
        model.checkpointed = True
        results["two forwards", update, "checkpointed"] = two_forwards(DistributedDataParallel(model), rank)
    for kind in SEEDED:
        results["seeded", kind] = seeded(kind, rank)
    for kind, options in SEEDED.items():
        sharded: Any = fully_shard(any_norm(kind, 4, 3, **options), mesh=init_device_mesh("cpu", (2,)))
        try:
            sharded(x, *(ids[:4] for ids in ids_of(kind)))
        except RuntimeError as error:
            results["sharded", kind] = str(error)
    converted: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "asked for": (nn.BatchNorm1d(4), {"process_group": "world"}),
        "synchronised": (nn.SyncBatchNorm(4), {}),
        "of a group": (nn.SyncBatchNorm(4, process_group=alone), {}),
    }
    for name, (norm, options) in converted.items():
        convolution = convert_norms(nn.Sequential(nn.Conv1d(3, 4, 2), norm), "ucb", **options)
        calls.clear()
        convolution(batch(rank, (4, 3, 5)))
        results["converted calls", name] = dict(calls)
    return results


def counting(name: str, call: Any, calls: Counter) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return call(*args, **kwargs)

    return counted


def work(rank: int, folder: str) -> None:
    """Be one of two ranks."""
    warnings.filterwarnings("error", module=r"common\.|test_")  # as in the process that tests
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    calls: Counter = Counter()
    for name in COLLECTIVES:
        setattr(dist, name, counting(name, getattr(dist, name), calls))
    group = dist.new_group([0, 1])
    results = numerics(rank, group, calls) | behaviour(rank, calls)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[Any, Any]]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    ended = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    assert ended == [0, 0], "a rank failed, or did not end in time"
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put the ranks' results together as one process would have them."""
    together = {}
    for name in results[0]:
        values = [result[name] for result in results]
        if name in ("y", "dx"):
            together[name] = torch.cat(values)
        elif name.startswith("state "):
            assert torch.equal(*values), f"{name} differs between ranks"
            together[name] = values[0]
        else:
            together[name] = values[0] + values[1]
    return together


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_with_the_joined_batch(ranks, case):
    runs = [
        train(layer_of(case, dtype, process_group=None), [joined_batch(case, step, dtype) for step in range(STEPS)])
        for dtype in DTYPES
    ]
    ours = [joined([rank[case, dtype] for rank in ranks]) for dtype in DTYPES]
    assert list(ours[0]) == list(runs[0])
    for name, want in runs[0].items():
        # Sums of 100 terms of up to 50, or differences of a thousand, in another order.
        scale = float(want.double().abs().max())
        torch.testing.assert_close(ours[0][name], want, rtol=0, atol=1e-11 * max(scale, 1), msg=lambda m, n=name: n + m)
    three = (runs[0], ours[1], runs[1])
    exact, found, plain = ({n: t for n, t in run.items() if t.is_floating_point()} for run in three)
    assert_within_budget(exact, found, plain)


def test_one_exchange_forward_and_one_backward(ranks):
    for case, dtype in itertools.product(CASES, DTYPES):
        seeding = 2 if "kmeans++" in case else 0  # once: the sizes, and the points
        for rank in ranks:
            assert rank[case, dtype, "calls"] == {GATHER: 2 * STEPS + seeding}, case


def test_only_joined_statistics_are_exchanged(ranks):
    """Not in evaluation; a converted model's with its group."""
    for rank in ranks:
        assert rank["evaluation calls"] == {}
        for name, calls in {"asked for": {GATHER: 1}, "synchronised": {GATHER: 1}, "of a group": {}}.items():
            assert rank["converted calls", name] == calls, name


def test_a_group_of_one_exchanges_nothing(ranks):
    for rank in ranks:
        calls, y, want = rank["group of one"]
        assert calls == {}
        assert torch.equal(y, want)


def test_buffers_stay_on_every_rank(ranks):
    for rank in ranks:
        for name in ("not finite", "nothing anywhere"):
            before, layer = rank[name]
            assert_state(layer, before)


@pytest.mark.parametrize("update", ["moving_average", "weight"])
def test_two_forwards_before_one_backward_under_ddp(ranks, update):
    want = two_forwards(network(update=update), None)
    for rank in ranks:
        found = rank["two forwards", update]
        assert list(found) == list(want)
        again = rank["two forwards", update, "checkpointed"]
        assert all(torch.equal(again[name], value) for name, value in found.items())
        for name, value in want.items():  # DDP averages the gradients of means over half the batch: the joined mean's
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_a_domain_that_a_rank_lacks_has_no_gradient_there(ranks):
    want = torch.zeros(2, 2, 4)  # domains, weight and bias
    for rank in range(2):
        x, _ = ranks[rank]["domains"]
        for k, share in enumerate([x, x[:0]] if rank == 0 else [x[:2], x[2:]]):
            if len(share):
                norm = nn.BatchNorm1d(4)
                norm(share).square().sum().backward()
                want[k] += torch.stack([p.grad for p in norm.parameters() if p.grad is not None]) / 2
    for rank in ranks:
        found = torch.stack([torch.stack(gradients) for gradients in rank["domains"][1]])
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_sharded_layer_from_meta_starts_and_learns_as_any_other(ranks):
    layer = UCBNorm(4, 3, update="weight")
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for rank in ranks:
        layer(rank["from meta"][0]).square().sum().backward()
    gradients = {name: p.grad / 2 for name, p in layer.named_parameters() if p.grad is not None}
    for rank in ranks:
        _, found, learned = rank["from meta"]
        torch.testing.assert_close(found, start, rtol=0, atol=0)
        torch.testing.assert_close(learned, gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SEEDED)
def test_parameters_are_seeded_by_the_joined_batch(ranks, kind):
    want = seeded(kind, None)
    for rank in ranks:
        torch.testing.assert_close(rank["seeded", kind], want, rtol=1e-10, atol=1e-12)
    for first, second in zip(*(rank["seeded", kind].values() for rank in ranks), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", SEEDED)
def test_parameters_that_would_lose_their_seed_are_refused(ranks, kind):
    layer = any_norm(kind, 4, 3, **SEEDED[kind])
    if kind == "scb_base":
        parametrize.register_parametrization(layer.mean, "weight", nn.Tanh())
    else:
        parametrize.register_parametrization(layer, "mean", nn.Tanh())
    x = torch.randn(6, 4, 5)
    with pytest.raises(RuntimeError, match="seed before wrapping") as error:
        layer(x, *ids_of(kind))
    assert [rank["sharded", kind] for rank in ranks] == [str(error.value)] * 2
    with pytest.raises(RuntimeError, match="seed before wrapping"):
        torch.compile(layer, backend="aot_eager")(x, *ids_of(kind))
    layer.set_initialized(True)
    layer(x, *ids_of(kind))


def test_a_rank_on_its_own_needs_no_group():
    assert not dist.is_initialized()
    x = batch(0, (4, 4, 5))
    assert torch.equal(UCBNorm(4, 3, process_group="world")(x), UCBNorm(4, 3)(x))
    with pytest.raises(ValueError, match="x: expected more than one value per channel in training"):
        UCBNorm(4, 3, process_group="world")(x[:1, :, :1])
    assert distributed.active("world") is None
