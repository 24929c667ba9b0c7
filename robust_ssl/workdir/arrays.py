"""Trees of arrays on disk, each with a checksum of its bits.

Orbax does the writing (in the background, committed by a rename, from several processes), but it
restores flipped bits and other dtypes without a word.  So a tree is stored as a flat mapping from
path to array, with a description of every array in the checkpoint's metadata.  Both are compared
when it is read.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import disk
from robust_ssl.parallel import everywhere
from robust_ssl.workdir.manifest import digest, write_atomically
from robust_ssl.workdir.paths import plain

_log = logging.getLogger(__name__)
TREE = "tree"  # the folder of the arrays inside a checkpoint
_SHOWN = 20  # differences listed in one error


class WrongTreeError(ValueError):
    """What is on disk has other paths, shapes or dtypes than what was asked for."""


class DamagedTreeError(RuntimeError):
    """What is on disk is not what was saved."""


def fingerprint(tree: Any) -> str:
    """Returns a short text that changes with any path, shape, dtype or bit of a tree of arrays.

    It does not depend on how the arrays lie on devices.

    Example:
      >>> zeros, negative = {"w": jnp.zeros(2)}, {"w": jnp.array([0.0, -0.0])}
      >>> fingerprint(zeros) == fingerprint({"w": np.zeros(2, np.float32)})
      True
      >>> fingerprint(zeros) == fingerprint(negative)
      False
    """
    return digest(_describe(_flatten(tree)))[:16]


def orbax_v1() -> Any:
    """Imports the V1 API of orbax, which its release 1.0 moves to the top level."""
    try:
        from orbax.checkpoint import v1
    except ImportError:
        import orbax.checkpoint as v1
    return v1


def with_checksums(
    tree: Any, origin: str = "", log: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what orbax saves in one commit: the arrays by path, and their description.

    `origin` says what they were made from, `log` is a checksum of what was logged until then;
    `record_of` gives both back.
    """
    leaves = _flatten(tree)
    description = _describe(leaves)
    # Orbax may still read a buffer while the next step, which was given it by donation, writes
    # into it: on CPU host and device memory are the same.  A copy on the host needs no program for
    # its shape, and no other one that cuts a part of it for each device.
    copies = {path: np.array(x) if _is_on_host(x) else x.copy() for path, x in leaves.items()}
    record = {"leaves": description, "origin": origin, "log": log}
    return copies, {**record, "sha256": digest(record)}


def record_of(path: str | os.PathLike) -> dict[str, Any]:
    """Returns what `with_checksums` was told beside a tree on disk.

    Raises:
      DamagedTreeError: If what describes the tree has changed.
    """
    return _record(plain(pathlib.Path(path)))


def is_committed(path: pathlib.Path, origin: str) -> bool:
    """Returns whether a tree has just been written whole, without reading its arrays.

    Orbax once left the arrays of each process where no reader looks, and said nothing.
    """
    described = origin in (path / "_CHECKPOINT_METADATA").read_text(encoding="utf-8")
    return described and (path / TREE / "manifest.ocdbt").exists()


def _record(path: pathlib.Path) -> dict[str, Any]:
    stored = orbax_v1().metadata(path, TREE).custom_metadata or {}
    record = {name: stored.get(name) for name in ("leaves", "origin", "log")}
    # Orbax logs a damaged JSON file and reads it as an empty one.
    if record["leaves"] is None or digest(record) != stored.get("sha256"):
        raise DamagedTreeError("the description of its arrays has changed")
    return record


