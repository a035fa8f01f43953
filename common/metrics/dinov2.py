"""DINOv2 features by timm's vision transformers: FD-DINOv2 (Stein et al. 2023), nearer to what people see."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from common.metrics.extractors import weights_hash
from common.metrics.inception import first_line, verified
from common.runtime.errors import UsageError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

MODELS = {
    "dinov2": "vit_large_patch14_dinov2",
    "dinov2_base": "vit_base_patch14_dinov2",
    "dinov2_small": "vit_small_patch14_dinov2",
}
"""timm's names; the large one is that of published FD-DINOv2."""
SIDE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 was trained with


class DinoV2:
    """The class token (B, D) after the final norm: D is 1,024 (large), 768 (base) or 384 (small).

    Args:
        name: dinov2, dinov2_base or dinov2_small.
        weights: timm's safetensors file of the model; by default it is downloaded as timm does it.
        weights_sha256: the SHA-256 that the file must have; without one its content still goes into ``id``.
        cache: folder that keeps the download.
        device: where the network runs.

    Raises:
        UsageError: if the file is missing, cannot be fetched, or is not what was asked for.
    """

    resize = f"bicubic with antialiasing to {SIDE}x{SIDE}, clamped"

    def __init__(
        self, name: str, weights: Path | None, weights_sha256: str | None, cache: Path, device: torch.device | str
    ) -> None:
        self.name, self.device = name, torch.device(device)
        model = MODELS[name]
        network = _download(model, cache) if weights is None else _read(model, weights, weights_sha256)
        self.dim = network.num_features
        self.id = f"{model}-{SIDE}-cls-{weights_hash(network.state_dict())}"
        self._network = network.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (B, 3, H, W) to features float32 (B, D)."""
        x = images.to(self.device).float()
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).clamp_(0, 255)
        mean, std = (torch.tensor(each, device=self.device).view(3, 1, 1) for each in (_MEAN, _STD))
        return self._network.forward_features((x / 255 - mean) / std)[:, 0].float()


def _build(model: str, cache: Path | None = None) -> "VisionTransformer":
    """Make a network, with the published weights if there is a folder to keep them in."""
    import timm  # noqa: PLC0415 - takes seconds

    folder = None if cache is None else str(cache)
    with torch.random.fork_rng(devices=[]):  # weights are drawn first, then replaced
        return timm.create_model(model, folder is not None, cache_dir=folder, num_classes=0, img_size=SIDE)  # pyright: ignore[reportReturnType]


def _download(model: str, cache: Path) -> "VisionTransformer":
    try:
        return _build(model, cache / "timm")
    except Exception as error:  # whatever the hub's client makes of a missing network
        raise UsageError(
            f"fid.weights: timm could not download {model} ({first_line(error)}); give its safetensors file or "
            "another --cache, or take fid.extractor classifier"
        ) from None


def _read(model: str, path: Path, sha256: str | None) -> "VisionTransformer":
    import safetensors  # noqa: PLC0415 - not needed for --help
    from safetensors.torch import load  # noqa: PLC0415
    from timm.layers.pos_embed import resample_abs_pos_embed  # noqa: PLC0415 - takes seconds

    content, _ = verified(path, sha256, "timm's safetensors file")
    network = _build(model)
    try:
        state = load(content)
        grid = network.patch_embed.grid_size
        # published weights are of 518 pixels; timm brings them to others by this too
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"], grid, num_prefix_tokens=network.num_prefix_tokens
        )
        network.load_state_dict(state)
    except (safetensors.SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise UsageError(f"fid.weights: {path} does not hold the weights of {model} ({first_line(error)})") from None
    return network
