"""Nothing in a foreign file of weights runs, is imported, or hangs the reader."""

import copyreg
import functools
import pickle
import struct

import numpy as np
import pytest
import torch_bytes
from torch_bytes import (
    CONTAINERS,
    NUMBERS,
    called,
    named,
    number,
    pickled,
    table,
    tensor,
    text,
    zipped,
)

from robust_ssl.weights import torch_pickle


@pytest.fixture
def read(tmp_path):
    return functools.partial(torch_bytes.read_bytes, tmp_path)


@pytest.fixture
def refused(tmp_path):
    return functools.partial(torch_bytes.refuse, tmp_path)


# --------------------------------------------------------------------- what would run, and does not

FIRED = []


class Trap:
    """Says so when anything of it runs."""

    def __new__(cls, *args, **kwargs):
        FIRED.append("__new__")
        return super().__new__(cls)

    def __setstate__(self, state):
        FIRED.append("__setstate__")


def fire(*args):
    FIRED.append("called")
    return {}


def short(string):
    return b"\x8c" + bytes([len(string)]) + string.encode()


TRAP, FIRE = f"{__name__}.Trap", f"{__name__}.fire"
TRAPS = {
    "REDUCE": called(FIRE),
    "BUILD": named(TRAP) + b")\x81" + table(a=number(1)) + b"b",
    "NEWOBJ": named(TRAP) + b")\x81",
    "NEWOBJ_EX": named(TRAP) + b")}\x92",
    "INST": b"(" + number(1) + f"i{__name__}\nTrap\n".encode(),
    "OBJ": b"(" + named(TRAP) + number(1) + b"o",
    "STACK_GLOBAL": short(__name__) + short("fire") + b"\x93)R",
    "EXT1": b"\x82\xf0)R",
    "EXT2": b"\x83\xf0\x00)R",
    "EXT4": b"\x84\xf0\x00\x00\x00)R",
}


@pytest.fixture
def _extension():
    copyreg.add_extension(__name__, "fire", 0xF0)
    yield
    copyreg.remove_extension(__name__, "fire", 0xF0)
    copyreg._extension_cache.pop(0xF0, None)


@pytest.mark.usefixtures("_extension")
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("opcode", TRAPS)
def test_no_instruction_runs_code(refused, container, opcode):
    FIRED.clear()
    pickle.loads(pickled(TRAPS[opcode], 4))
    assert FIRED  # the trap works: Python's own unpickler falls into it
    FIRED.clear()
    body = pickled(table(weight=tensor(), trap=TRAPS[opcode]), 4)
    match = "instruction" if opcode.startswith("EXT") else __name__
    refused(CONTAINERS[container](body), match)
    assert not FIRED


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("path", "argument"),
    [
        ("os.system", "touch {}"),
        ("posix.system", "touch {}"),
        ("subprocess.getoutput", "touch {}"),
        ("builtins.exec", "open({!r}, 'w').close()"),
        ("builtins.eval", "open({!r}, 'w').close()"),
        ("__builtin__.eval", "open({!r}, 'w').close()"),
        ("cProfile.run", "open({!r}, 'w').close()"),
        ("runpy.run_path", "{}.py"),
    ],
)
def test_a_hostile_file_touches_nothing(refused, tmp_path, container, path, argument):
    marker = tmp_path / "owned"
    program = tmp_path / "owned.py"
    program.write_text(f"open({str(marker)!r}, 'w').close()")
    payload = called(path, text(argument.format(str(marker))))
    pickle.loads(pickled(payload))
    assert marker.exists()  # the payload is real
    marker.unlink()
    for body in (payload, table(weight=tensor(), x=payload), payload + b"0" + table(w=tensor())):
        message = refused(CONTAINERS[container](pickled(body)), "nothing was run")
        assert path in message
    assert not marker.exists()


@pytest.mark.parametrize(
    ("body", "match"),
    [
        # A result of the file's own cannot be called, nor anything be set on what is allowed.
        (called("collections.OrderedDict") + b")R", "calls a dict"),
        (called("argparse.Namespace") + text("ls") + b"\x85R", "calls a Stub"),
        (named("collections.OrderedDict") + b"}R", "calls a Name"),
        (b"(" * 2000, "nested more than 1000 deep"),
        (b"\x96" + struct.pack("<Q", 1 << 60), "instruction"),  # a bytearray of an exabyte
        (text("x") + b"Q", "not a storage"),
        (b"P1\n", "not a storage"),
        (b"\xff", "damaged"),
        (b"h\x07", "damaged"),
        (b"0" * 3, "damaged"),
        (called("torch._utils._rebuild_tensor_v2", number(1)), "damaged"),
        (called("torch._utils._rebuild_tensor_v2", *[number(1)] * 6), "not a storage"),
    ],
)
def test_a_forged_pickle_is_refused(refused, body, match):
    refused(zipped(pickled(body, 4)), match)


