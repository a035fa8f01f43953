import pytest
import torch

from cbgan.networks.augmentation import KINDS, augment

SIZE = 16


def source() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(25, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


@pytest.fixture
def draws() -> list[list[float]]:
    """Return the seven numbers that each image is changed by."""
    return torch.rand(25, 7, generator=source()).tolist()


def test_translation_moves_whole_pixels_and_fills_with_0(images, draws):
    found = augment(images, ("translation",), source())
    moves = set()
    for image, moved, (_, _, _, down, right, *_) in zip(images, found, draws, strict=True):
        y, x = int(down * 5) - 2, int(right * 5) - 2  # up to 16 / 8 = 2 pixels either way
        moves.add((y, x))
        want = torch.zeros_like(image)
        for row in range(SIZE):
            for column in range(SIZE):
                if 0 <= row - y < SIZE and 0 <= column - x < SIZE:
                    want[:, row, column] = image[:, row - y, column - x]
        assert torch.equal(moved, want)
    assert {y for y, _ in moves} == {x for _, x in moves} == {-2, -1, 0, 1, 2}


def test_cutout_blanks_a_square_of_half_the_side(images, draws):
    found = augment(images, ("cutout",), source())
    for image, cut, (*_, row, column) in zip(images, found, draws, strict=True):
        top, left = int(row * 17) - 4, int(column * 17) - 4
        want = image.clone()
        want[:, max(0, top) : max(0, top + 8), max(0, left) : max(0, left + 8)] = 0
        assert torch.equal(cut, want)


def test_colour_is_brightness_then_saturation_then_contrast(images, draws):
    found = augment(images, ("color",), source())
    for image, changed, (brightness, saturation, contrast, *_) in zip(images, found, draws, strict=True):
        want = image + brightness - 0.5
        grey = want.mean(0)
        want = (want - grey) * 2 * saturation + grey
        want = (want - want.mean()) * (0.5 + contrast) + want.mean()
        torch.testing.assert_close(changed, want, rtol=1e-6, atol=1e-6)  # draws are float32


def test_kinds_draw_alike_with_and_without_each_other_and_go_in_one_order(images):
    every = augment(images, KINDS[::-1], source())
    step = images
    for kind in KINDS:
        step = augment(step, (kind,), source())
    assert torch.equal(every, step)


def test_gradients_flow_back_twice(images):
    few = images[:2, :, :4, :4].clone().requires_grad_()

    def changed(x: torch.Tensor) -> torch.Tensor:
        return augment(x, KINDS, source()).square()

    assert torch.autograd.gradcheck(changed, (few,))
    assert torch.autograd.gradgradcheck(changed, (few,), fast_mode=True)


def test_reduced_precision_moves_pixels_exactly(images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = augment(images.float(), ("translation",), source())
    assert torch.equal(found, augment(images.float(), ("translation",), source()))
