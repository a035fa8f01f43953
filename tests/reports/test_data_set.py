import numpy as np
import torch
from PIL import Image
from refusals import refused

from common.data import DataConfig, ImageSet, load
from common.data.__main__ import contact_sheet, main


def table(text):
    return {line[:15].strip(): line[15:] for line in text.splitlines()}


def test_prints_what_the_set_holds(tmp_path, capsys):
    main(["--name", "digits", "--size", "16", "--out", str(tmp_path / "new")])
    got = table(capsys.readouterr().out)
    splits = load(DataConfig(size=16))
    assert splits.test is not None
    assert got["digits"] == "16 x 16 pixels"
    assert got["train"] == f"1,000 images, content {splits.train.content_hash}"
    assert got["test"] == f"200 images, content {splits.test.content_hash}"
    assert (got["classes"], got["superclasses"]) == ("10: 0, 1, 2, 3, 4, ...", "none")
    pixels = splits.train.images.numpy()[:, 0] / 255
    assert got["mean"].split()[:3] == [f"{pixels.mean():.5f}"] * 3
    assert got["std"].split() == [f"{pixels.std():.5f}"] * 3
    sheet = tmp_path / "new" / f"contact-digits-{splits.train.content_hash[:8]}.png"
    assert got["contact sheet"] == str(sheet)
    with Image.open(sheet) as image:
        assert image.size == (8 * (64 + 2) + 2,) * 2


def test_prints_superclasses_and_that_there_are_no_test_images(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / name / "1.png")
    (tmp_path / "superclasses.json").write_text('{"a": "x", "b": "y"}')
    flags = ["--root", f"{tmp_path}/images", "--superclasses", f"{tmp_path}/superclasses.json", "--out", str(tmp_path)]
    main(["--name", "imagefolder", "--size", "8", *flags])
    got = table(capsys.readouterr().out)
    assert (got["test"], got["classes"], got["superclasses"]) == ("none", "2: a, b", "2: x, y")


def test_contact_sheet_shows_every_class_in_order():
    for size, shown in ((8, 64), (64, 64), (48, 48), (256, 128)):
        labels = torch.arange(128).flip(0) % 4
        images = (labels * 60).to(torch.uint8)[:, None, None, None].expand(-1, 3, size, size).contiguous()
        sheet = contact_sheet(ImageSet(images, labels, tuple("abcd"), "toy", "train"))
        assert sheet.dtype == torch.uint8
        assert sheet.shape == (3, 8 * (shown + 2) + 2, 8 * (shown + 2) + 2)
        middles = sheet[0, 2 + shown // 2 :: shown + 2, 2 + shown // 2 :: shown + 2]
        assert torch.equal(middles, (torch.arange(8)[:, None] // 2 * 60).expand(8, 8).to(torch.uint8))
    few = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 64, 64).contiguous()
    assert contact_sheet(ImageSet(few, None, (), "toy", "train"))[0, 34, 34::66].tolist() == [0, 1, 2]


def test_sheets_of_other_images_do_not_collide(tmp_path, capsys):
    for number, name in enumerate(("here/photos", "there/photos")):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 40 * number, dtype=np.uint8)).save(tmp_path / name / "1.png")
    sheets = []
    for name, size in (("here/photos", "8"), ("there/photos", "8"), ("here/photos", "16"), ("here/photos", "8")):
        flags = ["--name", "imagefolder", "--root", str(tmp_path / name), "--size", size]
        main([*flags, "--out", str(tmp_path / "sheets")])
        sheets.append(table(capsys.readouterr().out)["contact sheet"])
    assert sheets[0] == sheets[3]
    assert len(set(sheets)) == len(list((tmp_path / "sheets").iterdir())) == 3
    with Image.open(sheets[0]) as here, Image.open(sheets[1]) as there:
        assert (here.getpixel((34, 34)), there.getpixel((34, 34))) == ((0, 0, 0), (40, 40, 40))


def test_a_mistake_is_one_line_that_names_the_flag(tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "file").write_text("x")
    for flags, line in (
        (["--size", "7"], "size: expected a multiple of 4 from 8 to 1024, got 7"),
        (["--name", "imagefolder"], "root: expected the folder that holds the images, as in --root PATH"),
        (["--name", "cats"], "name: expected one of digits, "),
        (["--sise", "8"], "--sise: no such option; did you mean --size?"),
        (["--name", "svhn", "--root", "data.size", "--download", "false"], "root: no train_32x32.mat"),
        (["--size", "8", "--out", f"{tmp_path}/file"], f"out: {tmp_path}/file is a file, expected a folder"),
    ):
        assert refused(capsys, main, "--out", str(out), *flags).startswith(f"error: {line}")
        assert not out.exists()
