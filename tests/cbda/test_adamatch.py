import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import Hit, run
from run_comparison import assert_same_runs, final_state, logged
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from tasks import made
from torch import Tensor, nn

import cbda.adamatch
import cbda.adaptation.algorithm
import cbda.adaptation.gradients
import cbda.models
import cbda.predict
from cbda.adaptation.algorithm import shares_drawn
from cbda.config import AdaMatchConfig
from cbda.domains import domain_streams, load_domains
from cbda.evaluation import clusters_of
from cbda.models import build_classifier
from cbda.networks.classifier import SOURCE, TARGET, Classifier
from cbda.task import CHARTS, AdaMatchTask
from common.data import Batch, ImageSet, to_float
from common.data.augmentation import ViewOptions
from common.networks.pixels import pixels_of
from common.runtime.cli import parse
from common.runtime.errors import NonFiniteError, UsageError
from common.runtime.seeding import permutation, uniform_per_sample
from common.train.checkpoint import load
from common.train.logging import read_metrics
from common.train.step import MicroBatch

CONFIGS = Path(__file__).parents[2] / "configs" / "cbda"


def config(name: str) -> AdaMatchConfig:
    return parse(AdaMatchConfig, ["--config", str(CONFIGS / name)])


def test_the_papers_rows_differ_in_the_layer_alone():
    for kind in ("none", "scb", "scb_base", "ucb"):
        cfg = config(f"paper_{kind}.yaml")
        assert (cfg.norm.kind, cfg.epochs, cfg.batch_size, cfg.target_ratio) == (kind, 100, 64, 3)
        assert (cfg.optimizer, cfg.lr, cfg.ema_decay, cfg.weight_decay) == ("adam", 0.03, 0, 0)
        assert (cfg.schedule.kind, cfg.schedule.floor, cfg.steps_per_epoch) == ("cosine", 0.25, 73_257 // 192)
        method = cfg.method.resolved()
        assert (method.source_pass, method.source_loss, method.alignment, method.scaling, method.labels) == (
            "inference", "sum", "none", "l2", "soft",
        )  # fmt: skip
        assert sum(p.numel() for p in build_classifier(cfg, 10, kind="none").parameters()) == 1_467_610
        assert (cfg.source.name, cfg.target.name, cfg.data.flip) == ("mnist", "svhn", True)


def test_ucb_norm_gives_the_papers_network_the_same_in_training_and_in_tests():
    cfg = config("paper_ucb.yaml")
    layer = build_classifier(cfg, 10).norm
    x = pixels_of(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, cfg.model.pixels)
    trained = layer.train()(x)
    torch.testing.assert_close(layer.eval()(x), trained)  # 94 deviations apart where only tests took Eq. 15
    assert 0.1 < trained.std() < 10


def test_the_official_configuration_is_the_authors():
    cfg = config("official.yaml")
    assert cfg.epochs * (cfg.steps_per_epoch or 0) * cfg.batch_size == 8 << 20
    assert (cfg.optimizer, cfg.lr, cfg.weight_decay, cfg.ema_decay) == ("sgd", 0.03, 1e-3, 0.999)
    assert (cfg.schedule.kind, cfg.schedule.floor, cfg.batch_size, cfg.target_ratio) == ("partial_cosine", 0.25, 64, 3)
    assert cfg.data.flip
    method = cfg.method.resolved()
    assert (method.source_pass, method.source_loss, method.alignment, method.scaling, method.labels) == (
        "training", "mean", "running", "sum", "hard",
    )  # fmt: skip
    assert (method.tau, method.warmup, method.decay, method.history) == (0.9, 0.5, 0.999, 128)
    assert sum(p.numel() for p in build_classifier(cfg, 10).parameters()) == 1_469_642


MORE = {"official": torch.tensor([1.0, 0.0, 0.0]), "keras": torch.tensor([0.0, 1.0, 0.0])}
"""What the pass of the source alone adds, in training and in inference mode."""


class Linear(nn.Module):
    """Stands for a classifier: a linear map of what differs from an image's mean; alone, a class has 1 more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, 3, generator=torch.Generator().manual_seed(3)) * 0.3)
        self.asked: list[Tensor] = []

    def logits(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return (flat - flat.mean(1, keepdim=True)) @ self.weight

    def forward(self, x: Tensor, cluster: Tensor, alone: int = 0, *, inference: bool = False):
        self.asked.append(cluster)
        logits = self.logits(x)
        return (logits, logits[:alone] + MORE["keras" if inference else "official"]) if alone else logits


def prepared(tiny: list[str], *flags: str) -> tuple[AdaMatchTask, MicroBatch, Linear]:
    """Return a task whose classifier is a linear map, and a micro-batch."""
    task = made(AdaMatchTask, parse(AdaMatchConfig, [*tiny, *flags]).resolved())
    network = Linear()
    task.ddp_networks["adamatch"] = network
    return task, MicroBatch(next(task.loader.epoch(0, 0, 5))[0], 7, 5), network


def loss_of(task: AdaMatchTask, micro: MicroBatch, mu: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a micro-batch, and what is logged of it."""
    loss, metrics = task.adamatch_loss(micro, mu)
    assert all(name.startswith("gradient/") for name in metrics.epoch)  # which few steps measure
    return loss, {name: value.detach() for name, value in {**metrics.step, **metrics.epoch}.items()}


def forward(batch: Batch, network: Linear) -> list[Tensor]:
    return [network.logits(to_float(view)) for view in batch.views]


def by_hand(part: MicroBatch, network: Linear, kind: str, mu: float) -> Tensor:
    """AdaMatch's loss, written down once more for each kind."""
    source, target = part["train"], part["target"]
    sw, ss = forward(source, network)
    tw, ts = forward(target, network)
    mixed = []
    for view, logits in enumerate((sw, ss)):
        entries = (source.index[:, None] * 3 + torch.arange(3)).flatten()
        share = uniform_per_sample(entries, 5, "interpolation", view, 7).view(-1, 3)
        mixed.append(logits + share * MORE[kind])
    supervised = F.cross_entropy(mixed[0], source.labels) + F.cross_entropy(mixed[1], source.labels)
    threshold = 0.9 * mixed[0].softmax(1).max(1).values.mean()
    p = tw.softmax(1)
    if kind == "keras":
        q = p / p.norm(dim=1, keepdim=True)
        normaliser = ts.logsumexp(1)  # its gradient counts once, its value as often as labels sum to
        losses = normaliser + (q.sum(1) - 1).detach() * normaliser.detach() - (q.detach() * ts).sum(1)
        return supervised + mu * ((q.max(1).values >= threshold) * losses).mean()
    # The first batch: averages start at 1/3.
    p_source = 0.999 / 3 + 0.001 * mixed[0].softmax(1).mean(0)
    p_target = (127 / 3 + p.mean(0)) / 128
    q = p * (1e-6 + p_source) / (1e-6 + p_target)
    q = (q / q.sum(1, keepdim=True)).detach()
    losses = F.cross_entropy(ts, q.argmax(1), reduction="none")
    return supervised / 2 + mu * ((q.max(1).values >= threshold) * losses).mean()


@pytest.mark.parametrize("kind", ["official", "keras"])
def test_the_loss_and_its_gradient_are_the_papers(tiny, kind):
    method, part, network = prepared(tiny, "--method.kind", kind)
    loss, values = loss_of(method, part, 0.7)
    want = by_hand(part, network, kind, 0.7)
    torch.testing.assert_close(loss, want)
    ours, theirs = (torch.autograd.grad(value, network.weight)[0] for value in (loss, want))
    torch.testing.assert_close(ours, theirs)
    assert 0 < values["adapt/mask_rate"] < 1  # else half of it was not tested
    assert network.asked[0].tolist() == [SOURCE] * 18 + [TARGET] * 18


def test_each_switch_changes_the_loss(tiny):
    def loss(*flags: str) -> float:
        method, part, _ = prepared(tiny, "--method.history", "1", *flags)  # so that running estimates matter at once
        return loss_of(method, part, 0.7)[0].item()

    soft = ("--method.labels", "soft")  # hard ones may all stay the same
    switches = ("interpolation false", "alignment batch", "alignment none", "scaling l2", "source_loss sum",
                "source_pass inference", "tau 0.5")  # fmt: skip
    losses = [loss(), loss(*soft), *(loss(*soft, *f"--method.{switch}".split()) for switch in switches)]
    assert len({*losses[:2]}) == 2
    assert losses[1] not in losses[2:]


def test_without_interpolation_there_is_no_second_pass(tiny):
    method, part, network = prepared(tiny, "--method.interpolation", "false", "--method.alignment", "none")
    sw, ss = forward(part["train"], network)
    labels = part["train"].labels
    loss = loss_of(method, part, 0.0)[0]
    torch.testing.assert_close(loss, (F.cross_entropy(sw, labels) + F.cross_entropy(ss, labels)) / 2)


def test_labelled_target_images_are_learnt_from_as_members_of_the_target(tiny):
    method, part, network = prepared(tiny, "--target.labels_per_class", "2")
    assert len(part["target_labelled"].labels) == 9  # of six images
    loss, values = loss_of(method, part, 0.0)
    assert network.asked[0].tolist() == [SOURCE] * 18 + [TARGET] * 18 + [TARGET] * 18
    # google-research/adamatch, semi_supervised_domain_adaptation: xe + xet, both interpolated.
    wanted = []
    for stream, key in (("train", ()), ("target_labelled", ("target_labelled",))):
        entropies = [F.cross_entropy(mixed, part[stream].labels) for mixed in mixed_by_hand(part, stream, key, network)]
        wanted.append((entropies[0] + entropies[1]) / 2)
    torch.testing.assert_close(loss, sum(wanted))
    assert [values["loss/source"], values["loss/target_labelled"]] == pytest.approx([w.item() for w in wanted])


def mixed_by_hand(part: MicroBatch, stream: str, key: tuple[str, ...], network: Linear) -> list[Tensor]:
    """Weak and strong logits of a stream of labelled images, between the joint pass and their own."""
    entries = (part[stream].index[:, None] * 3 + torch.arange(3)).flatten()
    shares = [uniform_per_sample(entries, 5, "interpolation", *key, view, 7).view(-1, 3) for view in (0, 1)]
    return [
        logits + share * MORE["official"] for logits, share in zip(forward(part[stream], network), shares, strict=True)
    ]


def test_few_labels_are_repeated_to_a_full_batch_each_time_in_another_view(tiny):
    cfg = parse(AdaMatchConfig, [*tiny, "--source.labels_per_class", "1", "--target.labels_per_class", "2"])
    task = made(AdaMatchTask, cfg)
    batches = next(task.loader.epoch(0, 0, 5))[0]
    for name, few in (("train", 3), ("target_labelled", 6)):
        labels = task.images[name].labels
        assert labels is not None
        assert labels.bincount().tolist() == [few // 3] * 3
        batch = batches[name]
        assert len(batch.labels) == 9
        assert (batch.index % few).bincount().max() <= math.ceil(9 / few)
        same = batch.index[:, None] % few == batch.index % few
        strong = batch.views[1].flatten(1)
        assert any(not torch.equal(strong[a], strong[b]) for a, b in same.triu(1).nonzero().tolist())


def test_alignment_by_the_labelled_target(tiny):
    flags = ["--target.labels_per_class", "2", "--method.alignment", "batch"]
    by_source, part, _ = prepared(tiny, *flags)
    by_labelled, same, network = prepared(tiny, *flags, "--method.align_by", "labelled")
    ratios = [
        torch.stack([loss_of(m, p, 0.0)[1][f"adapt/ratio/{name}"] for name in ("cat", "dog", "fox")])
        for m, p in ((by_source, part), (by_labelled, same))
    ]
    wanted = mixed_by_hand(same, "target_labelled", ("target_labelled",), network)[0].softmax(1).mean(0)
    found = forward(same["target"], network)[0].softmax(1).mean(0)
    torch.testing.assert_close(ratios[1], (wanted / found).detach())
    assert not torch.allclose(ratios[0], ratios[1])


class Saying(nn.Module):
    """Stands for a classifier that says what it is told, with confidence."""

    def __init__(self, source: Tensor, target: Tensor, sharpness: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.logits = 9 * F.one_hot(torch.cat([source, source, target, target]), 3).float()
        self.logits[2 * len(source) :] *= sharpness.repeat(2)[:, None]

    def forward(self, x: Tensor, cluster: Tensor, alone: int = 0, **_: object):
        logits = self.weight * self.logits
        return (logits, logits[:alone]) if alone else logits


def test_what_passes_is_counted(tiny):
    method, part, _ = prepared(tiny, "--method.alignment", "none")
    source, target = part["train"].labels.clone(), part["target"].labels.clone()
    source[0] = (source[0] + 1) % 3  # one of nine is wrong
    target[:4], target[4:] = 0, 1
    sharpness = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0, 0])  # six pass: four of class 0, two of class 1
    method.ddp_networks["adamatch"] = Saying(source, target, sharpness)
    values = loss_of(method, part, 0.5)[1]
    shown = method.log_metrics({name: value.item() for name, value in values.items()})
    assert shown["adapt/source_accuracy"] == pytest.approx(8 / 9)
    assert shown["adapt/mask_rate"] == pytest.approx(6 / 9)
    assert shown["adapt/largest_class"] == pytest.approx(4 / 6)
    right = (target == part["target"].labels)[:6].float().mean().item()
    assert shown["adapt/pseudo_label_accuracy_oracle"] == pytest.approx(right)
    method.ddp_networks["adamatch"] = Saying(source, target, 0 * sharpness)
    none = method.log_metrics({name: value.item() for name, value in loss_of(method, part, 0.5)[1].items()})
    assert none["adapt/mask_rate"] == 0
    assert not {"adapt/pseudo_label_accuracy_oracle", "adapt/largest_class"} & none.keys()


def test_a_run_leaves_everything_behind(finished):
    folder, summary = finished
    names = set().union(*read_metrics(folder))
    own = {
        f"metric/{d}_accuracy{by}"
        for d in ("source", "target")
        for by in ("", "_as_source", "_as_target", "_as_unknown")
    }
    assert own | {"loss/adamatch", "loss/source_only", "loss/source", "loss/target", "adapt/threshold",
                  "adapt/mask_rate", "schedule/mu", "schedule/lr", "metric/source_only_target_accuracy",
                  "metric/target_information", "metric/validation_accuracy"} <= names  # fmt: skip
    mu = [line["schedule/mu"] for line in read_metrics(folder) if "schedule/mu" in line]
    steps = [0.5 - math.cos(min(math.pi, 2 * math.pi * i / 8)) / 2 for i in range(8)]
    assert mu == pytest.approx([(a + b) / 2 for a, b in zip(steps[::2], steps[1::2], strict=True)])
    last = next(line for line in reversed(read_metrics(folder)) if "metric/gain" in line)
    assert last["metric/gain"] == last["metric/target_accuracy"] - last["metric/source_only_target_accuracy"]
    assert (folder / "samples" / "predictions.png").stat().st_size > 1000
    headline = ("source_accuracy", "target_accuracy", "gain", "target_information", "validation_accuracy")
    line = "  ".join(f"metric/{name} {last[f'metric/{name}']:.4g}" for name in headline)
    for part in (f"epoch 2/2  {line}  ", "source only", "as unknown; the paper names the source's", "predictions.png"):
        assert part in summary
    noted = json.loads((folder / "summary.json").read_text())
    assert noted["best"]["tag"] == "metric/validation_accuracy"
    measured = {tag for tag in names if tag.startswith("metric/")} | {"loss/validation", "loss/source"}
    wanted = {tag: "lower" if tag.startswith("loss/") else "higher" for tag in measured}
    assert {tag: noted["better"].get(tag) for tag in measured} == wanted
    assert not noted["better"].keys() & {"loss/adamatch", "loss/target"}  # mu rises, labels change


def test_the_scores_of_a_run_are_those_of_its_averaged_weights(finished):
    folder, _ = finished
    cfg = parse(AdaMatchConfig, ["--config", str(folder / "config.yaml")])
    network = build_classifier(cfg, 3)
    state = load(folder / "checkpoints" / "step-00000008.pt")
    network.load_state_dict({**state["averages"]["adamatch"], **state["statistics"]["adamatch"]})
    last = next(line for line in reversed(read_metrics(folder)) if "metric/target_accuracy" in line)
    for domain, split in (("source", "test"), ("target", "target_test")):
        images = AdaMatchTask.load_images(cfg)[split]
        assert images.labels is not None
        for name, cluster in (("source", SOURCE), ("target", TARGET)):
            with torch.no_grad():
                found = network.eval()(to_float(images.images), torch.full((len(images),), cluster)).argmax(1)
            accuracy = accuracy_score(images.labels, found)
            want = precision_recall_fscore_support(images.labels, found, average="weighted", zero_division=0)[:3]  # pyright: ignore[reportArgumentType]
            for suffix in (f"_as_{name}", *([""] if name == domain else [])):
                scores = [last[f"metric/{domain}_weighted_{score}{suffix}"] for score in ("precision", "recall", "f1")]
                assert [last[f"metric/{domain}_accuracy{suffix}"], *scores] == pytest.approx([accuracy, *want])


def test_nothing_learnt_or_chosen_depends_on_the_targets_labels(tiny, tmp_path, monkeypatch):
    sound, runs = AdaMatchTask.load_images, []

    def with_garbage(cfg: AdaMatchConfig) -> dict[str, ImageSet]:
        images = sound(cfg)
        for name in ("target", "target_test"):
            labels = images[name].labels
            assert labels is not None
            images[name] = replace(images[name], labels=(labels + 1) % 3)
        return images

    for name in ("right", "garbage"):
        cbda.adamatch.main([*tiny, "--name", name, "--best.keep", "--best.by", "metric/target_information"])
        best = json.loads((tmp_path / "cbda" / name / "summary.json").read_text())["best"]
        runs.append((logged(tmp_path / "cbda" / name), (best["value"], best["epoch"])))
        monkeypatch.setattr(AdaMatchTask, "load_images", with_garbage)
    (right, best), (garbage, same) = runs
    assert best == same
    differ = {k for a, b in zip(right, garbage, strict=True) for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
    assert differ
    of_labels = ("target_accuracy", "target_weighted", "gain", "oracle")
    assert all(any(part in name for part in of_labels) for name in differ)


def test_a_run_whose_mu_is_rising_goes_on_where_it_was_killed(tiny, tmp_path):
    tiny = [*tiny, "--variance_every", "2", "--logits_variance"]  # an epoch's sampled steps lie on both sides
    assert run(cbda.adamatch.main, *tiny, "--name", "whole").statuses == [0]
    run(cbda.adamatch.main, *tiny, "--name", "killed", hit=Hit("step:7", signal.SIGTERM))
    end = run(cbda.adamatch.main, "--name", "killed", "--resume", "--out", str(tmp_path))
    assert end.statuses == [0], end.err
    assert_same_runs(tmp_path / "cbda" / "killed", tmp_path / "cbda" / "whole")


class Plain(nn.Module):
    """A network whose images know nothing of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 8, 3)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.second(self.first(x).relu()).relu().flatten(1))


def test_two_ranks_equal_one_on_the_joined_batch_where_no_layer_looks_at_a_batch(tiny, tmp_path, monkeypatch):
    def build(cfg: AdaMatchConfig, *_, **__) -> Classifier:
        return Classifier(Plain(), cfg.norm)

    monkeypatch.setattr(cbda.models, "build_classifier", build)
    flags = [*tiny, "--epochs", "1", "--norm.kind", "scb", "--optimizer", "sgd", "--lr", "0.1", "--method.tau", "0.95",
             "--method.warmup", "0.1", "--variance_every", "2", "--target.labels_per_class", "3"]  # fmt: skip
    assert run(cbda.adamatch.main, *flags, "--batch_size", "16", "--name", "one").statuses == [0]
    pair = run(cbda.adamatch.main, *flags, "--batch_size", "8", "--name", "two", ranks=2)
    assert pair.statuses == [0, 0], pair.err
    one, two = (final_state(tmp_path / "cbda" / name) for name in ("one", "two"))
    # Sums of float32 in another order, in four steps: a few units in the last of 24 bits, times the steps' growth.
    for group in ("networks", "averages"):
        for name, state in one[group].items():
            torch.testing.assert_close(two[group][name], state, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(logged(tmp_path / "cbda" / "two"), logged(tmp_path / "cbda" / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    names = set().union(*logged(tmp_path / "cbda" / "one"))
    assert {"adapt/largest_class", "adapt/source_accuracy", "gradient/target_variance_max"} <= names


def test_two_ranks_draw_the_shares_of_one(tiny):
    part = prepared(tiny, "--batch_size", "8")[1]
    shares = shares_drawn(part, "train", 3)
    halves = [
        shares_drawn(MicroBatch({"train": _half(part["train"], rank)}, 7, 5), "train", 3).chunk(2) for rank in (0, 1)
    ]
    assert torch.equal(torch.cat([halves[rank][view] for view in (0, 1) for rank in (0, 1)]), shares)
    assert 0 <= shares.min() < 0.2
    assert 0.8 < shares.max() < 1


def _half(batch: Batch, number: int) -> Batch:
    return Batch(
        tuple(v.chunk(2)[number] for v in batch.views), batch.labels.chunk(2)[number], batch.index.chunk(2)[number]
    )


def test_the_variance_of_gradients_is_that_of_each_domains_own_loss(tiny):
    method, part, network = prepared(tiny, "--variance_every", "4")
    method.networks["adamatch"] = network
    for number, sampled in ((6, False), (7, True)):
        values = loss_of(method, MicroBatch(part.batches, number, 5), 0.1)[1]
        assert ("gradient/source_variance_mean" in values) == sampled
    full, none = (by_hand(part, network, "official", mu) for mu in (1.0, 0.0))
    for domain, loss in (("source", none), ("target", full - none)):  # without mu
        variance = torch.autograd.grad(loss, network.weight, retain_graph=True)[0].var(correction=0)
        for how in ("mean", "max", "shared"):  # of one tensor
            torch.testing.assert_close(values[f"gradient/{domain}_variance_{how}"], variance, rtol=1e-4, atol=0)
    unsure = prepared(tiny, "--variance_every", "1", "--method.alignment", "none")
    unsure[0].networks["adamatch"] = unsure[2]
    batch = unsure[1]["target"]
    grey = replace(batch, views=tuple(torch.full_like(view, 127) for view in batch.views))
    values = loss_of(unsure[0], MicroBatch({**unsure[1].batches, "target": grey}, 0, 5), 1.0)[1]
    assert values["adapt/mask_rate"] == 0
    assert "gradient/source_variance_mean" in values
    assert "gradient/target_variance_mean" not in values  # missing, not 0


@pytest.mark.parametrize("kind", ["official", "keras"])
def test_the_noise_of_gradients_is_that_between_eighths_of_a_batch(tiny, kind):
    method, part, network = prepared(tiny, "--noise_every", "3", "--batch_size", "12", "--method.kind", kind)
    method.networks["adamatch"] = network
    assert not any("noise" in name for name in loss_of(method, part, 0.3)[1])
    values = loss_of(method, MicroBatch(part.batches, 8, 5), 0.3)[1]
    source, target, classes = part["train"], part["target"], torch.arange(3)
    mixed = []
    for view, logits in enumerate(forward(source, network)):
        share = uniform_per_sample((source.index[:, None] * 3 + classes).flatten(), 5, "interpolation", view, 8)
        mixed.append(logits + share.view(-1, 3) * MORE[kind])
    entropies = sum(F.cross_entropy(each, source.labels, reduction="none") for each in mixed)
    assert isinstance(entropies, Tensor)
    of_source = entropies / (2 if kind == "official" else 1)
    weak, strong = forward(target, network)
    p = weak.softmax(1).detach()
    if kind == "keras":
        q = p / p.norm(dim=1, keepdim=True)
        of_target = strong.logsumexp(1) - (q * strong).sum(1)
    else:  # the second of two batches that are alike
        means = mixed[0].softmax(1).mean(0).detach()
        wanted = 0.999 * (0.999 / 3 + 0.001 * means) + 0.001 * means
        q = p * (1e-6 + wanted) / (1e-6 + (126 / 3 + 2 * p.mean(0)) / 128)
        q = q / q.sum(1, keepdim=True)
        of_target = F.cross_entropy(strong, q.argmax(1), reduction="none")
    mask = q.amax(1) >= 0.9 * mixed[0].softmax(1).amax(1).mean().detach()
    assert 0 < mask.sum() < len(mask)
    for domain, losses in (("source", of_source), ("target", of_target * mask)):
        parts = [losses[a:b].mean() for a, b in ((0, 2), (2, 4), (4, 6), (6, 8), (8, 9), (9, 10), (10, 11), (11, 12))]
        gradients = [torch.autograd.grad(loss, network.weight, retain_graph=True)[0] for loss in parts]
        want = torch.stack(gradients).var(0).mean()
        for how in ("mean", "max", "shared"):
            torch.testing.assert_close(values[f"gradient/{domain}_noise_{how}"], want, rtol=1e-4, atol=0)


def test_the_authors_variance_is_of_the_sum_of_all_logits_in_training_mode_on_a_fresh_weak_batch(tiny, tmp_path):
    flags = [*tiny, "--variance_every", "0", "--norm.kind", "scb"]
    cbda.adamatch.main([*flags, "--logits_variance", "--name", "run"])
    cfg = parse(AdaMatchConfig, ["--config", str(tmp_path / "cbda" / "run" / "config.yaml")])
    logged = [line for line in read_metrics(tmp_path / "cbda" / "run") if "gradient/source_logits_variance_max" in line]
    assert [line["step"] for line in logged] == [4, 8]
    seen = {}
    for line in logged:
        network, images = build_classifier(cfg, 3), AdaMatchTask.load_images(cfg)
        path = tmp_path / "cbda" / "run" / "checkpoints" / f"step-{line['step']:08d}.pt"
        state = load(path)["networks"]["adamatch"]
        for domain, split in (("source", "train"), ("target", "target")):
            network.load_state_dict(state)
            network.zero_grad()
            place = ("logits", split, line["step"])
            index = permutation(36, 0, *place)[:9]
            seen[place] = index.tolist()
            batch = ViewOptions().view("weak", 8)(images[split].images[index], index, 0, *place)
            assert not torch.equal(batch, images[split].images[index])
            network.train()(to_float(batch), torch.full((9,), int(domain == "target"))).sum().backward()
            found = {name: p.grad.numpy().var() for name, p in network.named_parameters()
                     if p.grad is not None and p.numel() > 1}  # fmt: skip
            shared = [variance for name, variance in found.items() if name.split(".")[0] == "network"]
            assert len(shared) < len(found)
            want = {"mean": np.mean(list(found.values())), "max": max(found.values()), "shared": np.mean(shared)}
            assert {how: line[f"gradient/{domain}_logits_variance_{how}"] for how in want} == pytest.approx(
                want, rel=1e-3)  # fmt: skip
    assert len({tuple(index) for index in seen.values()}) == 4
    cbda.adamatch.main([*flags, "--name", "without"])  # measuring leaves no trace
    ours, theirs = (final_state(tmp_path / "cbda" / name)["networks"] for name in ("run", "without"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_bf16_and_accumulation_run(tiny, tmp_path):
    cbda.adamatch.main([*tiny, "--precision", "bf16", "--name", "run", "--batch_size", "4", "--grad_accum_steps", "2",
                        "--epochs", "1"])  # fmt: skip
    losses = [line["loss/adamatch"] for line in read_metrics(tmp_path / "cbda" / "run") if "loss/adamatch" in line]
    assert all(math.isfinite(loss) for loss in losses)


def test_a_layer_is_evaluated_by_the_clusters_it_can_be_given():
    for kind, names in {"mn": "source", "dsbn": "source target", "scb_base": "source target unknown"}.items():
        assert list(clusters_of(kind)) == names.split()


def test_logits_that_are_not_finite_name_their_images(tiny):
    cfg = parse(AdaMatchConfig, tiny)
    task = made(AdaMatchTask, cfg)
    network = build_classifier(cfg, 3)
    with torch.no_grad():
        network.get_parameter("network.linear.bias").fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"^logits of the target_test images are not finite"):
        task.evaluator.logits(network, "target_test", TARGET)


def test_a_run_can_be_made_longer_where_nothing_depends_on_its_length():
    for schedule, warmup, follows in (("constant", 0, False), ("constant", 0.5, True), ("cosine", 0, True)):
        cfg = parse(AdaMatchConfig, ["--schedule.kind", schedule, "--method.warmup", str(warmup)])
        assert cfg.follows_length is follows


def test_charts_are_of_what_a_run_logs(tiny, tmp_path):
    tau = ["--method.tau", "0.1", "--method.warmup", "0.01", "--variance_every", "2"]  # so that pseudo-labels pass
    cbda.adamatch.main([*tiny, *tau, "--epochs", "1", "--log_every", "1", "--name", "run"])
    tags = {tag for line in read_metrics(tmp_path / "cbda" / "run") for tag in line}
    assert {tag for chart in CHARTS.values() for tag in chart} <= tags


def test_a_target_of_some_classes_counts_them_as_the_source_does(tmp_path, domains):
    shutil.copytree(domains / "source" / "test", tmp_path / "source")
    for name in ("dog", "fox"):
        shutil.copytree(domains / "target" / "test" / name, tmp_path / "target" / name)
    cfg = parse(AdaMatchConfig, ["--data.size", "8", "--source.name", "imagefolder", "--source.root",
                                 str(tmp_path / "source"), "--target.name", "imagefolder", "--target.root",
                                 str(tmp_path / "target")])  # fmt: skip
    images = load_domains(cfg)
    assert images["target"].classes == images["train"].classes == ("cat", "dog", "fox")
    labels = images["target"].labels
    assert labels is not None
    assert labels.bincount().tolist() == [0, 4, 4]


def test_all_ranks_together_take_no_more_images_than_a_domain_has(tiny):
    cfg = parse(AdaMatchConfig, tiny)  # batches of 9 of 36 images
    images = load_domains(cfg)
    sizes = {name: stream.batch_size for name, stream in domain_streams(cfg, images, 4).items()}
    assert sizes == {"train": 9, "target": 9}
    with pytest.raises(UsageError, match=r"^batch_size: expected at most the 36 images of the target, got 45 a step$"):
        domain_streams(cfg, images, 5)
