"""Samples of unknown cluster beside known ones, in every backend that runs anywhere, against Eqs. 10, 12 and 13."""

import itertools

import pytest
import torch
from norm_cases import mixture_case

from common.norms import cluster_norm
from common.norms.backends import closed_form

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


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("over", ["location", "sample"])
@pytest.mark.parametrize("scale", ["match", "paper"])
def test_each_sample_is_normalised_by_what_is_known_of_it(backend, over, scale):
    for ids in IDS:
        x, _, mean, var, _ = mixture_case((len(ids), 3, 4), 2, dtype=torch.float64)
        got = cluster_norm(
            x, torch.tensor(ids), mean, var, backend=backend, unknown_posterior=over, unknown_scale=scale
        )
        torch.testing.assert_close(got, expected(x, ids, mean, var, over, scale), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("statistics", ["batch", "learned"])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_closed_form_is_eager_where_no_backend_is_named(statistics, groups):
    """As the kernels call it for what they cannot take."""
    *inputs, g = mixture_case((4, 3, 5), 2, dtype=torch.float32)
    options = {"groups": groups, "eps": 1e-5, "scale": "sqrt_k", "statistics": statistics}
    found = []
    for more in ({}, {"backend": "eager"}):
        given = [t.detach().requires_grad_() for t in inputs]
        y, _ = closed_form.mixture_norm(*given, **options, **more)  # pyright: ignore[reportArgumentType]
        found.append((y, *torch.autograd.grad(y, given, g)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
