"""The command line: exit codes, settings as one types them, and errors one can act on."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import pytest
from ml_collections import config_dict

import robust_ssl
from robust_ssl import progress, settings, stopping
from robust_ssl.cli import main, run
from robust_ssl.experiment import UsageError
from robust_ssl.workdir import ConfigChangedError, WorkdirError, open_stage

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from robust_ssl import settings

def get_config(arguments=None):
    chosen = settings.parse_arguments(arguments, {"downstream": "digits", "epsilon": 8 / 255})
    return ConfigDict({
        "seed": 0,
        "downstream": chosen["downstream"],
        "suite": {"epsilon": chosen["epsilon"], "curve": (0.1, 0.2), "random_start": True},
        "common": {"adv_ratio": 1.0, "limit": None, "rates": {"encoder/*": 1e-4}, "seeds": [0]},
        "width": placeholder(int),
    })
"""


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "gen_af.py"
    file.write_text(CONFIG)
    return str(file)


@pytest.fixture
def experiment(monkeypatch, tmp_path):
    """A stand-in for what runs; tests set its `run`."""
    fake = types.ModuleType("robust_ssl.experiment")
    fake.UsageError = UsageError
    fake.run = lambda config, workdir, *, parallel: {}
    fake.describe = settings.describe
    monkeypatch.setitem(sys.modules, "robust_ssl.experiment", fake)
    monkeypatch.setattr(robust_ssl, "experiment", fake, raising=False)
    monkeypatch.setattr(run, "_start_jax", lambda arguments, several: None)
    yield fake
    progress.set_mode("auto")
    stopping.clear_stop()


# --- settings ---------------------------------------------------------------------------------


def test_fractions_are_the_numbers_python_means():
    assert settings.parse_fraction("8/255") == 8 / 255
    assert settings.parse_fraction("3e-2") == 0.03
    for text in ("", "a/b", "1/0", "1/2/3", "nan", "inf"):
        with pytest.raises(settings.SettingsError, match="8/255"):
            settings.parse_fraction(text)


def test_only_numbers_are_expanded():
    unchanged = [
        "--config.path=runs/1/2",
        "--config.name=cifar10/3",
        "--config.date=2024/01/02",
        "--workdir=1/2",
    ]
    assert settings.expand_fractions(unchanged) == unchanged
    assert settings.expand_fractions(["--config.a.b=8/255"]) == [f"--config.a.b={8 / 255!r}"]
    assert settings.expand_fractions(["--config.a=[1/2,0.5]"]) == ["--config.a=[0.5,0.5]"]
    assert settings.expand_fractions(["--config.a=-1/4"]) == ["--config.a=-0.25"]


def test_arguments_have_the_type_of_their_defaults():
    defaults = {"name": "x", "epsilon": 0.1, "steps": 3, "fast": False, "path": None}
    text = "name=y, epsilon=10/255, steps=7, fast=true, path=a/b"
    assert settings.parse_arguments(text, defaults) == {
        "name": "y",
        "epsilon": 10 / 255,
        "steps": 7,
        "fast": True,
        "path": "a/b",
    }
    assert settings.parse_arguments(None, defaults) == defaults
    for wrong, message in [
        ("epsilom=1", "did you mean epsilon"),
        ("steps=1.5", "whole number"),
        ("fast=yes", "true or false"),
        ("epsilon=big", "epsilon=big"),
        ("cifar10", "known names: name, epsilon"),
        ("steps=1,steps=2", "twice"),
    ]:
        with pytest.raises(settings.SettingsError, match=message):
            settings.parse_arguments(wrong, defaults)


