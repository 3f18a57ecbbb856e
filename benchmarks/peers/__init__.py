"""The same work in other libraries, as their users write it."""

import importlib.util

INSTALL = {
    "torch": "pip install torch --index-url https://download.pytorch.org/whl/cpu",
    "diffusers": "pip install diffusers",
    "k_diffusion": "pip install k-diffusion",
    "hackable_diffusion": (
        "git clone https://github.com/google/hackable_diffusion, put the clone on PYTHONPATH, "
        "pip install immutabledict"
    ),
    "sklearn": "pip install scikit-learn",
    "skdim": "pip install scikit-dimension",
    "scipy": "pip install scipy",
    "faiss": "pip install faiss-cpu",
}
"""Modules of the peers, and what installs them."""


def present(*modules: str) -> bool:
    """Return whether these modules of :data:`INSTALL` are all here."""
    return not any(map(_absent, modules))


def missing(modules: tuple[str, ...]) -> dict[str, str]:
    """Return those of these modules that are not here, with the command that installs them."""
    return {module: INSTALL[module] for module in modules if _absent(module)}


def _absent(module: str) -> bool:
    assert module in INSTALL, module
    return importlib.util.find_spec(module) is None
