"""Make any normalization layer by name: the family's, those it is compared with, and those that users add."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from . import checks, functional
from .backends import capture, recomputation, reference
from .em_norm import MixtureNorm
from .layer import DeviceLike, leaf
from .supervised import SCBNorm, SCBNormBase
from .unsupervised import UCBNorm


class BatchNorm(_BatchNorm):
    r"""torch's batch normalization for x (N, C, \*) of any rank; state and options as ``nn.BatchNorm2d``."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: DeviceLike = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        sizes = _checked_options(num_features, eps, momentum, dtype)
        super().__init__(*sizes, affine, track_running_stats, device, dtype, **options)

    def _check_input_dim(self, input: Tensor) -> None:
        _check_input(self, input)
        if (self.training or self.running_mean is None) and input.numel() == self.num_features:
            shape = tuple(input.shape)
            raise ValueError(f"x: expected more than one value per channel to take statistics of, got {shape}")

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        r"""Normalise x (N, C, \*)."""
        return super().forward(input)


class InstanceNorm(_InstanceNorm):
    r"""torch's instance normalization for x (N, C, \*), L > 1; state and options as ``nn.InstanceNorm2d``."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: DeviceLike = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        sizes = _checked_options(num_features, eps, momentum, dtype)
        super().__init__(*sizes, affine, track_running_stats, device, dtype, **options)

    def _check_input_dim(self, input: Tensor) -> None:
        _check_input(self, input)
        if self.training or self.running_mean is None:
            checks.check_positions(input)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        r"""Normalise x (N, C, \*); every input has a batch dimension."""
        self._check_input_dim(input)
        return self._apply_instance_norm(input)


def _checked_options(num_features: object, eps: object, momentum: object, dtype: object) -> tuple[int, float, Any]:
    checks.check_dtype(dtype)
    size, eps = checks.check_size("num_features", num_features), checks.check_eps(eps)
    return size, eps, None if momentum is None else checks.check_momentum(momentum)


def _check_input(norm: _NormBase, x: Tensor) -> None:
    checks.check_input(x, norm.num_features)
    like = norm.running_mean if norm.weight is None else norm.weight
    if like is not None:
        checks.check_device("x", x, like.device, "the layer")


class DomainBatchNorm(nn.Module):
    r"""One BatchNorm a domain: each normalises its samples by their own statistics, then by its affine map.

    Args:
        num_features: channels C.
        num_domains: domains K.
        options: of ``nn.BatchNorm2d``.

    Shape:
        x (N, C, \*); cluster (N,) int64 in [0, K), in evaluation too; output as x. A domain absent from a
        batch keeps its running statistics, and its parameters have gradients of zero.

    Raises:
        ValueError: an option is out of range; x has not C channels, cluster is not (N,) int64, one of them is on
            another device than the layer, or a domain holds one value per channel in training.
        IndexError: an id outside [0, K), on the CPU.

    A graph (torch.compile, torch.export, torch.jit.trace) cannot hold shapes that follow from ids. There all domains
    are weighed by membership, with equal results; a wrong id, and in training a domain with one value per channel,
    give NaN.

    Source: Chang et al., "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation", CVPR 2019.
    """

    _give_ids: ClassVar[str] = checks.GIVE_IDS

    def __init__(self, num_features: int, num_domains: int, **options: Any) -> None:
        super().__init__()
        num_domains = checks.check_size("num_domains", num_domains)
        self.domains = nn.ModuleList(BatchNorm(num_features, **options) for _ in range(num_domains))
        self.num_features = int(num_features)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refuse the domains of ``SyncBatchNorm.convert_sync_batchnorm``, which replaces modules by this method."""
        if module is not None and any(isinstance(child, nn.SyncBatchNorm) for child in module.children()):
            raise ValueError(
                "DomainBatchNorm: a domain cannot be a SyncBatchNorm, since a process may lack it; take kind 'scb', "
                "which has no statistics, or call convert_sync_batchnorm on the modules around this layer alone"
            )
        super().add_module(name, module)

    def reset_parameters(self) -> None:
        """Reset every domain's parameters and running statistics."""
        for domain in self.domains:
            assert isinstance(domain, BatchNorm)
            domain.reset_parameters()

    @leaf
    def forward(self, x: Tensor, cluster: Tensor | None = None) -> Tensor:
        r"""Normalise x (N, C, \*) by domain."""
        first = self.domains[0]
        assert isinstance(first, BatchNorm)
        _check_input(first, x)
        checks.check_cluster(cluster, x, len(self.domains), 0, self._give_ids)
        assert cluster is not None
        if capture.unseen():
            with torch.autocast(x.device.type, enabled=False):
                return self._by_membership(reference.flatten(x), cluster).to(x.dtype).reshape(x.shape)
        order = cluster.argsort(stable=True)
        counts = torch.bincount(cluster, minlength=len(self.domains)).tolist()
        shares = x[order].split(counts)
        for share in shares:  # before the statistics of any domain move
            if len(share):
                first._check_input_dim(share)
        done = [
            _normalised(norm, share) if len(share) else functional.empty(share, *norm.parameters())
            for norm, share in zip(self.domains, shares, strict=True)
        ]
        return torch.cat(done)[order.argsort()]

    def _by_membership(self, x: Tensor, cluster: Tensor) -> Tensor:
        """Normalise x (N, C, L) by domain, in the compute dtype."""
        x = x.to(reference.compute_dtype(x))
        cluster = cluster.masked_fill(cluster < 0, len(self.domains))  # no domain's: NaN
        first = self.domains[0]
        assert isinstance(first, BatchNorm)
        if self.training or first.running_mean is None:
            mean, var, count = _domain_moments(x, cluster, len(self.domains))
            if self.training and first.running_mean is not None:
                for domain, *moments in zip(self.domains, mean.detach(), var.detach(), count, strict=True):
                    _track(domain, *moments)
            var = var.masked_fill(count < 2, math.nan)
        else:
            mean, var = (self._table(name, x) for name in ("running_mean", "running_var"))
        tables = [mean, (var + first.eps).rsqrt()]
        if first.weight is not None:
            tables += [self._table("weight", x), self._table("bias", x)]
        centre, rho, *affine = (reference.gather_rows(table, cluster)[..., None] for table in tables)
        y = (x - centre) * rho
        return torch.addcmul(affine[1], y, affine[0]) if affine else y

    def _table(self, name: str, x: Tensor) -> Tensor:
        """Return a parameter or buffer of all domains, (K, C)."""
        return torch.stack([getattr(domain, name) for domain in self.domains]).to(x.dtype)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """Return norm(x); its running statistics have moved already where a backward pass repeats a training pass."""
    if norm.running_mean is None or not norm.training or not recomputation.running():
        return norm(x)
    mean, var = recomputation.copies(norm.running_mean, norm.running_var)  # a checkpoint counts what autograd saves
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, True, 0.0, norm.eps)


