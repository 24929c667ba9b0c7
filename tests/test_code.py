"""An edited function is another function, whatever kind of function it is."""

import sys

import pytest

from robust_ssl.build import code_of

# What the module says, what is edited in it, and into what.
KINDS = {
    "body": ("def f(x):\n    return 1 * x\n", "1 *", "2 *"),
    "helper": ("def g(x):\n    return 1 * x\ndef f(x):\n    return g(x)\n", "1 *", "2 *"),
    "number": ("C = 3.0\ndef f(x):\n    return C * x\n", "3.0", "4.0"),
    "list": ("C = [1, 3.0]\ndef f(x):\n    return C[1] * x\n", "3.0", "4.0"),
    "table": (
        'def g(x):\n    return 1 * x\nT = {"g": g}\ndef f(x):\n    return T["g"](x)\n',
        "1 *",
        "2 *",
    ),
    "array": ("import numpy\nC = numpy.ones(3)\ndef f(x):\n    return C * x\n", "ones", "zeros"),
    "lambda": ("f = lambda x: 1 * x\n", "1 *", "2 *"),
    "two lambdas": ("a = lambda x: x\nb = lambda x: 1 * x\nf = lambda x: a(b(x))\n", "1 *", "2 *"),
    "partial": (
        "import functools\ndef g(x, a):\n    return a * x\nf = functools.partial(g, a=1)\n",
        "a=1",
        "a=2",
    ),
    "closure": (
        "def make(a):\n    def f(x):\n        return a * x\n    return f\nf = make(1)\n",
        "make(1)",
        "make(2)",
    ),
    "decorator": (
        "def twice(g):\n    def w(x):\n        return 2 * g(x)\n    return w\n"
        "@twice\ndef f(x):\n    return x\n",
        "2 *",
        "3 *",
    ),
    "jitted": ("import jax\n@jax.jit\ndef f(x):\n    return 1 * x\n", "1 *", "2 *"),
    "object": (
        "class K:\n    def __init__(self, a):\n        self.a = a\n"
        "    def __call__(self, x):\n        return self.a * x\nf = K(1)\n",
        "K(1)",
        "K(2)",
    ),
    "base class": (
        "class B:\n    def __call__(self, x):\n        return 1 * x\nclass f(B):\n    pass\n",
        "1 *",
        "2 *",
    ),
    "default": ("D = 3\ndef f(x, a=D):\n    return a * x\n", "D = 3", "D = 4"),
}


def digest(folder, monkeypatch, text, other="def g(x):\n    return x\n"):
    for name in ("users_own", "users_other"):
        sys.modules.pop(name, None)
    (folder / "users_own.py").write_text(text)
    (folder / "users_other.py").write_text(other)
    monkeypatch.syspath_prepend(folder)
    return code_of({"loss": "users_own:f"})


@pytest.fixture(autouse=True)
def _no_bytecode(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of two writes within a second
    yield
    for name in ("users_own", "users_other"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_noticed(kind, tmp_path, monkeypatch):
    text, before, after = KINDS[kind]
    first = digest(tmp_path, monkeypatch, text)
    assert first and digest(tmp_path, monkeypatch, text) == first
    assert digest(tmp_path, monkeypatch, text.replace(before, after, 1)) != first


@pytest.mark.parametrize(
    "text",
    [
        "from users_other import g\ndef f(x):\n    return g(x)\n",
        "import users_other\ndef f(x):\n    return users_other.g(x)\n",
    ],
)
def test_an_edit_in_another_file_is_noticed(text, tmp_path, monkeypatch):
    first = digest(tmp_path, monkeypatch, text)
    assert digest(tmp_path, monkeypatch, text, "def g(x):\n    return 2 * x\n") != first


def test_what_is_filled_while_running_is_no_edit(tmp_path, monkeypatch):
    first = digest(tmp_path, monkeypatch, "SEEN = []\ndef f(x):\n    SEEN.append(1)\n")
    sys.modules["users_own"].f(0)
    assert code_of("users_own:f") == first
    assert code_of("robust_ssl.losses:trades_kl") == {}
