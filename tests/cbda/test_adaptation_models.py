import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import cbda.adamatch
from cbda import load_model
from cbda.config import AdaMatchConfig, ImagesConfig, ModelConfig
from cbda.evaluation import evaluation_batch_size
from cbda.models import build_classifier
from common.networks.pixels import pixels_of
from common.norms import SCBNorm, UCBNorm
from common.norms.config import NormConfig
from common.runtime.errors import UsageError
from common.train.checkpoint import load

SMALL = "timm:test_resnet"


def config(**model) -> AdaMatchConfig:
    return AdaMatchConfig(model=ModelConfig(**model))


def test_timms_networks_take_local_weights_but_for_a_last_layer_of_other_classes(tmp_path):
    donor = build_classifier(config(name=SMALL), 9).network
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": donor.state_dict()}, path)
    network = build_classifier(config(name=SMALL, weights=path), 4).network
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = [net.eval().forward_features(x) for net in (network, donor)]  # pyright: ignore[reportCallIssue]
        assert network(x).shape == (2, 4)
    assert torch.equal(*features)
    torch.save({"other": torch.zeros(3)}, path)
    with pytest.raises(UsageError, match=r"^model.weights: .* holds 0 of the \d+ tensors of timm:test_resnet"):
        build_classifier(config(name=SMALL, weights=path), 4)
    torch.save(torch.zeros(3), path)
    with pytest.raises(UsageError, match=r"^model.weights: .* holds a Tensor, expected tensors by name$"):
        build_classifier(config(name=SMALL, weights=path), 4)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match=r"^model.weights: .* cannot be read as weights"):
        build_classifier(config(name=SMALL, weights=path), 4)


def test_weights_of_a_deeper_network_are_refused_and_of_another_head_are_not(tmp_path):
    state = build_classifier(config(name=SMALL), 4).network.state_dict()
    head = {f"fc.{number}.{name}": torch.zeros(2) for number in range(3) for name in ("weight", "bias")}
    deeper = {name.replace("layer4.0", "layer4.1"): value for name, value in state.items()}
    paths = {name: tmp_path / f"{name}.pth" for name in ("deeper", "head")}
    torch.save(state | deeper, paths["deeper"])
    torch.save({name: value for name, value in state.items() if not name.startswith("fc.")} | head, paths["head"])
    build_classifier(config(name=SMALL, weights=paths["head"]), 4)
    with pytest.raises(UsageError, match=r"^model.weights: .* that this network has not: layer4.1.conv1.weight, "):
        build_classifier(config(name=SMALL, weights=paths["deeper"]), 4)


def test_images_whose_last_maps_have_no_instance_statistics_are_refused():
    model = ModelConfig(name=SMALL, convert=["all"])
    instance = NormConfig(kind="scb", num_components=2, statistics="instance", backend="triton")
    for size in (32, 64):
        cfg = AdaMatchConfig(data=ImagesConfig(size=size), model=model, norm=instance)
        if size == 32:
            with pytest.raises(
                UsageError, match=rf"^data.size: {SMALL} cannot take .* 32 pixels \(x: expected more than"
            ):
                build_classifier(cfg, 4)
        else:
            layers = [m for m in build_classifier(cfg, 4).modules() if isinstance(m, SCBNorm)]
            assert {(m.backend, m.training) for m in layers} == {("triton", True)}


def test_timms_batch_norms_are_converted_by_name():
    cfg = AdaMatchConfig(
        model=ModelConfig(name=SMALL, convert=["layer4.0.bn1"]), norm=NormConfig(kind="ucb", num_components=2)
    )
    layers = [name for name, m in build_classifier(cfg, 4).network.named_modules() if isinstance(m, UCBNorm)]
    assert layers == ["layer4.0.bn1"]