def _domain_moments(x: Tensor, cluster: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance (K, C) of x (N, C, L) by domain, and how many values a channel has, (K, 1)."""
    member = (cluster == torch.arange(num, device=x.device)[:, None])[..., None]  # (K, N, 1)
    count = member.sum(1).to(x.dtype) * x.shape[2]

    def average(t: Tensor) -> Tensor:  # by selection, since a product with 0 would spread NaN over all domains
        return torch.where(member, t.sum(2), 0).sum(1) / count.clamp(min=1)

    mean = average(x)
    return mean, average((x - mean[cluster.clamp(max=num - 1)][..., None]).square()), count


@torch.no_grad()
def _track(norm: Any, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Move a BatchNorm's running statistics by moments (C,) of count (1,) values, if these are more than one."""
    norm.num_batches_tracked += (count[0] > 1).to(torch.int64)
    weight = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked
    for running, new in ((norm.running_mean, mean), (norm.running_var, var * count / (count - 1))):
        moved = running + weight * (new - running)
        running.copy_(torch.where(count > 1, moved, running))


class NoNorm(nn.Identity):
    """No layer at that place: x as it is, whatever cluster its samples belong to."""

    def forward(self, input: Tensor, cluster: Tensor | None = None) -> Tensor:
        """Return x."""
        return input


class _Kind(NamedTuple):
    build: Callable[..., nn.Module]
    takes_clusters: bool
    options: dict[str, Any]


def _options_of(build: Callable[..., object]) -> dict[str, Any]:
    """Return what has a default in the signature of a layer or a function, with the default."""
    return {p.name: p.default for p in inspect.signature(build).parameters.values() if p.default is not p.empty}


_KINDS = {
    "bn": _Kind(lambda channels, _, **options: BatchNorm(channels, **options), False, _options_of(BatchNorm)),
    "in": _Kind(lambda channels, _, **options: InstanceNorm(channels, **options), False, _options_of(InstanceNorm)),
    "dsbn": _Kind(DomainBatchNorm, True, _options_of(BatchNorm)),
    "mn": _Kind(MixtureNorm, False, _options_of(MixtureNorm)),
    "scb": _Kind(SCBNorm, True, _options_of(SCBNorm)),
    "scb_base": _Kind(SCBNormBase, True, _options_of(SCBNormBase)),
    "ucb": _Kind(UCBNorm, False, _options_of(UCBNorm)),
    "none": _Kind(lambda *_: NoNorm(), False, {}),
}
BUILT_IN, WITHOUT_COMPONENTS, MIXTURES = tuple(_KINDS), ("bn", "in", "none"), ("mn", "ucb")


def register_norm(name: str, build: Callable[..., nn.Module], *, takes_clusters: bool = False) -> None:
    r"""Add a kind of layer, which ``make_norm`` and ``NormConfig.kind`` then know by its name.

    Args:
        name: what it is called: lower-case letters, digits and underscores, a letter first.
        build: called as ``build(num_features, num_components, **options)``, returns the layer for
            x (N, C, \*). What has a default in its signature is an option; those with the name of a setting of
            ``NormConfig`` (eps, momentum, affine, ...) are set by it, ``seed`` and ``backend`` are passed where taken.
            Options it refuses raise ValueError, "eps: expected ...".
        takes_clusters: the layer is called as ``layer(x, cluster)``, with cluster (N,) int64.

    Raises:
        ValueError: the name is taken or none, or build cannot be called with two sizes alone.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name: expected lower-case letters, digits and underscores, a letter first, got {name!r}")
    if name in _KINDS:
        raise ValueError(f"name: {name} is taken; the kinds are {', '.join(_KINDS)}")
    try:
        signature = inspect.signature(build)
        signature.bind("num_features", "num_components")
    except (TypeError, ValueError) as error:  # not callable, or without a signature
        raise ValueError(
            f"build: expected a function of num_features, num_components and options with defaults ({error})"
        ) from None
    options = {p.name: p.default for p in [*signature.parameters.values()][2:] if p.default is not p.empty}
    _KINDS[name] = _Kind(build, takes_clusters, options)


def kinds(*, takes_clusters: bool | None = None) -> tuple[str, ...]:
    """Return the names of all kinds, or of those that take the samples' clusters, or take none."""
    return tuple(name for name, kind in _KINDS.items() if takes_clusters in (None, kind.takes_clusters))


def check_kind(field: str, kind: object) -> None:
    """Raise ValueError, naming the field, the kinds and the nearest one, unless kind is one of them."""
    if kind not in tuple(_KINDS):
        near = difflib.get_close_matches(str(kind), _KINDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{field}: expected one of {', '.join(_KINDS)}, got {kind}{hint}")


def default_options(kind: str) -> dict[str, Any]:
    """Return the keyword options of a kind's layer and their defaults.

    Raises:
        ValueError: an unknown kind.
    """
    check_kind("kind", kind)
    return dict(_KINDS[kind].options)


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown kind, or an option that its layer does not have."""
    known = default_options(kind)
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{name}: {value!r} is no option of kind {kind!r}; it has {', '.join(known) or 'none'}")


def make_norm(kind: str, num_features: int, num_components: int, **options: Any) -> nn.Module:
    """Make the normalization layer of a kind.

    Args:
        kind: "bn" (batch), "in" (instance), "dsbn" (one BatchNorm a domain), "mn" (``MixtureNorm``),
            "scb" (``SCBNorm``), "scb_base" (``SCBNormBase``), "ucb" (``UCBNorm``), "none" (no layer at that place),
            or one added by ``register_norm``. dsbn, scb and scb_base take ``(x, cluster)``, the others x alone.
        num_features: channels C.
        num_components: components, clusters or domains K; "bn", "in" and "none" have none and ignore it.
        options: keyword options of the layer.

    Raises:
        ValueError: an unknown kind, an option that the layer does not have, or a kind whose layer is none.
    """
    check_options(kind, options)
    layer = _KINDS[kind].build(num_features, num_components, **options)
    if not isinstance(layer, nn.Module):
        raise ValueError(f"kind: expected {kind} to make a torch.nn.Module, got {type(layer).__name__}")
    return layer
