"""Augmentations: random in what they say they change, and in nothing else."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from clip.training import augment
from clip.training.augment import AUGMENTS, ArtworkAugment, RandomSquareCrop, StrongAugment

R = 24
GREY = (127, 127, 127)


def noise(width, height, seed=0):
    """A picture in which no two pixels are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(width, height):
    """A picture whose red grows to the right and whose green grows downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, width)
    pixels[:, :, 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def disc(ground="white", color=(200, 30, 30), size=72):
    """A disc with a hole that shows the ground's color."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    radius = np.hypot(x, y)
    image = Image.new("RGB", (size, size), ground)
    image.paste(color, mask=Image.fromarray(((radius < size / 3) & (radius > size / 8)).astype(np.uint8) * 255))
    return image


def array(image):
    return np.asarray(image).astype(int)


# What all have in common


@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("size", [(72, 72), (31, 90), (90, 31), (5, 5), (1, 40)])
def test_each_gives_a_square_of_any_picture_that_preprocessing_only_normalises(name, size):
    for seed in range(20):
        image = AUGMENTS[name](R)(noise(*size), random.Random(seed))
        assert (image.mode, image.size) == ("RGB", (R, R))
        mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
        pixels = ((Preprocess(R)(image) * std + mean) * 255).permute(1, 2, 0)
        np.testing.assert_allclose(pixels, array(image), atol=1e-3)


@pytest.mark.parametrize("name", AUGMENTS)
def test_each_is_a_function_of_picture_and_generator_alone(name):
    image = noise(40, 30)
    before, state = image.tobytes(), (random.getstate(), torch.get_rng_state())
    for seed in range(20):
        one, other = (AUGMENTS[name](R)(image, random.Random(seed)).tobytes() for _ in range(2))
        assert one == other
    assert image.tobytes() == before
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize("name", AUGMENTS)
def test_each_gives_another_picture_each_time(name):
    rng = random.Random(0)
    assert len({AUGMENTS[name](R)(noise(40, 30), rng).tobytes() for _ in range(20)}) == 20


# The paper's


def test_a_crop_of_everything_is_the_released_preprocessing():
    everything = RandomSquareCrop(R, scale=(1.0, 1.0))(noise(40, 40), random.Random(0))
    assert torch.equal(Preprocess(R)(everything), Preprocess(R)(noise(40, 40)))


