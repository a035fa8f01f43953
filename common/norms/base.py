"""What the layers share: channel order, affine map and seeding; a stored mixture, its averages and evaluation."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, ParamSpec, Self, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import functional, mixture
from .backends import checkpointing, distributed, graph_ops, graphs, reference
from .backends.backend import Backend, Options
from .backends.reference import MixtureParams, Scale, Statistics
from .mixture import Average, Components, Rule
from .seeding import generator

P = ParamSpec("P")
R = TypeVar("R")
DeviceLike = torch.device | str | int | None
MixtureInit = Literal["uniform", "kmeans++"]
MIN_WEIGHT = 1e-3
"""Floor of a mixture weight, relative to 1 / K: a weight of 1e-6 gave outputs of 4,000 (measured)."""
CALIBRATION_STEPS = 1
"""EM steps of UCBNorm's ``calibrate``, whose moving averages take one a batch. More move the mixture to where training
has not followed: a converted ResNet-18 of 0.98 keeps it after one, has 0.96 after 3 and 0.86 after 20 (measured)."""
SEEDED_STEPS = 20
"""EM steps from k-means++, which is only a start."""
FLAG = torch.float32
"""Type of ``initialized``, where 0 is not seeded: ``AveragedModel`` cannot average bool, and rounds whole numbers down.

