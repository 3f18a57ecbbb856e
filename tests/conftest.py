"""Shared test set-up: emulated devices, strict dtypes, runtime shape checks."""

import importlib.metadata
import os
import tempfile

# Most of the time goes into compiling; what is tested are the numbers, not the speed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The same programs come back, within a file and in the processes that tests start. One cache per
# worker: jax does not write its entries atomically.
_cache = tempfile.TemporaryDirectory(prefix="lowdim-tests-", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Workers share the cores; OpenBLAS threads on top of XLA's make small eigenproblems 100x slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
_flags = {"xla_force_host_platform_device_count": "8", "xla_cpu_parallel_codegen_split_count": "1"}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Its older code generator compiles in half the time; newer releases refuse the flag.
    _flags["xla_cpu_use_fusion_emitters"] = "false"
_given = os.environ.get("XLA_FLAGS", "")
_added = [f"--{name}={value}" for name, value in _flags.items() if name not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()

import jaxtyping

jaxtyping.install_import_hook("lowdim_diffusion", "typechecker.check")

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

collect_ignore = ["networks/make_pretrained_fixtures.py"]  # a script, which needs torch
# Not searched for doctests: files of one name would be taken for one module.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]


def pytest_make_parametrize_id(val):
    """Bytes are named by their length: contents may differ between workers and be unprintable."""
    return f"{len(val)}bytes" if isinstance(val, bytes) else None


@pytest.fixture
def key():
    """A fresh typed key."""
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """The package as users run it: no type checker, which would speak before its errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def data_root():
    """Folder with real image files in users' formats; tests skip where there is none."""
    path = os.environ.get("LOWDIM_TEST_DATA")
    candidates = [pathlib.Path(path)] if path else []
    candidates.append(pathlib.Path(__file__).resolve().parents[2] / "shared" / "data")
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    pytest.skip("no real data here: set LOWDIM_TEST_DATA to a folder with mnist/, cifar10/, ...")
