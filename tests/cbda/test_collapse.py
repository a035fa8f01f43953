"""A run that collapses is noticed while it trains."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbda.adamatch
import cbda.models
from cbda.adaptation.collapse import Watch, collapse
from cbda.config import MethodConfig
from cbda.task import AdaMatchTask
from common.data import plain
from common.data.augmentation import ViewOptions
from common.runtime.errors import NonFiniteError
from common.train.step import MicroBatch


class Lost(nn.Module):
    """Classifies the source rightly, from step 20 on wrongly, whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.labels, self.step = torch.zeros(9, dtype=torch.int64), 0

    def forward(self, x: Tensor, cluster: Tensor, alone: int = 0, **_: object):
        if not self.training:
            return self.scale * F.one_hot(torch.arange(len(x)) % 3, 3).float()
        source, target = self.labels.repeat(2), torch.arange(len(x) - 2 * len(self.labels)) % 3
        if self.step >= 20:
            source = (source + 1) % 3
        logits = self.scale * F.one_hot(torch.cat([source, target]), 3).float()
        return (logits, logits[:alone].clone()) if alone else logits


def test_a_run_that_lost_the_source_goes_back_and_forgets_what_it_watched(tiny, tmp_path, monkeypatch):
    sound = AdaMatchTask.adamatch_loss

    def loss(self: AdaMatchTask, micro: MicroBatch, mu: float):
        network = self.networks["adamatch"]
        assert isinstance(network, Lost)
        network.labels, network.step = micro["train"].labels, micro.number
        return sound(self, micro, mu)

    monkeypatch.setattr(AdaMatchTask, "adamatch_loss", loss)
    monkeypatch.setattr(ViewOptions, "view", lambda *_: plain)
    monkeypatch.setattr(cbda.models, "build_classifier", lambda *_, **__: Lost())
    flags = ["--epochs", "40", "--evaluate_every", "40", "--log_every", "4", "--lr", "1e-9", "--source_only", "false",
             "--norm.kind", "none", "--method.warmup", "0.1", "--method.alignment", "none", "--variance_every", "0",
             "--guard.action", "rewind", "--guard.max_rewinds", "2", "--name", "run"]  # fmt: skip
    cause = r"accuracy on the source has fallen from \d\d % to \d+ %"
    with pytest.raises(NonFiniteError, match=rf"^collapsed in step \d+ after 2 rewinds: {cause}"):
        cbda.adamatch.main([*tiny, *flags])
    rewinds = json.loads((tmp_path / "cbda" / "run" / "summary.json").read_text())["rewinds"]
    assert len(rewinds) == 2
    for rewind in rewinds:  # to an end of an epoch, from where the network does the same again
        assert rewind["to"] % 4 == 0
        assert 20 < rewind["step"] <= 44
        assert rewind["to"] < rewind["step"]


def test_averages_and_their_highest_counted_by_hand():
    watch, recent, highest = Watch(2), [0.0] * 4, [0.0] * 2
    for threshold, accuracy, first, second in ((0.8, 1.0, 0.5, 0.25), (0.9, 0.5, 0.0, 1.0), (0.1, 0.0, 0.2, 0.2)):
        watch(torch.tensor(threshold), torch.tensor(accuracy), torch.tensor([first, second]))
        now = (threshold, accuracy, first, second)
        recent = [0.9 * old + 0.1 * new for old, new in zip(recent, now, strict=True)]
        highest = [max(old, new) for old, new in zip(highest, recent, strict=False)]
        assert watch.recent.tolist() == pytest.approx(recent)
        assert watch.highest.tolist() == pytest.approx(highest)
    assert highest[0] > recent[0]
    assert highest[1] > recent[1]


@pytest.mark.parametrize(
    ("shares", "leans"),
    [
        ([0.05, 0.91, 0.04], True),  # more than nine tenths
        ([0.06, 0.89, 0.05], False),
        ([0.03, 0.97], False),
        ([0.005, 0.995], True),  # more than 99 in 100 of one of two
    ],
)
def test_batches_of_one_class_are_counted_until_others_come(shares, leans):
    watch, one = Watch(len(shares)), torch.ones(())
    for _ in range(100):
        watch(one, one, torch.tensor(shares))
    before = int(watch.leaning)
    assert before >= 99 if leans else before == 0
    for _ in range(50):  # of a network that has hardly any pseudo-labels
        watch(one, one, torch.zeros(len(shares)))
    few = int(watch.leaning)
    assert before <= few < before + 30  # averages forget over about ten batches
    watch(one, one, torch.full((len(shares),), 10.0))
    assert watch.leaning == 0


