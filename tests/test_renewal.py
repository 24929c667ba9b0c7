"""A function of an edited file is the edited one, and its digest is that of the code that runs."""

import importlib
import logging
import os
import sys
import time

import pytest
import tiny

import robust_ssl
from robust_ssl import working_directory
from robust_ssl.build import as_loaded, code_of, renewal, resolve

LOSS = "def f(x):\n    return 1 * x\n"
USES = "import {}\nSCALE = 1\ndef f(x):\n    return SCALE * {}.g(x)\n"
HELP = "K = 1\ndef g(x):\n    return K * x\n"
RATES = {"encoder/**": "freeze", "head/**": 1e-2}
NAMES = ["fresh_loss:f", "fresh_loss.py:f", "./fresh_loss.py:f"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory; what its modules leave behind is forgotten."""
    users = set(working_directory._users)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("fresh_")]:
        del sys.modules[name]
    working_directory._users.intersection_update(users)


def write(file, text, seconds=0):
    """Writes a file within the second of the last one, so that bytecode could be taken for it."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    os.utime(file, (1e9 + seconds, 1e9 + seconds))


@pytest.mark.parametrize("name", NAMES)
def test_an_edited_file_is_loaded_again(name, folder, caplog):
    write(folder / "fresh_loss.py", LOSS)
    first, before = resolve(name), code_of(name)
    assert first(1) == 1 and resolve(name) is first and code_of(name) == before
    write(folder / "fresh_loss.py", LOSS.replace("1 *", "2 *"))
    with caplog.at_level(logging.WARNING):
        second = resolve(name)
    assert second(1) == 2 and first(1) == 1 and code_of(name) != before
    [line] = caplog.messages
    assert "fresh_loss.py changed: loaded again" in line
    assert resolve(name) is second and len(caplog.messages) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("style", ["import", "from", "within", "through another"])
def test_an_edited_helper_is_loaded_again_with_who_imports_it(name, style, folder, caplog):
    texts = {
        "import": USES.format("fresh_help", "fresh_help"),
        "from": "from fresh_help import g\ndef f(x):\n    return g(x)\n",
        "within": "def f(x):\n    from fresh_help import g\n    return g(x)\n",
        "through another": "from fresh_middle import g\ndef f(x):\n    return g(x)\n",
    }
    write(folder / "fresh_loss.py", texts[style])
    write(folder / "fresh_middle.py", "from fresh_help import K, g\n")
    write(folder / "fresh_help.py", HELP)
    before, digest = resolve(name), code_of(name)
    assert before(1) == 1
    # What a function imports when it is called has been looked at by nobody.
    write(folder / "fresh_help.py", HELP.replace("K = 1", "K = 2"), 2 * (style == "within"))
    after = resolve(name)
    assert after(1) == 2 and code_of(name) != digest
    assert style == "within" or before(1) == 1  # whoever holds it has all of it as it was


def test_two_functions_that_share_a_helper_have_the_same_one(folder):
    for name in ("fresh_one", "fresh_two"):
        write(folder / f"{name}.py", USES.format("fresh_help", "fresh_help"))
    write(folder / "fresh_help.py", HELP)
    assert resolve("fresh_one:f")(1) == resolve("fresh_two.py:f")(1) == 1
    write(folder / "fresh_help.py", HELP.replace("K = 1", "K = 2"))
    assert [resolve(name)(1) for name in ("fresh_one:f", "fresh_two.py:f")] == [2, 2]


def test_a_package_is_loaded_again(folder):
    write(folder / "fresh_kit" / "__init__.py", "from fresh_kit.scale import K\n")
    write(folder / "fresh_kit" / "scale.py", "K = 1\n")
    write(folder / "fresh_kit" / "loss.py", "from . import scale\ndef f(x): return scale.K * x\n")
    name = "fresh_kit.loss:f"
    assert resolve(name)(1) == 1
    write(folder / "fresh_kit" / "scale.py", "K = 2\n")
    assert resolve(name)(1) == 2
    assert sys.modules["fresh_kit"].K == 2


@pytest.mark.parametrize("edit", ["constant", "body"])
def test_a_module_that_was_imported_before_is_looked_at(edit, folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "fresh_help.py").write_text(HELP)
    own = importlib.import_module("fresh_help").g
    changes = {"constant": ("K = 1", "K = 22"), "body": ("K * x", "2 * K * x")}
    (folder / "fresh_help.py").write_text(HELP.replace(*changes[edit]))
    assert own(1) == 1 and resolve("fresh_help:g")(1) > 1


def test_the_digest_of_a_function_that_is_held_is_that_of_its_own_code(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "fresh_loss.py").write_text(LOSS)
    held = importlib.import_module("fresh_loss").f
    as_source = code_of([held])
    (folder / "fresh_loss.py").write_text("# a line above\n" + LOSS.replace("1 *", "2 *"))
    unseen = code_of([held])
    assert resolve("fresh_loss:f")(1) == 2
    new = code_of([resolve("fresh_loss:f")])
    assert len({*as_source.values(), *unseen.values(), *new.values()}) == 3


def test_what_is_held_keeps_its_source_after_the_file_is_loaded_again(folder):
    write(folder / "fresh_loss.py", USES.format("fresh_help", "fresh_help"))
    write(folder / "fresh_help.py", HELP)
    held = resolve("fresh_loss:f")
    digest = code_of([held])
    for file, text in (("fresh_loss.py", "# one more line\n" + LOSS), ("fresh_help.py", "g = 0\n")):
        write(folder / file, text)
        assert code_of([held]) == digest
    resolve("fresh_loss:f")
    assert code_of([held]) == digest


@pytest.mark.parametrize("name", NAMES)
def test_the_digest_is_that_of_the_code_that_is_loaded(name, folder):
    write(folder / "fresh_loss.py", LOSS)
    held, digest = resolve(name), code_of(name)
    write(folder / "fresh_loss.py", LOSS.replace("1 *", "2 *"))
    assert code_of(name) == digest  # nothing else has been loaded
    with as_loaded():  # as while a run is under way
        assert resolve(name) is held and code_of(name) == digest
    assert resolve(name)(1) == 2 and code_of(name) != digest


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_that_cannot_be_loaded_says_so_and_leaves_what_was(name, folder):
    write(folder / "fresh_loss.py", LOSS)
    held = resolve(name)
    write(folder / "fresh_loss.py", "def f(x:\n")
    with pytest.raises(SyntaxError) as raised:
        resolve(name)
    assert "changed since it was loaded: mend it, or restart" in "".join(raised.value.__notes__)
    with as_loaded():
        assert resolve(name) is held
    write(folder / "fresh_loss.py", LOSS.replace("1 *", "3 *"))
    assert resolve(name)(1) == 3


def test_what_is_not_the_users_is_never_loaded_again():
    module = importlib.import_module("robust_ssl.losses")
    resolve("robust_ssl.losses:trades_kl")
    resolve("optax:adam")
    assert sys.modules["robust_ssl.losses"] is module
    assert not renewal._is_users(sys.modules["optax"]) and not renewal._is_users(module)
    assert resolve(f"{__name__}:write") is write and resolve("tiny:encoder") is tiny.encoder


@pytest.mark.parametrize("name", NAMES[:2])
def test_check_and_secure_take_the_function_of_now(name, folder, monkeypatch):
    head = "import jax.numpy as jnp\n"
    write(folder / "fresh_loss.py", f"{head}def f(inputs):\n    return inputs.clean.logits[:, 0]\n")
    robust_ssl.check("loss", name)
    images, labels = tiny.images(n=16)
    recipe = {"losses": {"mine": name}, "head": "linear", "rates": RATES}
    options = {"recipe": recipe, "epochs": 1, "batch_size": 8, "progress": "quiet"}

    def bias():
        made = robust_ssl.secure(tiny.encoder(), images, labels, **options)
        return made.head_variables["params"]["linear"]["bias"]

    first = bias()
    write(
        folder / "fresh_loss.py", f"{head}def f(inputs):\n    return -inputs.clean.logits[:, 0]\n"
    )
    assert bias()[0] * first[0] < 0
    write(
        folder / "fresh_loss.py", f"{head}def f(inputs):\n    return inputs.clean.logits.mean()\n"
    )
    with pytest.raises(AssertionError, match="must return"):
        robust_ssl.check("loss", name)


def test_looking_costs_little(folder):
    write(folder / "fresh_loss.py", USES.format("fresh_help", "fresh_help"))
    write(folder / "fresh_help.py", HELP)
    resolve("fresh_loss:f")
    begun = time.perf_counter()
    for _ in range(20):
        resolve("fresh_loss:f")
    assert time.perf_counter() - begun < 2
