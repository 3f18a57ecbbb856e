"""Masks mark the pixels that were asked for, and say what is wrong with those that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from lowdim_diffusion import data
from lowdim_diffusion.editing import check_mask, masks

RNG = np.random.default_rng(0)
SHAPE = (6, 8, 3)


def drawn():
    """A region that is neither a box nor symmetric."""
    inside = np.zeros(SHAPE[:2], bool)
    inside[1:4, 2] = inside[3, 2:7] = inside[5, 0] = True
    return inside


def save(path, array, mode=None):
    PIL.Image.fromarray(array, mode).save(path)
    return path


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[:2], (*SHAPE[:2], 1)])
@pytest.mark.parametrize("kind", [bool, np.uint8, np.float32, "jax", "list"])
def test_check_mask_brings_every_form_to_the_data_shape(shape, kind):
    inside = drawn() if len(shape) == 2 else np.broadcast_to(drawn()[..., None], shape)
    if kind == "jax":
        given = jnp.asarray(inside)
    else:
        given = inside.tolist() if kind == "list" else inside.astype(kind)
    found = check_mask("here", given, SHAPE)
    assert isinstance(found, np.ndarray) and found.dtype == bool and found.shape == SHAPE
    assert found.flags.owndata
    for channel in range(3):
        np.testing.assert_array_equal(found[..., channel], drawn())


def test_check_mask_keeps_channels_apart_and_takes_vectors():
    inside = np.zeros(SHAPE, bool)
    inside[2, 3, 1] = True
    np.testing.assert_array_equal(check_mask("here", inside, SHAPE), inside)
    vector = np.arange(64) < 16
    np.testing.assert_array_equal(check_mask("here", vector, (64,)), vector)
    assert check_mask("here", np.ones((2, 3)), (2, 3)).all()  # full is the caller's business


def test_check_mask_under_jit_keeps_what_is_known():
    inside = drawn()

    def closed_over(x):
        mask = check_mask("here", inside, x.shape)
        assert isinstance(mask, np.ndarray) and not mask.all()  # known while tracing
        return jnp.where(mask, x, 0)

    x = jnp.ones(SHAPE)
    np.testing.assert_array_equal(jax.jit(closed_over)(x)[..., 2], inside)
    traced = jax.jit(lambda m: check_mask("here", m, SHAPE))
    for m in (
        inside,
        inside[..., None].astype(np.int32),
        np.broadcast_to(inside[..., None], SHAPE),
    ):
        np.testing.assert_array_equal(traced(m), check_mask("here", m, SHAPE))
    assert not traced(np.zeros(SHAPE[:2])).any()  # values cannot raise inside jit
    many = np.stack([inside, ~inside])
    found = jax.vmap(lambda m: check_mask("here", m, SHAPE))(many)
    np.testing.assert_array_equal(found[..., 1], many)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros((6, 8)), ValueError, "here: mask has no pixel inside"),
        (np.ones((8, 6)), ValueError, r"here: wrong shape of the mask: expected \(6, 8, 3\) or"),
        (np.ones((6, 8, 2)), ValueError, "wrong shape of the mask"),
        (np.ones((1, 6, 8, 3)), ValueError, "wrong shape of the mask"),
        (
            np.full((6, 8), 255),
            ValueError,
            r"other numbers: expected booleans, or 0 and 1, got 255",
        ),
        (np.full((6, 8), 0.5), ValueError, "other numbers"),
        (np.full((6, 8), np.nan), ValueError, "other numbers"),
        (np.full((6, 8), "a"), TypeError, "mask must hold booleans"),
    ],
)
def test_check_mask_refuses(mask, error, message):
    with pytest.raises(error, match=message):
        check_mask("here", mask, SHAPE)


def test_box_covers_its_pixels():
    mask = masks.box(SHAPE, 1, 2, 3, 4)
    rows, columns, channels = np.nonzero(mask)
    assert (set(rows), set(columns), set(channels)) == ({1, 2, 3}, {2, 3, 4, 5}, {0, 1, 2})
    assert mask.sum() == 3 * 4 * 3 and mask.shape == SHAPE and mask.dtype == bool
    assert masks.box(SHAPE, 0, 0, 6, 8).all()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 0, 0, 1), "height too small: expected at least 1, got 0; an empty box"),
        ((0, 0, 1, -2), "width too small"),
        ((-1, 0, 2, 2), "top too small"),
        ((4, 0, 3, 2), "rows outside the picture: expected at most 6, got up to 7"),
        ((0, 7, 1, 2), "columns outside the picture: expected at most 8, got up to 9"),
    ],
)
def test_box_refuses(numbers, message):
    with pytest.raises(ValueError, match=message):
        masks.box(SHAPE, *numbers)


@pytest.mark.usefixtures("unchecked")
def test_box_takes_no_fractions_and_pictures_only():
    with pytest.raises(TypeError, match="box: top must be an int, got float"):
        masks.box(SHAPE, 0.5, 0, 1, 1)
    with pytest.raises(ValueError, match=r"not the shape of a picture: expected \(h, w, c\)"):
        masks.box((64,), 0, 0, 1, 1)


def test_segmentation_by_label():
    labels = RNG.integers(-2, 3, SHAPE[:2])
    labels[0, :5] = [-2, -1, 0, 1, 2]
    one = masks.from_segmentation(labels, 2, SHAPE)
    several = masks.from_segmentation(labels[..., None], [-2, np.int64(1)], SHAPE)
    for i, j in np.ndindex(SHAPE[:2]):
        assert one[i, j].tolist() == [labels[i, j] == 2] * 3
        assert several[i, j].tolist() == [labels[i, j] in (-2, 1)] * 3
    assert masks.from_segmentation(labels, np.unique(labels), SHAPE).all()


def test_segmentation_refuses():
    labels = np.array([[0, 4], [4, 9]])
    with pytest.raises(ValueError, match="label does not occur: expected one of 0, 4, 9, got 5"):
        masks.from_segmentation(labels, [4, 5], (2, 2, 1))
    with pytest.raises(ValueError, match=r"expected 3x2 \(rows x columns\), got 2x2"):
        masks.from_segmentation(labels, 4, (3, 2, 1))
    with pytest.raises(ValueError, match="no label wanted"):
        masks.from_segmentation(labels, np.zeros(0, int), (2, 2, 1))
    with pytest.raises(TypeError, match="labels must be integers, got float64"):
        masks.from_segmentation(labels / 1.0, 4, (2, 2, 1))
    with pytest.raises(ValueError, match=r"one of 0, 1, .*, 29, \.\.\., got 99"):
        masks.from_segmentation(np.arange(64).reshape(8, 8), 99, (8, 8, 1))


def test_pictures_of_every_kind_give_the_same_mask(tmp_path):
    inside = drawn()
    byte = np.where(inside, 255, 0).astype(np.uint8)
    red = np.where(inside[..., None], np.uint8([200, 0, 0]), np.uint8([60, 100, 127]))
    alpha = np.where(inside, 255, 0).astype(np.uint8)
    white = np.full((*inside.shape, 3), 255, np.uint8)
    palette = PIL.Image.fromarray(inside.astype(np.uint8))
    palette = palette.convert("P")
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    PIL.Image.fromarray(inside).save(tmp_path / "one_bit.png")
    files = [
        save(tmp_path / "gray.png", byte),
        save(tmp_path / "zero_one.png", inside.astype(np.uint8)),
        save(tmp_path / "sixteen.png", np.where(inside, 40000, 300).astype(np.uint16)),
        save(tmp_path / "red.png", red),
        save(tmp_path / "opaque.png", np.dstack([byte, byte, byte, np.full_like(byte, 255)])),
        save(tmp_path / "see_through.png", np.dstack([white, alpha])),
        save(tmp_path / "gray_alpha.png", np.dstack([np.full_like(byte, 255), alpha])),
        save(tmp_path / "a.bmp", byte),
        tmp_path / "palette.png",
        tmp_path / "one_bit.png",
    ]
    for file in files:
        found = masks.from_file(file, SHAPE)
        np.testing.assert_array_equal(found, np.broadcast_to(inside[..., None], SHAPE), str(file))


def test_half_is_outside_and_noise_of_compression_does_not_matter(tmp_path):
    path = save(tmp_path / "half.png", np.array([[127, 128], [0, 255]], np.uint8))
    assert masks.from_file(path, (2, 2, 1))[..., 0].tolist() == [[False, True], [False, True]]
    large = drawn().repeat(8, 0).repeat(8, 1)
    path = save(tmp_path / "a.jpg", np.where(large, 255, 0).astype(np.uint8))
    found = masks.from_file(path, (48, 64, 1))[..., 0]
    assert (found != large).mean() < 0.02


def test_npy_files(tmp_path):
    inside = drawn()
    for i, array in enumerate(
        [inside, inside[..., None], 3 * inside.astype(int), 0.2 + 0.7 * inside, inside * 1.0]
    ):
        np.save(tmp_path / f"{i}.npy", array)
        found = masks.from_file(tmp_path / f"{i}.npy", SHAPE)
        np.testing.assert_array_equal(found, np.broadcast_to(inside[..., None], SHAPE))
    channels = RNG.random(SHAPE) < 0.5
    np.save(tmp_path / "c.npy", channels)
    np.testing.assert_array_equal(masks.from_file(tmp_path / "c.npy", SHAPE), channels)


@pytest.mark.parametrize("size", [(12, 16), (3, 4), (7, 5), (48, 9)])
def test_resize_is_pillows_nearest_neighbour(tmp_path, size):
    source = RNG.random(size) < 0.5
    source[0, 0], source[-1, -1] = True, False
    path = save(tmp_path / "m.png", np.where(source, 255, 0).astype(np.uint8))
    found = masks.from_file(path, SHAPE, resize=True)[..., 0]
    image = PIL.Image.open(path).resize((8, 6), PIL.Image.Resampling.NEAREST)
    np.testing.assert_array_equal(found, np.asarray(image) > 127)
    with pytest.raises(ValueError, match=rf"expected 6x8 .* got {size[0]}x{size[1]} .*resize=True"):
        masks.from_file(path, SHAPE)


def test_files_that_are_no_masks(tmp_path):
    def refused(path, message, **kwargs):
        with pytest.raises(data.DataError, match=message) as caught:
            masks.from_file(path, SHAPE, **kwargs)
        assert str(path.name) in str(caught.value) and "\n" not in str(caught.value)

    refused(tmp_path / "absent.png", "no such file")
    refused(tmp_path, "no such file")
    empty = np.zeros((6, 8), np.uint8)
    refused(save(tmp_path / "e.png", empty), "no pixel inside.*for labels use from_segmentation")
    labels = RNG.integers(0, 6, (6, 8)).astype(np.uint8)
    refused(save(tmp_path / "labels.png", labels), "no pixel inside")
    refused(save(tmp_path / "f.png", empty + 255), "every pixel inside")
    black_ink = np.dstack([empty, empty, empty, np.where(drawn(), 255, 0).astype(np.uint8)])
    refused(save(tmp_path / "ink.png", black_ink), "black or transparent outside")
    thin = np.zeros((600, 800), np.uint8)
    thin[3] = 255
    refused(save(tmp_path / "thin.png", thin), "no pixel inside", resize=True)
    (tmp_path / "text.png").write_text("not a picture")
    refused(tmp_path / "text.png", "damaged picture")
    noise = save(tmp_path / "noise.png", RNG.integers(0, 256, (6, 8), dtype=np.uint8))
    (tmp_path / "cut.png").write_bytes(noise.read_bytes()[:70])
    refused(tmp_path / "cut.png", "damaged picture")
    np.save(tmp_path / "range.npy", np.linspace(-1, 1, 48).reshape(6, 8))
    refused(tmp_path / "range.npy", r"floats of a mask: expected in \[0, 1\]")
    np.save(tmp_path / "nan.npy", np.full((6, 8), np.nan))
    refused(tmp_path / "nan.npy", "floats of a mask")
    np.save(tmp_path / "object.npy", np.array([{}, 1], object), allow_pickle=True)
    refused(tmp_path / "object.npy", "pickled objects")
    np.save(tmp_path / "vector.npy", np.arange(48) < 5)
    refused(tmp_path / "vector.npy", r"wrong shape of the mask: expected \[h, w\]")
    np.save(tmp_path / "two.npy", np.ones((6, 8, 2)))
    refused(tmp_path / "two.npy", r"\[h, w, 1\] or \[h, w, 3\]")
    np.save(tmp_path / "nothing.npy", np.ones((0, 8)))
    refused(tmp_path / "nothing.npy", "another size", resize=True)
