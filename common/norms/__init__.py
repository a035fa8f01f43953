"""Normalization under a Gaussian mixture: SCB-Norm, UCB-Norm, Mixture Normalization and their parts."""

from common.norms.calibration import calibrate
from common.norms.convert import convert_norms, revert_norms
from common.norms.factory import BatchNorm, DomainBatchNorm, InstanceNorm, make_norm
from common.norms.health import Health, collect_health, health, log_scalars, mixture_layers
from common.norms.modules import MixtureNorm, SCBNorm, SCBNormBase, UCBNorm
from common.norms.ops import cluster_norm, mixture_norm
from common.norms.reference import Moments
from common.norms.routing import clusters
from common.norms.state import scb_state_from_base, ucb_state_from_batch_norm

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
