"""``lowdim doctor``: what is installed, what is missing and the command that adds it."""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence

from lowdim_diffusion import __version__
from lowdim_diffusion.cli.errors import CommandError, ExitCode

__all__ = ["main"]

_USAGE = """\
usage: lowdim doctor

Show versions, devices and what is missing. Exit code 0 if everything required
works, else 2.

examples
  lowdim doctor
  XLA_FLAGS=--xla_force_host_platform_device_count=8 lowdim doctor
"""

# Package, versions that work, the module to import. Kept equal to pyproject.toml by a test, as
# are the extras, each without the extras that it includes.
REQUIRED = {
    "jax": (">=0.10.2", "jax"),
    "flax": (">=0.12.8", "flax"),
    "optax": (">=0.2.8", "optax"),
    "orbax-checkpoint": (">=0.12.8,<0.13", "orbax.checkpoint"),
    "chex": (">=0.1.92", "chex"),
    "numpy": (">=2.1", "numpy"),
    "jaxtyping": (">=0.3.11", "jaxtyping"),
    "tyro": (">=1.0.17", "tyro"),
    "cattrs": (">=26.1", "cattrs"),
    "tomli-w": (">=1.2", "tomli_w"),
    "rich": (">=13", "rich"),
}
EXTRAS = {
    "plots": {"matplotlib": "3.10", "pillow": "12"},
    "data": {"pillow": "12", "scipy": "1.15"},
    "tensorboard": {"tensorboardX": "2.6.5"},
    "wandb": {"wandb": "0.19"},
    "slurm": {"submitit": "1.5.2"},
    "grain": {"grain": "0.2.18"},
    "pretrained": {"safetensors": "0.8"},
    "export": {"safetensors": "0.8", "flatbuffers": "25.2"},
    "experiments": {"scikit-learn": "1.7"},
}
_FOR = {
    "plots": "figures and reports",
    "data": "folders of images, .mat files",
    "tensorboard": "--train.tensorboard",
    "wandb": "--train.wandb",
    "slurm": "lowdim sweep --executor slurm",
    "grain": "data in .array_record files",
    "pretrained": "networks of diffusers and EDM",
    "export": "lowdim export",
    "experiments": "spectral clustering, experiments",
}
_PYTHON = (3, 11)


def main(argv: Sequence[str]) -> int:
    """Print the findings; return 0, or 2 if something required is missing or broken."""
    if "-h" in argv or "--help" in argv:
        print(_USAGE, end="")
        return 0
    if argv:
        raise CommandError(f"unexpected argument {argv[0]!r}; lowdim doctor takes none")
    broken: list[str] = []
    _machine(broken)
    _packages(broken)
    if not broken:
        _devices(broken)
    _extras()
    print()
    if broken:
        print("Problems")
        for problem in broken:
            print(f"  {problem}")
        return ExitCode.USAGE
    print("Everything required works.")
    return ExitCode.DONE


def _row(name: str, value: str, note: str = "") -> None:
    line = f"  {name:<18} {value:<22} {note}".rstrip()
    if note and len(line) > 80:  # the note goes below
        line = f"  {name:<18} {value}".rstrip() + f"\n{'':<21}{note}"
    print(line)


def _machine(broken: list[str]) -> None:
    print(f"lowdim_diffusion {__version__}")
    print("\nMachine")
    version = platform.python_version()
    if sys.version_info < _PYTHON:
        broken.append(f"Python {version} is too old: 3.11 or newer is needed")
    _row("python", version, sys.executable)
    _row("platform", f"{platform.system()} {platform.machine()}", platform.release())
    _row("processor cores", _cores())
    _row("memory", *_memory())
    _row("free disk here", f"{shutil.disk_usage('.').free / 1e9:.1f} GB", os.getcwd())
    try:
        with tempfile.TemporaryFile(dir="."):
            pass
        _row("writable here", "yes")
    except OSError as error:
        _row("writable here", "no", f"{error.strerror}; give --out a directory you can write")
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "CUDA_VISIBLE_DEVICES"):
        if os.environ.get(name):
            _row(name, os.environ[name])


def _cores() -> str:
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return str(usable) if usable == total else f"{usable} of {total}"


def _memory() -> tuple[str, str]:
    try:
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    except (AttributeError, ValueError, OSError):
        return "unknown", ""
    return f"{page * pages / 1e9:.1f} GB", f"{page * free / 1e9:.1f} GB free" if free else ""


def _packages(broken: list[str]) -> None:
    print("\nRequired")
    for package, (versions, module) in REQUIRED.items():
        found = _version(package)
        oldest, _, beyond = versions.removeprefix(">=").partition(",<")
        if found is None:
            _row(package, "missing", f'pip install "{package}{versions}"')
            broken.append(f'{package} is missing: pip install "{package}{versions}"')
        elif _numbers(found) < _numbers(oldest):
            _row(package, found, f"too old, {oldest} or newer is needed")
            broken.append(f'{package} {found} is too old: pip install -U "{package}{versions}"')
        elif beyond and _numbers(found) >= _numbers(beyond):
            _row(package, found, f"too new, a version before {beyond} is needed")
            broken.append(f'{package} {found} is too new: pip install "{package}{versions}"')
        else:
            try:
                importlib.import_module(module)
            except Exception as error:
                _row(package, found, "does not import")
                broken.append(f"{package} {found} does not import: {_brief(error)}")
            else:
                _row(package, found)


def _extras() -> None:
    print("\nExtras")
    for extra, packages in EXTRAS.items():
        missing = [
            f"{name} {found or 'missing'}"
            for name, oldest in packages.items()
            if (found := _version(name)) is None or _numbers(found) < _numbers(oldest)
        ]
        if missing:
            _row(extra, f"{', '.join(missing)}", f"for {_FOR[extra]}:")
            _row("", f'pip install "lowdim-diffusion[{extra}]"')
        else:
            have = ", ".join(f"{name} {_version(name)}" for name in packages)
            _row(extra, "yes", have)


def _devices(broken: list[str]) -> None:
    print("\nDevices")
    try:
        import jax
        import jax.numpy as jnp

        devices = jax.devices()
        start = time.perf_counter()
        value = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))))
        elapsed = time.perf_counter() - start
    except Exception as error:
        _row("jax", "no device", _brief(error))
        broken.append(f"jax cannot use any device: {_brief(error)}")
        return
    if value != 64.0**3:
        broken.append(f"jax computes wrongly on {devices[0]}: expected {64.0**3}, got {value}")
    kinds = sorted({device.device_kind for device in devices})
    _row("backend", jax.default_backend(), f"{len(devices)} x {', '.join(kinds)}")
    _row("compile and run", f"{elapsed:.2f} s", "a small matrix product")
    if jax.default_backend() == "cpu":
        install = 'pip install "lowdim-diffusion[cuda13]" (or cuda12, tpu)'
        _row("accelerator", "none", install)
        if len(devices) == 1:
            _row("to emulate N", "XLA_FLAGS=--xla_force_host_platform_device_count=N")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
