"""Weights on disk: read back bit for bit, by others too; no changed byte goes unnoticed."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from lowdim_diffusion import networks

NET = networks.make("mlp", data_shape=(6,), width=8, depth=1)
ABOUT = {"step": 7, "config": 'name = "mlp"\n', "model": {"width": 8}}


@pytest.fixture(scope="module")
def params():
    return jax.device_get(NET.init(jax.random.key(0))) | {"scale": np.array(2.0, np.float32)}


@pytest.fixture
def file(params, tmp_path):
    return networks.save_weights(tmp_path / "Gewichte 1.safetensors", params, ABOUT)


def test_round_trip(file, params):
    found = networks.load_weights(file)
    assert found.about == ABOUT
    assert jax.tree.structure(found.params) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def test_the_library_itself_reads_it(file, params):
    stored = safetensors.numpy.load_file(file)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in leaves}
    assert stored.keys() == names.keys()
    assert all(np.array_equal(stored[name], x) for name, x in names.items())


def test_every_flipped_byte_is_noticed(file, params):
    content = file.read_bytes()
    places = [*range(0, 400), *range(400, len(content), 61), len(content) - 1]
    for place in places:
        bad = bytearray(content)
        bad[place] ^= 0x10
        file.write_bytes(bad)
        try:
            found = networks.load_weights(file)
        except ValueError:
            continue
        # The one field that nothing depends on.
        assert b"format" in content[max(place - 30, 0) : place + 30], place
        assert found.about == ABOUT
        assert all(map(np.array_equal, jax.tree.leaves(found.params), jax.tree.leaves(params)))


@pytest.mark.parametrize("size", [0, 5, 100, -4])
def test_truncated_files_are_refused(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"load_weights: damaged .*copy it again"):
        networks.load_weights(file)


def test_files_of_others_are_refused(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="from elsewhere"):
        networks.load_weights(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no such file"):
        networks.load_weights(tmp_path / "y.safetensors")
