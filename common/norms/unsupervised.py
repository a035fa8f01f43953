"""UCB-Norm, and what it shares with Mixture Normalization: a mixture that is stored, seeded and averaged."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from common.norms import averages, closed_form, mixture, ops, reference, sync
from common.norms.averages import Average, Stored
from common.norms.layer import NormLayer
from common.norms.mixture import Fit
from common.norms.reference import Moments, Scale, Statistics
from common.seeding import generator

Update = Literal["moving_average", "weight"]
MixtureInit = Literal["uniform", "kmeans++"]
MIN_WEIGHT = 1e-3
"""Floor of a mixture weight, relative to 1 / K: a weight of 1e-6 gave outputs of 4,000 (measured)."""


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
        *,
        groups: int | None,
        average: Average,
        scale: Scale,
        init: MixtureInit,
        momentum: float,
        eps: float,
        affine: bool,
        channel_dim: int,
        process_group: object,
        seed: int,
        backend: str,
        learned: bool = False,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, backend=backend)
        ops.check_choice("average", average, get_args(Average))
        ops.check_choice("scale", scale, get_args(Scale))
        ops.check_choice("init", init, get_args(MixtureInit))
        if num_components < 1:
            raise ValueError(f"num_components: expected at least 1, got {num_components}")
        if groups is not None and (groups < 1 or num_features % groups):
            raise ValueError(f"groups: expected a divisor of {num_features}, got {groups}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected 0 to 1, got {momentum}")
        sync.check_process_group(process_group)
        if process_group is not None and backend == "reference":
            raise ValueError(f"process_group: expected None with backend='reference', got {process_group!r}")
        self.process_group = process_group
        self.num_components, self.groups = num_components, groups or num_features
        self.average: Average = average
        self.scale: Scale = scale
        self.init: MixtureInit = init
        self.momentum, self.seed = momentum, seed
        self.min_weight = MIN_WEIGHT / num_components
        stored = Stored(
            torch.empty(num_components),
            torch.empty(num_components, num_features),
            torch.empty(num_components, num_features),
        )
        for name, tensor in zip(Stored._fields, stored, strict=True):
            if learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_buffer("initialized", torch.tensor(False))

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
        spread = torch.rand(self.mean.shape, generator=generator(self.seed, "mean")) * 2 - 1
        # One component is BatchNorm, which starts at 0 and has no symmetry to break.
        self.mean.copy_(spread if self.num_components > 1 else torch.zeros_like(spread))
        self.initialized.fill_(self.init == "uniform" or self.num_components == 1)

    def forget_initialized(self) -> None:
        """Look at ``initialized`` and ``step`` again when next asked: they were written from outside."""
        super().forget_initialized()
        self._host_step: Tensor | None = None

    def _count_step(self) -> int:
        """Count a training batch, in ``step`` and on the host; return how many came before.

        Every batch counts, finite or not: which one is known on the device only. So the two agree, and the
        device is asked after ``step`` was written from outside, never from one step to the next.
        """
        if self._host_step is None:  # a tensor, because torch.compile would compile anew for each value of an int
            self._host_step = self.step.to("cpu", copy=True)
        before = int(self._host_step)
        self._host_step += 1
        self.step += 1
        return before

    def log_weights(self) -> Tensor:
        """Return log lambda (K,), floored at 1e-3 / K."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        return logits.log_softmax(0).clamp(min=math.log(self.min_weight))

    @torch.no_grad()
    def seed_from(self, x: Tensor) -> None:
        r"""Seed the mixture from x (N, C, \*) by k-means++ if nothing has yet; pass over a non-finite x."""
        if self.is_initialized():
            return
        points, finite = mixture.sample_points(x, self.seed, "seed"), x.isfinite().all()
        group = sync.active(self.process_group)
        if group is not None:
            points, finite = sync.join_points(points, finite, group)
            points = mixture.sample_points(points, self.seed, "seed", "joined")
        if len(points) == 0:
            return
        rng = generator(self.seed, "kmeans++")
        fit = mixture.seed_mixture(points, self.num_components, self.groups, rng)
        self._store_seed(points, fit, finite)

    def _store_seed(self, points: Tensor, fit: Fit, finite: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def _write(self, new: Stored, where: Tensor | None = None) -> None:
        for name, value in zip(Stored._fields, new, strict=True):
            old = getattr(self, name)
            old.copy_(value if where is None else torch.where(where, value.to(old), old))

    def _average_in(self, moments: Moments) -> None:
        old = Stored(self.logits, self.mean, self.log_var)
        some = None if sync.active(self.process_group) is None else moments.mass.sum() > 0
        self._write(averages.moved(old, moments, self.momentum, self.average, self.min_weight), where=some)

    def _check_training_batch(self, x: Tensor) -> None:
        # The other ranks' locations count too; how many is known on the device only.
        if x.numel() == self.num_features and sync.active(self.process_group) is None:
            raise ValueError(f"x: expected more than one value per channel in training, got {tuple(x.shape)}")

    def _normalise(
        self, x: Tensor, log_lambda: Tensor, mean: Tensor, var: Tensor, statistics: Statistics
    ) -> tuple[Tensor, Moments | None]:
        options: Any = {"groups": self.groups, "eps": self.eps, "scale": self.scale, "statistics": statistics}
        group = sync.active(self.process_group) if statistics == "batch" else None
        if group is None:
            return ops.mixture_norm(x, log_lambda, mean, var, backend=self.backend, **options)
        # Also for a batch that is empty here: every rank takes part in the exchange.
        with torch.autocast(x.device.type, enabled=False):
            return closed_form.mixture_norm(x, log_lambda, mean, var, process_group=group, **options)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Tensor:
        """Return the posteriors of x under the stored mixture, (K, N, G, L) in float32 or float64."""
        flat = reference.flatten(self._channels_first(x.detach()))
        flat = flat.to(reference.compute_dtype(flat))
        log_lambda, mean, var = (t.to(flat.dtype) for t in (self.log_weights(), self.mean, self.log_var.exp()))
        return reference.posterior(flat, log_lambda, mean, var + self.eps, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        r"""Normalise x (N, C, \*)."""
        x = self._channels_first(x)
        if self.training:
            y = self._train(x)
        else:
            y, _ = self._normalise(x, self.log_weights(), self.mean, self.log_var.exp(), "learned")
        return self._finish(y)

    def _train(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        return {
            "average": (self.average, "em"),
            "scale": (self.scale, "paper"),
            "momentum": (self.momentum, 0.1),
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
        init: means from "uniform" U(-1, 1), or by "kmeans++" from the first training batch.
        momentum: weight of the new batch in the averages, PyTorch's orientation.
        eps: added to every variance, in squared units of x.
        affine: scale and shift each channel by learned ``weight`` and ``bias`` (C,).
        channel_dim: the dimension of x that holds the channels; -1 for (N, T, C).
        process_group: None for the statistics of this rank alone; "world" or a group of
            ``torch.distributed`` for those of the joined batch in training, forward and backward, with moving
            averages equal on all its ranks. A training forward, without gradients too, and its backward are
            then collective; evaluation is not. A layer that holds a group cannot be copied or pickled, as
            torch's cannot; with "world" it can.
        seed: of the means and of k-means++, apart from the global generator.
        backend: "auto", "reference" or "eager".

    Shape:
        x (N, C, \*) float; output as x. Parameters or buffers ``logits`` (K,), ``mean`` and ``log_var`` (K,
        C). A batch with a non-finite value, or none at all, leaves buffers as they are.

    Raises:
        ValueError: an option is out of range; x has not C channels; x holds one value per channel in
        training.

    Source: arXiv:2403.16798, Eqs. 4-9 and 15, Algorithm 2 with the batch's moments in lines 13 and 14.
    """

    def __init__(
        self,
        num_features: int,
        num_components: int,
        *,
        groups: int | None = None,
        update: Update = "moving_average",
        statistics: Statistics = "batch",
        average: Average = "em",
        scale: Scale = "paper",
        init: MixtureInit = "uniform",
        momentum: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        process_group: object = None,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        ops.check_choice("update", update, get_args(Update))
        ops.check_choice("statistics", statistics, get_args(Statistics))
        if statistics == "learned" and update == "moving_average":
            raise ValueError("statistics: 'learned' needs update='weight', got update='moving_average'")
        super().__init__(
            num_features,
            num_components,
            groups=groups,
            average=average,
            scale=scale,
            init=init,
            momentum=momentum,
            eps=eps,
            affine=affine,
            channel_dim=channel_dim,
            process_group=process_group,
            seed=seed,
            backend=backend,
            learned=update == "weight",
        )
        self.update: Update = update
        self.statistics: Statistics = statistics
        self.reset_parameters()

    def _store_seed(self, points: Tensor, fit: Fit, finite: Tensor) -> None:
        finite = finite & fit.is_finite()
        log_var = fit.var.clamp(min=self.eps).log()
        self._write(Stored(torch.zeros_like(self.logits), fit.mean, log_var), where=finite)
        self.initialized |= finite

    def _train(self, x: Tensor) -> Tensor:
        self.seed_from(x)
        if self.statistics == "batch":
            self._check_training_batch(x)
        # A copy, because the average moves the buffer before the backward pass needs it.
        mean = self.mean if self.update == "weight" else self.mean.clone()
        y, moments = self._normalise(x, self.log_weights(), mean, self.log_var.exp(), self.statistics)
        if moments is None or self.update == "weight":
            return y
        if x.numel() or sync.active(self.process_group) is not None:
            self._average_in(moments)
        return y

    def _options(self) -> dict[str, Any]:
        return {
            "groups": (self.groups, self.num_features),
            "update": (self.update, "moving_average"),
            "statistics": (self.statistics, "batch"),
            "init": (self.init, "uniform"),
            "process_group": (self.process_group, None),
            **super()._options(),
        }
