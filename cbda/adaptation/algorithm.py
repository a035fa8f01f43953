"""AdaMatch (Berthelot et al., ICLR 2022), its loss on a micro-batch; the numbers are those of section 3."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbda.adaptation.config import MethodConfig
from cbda.adaptation.losses import (
    Alignment,
    aligned,
    batch_mean,
    interpolated,
    masked_cross_entropy,
    relative_threshold,
    source_cross_entropy,
)
from cbda.networks.classifier import SOURCE, TARGET
from common.runtime.distributed import mean_over_ranks
from common.runtime.seeding import uniform_per_sample
from common.train.step import MicroBatch


@dataclass(frozen=True)
class Terms:
    """Both domains' losses on a micro-batch of B source and T target images, C classes, and what they follow from.

    Attributes:
        source: loss of the source; a scalar.
        labelled: loss of the target's labelled images, a scalar; None where there are none.
        target: loss of the target, without its weight mu; a scalar.
        from_source: logits (2 B, C) of the source's weak views, then of its strong ones.
        target_strong: logits (T, C) of the target's strong views.
        pseudo: pseudo-labels (T, C), aligned and scaled.
        mask: bool (T,): those that are sure enough to count.
        threshold: what they had to exceed, in [0, 1].
        ratio: of the distribution of classes that is wanted to the one found in the target (C,).
        accuracy: on the source's weak views, over all ranks.
        shares: of the target that is taken for each class with confidence (C,), over all ranks.
    """

    source: Tensor
    labelled: Tensor | None
    target: Tensor
    from_source: Tensor
    target_strong: Tensor
    pseudo: Tensor
    mask: Tensor
    threshold: Tensor
    ratio: Tensor
    accuracy: Tensor
    shares: Tensor


def adamatch(
    method: MethodConfig,
    micro: MicroBatch,
    network: nn.Module,
    alignment: Alignment,
    to_input: Callable[[Tensor], Tensor],
) -> Terms:
    """Return the terms of AdaMatch's loss on a micro-batch.

    (1) to (3) are random logit interpolation, (4) distribution alignment, (5) the relative confidence threshold, (6)
    to (8) the losses.

    Args:
        method: resolved.
        micro: batches of "train", the source, of "target" and, if there is one, of "target_labelled", two views each.
        network: the classifier, as gradients are to flow through it.
        alignment: running estimates, which take these in.
        to_input: from uint8 images to what the network sees.
    """
    source, target, labelled = micro["train"], micro["target"], micro.batches.get("target_labelled")
    x = to_input(torch.cat([*source.views, *(labelled.views if labelled else ()), *target.views]))
    rows, known = 2 * len(source.labels), len(x) - 2 * len(target.labels)
    cluster = torch.tensor([SOURCE] * rows + [TARGET] * (len(x) - rows), device=x.device)

    # One pass over all images, one over the labelled alone that leaves no trace; a mixture of both for the labelled.
    if method.interpolation:
        together, alone = network(x, cluster, known, inference=method.source_pass == "inference")
        together = together.float()
        shares = [shares_drawn(micro, "train", together.shape[1])]
        if labelled:
            shares.append(shares_drawn(micro, "target_labelled", together.shape[1]))
        from_known = interpolated(together[:known], alone.float(), torch.cat(shares).to(x.device))
    else:
        together = network(x, cluster, 0, inference=method.source_pass == "inference").float()
        from_known = together[:known]
    from_source, from_labelled = from_known[:rows], from_known[rows:]
    source_weak = from_source.chunk(2)[0]
    target_weak, target_strong = together[known:].chunk(2)

    # Pseudo-labels: the target's predictions, aligned with the distribution of classes that is wanted.
    p_source, p_target = source_weak.softmax(1), target_weak.softmax(1)
    p_wanted = from_labelled.chunk(2)[0].softmax(1) if method.align_by == "labelled" else p_source
    wanted, found = batch_mean(p_wanted), batch_mean(p_target)
    if method.alignment == "running":
        wanted, found = alignment(wanted, found)
    elif method.alignment == "none":
        wanted = found
    pseudo = aligned(p_target, wanted, found, method.scaling or "sum")

    # Only those count that are sure, measured by how sure the network is of the source.
    threshold = relative_threshold(p_source, method.tau)
    mask = pseudo.amax(1) >= threshold
    supervised = method.source_loss or "mean"
    terms = Terms(
        source=source_cross_entropy(from_source, source.labels, supervised),
        labelled=source_cross_entropy(from_labelled, labelled.labels, supervised) if labelled else None,
        target=masked_cross_entropy(target_strong, pseudo, mask, method.labels or "hard"),
        from_source=from_source,
        target_strong=target_strong,
        pseudo=pseudo,
        mask=mask,
        threshold=threshold,
        ratio=wanted / found,
        accuracy=mean_over_ranks((source_weak.argmax(1) == source.labels).float().mean()),
        shares=batch_mean(F.one_hot(pseudo.argmax(1), pseudo.shape[1]) * mask[:, None].float()),
    )
    alignment.threshold.copy_(threshold)
    alignment.watch(threshold, terms.accuracy, terms.shares)
    return terms


def shares_drawn(micro: MicroBatch, stream: str, classes: int) -> Tensor:
    """Draw a number in [0, 1) for each logit of a stream's weak and strong views (2 B, C), whoever shares the step."""
    index, key = micro[stream].index, () if stream == "train" else (stream,)
    entries = (index[:, None] * classes + torch.arange(classes)).flatten()
    draws = [uniform_per_sample(entries, micro.seed, "interpolation", *key, view, micro.number) for view in (0, 1)]
    return torch.cat(draws).view(2 * len(index), classes)