def read_tree(path: str | os.PathLike, like: Any = None) -> Any:
    """Reads a tree that a stage directory saved.

    Args:
      path: The checkpoint's directory.
      like: The tree expected, of arrays or `jax.ShapeDtypeStruct`; every leaf arrives on the
        sharding of its counterpart, NumPy leaves as NumPy.  None for nested dicts of NumPy
        arrays, whatever the structure was.

    Raises:
      WrongTreeError: If paths, shapes or dtypes differ from those of `like`.
      DamagedTreeError: If a checksum does not agree.
      Exception: Whatever orbax raises for files it cannot understand.
    """
    ocp, path = orbax_v1(), plain(pathlib.Path(path))
    description = _record(path)["leaves"]
    expected = _numpy_like(description) if like is None else _flatten(like)
    _check_same(description, expected, path)
    abstract = {name: _abstract(leaf) for name, leaf in expected.items()}
    leaves = ocp.load(path, abstract, checkpointable_name=TREE)
    restored = _describe(leaves)
    changed = [name for name in restored if restored[name] != description[name]]
    if changed:
        raise DamagedTreeError(f"checksums do not agree in {', '.join(changed[:_SHOWN])}")
    if like is None:
        return _nest(leaves)
    leaves = [_place(leaves[name], leaf) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, such as ``params/encoder/stem/conv/kernel``."""
    leaves = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/") or "value"
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(f"{path} is {leaf!r}; only arrays can be saved")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{path} is a random key; save the integer it was made from")
        if path in leaves:  # {"a": {"b": x}, "a/b": y}
            raise ValueError(f"two leaves have the path {path}; rename one")
        leaves[path] = leaf
    return leaves


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def _kind(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(np.dtype(leaf.dtype))}


def _describe(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    sums = {
        path: _checksum_on_host(np.asarray(leaf)) if _is_on_host(leaf) else _checksum(leaf)
        for path, leaf in leaves.items()
    }
    sums = jax.device_get(sums)  # one wait for all
    return {path: {**_kind(leaf), "sum": int(sums[path])} for path, leaf in leaves.items()}


def _is_on_host(leaf: Any) -> bool:
    """Whether the host can read it where it lies: there a sum needs no program for its shape."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and {d.platform for d in leaf.devices()} == {"cpu"}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Returns the sum of all words times their odd weights, mod 2^32, uint32 scalar.

    An odd weight has an inverse mod 2^32, so no change of a single word goes unseen; the weights
    differ, so neither does an exchange of two words (but for those 2^31 places apart).
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _checksum_on_host(x: np.ndarray) -> int:
    """Returns what `_checksum` returns, for a NumPy array."""
    x = np.ascontiguousarray(x).reshape(-1)
    word = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    words = x.view(word).astype(np.uint32)
    weights = 2 * np.arange(words.size, dtype=np.uint32) + np.uint32(1)
    return int(np.sum(words * weights, dtype=np.uint32))


def _check_same(stored: Mapping[str, Any], expected: Mapping[str, Any], path: pathlib.Path) -> None:
    def text(kind):
        return f"{kind['dtype']}{kind['shape']}"

    differences = [f"{name}: missing on disk" for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected]
    differences += [f"{name}: on disk, but not asked for" for name in unknown]
    for name in expected:
        kind = _kind(expected[name])
        if name in stored and {**stored[name], **kind} != stored[name]:
            differences.append(f"{name}: {text(stored[name])} on disk, {text(kind)} asked for")
    if differences:
        more = len(differences) - _SHOWN
        lines = differences[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise WrongTreeError(f"{path} holds another tree:\n" + "\n".join("  " + x for x in lines))


def _numpy_like(description: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: np.empty(kind["shape"], jnp.dtype(kind["dtype"]))
        for name, kind in description.items()
    }


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(leaf)
    # Without a sharding orbax takes the one of saving, whose devices may be gone.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _place(restored: Any, like: Any) -> Any:
    """Frees an array again from its device where `like` was not committed to one."""
    if isinstance(like, jax.Array) and not like.committed:
        return jnp.asarray(np.asarray(restored))
    return restored


_OWN = ("__origin__", "__sha256__")  # entries beside the arrays


def save_arrays(file: pathlib.Path, arrays: Mapping[str, np.ndarray], origin: str = "") -> None:
    """Writes a part of a stage's work, so that an interrupted stage need not do it again.

    Args:
      file: A ``.npz``; its folder is made.  It is there whole or not at all.
      arrays: By name; text and numbers too.
      origin: What they were made from; `load_arrays` gives them for this one only.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    own = {"__origin__": np.asarray(origin), "__sha256__": np.asarray(_sum(arrays, file, origin))}
    buffer = io.BytesIO()  # whole in memory first: NumPy writes a file piece by piece
    np.savez(buffer, **arrays, **own)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, buffer.getvalue())


def load_arrays(file: pathlib.Path, origin: str = "") -> dict[str, np.ndarray] | None:
    """Returns what `save_arrays` wrote; None if nothing was.

    What is damaged, or was made from something else, is renamed with a word in the log, and counts
    as not there.  All processes ask together, and all get it or none: what is missing is made by
    all of them.
    """
    arrays = _read_arrays(file, origin)
    return arrays if everywhere(arrays is not None) else None


def _read_arrays(file: pathlib.Path, origin: str = "") -> dict[str, np.ndarray] | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None  # what cannot be read is made again
    try:
        arrays = disk.read_npz(io.BytesIO(content), disk.memory())
    except ValueError:  # a want of memory, say, is another error: the file may be intact
        return set_aside(file, "damaged", "is damaged")
    own = {name: str(arrays.pop(name, "")) for name in _OWN}
    if own["__sha256__"] != _sum(arrays, file, own["__origin__"]):
        return set_aside(file, "damaged", "is damaged, or was written by an older version")
    if own["__origin__"] != origin:
        return set_aside(file, "other", "was made with another config, seed, input or code")
    return arrays


def _sum(arrays: Mapping[str, np.ndarray], file: pathlib.Path, origin: str) -> str:
    described = []
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        bits = hashlib.sha256(array.tobytes()).hexdigest()
        described.append([name, list(array.shape), str(array.dtype), bits])
    return digest([file.name, origin, described])  # its name too: files may be exchanged


def set_aside(file: pathlib.Path, kind: str, why: str) -> None:
    """Renames what is not taken, so that what is made in its place destroys nothing."""
    target = file.with_name(f"{file.name}.{kind}")
    _log.warning("%s %s; renamed to %s, and made again", file, why, target.name)
    if jax.process_index() == 0:
        os.replace(file, target)
