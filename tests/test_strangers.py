"""Files of strangers: none of them runs, and none of them keeps a command waiting."""

import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

import robust_ssl
from robust_ssl import build, disk, settings, weights, working_directory
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.report import results

ROOT = pathlib.Path(__file__).parents[1]

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


# ------------------------------------------------------------------------ files that have no end


@pytest.fixture
def _alarm():
    """Ends a test that waits for ever."""

    def late(number, frame):
        pytest.exit("a reader waits for ever", returncode=1)  # no error that a reader may catch

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


ENDLESS = {
    "a named pipe": os.mkfifo,
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "/dev/urandom": lambda path: path.symlink_to("/dev/urandom"),
    "a link to a pipe": lambda path: (os.mkfifo(f"{path}-pipe"), path.symlink_to(f"{path}-pipe")),
    "a directory": pathlib.Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing, without end": lambda path: path.symlink_to("/proc/kmsg"),
}
READERS = {
    "model.safetensors": weights.inspect_file,
    "resnet18.pth": weights.inspect_file,
    "model.safetensors.index.json": weights.inspect_file,
    "encoder.json": weights.encoder_card,
    "classifier.json": weights.classifier_card,
    "results.json": results.read,
    "attack.npz": UniversalPerturbation.load,
    "program.stablehlo": weights.load_stablehlo,
    "config.py": settings.load_config,
}


@pytest.mark.usefixtures("_alarm")
@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_at_once(folder, name, kind):
    ENDLESS[kind](folder / name)
    with pytest.raises((ValueError, OSError)):
        READERS[name](str(folder / name))
    if name not in ("results.json", "attack.npz", "program.stablehlo", "config.py"):
        with pytest.raises((ValueError, OSError)):
            READERS[name](str(folder))


@pytest.mark.usefixtures("_alarm")
def test_what_lies_beside_weights_is_not_waited_for(folder):
    save_file({"conv1.weight": np.zeros((8, 3, 3, 3), np.float32)}, folder / "model.safetensors")
    os.mkfifo(folder / "config.json")
    (folder / "preprocessor_config.json").symlink_to("/dev/zero")
    assert weights.inspect_file(folder).file.configs == {}


def test_a_file_larger_than_memory_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.truncate(disk.memory() + 1)  # takes no place on the disk
    with pytest.raises(ValueError, match="bytes; at most"):
        weights.inspect_file(file)


# ---------------------------------------------------------- small files that become large or deep