GOOD = {"loss/source": 0.1, "schedule/mu": 1.0, "adapt/mask_rate": 0.97}


def said(
    means: dict[str, float],
    recent: list[float],
    highest: list[float],
    classes: int = 3,
    batch_size: int = 64,
    leaning: int = 0,
    **of_method: Any,
) -> str | None:
    """Return what a method with such averages says of logged means."""
    watch = Watch(classes)
    watch.recent.copy_(torch.tensor(recent))
    watch.highest.copy_(torch.tensor(highest))
    watch.leaning.fill_(leaning)
    return collapse(MethodConfig(**of_method).resolved(), watch, GOOD | means, classes, batch_size)


EVEN = [0.3, 0.3, 0.3]


def test_accuracy_that_scatters_by_chance_alone_has_not_fallen():
    """Binomial draws: of a network that guesses, or stays as good as it is, for 5,000 steps."""
    for share, batch_size, classes in ((0.1, 32, 10), (0.5, 32, 2), (0.4, 32, 31), (0.01, 9, 100)):
        right = np.random.default_rng(0).binomial(batch_size, share, 5_000) / batch_size
        watch, even = Watch(classes), torch.full((classes,), 1 / classes)
        method = MethodConfig().resolved()
        for accuracy in torch.from_numpy(right).float():
            watch(torch.tensor(0.8), accuracy, even)
            assert collapse(method, watch, GOOD, classes, batch_size) is None


def test_what_counts_as_a_collapse_and_what_does_not():
    assert said({}, [0.87, 0.95, *EVEN], [0.88, 0.97]) is None
    # A threshold below nine tenths of its highest, but only where every label passes, and the target counts.
    assert "fallen from 0.88 to 0.79" in (said({}, [0.79, 0.95, *EVEN], [0.88, 0.97]) or "")
    assert said({}, [0.80, 0.95, *EVEN], [0.88, 0.97]) is None
    assert said({"adapt/mask_rate": 0.94}, [0.5, 0.95, *EVEN], [0.88, 0.97]) is None
    assert said({"schedule/mu": 0.49}, [0.5, 0.95, *EVEN], [0.88, 0.97]) is None
    # The source's accuracy below four fifths of its highest, whatever the target does.
    lost = said({"schedule/mu": 0.0, "adapt/mask_rate": 0.0}, [0.87, 0.77, *EVEN], [0.88, 0.97])
    assert "source has fallen from 97 % to 77 %" in (lost or "")
    assert said({}, [0.87, 0.78, *EVEN], [0.88, 0.97]) is None
    # ... and by more than eight standard deviations: sqrt(0.1 / 1.9 * 0.5 * 0.5 / 32) = 0.0203
    assert "from 50 % to 33 %" in (said({}, [0.87, 0.33, *EVEN], [0.88, 0.50], batch_size=32) or "")
    assert said({}, [0.87, 0.35, *EVEN], [0.88, 0.50], batch_size=32) is None
    assert said({}, [0.87, 0.35, *EVEN], [0.88, 0.50], batch_size=64) is not None
    # Pseudo-labels of one class for a hundred batches, once the target counts.
    assert "for 100 batches" in (said({}, [0.87, 0.95, *EVEN], [0.88, 0.97], leaning=100) or "")
    assert said({}, [0.87, 0.95, *EVEN], [0.88, 0.97], leaning=99) is None
    assert said({"schedule/mu": 0.49}, [0.87, 0.95, *EVEN], [0.88, 0.97], leaning=200) is None
    # 2 log 3 = 2.197
    assert "source's loss 2.2 is more than twice" in (
        said({"loss/source": 2.2}, [0.87, 0.95, *EVEN], [0.88, 0.97]) or ""
    )
    sound = ([0.87, 0.95, *EVEN], [0.88, 0.97])
    assert said({"loss/source": 2.19}, *sound) is None
    assert said({"loss/source": 4.39}, *sound, source_loss="sum") is None
    assert said({"loss/source": 4.4}, *sound, source_loss="sum")
    assert said({"loss/source": 1e9}, *sound, source_pass="inference") is None
