"""What every backend computes for a layer: the protocol, and the rules that those in plain torch share."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import mixture
from ..mixture import FitRule, Rule
from . import graph_ops, graphs, reference
from .reference import MixtureParams, Moments, Scale, Statistics, UnknownPosterior, UnknownScale

Affine = tuple[Tensor | None, Tensor | None]
"""Weight and bias (C,) of the output, both or none."""


class Options(NamedTuple):
    """How a mixture normalises."""

    groups: int
    eps: float
    scale: Scale
    statistics: Statistics
    stored: bool = False
    """The mixture is given as layers store it; otherwise as log weights, means and variances."""
    min_weight: float = 0.0
    """Floor of stored weights."""
    process_group: Any = None
    """Ranks whose batches are one; ``Eager`` alone takes it."""

    def kappa(self, num_components: int) -> float:
        """Return the factor of the output."""
        return 1 / math.sqrt(num_components) if self.scale == "sqrt_k" else 1.0


class ClusterParams(NamedTuple):
    """The mean and the variance of each cluster."""

    mean: Tensor
    """(K, C)."""
    var: Tensor
    """(K, C), or its logarithm."""
    mean_bias: Tensor | None = None
    """Added to each row of mean, (C,)."""
    var_bias: Tensor | None = None

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return mean and var with their biases added."""
        mean, var = ((t if b is None else (t.mT + b[:, None]).mT) for t, b in zip(self[:2], self[2:], strict=True))
        return mean, var


class ClusterOptions(NamedTuple):
    """How samples with clusters are normalised."""

    eps: float
    unknown_scale: UnknownScale
    unknown_posterior: UnknownPosterior
    allow_unknown: bool
    """Whether an id may be -1."""
    stored: bool = False
    """The parameters hold logarithms of variances."""


class Backend:
    r"""How layers compute on some device; a layer asks ``functional.choose_backend`` for one in each forward pass.

    Activations are (N, C, \*) and hold at least one value, outputs are like them, gradients are first derivatives.
    """

    copies_params = True
    """Whether ``normalise`` keeps the given mixture for the backward pass, so that a layer copies one that moves."""

    def normalise(self, x: Tensor, params: MixtureParams, affine: Affine, options: Options) -> tuple[Tensor, Any]:
        """Normalise x by Eqs. 6-9, or by Eq. 15 with statistics="learned"; then apply the affine map.

        Returns:
            The output; and the batch's moments in a form for ``moments`` and ``update``, None with Eq. 15.
        """
        raise NotImplementedError

    def moments(self, state: Any, num_components: int, groups: int) -> Moments:
        """Return the moments in what ``normalise`` returned."""
        return state

    def update(
        self,
        params: MixtureParams,
        state: Any,
        groups: int,
        rule: Rule,
        fit: tuple[MixtureParams | None, MixtureParams] | None = None,
    ) -> None:
        """Move a stored mixture, in place, towards the moments in a state; not if the batch was not finite.

        Args:
            params: moves.
            state: of ``normalise``, under params unless there is a fit.
            groups: of channels.
            rule: how it moves.
            fit: a new fit, or None, and where the last fit is stored, which a finite new one replaces.
        """
        moments = self.moments(state, len(params.mean), groups)
        mixture.store_fit(fit, moments)
        mixture.write(params, mixture.moved(params, moments, rule))

    def fit(
        self, x: Tensor, last: MixtureParams, step: Tensor, rule: FitRule, gate: graph_ops.Gate | None = None
    ) -> MixtureParams:
        """Take EM steps from the last fit on locations of x that this step draws; in a graph only if its gate is open.

        Args:
            x: activation.
            last: the mixture that EM starts from.
            step: int64 (), on the device of x.
            rule: how many steps, and on which locations.
            gate: what a graph decides by when it runs.
        """
        components = mixture.Components.of(last, reference.compute_dtype(x))
        if gate is None:
            points = mixture.sample_points(x, (rule.high, rule.low), step)
            return self._em(points, components, rule).params(rule.min_weight)
        *fit, found = graph_ops.refit_mixture(x.detach(), *components, *gate, *rule[:-1])
        new = mixture.Components(*fit).params(rule.min_weight)
        return MixtureParams(*(torch.where(found, a, b.to(a.dtype)) for a, b in zip(new, last, strict=True)))

    def _em(self, points: Tensor, start: mixture.Components, rule: FitRule) -> mixture.Components:
        """Take EM steps on points (P, C)."""
        return mixture.expectation_maximisation(points, start, rule.groups, rule.eps, rule.steps)

    def normalise_clusters(
        self, x: Tensor, cluster: Tensor | None, params: ClusterParams, affine: Affine, options: ClusterOptions
    ) -> Tensor:
        """Normalise each sample by its cluster (Eq. 10), or by all where it is unknown (Eq. 12); then the affine map.

        Args:
            x: activation.
            cluster: checked ids int64 (N,), -1 for an unknown one; None if all are.
            params: of the clusters.
            affine: weight and bias.
            options: how.
        """
        mean, var = params.rows()
        var = var.exp() if options.stored else var
        any_unknown = False
        if cluster is not None:
            if not options.allow_unknown:
                cluster = cluster.masked_fill(cluster < 0, len(mean))  # a wrong id like any other: NaN on a GPU
            any_unknown = options.allow_unknown and may_be_unknown(cluster)
        with torch.autocast(x.device.type, enabled=False):
            y = self._normalise_clusters(x, cluster, mean, var, any_unknown, options)
        return reference.affine(y, *affine)

    def _normalise_clusters(
        self, x: Tensor, cluster: Tensor | None, mean: Tensor, var: Tensor, any_unknown: bool, options: ClusterOptions
    ) -> Tensor:
        raise NotImplementedError


def may_be_unknown(cluster: Tensor) -> bool:
    """Return whether ids of -1 have to be expected; a GPU and a graph are not asked."""
    return cluster.device.type != "cpu" or graphs.unseen() or bool((cluster == -1).any())


class Reference(Backend):
    """The equations, by autograd."""

    def normalise(
        self, x: Tensor, params: MixtureParams, affine: Affine, options: Options
    ) -> tuple[Tensor, Moments | None]:
        """See ``Backend``."""
        given = params.plain(options.min_weight) if options.stored else params
        groups, eps, scale, statistics, *_ = options
        with torch.autocast(x.device.type, enabled=False):
            y, moments = reference.mixture_norm(x, *given, groups=groups, eps=eps, scale=scale, statistics=statistics)
            return reference.affine(y, *affine), moments

    def _normalise_clusters(
        self, x: Tensor, cluster: Tensor | None, mean: Tensor, var: Tensor, any_unknown: bool, options: ClusterOptions
    ) -> Tensor:
        eps, scale, over, *_ = options
        how: Any = {"eps": eps, "unknown_scale": scale, "unknown_posterior": over, "any_unknown": any_unknown}
        return reference.cluster_norm(x, cluster, mean, var, **how)
