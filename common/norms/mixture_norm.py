"""Mixture Normalization: UCB-Norm's transforms under a mixture that EM fits to the batch."""

from typing import Any

import torch
from torch import Tensor

from . import functional, graph_ops, mixture, seeding
from .backends import checkpointing, graphs, reference
from .backends.cpu import library
from .backends.reference import Moments, Scale
from .backends.triton import em_ops, launch, ops
from .base import DeviceLike
from .mixture import Average, Fit, Stored
from .ucb_norm import MixtureInit, MixtureLayer


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
        self._words = seeding.key(self.seed, "points", "fit")  # here, because a graph cannot find it
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
        self.initialized.masked_fill_(found, 1)

    def _calibration_start(self, dtype: torch.dtype) -> tuple[Fit, int]:
        return self._fit(dtype, "fit_"), 2 * self.em_steps

    def _store_calibrated(self, points: Tensor, fit: Fit) -> None:
        super()._store_calibrated(points, fit)
        self._write_fit(self._stored(fit))

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
                # A tensor, because torch.compile would compile anew for each value of an int.
                self._host_step = self.step.to("cpu", copy=True)
            before = self._host_step
            self._host_step = before + 1  # in place fails after a step in inference mode
        self.step += 1
        return before

    @checkpointing.computed_once
    @torch.no_grad()
    def _refit(self, x: Tensor, before: Tensor, seeded: bool | Tensor) -> Stored | None:
        """Return the fit to this batch, or None unless this step, counted on the CPU, is one to make it.

        In a graph, which cannot look at it, that may be the last fit.
        """
        if self.refit_every > 1:
            graphs.refuse(x, graphs.COUNTED)
        ready = seeded if isinstance(seeded, Tensor) else None
        due = self._in_graph() or (seeded and (self.refit_every == 1 or int(before) % self.refit_every == 0))
        if not due:
            return None
        if self._fused(x, "batch"):
            every = self.refit_every if self._in_graph() else 1
            rule = self.groups, self.eps, self.em_steps, mixture.MAX_POINTS, *self._words
            limits = self.min_weight, mixture.VARIANCE_FLOOR, mixture.EMPTY
            last = (t.contiguous() for t in self._last_fit())
            flat = reference.flatten(x.detach())
            given = flat, *last, self.step, ready, before, every, *rule, *limits
            return Stored(*launch.call(em_ops.fit_mixture, em_ops.launch_fit_mixture, *given))
        how, last = (self.groups, self.seed, self.eps, self.em_steps), self._fit(reference.compute_dtype(x), "fit_")
        if self._in_graph():
            *fit, found = graph_ops.refit_mixture(x.detach(), *last, ready, before, self.refit_every, *how)
            pairs = zip(self._stored(Fit(*fit)), self._last_fit(), strict=True)
            return Stored(*(torch.where(found, new, old.to(new.dtype)) for new, old in pairs))
        return self._stored(mixture.refit(x, last, self.step, *how, compiled=self._native(x)))

    def _last_fit(self) -> Stored:
        return Stored(self.fit_logits, self.fit_mean, self.fit_log_var)

    @checkpointing.computed_once
    @torch.no_grad()
    def _store_fit(self, fit: Stored, moments: Moments) -> None:
        """Store a fit, unless the batch that has these moments under it, or the fit, is not finite throughout."""
        self._write_fit(fit, where=mixture.is_finite(moments) & Fit(*fit).is_finite())

    @checkpointing.computed_once
    @torch.no_grad()
    def _move_fused(self, state: Tensor, new: Stored | None) -> None:
        """Store a fit and move the averages, by the moments of a state under the fit."""
        averaged, last = self._mixture(), self._last_fit()
        if all(t.is_contiguous() for t in (*averaged, *last)):
            fits = (None,) * 6 if new is None else (*new, *last)
            rule = self.momentum, self.average == "paper", self.min_weight, False
            ops.averages_moved(averaged, self.logits.clone(), state, *fits, *rule)
            return
        moments = ops.moments_of(state, self.groups)
        if new is not None:
            self._store_fit(new, moments)
        self._average_in(moments)

    def _train(self, x: Tensor) -> Tensor:
        self._check_training_batch(x)
        if checkpointing.running():
            return self._repeat(x, 0.0)
        new = self._refit(x, self._count_step(), self._seed(x)) if x.numel() else None
        fit = self._last_fit() if new is None else new
        fused = self._fused(x, "batch")
        native = not fused and self._native(x)
        fit = self._given(x, fit, keeps=fused or native)
        if fused:
            y, state = self._normalise_fused(x, fit, "batch", 0.0)
            if state is not None:
                self._move_fused(state, new)
            return y
        if native:
            y, state = self._normalise_native(x, fit, 0.0)
            if new is not None:
                self._store_fit(new, library.moments_of(state, self.num_components, self.groups))
            self._average_in_native(state)
            return y
        y, moments = self._normalise(x, fit, 0.0, "batch")
        if moments is not None and x.numel():
            if new is not None:
                self._store_fit(new, moments)
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
