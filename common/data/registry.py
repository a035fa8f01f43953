"""From a configuration to its images."""

from pathlib import Path

from common.data.cifar import cifar
from common.data.config import DataConfig
from common.data.digits import digits, digits_m
from common.data.image_folder import read_folder
from common.data.image_set import Splits
from common.errors import UsageError


def load(config: DataConfig) -> Splits:
    """Load the data set a configuration names.

    Raises:
        UsageError: if a folder or file is missing, or cannot be read.
    """
    if config.name == "digits":
        return digits(config.size)
    if config.name == "digits_m":
        return digits_m(config.size)
    if config.name == "imagefolder":
        return _folders(config)
    return cifar(config.name, config.root or Path("data"), config.size, download=config.download)


def _folders(config: DataConfig) -> Splits:
    if config.root is None:
        raise UsageError("data.root: expected the folder that holds the images, as in --data.root PATH")
    train = read_folder(config.root, config.size)
    if config.test_root is None:
        return Splits(train, None)
    if config.test_root.resolve() == config.root.resolve():
        raise UsageError(f"data.test_root: {config.test_root} is data.root, expected images held apart from it")
    test = read_folder(
        config.test_root, config.size, field="data.test_root", split="test", classes=train.classes or None
    )
    return Splits(train, test)
