"""PNG files read back by Pillow, and grids checked pixel by pixel."""

import io

import numpy as np
import PIL.Image
import pytest

from lowdim_diffusion import reporting


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (4, 9, 1), (6, 3, 3), (300, 2, 3)])
def test_png_reads_back_exactly(shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = PIL.Image.open(io.BytesIO(reporting.png(picture)))
    image.verify()
    image = PIL.Image.open(io.BytesIO(reporting.png(picture)))
    assert image.mode == ("RGB" if shape[-1] == 3 and len(shape) == 3 else "L")
    np.testing.assert_array_equal(np.asarray(image).reshape(shape), picture)


def test_png_refuses_what_is_not_a_picture():
    for bad in (np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros(3, np.uint8)):
        with pytest.raises(ValueError, match=r"png: not a picture: expected uint8"):
            reporting.png(bad)


def test_floats_become_bytes():
    x = np.array([-1.0, 0.0, 1.0, 7.0, -9.0, np.nan]).reshape(1, 2, 3, 1)
    assert reporting.as_pictures(x).ravel().tolist() == [0, 128, 255, 255, 0, 0]
    kept = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    np.testing.assert_array_equal(reporting.as_pictures(kept)[..., 0], kept)
    assert reporting.as_pictures(np.array([[-4.0, 0.0, 2.0]])).ravel().tolist() == [0, 128, 191]
    with pytest.raises(ValueError, match=r"shape: expected \[N, h, w, 1 or 3\]"):
        reporting.as_pictures(np.zeros((2, 4, 4, 5)))


def test_grid_places_every_picture():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (5, 4, 6, 3), dtype=np.uint8)
    sheet = reporting.image_grid(x, columns=3, side=12, gap=2)
    assert sheet.shape == (2 * 10 + 2, 3 * 14 + 2, 3) and sheet.dtype == np.uint8
    for i, picture in enumerate(x):
        row, column = divmod(i, 3)
        cell = sheet[2 + 10 * row :, 2 + 14 * column :][:8, :12]
        np.testing.assert_array_equal(cell, np.kron(picture, np.ones((2, 2, 1), np.uint8)))
    assert (sheet[12:, 30:] == 255).all()  # the missing sixth
    assert reporting.image_grid(x[:1], side=1).shape == (8, 10, 3)
    with pytest.raises(ValueError, match="no pictures"):
        reporting.image_grid(x[:0])


def test_vectors_become_strips():
    sheet = reporting.image_grid(np.eye(3, 48), columns=1, gap=1)
    assert sheet.shape == (3 * 9 + 1, 50, 1)
