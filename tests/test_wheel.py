"""What is published works for somebody who has nothing else: the wheel, and the tests of the sdist.

Dependencies come from the environment of the tests, behind the empty environment's own packages, so
that nothing is fetched.  Every command of the README's ``bash`` blocks is run, or checked, in an
empty folder; one that is not in `COMMANDS` fails, so that a new one is thought of.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

from robust_ssl.report import results

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")

OFFLINE = [
    "downstream.source=robust_ssl.data:digits",
    "surrogate.source=robust_ssl.data:photo_crops",
]
FEW = [f"recipes.{name}.epochs=1" for name in ("baseline", "gen_af_stage1", "gen_af")]
FEW += ["recipes.gen_af_stage1.scored=False", "common.batch_size=128", "suite.num_steps=2"]
LIMITS = ["downstream.train_limit=300", "downstream.test_limit=60", "surrogate.train_limit=128"]
SMALL = [*FEW, *LIMITS]
# Without the checkout, which is where the tests of this session may come from.
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
# By the longest beginning of a command: the command that is run for it, and what is added to make
# it small.  None leaves the command as it is.
COMMANDS = {
    "robust-ssl run quickstart --workdir=runs/quickstart": (None, [*SMALL, "--no-progress"]),
    # Once is enough: of others every step is traced.
    "robust-ssl run quickstart": ("robust-ssl check quickstart", SMALL),
    # Data that are not here: everything is read and traced, and nothing run.
    "robust-ssl run": ("robust-ssl check", OFFLINE),
    "robust-ssl sweep": ("robust-ssl check", OFFLINE),
    "robust-ssl check": (None, OFFLINE),
    "robust-ssl describe": (None, []),
    "robust-ssl show": (None, []),
    "robust-ssl list": (None, []),
    "robust-ssl config copy": (None, []),
    "robust-ssl encoder inspect": (None, []),
    "robust-ssl completion": (None, []),
    # From the network, or to a tracker that is not here: that there is such a command.
    "robust-ssl data": ("robust-ssl data --help #", []),
    "robust-ssl track": ("robust-ssl track --help #", []),
    "robust-ssl encoder": ("robust-ssl encoder --help #", []),
    "robust-ssl audit init": (None, []),
    "robust-ssl encoder lock": (None, []),
    "robust-ssl inspect": ("robust-ssl inspect --help #", []),
    "robust-ssl zoo": ("robust-ssl zoo build --help #", []),
}
OTHERS = ("pip ", "python -m venv", "source ", "pytest ", "git clone", "cd ", "tensorboard ", "#")


def commands(page: str) -> list[str]:
    """The commands of a page's ``bash`` blocks, lines joined and chains taken apart."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    chains = [part.strip() for line in lines for part in line.split(" && ")]
    return [" ".join(command.split()) for command in chains if command]


def small(command: str) -> str:
    """What is run for a command of the README."""
    # As a checkout's page may have it.
    command = re.sub(r"--config=configs/(\w+)\.py", r"\1", command)
    beginning = max(filter(command.startswith, COMMANDS), key=len, default=None)
    assert beginning, f"the README has {command!r}, of which {__name__}.COMMANDS knows nothing"
    instead, more = COMMANDS[beginning]
    if instead:
        command = instead + command.removeprefix(beginning)
        # Where another run of this test has been, it would be held against that.
        command = re.sub(r" --workdir=\S+", "", command)
    return " ".join([command, *map(shlex.quote, more)])


def files(page: str) -> dict[str, str]:
    """The files that the page has one write: blocks that begin with a comment of their name."""
    found = re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return dict(found)


def test_commands_are_found():
    page = "```bash\na b \\\n  c && d\n```\n```python\nno\n```\n```bash\n\ne\n```\n"
    assert commands(page) == ["a b c", "d", "e"]
    assert small("robust-ssl run --config=configs/score.py:a=b --workdir=x").startswith(
        "robust-ssl check score:a=b downstream.source="
    )
    assert files("```python\n# mine.py\nx = 1\n```\n```python\ny = 2\n```\n") == {
        "mine.py": "x = 1\n",
    }
    with pytest.raises(AssertionError, match="robust-ssl fly"):
        small("robust-ssl fly")


