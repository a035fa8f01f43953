"""A small classifier trained on the run's own images: features for a Fréchet distance, and class counts.

It takes seconds on a CPU and needs no download. Its distances are comparable between runs on the same
training images only: the id names the weights.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import ImageSet, to_float
from common.data.image_set import resize
from common.metrics.cache import read_cache, write_cache
from common.metrics.extractors import weights_hash
from common.runtime import seeding
from common.runtime.errors import UsageError

SEED = 271828  # the measuring instrument does not change with the run's seed
STEPS = 400
_VERSION = 1
_BATCH = 64
_SIDE = 32


class Classifier:
    """Penultimate features (B, 64) and predicted classes of a network trained on labelled images.

    Trained on the CPU, whatever device it runs on later, so that its weights do not depend on the device.
    Neither the global generator nor the number of threads is changed for others.

    Args:
        train: labelled images of at least two classes.
        test: labelled images to validate on; by default a tenth of `train`, which is then not trained on.
        cache: folder that keeps trained networks.
        device: where the network runs.
        steps: training steps.

    Attributes:
        accuracy: on the validation images, in [0, 1].
        warning: what is wrong with that accuracy, or None.

    Raises:
        UsageError: if the images have no labels or only one class.
    """

    name = "classifier"
    resize = f"bicubic with antialiasing to {_SIDE}x{_SIDE} where larger"
    dim = 64

    def __init__(
        self,
        train: ImageSet,
        test: ImageSet | None,
        cache: Path,
        device: torch.device | str,
        steps: int = STEPS,
    ) -> None:
        self.device = torch.device(device)
        self.num_classes = train.num_classes
        fit, held_out = _split(train, test)
        recipe = f"v{_VERSION} {SEED} {steps} {train.num_classes} {torch.__version__}"
        key = f"{recipe} {fit.content_hash} {held_out.content_hash}"
        network = _Network(train.num_classes)
        found = read_cache(cache / "classifier", key)
        if found is None:
            _train(network, fit, steps)
            accuracy = float((_predict(network, held_out.images) == held_out.labels).float().mean())
            found = {"accuracy": accuracy, "network": network.state_dict()}
            write_cache(cache / "classifier", key, found)
        network.load_state_dict(found["network"])
        self.accuracy: float = found["accuracy"]
        self.warning = _warning(self.accuracy, train.num_classes)
        self.id = f"classifier-{weights_hash(network.state_dict())}"
        self._network = network.to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (B, 3, H, W) to features float32 (B, 64)."""
        return self._network.features(images.to(self.device))

    def classify(self, features: Tensor) -> Tensor:
        """Return the class, int64 (B,), of features (B, 64), on the device of the network."""
        return self.logits(features).argmax(dim=1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes) of features (B, 64), on the device of the network."""
        return self._network.head(features.to(self.device))

    def predict(self, images: Tensor) -> Tensor:
        """Return the class, int64 (B,), of uint8 images (B, 3, H, W)."""
        return self.classify(self(images))


class _Network(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive(SEED, "init"))
            self.body = nn.Sequential(_block(3, 16), _block(16, 32), _block(32, 64), nn.AdaptiveAvgPool2d(1))
            self.head = nn.Linear(64, num_classes)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU  # pyright: ignore[reportCallIssue]
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        x = to_float(_shrink(images)).contiguous(memory_format=torch.channels_last)
        return self.body(x).flatten(1)


def _shrink(images: Tensor) -> Tensor:
    return resize(images, _SIDE) if images.shape[-1] > _SIDE else images


def _block(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU())


def _split(train: ImageSet, test: ImageSet | None) -> tuple[ImageSet, ImageSet]:
    if train.labels is None:
        raise UsageError(
            f"fid.extractor: classifier needs labelled images, {train.name} has none; "
            "take inception, or a folder with one sub-folder a class"
        )
    if len(train.labels.unique()) < 2:
        raise UsageError(f"fid.extractor: classifier needs at least 2 classes, {train.name} has 1; take inception")
    if test is not None and test.labels is not None:
        return train, test
    order = seeding.permutation(len(train), SEED, "held out")
    count = max(1, len(train) // 10)
    return train.select(order[count:]), train.select(order[:count])


def _train(network: _Network, data: ImageSet, steps: int) -> None:
    assert data.labels is not None
    images = _shrink(data.images)  # once, not in every step
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums on any number of cores, and no waiting for a busy one
    try:
        with torch.enable_grad():
            for step in range(steps):
                index = torch.randint(len(data), (_BATCH,), generator=seeding.generator(SEED, "batch", step))
                logits = network.head(network.features(images[index]))
                optimizer.zero_grad()
                F.cross_entropy(logits, data.labels[index]).backward()
                optimizer.step()
                schedule.step()
    finally:
        torch.set_num_threads(threads)
    network.eval()


@torch.no_grad()
def _predict(network: _Network, images: Tensor) -> Tensor:
    return torch.cat([network.head(network.features(part)).argmax(dim=1) for part in images.split(256)])


def _warning(accuracy: float, num_classes: int) -> str | None:
    chance = 1 / num_classes
    enough = min(3 * chance, (1 + chance) / 2)  # three times chance cannot be reached with few classes
    if accuracy >= enough:
        return None
    return (
        f"fid.extractor: the classifier is right on {accuracy:.1%} of held-out images, expected at least "
        f"{enough:.1%} where chance is {chance:.1%}: its distances say little; take inception"
    )
