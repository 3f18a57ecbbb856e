"""``python -m lowdim_diffusion`` is the ``lowdim`` command."""

from lowdim_diffusion.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