def test_attributes_of_allowed_names_are_not_set(read):
    slots = table(__class__=number(1), path=text("os.system"), append=number(2))
    for target in (named("argparse.Namespace"), called("argparse.Namespace"), tensor()):
        weights = read(zipped(pickled(table(weight=tensor(), x=target + b"}" + slots + b"\x86b"))))
        np.testing.assert_array_equal(weights.tensors["weight"].ravel(), NUMBERS)
    assert torch_pickle.Name("a").path == "a" and torch_pickle.Stub().append(1) is None


def test_keys_that_hash_for_ever_are_inert(read):
    bomb = b")" + b"2\x86" * 60  # a tuple of two of itself, sixty times
    bombs = b"}(" + bomb + number(1) + b"u", b"}" + bomb + number(1) + b"s", b"(" + bomb + b"\x91"
    for body in (*bombs, b"(" + bomb + number(1) + b"d", b"\x8f(" + bomb + b"\x90"):
        weights = read(zipped(pickled(table(weight=tensor(), x=body), 4)))
        assert list(weights.tensors) == ["weight"]


def test_whole_keys_that_were_chosen_to_collide_are_inert(read):
    # Python's integers have equal hashes modulo 2**61 - 1: 20,000 of them took minutes.
    many = b"".join(
        b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 20_000)
    )
    weights = read(zipped(pickled(b"}(" + text("w") + tensor() + many + b"u")))
    assert list(weights.tensors) == ["w"]


def test_one_tensor_under_a_thousand_names_is_not_copied_a_thousand_times(refused):
    # Large enough that the numbers themselves would count; memoised once, named again and again.
    count = 2**16
    storages = {"0": bytes(4 * count)}
    once = tensor(count=count, shape=(2**8, 2**8), strides=(1, 2**8)) + b"q\x07"
    again = b"".join(text(f"w{i}") + b"h\x07" for i in range(100))
    body = pickled(b"}(" + text("w") + once + again + b"u")
    assert "it is forged" in refused(zipped(body, storages), "bytes and it holds")


def test_absurd_sizes_are_refused_by_name(refused):
    huge = b"\x8a\x09" + (2**64).to_bytes(9, "little")
    body = tensor().replace(number(3) + number(1), huge + number(1), 1)
    refused(zipped(pickled(b"}(" + text("w") + body + b"u")), "absurd")


# --- TorchScript: the tensors of a program, and no more ---------------------------------------

PROGRAM = [("archive/code/__torch__.py", b"import os"), ("archive/constants.pkl", b"no pickle")]
MODULE = named("__torch__.Net") + b")\x81"


def test_a_programs_modules_are_only_what_they_hold(read):
    inner = MODULE + table(weight=tensor(), training=number(1)) + b"b"
    body = pickled(MODULE + table(a=inner, b=inner, tag=text("x")) + b"b")
    assert set(read(zipped(body, extra=PROGRAM)).tensors) == {"a.weight", "b.weight"}


@pytest.mark.parametrize(
    ("body", "match"),
    [
        # A module that holds itself, and one that holds one twice that holds one twice, and so on.
        (MODULE + b"q\x00}" + text("a") + b"h\x00sb", "hold each other without an end"),
        (MODULE + b"q\x00" + b"".join(
            MODULE + b"q" + bytes([n + 1]) + table(a=b"h" + bytes([n]), b=b"h" + bytes([n])) + b"b"
            for n in range(40)), "hold each other without an end"),
        (MODULE + table(a=called("os.system")) + b"b", r"names os\.system"),
        (MODULE + table(a=named("torch.jit._unwrap")) + b"b", r"names torch\.jit\._unwrap"),
        (table(weight=tensor()), "program without a module"),
        (MODULE + number(3) + b"b", "tensors are under: nowhere"),
    ],
)  # fmt: skip
def test_a_program_that_is_forged_is_refused(refused, body, match):
    refused(zipped(pickled(body), extra=PROGRAM), match)


def test_only_a_program_may_name_its_own_classes(refused):
    refused(zipped(pickled(MODULE + table(w=tensor()) + b"b")), r"names __torch__\.Net")
