"""Statistics over all ranks of a process group: what a layer exchanges, and how the parts add up."""

import torch
import torch.distributed as dist
from torch import Tensor


def check_process_group(process_group: object) -> None:
    """Raise ValueError unless it is None, "world" or a group that this rank belongs to."""
    if process_group is None or process_group == "world":
        return
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise ValueError(
            f"process_group: expected None, 'world' or a group that this rank belongs to, got {process_group!r}"
        )


def active(process_group: object) -> "dist.ProcessGroup | None":
    """Return the group to exchange statistics with; None for a rank on its own.

    "world" before ``torch.distributed.init_process_group``, as in a run on one device, is this rank alone.
    """
    if process_group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group == "world" else process_group
    assert isinstance(group, dist.ProcessGroup)
    return group if dist.get_world_size(group) > 1 else None


def _gather(values: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Return the values (n,) of every rank, (R, n), in the order of ranks."""
    out = values.new_empty(dist.get_world_size(group), len(values))
    # The later name: torch 2.14 warns of the other one, which is all that older releases have.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out.view(-1), values, group=group)
    return out


def combine(mass: Tensor, mean: Tensor, var: Tensor, group: "dist.ProcessGroup") -> tuple[Tensor, Tensor, Tensor]:
    """Return the moments of all ranks' batches together, by Chan's formula and one exchange.

    Bit for bit the same on all ranks. A component or a batch that is empty on a rank counts for nothing.

    Args:
        mass: of this rank, (K, G).
        mean: (K, G, D, 1).
        var: as mean, biased.
        group: the ranks.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979. Means are taken about that of the heaviest rank, so that a common offset costs no digits.
    """
    weighted = var * mass[:, :, None, None]
    packed = _gather(torch.cat([t.reshape(-1) for t in (mass, mean, weighted)]), group)
    parts = packed.split([mass.numel(), mean.numel(), mean.numel()], dim=1)
    masses = parts[0].view(-1, *mass.shape, 1, 1)  # (R, K, G, 1, 1)
    means, m2 = (part.view(-1, *mean.shape) for part in parts[1:])
    total = masses.sum(0)
    share = masses / total.clamp(min=torch.finfo(mass.dtype).tiny)
    pilot = means.gather(0, masses.argmax(0, keepdim=True).expand_as(means[:1]))[0]
    joined = pilot + (share * (means - pilot)).sum(0)
    spread = (share * (means - joined).square()).sum(0)
    within = m2.sum(0) / total.clamp(min=torch.finfo(mass.dtype).tiny)
    return total.view_as(mass), joined, within + spread


def total(first: Tensor, second: Tensor, group: "dist.ProcessGroup") -> tuple[Tensor, Tensor]:
    """Return the sums over ranks of two tensors of one shape, by one exchange, the same on all ranks."""
    summed = _gather(torch.stack([first, second]).view(-1), group).sum(0).view(2, *first.shape)
    return summed[0], summed[1]


def join_points(points: Tensor, finite: Tensor, group: "dist.ProcessGroup") -> tuple[Tensor, Tensor]:
    """Return all ranks' points (P, C), in the order of ranks, and whether every rank's batch is finite."""
    state = torch.stack([torch.full_like(finite, len(points), dtype=torch.int64), finite.long()])
    counts, finites = _gather(state, group).unbind(1)
    longest = int(counts.max())
    padded = points.new_zeros(longest, points.shape[1])
    padded[: len(points)] = points
    gathered = _gather(padded.view(-1), group).view(-1, longest, points.shape[1])
    joined = torch.cat([part[:count] for part, count in zip(gathered, counts.tolist(), strict=True)])
    return joined, finites.all()
