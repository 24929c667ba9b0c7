"""Every block of code on the task pages is run, or at least read, as it stands there."""

import functools
import pathlib
import re
import shlex

import jax
import pytest

import robust_ssl
from robust_ssl import conformance, data, models, settings, weights
from robust_ssl.cli import main
from robust_ssl.cli.flags import take_settings

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/tasks").glob("*.md"))
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The pages have sizes that mean something; here they only have to run.
SMOKE = {r"\bnum_steps=\d+": "num_steps=2", r"\bepochs=\d+": "epochs=1"}


def _blocks(page, language):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for of, text in blocks if of == language]


def _small(text):
    for pattern, size in SMOKE.items():
        text = re.sub(pattern, size, text)
    return text


def _encoder(name):
    """A network that compiles quickly, in place of a shipped one."""
    return models.vision_transformer(
        jax.random.key(0), width=16, heads=2, depth=2, patch_size=16, image_size=32
    )


@pytest.fixture
def smoke(monkeypatch, tmp_path, quick_programs):
    """Few images and steps, in an empty folder."""
    digits = data.digits

    def few(split="train", *, image_size=32):
        return digits(split, image_size=image_size).subset(80 if split == "train" else 40, 0)

    monkeypatch.setattr(data, "digits", few)
    for name, options in {"attack": {"num_steps": 2}, "measure": {"examine": False}}.items():
        quick = functools.partial(getattr(robust_ssl, name), **options)
        monkeypatch.setattr(robust_ssl, name, quick, raising=False)
    load = weights.load_encoder
    shipped = set(weights.list_encoders())
    for module in (weights, robust_ssl):
        monkeypatch.setattr(
            module,
            "load_encoder",
            lambda name, **options: _encoder(name) if name in shipped else load(name, **options),
            raising=False,
        )
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page, smoke):
    if "import torch" in page.read_text(encoding="utf-8"):
        pytest.importorskip("torch")
    names = {"__name__": page.stem}
    for number, text in enumerate(_blocks(page, "python"), start=1):
        file = re.match(r"# (\w+\.py)\n", text)
        if file:
            pathlib.Path(file[1]).write_text(text, encoding="utf-8")
        code = compile(_small(text), f"{page.name}, python block {number}", "exec")
        exec(code, names)


def _commands():
    for page in PAGES:
        text = "\n".join(_blocks(page, "bash")).replace("\\\n", " ")
        for line in filter(None, text.splitlines()):
            yield pytest.param(line, id=f"{page.stem}: {' '.join(line.split())[:60]}")


@pytest.mark.parametrize("line", list(_commands()))
def test_commands_are_understood(line):
    program, *argv = shlex.split(line)
    assert program == "robust-ssl"
    arguments, unknown = main._parser().parse_known_args(argv)
    overrides = take_settings(arguments, unknown, argv)
    configs = getattr(arguments, "config", [])
    for config in [configs] if isinstance(configs, str) else configs:
        settings.load_config(config, overrides)


def test_the_front_pages_count_what_the_lists_have():
    counts = {"thirty": 30, "forty": 40, "40": 40, "fifty": 50}
    recipes = len(robust_ssl.list("recipes"))
    for name in ("README.md", "README.ja.md", "docs/index.md"):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        stated = re.findall(r"more than (\w+) (?:other )?(?:defenses|recipes)|(\d+) 以上の", text)
        assert stated, name
        for number in filter(None, sum(stated, ())):
            assert recipes - 10 < counts[number] < recipes, name


def test_the_kinds_of_things_of_ones_own_are_those_that_check_knows():
    text = (ROOT / "docs/tasks/loss.md").read_text(encoding="utf-8")
    kinds = re.findall(
        r"^\| (objective|attack|adversary|pre-training method)\b", text, re.MULTILINE
    )
    known = {"pre-training method": "method"}
    unknown = [kind for kind in kinds if known.get(kind, kind) not in conformance.KINDS]
    assert len(kinds) == 4 and f"knows each kind but the {' '.join(unknown)}." in text
