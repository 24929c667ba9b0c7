"""Configs by name, settings as bare words, copies of shipped configs, and what is published."""

import importlib.util
import pathlib
import sys
import types

import pytest

import robust_ssl
from robust_ssl import progress, settings, shipped, stopping
from robust_ssl.cli import flags, main, run

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """What `experiment.run` was called with; the current folder is an empty one."""
    calls = []
    fake = types.ModuleType("robust_ssl.experiment")
    fake.run = lambda config, workdir, *, parallel: calls.append(config)
    fake.describe = settings.describe
    monkeypatch.setitem(sys.modules, "robust_ssl.experiment", fake)
    monkeypatch.setattr(robust_ssl, "experiment", fake, raising=False)
    monkeypatch.setattr(run, "_start_jax", lambda arguments, several: None)
    monkeypatch.chdir(tmp_path)
    yield calls
    progress.set_mode("auto")
    stopping.clear_stop()


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["quickstart"], ["--config=quickstart"], ["--config", "quickstart"]]
)
def test_a_shipped_config_is_found_by_name_from_anywhere(seen, words):
    assert main.main(["run", *words, "--workdir=x"]) == 0
    assert seen == [settings.load_config(str(ROOT / "configs" / "quickstart.py"))]


def test_arguments_follow_the_name(seen):
    assert main.main(["run", "gen_af:downstream=cifar10,epochs=3", "--workdir=x"]) == 0
    [config] = seen
    assert (config.downstream.source, config.common.epochs) == ("cifar10", 3)


def test_a_file_is_what_ends_in_py_or_has_a_slash(tmp_path, seen):
    text = (
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': %d})"
    )
    (tmp_path / "quickstart.py").write_text(text % 1)
    (tmp_path / "quickstart").write_text(text % 2)  # not a config's file, and no name
    (tmp_path / "score").mkdir()
    for name, stages in [("quickstart.py", 0), ("./quickstart.py", 0), ("quickstart", 4)]:
        assert len(settings.load_config(name).get("stages", ())) == stages
    assert settings.load_config("score").stages  # a folder of that name is not in the way


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickstrat", r"no shipped config 'quickstrat'; did you mean quickstart\?.*list configs"),
        ("configs/quickstart.py", "the shipped one is called quickstart"),
        ("common", "no shipped config 'common'"),
        ("mine/plain.py:epochs=2", "takes no arguments, got 'epochs=2'"),
        ("gen_af:epoch=2", r"^gen_af: unknown argument 'epoch'; did you mean epochs"),
        ("nowhere/mine.py", "no config file nowhere/mine.py"),
        ("mine/results.json", "^mine/results.json is no config: .* ends in .py"),
    ],
)
def test_an_unknown_name_is_told_with_near_ones(seen, tmp_path, name, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "plain.py").write_text("def get_config(): pass")
    (tmp_path / "mine" / "results.json").write_text("{}")
    with pytest.raises(settings.SettingsError, match=message):
        settings.load_config(name)


@pytest.mark.parametrize("name", ["raises.py", "./raises.py", "{}/raises.py"])
def test_a_config_that_raises_is_told_with_its_line(seen, tmp_path, name):
    (tmp_path / "raises.py").write_text("def get_config():\n    raise ValueError('boo')\n")
    with pytest.raises(settings.SettingsError, match=r"raises\.py, line 2: ValueError: boo"):
        settings.load_config(name.format(tmp_path))


def test_a_config_does_not_end_the_command_by_itself(seen, tmp_path):
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(settings.SettingsError, match=r"exits\.py, line 2: SystemExit"):
        settings.load_config("exits.py")


def test_a_folder_is_no_config_to_be_advised(seen, tmp_path):
    (tmp_path / "configs.py").mkdir()
    with pytest.raises(settings.SettingsError, match=r"no config file \./configs\.py$"):
        settings.load_config("./configs.py")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coordinator=here", "--num-processes=1", "--process-id=0"], "write HOST:PORT"),
        (["--coordinator=here:x", "--num-processes=1", "--process-id=0"], "write HOST:PORT"),
        (["--coordinator=here:1", "--num-processes=2", "--process-id=2"], "count from 0 to"),
        (["--coordinator=here:1", "--num-processes=0", "--process-id=0"], "count from 0 to"),
    ],
)
def test_a_place_among_processes_that_cannot_be_is_refused(seen, capsys, words, message):
    assert main.main(["run", "quickstart", "--workdir=x", *words]) == 2
    assert message in capsys.readouterr().err and not seen


