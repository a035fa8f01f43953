"""The ``triton`` backend: fused kernels on a GPU."""

import math
from typing import Any

import torch
from torch import Tensor

from ... import mixture
from ...mixture import FitRule, Rule
from .. import graph_ops, reference
from ..backend import Affine, Backend, ClusterOptions, ClusterParams, Options, may_be_unknown
from ..eager import Eager, unknown_cluster
from ..reference import MixtureParams, Moments
from . import cluster_ops, launch, ops


class Triton(Backend):
    """Fused kernels; a state is a table (planes, K, C) of the mixture and the batch's moments, see ``tiles``."""

    copies_params = False

    def normalise(
        self, x: Tensor, params: MixtureParams, affine: Affine, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Backend``."""
        floor = math.log(options.min_weight) if options.min_weight else launch.NO_FLOOR
        tables = [t if t is None else t.contiguous() for t in (*params, *affine)]
        kappa = options.kappa(len(params.mean))
        given = reference.flatten(x), *tables, options.groups, options.eps, kappa, floor, options.stored
        if options.statistics == "learned":
            return ops.differentiable_learned(*given).reshape(x.shape), None
        y, state = ops.differentiable_mixture(*given)
        return y.reshape(x.shape), state.detach()

    def moments(self, state: Tensor, num_components: int, groups: int) -> Moments:
        """Return views of a state."""
        mass, mean, var = state[4:7].unbind()
        return Moments(mass[:, :: mass.shape[1] // groups], mean, var)

    def update(
        self,
        params: MixtureParams,
        state: Tensor,
        groups: int,
        rule: Rule,
        fit: tuple[MixtureParams | None, MixtureParams] | None = None,
    ) -> None:
        """See ``Backend``; one launch, and a copy of the logits where the state is under a fit."""
        new, last = (None, None) if fit is None else fit
        if not all(t.is_contiguous() for t in (*params, *(last or ()))):
            super().update(params, state, groups, rule, fit)
            return
        fits = (None,) * 6 if new is None or last is None else (*new, *last)
        before = None if fit is None else params.logits.clone()
        numbers = rule.momentum, rule.average == "paper", rule.min_weight, rule.shared_variance
        given = *params, before, state, *fits, *numbers
        launch.call(ops.move_averages, ops.launch_move_averages, *given, changed=(*params, *fits[3:]))

    def fit(
        self, x: Tensor, last: MixtureParams, step: Tensor, rule: FitRule, gate: graph_ops.Gate | None = None
    ) -> MixtureParams:
        """See ``Backend``; asks the device for nothing."""
        ready, before, every = gate or (None, step, 1)
        numbers = rule.groups, rule.eps, rule.steps, mixture.MAX_POINTS, rule.high, rule.low
        limits = rule.min_weight, mixture.VARIANCE_FLOOR, mixture.EMPTY
        tables = (t.contiguous() for t in last)
        given = reference.flatten(x.detach()), *tables, step, ready, before, every, *numbers, *limits
        return MixtureParams(*launch.call(ops.fit_mixture, ops.launch_fit_mixture, *given))

    def normalise_clusters(
        self, x: Tensor, cluster: Tensor | None, params: ClusterParams, affine: Affine, options: ClusterOptions
    ) -> Tensor:
        """See ``Backend``; an unknown cluster that the kernels do not take is a mixture of equal weights."""
        inside = options.allow_unknown and cluster_ops.takes_unknown(x.shape[1], options.unknown_posterior)
        if cluster is None or (options.allow_unknown and not inside):
            return reference.affine(self._some_unknown(x, cluster, params, options), *affine)
        return self._known(x, cluster, params, affine, options, inside)

    def _known(
        self,
        x: Tensor,
        cluster: Tensor,
        params: ClusterParams,
        affine: Affine,
        options: ClusterOptions,
        inside: bool,
    ) -> Tensor:
        """Return Eq. 10, and Eq. 12 for ids of -1 if the kernels are to take them inside."""
        mean, var, *biases = params
        if not (mean.mT.is_contiguous() and var.mT.is_contiguous() and mean.stride() == var.stride()):
            mean, var = mean.contiguous(), var.contiguous()
        rows = [t if t is None else t.contiguous() for t in (*biases, *affine)]
        kappa = math.sqrt(len(mean)) if options.unknown_scale == "paper" else 1.0
        numbers = options.eps, kappa, -1 if options.allow_unknown else 0, options.stored, inside
        flat = reference.flatten(x)
        y = cluster_ops.differentiable_clusters(flat, cluster.contiguous(), mean, var, *rows, *numbers)
        return y.reshape(x.shape)

    def _some_unknown(
        self, x: Tensor, cluster: Tensor | None, params: ClusterParams, options: ClusterOptions
    ) -> Tensor:
        """Return Eqs. 10 and 12 where the latter needs the kernels of mixtures, or closed forms where these refuse."""
        mean, var = params.rows()
        mean, var = mean.contiguous(), (var.exp() if options.stored else var).contiguous()

        def norm(x: Tensor, *given: Any) -> tuple[Tensor, Any]:
            refused = launch.mixture_refusal(len(mean), x.shape[1])
            return (Eager() if refused else self).normalise(x, *given)

        def unknown() -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return unknown_cluster(norm, reference.flatten(x), mean.float(), var.float(), options).reshape(x.shape)

        if cluster is None:
            return unknown()
        y = self._known(x, cluster, ClusterParams(mean, var), (None, None), options._replace(stored=False), False)
        if may_be_unknown(cluster):
            y = torch.where((cluster == -1).view(-1, *[1] * (x.ndim - 1)), unknown(), y)
        return y
