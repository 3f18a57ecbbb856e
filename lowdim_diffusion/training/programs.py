"""Functions as files that run with jax alone: ``jax.export`` with a digest and a page of help.

A folder holds ``program.bin``, the serialised program with its weights inside, ``about.json``, its
sha256 and whatever the writer wants to be known, and ``README.md``, how to run it without this
package. The program itself has no checksum: a flipped bit would run, and give other numbers.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from lowdim_diffusion import _files
from lowdim_diffusion._checks import fail

__all__ = ["PLATFORMS", "load_program", "save_program"]

PLATFORMS = ("cpu", "cuda", "tpu")
"""What a program is compiled for, unless told otherwise."""

_README = """\
# {title}

A program of jax {jax}, for {platforms}. It needs jax and nothing else:

```python
import hashlib
import pathlib

import jax
import jax.numpy as jnp
from jax import export

content = pathlib.Path("program.bin").read_bytes()  # a program: run only what you trust
assert hashlib.sha256(content).hexdigest() == "{sha256}"
fn = jax.jit(export.deserialize(bytearray(content)).call)
out = fn({example})
print(out.shape)
```

| input | shape | type |
| --- | --- | --- |
{rows}

Every `b` is the same number, and any. {note}
"""


def save_program(
    folder: str | os.PathLike[str],
    fn: Callable[..., Any],
    inputs: Mapping[str, tuple[Sequence[int | str], Any]],
    *,
    title: str,
    note: str = "",
    about: Mapping[str, Any] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> pathlib.Path:
    """Write a function of arrays as a program that runs without this package.

    Args:
        folder: what to write; its files are replaced.
        fn: what ``jax.jit`` takes; arrays that it closes over, such as weights, are stored inside.
        inputs: for each argument in order ``name -> (shape, dtype)``; a size ``"b"`` in a shape
            stands for any number, the same everywhere.
        title: first line of the README.
        note: last line of it.
        about: what JSON can hold, for :func:`load_program` to give back.
        platforms: where it is to run, of ``cpu``, ``cuda``, ``rocm`` and ``tpu``.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: if the library flatbuffers is not installed.
    """
    try:
        import flatbuffers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "save_program needs flatbuffers, which is not installed: "
            "pip install 'lowdim-diffusion[export]'"
        ) from None
    del flatbuffers  # jax uses it
    (size,) = export.symbolic_shape("b")
    specs = [
        jax.ShapeDtypeStruct([size if n == "b" else n for n in shape], dtype)
        for shape, dtype in inputs.values()
    ]
    content = bytes(export.export(jax.jit(fn), platforms=platforms)(*specs).serialize())
    kinds = {
        name: {"shape": list(shape), "dtype": jnp.dtype(dtype).name}
        for name, (shape, dtype) in inputs.items()
    }
    known = {
        **(about or {}),
        "sha256": hashlib.sha256(content).hexdigest(),
        "inputs": kinds,
        "platforms": list(platforms),
        "jax": jax.__version__,
    }
    spelled = {k: f"[{', '.join(map(str, kind['shape']))}]" for k, kind in kinds.items()}
    readme = _README.format(
        title=title,
        jax=jax.__version__,
        platforms=", ".join(platforms),
        sha256=known["sha256"],
        example=", ".join(_example(name, **kind) for name, kind in kinds.items()),
        rows="\n".join(f"| `{k}` | `{spelled[k]}` | {kinds[k]['dtype']} |" for k in kinds),
        note=note,
    )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _files.write_atomic(folder / "program.bin", content)
    _files.write_atomic(folder / "README.md", readme)
    _files.write_atomic(folder / "about.json", json.dumps(known, indent=2) + "\n")
    return folder


def _example(name: str, shape: Sequence[int | str], dtype: str) -> str:
    """An argument as the README shows it."""
    sizes = tuple(4 if n == "b" else n for n in shape)
    if not sizes:
        return f"jnp.{dtype}(0)"
    if name == "index":
        return f"jnp.arange(4, dtype=jnp.{dtype})"
    return f"jnp.zeros({sizes}, jnp.{dtype})" if "int" in dtype else f"jnp.ones({sizes})"


def load_program(folder: str | os.PathLike[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return ``(function, about)`` of a folder that :func:`save_program` wrote.

    The file is a program: the digest says that it is the one that was written, not that its writer
    means well.

    Raises:
        ValueError: if the folder is not one, or a file in it is damaged; later, from the function,
            for arguments of another number, shape or dtype than it takes.
    """
    where, folder = "load_program", pathlib.Path(folder)
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        content = (folder / "program.bin").read_bytes()
        found, written = hashlib.sha256(content).hexdigest(), about["sha256"]
    except FileNotFoundError as error:
        raise fail(where, f"no program in {folder}", "about.json, program.bin", error) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise fail(where, f"damaged {folder / 'about.json'}", "JSON with sha256", error) from None
    if found != written:
        what, expected = f"damaged {folder / 'program.bin'}", f"sha256 {written[:16]}"
        raise fail(where, what, expected, found[:16], "copy or export it again")
    program = export.deserialize(bytearray(content))
    names = list(about.get("inputs", {}))

    def call(*args: Any) -> Any:
        arrays = [jnp.asarray(x) for x in args]
        if len(arrays) != len(program.in_avals):
            raise fail("program", "wrong number of arguments", ", ".join(names), len(arrays))
        for name, x, aval in zip(names, arrays, program.in_avals, strict=True):
            fits = len(x.shape) == len(aval.shape) and all(
                not isinstance(n, int) or n == m for n, m in zip(aval.shape, x.shape, strict=True)
            )
            if not fits or x.dtype != aval.dtype:
                expected = f"{aval.dtype}[{', '.join(map(str, aval.shape))}]"
                got = f"{x.dtype}[{', '.join(map(str, x.shape))}]"
                raise fail("program", f"wrong {name}", expected, got)
        return program.call(*arrays)

    return jax.jit(call), about
