"""The house stands: imports go down only, the lower floors stay light, importing starts nothing."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "robust_ssl"

FLOORS = (
    {"types", "struct", "build", "working_directory", "words", "disk", "pixels", "keys"},
    {"threats", "frequencies", "objectives", "losses", "models", "parallel", "xla"},
    {"attacks", "optimizers"},
    {"pretraining", "finetuning", "evaluation", "screening", "conformance"},
    {
        *("data", "weights", "zoo", "workdir", "progress", "stopping"),
        *("settings", "shipped", "report", "schemas", "recipes", "pickles", "bridges"),
        *("provenance", "inspection"),
    },
    {"audit"},
    {"experiment"},
    {"api"},
    {"cli", "__init__"},
)
LIGHT = {"jax", "jaxlib", "flax", "optax", "chex", "numpy"}
HEAVY = ("tensorflow", "tensorflow_datasets", "matplotlib", "orbax", "sklearn", "PIL", "torch")


def floor_of(room):
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(module):
    """``robust_ssl.data.sources`` is in the room ``data``."""
    return [*module.split("."), "__init__"][1]


MODULES = {
    ".".join(["robust_ssl", *file.relative_to(PACKAGE).with_suffix("").parts]): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


@functools.cache
def parsed(file):
    return ast.parse(file.read_text())


def imports(file, *, nested):
    """Yields the modules that a file imports, at the top only or in its functions too."""
    nodes = [parsed(file)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write the whole name"
            for name in node.names:
                inside = f"{node.module}.{name.name}"
                known = inside in MODULES or f"{inside}.__init__" in MODULES
                yield inside if known else node.module
        elif nested or not isinstance(node, ast.FunctionDef | ast.Lambda):
            nodes.extend(ast.iter_child_nodes(node))


def test_every_room_has_one_floor():
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms))
    assert {room_of(module) for module in MODULES} == set(rooms)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    room = room_of(module)
    for imported in imports(MODULES[module], nested=True):
        if not imported.startswith("robust_ssl"):
            continue
        other = room_of(imported)
        assert other == room or floor_of(other) <= floor_of(room), f"{module} imports {imported}"
        if (room, other) == ("cli", "__init__"):
            continue  # for the version
        assert other == room or floor_of(other) < len(FLOORS) - 1, (
            f"{module} imports {imported}: name what you mean"
        )


def test_no_room_needs_itself_through_another():
    needs = {}
    for module, file in MODULES.items():
        others = {room_of(i) for i in imports(file, nested=True) if i.startswith("robust_ssl")}
        needs.setdefault(room_of(module), set()).update(others - {room_of(module)})
    while needs:
        free = {room for room, others in needs.items() if not others & needs.keys()}
        assert free, f"these need each other: {sorted(needs)}"
        needs = {room: others for room, others in needs.items() if room not in free}


@pytest.mark.parametrize("module", [m for m in MODULES if floor_of(room_of(m)) <= 3])
def test_the_lower_floors_import_jax_and_its_kin_only(module):
    allowed = LIGHT | {"robust_ssl"} | sys.stdlib_module_names
    allowed |= {"pretraining": {"dm_pix"}, "evaluation": {"scipy"}, "xla": {"jaxlib"}}.get(
        room_of(module), set()
    )
    others = {i.split(".")[0] for i in imports(MODULES[module], nested=True)} - allowed
    assert not others, f"{module} imports {sorted(others)}"


def test_heavy_packages_are_imported_late():
    for module, file in MODULES.items():
        top = {imported.split(".")[0] for imported in imports(file, nested=False)}
        assert not top & set(HEAVY), f"{module} imports {sorted(top & set(HEAVY))} at its top"


def test_importing_starts_no_device_and_loads_nothing_heavy():
    names = [m.removesuffix(".__init__") for m in MODULES]
    program = f"""
import importlib, sys
import robust_ssl
heavy = {HEAVY!r}
assert not set(heavy) & set(sys.modules), sorted(set(heavy) & set(sys.modules))
for name in {names!r}:
    importlib.import_module(name)
assert not set(heavy) & set(sys.modules), sorted(set(heavy) & set(sys.modules))
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a jnp call at import time"
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
