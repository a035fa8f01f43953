"""Fréchet distance of two Gaussians; the only file that calls torch-fidelity's internal functions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean, float64 (D,), and covariance, float64 (D, D), of a set of features."""

    mean: Tensor
    covariance: Tensor


def statistics(features: Tensor) -> Statistics:
    """Return the mean and the unbiased covariance of features (N, D), computed in float64.

    Raises:
        ValueError: if the features are not (N, D) with N >= 2, or one of them is not finite.
    """
    if features.ndim != 2:
        raise ValueError(f"features: expected (N, D), got {tuple(features.shape)}")
    if len(features) < 2:
        raise ValueError(f"features: a covariance takes at least 2 samples, got {len(features)}")
    bad = int((~torch.isfinite(features)).any(dim=1).sum())
    if bad:
        raise ValueError(f"features: expected finite values, got others in {bad} of {len(features)} samples")
    from torch_fidelity.metric_fid import fid_features_to_statistics  # noqa: PLC0415 - seconds that --help need not take

    result = fid_features_to_statistics(features.detach().double().cpu())
    dim = features.shape[1]
    return Statistics(
        torch.from_numpy(np.asarray(result["mu"])),
        torch.from_numpy(np.asarray(result["sigma"])).reshape(dim, dim),  # NumPy drops the axes where D is 1
    )


def frechet_distance(a: Statistics, b: Statistics) -> float:
    r"""Return :math:`|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2})` (Dowson and Landau 1982).

    Rounding can leave the distance of equal statistics slightly below 0.

    Raises:
        ValueError: if the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics: expected one dimension, got {len(a.mean)} and {len(b.mean)}")
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # noqa: PLC0415 - as above

    first, second = ({"mu": s.mean.numpy(), "sigma": s.covariance.numpy()} for s in (a, b))
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


class Reference:
    """Statistics that many others are compared with: a distance costs the eigenvalues of one symmetric matrix.

    It is that of `frechet_distance`, to rounding, in float64 on the device of the statistics.
    """

    def __init__(self, of: Statistics) -> None:
        self.statistics = of
        values, vectors = torch.linalg.eigh(of.covariance)
        self._root = vectors * values.clamp(min=0).sqrt()  # R with R R' = C; rounding leaves values below 0

    def distance(self, other: Statistics) -> float:
        """Return the Fréchet distance to other statistics: R' C R has the eigenvalues of the product of covariances."""
        apart = self.statistics.mean - other.mean
        roots = torch.linalg.eigvalsh(self._root.T @ other.covariance @ self._root).clamp(min=0).sqrt()
        traces = self.statistics.covariance.trace() + other.covariance.trace()
        return float(apart @ apart + traces - 2 * roots.sum())
