"""SCB-Norm: each sample is normalised with the learned mean and deviation of its own cluster."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import functional, mixture
from .backends import checkpointing, graph_ops, graphs, reference
from .backends.backend import ClusterOptions, ClusterParams
from .backends.reference import UnknownPosterior, UnknownScale
from .base import FLAG, DeviceLike, NormLayer, fx_leaf

ClusterInit = Literal["identity", "data"]
ClusterStatistics = Literal["learned", "batch", "instance"]


class _ClusterNorm(NormLayer):
    """What SCBNorm and SCBNormBase share: all but where the rows come from."""

    _give_ids: ClassVar[str] = functional.GIVE_IDS
    initialized: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        num_clusters: int,
        *,
        statistics: ClusterStatistics = "learned",
        momentum: float = 0.1,
        eps: float = 1e-5,
        affine: bool = False,
        init: ClusterInit = "identity",
        unknown_scale: UnknownScale = "match",
        unknown_posterior: UnknownPosterior = "location",
        channel_dim: int = 1,
        backend: str = "auto",
        device: DeviceLike = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        functional.check_choice("statistics", statistics, get_args(ClusterStatistics))
        momentum = functional.check_momentum(momentum)
        functional.check_choice("init", init, get_args(ClusterInit))
        functional.check_choice("unknown_scale", unknown_scale, get_args(UnknownScale))
        functional.check_choice("unknown_posterior", unknown_posterior, get_args(UnknownPosterior))
        num_clusters = functional.check_size("num_clusters", num_clusters)
        functional.check_backend(backend)
        placed: Any = {"device": device, "dtype": dtype}
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, backend=backend, **placed)
        self.num_clusters = num_clusters
        self.statistics: ClusterStatistics = statistics
        self.momentum = momentum
        self.init: ClusterInit = init
        self.unknown_scale: UnknownScale = unknown_scale
        self.unknown_posterior: UnknownPosterior = unknown_posterior
        self._build(**placed)
        self.register_buffer("initialized", torch.zeros(num_clusters, device=device, dtype=FLAG))
        if statistics == "batch":
            for name in ("running_mean", "running_var"):
                self.register_buffer(name, torch.empty(num_features, **placed))
        self.reset_parameters()

    def _build(self, device: DeviceLike, dtype: torch.dtype | None) -> None:
        raise NotImplementedError

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the log-variance of every cluster, each (K, C)."""
        raise NotImplementedError

    def params(self) -> ClusterParams:
        """Return the rows as kernels read them: tables, and biases that are added to each row."""
        return ClusterParams(*self.rows())

    def _write(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Replace rows (mean, log_var) by change(mean, log_var), in place."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to the identity; with init="data" the next training batches seed the clusters again."""
        super().reset_parameters()
        self._write(lambda mean, log_var: (torch.zeros_like(mean), torch.zeros_like(log_var)))
        self.set_initialized(self.init == "identity" or self.statistics == "instance")
        if self.statistics == "batch":
            self.running_mean.zero_()
            self.running_var.fill_(1)

    def _standardise(self, x: Tensor) -> Tensor:
        r"""Give each channel of x (N, C, \*) mean 0 and variance 1 over what ``statistics`` says."""
        if self.statistics == "batch":
            return self._standardise_batch(x)
        return self._standardise_samples(x) if self.statistics == "instance" else x

    def _standardise_samples(self, x: Tensor) -> Tensor:
        """Standardise each channel of each sample over its positions, as InstanceNorm does before its affine map."""
        functional.check_positions(x)
        # An identity in float32: without one torch keeps the moments of half precision in half precision on a CPU.
        weight = x.new_ones(self.num_features, dtype=reference.compute_dtype(x))
        y = F.instance_norm(x, weight=weight, bias=torch.zeros_like(weight), eps=self.eps)
        last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return y.contiguous(memory_format=torch.channels_last) if last else y

    def _standardise_batch(self, x: Tensor) -> Tensor:
        """Standardise each channel over the batch, as BatchNorm does before its affine map."""
        if self.training:
            functional.check_training_batch(x, self.num_features)
        old = self.running_mean, self.running_var
        mean, var = (t.to(reference.compute_dtype(x), copy=True) for t in old)
        y = F.batch_norm(x, mean, var, None, None, self.training, self.momentum, self.eps)
        if self.training and not checkpointing.running():
            self._store_averages(mean, var)
        return y

    @checkpointing.computed_once
    @torch.no_grad()
    def _store_averages(self, mean: Tensor, var: Tensor) -> None:
        """Store the averages of ``statistics="batch"``, unless one of them is not finite."""
        finite = mean.isfinite().all() & var.isfinite().all()
        for buffer, new in zip((self.running_mean, self.running_var), (mean, var), strict=True):
            buffer.copy_(torch.where(finite, new.to(buffer), buffer))

    @checkpointing.computed_once
    @torch.no_grad()
    def _seed(self, x: Tensor, cluster: Tensor) -> None:
        """Give each cluster that is seen for the first time its moments in this batch."""
        refusal = self._seed_refusal('init="data"')
        if torch.compiler.is_compiling():
            mean, log_var, fresh, ready = graph_ops.seed_clusters(
                x.detach(), cluster, self.initialized, self._known_ready(), refusal, self.eps
            )
            self._learn_ready(ready)
        else:
            graphs.refuse_traced()
            if refusal:
                raise RuntimeError(refusal)
            mean, log_var, found = mixture.cluster_moments(x, cluster, self.num_clusters, self.eps)
            fresh = found & (self.initialized == 0)
        self._write(
            lambda old_mean, old_log_var: (
                torch.where(fresh[:, None], mean.to(old_mean), old_mean),
                torch.where(fresh[:, None], log_var.to(old_log_var), old_log_var),
            )
        )
        self.initialized.masked_fill_(fresh, 1)

    @fx_leaf
    def forward(self, x: Tensor, cluster: Tensor | None = None) -> Tensor:
        r"""Normalise x (N, C, \*) by cluster (N,); in evaluation -1 and None stand for unknown."""
        x = self._channels_first(x)
        functional.check_device("x", x, self.initialized.device, "the layer")
        functional.check_cluster_or_unknown(cluster, x, self.num_clusters, not self.training, self._give_ids)
        if x.numel():
            x = self._standardise(x)
        if self.training and cluster is not None and not checkpointing.running() and self._may_seed():
            self._seed(x, cluster)
        backend = functional.IMPLEMENTED[functional.choose_backend(self.backend, x)]
        if not x.numel():
            return self._channels_back(functional.empty(x, *self.parameters()))
        options = ClusterOptions(self.eps, self.unknown_scale, self.unknown_posterior, not self.training, stored=True)
        y = backend.normalise_clusters(x, cluster, self.params(), (self.weight, self.bias), options)
        return self._channels_back(y)

    def _options(self) -> dict[str, object]:
        return {
            "statistics": (self.statistics, "learned"),
            "momentum": (self.momentum, 0.1),
            "affine": (self.affine, False),
            "init": (self.init, "identity"),
            "unknown_scale": (self.unknown_scale, "match"),
            "unknown_posterior": (self.unknown_posterior, "location"),
        }

    def _size(self) -> int:
        return self.num_clusters


class SCBNorm(_ClusterNorm):
    r"""Normalise each sample with the learned mean and deviation of its own cluster.

    .. math:: y_{ncl} = (x_{ncl} - \mu_{kc}) / \sqrt{e^{s_{kc}} + \epsilon}, \qquad k = cluster_n

    No batch statistics: training and evaluation agree, and any batch size works. In evaluation a cluster of
    -1 or None is unknown, and Eq. 12 weighs all clusters by their posteriors under equal priors.

    Nothing in the layer holds the scale of activations while weights change. One such layer among others that do
    (BatchNorm, UCBNorm) trains at their learning rates; where every layer of a deep network is one, training
    diverges at BatchNorm's rates. statistics="batch" and "instance" hold the scale: each channel is standardised over
    the batch, as by BatchNorm, or over the sample's own positions, as by InstanceNorm, and the clusters' means and
    deviations are those of standardised activations.

    Args:
        num_features: channels C.
        num_clusters: clusters K.
        statistics: "learned" is the paper's; "batch" standardises each channel first, over the batch in training and
            by moving averages in evaluation; "instance" standardises each sample's channels first, over the sample's
            positions, in training and evaluation alike, and stores nothing.
        momentum: weight of the new batch in these averages, PyTorch's orientation.
        eps: added to the variance, in squared units of x.
        affine: scale and shift each channel by learned ``weight`` and ``bias`` (C,).
        init: "identity" starts at mean 0 and variance 1; "data" takes each cluster's moments in the first
            training batch that holds it, joined over all ranks: until then a training forward is collective. With
            statistics="instance" "data" is the identity from the start, since these moments are 0 and 1.
        unknown_scale: "paper" keeps Eq. 12's factor sqrt(K), which makes a certain cluster sqrt(K) times
            larger than under Eq. 10; "match" drops it.
        unknown_posterior: weigh the clusters at each "location", or once for the whole "sample".
        channel_dim: the dimension of x that holds the channels; -1 for (N, T, C).
        backend: "auto", "reference", "eager" or "triton".
        device: of all parameters and buffers, as of any ``torch.nn`` layer.
        dtype: of all of them that are floating-point.

    Shape:
        x (N, C, \*) float; cluster (N,) int64 in [0, K); output as x. Parameters ``mean`` and ``log_var``,
        each (K, C), stay float32 under autocast. With statistics="batch" also buffers ``running_mean`` and
        ``running_var`` (C,), which a batch with a non-finite value leaves as they are.

    Raises:
        ValueError: an option is out of range; x has not C channels, cluster is not (N,) int64, or it is None in
            training; x, cluster and the layer are not on one device; x holds one value per channel in training with
            statistics="batch", or one position with statistics="instance".
        RuntimeError: a batch is to seed parameters that FSDP or a parametrization has replaced.
        IndexError: an id outside [0, K), or -1 in training, on the CPU; on a GPU its row is NaN.

    Source: arXiv:2403.16798, Eqs. 10 and 12. Unlike the authors' code, log_var starts at 0 and eps is added
    to the variance, not to the deviation.
    """

    mean: nn.Parameter
    log_var: nn.Parameter

    def _build(self, device: DeviceLike, dtype: torch.dtype | None) -> None:
        self.mean = nn.Parameter(torch.empty(self.num_clusters, self.num_features, device=device, dtype=dtype))
        self.log_var = nn.Parameter(torch.empty(self.num_clusters, self.num_features, device=device, dtype=dtype))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return ``mean`` and ``log_var``."""
        return self.mean, self.log_var

    def _write(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        mean, log_var = change(self.mean, self.log_var)
        self.mean.copy_(mean)
        self.log_var.copy_(log_var)


class SCBNormBase(_ClusterNorm):
    r"""SCBNorm whose rows are the outputs of two linear layers on the one-hot cluster.

    The same functions as SCBNorm's, :math:`\mu_k = W_{:,k} + b`, optimised in other coordinates:
    ``SCBNorm.mean = (weight + bias[:, None]).T`` of ``mean``, and the same for ``log_var``.

    Arguments, shapes and errors are SCBNorm's; ``mean`` and ``log_var`` are ``nn.Linear(K, C)``.

    Source: arXiv:2403.16798, section IV-A. Unlike there, the second layer gives the log of the variance,
    which keeps the variance positive. Both layers start at zero.
    """

    mean: nn.Linear
    log_var: nn.Linear

    def _build(self, device: DeviceLike, dtype: torch.dtype | None) -> None:
        # First on meta: all is zeroed below, and drawing would move the global generator.
        for name in ("mean", "log_var"):
            layer = nn.Linear(self.num_clusters, self.num_features, device="meta", dtype=dtype)
            setattr(self, name, layer.to_empty(device=torch.get_default_device() if device is None else device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to the identity; with init="data" the next training batches seed the clusters again."""
        for layer in (self.mean, self.log_var):
            nn.init.zeros_(layer.bias)
        super().reset_parameters()

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the layers' outputs for every cluster."""
        mean, log_var = ((layer.weight + layer.bias[:, None]).T for layer in (self.mean, self.log_var))
        return mean, log_var

    def params(self) -> ClusterParams:
        """Return the layers' weights, transposed, and biases."""
        return ClusterParams(self.mean.weight.T, self.log_var.weight.T, self.mean.bias, self.log_var.bias)

    def _write(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        for layer, row in zip((self.mean, self.log_var), change(*self.rows()), strict=True):
            layer.weight.copy_(row.T - layer.bias[:, None])
