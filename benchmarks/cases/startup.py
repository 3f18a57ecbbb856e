"""What a user waits for before anything happens."""

import subprocess
import sys
from typing import Any

from benchmarks.harness import Case, Variant


def _process(name: str, *arguments: str, **options: Any) -> Variant:
    command = [sys.executable, *arguments]
    call = lambda: subprocess.run(command, check=True, capture_output=True)
    return Variant(name, call, **options)


def _imports(size: str) -> list[Variant]:
    base = "import jax, flax.linen, optax"
    everything = "import lowdim_diffusion as ld; [getattr(ld, name) for name in ld.__all__]"
    return [
        _process(base, "-c", base, ours=False),
        _process("import lowdim_diffusion", "-c", "import lowdim_diffusion", bars={base: 1.1}),
        _process("all its modules", "-c", everything),
    ]


def _commands(size: str) -> list[Variant]:
    module = ("-m", "lowdim_diffusion")
    return [
        _process("python -c pass", "-c", "pass", ours=False),
        _process("lowdim --help", *module, "--help"),
        _process("lowdim train --help", *module, "train", "--help"),
    ]


CASES = [
    Case("import", "process", _imports),
    Case("command-start", "process", _commands, "help in under 1 s"),
]