def test_a_config_is_loaded_and_overridden(config_file):
    overrides = [
        "--config.common.adv_ratio=0.5",
        "--config.suite.random_start=false",
        "--config.suite.curve=(4/255, 8/255)",
        "--config.common.limit=3",
        "--config.common.seeds=[1, 2]",
        "--config.common.rates['encoder/*']=1/1000",
        "--config.width=8",
        "--config.seed=1",
        "--config.seed=2",
    ]
    config = settings.load_config(config_file + ":downstream=gtsrb32,epsilon=10/255", overrides)
    assert settings.to_json(config) == {
        "seed": 2,
        "downstream": "gtsrb32",
        "suite": {"epsilon": 10 / 255, "curve": [4 / 255, 8 / 255], "random_start": False},
        "common": {
            "adv_ratio": 0.5,
            "limit": 3,
            "rates": {"encoder/*": 0.001},
            "seeds": [1, 2],
        },
        "width": 8,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.seed.deeper=1", "config.seed is 0 and has no 'deeper'"),
        ("--config.seed=1.5", "seed"),
        ("--config.common.adv_ratio=half", "adv_ratio"),
        ("--config.seed", "write --config.KEY=VALUE"),
    ],
)
def test_an_override_that_does_not_fit_is_an_error(config_file, override, message):
    with pytest.raises(settings.SettingsError, match=message):
        settings.load_config(config_file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "no get_config"),
        ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("def get_config(:", "SyntaxError"),
        ("def get_config():\n    return {}", "returned a dict"),
    ],
)
def test_a_config_file_that_fails_is_named(tmp_path, text, message):
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(settings.SettingsError, match=rf"broken\.py.*{message}|{message}.*broken"):
        settings.load_config(str(file))
    with pytest.raises(settings.SettingsError, match=r"did you mean .*broken\.py"):
        settings.load_config(str(tmp_path / "brokn.py"))


def test_json_has_no_nan_and_names_functions():
    config = config_dict.ConfigDict({"f": settings.parse_fraction, "a": 1})
    assert settings.to_json(config) == {"f": "robust_ssl.settings:parse_fraction", "a": 1}
    with pytest.raises(settings.SettingsError, match=r"config\.a\.b\[1\] is nan"):
        settings.to_json({"a": {"b": [1.0, float("nan")]}})
    with pytest.raises(settings.SettingsError, match=r"config\.a is <object"):
        settings.to_json({"a": object()})


def test_describe_says_what_functions_do_and_which_are_missing():
    text = settings.describe(
        {
            "losses": {"a/b": 1},
            "f": ["robust_ssl.stopping:stop_requested"],
            "g": "robust_ssl.stopping:stop_request",
        }
    )
    assert text.splitlines()[:3] == [
        'config.losses["a/b"] = 1',
        'config.f = ["robust_ssl.stopping:stop_requested"]',
        "    Returns whether somebody asked to stop; a stage asks after every step.",
    ]
    assert "NOT FOUND" in text and "stop_requested" in text.splitlines()[-1]


# --- the commands -------------------------------------------------------------------------------


def _call(command: str, config_file: str, tmp_path, *more: str) -> int:
    flags = [f"--config={config_file}", *more]
    if command == "run":
        flags.append(f"--workdir={tmp_path / 'run'}")
    return main.main([command, *flags])


def test_run_hands_over_config_workdir_and_devices(experiment, config_file, tmp_path):
    seen = {}
    experiment.run = lambda config, workdir, *, parallel: seen.update(
        config=config, workdir=workdir, parallel=parallel
    )
    flags = ["--config.suite.epsilon=4/255", "--devices=2", "--parallel=jit", "--no-progress"]
    assert _call("run", config_file, tmp_path, *flags) == 0
    assert seen["config"].suite.epsilon == 4 / 255
    assert seen["workdir"] == str(tmp_path / "run")
    assert len(seen["parallel"].devices) == 2 and seen["parallel"].kind == "jit"


MOVING = CONFIG.replace("    chosen =", "    __import__('os').chdir('/')\n    chosen =")


