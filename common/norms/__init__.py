"""Normalization under a Gaussian mixture: SCB-Norm, UCB-Norm, Mixture Normalization and their parts."""

from .backends.reference import Moments
from .em_norm import MixtureNorm
from .factory import BatchNorm, DomainBatchNorm, InstanceNorm, make_norm, register_norm
from .functional import cluster_norm, mixture_norm
from .health import Health, collect_health, health, log_scalars, mixture_layers
from .supervised import SCBNorm, SCBNormBase
from .surgery.calibration import calibrate, preserved_statistics, recalibrate, statistics_layers
from .surgery.convert import convert_norms, converted, revert_norms
from .surgery.norm_act import NormAct, norm_act
from .surgery.routing import WithClusters, clusters
from .surgery.state_dicts import scb_state_from_base, ucb_state_from_batch_norm
from .unsupervised import UCBNorm

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
