"""Members of tar and zip files, read in place: nothing is ever unpacked onto a disk.

So no name in an archive can lead out of a folder, and links are not followed.  How much an archive
may grow is bounded: pictures hardly compress, a bomb does nothing else.
"""

from __future__ import annotations

import contextlib
import gzip
import pathlib
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO

GROWTH_LIMIT = 100  # times the archive's size; the sets of the table stay below two
MEMBER_LIMIT = 2**28  # bytes of a file that is read at once; CIFAR-100's largest has 0.6 of it
_SLACK = 2**22  # bytes that any archive may hold: a tar of a few records is mostly padding
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile),
    NotImplementedError,  # what zipfile says of a compression that it does not know
)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Turns what damage raises into a ValueError that names the archive.

    Raises:
      ValueError: If the archive is damaged or hostile.
    """
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is damaged: {type(error).__name__}: {error}\nremove it and fetch it again"
        ) from error


def limit_of(path: pathlib.Path) -> int:
    """Returns how many bytes an archive may hold at most."""
    return GROWTH_LIMIT * path.stat().st_size + _SLACK


def refuse_growth(path: pathlib.Path) -> ValueError:
    """Returns the error for an archive that grows too much."""
    return ValueError(
        f"{path} holds more than {GROWTH_LIMIT} times its own size, or a file too large to be of "
        "the set; it is not the published file and may be hostile: nothing of it is used"
    )


class _Bounded:
    """A stream that ends in an error where it grows beyond a limit."""

    def __init__(self, file: BinaryIO, path: pathlib.Path):
        self._file, self._path, self._left = file, path, limit_of(path)

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise refuse_growth(self._path)
        return content


class Member:
    """A file in an archive, open for reading."""

    def __init__(self, file: BinaryIO, path: pathlib.Path):
        self._file, self._path = file, path

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes, all by default; damage is an error that names the archive."""
        with naming(self._path):
            return self._file.read(size)


def tar_members(path: pathlib.Path) -> Iterator[tuple[str, Member]]:
    """Yields name and content of each plain file of a tar, gzipped or not, in its order.

    A content must be read before the next member is asked for.

    Raises:
      ValueError: If the archive is damaged or grows too much.
    """
    with naming(path), contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        if file.read(2) == b"\x1f\x8b":
            file.seek(0)
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        else:
            file.seek(0)
        archive = stack.enter_context(tarfile.open(fileobj=_Bounded(file, path), mode="r|"))
        for member in archive:
            # Sparse ones invent bytes that are not in the archive.
            if member.isreg() and not member.issparse():
                yield member.name.removeprefix("./"), Member(archive.extractfile(member), path)


def tar_files(path: pathlib.Path, names: Collection[str]) -> dict[str, bytes]:
    """Returns the content of files of a tar, named without their folders.

    Raises:
      ValueError: If one is missing, or the archive is damaged.
    """
    contents = {}
    for name, file in tar_members(path):
        base = name.rpartition("/")[2]
        if base in names:
            contents[base] = file.read(MEMBER_LIMIT + 1)
            if len(contents[base]) > MEMBER_LIMIT:
                raise refuse_growth(path)
    missing = sorted(set(names) - set(contents))
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it is not the published file")
    return contents


Read = Callable[[], bytes]


@contextlib.contextmanager
def zip_members(path: pathlib.Path) -> Iterator[dict[str, Read]]:
    """Yields a function for each plain file of a zip that reads it, by name.

    Raises:
      ValueError: If the archive is damaged, encrypted or grows too much.
    """
    with naming(path), zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if not (m.is_dir() or _is_hidden(m.filename))]
        # Before anything is read: members may overlap, and each of them then counts.
        sizes = [member.file_size for member in members]
        if sum(sizes) > limit_of(path) or max(sizes, default=0) > MEMBER_LIMIT:
            raise refuse_growth(path)
        if any(member.flag_bits & 1 for member in members):
            raise ValueError(f"{path} is encrypted; it is not the published file")
        yield {member.filename: _reader(archive, member) for member in members}


def _reader(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Read:
    def read() -> bytes:
        with archive.open(member) as file:
            return file.read(member.file_size)

    return read


def _is_hidden(name: str) -> bool:
    # macOS leaves "__MACOSX/._name" beside each file that it packs.
    return name.rpartition("/")[2].startswith(".")
