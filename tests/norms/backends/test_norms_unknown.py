"""Samples of unknown cluster beside known ones, in every backend that runs anywhere, against Eqs. 10, 12 and 13."""

import itertools
from typing import Any

import pytest
import torch
from norm_cases import backend, mixture_case

from common.norms import cluster_norm

IDS = [ids for n in (1, 2, 3) for ids in itertools.product((-1, 0, 1), repeat=n)]


def expected(x, ids, mean, var, over: str, scale: str):
    """Write the equations out, sample by sample, in float64."""
    rows = []
    for sample, known in zip(x.double(), ids, strict=True):
        u = (sample - mean.double()[:, :, None]) / (var.double()[:, :, None] + 1e-5).sqrt()  # (K, C, L)
        log_p = (-0.5 * u.square() - 0.5 * (var.double()[:, :, None] + 1e-5).log()).sum(1, keepdim=True)
        log_p = log_p.sum(2, keepdim=True) if over == "sample" else log_p
        y = (log_p.softmax(0) * u).sum(0) * (len(mean) ** 0.5 if scale == "paper" else 1)
        rows.append(y if known == -1 else u[known])
    return torch.stack(rows)


@pytest.mark.parametrize("by", ["reference", "eager", "traced"])
def test_each_sample_is_normalised_by_what_is_known_of_it(by):
    for ids, over, scale in itertools.product(IDS, ("location", "sample"), ("match", "paper")):
        x, _, mean, var, _ = mixture_case((len(ids), 3, 4), 2, dtype=torch.float64)
        options: Any = {"unknown_posterior": over, "unknown_scale": scale}
        with backend(by) as name:
            got = cluster_norm(x, torch.tensor(ids), mean, var, backend=name, **options)
        torch.testing.assert_close(got, expected(x, ids, mean, var, over, scale), rtol=1e-9, atol=1e-9)
