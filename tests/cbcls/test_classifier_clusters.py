"""Clusters reach the layer, or the last linear map, in training and in evaluation."""

import json

import pytest
import torch
from tasks import made

import cbcls.train
from cbcls.config import ClassifierConfig, ModelConfig
from cbcls.evaluation import Evaluator
from cbcls.models import build_classifier
from cbcls.networks.classifier import Classifier
from cbcls.task import ClassifierTask
from common.data.clusters import ClustersConfig
from common.data.image_set import ImageSet
from common.norms.config import NormConfig
from common.runtime.cli import parse
from common.runtime.errors import UsageError
from common.train.checkpoint import load
from common.train.logging import read_metrics

IDS = torch.tensor([0, 1, 2, 0])


def built(kind: str, **model) -> Classifier:
    torch.manual_seed(0)
    cfg = ClassifierConfig(
        norm=NormConfig(kind=kind),
        model=ModelConfig(**model),
        clusters=ClustersConfig(by="classes"),
    )
    return build_classifier(cfg, 3, 3)


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_layers_of_known_clusters_normalise_by_them():
    for kind in ("scb", "scb_base", "dsbn"):
        network, x, drawn = built(kind).eval(), pixels(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.get_submodule("norm3").parameters():
                parameter.add_(torch.randn(parameter.shape, generator=drawn), alpha=0.3)
            mixed = network(x, IDS)
            alike = [network(x, torch.full((4,), k)) for k in range(3)]
        for i, k in enumerate(IDS.tolist()):
            torch.testing.assert_close(mixed[i], alike[k][i])
            assert not torch.allclose(mixed[i], alike[(k + 1) % 3][i])


def test_every_position_can_be_the_one_under_test():
    for position in (1, 4):
        network = built("scb", position=position)
        kinds = [type(network.get_submodule(f"norm{i}")).__name__ for i in (1, 2, 3, 4)]
        assert kinds == ["SCBNorm" if i == position else "BatchNorm" for i in (1, 2, 3, 4)]
        assert network(pixels(), IDS).shape == (4, 3)


def test_clusters_beside_the_features_add_their_column_of_the_last_map():
    network, x = built("bn", onehot_cluster=True).eval(), pixels()
    assert network.linear.in_features == 256 + 3
    with torch.no_grad():
        columns = network.linear.weight[:, 256:]
        unknown = network(x, None)
        torch.testing.assert_close(network(x, IDS) - unknown, columns.T[IDS])
        assert torch.equal(network(x, torch.full((4,), -1)), unknown)
        h = network.features(x, None)
        torch.testing.assert_close(unknown, h @ network.linear.weight[:, :256].T + network.linear.bias)
    with pytest.raises(ValueError, match=r"^cluster: expected the cluster of each image in training"):
        network.train()(x)


def test_a_network_that_is_given_the_labels_learns_them(tiny, tmp_path):
    """Images are noise, so that whatever is known of those for testing was given."""
    flags = ["--norm.kind", "scb_base", "--norm.init", "data", "--norm.num_components", "6", "--clusters.by", "classes"]
    cbcls.train.main([*tiny, *flags, "--lr", "0.01", "--epochs", "12", "--evaluate_every", "12"])
    folder = tmp_path / "cbcls" / "imagefolder-scb_base-seed0"
    (line,) = [line for line in read_metrics(folder) if "metric/accuracy" in line]
    assert line["metric/accuracy"] > 0.6


def test_a_run_goes_on_with_its_clusters_alone(tiny, tmp_path):
    names = [f"class{label}" for label in range(6)]
    superclasses = tmp_path / "superclasses.json"
    superclasses.write_text(json.dumps({name: name for name in names}))
    flags = [*tiny, "--data.superclasses", str(superclasses), "--norm.kind", "scb", "--norm.num_components", "6"]
    cbcls.train.main([*flags, "--clusters.by", "superclasses", "--epochs", "1", "--name", "run"])
    protocol = load(tmp_path / "cbcls" / "run" / "checkpoints" / "step-00000004.pt")["protocol"]
    assert {"clusters_train", "clusters_test", "content_train", "content_test"} <= set(protocol)
    superclasses.write_text(json.dumps({name: names[5 - i] for i, name in enumerate(names)}))
    with pytest.raises(UsageError, match=r"clusters_train, clusters_test.* differ"):
        cbcls.train.main(["--name", "run", "--out", str(tmp_path), "--resume", "--epochs", "2"])


def test_clusters_that_a_network_is_not_given_are_no_part_of_its_protocol(tiny):
    for flags, given in (
        (["--norm.kind", "bn"], False),
        (["--norm.kind", "bn", "--model.onehot_cluster"], True),
        (["--norm.kind", "scb", "--norm.num_components", "6"], True),
    ):
        cfg = parse(ClassifierConfig, [*tiny, "--clusters.by", "classes", *flags])
        names = {name for name in made(ClassifierTask, cfg).eval_protocol() if name.startswith("clusters_")}
        assert names == ({"clusters_train", "clusters_test"} if given else set())


def test_evaluation_gives_each_image_its_own_cluster():
    class Echo(torch.nn.Module):
        """Says what it was given."""

        def forward(self, x: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
            return 20.0 * torch.nn.functional.one_hot(cluster, 3)

    labels = torch.arange(50) % 3
    images = ImageSet(torch.zeros(50, 3, 8, 8, dtype=torch.uint8), labels, tuple("abc"), "x", "test", None, (), labels,
                      tuple("abc"))  # fmt: skip
    cfg = ClassifierConfig(batch_size=16)
    evaluation = Evaluator(cfg, {"train": images, "test": images}, torch.device("cpu"))
    assert evaluation.scores(Echo(), lambda: None)["metric/accuracy"] == 1


def test_networks_see_pixels_as_was_asked_for():
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 1] //= 3
    images[:, 2] = 7
    unit = images.double() / 255
    mean, deviation = unit.mean((0, 2, 3)), unit.std((0, 2, 3), correction=0).clamp(min=1 / 255)
    data = ImageSet(images, None, (), "x", "train")
    signed = images.float() / 127.5 - 1
    for normalise, expected in (
        ("signed", signed),
        ("unit", images / 255),
        ("raw", images.float()),
        ("dataset", ((unit - mean[:, None, None]) / deviation[:, None, None]).float()),
    ):
        cfg = parse(ClassifierConfig, ["--data.normalise", normalise])
        network = build_classifier(cfg, 3, images=data)
        torch.testing.assert_close(network.pixels(signed), expected, rtol=0, atol=1e-4)
        again = build_classifier(cfg, 3)
        again.load_state_dict(network.state_dict())
        torch.testing.assert_close(again.pixels(signed), expected, rtol=0, atol=1e-4)
