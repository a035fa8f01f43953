"""How good a classifier is on images whose labels nobody knows: two scores to choose between epochs or runs by."""

import math

import torch
from torch import Tensor

_TEMPERATURE = 0.05  # of soft neighbourhood density, as published
_ROWS = 1024  # of the similarities that are in memory at once


def information(logits: Tensor) -> float:
    """Return the mutual information of image and predicted class, in nats from 0 to log C; higher is better.

    ``H(mean_i p_i) - mean_i H(p_i)`` of the softmax p of logits (N, C): each prediction sure, all classes used.

    Source: Bridle et al., "Unsupervised Classifiers, Mutual Information and 'Phantom Targets'", NIPS 1991, as a
    validator in Musgrave et al., "Benchmarking Validation Methods for Unsupervised Domain Adaptation", 2022.
    """
    p = logits.double().softmax(1)
    return float(_entropy(p.mean(0)) - _entropy(p).mean())


def neighbourhood_density(logits: Tensor) -> float:
    """Return the soft neighbourhood density of predictions, in nats from 0 to log (N - 1); higher is better.

    The mean entropy of the softmax over the other images of ``cos(p_i, p_j) / 0.05``, p the softmax of logits (N, C):
    large where predictions form dense groups.

    Raises:
        ValueError: with fewer than 2 images.

    Source: Saito et al., "Tune It the Right Way", ICCV 2021.
    """
    if len(logits) < 2:
        raise ValueError(f"logits: expected at least 2 images, got {len(logits)}")
    p = torch.nn.functional.normalize(logits.double().softmax(1), dim=1)
    total = 0.0
    for first in range(0, len(p), _ROWS):
        near = p[first : first + _ROWS] @ p.T / _TEMPERATURE
        rows = torch.arange(len(near))
        near[rows, first + rows] = -math.inf
        total += float(_entropy(near.softmax(1)).sum())
    return total / len(p)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)
