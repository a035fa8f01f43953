"""UCB-Norm, and what it shares with Mixture Normalization: a mixture that is stored, seeded and averaged."""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import functional, graph_ops, mixture, seeding
from .backends import checkpointing, distributed, eager, graphs, reference
from .backends.cpu import library
from .backends.reference import Moments, Scale, Statistics
from .backends.triton import ops
from .base import FLAG, DeviceLike, NormLayer, leaf
from .mixture import Average, Fit, Stored
from .seeding import generator

Update = Literal["moving_average", "weight"]
MixtureInit = Literal["uniform", "kmeans++"]
Variance = Literal["component", "shared"]
MIN_WEIGHT = 1e-3
"""Floor of a mixture weight, relative to 1 / K: a weight of 1e-6 gave outputs of 4,000 (measured)."""
CALIBRATION_STEPS = 1
"""EM steps of UCBNorm's ``calibrate``, whose moving averages take one a batch. More move the mixture to where training
has not followed: a converted ResNet-18 of 0.98 keeps it after one, has 0.96 after 3 and 0.86 after 20 (measured)."""
SEEDED_STEPS = 20
"""EM steps from k-means++, which is only a start."""
CANDIDATES = 8
"""Locations that a dead component may move to: a cloud of a third of the batch is missed in 4 % of the draws."""


