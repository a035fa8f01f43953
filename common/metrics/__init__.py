"""Fréchet distance between real and generated images, what it takes to trust it, and classification scores."""

from common.metrics.classifier import Classifier
from common.metrics.extractors import Extractor, register_extractor
from common.metrics.features.frechet import Statistics, frechet_distance, statistics
from common.metrics.fid import Fid, FidConfig, FidResult, Interrupted
from common.metrics.scores import (
    Averages,
    PrecisionRecall,
    Scores,
    classification_scores,
    keras_threshold,
    measure_all,
    register_metric,
)

__all__ = [
    "Averages",
    "Classifier",
    "Extractor",
    "Fid",
    "FidConfig",
    "FidResult",
    "Interrupted",
    "PrecisionRecall",
    "Scores",
    "Statistics",
    "classification_scores",
    "frechet_distance",
    "keras_threshold",
    "measure_all",
    "register_extractor",
    "register_metric",
    "statistics",
]
