"""An edited function is another function, whatever kind of function it is."""

import functools
import os
import subprocess
import sys
import types

import jax
import pytest
import tiny

from robust_ssl import models
from robust_ssl.build import code_of, sources
from robust_ssl.experiment import context

HELPER = "def g(x):\n    return 1 * x\n"
PARTIAL = "import functools\ndef g(x, a):\n    return a * x\nP = functools.partial(g, a=1)\n"
OBJECT = (
    "class S:\n    def __init__(s, w):\n        s.w = w\n"
    "    def go(s, x):\n        return s.w * x\nK = S(1.0)\n"
)
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
    "flag": (
        "A = True\nB = False\nC = True\ndef f(x):\n    return x if A and B and C else 0\n",
        "C = True",
        "C = False",
    ),
    "entry": ("C = (1, 2, 1)\ndef f(x):\n    return C[2] * x\n", "2, 1)", "2, 2)"),
    "nested": ("C = ((1, 2), 3)\ndef f(x):\n    return C[0]\n", "(1, 2), 3", "(1,), 2, 3"),
    "frozen dataclass": (
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass S:\n    w: float = 1.0\n"
        "C = S(w=2.0)\ndef f(x):\n    return C.w * x\n",
        "w=2.0",
        "w=9.0",
    ),
    "slots": (
        "class S:\n    __slots__ = ('w',)\nC = S()\nC.w = 2.0\ndef f(x):\n    return C.w * x\n",
        "w = 2.0",
        "w = 9.0",
    ),
    "rule backward": (
        "import jax\n@jax.custom_vjp\ndef g(x):\n    return x\ndef fwd(x):\n    return x, 0\n"
        "def bwd(r, d):\n    return (1 * d,)\ng.defvjp(fwd, bwd)\ndef f(x):\n    return g(x)\n",
        "1 *",
        "2 *",
    ),
    "rule forward": (
        "import jax\n@jax.custom_jvp\ndef g(x):\n    return x\n@g.defjvp\n"
        "def rule(p, t):\n    return p[0], 1 * t[0]\ndef f(x):\n    return g(x)\n",
        "1 *",
        "2 *",
    ),
    "module's partial": (f"{PARTIAL}def f(x):\n    return P(x)\n", "a=1", "a=2"),
    "module's partial's body": (f"{PARTIAL}def f(x):\n    return P(x)\n", "a * x", "a + x"),
    "namespace": (
        "import types\nC = types.SimpleNamespace(w=2.0)\ndef f(x):\n    return C.w * x\n",
        "2.0",
        "9.0",
    ),
    "config": (
        "import ml_collections\nC = ml_collections.ConfigDict({'w': 2.0})\n"
        "def f(x):\n    return C.w * x\n",
        "2.0",
        "9.0",
    ),
    "path": ("import pathlib\nC = pathlib.Path('a')\ndef f(x):\n    return C\n", "'a'", "'b'"),
    "field": (f"{OBJECT}def f(x):\n    return K.go(x)\n", "S(1.0)", "S(2.0)"),
    "method": (f"{OBJECT}def f(x):\n    return K.go(x)\n", "s.w *", "s.w +"),
    "tuple of functions": (f"{HELPER}T = (g,)\ndef f(x):\n    return T[0](x)\n", "1 *", "2 *"),
    "dict of tuples": (
        f"{HELPER}T = {{0: (g, 2)}}\ndef f(x):\n    return T[0][0](x)\n",
        "1 *",
        "2 *",
    ),
    "dict of dicts": (
        f"{HELPER}T = {{0: {{1: g}}}}\ndef f(x):\n    return T[0][1](x)\n",
        "1 *",
        "2 *",
    ),
    "appended": ("T = []\nT.append(1.0)\ndef f(x):\n    return T[0] * x\n", "1.0", "9.0"),
    "listed name": ("W = 1.0\nT = [W]\ndef f(x):\n    return T[0] * x\n", "1.0", "9.0"),
    "library's, renamed": (
        "import jax\nACT = jax.nn.relu\ndef f(x):\n    return ACT(x)\n",
        "relu",
        "gelu",
    ),
    "cannot be followed": (
        "import numpy\nR = numpy.random.default_rng(1)\ndef f(x):\n    return R.normal() * x\n",
        "(1)",
        "(2)",
    ),
    "loop": (
        "class S:\n    pass\nK = S()\nK.me = K\nK.all = [K, 1.0]\nT = [K.all]\nT.append(T)\n"
        "def f(x):\n    return K.all[1] * x, T\n",
        "1.0",
        "9.0",
    ),
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
        "def f(x):\n    import users_other\n    return users_other.g(x)\n",
        "def f(x):\n    from users_other import g\n    return g(x)\n",
        "import users_other\ndef f(x):\n    return getattr(users_other, 'g')(x)\n",
    ],
)
def test_an_edit_in_another_file_is_noticed(text, tmp_path, monkeypatch):
    first = digest(tmp_path, monkeypatch, text)
    assert digest(tmp_path, monkeypatch, text, "def g(x):\n    return 2 * x\n") != first


