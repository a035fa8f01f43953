"""The DINOv2 extractor, by a transformer of one narrow block whose weights are in a file as timm's are."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save, save_file

from common.data import ImageSet, Splits
from common.metrics import Fid, FidConfig
from common.metrics.dinov2 import MODELS, DinoV2
from common.runtime.errors import UsageError

WIDTH, HEADS = 12, 2
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def narrow(monkeypatch) -> list[tuple[str, tuple[object, ...], dict[str, object]]]:
    """Let timm make its models with one narrow block, and return what it was asked for."""
    whole, asked = timm.create_model, []

    def create(name: str, *args: object, **options: object) -> torch.nn.Module:
        asked.append((name, args, options))
        options = {key: value for key, value in options.items() if key != "cache_dir"}
        return whole(name, depth=1, embed_dim=WIDTH, num_heads=HEADS, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(timm, "create_model", create)
    return asked


def random_state(side: int) -> State:
    state = timm.create_model("vit_large_patch14_dinov2", num_classes=0, img_size=side).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in state.items()}


@pytest.fixture
def state() -> State:
    return random_state(224)


@pytest.fixture
def file(tmp_path) -> Callable[[State], Path]:
    def write(state: State) -> Path:
        save_file(state, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


def photographs(count: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def pillow(image: torch.Tensor) -> torch.Tensor:
    """Resize each channel as floats by Pillow's bicubic filter, as clean-fid and dgm-eval do."""
    size = (224, 224)
    channels = [
        np.asarray(Image.fromarray(channel.numpy().astype(np.float32), mode="F").resize(size, Image.Resampling.BICUBIC))
        for channel in image
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 255)


def class_token(images: torch.Tensor, w: State) -> torch.Tensor:
    """Compute a vision transformer of one block with layer scale, written out."""
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = F.conv2d((images / 255 - mean) / std, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1) + w["pos_embed"]

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"blocks.0.{name}.weight"].T + w[f"blocks.0.{name}.bias"]

    q, k, v = linear(normed(x, "blocks.0.norm1"), "attn.qkv").unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    mixed = ((q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + w["blocks.0.ls1.gamma"] * linear(mixed, "attn.proj")
    inner = F.gelu(linear(normed(x, "blocks.0.norm2"), "mlp.fc1"))
    return normed(x + w["blocks.0.ls2.gamma"] * linear(inner, "mlp.fc2"), "norm")[:, 0]


def test_features_are_the_class_token_of_images_resized_as_pillow_does(state, file, tmp_path):
    for side in (32, 300):
        images = photographs(2, side)
        images[1] //= 4
        extractor = DinoV2("dinov2", file(state), None, tmp_path, "cpu")
        got = extractor(images)
        want = class_token(torch.stack([pillow(image) for image in images]), state)
        assert got.shape == (2, extractor.dim) == (2, WIDTH)
        assert torch.allclose(got, want, rtol=1e-3, atol=2e-4)
        assert (got[0] - got[1]).abs().max() > 0.05  # the image tells


def test_positions_of_published_weights_are_brought_to_the_grid(file, tmp_path):
    """They are of 518 pixels, these here of 56: four by four positions, which become sixteen by sixteen."""
    state = random_state(56)
    got = DinoV2("dinov2", file(state), None, tmp_path, "cpu")(photographs(1, 224))
    first, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True).flatten(2).mT
    want = class_token(photographs(1, 224).float(), state | {"pos_embed": torch.cat([first, grid], 1)})
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3)


def test_a_distance_by_it_has_its_own_tag_and_names_the_weights(state, file, tmp_path, narrow):
    path = file(state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    real = ImageSet(photographs(6, 8), None, (), "mine", "train")
    ids = set()
    for name, model in MODELS.items():
        config = FidConfig(extractor=name, weights=path, weights_sha256=digest.upper(), batch_size=3, metrics=[])
        before = torch.get_rng_state()
        fid = Fid(config, Splits(real, None), tmp_path / "cache", "cpu")
        assert torch.equal(torch.get_rng_state(), before)
        assert fid.tag == f"metric/fid_{name}"
        assert narrow[-1][0] == model == f"vit_{name.removeprefix('dinov2')[1:] or 'large'}_patch14_dinov2"
        assert str(fid.protocol()["extractor_id"]).startswith(f"{model}-224-cls-")
        assert fid.protocol()["resize"] == "bicubic with antialiasing to 224x224, clamped"
        ids.add(fid.protocol()["extractor_id"])
    other = DinoV2("dinov2", file({**state, "norm.bias": state["norm.bias"] + 1}), None, tmp_path, "cpu")
    assert len(ids | {other.id}) == 4


def test_other_files_are_refused_in_one_line(state, file, tmp_path):
    path = file(state)
    content = path.read_bytes()

    def refused(sha256: str | None = None) -> str:
        with pytest.raises(UsageError) as caught:
            DinoV2("dinov2", path, sha256, tmp_path, "cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    digest = hashlib.sha256(content).hexdigest()
    assert refused("0" * 64) == f"fid.weights_sha256: expected {'0' * 64} for {path}, which has {digest}"
    does_not_hold = f"fid.weights: {path} does not hold the weights of vit_large_patch14_dinov2 ("
    for other in (
        content[:1000],
        b"",
        save({name: value for name, value in state.items() if name != "pos_embed"}),
        save({name: value for name, value in state.items() if name != "norm.weight"}),
        save({**state, "more": torch.zeros(1)}),
        save({**state, "norm.weight": torch.zeros(3)}),
    ):
        path.write_bytes(other)
        assert refused().startswith(does_not_hold)
    path.unlink()
    assert "cannot be read" in refused()
    assert "timm's safetensors file" in refused()


def test_without_a_file_timm_downloads_it(tmp_path, monkeypatch, narrow):
    extractor = DinoV2("dinov2_small", None, None, tmp_path, "cpu")
    name, (pretrained,), options = narrow[-1]
    assert (name, pretrained, options["cache_dir"]) == ("vit_small_patch14_dinov2", True, str(tmp_path / "timm"))
    assert not any(p.requires_grad for p in extractor._network.parameters())

    def fails(*_: object, **__: object) -> None:
        raise OSError("we could not connect to the hub\nand more")

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(UsageError, match=r"^fid\.weights: timm could not download vit_small_patch14_dinov2 \(we could"):
        DinoV2("dinov2_small", None, None, tmp_path, "cpu")
