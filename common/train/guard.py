"""The guard of a training step: gradients become updates only if all of them, and the losses, are finite.

The check stays on the device: a flag, once set, masks every later update (through the optimizer's ``found_inf``,
which fused Adam and SGD honour) and puts the buffers back. The host reads the flag when it can afford to wait:
every step on a CPU, every few steps on a GPU. Whenever it is read, the state is the one before the first bad step.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from common.runtime.distributed import smallest_over_ranks
from common.runtime.errors import NonFiniteError

_ALL_WELL = torch.iinfo(torch.int64).max
_SMALLEST_SCALE = 2.0**-10  # a gradient that overflows float16 even so is not an overflow of float16


class StepGuard:
    """Keeps non-finite losses and gradients of a step away from everything that persists.

    In each step: `begin`, then `update` for each optimizer, then `finish`; `check` reads the flag.

    Args:
        modules: networks whose buffers (running averages) are put back after a bad step.
        terms: names of the losses, as they are logged (``loss/d``); the gradient of ``loss/d`` is ``gradient/d``.
        device: where the networks are.
    """

    def __init__(self, modules: Iterable[nn.Module], terms: Sequence[str], device: torch.device) -> None:
        self._buffers = [buffer for module in modules for buffer in module.buffers()]
        self._before = [torch.empty_like(buffer) for buffer in self._buffers]
        losses = list(terms)
        self._terms = losses + [f"gradient/{term.split('/')[-1]}" for term in losses]
        # Code of the first bad thing on any rank, step * len(terms) + term.
        self._first = torch.full((), _ALL_WELL, dtype=torch.int64, device=device)
        self._step = 0
        self._scalers: dict[str, torch.amp.GradScaler] = {}

    def begin(self, step: int) -> None:
        """Remember the buffers as they are before step ``step`` (counted from 1 in messages)."""
        self._step = step
        for kept, buffer in zip(self._before, self._buffers, strict=True):
            kept.copy_(buffer)

    def update(
        self,
        term: str,
        losses: Iterable[Tensor],
        count: int,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        clip: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Update by the gradient of the mean of some losses, unless one of them or a gradient is not finite.

        Args:
            term: the losses' name, one of those given at construction.
            losses: scalars, each taken when the one before has gone backward.
            count: how many there are.
            optimizer: one whose step honours ``found_inf`` (``fused=True``).
            scaler: for float16; where it is enabled, an overflowing gradient skips the step and lowers its scale,
                and counts as non-finite only once the scale is below 2**-10.
            clip: scale the gradient down to at most this 2-norm.

        Returns:
            The mean loss, and the 2-norm of the gradient before it was scaled down; both detached.
        """
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._first.device)
        for loss in losses:
            self._note(term, torch.isfinite(loss.detach()))
            total = total + loss.detach().float() / count
            scaler.scale(loss / count).backward()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if scaler.is_enabled():
            self._scalers[term] = scaler
            # GradScaler decides for itself whether to step: a NaN makes a bad loss skip it.
            gradients[0].add_(torch.where(self._first == _ALL_WELL, 0.0, math.nan))
            scaler.unscale_(optimizer)
        norm = get_total_norm(gradients)
        if clip is not None:
            clip_grads_with_norm_([p for group in optimizer.param_groups for p in group["params"]], clip, norm)
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
            return total, norm
        largest = get_total_norm(gradients, norm_type=math.inf)  # the 2-norm could overflow by itself
        self._note(f"gradient/{term.rsplit('/', maxsplit=1)[-1]}", torch.isfinite(largest))
        optimizer.found_inf = (self._first != _ALL_WELL).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        return total, norm

    def finish(self) -> None:
        """Put the buffers back if anything in this step, or in an earlier one, was not finite."""
        good = self.good
        for kept, buffer in zip(self._before, self._buffers, strict=True):
            buffer.copy_(torch.where(good, buffer, kept))

    @property
    def good(self) -> Tensor:
        """Whether everything was finite so far, on the device."""
        return self._first == _ALL_WELL

    def reset(self) -> None:
        """Clear the flag, after an earlier state has been restored."""
        self._first.fill_(_ALL_WELL)

    def check(self) -> None:
        """Read the flag (waits for the device).

        Raises:
            NonFiniteError: if any step so far had a non-finite loss or gradient; names the first.
        """
        if (code := int(self._first)) != _ALL_WELL:
            step, term = divmod(code, len(self._terms))
            raise NonFiniteError(
                f"{self._terms[term]} is not finite in step {step}; weights and averages were kept as before that step"
            )
        for term, scaler in self._scalers.items():
            if scaler.get_scale() < _SMALLEST_SCALE:
                raise NonFiniteError(
                    f"gradient/{term.split('/')[-1]} is not finite in step {self._step}, with the float16 scale "
                    f"down to {scaler.get_scale():g}"
                )

    def _note(self, term: str, finite: Tensor) -> None:
        code = self._step * len(self._terms) + self._terms.index(term)
        self._first = torch.where((self._first == _ALL_WELL) & ~finite, code, self._first)
        smallest_over_ranks(self._first)  # what one rank must not apply, none may
