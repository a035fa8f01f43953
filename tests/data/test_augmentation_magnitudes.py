"""How strong each operation of the strong view is at 32 pixels, read off images that show it."""

import math
import random
from typing import Any

import numpy as np
import pytest

from common.data.augmentation import Augmentation, _pipeline

SIZE, DRAWS = 32, 200
RAMP = np.repeat(np.arange(SIZE, dtype=np.uint8)[None, :, None] * 8, SIZE, 0).repeat(3, 2)
"""Brighter by 8 from column to column."""
ROTATE, SHEAR_X, SHEAR_Y, MOVE_X, MOVE_Y, INVERT, SOLARIZE, POSTERIZE, BRIGHT, CONTRAST, COLOUR, AUTO, NOTHING = range(
    13
)


def drawn(number: int, image: np.ndarray) -> list[np.ndarray]:
    """Apply one of the thirteen operations, many times."""
    some: Any = next(step for step in _pipeline(Augmentation("strong", SIZE)).transforms if hasattr(step, "n"))
    assert (some.n, len(some.transforms)) == (2, 13)
    operation, results = some.transforms[number], []
    for seed in range(DRAWS):
        operation.set_random_state(np.random.default_rng(seed), random.Random(seed))
        results.append(operation(image=image.copy())["image"].astype(float))
    return results


def slopes(image: np.ndarray) -> tuple[float, float]:
    """Return by how much the middle becomes brighter from column to column and from row to row."""
    middle = image[12:20, 12:20, 0]
    return float(np.diff(middle, axis=1).mean()), float(np.diff(middle, axis=0).mean())


def assert_range(values: list[float], low: float, high: float, slack: float) -> None:
    """Assert that values lie between two, up to the error of measuring them, and come near both."""
    assert low - slack <= min(values) <= low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) <= max(values) <= high + slack
    assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.1 * (high - low))  # evenly


def test_it_turns_by_up_to_15_degrees():
    found = [slopes(image) for image in drawn(ROTATE, RAMP)]
    assert_range([math.degrees(math.atan2(down, right)) for right, down in found], -15, 15, 0.5)
    assert all(math.hypot(*both) == pytest.approx(8, rel=0.02) for both in found)  # neither larger nor smaller


def test_it_shears_by_up_to_15_hundredths():
    assert_range([down / right for right, down in map(slopes, drawn(SHEAR_X, RAMP))], -0.15, 0.15, 0.005)
    turned = RAMP.transpose(1, 0, 2)
    assert_range([right / down for right, down in map(slopes, drawn(SHEAR_Y, turned))], -0.15, 0.15, 0.005)
    assert all(abs(slopes(image)[1]) < 0.1 for image in drawn(SHEAR_Y, RAMP))  # along its columns nothing changes


@pytest.mark.parametrize(("number", "image"), [(MOVE_X, RAMP), (MOVE_Y, RAMP.transpose(1, 0, 2))])
def test_it_moves_by_up_to_a_tenth_of_the_side(number, image):
    before = image[8:24, 8:24].mean()
    assert_range([(moved[8:24, 8:24].mean() - before) / 8 for moved in drawn(number, image)], -3.2, 3.2, 0.55)
    other = RAMP if number == MOVE_Y else RAMP.transpose(1, 0, 2)
    assert all(np.array_equal(moved, other) for moved in drawn(number, other))


def test_it_inverts():
    assert all(np.array_equal(image, 255.0 - RAMP) for image in drawn(INVERT, RAMP))


def test_it_solarizes_from_any_threshold_on():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    thresholds = []
    for image in drawn(SOLARIZE, np.stack([every] * 3, -1)):
        kept = int((image[..., 0] == every).sum())
        assert np.array_equal(image[..., 0], np.where(every < kept, every, 255.0 - every))
        thresholds.append(kept)
    assert_range([float(t) for t in thresholds], 0, 255, 1)


def test_it_posterizes_to_4_to_8_bits():
    every = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, -1)
    kinds = {len(np.unique(image)): image[..., 0].ravel() for image in drawn(POSTERIZE, every)}
    assert set(kinds) == {2**bits for bits in range(4, 9)}
    for count, values in kinds.items():
        assert np.array_equal(values, np.arange(256) // (256 // count) * (256 // count))


def test_brightness_contrast_and_colour():
    flat = np.full((SIZE, SIZE, 3), 100, np.uint8)
    assert_range([image.mean() / 100 for image in drawn(BRIGHT, flat)], 0.4, 1.6, 0.01)
    two = np.where(np.arange(SIZE)[None, :, None] < SIZE // 2, 96, 160).repeat(SIZE, 0).repeat(3, 2).astype(np.uint8)
    found = drawn(CONTRAST, two)
    assert_range([(image[0, -1, 0] - image[0, 0, 0]) / 64 for image in found], 0.4, 1.6, 0.02)
    assert all(image.mean() == pytest.approx(128, abs=1) for image in found)
    red = flat + np.array([20, 0, 0], np.uint8)
    found = drawn(COLOUR, red)
    assert_range([(image[..., 0] - image[..., 1]).mean() / 20 for image in found], 0.1, 1.9, 0.06)
    grey = [image @ (0.299, 0.587, 0.114) for image in found]
    assert all(g.mean() == pytest.approx(100 + 0.299 * 20, abs=1) for g in grey)


def test_autocontrast_uses_the_whole_range_and_nothing_changes_nothing():
    dull = (RAMP // 4 + 60).astype(np.uint8)
    for image in drawn(AUTO, dull):
        assert (image.min(), image.max()) == (0, 255)
        assert np.all(np.diff(image[0, :, 0]) >= 0)
    assert all(np.array_equal(image, RAMP) for image in drawn(NOTHING, RAMP))