def test_a_config_that_changes_directory_moves_no_place_that_was_typed(
    experiment, config_file, tmp_path, capsys, monkeypatch
):
    from robust_ssl.cli import zoo

    pathlib.Path(config_file).write_text(MOVING)
    places = []
    experiment.run = lambda config, workdir, *, parallel: places.append(workdir)

    def build(configs, out, *, parallel):
        places.append(out)
        pathlib.Path(out).mkdir()
        (pathlib.Path(out) / "README.md").write_text("the table\n")
        return {}

    monkeypatch.setattr(zoo, "build", build)
    for command in (
        ("run", config_file, "--workdir=run"),
        ("zoo", "build", config_file, "--out=zoo"),
    ):
        monkeypatch.chdir(tmp_path)
        assert main.main([*command, "--cache-dir=cache"]) == 0, command
        assert pathlib.Path.cwd() == pathlib.Path("/")
    assert places == [str(tmp_path / "run"), str(tmp_path / "zoo")]
    out, err = capsys.readouterr()
    assert out == "the table\n" and "done: run\n" in err


def test_describe_prints_every_setting(experiment, config_file, tmp_path, capsys):
    assert _call("describe", config_file, tmp_path, "--config.seed=4") == 0
    out = capsys.readouterr().out
    assert "config.seed = 4" in out and "config.common.adv_ratio = 1.0" in out


def test_zoo_build_takes_many_configs_and_says_which_failed(
    config_file, tmp_path, capsys, monkeypatch
):
    from robust_ssl.cli import zoo

    seen = {}

    def build(configs, out, *, parallel):
        seen.update(configs=configs, parallel=parallel)
        (tmp_path / "zoo").mkdir()
        (tmp_path / "zoo" / "README.md").write_text("the table\n")
        return {"second": "ValueError: too small"}

    monkeypatch.setattr(zoo, "build", build)
    flags = [f"--config={config_file}", f"--config={config_file}", "--config.seed=7"]
    flags += [f"--out={tmp_path / 'zoo'}", "--devices=2"]
    assert main.main(["zoo", "build", *flags]) == 1
    assert [config.seed for config in seen["configs"]] == [7, 7]
    assert len(seen["parallel"].devices) == 2
    out, err = capsys.readouterr()
    assert out == "the table\n" and "second was not made: ValueError: too small" in err


def _raise(error):
    def fail(config, workdir, *, parallel):
        raise error

    return fail


def test_errors_have_their_exit_code_and_no_traceback(experiment, config_file, tmp_path, capsys):
    for error, code in [
        (UsageError("adv_ratio is 2"), 2),
        (ConfigChangedError("seed: 0 -> 1"), 2),
        (WorkdirError("cannot write"), 2),
        (ValueError("shapes"), 1),
        (RuntimeError("out of memory"), 1),
        (stopping.Stopped("stopped at step 7"), 75),
        (KeyboardInterrupt(), 75),
    ]:
        experiment.run = _raise(error)
        assert _call("run", config_file, tmp_path) == code, error
        err = capsys.readouterr().err
        assert str(error) in err
        assert "Traceback" not in err
        assert ("run the same command again" in err) == (code == 75)
    experiment.run = _raise(RuntimeError("out of memory"))
    assert _call("run", config_file, tmp_path, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_second_interrupt_says_where_it_was(experiment, config_file, tmp_path, capsys):
    def interrupted(config, workdir, *, parallel):
        with progress.Progress("quiet").stage("recipes/gen_af-seed0", total_steps=9) as bar:
            bar.update(4, loss=1.0)
            raise KeyboardInterrupt

    experiment.run = interrupted
    assert _call("run", config_file, tmp_path) == 75
    assert capsys.readouterr().err.splitlines()[-1] == (
        "robust-ssl: interrupted at step 4 of 9 of recipes/gen_af-seed0; the last checkpoint is "
        "kept; run the same command again to go on"
    )


def test_what_has_no_checkpoint_promises_none(config_file, tmp_path, capsys, monkeypatch):
    def interrupted(arguments, overrides):
        raise KeyboardInterrupt

    for command in (
        ["describe", config_file],
        ["show", str(tmp_path)],
        ["encoder", "inspect", "x"],
    ):
        monkeypatch.setattr(main._COMMANDS[command[0]], "run", interrupted)
        assert main.main(command) == 75
        assert capsys.readouterr().err == "robust-ssl: interrupted\n"
    monkeypatch.setattr(main._COMMANDS["audit"], "run", interrupted)
    assert main.main(["audit", "run", f"--workdir={tmp_path}"]) == 75
    assert "the last checkpoint is kept; run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.seed.deeper=1", "config.seed is 0 and has no 'deeper'"),
        ("--devices=99", "num_devices=99"),
        ("--num-processes=2", "give all three"),
    ],
)
def test_wrong_usage_is_2_and_says_what_to_do(
    experiment, config_file, tmp_path, capsys, flag, message
):
    assert _call("run", config_file, tmp_path, flag) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platforms", "error", "message"),
    [
        ("cuda", AssertionError(), "device here: install '.[cuda12]', or unset it\n"),
        ("gpu", RuntimeError("Unable to initialize backend 'rocm': no"), "install '.[cuda12]', or"),
        ("tpu", RuntimeError("Unable to initialize backend 'tpu': no"), "unset it to take what"),
    ],
)
def test_a_platform_that_is_not_there_is_named(
    experiment, config_file, tmp_path, capsys, monkeypatch, platforms, error, message
):
    def missing():
        raise error

    monkeypatch.setattr(jax, "devices", missing)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert _call("run", config_file, tmp_path) == 2
    err = capsys.readouterr().err
    assert f"JAX_PLATFORMS={platforms}, but JAX finds no such device here" in err
    assert message in err


