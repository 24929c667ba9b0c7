"""The notebook runs from its first cell to its last, with tiny settings, in a kernel of its own."""

import os
import pathlib

import jax
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "1_attack_and_secure.ipynb"
CELL_SECONDS = 1800


def _read():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook, scratch = _read(), tmp_path_factory.mktemp("notebook")
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {
        "ROBUST_SSL_SMOKE": "1",
        # Another process: it shares the tests' compilation cache, but not their settings.
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TMPDIR": str(scratch),  # where the notebook makes its workdirs
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute(env=environment)
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def _outputs(cell, mime):
    return [output.data[mime] for output in cell.outputs if mime in output.get("data", {})]


def test_is_committed_without_outputs():
    notebook = _read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in notebook.cells)


def test_opens_in_colab():
    assert f"blob/main/notebooks/{NOTEBOOK.name}" in _read().cells[0].source


def test_own_loss_has_six_lines():
    (loss,) = [cell.source for cell in _read().cells if cell.id == "own-loss"]
    assert len(loss.strip().splitlines()) == 6


@pytest.mark.slow
def test_runs_end_to_end(executed):
    errors = [
        output
        for cell in executed.values()
        for output in cell.outputs
        if output.output_type == "error"
    ]
    assert not errors
    assert all(cell.execution_count for cell in executed.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["data", "fit", "attacked", "epsilon", "sensitivity", "own-log", "compare-figure"],
)
def test_draws(executed, name):
    assert _outputs(executed[name], "image/png")


@pytest.mark.slow
def test_tables(executed):
    (turned,) = _outputs(executed["turned"], "text/markdown")
    assert turned.count("/255 |") == 2
    (table,) = _outputs(executed["table"], "text/markdown")
    for row in ("baseline (frozen encoder)", "gen_af_stage1", "gen_af"):
        assert f"| {row} |" in table
    (compared,) = _outputs(executed["compare"], "text/markdown")
    for row in ("universal_pgd | public", "universal_pgd | hardened", "pgd | hardened"):
        assert f"| {row} |" in compared
