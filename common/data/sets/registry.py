"""From a configuration to its images."""

from pathlib import Path

from common.data.config import DataConfig
from common.data.image_set import Splits
from common.data.reading.image_folder import read_folder
from common.data.reading.layout import own_folders, published_root
from common.data.superclasses import read_superclasses, with_superclasses
from common.errors import UsageError


def load(config: DataConfig) -> Splits:
    """Load the data set a configuration names.

    Only then is what the set needs imported: torchvision and scikit-learn take seconds, --help none.

    Raises:
        UsageError: if a folder or file is missing, or cannot be read.
    """
    if config.name in ("digits", "digits_m"):
        from common.data.sets import digits  # noqa: PLC0415 - see above

        return (digits.digits if config.name == "digits" else digits.digits_m)(config.size)
    if config.name == "imagefolder":
        return _folders(config)
    return _published(config, published_root(config.name, config.root or Path("data")))


def _published(config: DataConfig, root: Path) -> Splits:
    from common.data.sets import cifar, mnist, oxford_pet, svhn, tiny_imagenet  # noqa: PLC0415 - see `load`

    name, size, download = config.name, config.size, config.download
    if name == "mnist":
        return mnist.mnist(root, size, download=download)
    if name == "mnist_m":
        return mnist.mnist_m(root, size, config.blend, download=download)
    if name == "svhn":
        return svhn.svhn(root, size, download=download)
    if name == "tiny_imagenet":
        return tiny_imagenet.tiny_imagenet(root, size, download=download)
    if name == "oxford_pet":
        return oxford_pet.oxford_pet(root, size, config.labels, download=download)
    assert name in ("cifar10", "cifar100")  # all that is left
    return cifar.cifar(name, root, size, config.labels, download=download)


def _folders(config: DataConfig) -> Splits:
    if config.root is None:
        raise UsageError("data.root: expected the folder that holds the images, as in --data.root PATH")
    root, test_root = own_folders(config.root, config.test_root)
    train, test = read_folder(root, config.size), None
    if test_root is not None:
        if test_root.resolve() == root.resolve():
            raise UsageError(f"data.test_root: {test_root} is data.root, expected images held apart from it")
        test = read_folder(test_root, config.size, field="data.test_root", split="test", classes=train.classes or None)
    if config.superclasses is None:
        return Splits(train, test)
    if train.labels is None:
        raise UsageError(f"data.superclasses: the images in {root} have no classes, expected null")
    superclass_of = read_superclasses(config.superclasses, train.classes)
    return Splits(
        with_superclasses(train, superclass_of), None if test is None else with_superclasses(test, superclass_of)
    )
