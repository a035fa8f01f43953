"""UCB-Norm: normalization under a mixture of moving averages, or of learned weights."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import functional, mixture, seeding
from .backends import checkpointing
from .backends.reference import MixtureParams, Moments, Scale, Statistics
from .base import DeviceLike, MixtureInit, MixtureLayer
from .mixture import Average, Components

Update = Literal["moving_average", "weight"]
Variance = Literal["component", "shared"]
CANDIDATES = 8
"""Locations that a dead component may move to: a cloud of a third of the batch is missed in 4 % of the draws."""


class UCBNorm(MixtureLayer):
    r"""Normalise under a Gaussian mixture whose parameters are moving averages, or learned weights.

    In training each component's posteriors weigh the batch's own moments (Eqs. 6-9); in evaluation the stored
    ones take their place (Eq. 15):

    .. math:: y_i = \sum_k \frac{\tau_{ik}}{\sqrt{\lambda_k}} \frac{x_i - m_k}{\sqrt{v_k + \epsilon}}

    The output variance is not 1 but K where components are well separated, and less in between. With K = 1
    the layer is BatchNorm without bias and weight. Components can die, or agree: watch
    ``health``.

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
        """Return to equal weights, unit variances and means from U(-1, 1), to be seeded again with init="kmeans++"."""
        super().reset_parameters()
        if self.reseed:
            self.usage.fill_(1 / self.num_components)
            self.step.zero_()

    def _store_seed(self, fit: Components, found: Tensor) -> None:
        var = mixture.pooled(fit.var, fit.weight[:, None]) if self.variance == "shared" else fit.var
        log_var = var.clamp(min=self.eps).log().expand_as(self.log_var)
        mixture.write(self.params(), MixtureParams(torch.zeros_like(self.logits), fit.mean, log_var), where=found)
        self.initialized.masked_fill_(found, 1)

    def _store_calibrated(self, points: Tensor, fit: Components) -> None:
        if self.variance == "shared":
            fit = fit._replace(var=mixture.pooled(fit.var, fit.weight[:, None]).expand_as(fit.var))
        super()._store_calibrated(points, fit)
        if self.reseed:
            self.usage.copy_(mixture.component_shares(points, fit, self.groups, self.eps))

    def _train(self, x: Tensor) -> Tensor:
        if self.statistics == "batch":
            self._check_training_batch(x)
        backend, moves = self._backend(x, self.statistics), self.update == "moving_average"
        if moves and checkpointing.running():
            return self._repeat(x, backend, self.min_weight)
        if not checkpointing.running():
            self.seed_from(x)
        params = self.params()
        if moves:
            params = self._given(x, backend, params)
        y, state = self._normalise(x, backend, params, self.statistics, self.min_weight)
        if moves and state is not None:
            self._update(backend, state, shared_variance=self.variance == "shared")
            if self.reseed:
                self._reseed_dead(x, backend.moments(state, self.num_components, self.groups))
        return y

    @checkpointing.computed_once
    @torch.no_grad()
    def _reseed_dead(self, x: Tensor, moments: Moments) -> None:
        """Follow how much each component holds of each group, and move those that hold too little."""
        num, finite = self.num_components, mixture.all_finite(moments)
        usage = self.usage + self.momentum * (mixture.shares(moments) - self.usage)
        dead = (usage < self.reseed) & finite  # (K, G)
        weight, mean, var = self.log_weights().exp(), self.mean, self.log_var.exp()
        new_var = mixture.pooled(var, usage * ~dead)
        self.step += 1  # finite or not: which one is known on the device only
        drawn = mixture.draw_locations(x, num * CANDIDATES, self._words, self.step)
        candidates = drawn.unflatten(0, (num, -1))
        new_mean = mixture.best_additions(candidates, Components(weight, mean, var), new_var, self.groups, self.eps)
        moved = dead.repeat_interleave(self.num_features // self.groups, dim=1)  # (K, C)
        usage = torch.where(dead, 1 / num, usage)
        usage = usage / usage.sum(0)
        # The weights are the mean usage already, but for the floor: they follow where a component is re-seeded.
        new_weight = usage.mean(1).clamp(min=self.min_weight)
        logits = torch.where(dead.any(), new_weight.log(), self.logits)
        log_var = torch.where(moved, mixture.log_of(new_var), self.log_var)
        mixture.write(self.params(), MixtureParams(logits, torch.where(moved, new_mean, mean), log_var))
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
