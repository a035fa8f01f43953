import subprocess
import sys
from typing import Literal

import pytest
import torch
from torch import Tensor

from common.data import DataConfig, PerImage, load
from common.data.augmentation import Augmentation, ViewOptions

PLAIN = ViewOptions()
OF_CLASSIFIERS = PerImage(Augmentation("zoom", 16)), PerImage(Augmentation("affine", 16))
VIEWS = (PLAIN.view("weak", 16), PLAIN.view("strong", 16), *OF_CLASSIFIERS)


def coordinates(size: int = 16) -> Tensor:
    """Return an image whose pixels say where they come from: red the row, green the column."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([rows * 10, columns * 10, torch.zeros(size, size)]).to(torch.uint8)


def test_a_weak_view_is_a_crop_of_the_reflected_image():
    image, size = coordinates(), 16
    reflected = torch.nn.functional.pad(image[None].float(), (2,) * 4, mode="reflect")[0].to(torch.uint8)
    crops = {reflected[:, y : y + size, x : x + size].numpy().tobytes(): (y, x) for y in range(5) for x in range(5)}
    found = {crops[Augmentation("weak", 16)(image, seed).numpy().tobytes()] for seed in range(200)}
    assert found == {(y, x) for y in range(5) for x in range(5)}


def test_half_of_the_images_are_mirrored_where_that_was_asked_for():
    for flip, fewest, most in ((False, 200, 200), (True, 71, 129)):
        views = [Augmentation("weak", 16, flip)(coordinates(), seed)[1, 8] for seed in range(200)]
        assert fewest <= sum(bool(view[12] > view[4]) for view in views) <= most


def test_half_of_the_views_are_negatives_where_that_was_asked_for():
    image = coordinates()
    crops = {Augmentation("weak", 16)(image, seed).numpy().tobytes() for seed in range(200)}
    inverted = ViewOptions(invert=True).view("weak", 16).function
    views = [inverted(image, seed) for seed in range(200)]
    negative = [(255 - view).numpy().tobytes() in crops for view in views]
    assert all(view.numpy().tobytes() in crops for view, other in zip(views, negative, strict=True) if not other)
    assert 70 < sum(negative) < 130


def test_views_are_scaled_by_factors_of_the_range_height_and_width_apart():
    size, found = 64, []
    square = torch.zeros(3, size, size, dtype=torch.uint8)
    square[:, 22:42, 22:42] = 255
    scaled = ViewOptions(scale=(0.8, 1.4)).view("weak", size).function
    for seed in range(200):
        view = scaled(square, seed)[0].double() / 255
        found.append(torch.stack([view.sum(0).max(), view.sum(1).max()]) / 20)
    factors = torch.stack(found)
    for side in (0, 1):
        assert 0.78 < factors[:, side].min() < 0.84
        assert 1.36 < factors[:, side].max() < 1.42
        assert abs(factors[:, side].mean() - 1.1) < 0.04  # three standard errors of a uniform draw
    assert abs(torch.corrcoef(factors.T)[0, 1]) < 0.25  # drawn apart


def test_half_of_the_views_are_blurred_by_up_to_the_deviation_asked_for():
    size = 65
    point = torch.zeros(3, size, size, dtype=torch.uint8)
    point[:, 32, 32] = 255
    blurred, found = ViewOptions(blur=2.0).view("weak", size).function, []
    for seed in range(200):
        mass = blurred(point, seed)[0].double()
        rows = torch.arange(size, dtype=torch.float64)
        mean = (mass.sum(1) * rows).sum() / mass.sum()
        found.append(float((mass.sum(1) * (rows - mean).square()).sum() / mass.sum()) ** 0.5)
    sharp = sum(deviation < 0.05 for deviation in found)
    assert 85 < sharp < 145  # a half, and those of a deviation too small for 8 bits
    assert 1.6 < max(found) < 2.05  # 8 bits lose the tails


def test_equal_images_of_one_batch_are_seen_differently():
    images, index = coordinates()[None].repeat(40, 1, 1, 1), torch.arange(40)
    for view, at_least in zip(VIEWS, (15, 39, 39, 39), strict=True):
        seen = {image.numpy().tobytes() for image in view(images, index, 0, 0)}
        assert len(seen) >= at_least  # of 25 crops, or of any number of strong views


def test_a_view_follows_from_seed_position_and_index_alone():
    images, index = load(DataConfig(size=16)).train.images[:8], torch.arange(8)
    for view in VIEWS:
        whole = view(images, index, 5, "view", 1, 3)
        some = index.flip(0)[:3]
        assert torch.equal(view(images[some], some, 5, "view", 1, 3), whole[some])
        assert not torch.equal(view(images, index, 5, "view", 1, 4), whole)
        assert not torch.equal(view(images, index, 6, "view", 1, 3), whole)


def strong_views(image: Tensor, count: int = 400) -> list[Tensor]:
    return [Augmentation("strong", image.shape[-1])(image, seed) for seed in range(count)]


def test_a_strong_view_cuts_out_a_rectangle_of_at_most_half_a_side():
    # Of a black image nothing but inversion and the like shows; what they leave of one colour is not the rectangle's.
    sides = []
    for view in strong_views(torch.zeros(3, 16, 16, dtype=torch.uint8)):
        if (corners := view[:, [0, 0, -1, -1], [0, -1, 0, -1]].unique()).numel() != 1 or corners == 127:
            continue
        rows, columns = (view != corners).any(0).nonzero(as_tuple=True)
        if len(rows):
            sides.append((int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1))
            assert (view != corners).any(0).sum() == sides[-1][0] * sides[-1][1]
    assert len(sides) > 300
    assert {max(s) for s in zip(*sides, strict=True)} == {8}
    assert {min(s) for s in zip(*sides, strict=True)} == {1}


def test_strong_views_are_many_and_few_are_inverted():
    image = load(DataConfig(size=32)).train.images[0]
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).repeat(3, 32, 1)
    views = strong_views(ramp)
    falling = sum(bool(v[0, 16, 2] > v[0, 16, 29]) for v in views)
    assert 0.08 * len(views) < falling < 0.25 * len(views)  # 2 of 13 are inverted
    assert len({v.numpy().tobytes() for v in strong_views(image)}) > 390
    assert all(v.shape == (3, 32, 32) and v.dtype == torch.uint8 for v in views)


def test_grey_images_stay_grey_and_the_input_as_it_is():
    image = load(DataConfig(size=16)).train.images[3]
    before = image.clone()
    for view in VIEWS:
        for seed in range(50):
            (shown,) = view(image[None], torch.tensor([0]), seed)
            assert torch.equal(shown[0], shown[1])
            assert torch.equal(shown[1], shown[2])
    assert torch.equal(image, before)


def test_the_library_is_imported_by_the_first_view_only_and_asks_no_network():
    lines = """
