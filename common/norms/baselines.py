"""The layers that mixtures are compared with: BatchNorm, InstanceNorm, DomainBatchNorm, and none."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from . import functional
from .backends import checkpointing, graphs, reference
from .base import DeviceLike, fx_leaf


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

    @fx_leaf
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
            functional.check_positions(input)

    @fx_leaf
    def forward(self, input: Tensor) -> Tensor:
        r"""Normalise x (N, C, \*); every input has a batch dimension."""
        self._check_input_dim(input)
        return self._apply_instance_norm(input)


def _checked_options(num_features: object, eps: object, momentum: object, dtype: object) -> tuple[int, float, Any]:
    functional.check_dtype(dtype)
    size, eps = functional.check_size("num_features", num_features), functional.check_eps(eps)
    return size, eps, None if momentum is None else functional.check_momentum(momentum)


def _check_input(norm: _NormBase, x: Tensor) -> None:
    functional.check_input(x, norm.num_features)
    like = norm.running_mean if norm.weight is None else norm.weight
    if like is not None:
        functional.check_device("x", x, like.device, "the layer")


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

    _give_ids: ClassVar[str] = functional.GIVE_IDS

    def __init__(self, num_features: int, num_domains: int, **options: Any) -> None:
        super().__init__()
        num_domains = functional.check_size("num_domains", num_domains)
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

    @fx_leaf
    def forward(self, x: Tensor, cluster: Tensor | None = None) -> Tensor:
        r"""Normalise x (N, C, \*) by domain."""
        first = self.domains[0]
        assert isinstance(first, BatchNorm)
        _check_input(first, x)
        functional.check_cluster(cluster, x, len(self.domains), 0, self._give_ids)
        assert cluster is not None
        if graphs.unseen():
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
    if norm.running_mean is None or not norm.training or not checkpointing.running():
        return norm(x)
    mean, var = checkpointing.copies(norm.running_mean, norm.running_var)  # a checkpoint counts what autograd saves
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
