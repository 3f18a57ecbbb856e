"""The ``lowdim`` command line: typed configs, one file per command.

Nothing here imports jax before the arguments have parsed.
"""

from lowdim_diffusion.cli._app import main

__all__ = ["main"]