import os, sys, socket
import common.data, torch
from common.data.augmentation import Augmentation
assert "albumentations" not in sys.modules
def refuse(*_, **__):
    raise AssertionError("a connection")
socket.socket.connect = refuse
Augmentation("weak", 16)(torch.zeros(3, 16, 16, dtype=torch.uint8), 0)
assert "albumentations" in sys.modules
"""
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", lines], check=True, env=environment)


def moved(strength: Literal["zoom", "affine"], count: int = 150) -> Tensor:
    """Return for each view how it maps positions: scale x and y, degrees, shifts in shares of the side, and shear."""
    size, found = 64, []
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = torch.stack([rows * 4, columns * 4, torch.zeros(size, size)]).to(torch.uint8)
    middle = slice(22, 42)
    at = torch.stack([columns[middle, middle].flatten(), rows[middle, middle].flatten(), torch.ones(400)], 1).double()
    for seed in range(count):
        view = Augmentation(strength, size)(image, seed)[:, middle, middle].double() / 4
        solved = torch.linalg.lstsq(at, torch.stack([view[1].flatten(), view[0].flatten()], 1)).solution  # (3, 2)
        forth = torch.linalg.inv(solved[:2].T)
        centre = forth @ (torch.full((2,), 31.5).double() - solved[2]) - 31.5
        degrees = torch.rad2deg(torch.atan2(forth[1, 0], forth[0, 0]))
        shear = forth.prod(1).sum() / forth.norm(dim=0).prod()  # cosine between the images of rows and columns
        found.append(torch.cat([forth.norm(dim=0), degrees[None], centre / size, shear[None]]))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("strength", "scale", "degrees", "shift"), [("zoom", 0.2, 7.2, 0.0), ("affine", 0.1, 30.0, 0.1)]
)
def test_classifiers_views_move_images_as_far_as_they_say(strength, scale, degrees, shift):
    found = moved(strength)
    for side in (0, 1):
        assert 0.9 * scale < (found[:, side] - 1).abs().max() < 1.1 * scale
        assert (found[:, side] < 1).any()
        assert (found[:, side] > 1).any()
    assert (found[:, 0] - found[:, 1]).abs().max() > 0.8 * scale  # drawn apart
    turned = found[:, 2]
    assert 0.9 * degrees < turned.abs().max() < 1.25 * degrees + 0.5
    assert turned.min() < -0.8 * degrees
    assert turned.max() > 0.8 * degrees
    assert found[:, 3:5].abs().max() < shift + 0.02
    if shift:
        assert (found[:, 3:5].abs().amax(0) > 0.8 * shift).all()
    assert found[:, 5].abs().max() < 0.005  # of 0.1 degrees it is 0.0017, of a shear by a tenth 0.1
