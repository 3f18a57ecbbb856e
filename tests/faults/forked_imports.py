"""What the server of forks imports once: everything that a command needs, without a device."""

import importlib

for _name in (
    "flax.linen",
    "orbax.checkpoint",
    "lowdim_diffusion.cli.train",
    "lowdim_diffusion.cli.sample",
    "lowdim_diffusion.cli.drawing",
    "lowdim_diffusion.cli.plan",
    "lowdim_diffusion.cli.loading",
    "lowdim_diffusion.cli.errors",
    "lowdim_diffusion.networks.linear",
    "lowdim_diffusion.training.trainer",
    "lowdim_diffusion.training.progress",
):
    importlib.import_module(_name)
