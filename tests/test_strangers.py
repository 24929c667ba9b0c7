"""Files of strangers: none of them runs, and none of them keeps a command waiting."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from robust_ssl import build, settings, working_directory

# What is installed, what libraries try whether it is installed, and what Python itself looks for.
PLANTED = (
    *("jax", "flax", "numpy", "safetensors", "rich", "ml_dtypes", "optax", "orbax", "argparse"),
    *("torch", "transformers", "datasets", "tensorflow", "jax_plugins", "pandas", "colorama"),
    *("usercustomize", "jax_cuda12_plugin", "libtpu", "cloudpickle", "IPython"),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory; what its modules leave behind is forgotten."""
    before = set(sys.modules), set(working_directory._users)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before[0]:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    working_directory._users.intersection_update(before[1])


@pytest.mark.parametrize("program", ["-m robust_ssl.cli.main", "the installed command"])
def test_modules_beside_the_weights_do_not_run(folder, program):
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"open('RAN-{name}', 'w').close()\n")
    (folder / "evil-1.dist-info").mkdir()
    (folder / "evil-1.dist-info" / "METADATA").write_text("Name: evil\nVersion: 1\n")
    (folder / "evil-1.dist-info" / "entry_points.txt").write_text("[jax_plugins]\nevil = torch\n")
    save_file({"conv1.weight": np.zeros((8, 3, 3, 3), np.float32)}, folder / "model.safetensors")
    # As the script that pip writes: its own folder comes first, not the working directory.
    script = "import sys; del sys.path[0]; from robust_ssl.cli import main; sys.exit(main.main())"
    start = program.split() if program.startswith("-m") else ["-c", script]
    process = subprocess.run(
        [sys.executable, *start, "encoder", "inspect", "model.safetensors"],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert "sha256" in process.stdout, process.stderr
    assert not [path.name for path in folder.glob("RAN-*")]


def test_a_users_modules_find_each_other_and_libraries_do_not_find_them(folder):
    (folder / "my_losses.py").write_text(
        "import my_scales\n\ndef tilted(x): return my_scales.TWO\n"
    )
    (folder / "my_scales.py").write_text("TWO = 2\n")
    (folder / "not_there_otherwise.py").write_text("")
    assert build.resolve("my_losses:tilted")(0) == 2
    assert build.resolve("my_losses:tilted") is build.resolve("my_losses:tilted")
    assert str(folder) not in sys.path and "" not in sys.path[1:]
    # A library that asks, and one that imports: neither was named by a config.
    with pytest.raises(ModuleNotFoundError):
        exec("import not_there_otherwise", {"__name__": "flax.core.optional"})
    with pytest.raises(ModuleNotFoundError):
        exec("import not_there_otherwise", {"__name__": "robust_ssl.weights.files"})
    asks = "import importlib.util\nspec = importlib.util.find_spec('not_there_otherwise')"
    names = {"__name__": "transformers.utils"}
    exec(asks, names)
    assert names["spec"] is None


def test_a_package_of_the_working_directory_resolves_with_its_neighbours(folder):
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").write_text("")
    (folder / "my_package" / "losses.py").write_text(
        "from my_package import scales\nimport my_helper\n"
        "def tilted(x):\n    import my_late\n    return scales.TWO + my_helper.ONE + my_late.ONE\n"
    )
    (folder / "my_package" / "scales.py").write_text("TWO = 2\n")
    (folder / "my_helper.py").write_text("ONE = 1\n")
    (folder / "my_late.py").write_text("ONE = 1\n")
    assert build.resolve("my_package.losses:tilted")(0) == 4


def test_a_config_imports_from_the_working_directory(folder):
    (folder / "my_numbers.py").write_text("SEED = 7\n")
    (folder / "config.py").write_text(
        "import my_numbers\nfrom ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'seed': my_numbers.SEED})\n"
    )
    assert settings.load_config("config.py").seed == 7


def test_an_installed_module_is_not_shadowed_and_the_error_says_which_it_is(folder):
    (folder / "optax.py").write_text("def tilted(x): return 1\n")
    with pytest.raises(ValueError, match=r"installed .*optax.*write './optax.py:...'"):
        build.resolve("optax:tilted")
    assert build.resolve("./optax.py:tilted")(0) == 1
    import optax

    assert hasattr(optax, "adam")


def test_a_file_called_like_a_library_does_not_become_it(folder, monkeypatch):
    (folder / "losses").mkdir()
    (folder / "losses" / "wave.py").write_text("def tilted(x): return 1\n")
    monkeypatch.delitem(sys.modules, "wave", raising=False)  # of the standard library
    assert build.resolve("losses/wave.py:tilted").__module__ == "file_wave"
    import wave

    assert hasattr(wave, "Wave_read")