@pytest.fixture
def weights(tmp_path) -> Path:
    """Write weights, and statistics that are not those of a start, to a safetensors file."""
    torch.manual_seed(1)
    network = build_classifier(AdaMatchConfig(model=ModelConfig(name=SMALL), norm=NormConfig(kind="none")), 9).network
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for name, value in state.items():
        if name.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand(value.shape) + 0.2)
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize(("kind", "convert"), [("scb", ["bn1"]), ("dsbn", ["all"])])
def test_converted_layers_start_as_the_batch_norms_of_the_file(weights, kind, convert):
    norm = NormConfig(kind=kind, num_components=2)
    cfg = AdaMatchConfig(model=ModelConfig(name=SMALL, weights=weights, convert=convert), norm=norm).resolved()
    plain = AdaMatchConfig(model=ModelConfig(name=SMALL, weights=weights), norm=NormConfig(kind="none"))
    torch.manual_seed(2)  # of the last layer, which the file has for other classes
    network = build_classifier(cfg, 4).eval()
    torch.manual_seed(2)
    donor = build_classifier(plain, 4).eval()
    x, ids = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(network(x, ids), donor(x, ids), rtol=1e-3, atol=1e-4)
    assert cfg.norm.affine is None  # BatchNorm's own, as eps and momentum
    only = build_classifier(cfg, 4, kind="none").eval()
    with torch.no_grad():
        torch.testing.assert_close(only.network.forward_features(x), donor.network.forward_features(x))  # pyright: ignore[reportCallIssue]


def test_what_converted_layers_cannot_be_names_the_setting():
    norm = NormConfig(kind="scb", num_components=2, affine=False)
    cfg = AdaMatchConfig(model=ModelConfig(name=SMALL, convert=["all"]), norm=norm)
    with pytest.raises(UsageError, match=r"^norm.affine: expected True, since conv1.1 has a weight"):
        build_classifier(cfg, 4)


def test_a_pretrained_network_is_adapted_with_its_batch_norms_converted(tiny, tmp_path, weights):
    cbda.adamatch.main([*tiny, "--model.name", SMALL, "--model.weights", str(weights), "--model.convert", "all",
                        "--model.pixels", "imagenet", "--norm.kind", "dsbn", "--data.size", "32", "--epochs", "1",
                        "--steps_per_epoch", "1", "--lr", "1e-3", "--name", "run"])  # fmt: skip
    state = load(tmp_path / "cbda" / "run" / "checkpoints" / "step-00000001.pt")["networks"]
    assert "network.bn1.domains.1.running_mean" in state["adamatch"]
    assert "network.bn1.running_mean" not in state["adamatch"]
    # Of the source alone per-domain BatchNorm is the BatchNorm that was there, and no layer more.
    assert "network.bn1.running_mean" in state["source_only"]
    assert not any(name.startswith("norm.") for name in state["source_only"])
    model = load_model(tmp_path / "cbda" / "run")
    assert model.logits(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).isfinite().all()


def test_an_exported_model_is_a_file_of_weights(tiny, tmp_path):
    flags = ["--model.name", SMALL, "--epochs", "1", "--steps_per_epoch", "1", "--data.size", "32"]
    cbda.adamatch.main([*tiny, *flags, "--norm.kind", "scb", "--name", "run"])
    exported = load_model(tmp_path / "cbda" / "run")
    exported.save(tmp_path / "exported")
    weights = tmp_path / "exported" / "model.safetensors"
    network = build_classifier(config(name=SMALL, weights=weights), len(exported.classes)).network
    for name, value in exported.network.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_large_images_are_classified_in_as_much_memory_as_small_ones():
    assert evaluation_batch_size(32) == evaluation_batch_size(16) == 256
    pixels = [evaluation_batch_size(size) * size**2 for size in (64, 96, 128)]
    assert pixels == pytest.approx([256 * 32**2] * 3, rel=0.02)


def test_pixels_come_in_the_range_that_was_asked_for():
    signed = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert torch.equal(pixels_of(signed, "signed"), signed)
    assert pixels_of(signed, "unit")[0, :, 0, 0].tolist() == [0, 0.5, 1]
    assert pixels_of(signed, "raw")[0, :, 0, 0].tolist() == [0, 127.5, 255]
    want = [(0 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert pixels_of(signed, "imagenet")[0, :, 0, 0].tolist() == pytest.approx(want)


def test_weights_that_cannot_be_downloaded_are_missed_in_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route\n to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    line = (
        "model.pretrained: the weights of resnet18 cannot be had (no route to host); expected a connection, or a file "
        "by --model.weights; HF_HUB_OFFLINE=1 spares the retries"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(line)}$"):
        build_classifier(config(name="timm:resnet18", pretrained=True), 3)
