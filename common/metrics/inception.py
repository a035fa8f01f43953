"""The Inception network of the published FID numbers, with weights that are verified before use."""

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.metrics.cache import load_tensors
from common.runtime.errors import UsageError

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
HASH_PREFIX = "6726825d"
_FILE = URL.rsplit("/", 1)[1]


class Inception:
    """Pool features (B, 2048) of torch-fidelity's ``inception-v3-compat``: TensorFlow's FID network of 2015.

    Args:
        weights: its weights file; by default the official one, downloaded once.
        weights_sha256: the full SHA-256 that a file other than the official one must have.
        cache: folder that keeps the download.
        device: where the network runs.

    Raises:
        UsageError: if the file is missing, cannot be fetched, or is not what was asked for.
    """

    name = "inception"
    resize = "bilinear to 299x299 as in TensorFlow 1"
    dim = 2048

    def __init__(
        self, weights: Path | None, weights_sha256: str | None, cache: Path, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        path = weights or _download(cache / _FILE)
        content, digest = verified(path, weights_sha256, _FILE)
        if weights_sha256 is None and not digest.startswith(HASH_PREFIX):
            raise UsageError(
                f"fid.weights: {path} has SHA-256 {digest}, but the official file's starts with "
                f"{HASH_PREFIX}; take {_FILE}, or set fid.weights_sha256 to accept this one"
            )
        self.id = f"inception-v3-compat-2048-{digest}"
        self._network = _build(path, content).to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (B, 3, H, W) to features float32 (B, 2048)."""
        return self._network(images.to(self.device))[0]

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (B, 1008) of features (B, 2048), without biases, as the Inception Score takes them."""
        return features.to(self.device).mm(self._network.fc.weight.T)


def _download(path: Path) -> Path:
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=HASH_PREFIX)
    except (OSError, RuntimeError) as error:  # no network; content with another hash; a folder that is not open
        reason = " ".join(str(error).split())
        raise UsageError(
            f"fid.weights: {URL} could not be downloaded ({reason}); put the file at {path}, "
            "give another --cache, or take fid.extractor classifier"
        ) from None
    return path


def verified(path: Path, sha256: str | None, what: str) -> tuple[bytes, str]:
    """Return a weights file's content and its SHA-256, which must be ``sha256`` if given; else UsageError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"fid.weights: {path} cannot be read ({error.strerror}); expected {what}") from None
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256.lower():
        raise UsageError(f"fid.weights_sha256: expected {sha256} for {path}, which has {digest}")
    return content, digest


def _build(path: Path, content: bytes) -> "FeatureExtractorInceptionV3":
    """Construct the network; torch-fidelity unpickles whatever file it is given, so it gets one written here."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: PLC0415 - takes seconds

    refused = f"fid.weights: {path} does not hold the weights of inception-v3-compat"
    try:
        state = load_tensors(content)
    except ValueError as error:
        raise UsageError(f"{refused} ({first_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{refused} (expected a dictionary of tensors)")
    clean = io.BytesIO()
    torch.save(state, clean)
    clean.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # the constructor draws initial weights, then replaces them
            return FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048"],
                feature_extractor_weights_path=clean,  # pyright: ignore[reportArgumentType]
            )
    except RuntimeError as error:  # names and shapes that are missing, unexpected or different
        raise UsageError(f"{refused} ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    """Return the first telling line of torch's long explanations."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if not line.endswith(":")), lines[0] if lines else type(error).__name__)
    return reason if len(reason) <= 200 else reason[:200] + "..."