A scalar of float64 torch.compile takes for a number, and compiles twice."""


def fx_leaf(forward: Callable[P, R]) -> Callable[P, R]:
    """Make a layer a leaf of torch.fx's symbolic tracing, as torch's own layers are, by its forward."""

    @functools.wraps(forward)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        layer: Any = args[0]
        for value in (*args[1:], *kwargs.values()):
            if isinstance(value, torch.fx.Proxy):
                tracer: Any = value.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(layer), args[1:], kwargs)
        return forward(*args, **kwargs)

    return wrapped


class NormLayer(nn.Module):
    r"""A layer over x (N, C, \*) with an optional affine map and a buffer that says whether it is seeded."""

    initialized: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float,
        affine: bool,
        channel_dim: int,
        backend: str,
        device: DeviceLike = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = functional.check_size("num_features", num_features)
        self.eps = functional.check_eps(eps)
        if not functional.is_integer(channel_dim) or channel_dim == 0:
            raise ValueError(f"channel_dim: expected a dimension other than the batch's, got {channel_dim!r}")
        functional.check_dtype(dtype)
        self.affine, self.channel_dim, self.backend = affine, int(channel_dim), backend
        shape, placed = (num_features,), {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(shape, **placed)) if affine else None
        self.bias = nn.Parameter(torch.empty(shape, **placed)) if affine else None
        self.forget_initialized()

    def reset_parameters(self) -> None:
        """Set the affine map to the identity."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def set_initialized(self, value: bool) -> None:
        """Fill ``initialized`` with a value."""
        self.initialized.fill_(value)
        self._ready = value or torch.tensor(False, device="cpu")

    def forget_initialized(self) -> None:
        """Read ``initialized`` again before the next batch: it was written from outside."""
        # On the host, so that a seeded layer never asks the device: True, or what a graph knew last, on the CPU.
        self._ready: Tensor | Literal[True] = torch.tensor(False, device="cpu")

    def is_initialized(self) -> bool:
        """Return whether every component or cluster is seeded."""
        if self._ready is not True:
            graphs.refuse(self.initialized, graphs.WARM_UP)
            if self.initialized.all():
                self._ready = True
        return self._ready is True

    @checkpointing.computed_once
    def _may_seed(self) -> bool:
        """Return whether something may be unseeded; a graph cannot ask the device."""
        return self._ready is not True and (torch.compiler.is_compiling() or not self.is_initialized())

    def _seed_refusal(self, option: str) -> str | None:
        """Return why no batch can seed parameters: writes to sharded or parametrized ones are lost. None if it can."""
        sharded = getattr(self, "_is_fsdp_managed_module", False)  # FSDP, of either version, says so to torch.compile
        if not sharded and not any(parametrize.is_parametrized(module) for module in self.modules()):
            return None
        return (
            f"{option}: the first training batches seed parameters, and FSDP and torch.nn.utils.parametrize lose that; "
            "seed before wrapping: train on these batches, load a state dict or call set_initialized(True)"
        )

    def _known_ready(self) -> Tensor | None:
        """Return the seeding flag as a graph's input; an exported graph has only the state dict's."""
        return None if torch.compiler.is_exporting() or self._ready is True else self._ready

    def _learn_ready(self, ready: Tensor) -> None:
        if not torch.compiler.is_exporting():
            self._ready = ready

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.initialized = self.initialized.to(FLAG)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_initialized()
        super()._load_from_state_dict(*args, **kwargs)

    def _channels_first(self, x: Tensor) -> Tensor:
        r"""Check x and return it as (N, C, \*)."""
        functional.check_input(x, self.num_features, self.channel_dim)
        return x if self.channel_dim == 1 else x.movedim(self.channel_dim, 1)

    def _channels_back(self, y: Tensor) -> Tensor:
        """Put the channels back where they were."""
        return y if self.channel_dim == 1 else y.movedim(1, self.channel_dim)

    def _options(self) -> dict[str, Any]:
        """Return option: (value, default)."""
        raise NotImplementedError

    def _size(self) -> int:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Show the sizes, and every option that is not at its default."""
        options = {
            "eps": (self.eps, 1e-5),
            **self._options(),
            "channel_dim": (self.channel_dim, 1),
            "backend": (self.backend, "auto"),
        }
        shown = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([str(self.num_features), str(self._size()), *shown])


class MixtureLayer(NormLayer):
    """What UCBNorm and MixtureNorm share: the stored mixture, its seeding and averages, and evaluation."""

    logits: Tensor
    mean: Tensor
    log_var: Tensor
    step: Tensor

    def __init__(
        self,
        num_features: int,
        num_components: int,
        learned: bool,
        *,
        groups: int | None,
        init: MixtureInit,
        average: Average,
        scale: Scale,
        momentum: float,
        min_weight: float | None,
        eps: float,
        affine: bool,
        channel_dim: int,
        process_group: object,
        seed: int,
        backend: str,
        device: DeviceLike,
        dtype: torch.dtype | None,
    ) -> None:
        placed: Any = {"device": device, "dtype": dtype}
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, backend=backend, **placed)
        functional.check_choice("average", average, get_args(Average))
        functional.check_choice("scale", scale, get_args(Scale))
        functional.check_choice("init", init, get_args(MixtureInit))
        num_components = functional.check_size("num_components", num_components)
        functional.check_backend(backend, num_components)
        self.groups = self.num_features if groups is None else functional.check_groups(groups, self.num_features)
        self.momentum, self.seed = functional.check_momentum(momentum), functional.check_whole("seed", seed)
        if min_weight is not None and not 0 < min_weight <= 1 / num_components:
            raise ValueError(f"min_weight: expected more than 0 and at most 1 / {num_components}, got {min_weight}")
        distributed.check_process_group(process_group)
        if process_group is not None and backend in ("reference", "compiled"):
            raise ValueError(f"process_group: expected None with backend={backend!r}, got {process_group!r}")
        self.process_group = process_group
        self.num_components, self._width = num_components, self.num_features // self.groups
        self.average: Average = average
        self.scale: Scale = scale
        self.init: MixtureInit = init
        self.min_weight = MIN_WEIGHT / num_components if min_weight is None else float(min_weight)
        for name, shape in (("logits", ()), ("mean", (num_features,)), ("log_var", (num_features,))):
            tensor = torch.empty(num_components, *shape, **placed)
            if learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_buffer("initialized", torch.tensor(0.0, device=device, dtype=FLAG))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to equal weights, unit variances and means from U(-1, 1); one component starts at mean 0.

        The means come from a generator of the layer's own, so that the other layers of a network draw the
        same numbers with and without mixtures. With init="kmeans++" the next training batch seeds the layer
        again.
        """
        super().reset_parameters()
        nn.init.zeros_(self.logits)
        nn.init.zeros_(self.log_var)
        spread = torch.rand(self.mean.shape, generator=generator(self.seed, "mean"), device="cpu") * 2 - 1
        if self.num_components == 1:
            spread.zero_()  # BatchNorm, which starts at 0 and has no symmetry to break
        mean: Any = self.mean
        if hasattr(mean, "device_mesh"):  # sharded, as by fully_shard: every rank draws all of it and keeps its rows
            from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415  (slow to load)

            spread = distribute_tensor(spread, mean.device_mesh, mean.placements, src_data_rank=None)
        mean.copy_(spread)
        self.set_initialized(self.init == "uniform" or self.num_components == 1)

    def _in_graph(self) -> bool:
        """Return whether reading values needs an operator, as in a graph; no operator communicates between ranks."""
        return torch.compiler.is_compiling() and distributed.active(self.process_group) is None

    def log_weights(self) -> Tensor:
        """Return log lambda (K,), floored at ``min_weight``."""
        return self.params().log_weights(self.min_weight)

    def seed_from(self, x: Tensor) -> None:
        r"""Seed the mixture from x (N, C, \*) by k-means++ if nothing has yet; pass over a non-finite x."""
        if self._ready is not True:
            self._seed(x)

    @checkpointing.computed_once
    @torch.no_grad()
    def _seed(self, x: Tensor) -> bool | Tensor:
        """Seed as ``seed_from``; return whether that was done before: in a graph this is a tensor on the CPU."""
        if self._ready is True:
            return True
        seeding = self.num_components, self.groups, self.seed, self.eps, self._seeding_steps()
        joined = self.process_group is None and not self.averages_mixture()  # all ranks have the same parameters
        refusal = None if self.averages_mixture() else self._seed_refusal('init="kmeans++"')
        if self._in_graph():
            known = self.initialized, self._known_ready(), refusal
            *fit, found, ready = graph_ops.seed_mixture(x.detach(), *known, *seeding, joined)
            self._store_seed(Components(*fit), found)
            self._learn_ready(ready)
            return ready
        if self.is_initialized():
            return True
        graphs.refuse_traced()
        if refusal:
            raise RuntimeError(refusal)
        group = distributed.active("world" if joined else self.process_group)
        points, finite = mixture.seeding_points(x, self.seed, group)
        if len(points):
            fit = mixture.seed_and_fit(points, *seeding)
            self._store_seed(fit, finite & fit.is_finite())
        return False

    def _seeding_steps(self) -> int:
        """Return how many steps of EM the seeding takes after k-means++."""
        return 0

    def _store_seed(self, fit: Components, found: Tensor) -> None:
        """Store a fit as the seed where found, and that the layer is seeded."""
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Fit the mixture of evaluation once, by EM, to up to 4,096 locations of each batch.

        EM starts from the mixture the layer has, shifted and scaled to the locations' mean and variance, or from
        k-means++ where nothing has seeded the layer yet. Training afterwards moves the mixture again.
        The functions ``calibrate`` and ``recalibrate`` do this to a whole model.

        Args:
            batches: inputs of this layer, each as ``forward`` takes them.

        Raises:
            ValueError: no batch, a batch of the wrong shape, one with a value that is not finite, or a layer whose
                mixture is learned by gradients.
        """
        points = [self.calibration_points(x, i) for i, x in enumerate(batches)]
        self.calibrate_to(torch.cat(points) if points else torch.empty(0))

    def calibration_points(self, x: Tensor, number: int) -> Tensor:
        r"""Return up to 4,096 locations (P, C) of x, the batch of this number, to calibrate to.

        Raises:
            ValueError: x is of the wrong shape, or holds a value that is not finite.
        """
        x = self._channels_first(x).to(self.mean.device)
        if not x.isfinite().all():
            raise ValueError(f"batches: expected finite values, got others in batch {number}")
        return mixture.sample_points(x, mixture.points_key(self.seed, "calibrate"), number)

    @torch.no_grad()
    def calibrate_to(self, points: Tensor) -> None:
        """Fit the mixture of evaluation to points (P, C), as ``calibrate``.

        Raises:
            ValueError: less than two points, or a mixture that is learned by gradients.
        """
        if not self.averages_mixture():
            raise ValueError("update: expected 'moving_average', since a mixture learned by gradients is no estimate")
        if len(points) < 2:
            raise ValueError(f"batches: expected at least two locations, got {len(points)} in all")
        start, steps = self._calibration_start(points.dtype)
        if self.is_initialized():
            fit = mixture.moved_onto(points=points, fit=start)
        else:
            some = mixture.sample_points(points, mixture.points_key(self.seed, "calibrate seed"))
            rng = generator(self.seed, "kmeans++")
            fit = mixture.seed_mixture(some, self.num_components, self.groups, rng)
            steps = max(steps, SEEDED_STEPS)
        fit = mixture.expectation_maximisation(points, fit, self.groups, self.eps, steps)
        self._store_calibrated(points, fit)
        self.set_initialized(True)

    def _calibration_start(self, dtype: torch.dtype) -> tuple[Components, int]:
        """Return the mixture from which EM starts, and how many steps it takes."""
        return Components.of(self.params(), dtype), CALIBRATION_STEPS

    def _store_calibrated(self, points: Tensor, fit: Components) -> None:
        """Store what EM found for points (P, C)."""
        mixture.write(self.params(), fit.params(self.min_weight))

    def averages_mixture(self) -> bool:
        """Return whether the mixture is estimated from activations, not learned by gradients."""
        return "mean" in self._buffers  # what FSDP or a parametrization puts in a parameter's place may be any tensor

    def params(self) -> MixtureParams:
        """Return the stored mixture."""
        return MixtureParams(self.logits, self.mean, self.log_var)

    def _backend(self, x: Tensor, statistics: Statistics) -> Backend:
        r"""Return what computes x (N, C, \*); between ranks only ``Eager`` exchanges moments."""
        if statistics == "batch" and distributed.active(self.process_group) is not None:
            return functional.IMPLEMENTED["eager"]
        params = *self.params(), self.weight, self.bias
        chosen = functional.choose_backend(self.backend, x, self.num_components, self._width, params)
        return functional.IMPLEMENTED[chosen]

    def _normalise(
        self, x: Tensor, backend: Backend, params: MixtureParams, statistics: Statistics, min_weight: float
    ) -> tuple[Tensor, Any]:
        """Return the output, and what the backend's ``update`` and ``moments`` take, None if nothing is to move."""
        group = distributed.active(self.process_group) if statistics == "batch" else None
        if not x.numel() and group is None:  # with a group every rank takes part in the exchange
            return functional.empty(x, *self.parameters()), None
        options = Options(self.groups, self.eps, self.scale, statistics, True, min_weight, group)
        return backend.normalise(x, params, (self.weight, self.bias), options)

    @checkpointing.computed_once
    @torch.no_grad()
    def _update(
        self,
        backend: Backend,
        state: Any,
        fit: tuple[MixtureParams | None, MixtureParams] | None = None,
        *,
        shared_variance: bool = False,
    ) -> None:
        """Move the averages by what ``_normalise`` returned; store a new fit, if there is one."""
        over_ranks = distributed.active(self.process_group) is not None
        rule = Rule(self.momentum, self.average, self.min_weight, shared_variance, over_ranks)
        backend.update(self.params(), state, self.groups, rule, fit)

    def _copied(self, params: MixtureParams) -> MixtureParams:
        """Copy the mixture, which moves before a backward pass reads it."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return MixtureParams(*graph_ops.snapshot(*params, self.training))
        parts = torch.cat([t.reshape(-1) for t in reversed(params)])  # at once, in a single launch
        parts = parts.split([t.numel() for t in reversed(params)])
        return MixtureParams(*(part.view_as(t) for part, t in zip(reversed(parts), params, strict=True)))

    @checkpointing.computed_once
    def _given(self, x: Tensor, backend: Backend, params: MixtureParams) -> MixtureParams:
        """Return the mixture for a training pass over x after which it moves."""
        checkpointing.remember(self, x, params)
        return self._copied(params) if backend.copies_params or torch.compiler.is_compiling() else params

    def _repeat(self, x: Tensor, backend: Backend, min_weight: float) -> Tensor:
        """Repeat a training pass over x inside a backward pass."""
        params = MixtureParams(*checkpointing.recall(self, x))
        return self._normalise(x, backend, params, "batch", min_weight)[0]

    def _check_training_batch(self, x: Tensor) -> None:
        # The other ranks' locations count too; how many is known on the device only.
        if distributed.active(self.process_group) is None:
            functional.check_training_batch(x, self.num_features)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Tensor:
        """Return the posteriors of x under the stored mixture, (K, N, G, L) in float32 or float64."""
        flat = reference.flatten(self._channels_first(x.detach()))
        flat = flat.to(reference.compute_dtype(flat))
        log_lambda, mean, var = (t.to(flat.dtype) for t in self.params().plain(self.min_weight))
        return reference.posterior(flat, log_lambda, mean, var + self.eps, self.groups)

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        r"""Normalise x (N, C, \*)."""
        x = self._channels_first(x)
        functional.check_device("x", x, self.logits.device, "the layer")
        if self.training:
            y = self._train(x)
        else:
            params = self.params()
            if torch.is_grad_enabled() and self.averages_mixture() and not torch.compiler.is_exporting():
                params = self._copied(params)
            y, _ = self._normalise(x, self._backend(x, "learned"), params, "learned", self.min_weight)
        return self._channels_back(y)

    def _train(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        return {
            "average": (self.average, "em"),
            "scale": (self.scale, "paper"),
            "momentum": (self.momentum, 0.1),
            "min_weight": (self.min_weight, MIN_WEIGHT / self.num_components),
            "affine": (self.affine, True),
            "seed": (self.seed, 0),
        }

    def _size(self) -> int:
        return self.num_components