def test_other_errors_of_devices_stay_what_they_are(
    experiment, config_file, tmp_path, capsys, monkeypatch
):
    def late():
        raise RuntimeError("DEADLINE_EXCEEDED: the other processes have not come")

    monkeypatch.setattr(jax, "devices", late)
    assert _call("run", config_file, tmp_path) == 1
    assert "RuntimeError: DEADLINE_EXCEEDED" in capsys.readouterr().err


def test_a_changed_config_is_refused_through_the_command_line(
    experiment, config_file, tmp_path, capsys
):
    def open_one(config, workdir, *, parallel):
        open_stage(workdir, "stage1", settings.to_json(config), {}, config.seed)

    experiment.run = open_one
    assert _call("run", config_file, tmp_path) == 0
    assert _call("run", config_file, tmp_path) == 0
    assert _call("run", config_file, tmp_path, "--config.common.adv_ratio=1/2") == 2
    assert "config.common.adv_ratio: 1.0 -> 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["run"], ["train"], ["run", "--config=a.py", "--workdir=b", "--confg.x=1"]]
)
def test_flags_argparse_does_not_know_are_2(argv):
    with pytest.raises(SystemExit) as caught:
        main.main(argv)
    assert caught.value.code == 2


def test_the_cache_has_a_home(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run._cache_directory(None) == str(tmp_path / "robust_ssl" / "xla")
    assert (tmp_path / "robust_ssl" / "xla").is_dir()
    assert run._cache_directory("") is None
    assert run._cache_directory(str(tmp_path / "own")) == str(tmp_path / "own")
    (tmp_path / "file").write_text("")
    assert run._cache_directory(str(tmp_path / "file" / "no")) is None


def test_help_and_mistakes_do_not_wait_for_jax():
    code = (
        "import sys; from robust_ssl.cli import main\n"
        "try: main.main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert main.main(['run', '--config=none.py', '--workdir=x']) == 2\n"
        "assert 'jax' not in sys.modules, 'imported too early'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


# A small stage that saves when it is asked to stop; the module stands in for the real one.
SCRIPT = """
import sys, time, types
fake = types.ModuleType("robust_ssl.experiment")
class UsageError(ValueError): pass
fake.UsageError = UsageError

def run(config, workdir, *, parallel):
    import jax.numpy as jnp
    from robust_ssl import stopping
    from robust_ssl.workdir import open_stage
    with open_stage(workdir, "stage1", {}, {}, seed=0) as stage:
        if stage.done:
            return
        step, state = stage.restore_latest({"w": jnp.zeros(3)}) or (0, {"w": jnp.zeros(3)})
        print("from", step, len(parallel.devices), flush=True)
        while step < 3 or not step_limit():
            state, step = {"w": state["w"] + 1}, step + 1
            if stopping.stop_requested():
                stage.save(step, state)
                raise stopping.Stopped(f"stopped at step {step}")
            time.sleep(0.01)
        stage.finish({"w": state["w"].tolist()})

def step_limit():
    return "--finish" in sys.argv

fake.run = run
sys.modules["robust_ssl.experiment"] = fake
from robust_ssl.cli import main
sys.exit(main.main([a for a in sys.argv[1:] if a != "--finish"]))
"""


def test_sigterm_saves_and_the_same_command_goes_on(config_file, tmp_path):
    script = tmp_path / "run_it.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    command = [
        sys.executable,
        str(script),
        "run",
        f"--config={config_file}",
        f"--workdir={tmp_path / 'run'}",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline().startswith("from 0")
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopping after this step" in err and "run the same command again" in err
    saved = [int(entry.name) for entry in (tmp_path / "run/stage1/checkpoints").iterdir()]
    again = subprocess.run(
        [*command, "--finish"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert again.returncode == 0, again.stderr
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert again.stdout.split() == ["from", str(saved[0]), str(cores)]
    final = open_stage(tmp_path / "run", "stage1", {}, {}, seed=0).results
    assert final["w"] == [max(3, saved[0])] * 3


# --- Streams that are closed or full ----------------------------------------------------------

# A run of no work, as a process of its own: it logs, prints its answer and is done.
TALKING = """
import logging, sys, types
fake = types.ModuleType("robust_ssl.experiment")
fake.UsageError = type("UsageError", (ValueError,), {})

def run(config, workdir, *, parallel):
    from robust_ssl import progress, words
    for number in range(3):
        logging.getLogger("robust_ssl.some").warning("a line of the log")
        with progress.Progress("log").stage("some", total_steps=1) as bar:
            bar.update(1)
    print("a line of a library", file=sys.stderr)
    words.say("the answer", sys.stdout)
    print("a table")
    open(workdir, "w").write("made")

fake.run = run
sys.modules["robust_ssl.experiment"] = fake
from robust_ssl import settings
fake.describe = settings.describe
from robust_ssl.cli import main
sys.exit(main.main())
"""


def _talk(redirection, config_file, tmp_path, command="run"):
    script = tmp_path / "talk.py"
    script.write_text(TALKING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    line = f"{sys.executable} {script} {command} {config_file}"
    if command == "run":
        line += f" --workdir={tmp_path / 'made'}"
    return subprocess.run(
        ["bash", "-c", f"{line} {redirection}"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file here is always full")
@pytest.mark.parametrize(
    ("redirection", "code", "out", "err"),
    [
        (">&-", 0, "", "done: "),
        ("2>&-", 0, "the answer\na table\n", ""),
        (">&- 2>&-", 0, "", ""),
        (
            "2>/dev/full",
            *(0, "the answer\na table\nrobust-ssl: lines were lost: standard error "),
            "",
        ),
        (
            ">/dev/full",
            *(1, "", "robust-ssl: error: standard output cannot be written: No space left on de"),
        ),
        (">/dev/full 2>/dev/full", 1, "", ""),
    ],
)
def test_a_stream_that_is_closed_or_full_ends_no_run(
    redirection, code, out, err, config_file, tmp_path
):
    done = _talk(redirection, config_file, tmp_path)
    assert (tmp_path / "made").read_text() == "made", done.stderr
    assert done.returncode == code
    assert done.stdout.startswith(out) if out else not done.stdout
    assert err in done.stderr if err else not done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stderr.count("cannot be written") == err.count("cannot be written")  # once


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file here is always full")
def test_output_that_cannot_be_written_is_named(config_file, tmp_path):
    for command, argument in (("describe", config_file), ("--help", "")):
        done = _talk(">/dev/full", argument, tmp_path, command)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == (
            "robust-ssl: error: standard output cannot be written: No space left on device"
        )
    done = _talk("| head -c 1", config_file, tmp_path, "describe")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
