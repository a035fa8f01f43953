"""Mixture Normalization: UCB-Norm's transforms under a mixture that EM fits to the batch."""

from typing import Any

import torch
from torch import Tensor

from . import functional, mixture
from .backends import checkpointing, graphs
from .backends.backend import Backend
from .backends.graph_ops import Gate
from .backends.reference import MixtureParams, Scale
from .base import DeviceLike, MixtureInit, MixtureLayer
from .mixture import Average, Components, FitRule


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
        average, scale, momentum, min_weight, eps, affine, channel_dim, backend, device, dtype: as UCBNorm describes.
        process_group: None, since each rank uses its own statistics.
        seed: as UCBNorm describes, and of the sampled locations.

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

    def __init__(
        self,
        num_features: int,
        num_components: int,
        *,
        groups: int | None = 1,
        init: MixtureInit = "kmeans++",
        refit_every: int = 1,
        em_steps: int = 10,
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
        if process_group is not None:
            raise ValueError(
                "process_group: expected None, since MixtureNorm fits each rank's batch by an EM of its own and has no "
                f"synchronised one (UCBNorm has), got {process_group!r}"
            )
        super().__init__(
            num_features,
            num_components,
            False,
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
        self.refit_every = functional.check_size("refit_every", refit_every)
        self.em_steps = functional.check_size("em_steps", em_steps)
        self._key = mixture.points_key(self.seed, "fit")  # here, because a graph cannot find it
        for name in MixtureParams._fields:
            self.register_buffer(f"fit_{name}", torch.empty_like(getattr(self, name)))
        self.register_buffer("step", torch.tensor(0, device=self.mean.device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to equal weights, unit variances and unseeded means."""
        super().reset_parameters()
        mixture.write(self.last_fit(), self.params())
        self._reset_step()

    def _seeding_steps(self) -> int:
        return self.em_steps

    def _store_seed(self, fit: Components, found: Tensor) -> None:
        for params in (self.last_fit(), self.params()):
            mixture.write(params, fit.params(self.min_weight), where=found)
        self.initialized.masked_fill_(found, 1)

    def _calibration_start(self, dtype: torch.dtype) -> tuple[Components, int]:
        return Components.of(self.last_fit(), dtype), 2 * self.em_steps

    def _store_calibrated(self, points: Tensor, fit: Components) -> None:
        super()._store_calibrated(points, fit)
        mixture.write(self.last_fit(), fit.params(self.min_weight))

    def forget_initialized(self) -> None:
        """Look at ``initialized`` and ``step`` again when next asked: they were written from outside."""
        super().forget_initialized()
        self._host_step: Tensor | None = None

    def _reset_step(self) -> None:
        self.step.zero_()
        self._host_step = torch.tensor(0, device="cpu")

    @checkpointing.computed_once
    def _count_step(self) -> Tensor:
        """Count a training batch, in ``step`` and on the host; return how many came before.

        Every batch counts, finite or not: which one is known on the device only. So the two agree, and the
        device is asked after ``step`` was written from outside, never from one step to the next; but an exported
        graph, which has ``step`` alone, asks in every one, as torch.func does, whose ``step`` may not be the layer's.
        """
        graphs.refuse_traced()
        if torch.compiler.is_exporting() or graphs.transformed():
            before = self.step.clone()
            if graphs.transformed():
                self._host_step = None  # forward-mode AD moves the layer's own step
        else:
            if self._host_step is None:
                graphs.refuse(self.step, graphs.WARM_UP)
                # A tensor, because torch.compile would recompile for each value of an int.
                self._host_step = self.step.to("cpu", copy=True)
            before = self._host_step
            self._host_step = before + 1  # in place fails after a step in inference mode
        self.step += 1
        return before

    @checkpointing.computed_once
    @torch.no_grad()
    def _refit(self, x: Tensor, backend: Backend, before: Tensor, seeded: bool | Tensor) -> MixtureParams | None:
        """Return the fit to this batch, or None unless this step, counted on the CPU, is one to make it.

        In a graph, which cannot look at it, that may be the last fit.
        """
        if self.refit_every > 1:
            graphs.refuse(x, graphs.COUNTED)
        gate = None
        if self._in_graph():
            gate = Gate(seeded if isinstance(seeded, Tensor) else None, before, self.refit_every)
        elif not seeded or (self.refit_every > 1 and int(before) % self.refit_every):
            return None
        rule = FitRule(self.groups, self.eps, self.em_steps, *self._key, self.min_weight)
        return backend.fit(x, self.last_fit(), self.step, rule, gate)

    def last_fit(self) -> MixtureParams:
        """Return the fit to the last batch that was fitted."""
        return MixtureParams(self.fit_logits, self.fit_mean, self.fit_log_var)

    def _train(self, x: Tensor) -> Tensor:
        self._check_training_batch(x)
        backend = self._backend(x, "batch")
        if checkpointing.running():
            return self._repeat(x, backend, 0.0)
        new = self._refit(x, backend, self._count_step(), self._seed(x)) if x.numel() else None
        last = self.last_fit()
        fit = self._given(x, backend, last if new is None else new)
        y, state = self._normalise(x, backend, fit, "batch", 0.0)
        if state is not None:
            self._update(backend, state, (new, last))
        return y

    def _options(self) -> dict[str, Any]:
        return {
            "groups": (self.groups, 1),
            "init": (self.init, "kmeans++"),
            **super()._options(),
            "refit_every": (self.refit_every, 1),
            "em_steps": (self.em_steps, 10),
        }
