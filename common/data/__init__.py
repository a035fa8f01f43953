"""Image sets: real digits, image folders, CIFAR, and the batches drawn from them."""

from common.data.config import DataConfig
from common.data.image_set import ImageSet, Splits, to_float, to_uint8
from common.data.names import register_data_set
from common.data.sets.registry import load
from common.data.streams import Batch, Feed, PerImage, Stream, mirrored, plain
from common.data.validation import hold_out

__all__ = [
    "Batch",
    "DataConfig",
    "Feed",
    "ImageSet",
    "PerImage",
    "Splits",
    "Stream",
    "hold_out",
    "load",
    "mirrored",
    "plain",
    "register_data_set",
    "to_float",
    "to_uint8",
]
