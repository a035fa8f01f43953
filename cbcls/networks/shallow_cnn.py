"""The shallow CNN of the paper's Table IV."""

from torch import Tensor, nn

from cbcls.networks.classifier import Classifier
from common.norms.config import NormConfig
from common.runtime.seeding import derive

CHANNELS = (64, 128, 128, 256)
"""Of its convolutions."""


class ShallowCNN(Classifier):
    """Four convolutions, each with normalization and ReLU, and a linear map, from an image to class logits.

    One normalization is the one under test, the others are BatchNorm. Sizes are those of Table IV for images
    of 32 x 32 (16, 8 and 4 after the pools, which round up); the last pool takes the mean over whatever is left,
    so other sizes work too. With BatchNorm it has 918,410 parameters for 10 classes, 941,540 for 100 and 967,240
    for 200. The paper states no initialisation: convolutions and the linear map keep torch's.

    Args:
        num_classes: length of the output.
        norm: the layer under test.
        seed: of the mixture's own generator; everything else is drawn from torch's global one.
        num_clusters: as for `Classifier`.
        position: after which convolution, 1 to 4, the layer under test is; the paper's is the third.
    """

    def __init__(
        self, num_classes: int, norm: NormConfig, seed: int = 0, num_clusters: int = 0, position: int = 3
    ) -> None:
        super().__init__(norm, num_clusters)
        self.position = position

        def layer(number: int) -> nn.Module:
            built = norm if number == position else NormConfig(kind="bn")
            return built.build(CHANNELS[number - 1], derive(seed, f"norm{number}"))

        self.conv1 = nn.Conv2d(3, 64, 5, padding=2)
        self.norm1 = layer(1)
        self.conv2 = nn.Conv2d(64, 128, 5, padding=2)
        self.norm2 = layer(2)
        self.conv3 = nn.Conv2d(128, 128, 5, padding=2)
        self.norm3 = layer(3)
        self.conv4 = nn.Conv2d(128, 256, 3, padding=1)
        self.norm4 = layer(4)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.end(256, num_classes)

    def features(self, x: Tensor, cluster: Tensor | None) -> Tensor:
        """Map images (N, 3, S, S) to what the linear map is given, (N, 256)."""
        for number in (1, 2, 3):
            x = self.pool(self._block(number, x, cluster))
        return self._block(4, x, cluster).mean((2, 3))

    def _block(self, number: int, h: Tensor, cluster: Tensor | None) -> Tensor:
        h, norm = getattr(self, f"conv{number}")(h), getattr(self, f"norm{number}")
        return self.relu(self.normalised(norm, h, cluster) if number == self.position else norm(h))
