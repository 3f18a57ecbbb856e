"""What a user waits for before anything happens."""

import subprocess
import sys

from benchmarks.harness import Case, Variant


def _process(name: str, *arguments: str) -> Variant:
    command = [sys.executable, *arguments]
    return Variant(name, lambda: subprocess.run(command, check=True, capture_output=True))


def _imports(size: str) -> list[Variant]:
    everything = "import lowdim_diffusion as ld; [getattr(ld, name) for name in ld.__all__]"
    return [
        _process("import jax, flax.linen, optax", "-c", "import jax, flax.linen, optax"),
        _process("import lowdim_diffusion", "-c", "import lowdim_diffusion"),
        _process("all its modules", "-c", everything),
    ]


def _commands(size: str) -> list[Variant]:
    module = ("-m", "lowdim_diffusion")
    return [
        _process("python -c pass", "-c", "pass"),
        _process("lowdim --help", *module, "--help"),
        _process("lowdim train --help", *module, "train", "--help"),
    ]


CASES = [
    Case("import", "process", _imports, "at most 1.1 of the libraries it stands on"),
    Case("command-start", "process", _commands, "help in under 1 s"),
]