# A network's `__call__`, which flax wraps, and what else is beside a class; C = 1.0 is edited.
NET = """
import flax.linen as nn
C = 1.0
class N(nn.Module):
    @nn.compact
    def __call__(s, x):
        return C * x
"""
OTHER = NET.replace("class N", "class M")
NETWORKS = {
    "constant": NET,
    "helper": NET.replace("C * x", "g(x)") + "def g(x):\n    return C * x\n",
    "sub-module": OTHER + NET.replace("C * x", "M()(x)"),
    "checkpointed sub-module": f"{OTHER}R = nn.remat(M)\n" + NET.replace("C * x", "R()(x)"),
    "base": f"{OTHER}class N(M):\n    pass\n",
    "compiled method": NET.replace("@nn.compact", "@nn.jit\n    @nn.compact"),
    "checkpointed": f"{OTHER}N = nn.remat(M)\n",
    "property": NET.replace("@nn.compact", "@property").replace("__call__", "scale"),
    "user's decorator": """
import functools
import flax.linen as nn
C = 1.0
def scaled(f):
    @functools.wraps(f)
    def g(s, x):
        return C * f(s, x)
    return g
class N(nn.Module):
    @scaled
    def __call__(s, x):
        return x
""",
    "wrapped dataclass": """
from robust_ssl import struct
C = 1.0
@struct.dataclass
class N:
    scale: float = C
""",
    "named tuple": "import typing\nC = 1.0\nclass N(typing.NamedTuple):\n    scale: float = C\n",
    "enum": "import enum\nC = 1.0\nclass N(enum.Enum):\n    SCALE = C\n",
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_a_class_with_wrapped_methods_uses_is_a_part_of_it(kind, tmp_path, monkeypatch):
    def digests(text):
        made = digest(tmp_path, monkeypatch, f"{text}def f(key):\n    return N\n")
        return made, code_of([sys.modules["users_own"].N])

    first = digests(NETWORKS[kind])
    edited = digests(NETWORKS[kind].replace("C = 1.0", "C = 2.0"))
    assert all(first) and digests(NETWORKS[kind]) == first
    assert first[0] != edited[0] and first[1] != edited[1]


def test_of_a_class_that_a_library_made_the_librarys_source_is_no_part(tmp_path, monkeypatch):
    digest(tmp_path, monkeypatch, f"{NETWORKS['checkpointed']}def f(key):\n    return N\n")
    read, source_of = [], sources.source_of
    monkeypatch.setattr("robust_ssl.build.code.source_of", lambda f: read.append(f) or source_of(f))
    assert code_of([sys.modules["users_own"].N])
    assert "M" in {f.__name__ for f in read} and "Module" not in {f.__name__ for f in read}


HEAD = """
import flax.linen as nn
import users_other
class N(nn.Module):
    num_classes: int = 2
    axis_name: str | None = None
    @nn.compact
    def __call__(s, x, *, train=False):
        return users_other.act(nn.Dense(s.num_classes)(x))
"""


@pytest.mark.parametrize("part", ["head", "encoder"])
def test_a_network_is_also_what_it_uses_of_another_file(part, tmp_path, monkeypatch):
    own = set()
    for other in ("def act(x):\n    return 1.0 * x\n", "def act(x):\n    return 0.0 * x\n"):
        digest(tmp_path, monkeypatch, HEAD, other)
        module = sys.modules["users_own"].N()
        encoder = tiny.encoder()
        if part == "head":
            model = models.classifier(jax.random.key(0), encoder, 2, head="linear")
            model = model.replace(head=module)
        else:
            model = encoder.replace(module=module)
        own.add(context.identity(model))
    assert len(own) == 2


def test_what_is_filled_while_running_is_no_edit(tmp_path, monkeypatch):
    first = digest(tmp_path, monkeypatch, "SEEN = []\ndef f(x):\n    SEEN.append(1)\n")
    sys.modules["users_own"].f(0)
    assert code_of("users_own:f") == first
    assert code_of("robust_ssl.losses:trades_kl") == {}


def test_a_module_imported_within_is_not_imported_by_looking(tmp_path, monkeypatch):
    text = "def f(x):\n    import users_other\n    return users_other.g(x)\n"
    first = digest(tmp_path, monkeypatch, text)
    assert "users_other" not in sys.modules
    sys.modules["users_own"].f(0)
    assert "users_other" in sys.modules and code_of("users_own:f") == first


# As it was before objects and wrappers were followed: directories of then are still those.
LASTING = {
    "body": "b153bda87a1e127b",
    "helper": "6c6bab272f468a9e",
    "number": "c4b649a450e6bc3d",
    "list": "338b37e462aa2822",
    "table": "aa606d231c3c2e2f",
    "array": "fa38c3da493a48cf",
    "partial": "5a23e864c9ef8862",
    "closure": "200a4c593ea7bce3",
    "decorator": "a83c77d6f8ca8e25",
    "jitted": "ae47656b87bb85e6",
    "base class": "2723d95de2e1c565",
    "default": "2493bd3973c9a05e",
}


@pytest.mark.parametrize("kind", LASTING)
def test_a_digest_stays(kind, tmp_path, monkeypatch):
    text = KINDS[kind][0]
    assert list(digest(tmp_path, monkeypatch, text).values()) == [LASTING[kind]]


SAME = """
import dataclasses, functools, flax.linen as nn
@dataclasses.dataclass(frozen=True)
class S:
    names: frozenset
class M(nn.Module):
    n: int = 1
class K:
    def __call__(s, x):
        return x
C = S(frozenset({"a", "b", "c", "d"}))
E = frozenset({lambda x: x, lambda x: x + 1})
k = K()
k.names = {"a", "b", "c", "d"}
k.module = M()
def g(x, t):
    return C, E, k(x), x in {"a", "b", "c"}
P = functools.partial(g, t=(C, k, object))
def f(x):
    return P(x)
"""


def test_a_fresh_process_finds_the_same(tmp_path):
    (tmp_path / "users_own.py").write_text(SAME)
    line = "from flax.linen import Dense; [Dense(1) for _ in range({})]; {}; print(code_of({}))"
    have = "from robust_ssl.build import code_of"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", line.format(number, have, "'users_own:f'")],
            env={**os.environ, "PYTHONHASHSEED": str(number), "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in (1, 2)
    ]
    assert outputs[0] == outputs[1] and "users_own:f" in outputs[0]


@pytest.mark.parametrize("kind", [types.FunctionType, types.MethodType, functools.partial])
def test_types_of_functions_have_no_code(kind):
    assert list(code_of([kind])) == [f"{kind.__module__}:{kind.__qualname__}"]


def test_an_encoder_is_also_its_preprocessing_function(tmp_path, monkeypatch):
    own = {}
    for text in ("def f(x):\n    return 1 * x\n", "def f(x):\n    return 2 * x\n"):
        digest(tmp_path, monkeypatch, text)
        encoder = tiny.encoder().replace(preprocess=sys.modules["users_own"].f)
        own[text] = context.identity(encoder)
    assert len({*own.values(), context.identity(tiny.encoder())}) == 3


def test_a_finder_that_fails_is_passed_over(tmp_path, monkeypatch):
    class Failing:
        def find_spec(self, name, path=None, target=None):
            raise KeyError("setuptools")

    (tmp_path / "finder_loss.py").write_text(
        "def loss(x):\n    import finder_other\n    return x\n"
    )
    (tmp_path / "finder_other.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_of("finder_loss:loss")
    monkeypatch.setattr(sys, "meta_path", [Failing(), *sys.meta_path])
    assert code_of("finder_loss:loss") == before != {}


def test_packages_of_another_environment_are_not_the_users(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "their_library.py").write_text("def f(x):\n    return x\n")
    (tmp_path / "my_loss.py").write_text(
        "import their_library\n\n\ndef loss(x):\n    return their_library.f(x)\n"
    )
    for place in (folder, tmp_path):
        monkeypatch.syspath_prepend(place)
    before = code_of("my_loss:loss")
    sys.modules["their_library"].f = lambda x: 2 * x
    assert code_of("my_loss:loss") == before != {}