DEEP = {
    "lists": "[" * 100_000,
    "closed lists": "[" * 90 + "]" * 90,
    "objects": '{"a":' * 50_000,
    "closed objects": '{"a":' * 90 + "1" + "}" * 90,
    "a card with depth": '{"schema": 1, "card": ' + "[" * 990 + "]" * 990 + "}",
    "a number": "9" * 100_000,
    "no JSON": "{'a': 1}",
    "no UTF-8": b'{"a": "\xe9"}',
    "a value": "null",
    "empty": "",
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json")])
def test_json_that_is_no_record_is_refused(folder, name, kind):
    content = DEEP[kind]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    path = folder / name if name in ("results.json", "model.safetensors.index.json") else folder
    with pytest.raises(ValueError, match=re.escape(name)):
        READERS[name](str(path))


def test_json_that_is_too_long_is_not_read(tmp_path):
    file = tmp_path / "results.json"
    with file.open("wb") as stream:
        stream.truncate(disk.MOST_JSON + 1)
    with pytest.raises(ValueError, match="at most"):
        results.read(file)
    with pytest.raises(ValueError, match="at most"):
        disk.parse_json("[" + "0," * 100 + "0]", "here", most=100)
    assert disk.parse_json("[[1]]", "here") == [[1]]
    assert disk.parse_json("null", "here") is None


def test_a_card_of_a_billion_layers_is_refused(tmp_path):
    options = {"depth": 10**9, "width": 8, "heads": 1, "image_size": 8, "patch_size": 4}
    card = {"schema": 1, "name": "x", "builder": "robust_ssl.models:vision_transformer"}
    card |= {"options": options, "weights": {"sha256": ""}, "card": {}}
    (tmp_path / "encoder.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="depth is 1000000000; at most 512 is built"):
        weights.load_encoder(tmp_path)


def npz_with(header_shape, content=b"\0" * 8):
    """A ``.npz`` of one array that claims a shape."""
    array = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": header_shape}
    np.lib.format.write_array_header_1_0(array, header)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("delta.npy", array.getvalue() + content)
    return whole.getvalue()


def test_arrays_that_unpack_to_more_than_they_are_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "attack.npz"
    forged = {
        "a shape of terabytes": npz_with((10**6, 10**6, 3)),
        "a shape that overflows": npz_with((2**62, 4, 1)),
        "a negative shape": npz_with((-1, 2)),
        "a shape that is too small": npz_with((1,)),
        "cut off": npz_with((2,))[:-30],
        "no zip": b"PK\x03\x04 and nothing else",
        "empty": b"",
    }
    for what, content in forged.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a saved universal perturbation"):
            UniversalPerturbation.load(file)
            raise AssertionError(what)
    monkeypatch.setattr(disk, "SMALL", 2**16)
    np.savez_compressed(file, delta=np.zeros((256, 256, 3), np.float32))
    with pytest.raises(ValueError, match="it unpacks to 786,"):
        UniversalPerturbation.load(file)
    with file.open("wb") as stream:
        np.savez(stream, delta=np.array([{}], object))
    with pytest.raises(ValueError, match="it is forged"):
        UniversalPerturbation.load(file)


# ------------------------------------------------------------------------------- names of tensors


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202e", "a\x00", "\x9b31m"])
def test_names_of_tensors_that_no_network_has_are_refused(tmp_path, name):
    save_file({name: np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it is forged") as raised:
        weights.inspect_file(tmp_path / "model.safetensors")
    assert name not in str(raised.value)


def test_what_lies_beside_weights_cannot_begin_a_line(tmp_path):
    file = tmp_path / "a\nverdict: trusted\x1b[2J" / "model.safetensors"
    file.parent.mkdir()
    save_file(
        {"conv1.weight": np.zeros((8, 3, 3, 3), np.float32)}, file, {"a\nnote": "x\ncan be trusted"}
    )
    (file.parent / "config.json").write_text(json.dumps({"architectures": ["\x1b[2J\nx"]}))
    shown = str(weights.inspect_file(file.parent)).splitlines()
    assert all(re.match(r"[a-z0-9]+ |cannot be converted", line) for line in shown)
    assert "\x1b" not in "".join(shown)


# -------------------------------------------------------------------------------- links of others


def test_a_link_that_lies_in_the_way_is_not_written_through(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("untouched")
    for name in ("card.json", "card.json.partial", "card.json.tmp", ".card.json.tmp"):
        (tmp_path / name).symlink_to(mine)
    disk.replace(tmp_path / "card.json", "new")
    assert mine.read_text() == "untouched" and (tmp_path / "card.json").read_text() == "new"
    assert not (tmp_path / "card.json").is_symlink()


def test_half_a_file_is_never_left_behind(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), disk.replacing(tmp_path / "file") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    disk.replace(tmp_path / ("n" * 255), b"a name as long as names may be")
    disk.replace(tmp_path / ("日" * 85), b"as long in bytes")
    umask = os.umask(0o027)
    try:
        disk.replace(tmp_path / "file", "new")
    finally:
        os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640  # as any file that is made


# ---------------------------------------------------------------------------- what we say of ours


def test_every_shipped_encoder_says_its_license():
    cards = sorted((ROOT / "robust_ssl" / "zoo").glob("*/README.md"))
    assert [card.parent.name for card in cards] == weights.list_encoders()
    for card in cards:
        text = " ".join(card.read_text().split())
        assert (
            "Apache License 2.0" in text and "CIFAR-10, on which they were trained, has no" in text
        )


def test_the_citation_is_of_this_version():
    assert f"\nversion: {robust_ssl.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_folder_is_called_by_its_name_and_none_stays_open(tmp_path):
    descriptors = pathlib.Path("/proc/self/fd")
    before = len([*descriptors.iterdir()]) if descriptors.is_dir() else 0
    for _ in range(5):
        with pytest.raises(ValueError, match=f"{tmp_path} is a directory; give a regular file"):
            disk.read_bytes(tmp_path)
    assert not before or len([*descriptors.iterdir()]) <= before


def test_a_pipe_for_weights_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "p.safetensors")
    assert weights.resizing_of(tmp_path / "p.safetensors") is None
