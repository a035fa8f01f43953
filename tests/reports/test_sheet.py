import torch

from common.reports.sheet import captioned_sheet

GREEN, RED, GREY = (46, 125, 50), (198, 40, 40), (97, 97, 97)


def test_a_sheet_shows_every_image_in_its_place_and_frame():
    images = torch.stack([torch.full((3, 32, 32), 10 * i, dtype=torch.uint8) for i in range(5)])
    sheet = captioned_sheet(images, list("01234"), ["right", "wrong", "open", "right", "wrong"], columns=3)
    assert sheet.shape == (3, 4 + 2 * 88, 4 + 3 * 74)
    frames = [GREEN, RED, GREY, GREEN, RED]
    for i, frame in enumerate(frames):
        top, left = 4 + 88 * (i // 3), 4 + 74 * (i % 3)
        assert tuple(sheet[:, top, left].tolist()) == frame
        assert (sheet[:, top + 3 : top + 67, left + 3 : left + 67] == 10 * i).all()
        below = sheet[:, top + 70 : top + 84, left : left + 70]
        assert (below != 255).any()  # the caption
    assert (sheet[:, 92:, 4 + 2 * 74 :] == 255).all()  # nothing where no image is


def test_captions_in_other_letters_differ():
    captions = ["猫", "犬", "ж", "д", "caf\udce9", "a\nb"]
    sheet = captioned_sheet(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), captions, columns=1)
    lines = {sheet[:, 88 * i + 74 : 88 * i + 88].numpy().tobytes() for i in range(6)}
    assert len(lines) == 6  # what a font has no glyph for looks all the same


def test_long_captions_are_cut_and_large_images_made_smaller():
    images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    sheet = captioned_sheet(images, ["a very long caption that runs on", ""])
    assert sheet.shape == (3, 92, 152)
    assert (sheet[:, 74:, 74:78] == 255).all()  # the gap between the two
