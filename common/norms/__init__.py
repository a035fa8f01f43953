"""Normalization under a Gaussian mixture: SCB-Norm, UCB-Norm, Mixture Normalization and their parts."""

from pathlib import Path

from .backends.reference import Moments
from .baselines import BatchNorm, DomainBatchNorm, InstanceNorm
from .calibrate import calibrate, preserved_statistics, recalibrate, statistics_layers
from .cluster_context import WithClusters, clusters
from .convert import convert_norms, converted, revert_norms, scb_state_from_base, ucb_state_from_batch_norm
from .health import Health, collect_health, health, log_scalars, mixture_layers
from .mixture_norm import MixtureNorm
from .norm_act import NormAct, norm_act
from .registry import make_norm, register_norm
from .scb_norm import SCBNorm, SCBNormBase
from .ucb_norm import UCBNorm

# isort: split
from .functional import cluster_norm, mixture_norm  # after the module that has the name of the second

__version__ = Path(__file__).with_name("VERSION").read_text(encoding="utf-8").strip()

__all__ = [
    "BatchNorm",
    "DomainBatchNorm",
    "Health",
    "InstanceNorm",
    "MixtureNorm",
    "Moments",
    "NormAct",
    "SCBNorm",
    "SCBNormBase",
    "UCBNorm",
    "WithClusters",
    "__version__",
    "calibrate",
    "cluster_norm",
    "clusters",
    "collect_health",
    "convert_norms",
    "converted",
    "health",
    "log_scalars",
    "make_norm",
    "mixture_layers",
    "mixture_norm",
    "norm_act",
    "preserved_statistics",
    "recalibrate",
    "register_norm",
    "revert_norms",
    "scb_state_from_base",
    "statistics_layers",
    "ucb_state_from_batch_norm",
]
