import hashlib
import json
import os
import re
import subprocess
import sys
from io import BytesIO
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from common.data import Splits
from common.data.reading.image_folder import Decoding, read_folder
from common.metrics import Fid, FidConfig
from common.metrics import inception as module
from common.metrics.features import quality
from common.metrics.inception import Inception
from common.runtime.errors import UsageError

COUNT = 6


class Shell(FeatureExtractorInceptionV3):
    """The network without weights, to take names and shapes from."""

    def load_state_dict(self, *arguments, **options):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file of the right format with He-scaled random values, and its SHA-256."""
    nothing = BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        state = Shell("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if value.ndim == 4:
            fan_in = value[0].numel()
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5)
        elif name.endswith("bn.bias"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def write_images(folder, seed):
    """Write grey gradients of random slope with noise, so that images of a folder differ visibly."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for i in range(COUNT):
        slope = torch.rand(3, 1, 1, generator=generator) * torch.arange(32) * 6
        noise = torch.rand(3, 32, 32, generator=generator) * 64
        image = (slope + noise).clamp(0, 255).to(torch.uint8)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")


def test_agrees_with_torch_fidelitys_command_line(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "SPLITS", 3)
    path, digest = weights
    write_images(tmp_path / "real", 1)
    write_images(tmp_path / "fake", 2)
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--fid", "--json", "--cpu", "--silent"]
    command += ["--no-cache", "--save-cpu-ram", "--feature-extractor-weights-path", str(path)]
    command += ["--kid", "--kid-subset-size", str(COUNT), "--isc", "--isc-splits", "3", "--prc"]
    command += ["--feature-extractor", "inception-v3-compat"]  # whose default for precision and recall is another one
    command += ["--input1", str(tmp_path / "fake"), "--input2", str(tmp_path / "real")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONWARNINGS": ""})
    theirs = json.loads(done.stdout)
    want = theirs["frechet_inception_distance"]

    every: list[quality.Quality] = ["kid", "inception_score", "precision_recall"]
    config = FidConfig(extractor="inception", weights=path, weights_sha256=digest, batch_size=4, metrics=every)
    real, fake = (read_folder(tmp_path / name, Decoding(32)) for name in ("real", "fake"))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    fid = Fid(config, Splits(real, None), tmp_path / "cache", "cpu")
    got = fid.measure(lambda start, n: fake.images[start : start + n], COUNT)
    assert torch.equal(torch.get_rng_state(), before)
    # theirs averages float32 features in float32: 1e-7 of means whose squares are summed over 2,048 features
    assert got.fid == pytest.approx(want, rel=1e-4)
    assert want > 1e-3
    assert (fid.tag, got.classes) == ("metric/fid_inception", None)
    names = ("kernel_inception_distance_mean", "precision", "recall")
    assert [got.quality[ours] for ours in ("kid", "precision", "recall")] == [
        pytest.approx(theirs[name], rel=1e-3, abs=1e-6) for name in names
    ]
    assert isinstance(fid.extractor, Inception)
    parts = fid.extractor.logits(fid.extractor(fake.images))
    assert parts.shape == (COUNT, 1008)
    assert got.quality["inception_score"] - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=0.01)
    assert theirs["inception_score_mean"] > 1.000001
    assert digest in str(fid.protocol()["extractor_id"])


def refused(path, digest, tmp_path):
    with pytest.raises(UsageError) as caught:
        Inception(path, digest, tmp_path, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_of_another_hash_are_refused(weights, tmp_path):
    path, digest = weights
    assert "but the official file's starts with 6726825d" in refused(path, None, tmp_path)
    assert f"which has {digest}" in refused(path, "0" * 64, tmp_path)
    assert module.verified(path, digest.upper(), "")[1] == digest
    assert "none.pth cannot be read (No such file or directory)" in refused(tmp_path / "none.pth", None, tmp_path)


class Code:
    def __reduce__(self):
        return (sys.exit, (7,))


def reload(path):
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_of_another_form_are_refused(weights, tmp_path):
    path, state = tmp_path / "other.pth", torch.load(weights[0], weights_only=True)
    for content, message in (
        ({name: value for name, value in state.items() if name != "fc.weight"}, 'Missing key.*"fc.weight"'),
        ([1, 2], "expected a dictionary of tensors"),
        ({"a": 1}, "expected a dictionary of tensors"),
        ({"a": Code()}, "Weights only load failed"),  # running it would end the process
    ):
        torch.save(content, path)
        text = refused(*reload(path), tmp_path)
        assert text.startswith(f"fid.weights: {path} does not hold the weights of inception-v3-compat (")
        assert re.search(message, text)


def test_without_a_network_it_says_which_file_to_put_where(tmp_path, monkeypatch):
    errors = [URLError("no route"), RuntimeError('invalid hash value (expected "6726825d")')]

    def fail(url, dst, hash_prefix):
        assert hash_prefix == "6726825d"
        raise errors.pop()

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    while errors:
        text = refused(None, None, tmp_path)
        assert module.URL in text
        assert str(tmp_path / "weights-inception-2015-12-05-6726825d.pth") in text


def test_a_download_is_verified_and_kept(weights, tmp_path, monkeypatch):
    asked = []

    def deliver(url, dst, hash_prefix):
        asked.append(url)
        with open(dst, "wb") as file:
            file.write(weights[0].read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", deliver)
    monkeypatch.setattr(module, "HASH_PREFIX", weights[1][:8])
    first, second = (Inception(None, None, tmp_path, "cpu").id for _ in range(2))
    assert first == second == f"inception-v3-compat-2048-{weights[1]}"
    assert asked == [module.URL]
