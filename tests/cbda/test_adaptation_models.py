import pytest
import torch

from cbda.config import AdaMatchConfig, ModelConfig
from cbda.models import build_classifier
from cbda.networks.wide_resnet import WideResNet
from common.errors import UsageError
from common.networks.pixels import pixels_of
from common.norms import UCBNorm
from common.norms.config import NormConfig

SMALL = "timm:test_resnet"


def config(**model) -> AdaMatchConfig:
    return AdaMatchConfig(model=ModelConfig(**model))


def test_wide_resnets_are_made_as_named():
    network = build_classifier(config(name="wrn-16-2", form="keras"), 7).network
    assert isinstance(network, WideResNet)
    assert (network.linear.in_features, network.linear.out_features, len(network.groups)) == (128, 7, 3)
    assert network.stem.bias is None


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
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match=r"^model.weights: .* cannot be read as weights"):
        build_classifier(config(name=SMALL, weights=path), 4)


def test_timms_batch_norms_are_converted_by_name():
    cfg = AdaMatchConfig(
        model=ModelConfig(name=SMALL, convert=["layer4.0.bn1"]), norm=NormConfig(kind="ucb", num_components=2)
    )
    layers = [name for name, m in build_classifier(cfg, 4).network.named_modules() if isinstance(m, UCBNorm)]
    assert layers == ["layer4.0.bn1"]


def test_pixels_come_in_the_range_that_was_asked_for():
    signed = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert torch.equal(pixels_of(signed, "signed"), signed)
    assert pixels_of(signed, "unit")[0, :, 0, 0].tolist() == [0, 0.5, 1]
    assert pixels_of(signed, "raw")[0, :, 0, 0].tolist() == [0, 127.5, 255]
    want = [(0 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert pixels_of(signed, "imagenet")[0, :, 0, 0].tolist() == pytest.approx(want)
