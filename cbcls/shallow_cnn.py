"""The shallow CNN of the paper's Table IV."""

from torch import Tensor, nn

from common.machine.seeding import derive
from common.norms.config import NormConfig


class ShallowCNN(nn.Module):
    """Four convolutions, each with normalization and ReLU, and a linear map, from an image to class logits.

    The third normalization is the one under test, the others are BatchNorm. Sizes are those of Table IV for images
    of 32 x 32 (16, 8 and 4 after the pools, which round up); the last pool takes the mean over whatever is left,
    so other sizes work too. With BatchNorm it has 918,410 parameters for 10 classes, 941,540 for 100 and 967,240
    for 200. The paper states no initialisation: convolutions and the linear map keep torch's.

    Args:
        num_classes: length of the output.
        norm: the layer after convolution 3, 128 channels.
        seed: of the mixture's own generator; everything else is drawn from torch's global one.

    Shape: (N, 3, S, S) to (N, num_classes).
    """

    def __init__(self, num_classes: int, norm: NormConfig, seed: int = 0) -> None:
        super().__init__()
        bn = NormConfig(kind="bn")
        self.conv1 = nn.Conv2d(3, 64, 5, padding=2)
        self.norm1 = bn.build(64)
        self.conv2 = nn.Conv2d(64, 128, 5, padding=2)
        self.norm2 = bn.build(128)
        self.conv3 = nn.Conv2d(128, 128, 5, padding=2)
        self.norm3 = norm.build(128, derive(seed, "norm3"))
        self.conv4 = nn.Conv2d(128, 256, 3, padding=1)
        self.norm4 = bn.build(256)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.linear = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, S, S) in [-1, 1] to logits (N, num_classes)."""
        h = self.pool(self.relu(self.norm1(self.conv1(x))))
        h = self.pool(self.relu(self.norm2(self.conv2(h))))
        h = self.pool(self.relu(self.norm3(self.conv3(h))))
        h = self.relu(self.norm4(self.conv4(h)))
        return self.linear(h.mean((2, 3)))
