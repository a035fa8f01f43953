"""From a configuration to its images."""

from pathlib import Path

from common.data.config import DataConfig
from common.data.image_set import Splits
from common.data.names import DATA_SETS, register_data_set
from common.data.reading.image_folder import Decoding, read_folder
from common.data.reading.layout import own_folders, published_root
from common.data.superclasses import read_superclasses, with_superclasses
from common.runtime.errors import UsageError

# Only when a set is loaded is what it needs imported: torchvision and scikit-learn take seconds, --help none.
# ruff: noqa: PLC0415


def load(config: DataConfig) -> Splits:
    """Load the data set a configuration names.

    Raises:
        UsageError: if a folder or file is missing, or cannot be read; or a set of the user's own gives anything but
            images of the size asked for.
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


def _digits(config: DataConfig) -> Splits:
    from common.data.sets import digits

    return digits.digits(config.size)


def _digits_m(config: DataConfig) -> Splits:
    from common.data.sets import digits

    return digits.digits_m(config.size)


def _folders(config: DataConfig) -> Splits:
    if config.root is None:
        raise UsageError("data.root: expected the folder that holds the images, as in --data.root PATH")
    root, test_root = own_folders(config.root, config.test_root)
    how = Decoding(config.size, config.fit, config.in_memory)
    train, test = read_folder(root, how), None
    if test_root is not None:
        if test_root.resolve() == root.resolve():
            raise UsageError(f"data.test_root: {test_root} is data.root, expected images held apart from it")
        test = read_folder(test_root, how, field="data.test_root", split="test", classes=train.classes or None)
    if config.superclasses is None:
        return Splits(train, test)
    if train.labels is None:
        raise UsageError(f"data.superclasses: the images in {root} have no classes, expected null")
    superclass_of = read_superclasses(config.superclasses, train.classes)
    return Splits(
        with_superclasses(train, superclass_of), None if test is None else with_superclasses(test, superclass_of)
    )


def _cifar(config: DataConfig) -> Splits:
    from common.data.sets import cifar

    assert config.name in ("cifar10", "cifar100")  # these are registered with it
    return cifar.cifar(config.name, _published(config), config.size, config.labels, download=config.download)


def _mnist(config: DataConfig) -> Splits:
    from common.data.sets import mnist

    return mnist.mnist(_published(config), config.size, download=config.download)


def _mnist_m(config: DataConfig) -> Splits:
    from common.data.sets import mnist

    return mnist.mnist_m(_published(config), config.size, config.blend, download=config.download)


def _svhn(config: DataConfig) -> Splits:
    from common.data.sets import svhn

    return svhn.svhn(_published(config), config.size, download=config.download)


def _tiny_imagenet(config: DataConfig) -> Splits:
    from common.data.sets import tiny_imagenet

    how = Decoding(config.size, in_memory=config.in_memory)
    return tiny_imagenet.tiny_imagenet(_published(config), how, download=config.download)


def _oxford_pet(config: DataConfig) -> Splits:
    from common.data.sets import oxford_pet

    how = Decoding(config.size, config.fit, config.in_memory)
    load = oxford_pet.oxford_pet if config.split == "official" else oxford_pet.oxford_pet_of_the_paper
    return load(_published(config), how, config.labels, download=config.download)


def _published(config: DataConfig) -> Path:
    """Return where a published set is or goes to."""
    return published_root(config.name, config.root or Path("data"))


register_data_set("digits", _digits)
register_data_set("digits_m", _digits_m)
register_data_set("imagefolder", _folders, takes=("root", "test_root", "superclasses", "fit", "in_memory"))
register_data_set("cifar10", _cifar, takes=("root",))
register_data_set("cifar100", _cifar, takes=("root", "labels"))
register_data_set("mnist", _mnist, takes=("root",))
register_data_set("mnist_m", _mnist_m, takes=("root", "blend"))
register_data_set("svhn", _svhn, takes=("root",))
register_data_set("tiny_imagenet", _tiny_imagenet, takes=("root", "in_memory"))
register_data_set("oxford_pet", _oxford_pet, takes=("root", "labels", "split", "fit", "in_memory"))