def _log_weights(logits: Tensor, min_weight: float) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_weights = logits.log_softmax(0)
    return log_weights.clamp(min=math.log(min_weight)) if min_weight else log_weights


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
        stored = Stored(
            torch.empty(num_components, **placed),
            torch.empty(num_components, num_features, **placed),
            torch.empty(num_components, num_features, **placed),
        )
        for name, tensor in zip(Stored._fields, stored, strict=True):
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
        anew.
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
        """Say whether what looks at values has to be an operator; no operator exchanges anything between ranks."""
        return torch.compiler.is_compiling() and distributed.active(self.process_group) is None

    def log_weights(self) -> Tensor:
        """Return log lambda (K,), floored at ``min_weight``."""
        return _log_weights(self.logits, self.min_weight)

    def seed_from(self, x: Tensor) -> None:
        r"""Seed the mixture from x (N, C, \*) by k-means++ if nothing has yet; pass over a non-finite x."""
        if not self._seen_initialized:
            self._seed(x)

    @checkpointing.computed_once
    @torch.no_grad()
    def _seed(self, x: Tensor) -> bool | Tensor:
        """Seed as ``seed_from``; return whether that was done before: in a graph this is a tensor on the CPU."""
        if self._seen_initialized:
            return True
        seeding = self.num_components, self.groups, self.seed, self.eps, self._seeding_steps()
        joined = self.process_group is None and not self.averages_mixture()  # all ranks have the same parameters
        refusal = None if self.averages_mixture() else self._seed_refusal('init="kmeans++"')
        if self._in_graph():
            known = self.initialized, self._known_ready(), refusal
            *fit, found, ready = graph_ops.seed_mixture(x.detach(), *known, *seeding, joined)
            self._store_seed(Fit(*fit), found)
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

    def _store_seed(self, fit: Fit, found: Tensor) -> None:
        """Store a fit as the seed where found, and that the layer is seeded."""
        raise NotImplementedError

    @torch.no_grad()
    def _write(self, new: Stored, where: Tensor | None = None) -> None:
        for name, value in zip(Stored._fields, new, strict=True):
            old = getattr(self, name)
            old.copy_(value if where is None else torch.where(where, value.to(old), old))

    def _fit(self, dtype: torch.dtype, prefix: str = "") -> Fit:
        logits, mean, log_var = (getattr(self, prefix + name).to(dtype) for name in Stored._fields)
        return Fit(logits.softmax(0), mean, log_var.exp())

    def _stored(self, fit: Fit) -> Stored:
        weight = fit.weight.clamp(min=self.min_weight)
        return Stored(weight.log().log_softmax(0), fit.mean, mixture.log_of(fit.var))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Fit the mixture of evaluation once, by EM, to up to 4,096 locations of each batch.

        EM starts from the mixture the layer has, shifted and scaled to the locations' mean and variance, or from
        k-means++ where nothing has seeded the layer yet. Training afterwards moves the mixture again.
        ``common.norms.calibrate`` and ``recalibrate`` do this to a whole model.

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
        return mixture.sample_points(x, self.seed, "calibrate", number)

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
            some = mixture.sample_points(points, self.seed, "calibrate seed")
            rng = generator(self.seed, "kmeans++")
            fit = mixture.seed_mixture(some, self.num_components, self.groups, rng)
            steps = max(steps, SEEDED_STEPS)
        fit = mixture.expectation_maximisation(points, fit, self.groups, self.eps, steps)
        self._store_calibrated(points, fit)
        self.set_initialized(True)

    def _calibration_start(self, dtype: torch.dtype) -> tuple[Fit, int]:
        """Return the mixture from which EM starts, and how many steps it takes."""
        return self._fit(dtype), CALIBRATION_STEPS

    def _store_calibrated(self, points: Tensor, fit: Fit) -> None:
        """Store what EM found for points (P, C)."""
        self._write(self._stored(fit))

    def averages_mixture(self) -> bool:
        """Say whether the mixture is estimated from activations, not learned by gradients."""
        return "mean" in self._buffers  # what FSDP or a parametrization puts in a parameter's place may be any tensor

    def _fused(self, x: Tensor, statistics: Statistics) -> bool:
        r"""Say whether kernels compute x (N, C, \*) from what is stored; they exchange nothing between ranks."""
        if not x.numel() or (statistics == "batch" and distributed.active(self.process_group) is not None):
            return False
        return functional.choose_backend(self.backend, x, self.num_components, self._width) == "triton"

    def _native(self, x: Tensor) -> bool:
        r"""Say whether loops in C++ take x (N, C, \*) and the moving averages as they are; see ``backends.cpu``."""
        if (
            not x.numel()
            or self.mean.requires_grad
            or (self.training and distributed.active(self.process_group) is not None)
        ):
            return False
        stored = self._mixture()
        parameters = *stored, self.weight, self.bias
        chosen = functional.choose_backend(self.backend, x, self.num_components, self._width, parameters)
        return chosen == "compiled" and all(t.is_contiguous() for t in stored)

    def _normalise_native(
        self, x: Tensor, stored: Stored, min_weight: float, statistics: Statistics = "batch"
    ) -> tuple[Tensor, Tensor]:
        """Return what ``library.mixture_norm`` does."""
        options: Any = {"groups": self.groups, "eps": self.eps, "scale": self.scale, "min_weight": min_weight}
        stored = Stored(*(t.float().contiguous() for t in stored))
        y, state = library.mixture_norm(
            reference.flatten(x), stored, self.weight, self.bias, statistics=statistics, stored=True, **options
        )
        return y.reshape(x.shape), state

    @checkpointing.computed_once
    @torch.no_grad()
    def _average_in_native(self, state: Tensor, *, shared_variance: bool = False) -> None:
        """Move the averages by the moments of a state."""
        rule: Any = {"groups": self.groups, "momentum": self.momentum, "paper": self.average == "paper"}
        rule |= {"min_weight": self.min_weight, "shared": shared_variance}
        library.move_averages(self._mixture(), state, **rule)

    def _normalise_fused(
        self, x: Tensor, stored: Stored, statistics: Statistics, min_weight: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return what ``ops.stored_norm`` does."""
        options: Any = {"groups": self.groups, "eps": self.eps, "scale": self.scale, "statistics": statistics}
        return ops.stored_norm(x, stored, self.weight, self.bias, min_weight=min_weight, **options)

    @checkpointing.computed_once
    def _average_in_fused(self, stored: Stored, state: Tensor, *, shared_variance: bool = False) -> None:
        """Move the averages by the moments of a state under them."""
        with torch.no_grad():
            if all(t.is_contiguous() for t in stored):
                rule = self.momentum, self.average == "paper", self.min_weight, shared_variance
                ops.averages_moved(stored, None, state, *(None,) * 6, *rule)
            else:
                self._average_in(ops.moments_of(state, self.groups), shared_variance=shared_variance)

    def _mixture(self) -> Stored:
        return Stored(self.logits, self.mean, self.log_var)

    @checkpointing.computed_once
    def _average_in(self, moments: Moments, *, shared_variance: bool = False) -> None:
        old = self._mixture()
        some = None if distributed.active(self.process_group) is None else moments.mass.sum() > 0
        rule = mixture.Rule(self.momentum, self.average, self.min_weight, shared_variance)
        self._write(mixture.moved(old, moments, rule), where=some)

    def _copied(self, stored: Stored) -> Stored:
        """Copy what a backward pass may need after the buffers behind it have moved."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return Stored(*graph_ops.snapshot(*stored, self.training))
        parts = torch.cat([t.reshape(-1) for t in reversed(stored)])  # at once, in a single launch
        parts = parts.split([t.numel() for t in reversed(stored)])
        return Stored(*(part.view_as(t) for part, t in zip(reversed(parts), stored, strict=True)))

    @checkpointing.computed_once
    def _given(self, x: Tensor, stored: Stored, *, keeps: bool) -> Stored:
        """Return a mixture that will move for a training pass over x; keeps: what computes it copies what it needs."""
        checkpointing.remember(self, x, stored)
        return stored if keeps and not torch.compiler.is_compiling() else self._copied(stored)

    def _check_training_batch(self, x: Tensor) -> None:
        # The other ranks' locations count too; how many is known on the device only.
        if distributed.active(self.process_group) is None:
            functional.check_training_batch(x, self.num_features)

    def _normalise(
        self, x: Tensor, given: Stored, min_weight: float, statistics: Statistics
    ) -> tuple[Tensor, Moments | None]:
        mixture = _log_weights(given.logits, min_weight), given.mean, given.log_var.exp()
        options: Any = {"groups": self.groups, "eps": self.eps, "scale": self.scale, "statistics": statistics}
        options |= {"weight": self.weight, "bias": self.bias}
        group = distributed.active(self.process_group) if statistics == "batch" else None
        if group is None:
            return functional.mixture_norm(x, *mixture, backend=self.backend, **options)
        # Also for a batch that is empty here: every rank takes part in the exchange.
        with torch.autocast(x.device.type, enabled=False):
            return eager.mixture_norm(x, *mixture, process_group=group, **options)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Tensor:
        """Return the posteriors of x under the stored mixture, (K, N, G, L) in float32 or float64."""
        flat = reference.flatten(self._channels_first(x.detach()))
        flat = flat.to(reference.compute_dtype(flat))
        log_lambda, mean, var = (t.to(flat.dtype) for t in (self.log_weights(), self.mean, self.log_var.exp()))
        return reference.posterior(flat, log_lambda, mean, var + self.eps, self.groups)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        r"""Normalise x (N, C, \*)."""
        x = self._channels_first(x)
        functional.check_device("x", x, self.logits.device, "the layer")
        if self.training:
            y = self._train(x)
        else:
            given = self._mixture()
            if torch.is_grad_enabled() and self.averages_mixture() and not torch.compiler.is_exporting():
                given = self._copied(given)
            y = self._transform(x, given, self.min_weight, "learned")
        return self._channels_back(y)

    def _transform(self, x: Tensor, given: Stored, min_weight: float, statistics: Statistics = "batch") -> Tensor:
        """Normalise x under a given mixture, and store nothing."""
        if self._fused(x, statistics):
            return self._normalise_fused(x, given, statistics, min_weight)[0]
        if self._native(x):
            return self._normalise_native(x, given, min_weight, statistics)[0]
        return self._normalise(x, given, min_weight, statistics)[0]

    def _repeat(self, x: Tensor, min_weight: float) -> Tensor:
        """Repeat a training pass over x inside a backward pass."""
        return self._transform(x, Stored(*checkpointing.recall(self, x)), min_weight)

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


class UCBNorm(MixtureLayer):
    r"""Normalise under a Gaussian mixture whose parameters are moving averages, or learned weights.

    In training each component's posteriors weigh the batch's own moments (Eqs. 6-9); in evaluation the stored
    ones take their place (Eq. 15):

    .. math:: y_i = \sum_k \frac{\tau_{ik}}{\sqrt{\lambda_k}} \frac{x_i - m_k}{\sqrt{v_k + \epsilon}}

    The output variance is not 1 but K where components are well separated, and less in between. With K = 1
    the layer is BatchNorm without bias and weight. Components can die, or agree: watch
    ``common.norms.health``.

    Args:
        num_features: channels C.
        num_components: components K.
        groups: groups of channels that share one posterior; None is one channel each, 1 the paper's joint
            one, which may give every location to one component.
        update: "moving_average" keeps the mixture in buffers; "weight" in parameters that gradients change.
        statistics: "batch" normalises by the batch's moments in training; "learned" by the parameters
            (Eq. 15), which ties them to what evaluation uses. Only with update="weight".
        average: "em" moves each component by the share of the batch that it holds; "paper" all alike.
        scale: "sqrt_k" divides the output by sqrt(K).
        init: means from "uniform" U(-1, 1), or by "kmeans++" from the first training batch; with update="weight" that
            is joined over all ranks, unless process_group names fewer.
        momentum: weight of the new batch in the averages, PyTorch's orientation.
        min_weight: floor of a component's weight, at most 1 / K; None is 1e-3 / K.
        variance: "component" stores a variance of each component; "shared" one a channel for all of them, their
            mean by weight, so that none can shrink onto a few locations. Only with moving averages.
        reseed: share of the locations below which a component is dead in a group of channels: it then moves
            there to the one of 8 drawn locations where it explains most that the others do not, with their mean
            variance and a share of 1 / K. Less than 1 / K; 0 never does. Only with moving averages, and without
            process_group.
        eps: added to every variance, in squared units of x.
        affine: scale and shift each channel by learned ``weight`` and ``bias`` (C,).
        channel_dim: the dimension of x that holds the channels; -1 for (N, T, C).
        process_group: None for the statistics of this rank alone; "world" or a group of
            ``torch.distributed`` for those of the joined batch in training, forward and backward, with moving
            averages equal on all its ranks. A training forward, without gradients too, and its backward are
            then collective; evaluation is not. A layer that holds a group cannot be copied or pickled, as
            torch's cannot; with "world" it can.
        seed: of the means, of k-means++ and of re-seeding, apart from the global generator.
        backend: "auto", "reference", "eager", "compiled" or "triton".
        device: of all parameters and buffers, as of any ``torch.nn`` layer; the means are the same on each.
        dtype: of all of them that are floating-point.

    Shape:
        x (N, C, \*) float; output as x. Parameters or buffers ``logits`` (K,), ``mean`` and ``log_var`` (K,
        C). With ``reseed`` also buffers ``usage`` (K, G), the moving average of each component's share in each
        group, and ``step``, the training batches seen. A batch with a non-finite value leaves all buffers but
        ``step`` as they are, one that holds nothing all of them.

    Raises:
        ValueError: an option is out of range; x has not C channels; x holds one value per channel in
        training.
        RuntimeError: a batch is to seed parameters that FSDP or a parametrization has replaced.

    Source: arXiv:2403.16798, Eqs. 4-9 and 15, Algorithm 2 with the batch's moments in lines 13 and 14.
    """

    usage: Tensor

    def __init__(
        self,
        num_features: int,
        num_components: int,
        *,
        groups: int | None = None,
        update: Update = "moving_average",
        statistics: Statistics = "batch",
        init: MixtureInit = "uniform",
        variance: Variance = "component",
        reseed: float = 0.0,
        average: Average = "em",
        scale: Scale = "paper",
        momentum: float = 0.1,
        min_weight: float | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        process_group: object = None,
        seed: int = 0,
        backend: str = "auto",
        device: DeviceLike = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        functional.check_choice("update", update, get_args(Update))
        functional.check_choice("statistics", statistics, get_args(Statistics))
        if statistics == "learned" and update == "moving_average":
            raise ValueError("statistics: 'learned' needs update='weight', got update='moving_average'")
        functional.check_choice("variance", variance, get_args(Variance))
        if variance == "shared" and update == "weight":
            raise ValueError("variance: 'shared' needs update='moving_average', got update='weight'")
        if reseed and update == "weight":
            raise ValueError(f"reseed: {reseed} needs update='moving_average', got update='weight'")
        if reseed and process_group is not None:
            raise ValueError(f"reseed: expected 0 with a process_group, whose ranks draw apart, got {reseed}")
        super().__init__(
            num_features,
            num_components,
            update == "weight",
            groups=groups,
            init=init,
            average=average,
            scale=scale,
            momentum=momentum,
            min_weight=min_weight,
            eps=eps,
            affine=affine,
            channel_dim=channel_dim,
            process_group=process_group,
            seed=seed,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        if not 0 <= reseed < 1 / num_components:
            raise ValueError(f"reseed: expected at least 0 and less than 1 / {num_components}, got {reseed}")
        self.update: Update = update
        self.statistics: Statistics = statistics
        self.variance: Variance = variance
        self.reseed = float(reseed)
        self._words = seeding.key(self.seed, "reseed")  # here, because a graph cannot find it
        if reseed:
            self.register_buffer("usage", torch.empty_like(self.mean[:, : self.groups]))
            self.register_buffer("step", torch.tensor(0, device=self.mean.device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to equal weights, unit variances and means from U(-1, 1), to be seeded anew if init says so."""
        super().reset_parameters()
        if self.reseed:
            self.usage.fill_(1 / self.num_components)
            self.step.zero_()

    def _store_seed(self, fit: Fit, found: Tensor) -> None:
        var = mixture.pooled(fit.var, fit.weight[:, None]) if self.variance == "shared" else fit.var
        log_var = var.clamp(min=self.eps).log().expand_as(self.log_var)
        self._write(Stored(torch.zeros_like(self.logits), fit.mean, log_var), where=found)
        self.initialized.masked_fill_(found, 1)

    def _store_calibrated(self, points: Tensor, fit: Fit) -> None:
        if self.variance == "shared":
            fit = fit._replace(var=mixture.pooled(fit.var, fit.weight[:, None]).expand_as(fit.var))
        super()._store_calibrated(points, fit)
        if self.reseed:
            self.usage.copy_(mixture.component_shares(points, fit, self.groups, self.eps))

    def _train(self, x: Tensor) -> Tensor:
        if self.statistics == "batch":
            self._check_training_batch(x)
        moves = self.update == "moving_average"
        if moves and checkpointing.running():
            return self._repeat(x, self.min_weight)
        if not checkpointing.running():
            self.seed_from(x)
        given, shared = self._mixture(), self.variance == "shared"
        fused = self._fused(x, self.statistics)
        native = not fused and self.statistics == "batch" and self._native(x)
        if moves:
            given = self._given(x, given, keeps=fused or native)
        if fused:
            y, state = self._normalise_fused(x, given, self.statistics, self.min_weight)
            if state is not None and moves:
                self._average_in_fused(self._mixture(), state, shared_variance=shared)
                if self.reseed:
                    self._reseed_dead(x, ops.moments_of(state, self.groups))
            return y
        if native:
            y, state = self._normalise_native(x, given, self.min_weight)
            self._average_in_native(state, shared_variance=shared)
            if self.reseed:
                self._reseed_dead(x, library.moments_of(state, self.num_components, self.groups))
            return y
        y, moments = self._normalise(x, given, self.min_weight, self.statistics)
        if moments is None or not moves:
            return y
        if x.numel() or distributed.active(self.process_group) is not None:
            self._average_in(moments, shared_variance=shared)
        if self.reseed and x.numel():
            self._reseed_dead(x, moments)
        return y

    @checkpointing.computed_once
    @torch.no_grad()
    def _reseed_dead(self, x: Tensor, moments: Moments) -> None:
        """Follow how much each component holds of each group, and move those that hold too little."""
        num, finite = self.num_components, mixture.is_finite(moments)
        usage = self.usage + self.momentum * (mixture.shares(moments) - self.usage)
        dead = (usage < self.reseed) & finite  # (K, G)
        weight, mean, var = self.log_weights().exp(), self.mean, self.log_var.exp()
        new_var = mixture.pooled(var, usage * ~dead)
        self.step += 1  # finite or not: which one is known on the device only
        drawn = mixture.draw_locations(x, num * CANDIDATES, self._words, self.step)
        candidates = drawn.unflatten(0, (num, -1))
        new_mean = mixture.best_additions(candidates, Fit(weight, mean, var), new_var, self.groups, self.eps)
        moved = dead.repeat_interleave(self.num_features // self.groups, dim=1)  # (K, C)
        usage = torch.where(dead, 1 / num, usage)
        usage = usage / usage.sum(0)
        # The weights are the mean usage already, but for the floor: they follow where a component starts anew.
        new_weight = usage.mean(1).clamp(min=self.min_weight)
        logits = torch.where(dead.any(), new_weight.log(), self.logits)
        log_var = torch.where(moved, mixture.log_of(new_var), self.log_var)
        self._write(Stored(logits, torch.where(moved, new_mean, mean), log_var))
        self.usage.copy_(torch.where(finite, usage, self.usage))

    def _options(self) -> dict[str, Any]:
        return {
            "groups": (self.groups, self.num_features),
            "update": (self.update, "moving_average"),
            "statistics": (self.statistics, "batch"),
            "init": (self.init, "uniform"),
            "variance": (self.variance, "component"),
            "reseed": (self.reseed, 0),
            "process_group": (self.process_group, None),
            **super()._options(),
        }
