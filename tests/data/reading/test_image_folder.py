import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from common.data import DataConfig, load
from common.data.reading.image_folder import Decoding, images_below, read_folder
from common.runtime.errors import UsageError


def pixels(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def classes(tmp_path):
    for i, name in enumerate(["b/2.png", "b/10.JPG", "b/deep/1.jpeg", "a/x.PNG"]):
        write(tmp_path / name, pixels(20 + i, 33 - 5 * i, seed=i))
    write(tmp_path / "beside.png", pixels(8, 8))
    return tmp_path


def test_classes_images_and_order_agree_with_torchvision(classes):
    steps = [Resize(16, InterpolationMode.BICUBIC, antialias=True), CenterCrop(16), PILToTensor()]
    oracle = ImageFolder(str(classes), Compose(steps))
    got: Any = load(DataConfig(name="imagefolder", root=classes, size=16))
    assert got.test is None
    assert got.train.classes == tuple(oracle.classes) == ("a", "b")
    assert got.train.labels.tolist() == [y for _, y in oracle]
    assert torch.equal(got.train.images, torch.stack([x for x, _ in oracle]))


def test_resize_and_crop_agree_with_torchvision(tmp_path):
    steps = Compose([Resize(16, InterpolationMode.BICUBIC, antialias=True), CenterCrop(16), PILToTensor()])
    for shape in ((16, 16), (16, 40), (41, 16), (9, 5), (100, 37), (17, 16)):
        write(tmp_path / "i.png", pixels(*shape))
        want: Any = steps(Image.fromarray(pixels(*shape)))
        assert torch.equal(read_folder(tmp_path, Decoding(16)).images[0], want)


def test_padding_keeps_the_whole_image_between_black_bars(tmp_path):
    for shape in ((16, 16), (16, 40), (41, 16), (9, 5), (100, 37)):
        image = np.maximum(pixels(*shape), 1)
        write(tmp_path / "i.png", image)
        got = read_folder(tmp_path, Decoding(16, "pad")).images[0].permute(1, 2, 0).numpy()
        height, width = (max(1, round(16 * side / max(shape))) for side in shape)
        top, left = (16 - height) // 2, (16 - width) // 2
        want = np.zeros_like(got)
        inner = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        want[top : top + height, left : left + width] = inner
        assert np.array_equal(got, want)


@pytest.mark.parametrize("fit", ["cut", "pad"])
def test_images_decoded_when_they_are_asked_for_are_the_same(classes, fit):
    now, later = (
        load(DataConfig(name="imagefolder", root=classes, size=16, fit=fit, in_memory=kept)).train
        for kept in (True, False)
    )
    assert not isinstance(later.images, torch.Tensor)
    assert len(later) == len(now) == 4
    index = torch.tensor([3, 0, 0])
    assert torch.equal(later.images[index], now.images[index])
    assert torch.equal(later.images[1:3], now.images[1:3])
    assert (later.content_hash, later.pixel_hash) == (now.content_hash, now.pixel_hash)
    some = later.select(torch.tensor([2, 3]))
    assert not isinstance(some.images, torch.Tensor)
    assert torch.equal(some.images[:], now.images[2:])
    assert torch.equal(torch.cat(list(some.chunks())), now.images[2:])
    (classes / "b" / "2.png").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"2.png: cannot be read as an image"):
        later.images[:]


def test_every_mode_becomes_rgb(tmp_path):
    grey, rgba = Image.fromarray(pixels(16, 16, 0)), Image.fromarray(pixels(16, 16, 4))
    rgb = Image.fromarray(pixels(16, 16))
    palette, clear = rgb.quantize(16), rgb.quantize(16)
    clear.info["transparency"] = bytes(range(16))
    threefold = np.repeat(np.asarray(grey)[..., None], 3, 2)
    for image, want in (
        (grey, threefold),
        (rgba, np.asarray(rgba)[..., :3]),
        (palette, np.asarray(palette.convert("RGB"))),
        (clear, np.asarray(palette.convert("RGB"))),
        (grey.convert("1"), np.asarray(grey.convert("1").convert("RGB"))),
        (grey.convert("LA"), threefold),
        (rgb.convert("CMYK"), np.asarray(rgb.convert("CMYK").convert("RGB"))),
    ):
        path = tmp_path / ("i.tif" if image.mode == "CMYK" else "i.png")
        image.save(path)
        found = read_folder(tmp_path, Decoding(16)).images[-1].permute(1, 2, 0).numpy()
        path.unlink()
        assert np.array_equal(found, want), image.mode