@settings(max_examples=60, deadline=None)
@given(st.integers(30, 90), st.integers(30, 90), st.floats(0.2, 1), st.integers(0, 10**6))
def test_a_crop_is_a_square_of_the_picture_with_the_area_asked_for(width, height, scale, seed):
    """Red and green say from which column and row a pixel comes."""
    pixels = array(RandomSquareCrop(R, (scale, scale))(smooth(width, height), random.Random(seed)))
    across = (pixels[R // 2, -1, 0] - pixels[R // 2, 0, 0]) / 255 * (width - 1)  # pixels of the source
    down = (pixels[-1, R // 2, 1] - pixels[0, R // 2, 1]) / 255 * (height - 1)
    side = scale**0.5 * min(width, height)
    tolerance = 2.5 + 0.02 * max(width, height)  # levels are rounded, borders are smoothed
    assert across == pytest.approx(side * (R - 1) / R, abs=tolerance)
    assert down == pytest.approx(side * (R - 1) / R, abs=tolerance)


def test_crops_reach_every_part_of_a_long_picture():
    rng = random.Random(0)
    middles = [array(RandomSquareCrop(R)(smooth(120, 30), rng))[R // 2, R // 2, 0] / 255 for _ in range(200)]
    assert min(middles) < 0.17
    assert max(middles) > 0.83
    assert np.mean(middles) == pytest.approx(0.5, abs=0.06)


def test_areas_that_do_not_fit_are_refused():
    for scale in ((0.0, 1.0), (0.5, 1.5), (0.9, 0.8)):
        with pytest.raises(ValueError, match="expected 0 < least"):
            RandomSquareCrop(R, scale)


# The Italian CLIP's


def test_a_mirror_comes_half_of_the_time_and_never_if_it_is_not_wanted():
    """The red of the right half is above the left's, unless mirrored: no other step exchanges the sides."""

    def mirrored(image):
        pixels = array(image)
        return pixels[8:16, 4:10, 0].mean() > pixels[8:16, 14:20, 0].mean()

    picture = Image.fromarray(np.repeat(array(smooth(R, R))[:, :, :1], 3, axis=2).astype(np.uint8))
    count = sum(mirrored(StrongAugment(R)(picture, random.Random(seed))) for seed in range(200))
    assert 75 <= count <= 125
    for name in (StrongAugment(R, flip=False), ArtworkAugment(R)):
        assert not any(mirrored(name(picture, random.Random(seed))) for seed in range(100))


def test_what_lies_outside_the_picture_is_grey():
    white, seen = Image.new("RGB", (R, R), "white"), set()
    for seed in range(60):
        pixels = array(StrongAugment(R)(white, random.Random(seed)))
        seen |= set(map(tuple, pixels.reshape(-1, 3)))
    assert {(255, 255, 255), GREY} <= seen
    assert all(red == green == blue for red, green, blue in seen)


def test_each_last_step_comes_with_its_probability(monkeypatch):
    called = []
    monkeypatch.setattr(augment, "_perspective", lambda image, *_: called.append("perspective") or image)
    for name in ("autocontrast", "equalize"):
        monkeypatch.setattr(augment.ImageOps, name, lambda image, name=name: called.append(name) or image)
    for seed in range(500):
        StrongAugment(8)(Image.new("RGB", (8, 8)), random.Random(seed))
    for name in ("perspective", "autocontrast", "equalize"):
        assert 115 <= called.count(name) <= 185  # 150 in the mean, standard deviation 10


# Artwork


def test_artwork_stands_on_more_of_its_own_ground():
    rng = random.Random(0)
    grounds = 0
    for _ in range(50):
        image = ArtworkAugment(R)._drawn_elsewhere(disc("navy"), (0, 0, 128), rng)
        assert image.size == (R, R)
        corners = {image.getpixel(corner) for corner in ((0, 0), (R - 1, 0), (0, R - 1), (R - 1, R - 1))}
        grounds += corners == {(0, 0, 128)}
    assert grounds == 50


def test_artwork_keeps_its_colour_nine_times_in_ten():
    """The disc's middle may be moved, but red stays the strongest channel somewhere in the picture, or all is grey."""
    grey = 0
    for seed in range(200):
        image = ArtworkAugment(R)._drawn_otherwise(disc().resize((R, R)), random.Random(seed))
        pixels = array(image)
        grey += np.ptp(pixels, axis=2).max() == 0
        redness = (pixels[:, :, 0] - pixels[:, :, 1:].max(axis=2)).max()
        assert redness > 40 or np.ptp(pixels, axis=2).max() == 0
    assert 8 <= grey <= 35


def test_a_new_ground_leaves_the_figure_and_what_it_encloses():
    before, after = array(disc()), array(augment._recolor_ground(disc(), (10, 200, 90)))
    assert (after[0] == (10, 200, 90)).all()
    assert (after[:, 0] == (10, 200, 90)).all()
    figure = (before == (200, 30, 30)).all(axis=2)
    assert (after[figure] == before[figure]).all()
    assert tuple(after[36, 36]) == (255, 255, 255)  # the hole
    outside = ~figure & (np.hypot(*(np.mgrid[:72, :72] - 35.5)) > 20)
    assert (after[outside] == (10, 200, 90)).mean() > 0.95  # all but what is hidden from every side


def test_the_ground_is_reached_from_each_side():
    image = Image.new("RGB", (20, 20), "white")
    image.paste((200, 30, 30), (4, 4, 16, 20))
    image.paste("white", (8, 8, 12, 20))  # a bay that is open to the bottom
    for quarters in range(4):
        turned = image.rotate(90 * quarters)
        after = augment._recolor_ground(turned, (0, 0, 255)).rotate(-90 * quarters)
        assert after.getpixel((10, 10)) == (0, 0, 255)


def test_a_soft_edge_takes_the_new_ground_in_part():
    soft = disc(color=(0, 0, 0), size=288).resize((72, 72), Image.Resampling.BOX)
    row = array(augment._recolor_ground(soft, (0, 0, 255)))[36]
    red = row[: 72 // 2, 0]
    assert red.max() == 255  # the hole, again
    edge = row[8:16]
    assert (edge[:, 2] >= edge[:, 0]).all()  # nowhere lighter than the ground on the way in


# The variations one by one


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 1))
def test_a_hue_shift_leaves_grey_and_lightness_alone(turn):
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    assert augment._shift_hue(ramp, turn).tobytes() == ramp.tobytes()
    picture = noise(20, 20)
    shifted = augment._shift_hue(picture, turn)
    assert np.abs(array(shifted).max(axis=2) - array(picture).max(axis=2)).max() <= 1  # HSV's value


def test_a_third_of_the_circle_turns_red_to_green_to_blue():
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    green = array(augment._shift_hue(red, 1 / 3))[0, 0]
    blue = array(augment._shift_hue(red, -1 / 3))[0, 0]
    np.testing.assert_allclose(green, (0, 255, 0), atol=6)
    np.testing.assert_allclose(blue, (0, 0, 255), atol=6)


def test_adjusting_by_nothing_changes_nothing_and_by_no_saturation_gives_grey():
    picture = noise(20, 20)
    assert augment._adjust(picture, 1, 1, 0).tobytes() == picture.tobytes()
    grey = array(augment._adjust(picture, 0, 1, 0))
    assert np.ptp(grey, axis=2).max() == 0
    assert np.abs(grey[:, :, 0] - array(picture.convert("L"))).max() <= 1
    np.testing.assert_array_equal(array(augment._adjust(picture, 1, 1, 20)), (array(picture) + 20).clip(0, 255))
    flat = array(augment._adjust(picture, 1, 0.5, 0))
    assert np.abs(flat - (127.5 + (array(picture) - 127.5) / 2)).max() <= 1


def affine(image, degrees=0.0, shift=(0.0, 0.0), scale=1.0, shear=0.0):
    return augment._affine(image, degrees, shift, scale, shear, GREY)


def test_an_affine_map_without_parameters_leaves_the_picture():
    assert affine(noise(20, 14)).tobytes() == noise(20, 14).tobytes()


def test_quarter_turns_and_whole_shifts_move_pixels_as_they_are():
    picture = noise(20, 20)
    turned = array(affine(picture, degrees=90))
    assert np.abs(turned - array(picture.transpose(Image.Transpose.ROTATE_270))).max() <= 1
    moved = array(affine(picture, shift=(0.25, -0.1)))
    np.testing.assert_array_equal(moved[:-2, 5:], array(picture)[2:, :-5])
    assert (moved[-2:] == GREY).all()
    assert (moved[:, :5] == GREY).all()


def test_scale_keeps_the_middle_and_shear_moves_rows_against_each_other():
    picture = smooth(40, 40)
    half = array(affine(picture, scale=0.5))
    assert (half[:9] == GREY).all()
    np.testing.assert_allclose(half[20, 12:28, 0], array(picture)[20, 4:36:2, 0], atol=8)
    slanted = array(affine(picture, shear=45))
    np.testing.assert_allclose(slanted[30, 15:35, 0] - slanted[20, 15:35, 0], -65, atol=3)  # 10 columns of 6.54


def test_a_perspective_without_distortion_leaves_the_picture_and_with_it_moves_corners_inwards():
    picture = noise(30, 30)
    assert augment._perspective(picture, 0.0, GREY, random.Random(0)).tobytes() == picture.tobytes()
    white = Image.new("RGB", (40, 40), "white")
    for seed in range(20):
        seen = array(augment._perspective(white, 0.6, GREY, random.Random(seed)))
        assert (seen[14:26, 14:26] == 255).all()  # corners move by at most 0.3 of a side
        assert (seen[0, 0] == GREY).all()


def test_an_outline_darkens_edges_only():
    before, after = array(disc()), array(augment._outlined(disc()))
    assert (after <= before).all()
    np.testing.assert_array_equal(after[:10], before[:10])
    ring = np.abs(np.hypot(*(np.mgrid[:72, :72] - 35.5)) - 24) < 1
    assert after[ring].mean() < before[ring].mean() - 40


def test_the_ground_is_what_most_corners_show():
    image = disc("navy")
    assert augment._border_color(image) == (0, 0, 128)
    image.putpixel((0, 0), (255, 0, 0))
    assert augment._border_color(image) == (0, 0, 128)


def test_the_names_of_the_command_line_are_all_here():
    assert list(AUGMENTS) == ["crop", "strong", "artwork"]
