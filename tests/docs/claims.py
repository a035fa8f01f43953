"""What pages say of their Python blocks, by page: functions of the names that the blocks leave."""

from collections.abc import Callable
from typing import Any

import torch

SHOWN = {
    "MixtureNorm", "SCBNorm", "UCBNorm", "calibrate", "clusters", "collect_health", "convert_norms", "converted",
    "log_scalars", "norm_act", "recalibrate", "revert_norms", "scb_state_from_base", "ucb_state_from_batch_norm",
}  # fmt: skip


def layers(names: dict[str, Any]) -> None:
    assert names.keys() >= SHOWN
    layer1 = [f"layer1.{block}.bn{norm}" for block in (0, 1) for norm in (1, 2)]
    assert names["names"] == ["bn1", *layer1, "layer4.1.bn1", "layer4.1.bn2"]


def tour(names: dict[str, Any]) -> None:
    layer, y, bn, low = (names[name] for name in ("layer", "y", "bn", "low"))
    order = layer.mean.flatten().argsort()
    torch.testing.assert_close(layer.mean.flatten()[order], torch.tensor([-3.0, 2.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(layer.log_var.exp().flatten()[order], torch.tensor([0.25, 1.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(layer.log_weights().exp()[order], torch.tensor([0.6, 0.4]), atol=0.03, rtol=0)
    assert max(abs(y[low].mean()), abs(y[~low].mean())) < 0.05
    assert (round(float(bn[low].mean()), 1), round(float(bn[~low].mean()), 1)) == (-0.8, 1.2)

    mixture, accuracy = names["mixture"], names["accuracy"]
    assert min(names["before"], accuracy(mixture)) > 0.9
    assert names["converted_accuracy"] > names["before"] - 0.01
    assert all(state.information > 0.05 and not state.warnings() for state in names["health"].values())

    out, source = names["out"], names["source"]
    for k in (0, 1):
        assert abs(out[source == k].mean()) < 1e-5
        assert abs(out[source == k].var() - 1) < 1e-3
    x = names["images"][:2]
    torch.testing.assert_close(names["program"].module()(x), mixture.eval()(x))


CLAIMS: dict[str, Callable[[dict[str, Any]], None]] = {"layers": layers, "tour": tour}