@pytest.mark.parametrize("in_memory", [True, False])
def test_sixteen_bits_that_come_out_nearly_black_are_warned_of_once(tmp_path, capsys, in_memory):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for name, deep in (("bright.png", values * 257), ("a.png", values * 16), ("b.tif", values * 16)):
        Image.fromarray(deep).save(tmp_path / name)
    write(tmp_path / "night.png", pixels(16, 16) // 16)  # dark, but of 8 bits
    images = read_folder(tmp_path, Decoding(16, in_memory=in_memory)).images
    assert np.array_equal(images[:][0].numpy(), np.broadcast_to(values // 16, (3, 16, 16)))
    assert capsys.readouterr().err == (
        f"warning: 2 of 4 images, {tmp_path / 'a.png'} first, have 16 bits a value and none above 4,095, so they are "
        "nearly black: of 16 bits the high byte is kept; stretch them to 0..65,535\n"
    )


def test_numbers_of_more_than_sixteen_bits_are_refused(tmp_path):
    for kind in (np.float32, np.int32):
        Image.fromarray(np.full((8, 8), 70_000, kind)).save(tmp_path / "i.tif")
        with pytest.raises(UsageError, match=r"i\.tif: cannot be read .* \(it holds .*, expected 8 or 16 bits\)"):
            read_folder(tmp_path, Decoding(8))


@pytest.mark.parametrize("extension", ["webp", "bmp", "tif", "TIFF", "gif"])
def test_other_formats_are_read_too_and_the_first_of_several_frames(tmp_path, extension):
    first, second = (Image.fromarray(pixels(16, 16, seed=seed)).quantize(64).convert("RGB") for seed in (1, 2))
    more: dict[str, Any] = {} if extension == "bmp" else {"save_all": True, "append_images": [second]}
    more |= {"lossless": True} if extension == "webp" else {}
    first.save(tmp_path / f"i.{extension}", **more)
    got = read_folder(tmp_path, Decoding(16)).images[0]
    assert np.array_equal(got.permute(1, 2, 0).numpy(), np.asarray(first))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_images_are_turned_as_their_exif_says(tmp_path, extension):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :, 0], stored[:, :16, 2] = 255, 255
    turned = stored.swapaxes(0, 1)
    # Where row 0 and column 0 of the file belong: top and left, top and right, bottom and right ... (EXIF 2.3, 4.6.4).
    wanted = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1],
              turned, turned[:, ::-1], turned[::-1, ::-1], turned[::-1]]  # fmt: skip
    for orientation, want in enumerate(wanted, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(tmp_path / f"i.{extension}", exif=exif, lossless=True)
        got = read_folder(tmp_path, Decoding(32, "pad")).images[0].permute(1, 2, 0).numpy()
        got = got[:, 8:24] if orientation > 4 else got[8:24]
        assert np.abs(got.astype(int) - want).max() < 128, orientation  # JPEG blurs colours


def test_damaged_exif_does_not_hide_the_pixels(tmp_path):
    Image.fromarray(pixels(16, 16)).save(tmp_path / "i.png", exif=b"Exif\0\0nonsense")
    assert np.array_equal(read_folder(tmp_path, Decoding(16)).images[0].permute(1, 2, 0).numpy(), pixels(16, 16))


def test_what_is_hidden_or_no_image_is_left_out_and_counted(tmp_path, capsys):
    for name in ("1.png", "2.png", "._1.png", ".thumbnails/1.png", ".thumbnails/2.png", "3.PNG"):
        write(tmp_path / "flat" / name, pixels(8, 8))
    for name in (".DS_Store", "notes.txt", "4.heic"):
        (tmp_path / "flat" / name).touch()
    flat = read_folder(tmp_path / "flat", Decoding(8))
    assert (len(flat), flat.labels) == (3, None)
    assert capsys.readouterr().err == f"note: {tmp_path / 'flat'}: files left out: 3 hidden, 2 of other formats\n"
    write(tmp_path / "classes" / "cats" / "1.png", pixels(8, 8))
    (tmp_path / "flat").rename(tmp_path / "classes" / "dogs")
    write(tmp_path / "classes" / ".git" / "1.png", pixels(8, 8))
    write(tmp_path / "classes" / "beside.png", pixels(8, 8))
    classes = read_folder(tmp_path / "classes", Decoding(8))
    assert (len(classes), classes.classes) == (4, ("cats", "dogs"))
    assert capsys.readouterr().err == (
        f"note: {tmp_path / 'classes'}: files left out: 4 hidden, 2 of other formats, 1 beside the class folders\n"
    )


@pytest.mark.parametrize(("link", "to"), [("cats/self", "."), ("cats/deep/up", "../.."), ("kittens", "cats")])
def test_a_folder_that_is_reached_twice_is_named(tmp_path, link, to):
    write(tmp_path / "cats" / "deep" / "1.png", pixels(8, 8))
    (tmp_path / link).symlink_to(to)
    again = tmp_path if link.endswith("up") else tmp_path / "cats"
    with pytest.raises(UsageError, match=rf"^data\.root: {tmp_path / link} is the folder {again} again, by a link; "):
        read_folder(tmp_path, Decoding(8))


def test_a_truncated_file_is_named(tmp_path):
    for extension in ("png", "jpg"):
        path = tmp_path / extension / f"whole.{extension}"
        write(path, pixels(64, 64))
        content = path.read_bytes()
        for kept in (0, 20, len(content) // 2, int(0.9 * len(content))):
            path.write_bytes(content[:kept])
            with pytest.raises(UsageError, match=rf"whole\.{extension}: cannot be read as an image \(.+\)") as caught:
                read_folder(path.parent, Decoding(16))
            assert "\n" not in str(caught.value)
    Image.fromarray(pixels(8, 8)).save(path, "PPM")  # a reader that was not asked for is never tried
    with pytest.raises(UsageError, match=r"whole\.jpg: cannot be read as an image"):
        read_folder(path.parent, Decoding(8))


def bad_folder(root, files):
    for name in files:
        if name.endswith(".png"):
            write(root / name, pixels(8, 8))
        elif name.endswith(".mat"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        else:
            (root / name).mkdir(parents=True)


SPLITS = (
    ("train/a/1.png", "val/a/1.png"),
    r"(\S+) holds splits \(train, val\), not classes; pass --data\.root \1/train --data\.test_root \1/val$",
)
SETS = (
    ("amazon/test/1.png", "amazon/train/1.png", "webcam/test/1.png", "webcam/train/1.png"),
    r"(\S+) holds data sets \(amazon, webcam\), each with train/ and test/; pass one .*, --data\.root \1/amazon$",
)
PUBLISHED = (
    ("MNIST/raw/train", "street/train_32x32.mat"),
    r"(\S+) holds mnist, svhn, not one folder a class; pass --data\.name mnist --data\.root \1$",
)


def test_a_folder_that_cannot_serve_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for number, (files, message) in enumerate((
        ((), r"no folder \S+$"),
        ((".",), r"no images in \S+, expected \.png, .*\.gif$"),
        (("a/1.png", "b/.1.png"), r"class folder \S*b has no images, .*\.gif \(left out: 1 hidden\)$"),
        SPLITS,
        (("labels/1.png", "test/1.png", "train/1.png"), r"(\S+) holds splits \(test, train\), not classes; "
         r"pass --data\.root \1/train --data\.test_root \1/test$"),
        SETS,
        PUBLISHED,
    )):  # fmt: skip
        bad_folder(tmp_path / str(number), files)
        with pytest.raises(UsageError, match=rf"^data\.root: {message}") as caught:
            load(DataConfig(name="imagefolder", root=tmp_path / str(number)))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"^data\.root: \S+file is a file"):
        load(DataConfig(name="imagefolder", root=tmp_path / "file"))
    with pytest.raises(UsageError, match=r"^data\.root: expected the folder"):
        load(DataConfig(name="imagefolder"))


def test_test_images_take_the_labels_of_the_training_classes(tmp_path):
    for name in ("train/a", "train/b", "held/b", "new/c", "pair/train", "pair/test"):
        write(tmp_path / name / "1.png", pixels(8, 8))

    def tested_on(name) -> Any:
        return load(DataConfig(name="imagefolder", root=tmp_path / "train", test_root=tmp_path / name, size=8)).test

    test = tested_on("held")
    assert (test.labels.tolist(), test.classes, test.split) == ([1], ("a", "b"), "test")
    for name, message in (
        ("new", r"class folder .*c is not among the training classes"),
        ("train", r".* is data\.root"),
        ("none", r"no folder"),
        ("pair", r"(\S+pair) holds splits \(test, train\), not classes; pass --data\.test_root \1/test$"),
    ):
        with pytest.raises(UsageError, match=rf"^data\.test_root: {message}"):
            tested_on(name)


@pytest.mark.parametrize(("files", "_"), [SPLITS, SETS, PUBLISHED])
def test_what_to_pass_is_quoted_for_a_shell(tmp_path, files, _):
    root = tmp_path / "my data"
    bad_folder(root, files)
    with pytest.raises(UsageError) as caught:
        load(DataConfig(name="imagefolder", root=root))
    flags = shlex.split(str(caught.value).partition("--")[2])
    assert {Path(flag) for flag in flags if "my data" in flag} <= {root, root / "train", root / "val", root / "amazon"}
    assert str(root) in " ".join(flags)


@pytest.mark.parametrize("inner", ["", "a/"], ids=["flat", "classes"])
def test_a_folder_of_train_and_test_gives_both(tmp_path, inner):
    for number, name in enumerate(("train", "test")):
        write(tmp_path / "set" / name / f"{inner}1.png", pixels(8, 8, seed=number))
    splits: Any = load(DataConfig(name="imagefolder", root=tmp_path / "set", size=8))
    for number, part in enumerate((splits.train, splits.test)):
        assert np.array_equal(part.images[0].permute(1, 2, 0).numpy(), pixels(8, 8, seed=number))
        assert part.classes == (("a",) if inner else ())
    assert (splits.train.split, splits.test.split) == ("train", "test")
    with pytest.raises(UsageError, match=r"data\.root: \S+ holds splits .* pass --data\.root \S+set/train"):
        load(DataConfig(name="imagefolder", root=tmp_path / "set", test_root=tmp_path / "set" / "test"))


def test_files_come_in_the_order_of_their_paths_whatever_the_disk_says_and_through_links(tmp_path, monkeypatch):
    for name in ("a/2.png", "a/1.png", "b/c/0.JPG", "b/3.jpeg", "elsewhere/5.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "set" / "elsewhere").rename(tmp_path / "elsewhere")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    walk = os.walk

    def backwards(*arguments, **options):
        places = sorted(walk(*arguments, **options), reverse=True)
        return [(place, folders, sorted(names, reverse=True)) for place, folders, names in places]

    monkeypatch.setattr(os, "walk", backwards)
    names = [path.relative_to(tmp_path / "set").as_posix() for path in images_below(tmp_path / "set", "images")]
    assert names == ["a/1.png", "a/2.png", "b/3.jpeg", "b/c/0.JPG", "link/5.png"]
