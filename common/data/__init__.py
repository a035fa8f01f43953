"""Image sets: real digits, image folders, CIFAR, and the batches drawn from them."""

from common.data.config import DataConfig, register_data_set
from common.data.image_set import ImageSet, Splits, hold_out, to_float, to_input, to_uint8
from common.data.reading.image_folder import Decoding, check_folder, images_below, read_folder, read_images
from common.data.sets.registry import load
from common.data.streams import Batch, PerImage, StepLoader, Stream, View, mirrored, plain

__all__ = [
    "Batch",
    "DataConfig",
    "Decoding",
    "ImageSet",
    "PerImage",
    "Splits",
    "StepLoader",
    "Stream",
    "View",
    "check_folder",
    "hold_out",
    "images_below",
    "load",
    "mirrored",
    "plain",
    "read_folder",
    "read_images",
    "register_data_set",
    "to_float",
    "to_input",
    "to_uint8",
]
