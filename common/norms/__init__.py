"""Normalization under a Gaussian mixture: SCB-Norm, UCB-Norm, Mixture Normalization and their parts."""

from common.norms.backends.reference import Moments
from common.norms.em_norm import MixtureNorm
from common.norms.factory import BatchNorm, DomainBatchNorm, InstanceNorm, make_norm
from common.norms.functional import cluster_norm, mixture_norm
from common.norms.health import Health, collect_health, health, log_scalars, mixture_layers
from common.norms.supervised import SCBNorm, SCBNormBase
from common.norms.surgery.calibration import calibrate
from common.norms.surgery.convert import convert_norms, revert_norms
from common.norms.surgery.routing import clusters
from common.norms.surgery.state_dicts import scb_state_from_base, ucb_state_from_batch_norm
from common.norms.unsupervised import UCBNorm

__all__ = [
    "BatchNorm",
    "DomainBatchNorm",
    "Health",
    "InstanceNorm",
    "MixtureNorm",
    "Moments",
    "SCBNorm",
    "SCBNormBase",
    "UCBNorm",
    "calibrate",
    "cluster_norm",
    "clusters",
    "collect_health",
    "convert_norms",
    "health",
    "log_scalars",
    "make_norm",
    "mixture_layers",
    "mixture_norm",
    "revert_norms",
    "scb_state_from_base",
    "ucb_state_from_batch_norm",
]
