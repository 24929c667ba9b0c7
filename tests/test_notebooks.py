"""Each notebook runs from first to last cell, with tiny settings, in a kernel of its own."""

import os
import pathlib

import jax
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 1800
DRAWN = {
    "1_attack_and_secure": ("data", "fit", "attacked"),
    "2_audit": (),
    "3_bring_your_own": ("plot",),
    "4_your_own_loss": (),
}
TABLES = {
    "1_attack_and_secure": ("measure", "secured encoder"),
    "2_audit": ("gates", "robust-accuracy"),
    "3_bring_your_own": ("calls", "universal_pgd"),
    "4_your_own_loss": ("result", "pgd"),
}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _read(path):
    return nbformat.read(path, as_version=4)


def _run(path, scratch):
    notebook = _read(path)
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {
        "ROBUST_SSL_SMOKE": "1",
        # Another process: it shares the tests' compilation cache, but not their settings.
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of it
        "TMPDIR": str(scratch),  # where a notebook makes its folders
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(scratch)}},
    )
    client.execute(env=environment)
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def _outputs(cell, mime):
    return [output.data[mime] for output in cell.outputs if mime in output.get("data", {})]


@each
def test_is_committed_without_outputs(path):
    notebook = _read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in notebook.cells)


@each
def test_begins_in_colab(path):
    title, install = _read(path).cells[:2]
    assert f"blob/main/notebooks/{path.name}" in title.source
    assert 'if "google.colab" in sys.modules:' in install.source
    assert install.source.endswith("print(jax.devices())")


def test_own_loss_has_six_lines():
    cells = _read(ROOT / "notebooks/4_your_own_loss.ipynb").cells
    (loss,) = [cell.source for cell in cells if cell.id == "own-loss"]
    assert len(loss.strip().splitlines()) == 6


@pytest.mark.slow
@each
def test_runs_end_to_end(path, tmp_path):
    cells = _run(path, tmp_path)
    assert all(cell.execution_count for cell in cells.values())
    for name in DRAWN[path.stem]:
        assert _outputs(cells[name], "image/png"), name
    name, row = TABLES[path.stem]
    (table,) = _outputs(cells[name], "text/html")
    assert f"<td>{row}</td>" in table
