"""Fréchet distance between real and generated images, and what it takes to trust it."""

from common.metrics.classifier import Classifier
from common.metrics.extractors import Extractor
from common.metrics.fid import Fid, FidConfig, FidResult, Interrupted
from common.metrics.frechet import Statistics, frechet_distance, statistics

__all__ = [
    "Classifier",
    "Extractor",
    "Fid",
    "FidConfig",
    "FidResult",
    "Interrupted",
    "Statistics",
    "frechet_distance",
    "statistics",
]
