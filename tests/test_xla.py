"""What is set for the whole process: cores, patience, compile caches, memory maps."""

import contextlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import xla
from robust_ssl.parallel import Parallel


def test_asking_for_every_core_after_jax_has_started_changes_nothing():
    jax.devices()
    xla.use_every_core()
    assert jax.device_count() == 4


def test_flags_are_added_where_the_user_has_not_set_them(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # it is set: conftest.py did
    xla.set_flags()
    ours = os.environ["XLA_FLAGS"]
    assert ours.split() == [f"--{name}={value}" for name, value in xla.FLAGS.items()]
    xla.set_flags()
    assert os.environ["XLA_FLAGS"] == ours
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    xla.set_flags({"xla_backend_optimization_level": "1", "xla_disable_hlo_passes": "dce"})
    assert os.environ["XLA_FLAGS"] == (
        "--xla_backend_optimization_level=3 --xla_disable_hlo_passes=dce"
    )


def test_a_flag_that_this_jaxlib_does_not_have_is_left_out(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    xla.set_flags({"xla_of_another_year": "1"})
    assert "XLA_FLAGS" not in os.environ


def test_flags_in_a_file_stay_and_ours_come_to_them(monkeypatch, tmp_path):
    file = tmp_path / "flags"
    file.write_text(
        "--xla_force_host_platform_device_count=3\n--xla_backend_optimization_level=3\n"
    )
    monkeypatch.setenv("XLA_FLAGS", str(file))
    xla.set_flags({"xla_backend_optimization_level": "1", "xla_disable_hlo_passes": "dce"})
    assert os.environ["XLA_FLAGS"].split() == [
        *file.read_text().split(),
        "--xla_disable_hlo_passes=dce",
    ]
    monkeypatch.setenv("XLA_FLAGS", "/of/nobody")  # XLA says that it is not there
    xla.set_flags()
    assert os.environ["XLA_FLAGS"] == "/of/nobody"


@pytest.mark.slow
def test_jax_starts_with_every_flag():
    code = "from robust_ssl import xla; xla.use_every_core(); import jax; print(jax.devices())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "CpuDevice" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [("XLA_FLAGS", "--xla_force_host_platform_device_count=3"), ("JAX_NUM_CPU_DEVICES", "3")],
)
def test_a_number_of_devices_that_the_user_names_stays(variable, value):
    code = "from robust_ssl import xla; xla.use_every_core(); import jax; print(jax.device_count())"
    environment = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**environment, "JAX_PLATFORMS": "cpu", variable: value},
    )
    assert done.stdout == "3\n", done.stderr


def test_programs_are_dropped_only_when_they_hold_many_memory_maps():
    traced = []

    @jax.jit
    def double(x):
        traced.append(x)
        return 2 * x

    double(1.0)
    assert not xla.release_programs(most=10**9)
    double(2.0)
    assert len(traced) == 1
    assert xla.release_programs(most=0)
    assert double(3.0) == 6.0 and len(traced) == 2


def test_what_is_alike_is_compiled_once_without_a_cache_on_disk(compiled_programs):
    def programs():
        for _ in range(2):  # two functions, of which JAX itself knows nothing in common
            jax.jit(lambda x: jnp.sin(x) + 3)(jnp.ones(7)).block_until_ready()

    with xla.shared_programs():
        assert jax.config.jax_compilation_cache_dir
        programs()
        first = compiled_programs.copy()
        programs()
    assert compiled_programs == first
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1


def test_a_cache_on_disk_stays_the_one_in_use():
    before = jax.config.jax_compilation_cache_dir
    with xla.shared_programs():
        assert before and jax.config.jax_compilation_cache_dir == before
    assert jax.config.jax_compilation_cache_dir == before


def test_few_calls_are_in_flight_on_several_cpu_devices(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or x)
    two = Parallel.create(num_devices=2)
    add = two.compile(lambda state, batch: (state + 1, {"before": state}), donate=True)
    state, batch = two.replicate(jnp.zeros(())), two.put({"x": np.zeros(2)})
    for _ in range(10):
        state, _ = add(state, batch)
    steps = [float(info) for (info,) in waited]
    assert steps == list(range(10 - xla.IN_FLIGHT))
    assert float(state) == 10


def test_the_directory_of_compiled_programs_is_made_for_oneself_alone(tmp_path):
    made = tmp_path / "a" / "cache"
    assert xla.private_directory(made) == str(made)
    assert made.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(made)
    assert xla.private_directory(tmp_path / "link") == str(made)
    wide = tmp_path / "wide"
    wide.mkdir()
    wide.chmod(0o775)
    (tmp_path / "link-to-wide").symlink_to(wide)
    for path in (wide, tmp_path / "link-to-wide"):
        with pytest.raises(PermissionError, match="others can write"):
            xla.private_directory(path)
    assert wide.stat().st_mode & 0o777 == 0o775  # a user's own may be shared on purpose
    assert xla.private_directory(wide, tighten=True) == str(wide)
    assert wide.stat().st_mode & 0o777 == 0o700


def test_programs_that_others_could_put_there_are_not_run(tmp_path):
    anybodys = tmp_path / "anybodys"
    anybodys.mkdir()
    anybodys.chmod(0o777)
    with pytest.raises(PermissionError, match="anybody can replace"):
        xla.private_directory(anybodys / "cache")
    anybodys.chmod(0o1777)  # as /tmp is
    assert xla.private_directory(anybodys / "cache") == str(anybodys / "cache")
    with pytest.raises(PermissionError, match="others can write"):
        xla.private_directory(anybodys)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        xla.private_directory(tmp_path / "file")
    if os.geteuid() == 0:  # who else could give a directory away
        os.chown(anybodys / "cache", 4321, -1)
        with pytest.raises(PermissionError, match="belongs to somebody else"):
            xla.private_directory(anybodys / "cache")


def test_a_strangers_program_among_ones_own_is_refused(tmp_path, monkeypatch):
    (tmp_path / "jit_step-cache").write_bytes(b"")
    tmp_path.chmod(0o700)
    real = os.DirEntry.stat

    class Entry:
        """As `os.DirEntry`, of another owner."""

        def __init__(self, entry):
            self.entry, self.path = entry, entry.path

        def stat(self, follow_symlinks=True):
            fields = list(real(self.entry, follow_symlinks=follow_symlinks))
            fields[4] = os.geteuid() + 4321
            return os.stat_result(fields)

    scandir = os.scandir

    @contextlib.contextmanager
    def foreign(path):
        with scandir(path) as entries:
            yield [Entry(entry) for entry in entries]

    monkeypatch.setattr(os, "scandir", foreign)
    with pytest.raises(PermissionError, match="jit_step-cache belongs to somebody else"):
        xla.private_directory(tmp_path)
