"""The built-in data sets, and from a configuration to its images."""

from collections.abc import Callable
from importlib import import_module

from common.data.config import DATA_SETS, DataConfig, register_data_set
from common.data.image_set import Splits
from common.runtime.errors import UsageError


def load(config: DataConfig) -> Splits:
    """Load the data set a configuration names.

    Raises:
        UsageError: if files are missing or damaged, and were not to be or could not be downloaded; or a set of the
            user's own gives anything but images of the size asked for.
    """
    splits = DATA_SETS[config.name].load(config)
    if not isinstance(splits, Splits):
        raise UsageError(f"data.name: expected {config.name} to load Splits of images, got {type(splits).__name__}")
    for _, images in splits.items():
        height, width = images.images.shape[2:]
        if (height, width) != (config.size, config.size):
            raise UsageError(
                f"data.size: expected {config.size} x {config.size} of {config.name}, got {height} x {width}"
            )
    return splits


def _by(module: str) -> Callable[[DataConfig], Splits]:
    """Return the `load` of a module of this folder, which is imported only then: torchvision takes seconds."""
    return lambda config: import_module(f"common.data.sets.{module}").load(config)


register_data_set("digits", _by("digits"))
register_data_set("digits_m", _by("digits"))
register_data_set("imagefolder", _by("image_folder"), takes=("root", "test_root", "superclasses", "fit", "in_memory"))
register_data_set("cifar10", _by("cifar"), takes=("root",))
register_data_set("cifar100", _by("cifar"), takes=("root", "labels"))
register_data_set("mnist", _by("mnist"), takes=("root",))
register_data_set("mnist_m", _by("mnist"), takes=("root", "blend"))
register_data_set("svhn", _by("svhn"), takes=("root",))
register_data_set("tiny_imagenet", _by("tiny_imagenet"), takes=("root", "in_memory"))
register_data_set("oxford_pet", _by("oxford_pet"), takes=("root", "labels", "split", "fit", "in_memory"))
