"""The layers of the family, under one name."""

from common.norms.em_norm import MixtureNorm
from common.norms.supervised import SCBNorm, SCBNormBase
from common.norms.unsupervised import MixtureLayer, UCBNorm

__all__ = ["MixtureLayer", "MixtureNorm", "SCBNorm", "SCBNormBase", "UCBNorm"]
