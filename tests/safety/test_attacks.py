"""Attacks against Pillow, scipy and what they are defined to do."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from lowdim_diffusion.safety import attacks

KEY = jax.random.key(0)


def pictures(channels, height=16, width=24, count=2):
    """Smooth pictures with a little noise, as uint8."""
    i, j = np.mgrid[:height, :width]
    k = np.arange(count * channels).reshape(count, 1, 1, channels)
    waves = np.sin(0.31 * i[None, ..., None] + k) + np.cos(0.23 * j[None, ..., None] * (1 + k / 3))
    grain = np.random.default_rng(0).normal(size=waves.shape)  # else many roundings are ties
    return np.clip(np.rint(127.5 + 60 * waves + 4 * grain), 0, 255).astype(np.uint8)


def floats(x):
    return jnp.asarray(x.astype(np.float32) / 127.5 - 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [10, 25, 90])
def test_jpeg_is_pillows(channels, quality):
    x = pictures(channels, 19, 24)
    expected = []
    for picture in x:
        stream = io.BytesIO()
        Image.fromarray(picture[..., 0] if channels == 1 else picture).save(
            stream, "JPEG", quality=quality
        )
        expected.append(np.asarray(Image.open(stream)).reshape(picture.shape).astype(float))
    found = (np.asarray(attacks.jpeg(KEY, floats(x), quality)) + 1) * 127.5
    away = np.abs(found - np.stack(expected)).mean()
    mine, pillows = (np.abs(y - x).mean() for y in (found, np.stack(expected)))
    # A coefficient of colour that is rounded to the other side shows in 16 x 16 pixels.
    assert away < (0.5 if channels == 1 else 2) and away < mine / 2
    assert mine == pytest.approx(pillows, rel=0.03)


def test_median_and_blur_are_scipys():
    x = floats(pictures(2))
    found = attacks.median(KEY, x, 3)
    expected = scipy.ndimage.median_filter(x, (1, 3, 3, 1), mode="nearest")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    found = attacks.blur(KEY, x, 1.5)
    half = 5  # ceil(3 std)
    expected = scipy.ndimage.gaussian_filter(x, (0, 1.5, 1.5, 0), mode="nearest", radius=half)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_resize_is_pillows():
    x = pictures(1, 16, 16, count=1)
    small = Image.fromarray(np.asarray(floats(x))[0, ..., 0]).resize(
        (8, 8), Image.Resampling.BILINEAR
    )
    expected = np.asarray(small.resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(attacks.resize(KEY, floats(x), 0.5)[0, ..., 0], expected, atol=1e-5)


def test_noise_has_its_strength():
    x = jnp.zeros((4, 32, 32, 3))
    assert float(np.std(attacks.noise(KEY, x, 0.2))) == pytest.approx(0.2, rel=0.03)


def test_drop_erases_a_window_of_each_side():
    x = jnp.zeros((50, 10, 20, 2))
    found = np.asarray(attacks.drop(KEY, x, 0.4))
    gone = found == -1
    assert np.all(gone.sum((1, 2, 3)) == 4 * 8 * 2) and np.all(found[~gone] == 0)
    assert np.all(gone.any((2, 3)).sum(1) == 4)  # rows; a window, not scattered pixels
    assert len({row.tobytes() for row in gone}) > 20


def test_crop_takes_a_window():
    ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None, None], (40, 8, 8, 1))
    found = np.asarray(attacks.crop(KEY, ramp, 0.5))
    first, last = found[:, 0, 0, 0], found[:, -1, 0, 0]
    np.testing.assert_allclose(last - first, 3, atol=1e-5)  # four rows, brought to eight
    assert set(first.round(3)) == {0, 1, 2, 3, 4}


def test_brightness_and_colour_scale_the_distance_from_black():
    x = jnp.full((200, 2, 2, 3), -0.8)
    for attack in (attacks.brightness, attacks.colour):
        factor = (np.asarray(attack(KEY, x, 0.5)) + 1) / 0.2
        assert 0.5 <= factor.min() < 0.55 and 1.45 < factor.max() <= 1.5
        assert np.all(factor == factor[:, :1, :1])
        alike = np.all(factor == factor[..., :1])
        assert alike == (attack is attacks.brightness)
    assert float(np.max(attacks.brightness(KEY, 1 + 0 * x, 6.0))) == 1


NOTHING = {
    attacks.noise: 0.0,
    attacks.blur: 0.0,
    attacks.crop: 1.0,
    attacks.resize: 1.0,
    attacks.brightness: 0.0,
    attacks.colour: 0.0,
    attacks.drop: 0.0,
    attacks.median: 1,
}


@pytest.mark.parametrize("attack", NOTHING, ids=lambda a: a.__name__)
def test_an_attack_can_do_nothing_and_works_under_jit(attack):
    x = floats(pictures(3, 8, 8))
    run = jax.jit(functools.partial(attack, strength=NOTHING[attack]))
    np.testing.assert_allclose(run(KEY, x), x, atol=1e-6)


@pytest.mark.parametrize(
    ("attack", "strength", "said"),
    [
        (attacks.noise, -0.1, "strength out of range"),
        (attacks.jpeg, 0, "at least 1, got 0"),
        (attacks.jpeg, 101, r"\[1, 100\], got 101"),
        (attacks.crop, 0.0, "strength out of range"),
        (attacks.resize, 1.5, "strength out of range"),
        (attacks.drop, 1.1, "strength out of range"),
        (attacks.median, 4, "an odd number, got 4"),
    ],
)
def test_strengths_without_meaning_are_refused(attack, strength, said):
    with pytest.raises(ValueError, match=said):
        attack(KEY, jnp.zeros((1, 8, 8, 1)), strength)
