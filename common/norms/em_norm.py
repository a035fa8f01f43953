"""Mixture Normalization: UCB-Norm's transforms under a mixture that EM fits to the batch."""

from typing import Any, Unpack

import torch
from torch import Tensor

from . import checks
from .backends import reference
from .estimation import em, operators
from .estimation.averages import Stored
from .estimation.em import Fit
from .unsupervised import MixtureInit, MixtureLayer, MixtureOptions, shows_shared_options


class MixtureNorm(MixtureLayer):
    r"""Mixture Normalization (MN): UCBNorm's transforms under a mixture fitted to the batch by EM.

    In training a mixture is fitted to up to 4,096 locations of the batch, seeded by greedy k-means++ and one Lloyd
    step the first time and by the previous fit afterwards; its posteriors weigh the batch's moments (Eqs.
    6-9). No gradient reaches the mixture. Evaluation uses Eq. 15 under moving averages of the batch's
    moments, until ``calibrate`` replaces them by one fit to many batches.

    Args:
        num_features: channels C.
        num_components: components K.
        groups: groups of channels that share one posterior; None is one channel each.
        init: "kmeans++", or means from "uniform" U(-1, 1) as the first fit's start.
        refit_every: training batches between fits.
        em_steps: EM steps of a fit.
        options: as UCBNorm describes them: average, scale, momentum, min_weight, eps, affine, channel_dim,
            backend, device and dtype; seed, here of the sampled locations too; process_group, here None, since
            each rank uses its own statistics.

    Shape:
        x (N, C, \*) float; output as x. Buffers ``logits`` (K,), ``mean`` and ``log_var`` (K, C) of
        evaluation, the same with ``fit_`` of the last fit, and ``step``, the training batches seen. A batch
        with a non-finite value changes none but ``step``; one that holds nothing, none.

    Raises:
        ValueError: an option is out of range; x has not C channels; x holds one value per channel in
        training.

    Source: Kalayeh and Shah, "Training Faster by Separating Modes of Variation in Batch-normalized Models",
    as summarised in arXiv:2403.16798, sections II-B and III-C; covariances are diagonal.
    """

    fit_logits: Tensor
    fit_mean: Tensor
    fit_log_var: Tensor

    @shows_shared_options
    def __init__(
        self,
        num_features: int,
        num_components: int,
        *,
        groups: int | None = 1,
        init: MixtureInit = "kmeans++",
        refit_every: int = 1,
        em_steps: int = 10,
        **options: Unpack[MixtureOptions],
    ) -> None:
        if (process_group := options.get("process_group")) is not None:
            raise ValueError(
                "process_group: expected None, since MixtureNorm fits each rank's batch by an EM of its own and has no "
                f"synchronised one (UCBNorm has), got {process_group!r}"
            )
        super().__init__(num_features, num_components, False, groups=groups, init=init, **options)
        checks.check_size("refit_every", refit_every)
        checks.check_size("em_steps", em_steps)
        self.refit_every, self.em_steps = refit_every, em_steps
        for name in Stored._fields:
            self.register_buffer(f"fit_{name}", torch.empty_like(getattr(self, name)))
        self.register_buffer("step", torch.tensor(0, device=self.mean.device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to equal weights, unit variances and unseeded means."""
        super().reset_parameters()
        self._write_fit(Stored(self.logits, self.mean, self.log_var))
        self._reset_step()

    def _write_fit(self, new: Stored, where: Tensor | None = None) -> None:
        for name, value in zip(Stored._fields, new, strict=True):
            old = getattr(self, f"fit_{name}")
            old.copy_(value if where is None else torch.where(where, value.to(old), old))

    def _seeding_steps(self) -> int:
        return self.em_steps

    def _store_seed(self, fit: Fit, found: Tensor) -> None:
        self._write_fit(self._stored(fit), where=found)
        self._write(self._stored(fit), where=found)
        self.initialized |= found

    def _calibration_start(self, dtype: torch.dtype) -> tuple[Fit, int]:
        return self._fit(dtype, "fit_"), 2 * self.em_steps

    def _store_calibrated(self, points: Tensor, fit: Fit) -> None:
        super()._store_calibrated(points, fit)
        self._write_fit(self._stored(fit))

    @torch.no_grad()
    def _refit(self, x: Tensor, step: Tensor, seeded: bool | Tensor) -> None:
        """Fit anew if this step, counted on the CPU but in an exported graph, is one to do so."""
        how, dtype = (self.groups, self.seed, self.eps, self.em_steps), reference.compute_dtype(x)
        if self._in_graph():
            ready = seeded if isinstance(seeded, Tensor) else None
            last, due = self._fit(dtype, "fit_"), (ready, step, self.refit_every)
            *new, found = operators.refit_mixture(x.detach(), *last, *due, *how)
            self._write_fit(self._stored(Fit(*new)), where=found)
        elif seeded and int(step) % self.refit_every == 0:
            fit, found = em.refit(x, self._fit(dtype, "fit_"), int(step), *how)
            self._write_fit(self._stored(fit), where=found)

    def _train(self, x: Tensor) -> Tensor:
        self._check_training_batch(x)
        if x.numel():
            self._refit(x, self._count_step(), self._seed(x))
        if self._fused(x, "batch"):
            fit = Stored(self.fit_logits, self.fit_mean, self.fit_log_var)
            y, state = self._normalise_fused(x, fit, "batch", 0.0)
            if state is not None:
                self._average_in_fused(state, self.logits.clone())
            return y
        log_lambda = self.fit_logits.log_softmax(0)
        y, moments = self._normalise(x, log_lambda, self.fit_mean.clone(), self.fit_log_var.exp(), "batch")
        if moments is not None and x.numel():
            self._average_in(moments)
        return y

    def _options(self) -> dict[str, Any]:
        return {
            "groups": (self.groups, 1),
            "init": (self.init, "kmeans++"),
            **super()._options(),
            "refit_every": (self.refit_every, 1),
            "em_steps": (self.em_steps, 10),
        }
