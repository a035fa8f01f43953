"""Image sets: real digits, image folders, CIFAR, and the batches drawn from them."""

from common.data.batches import Batches
from common.data.config import DataConfig
from common.data.image_set import ImageSet, Splits, to_float, to_uint8
from common.data.sets.registry import load

__all__ = ["Batches", "DataConfig", "ImageSet", "Splits", "load", "to_float", "to_uint8"]
