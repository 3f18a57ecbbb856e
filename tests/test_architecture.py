"""The house rules: imports go down only, heavy libraries stay in their room, loading is lazy."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "lowdim_diffusion"

FLOORS = [
    {"_types", "_checks", "_files", "_nested"},
    {"linalg", "schedules", "sharding"},
    {"corruption", "distributions", "networks", "neighbors"},
    {"data", "denoisers", "losses", "solvers"},
    {"guidance", "sampling", "likelihood"},
    {"subspaces"},
    {"generalization", "editing"},
    {"safety"},
    {"training"},
    {"reporting"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Neighbours on one floor, lower first: the lower may not know of the higher.
NEIGHBOURS = {("denoisers", "losses"), ("schedules", "corruption")}

HEAVY = {
    "diffrax": {"solvers"},
    "flax": {"networks"},
    "optax": {"training"},
    "orbax": {"training/checkpoint.py"},
    "matplotlib": {"reporting"},
    "PIL": {"data", "reporting"},
    "tyro": {"cli"},
    "cattrs": {"cli"},
    "rich": {"cli", "training/progress.py"},
    "safetensors": {"networks"},
    "scipy": {"data", "subspaces"},
    "sklearn": {"subspaces"},
    "tensorboardX": {"training/sinks.py"},
    "wandb": {"training/sinks.py"},
    "submitit": {"cli"},
    "grain": set(),
    "array_record": {"data"},
}


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if inside.as_posix() != "__init__.py":
            yield inside, ast.parse(path.read_text(encoding="utf-8"))


def room(inside):
    return inside.parts[0].removesuffix(".py")


def imported(tree):
    """Dotted names of everything imported, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "absolute imports only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor():
    assert {room(inside) for inside, _ in sources()} <= set(FLOOR_OF)


def test_imports_go_down_only():
    wrong = []
    for inside, tree in sources():
        here = room(inside)
        for name in imported(tree):
            parts = name.split(".")
            if parts[0] != "lowdim_diffusion" or len(parts) < 2 or parts[1] == here:
                continue
            there = parts[1]
            if there not in FLOOR_OF:  # a name of the package itself, such as __version__
                continue
            down = FLOOR_OF[there] < FLOOR_OF[here] or (there, here) in NEIGHBOURS
            if not down:
                wrong.append(f"{inside}: imports {name}")
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_stay_in_their_rooms():
    wrong = []
    for inside, tree in sources():
        for name in imported(tree):
            homes = HEAVY.get(name.split(".")[0])
            allowed = homes is None or room(inside) in homes or inside.as_posix() in homes
            if not allowed:
                wrong.append(f"{inside}: imports {name}")
    assert not wrong, "\n".join(wrong)


def test_package_knows_nothing_of_what_stands_beside_it():
    outside = {"experiments", "benchmarks", "tests"}
    for inside, tree in sources():
        assert not outside & {name.split(".")[0] for name in imported(tree)}, inside


def loaded_after(statement):
    """Top-level modules in ``sys.modules`` after a statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import lowdim_diffusion", {"jax", "numpy", "flax", "orbax", "matplotlib"}),
        (
            "import lowdim_diffusion as ld; ld.distributions, ld.subspaces, ld.sampling",
            {"flax", "orbax", "matplotlib", "tyro"},
        ),
        ("import lowdim_diffusion.cli", {"jax", "flax", "orbax", "matplotlib"}),
    ],
)
def test_loading_is_lazy(statement, absent):
    assert not absent & loaded_after(statement)


def test_import_touches_no_device():
    code = (
        "import lowdim_diffusion as ld\n"
        "for name in ld.__all__: getattr(ld, name)\n"
        "import jax\n"
        "assert not jax._src.xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