def test_a_cluster_that_is_none_is_named(monkeypatch):
    import jax

    def initialize(*place):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    given = types.SimpleNamespace(coordinator=None, num_processes=None, process_id=None)
    with pytest.raises(settings.SettingsError, match="not recognized: give --coordinator"):
        run._start_jax(given, True)


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["quickstart", "seed=1", "suite.epsilon=1/4"],
        ["quickstart", "--config.seed=1", "suite.epsilon=1/4"],
        ["--config.seed=1", "suite.epsilon=1/4", "--config=quickstart"],
        ["quickstart", "config.seed=1", "config.suite.epsilon=1/4"],
        ["seed=7", "quickstart", "--config.seed=8", "suite.epsilon=1/4", "seed=1"],
        ["quickstart", "seed=7", "suite.epsilon=1/4", "--no-progress", "--config.seed=1"],
        ["quickstart", "--config.mine={'a': 'b c'}", "d='e f'", "seed=1", "suite.epsilon=1/4"],
    ],
)
def test_settings_stand_anywhere_and_the_last_counts(seen, words):
    assert main.main(["run", "--workdir=x", *words]) == 0
    assert (seen[0].seed, seen[0].suite.epsilon) == (1, 0.25)


def test_what_a_setting_is():
    taken = [
        *("seed=1", "a.b.c=x", "recipes.mine={'function': 'm:f'}", "rates['encoder/**']=1e-3"),
        *("a.b-c=1", "path=a/b.py", "name=a:b", "empty="),
    ]
    others = ["gen_af:epochs=5", "a/b=c.py", "runs.d/x=1.py", "./a.py:b=1", "=1", "a b=1", "seed"]
    assert [text for text in taken + others if flags._KEY.match(text)] == taken


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which config?"),
        (["quickstart", "score"], "one config, not 2: quickstart score"),
        (["quickstart", "--config=score"], "one config, not 2: score quickstart"),
        (["quickstart", "seed", "=", "1"], "without spaces"),
        (["quickstart", "--device=2"], "--device=2; did you mean --devices"),
        (["quickstart", "--confg.seed=2"], "--confg.seed=2"),
    ],
)
def test_what_is_no_setting_is_refused(seen, words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["run", "--workdir=x", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_command_without_a_config_takes_no_settings(capsys):
    assert main.main(["config", "copy", "gen_af", "--config.seed=1"]) == 2
    assert "there is no config here: --config.seed=1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["config", "copy", "gen_af", "x", "seed=1"])


# --- Copies ---------------------------------------------------------------------------------------


def test_a_copy_brings_what_it_loads_and_is_the_same_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["config", "copy", "analyze", "mine/own.py"]) == 0
    assert {file.name for file in (tmp_path / "mine").glob("*.py")} == {
        *("own.py", "gen_af.py", "common.py"),
    }
    assert settings.load_config("mine/own.py") == settings.load_config("analyze")
    assert main.main(["config", "copy", "score", "mine"]) == 0  # shares common.py
    assert main.main(["config", "copy", "quickstart"]) == 0
    assert settings.load_config("quickstart.py") == settings.load_config("quickstart")


def test_nothing_is_overwritten(tmp_path, capsys):
    common = tmp_path / "common.py"
    common.write_text("mine")
    assert main.main(["config", "copy", "gen_af", str(tmp_path)]) == 2
    assert "common.py is there already and differs" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["common.py"]
    common.unlink()
    assert main.main(["config", "copy", "gen_af", str(tmp_path)]) == 0
    assert main.main(["config", "copy", "gen_af", str(tmp_path)]) == 2
    assert "gen_af.py is there already" in capsys.readouterr().err
    assert main.main(["config", "copy", "gen_af", str(tmp_path / "common.py")]) == 2
    assert "take another name" in capsys.readouterr().err
    assert main.main(["config", "copy", "gen_a", str(tmp_path)]) == 2
    assert "did you mean gen_af" in capsys.readouterr().err
    assert main.main(["config", "copy", "score", str(common / "in-a-file")]) == 2
    assert "cannot write to" in capsys.readouterr().err


# --- What is published ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packaging():
    spec = importlib.util.spec_from_file_location("robust_ssl_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_stands_once(packaging, capsys):
    assert packaging.version() == robust_ssl.__version__
    with pytest.raises(SystemExit) as caught:
        main.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"robust-ssl {robust_ssl.__version__}\n"


def test_links_of_the_index_page_lead_to_the_repository(packaging):
    text = "![p](docs/a.png) [g](./docs/a.md#x) [h](https://a.b/c) [i](#here) [m](mailto:a@b)\n"
    code = "```python\nx = [f](y)\n```\n"
    assert packaging.with_absolute_links(text + code + "[d](docs/)", "H") == (
        "![p](H/raw/main/docs/a.png) [g](H/blob/main/docs/a.md#x) [h](https://a.b/c) [i](#here) "
        "[m](mailto:a@b)\n" + code + "[d](H/blob/main/docs/)"
    )
    page = packaging.with_absolute_links((ROOT / "README.md").read_text())
    for _, target in packaging.LINK.findall(page):
        assert target.startswith(("https://", "#")), target


def test_shipped_configs_are_those_of_the_checkout():
    files = {file.stem for file in (ROOT / "configs").glob("*.py")}
    assert {*shipped.configs()} == files - {"common"}
    assert all(shipped.summary(file).endswith(".") for file in shipped.configs().values())