# --- Built once -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with sdist and wheel, the wheel made from the sdist as an installer would."""
    pytest.importorskip("build")
    place = tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(".git", "runs", "__pycache__", "*.egg-info", ".*_cache")
    # A copy: building leaves files behind, by which an installer would take the checkout for it.
    tree = shutil.copytree(ROOT, place / "tree", ignore=left_out)
    out = place / "out"
    # Without isolation: setuptools is here, and nothing has to be fetched.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, env=ALONE)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """The interpreter of an environment that has the wheel; dependencies come after it."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    site = pathlib.Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            text=True,
            env=ALONE,
        ).strip()
    )
    [wheel] = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q"]
    subprocess.run([*pip, str(wheel)], check=True, env=ALONE)
    # A plain path: no .pth file of that folder is read, so no editable install is in the way.
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def call(python, tmp_path_factory):
    """Runs a command in an empty folder, as somebody who has the wheel."""
    folder = tmp_path_factory.mktemp("empty")
    environment = {**ALONE, "PATH": f"{python.parent}{os.pathsep}{ALONE['PATH']}"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of it

    def call(command):
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    call.folder = folder
    return call


# --- The wheel ------------------------------------------------------------------------------------


def test_the_wheel_has_configs_and_types_and_no_tests(built):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA")]
    wanted = {f"robust_ssl/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    assert {*wanted, "robust_ssl/py.typed"} <= {*names}
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2 and "robust_ssl" in tops, tops
    assert "License-Expression: Apache-2.0" in metadata
    links = re.findall(r"\]\(([^)\s]+)\)", metadata.partition("\n\n")[2])
    assert links and all(link.startswith(("https://", "#")) for link in links)


def test_the_wheel_is_what_is_imported(call, python):
    where = "import robust_ssl; print(robust_ssl.__file__, robust_ssl.__version__)"
    file, version = call(f'python -c "{where}"').split()
    assert pathlib.Path(file).is_relative_to(python.parents[1])
    assert call("robust-ssl --version") == f"robust-ssl {version}\n"


def test_the_commands_of_the_readme_run(call):
    for name, text in files(PAGE).items():
        (call.folder / name).write_text(text)
    wanted = [command for command in commands(PAGE) if not command.startswith(OTHERS)]
    assert any("run" in command and "quickstart" in command for command in wanted)
    for command in sorted(wanted, key=lambda command: "quickstart" not in command):
        call(small(command))
        # What the page makes from other data is here what the quickstart has made.
        if not (call.folder / "runs" / "mine").exists():
            shutil.copytree(call.folder / "runs" / "quickstart", call.folder / "runs" / "mine")
    document = results.read(call.folder / "runs" / "quickstart" / "results.json")
    assert {entry["n"] for entry in document["results"]} == {60}
    assert (call.folder / "runs" / "quickstart" / "report.md").is_file()
    assert "gen_af" in call("robust-ssl show runs/quickstart")


def test_a_shipped_config_can_be_copied_and_checked(call):
    call("robust-ssl config copy gen_af mine/own.py")
    assert "gen_af_stage1" in call("robust-ssl describe mine/own.py seed=3")
    assert "quickstart" in call("robust-ssl list configs")


# --- The sdist ------------------------------------------------------------------------------------


def test_the_tests_of_the_sdist_run_there(built, tmp_path):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    for name in (
        "CHANGELOG.md",
        "LICENSE",
        "conftest.py",
        "docs",
        "benchmarks",
        "notebooks",
        ".ci",
    ):
        assert (folder / name).exists(), f"the sdist has no {name}"
    laws = ("a_config_begins_with_its_command", "a_config_names_what_exists")
    chosen = ["tests/test_main.py", "tests/test_cli_configs.py"]
    chosen += [f"tests/test_configs.py::test_{law}" for law in laws]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *chosen]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
