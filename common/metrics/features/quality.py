"""Kernel distance, Inception Score, precision and recall, by torch-fidelity from features that are there."""

from typing import Literal

from torch import Tensor

from common.runtime.seeding import permutation

Quality = Literal["kid", "inception_score", "precision_recall"]

SEED = 2020
"""torch-fidelity's own, of the subsets of KID and the splits of the Inception Score."""
KID_SUBSETS, KID_SIZE = 100, 1000
SPLITS = 10
NEIGHBOURS = 3
MOST = 10_000
"""Images of either kind that precision and recall take, since their time grows with the square."""
PARAMETERS: dict[str, dict[str, str | int]] = {
    "kid": {"seed": SEED, "subsets": KID_SUBSETS, "subset_size": KID_SIZE, "kernel": "(x'y / D + 1)^3"},
    "inception_score": {"seed": SEED, "splits": SPLITS},
    "precision": {"seed": SEED, "neighbours": NEIGHBOURS, "at_most": MOST},
    "recall": {"seed": SEED, "neighbours": NEIGHBOURS, "at_most": MOST},
}
"""What a number depends on besides the images and their features."""
BETTER: dict[str, Literal["higher", "lower"]] = {
    "kid": "lower", "inception_score": "higher", "precision": "higher", "recall": "higher",
}  # fmt: skip


def kernel_distance(generated: Tensor, real: Tensor) -> float:
    """Return KID (Binkowski et al. 2018) of features (N, D) and (M, D): its mean over 100 random subsets.

    A subset has 1,000 images of either, or as many as there are of the fewer; the kernel is ``(x'y / D + 1)^3``. The
    estimate is unbiased, so it may be below 0.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric  # noqa: PLC0415 - takes seconds

    size = min(KID_SIZE, len(generated), len(real))
    # Where a subset is all there is, another one is the same again.
    subsets = 1 if size == len(generated) == len(real) else KID_SUBSETS
    options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": SEED, "verbose": False}
    return kid_features_to_metric(generated.cpu(), real.cpu(), **options)[KEY_METRIC_KID_MEAN]


def inception_score(logits: Tensor) -> float:
    """Return the Inception Score (Salimans et al. 2016) of logits (N, C): its mean over ten parts.

    It is between 1 and C, and sees no real image. Fewer than ten images make as many parts.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # noqa: PLC0415 - as above

    splits = min(SPLITS, len(logits))
    return isc_features_to_metric(logits.cpu(), splits, True, SEED)[KEY_METRIC_ISC_MEAN]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Return precision and recall (Kynkäänniemi et al. 2019) of features (N, D) and (M, D), both in [0, 1].

    Precision is the share of generated images no further from some real image than that one's third neighbour among
    the real ones; recall the same with the kinds exchanged. At most 10,000 of either are taken, drawn at random.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric  # noqa: PLC0415 - as above

    few = (_at_most(generated, "generated"), _at_most(real, "real"))
    if min(map(len, few)) <= NEIGHBOURS:
        raise ValueError(f"features: expected more than {NEIGHBOURS} images of either kind, got {min(map(len, few))}")
    found = prc_features_to_metric(*few, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def _at_most(features: Tensor, kind: str) -> Tensor:
    if len(features) <= MOST:
        return features
    return features[permutation(len(features), SEED, "precision and recall", kind)[:MOST].to(features.device)]
