"""Steps that are recorded once and repeated, as a CUDA graph does it; run by test_kernels.py.

No GPU is here to capture anything. What a capture holds is kept in its place: every operator of torch that computes,
and every launch of a kernel, with the numbers that the host gave it and the memory that it reads and writes. It is then
run again, without the layer.
"""

import copy
from typing import Any

import pytest
import torch
from launches import Recorder, replaced_kernels
from norm_cases import any_norm, mixture_case
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from common.norms import functional
from common.norms.backends import graph_ops, graphs
from common.norms.backends.triton import ops, tile_configs

RUN = InterpretedFunction.run
SHAPE = (3, 4, 5)
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "UCBNorm": ("ucb", {}),
    "joint, seeded": ("ucb", {"groups": 1, "init": "kmeans++"}),
    "re-seeded": ("ucb", {"reseed": 0.2}),
    "learned": ("ucb", {"update": "weight"}),
    "SCBNorm": ("scb", {"affine": True}),
    "standardised": ("scb", {"statistics": "batch", "init": "data"}),
    "standardised by sample": ("scb", {"statistics": "instance"}),
    "MixtureNorm": ("mn", {"em_steps": 2}),
}
STEPS = [*((name, True) for name in LAYERS), ("UCBNorm", False), ("SCBNorm", False)]
ON_EVERY_PUSH = ("MixtureNorm", "SCBNorm", "standardised")


class Capture(Recorder):
    """Run what is launched, and keep it."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in self.bodies:
            return super().__torch_dispatch__(func, types, args, kwargs)
        out = func(*args, **(kwargs or {}))
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "a question"
        if not func.is_view:
            self.kept.append((func, args, kwargs or {}, [t for t in pytree.tree_leaves(out) if torch.is_tensor(t)]))
        return out

    def kernel(self, function, grid, args, kwargs):
        with _disable_current_modes():
            RUN(function, *args, grid=grid, warmup=False, **kwargs)
        self.kept.append((function, grid, args, kwargs))

    def replay(self):
        """Do it again, in the same memory."""
        for function, *given in self.kept:
            if isinstance(function, InterpretedFunction):
                grid, args, kwargs = given
                RUN(function, *args, grid=grid, warmup=False, **kwargs)
                continue
            args, kwargs, places = given
            found = [t for t in pytree.tree_leaves(function(*args, **kwargs)) if torch.is_tensor(t)]
            for place, value in zip(places, found, strict=True):
                if place.data_ptr() != value.data_ptr() and not function._schema.name.startswith("aten::empty"):
                    place.copy_(value)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Look at no id, and let a batch have few programs, which all run in turn here, and few channels."""
    monkeypatch.setattr(functional, "check_cluster", lambda *_, **__: None)
    monkeypatch.setattr(tile_configs, "PROGRAMS", 4)
    monkeypatch.setattr(tile_configs, "FEWEST_CHANNELS", 1)


def step(layer, x, g, ids):
    y = layer(x, *ids)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], g)


def batch(seed):
    x, *_, g = mixture_case(SHAPE, 3, dtype=torch.float32, seed=seed)
    return x, g


@pytest.mark.parametrize(
    ("name", "training"),
    [pytest.param(*each, marks=[] if each[0] in ON_EVERY_PUSH else pytest.mark.full) for each in STEPS],
)
def test_a_step_that_is_repeated_is_one_that_is_taken(name, training):
    """After two steps to warm up, over a batch that the capture has not seen."""
    kind, options = LAYERS[name]
    layer = any_norm(kind, SHAPE[1], 3, backend="triton", **options)
    ids = (torch.arange(SHAPE[0]) % 3,) if kind == "scb" else ()
    for seed in range(2):
        x, g = batch(seed)
        step(layer, x.requires_grad_(), g, ids)
    other = copy.deepcopy(layer.train(training))
    x, g = batch(2)
    x.requires_grad_()
    captured = Capture()
    with replaced_kernels(captured.kernel), captured:
        kept = step(layer, x, g, ids)
    with pytest.MonkeyPatch.context() as patched:  # nothing is refused where nothing is asked
        patched.setattr(graphs, "capturing", lambda t: True)
        want = step(other, x, g, ids)
    for seed in (2, 3):
        if seed > 2:
            with torch.no_grad():
                for place, value in zip((x, g), batch(seed), strict=True):
                    place.copy_(value)
            captured.replay()
            want = step(other, x, g, ids)
        for a, b in zip((*kept, *layer.state_dict().values()), (*want, *other.state_dict().values()), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "options", "steps", "message"),
    [
        ("ucb", {"init": "kmeans++"}, 1, graphs.WARM_UP),
        ("mn", {}, 1, graphs.WARM_UP),
        ("scb", {"init": "data"}, 0, graphs.WARM_UP),
        ("mn", {"refit_every": 2}, 2, graphs.COUNTED),
    ],
)
def test_what_asks_the_device_or_counts_on_the_host_is_not_captured(monkeypatch, kind, options, steps, message):
    layer = any_norm(kind, SHAPE[1], 3, backend="triton", **options)
    ids = (torch.arange(SHAPE[0]) % 3,) if kind == "scb" else ()
    for seed in range(steps):
        layer(batch(seed)[0], *ids)
    monkeypatch.setattr(graphs, "capturing", lambda t: True)
    with pytest.raises(RuntimeError, match=rf"^CUDA graph: {message}$"):
        layer(batch(2)[0], *ids)


RULE = (2, 0.1, 1, 100, 12, 34, 0.01, 1e-3, 1e-6)


def test_operators_of_a_compiled_layer_are_not_captured_either(monkeypatch):
    x, *given, _ = mixture_case(SHAPE, 3, dtype=torch.float32)
    on_device, on_host, yes, no = torch.tensor(4), torch.tensor(4), torch.tensor(True), torch.tensor(False)
    runs = [
        (lambda: ops.fit_mixture(x, *given, on_device, yes, on_host, 2, *RULE), graphs.COUNTED),
        (lambda: ops.fit_mixture(x, *given, on_device, no, on_host, 1, *RULE), graphs.WARM_UP),
        (lambda: graph_ops.refit_mixture(x, *given, yes, on_host, 1, 2, 0.1, 1, 0, 0), graphs.DRAWN),
        (lambda: graph_ops.seed_mixture(x, yes, no, None, 3, 2, 0, 0.1, 1, False), graphs.WARM_UP),
    ]
    for run, _ in runs:
        run()
    monkeypatch.setattr(graphs, "capturing", lambda t: True)
    for run, message in runs:
        with pytest.raises(RuntimeError, match=rf"^CUDA graph: {message}$"):
            run()
