"""A set's archives on this machine: found or fetched, and known by their digests."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence

from robust_ssl.data.public.digests import file_digests
from robust_ssl.data.public.download import download
from robust_ssl.data.public.values import Archive, Files, PublicSet
from robust_ssl.progress import Progress

Say = Callable[[str], None]


def obtain(
    public: PublicSet,
    downloads: pathlib.Path,
    source: pathlib.Path | None = None,
    *,
    progress: Progress | None = None,
    say: Say = print,
) -> Files:
    """Returns where the archives of a set are; each has the digest it must have.

    Args:
      public: The set.
      downloads: Where fetched archives are, and stay.
      source: A copy of an archive, of any name, or a folder of them; then nothing is fetched.
      progress: How to report.
      say: Told of a digest that is trusted for it is the first one.

    Raises:
      ValueError: If a digest is another, or `source` does not have what is needed.
      FileNotFoundError: If `source` does not exist.
      DownloadError: If an archive cannot be fetched.
    """
    if source is not None:
        return _from_copies(public, downloads, source, say)
    files = {}
    for archive in _group(public, downloads):
        path = downloads / archive.file
        if not path.exists():
            download(archive.url, path, size=archive.size, progress=progress)
        wrong = _wrong(archive, path, downloads, say)
        if wrong:
            aside = path.with_name(f"{path.name}.wrong-digest")
            os.replace(path, aside)
            raise ValueError(
                f"{archive.file} from {archive.url} is not the published file: {wrong}\nit is kept "
                f"as {aside} and not used\nrun the command again to fetch it anew, or name a copy "
                "with --from"
            )
        files[archive.file] = path
    return files


def _group(public: PublicSet, downloads: pathlib.Path) -> Sequence[Archive]:
    """Returns the archives that are here already, of whatever kind, else the first kind."""
    for group in public.archives:
        if all((downloads / archive.file).exists() for archive in group):
            return group
    return public.archives[0]


def _from_copies(public, downloads, source: pathlib.Path, say: Say) -> Files:
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    problems = []
    for group in public.archives:
        files = {}
        for archive in group:
            path, problem = _copy(archive, group, downloads, source, say)
            if path is None:
                problems.append(problem)
                break
            files[archive.file] = path
        else:
            return files
    raise ValueError(
        f"{source} cannot be used for {public.name}:\n{chr(10).join(problems)}\nwhat is needed: "
        + ", or ".join(" and ".join(a.file for a in group) for group in public.archives)
    )


def _copy(archive: Archive, group: Sequence[Archive], downloads, source, say):
    """Returns the path of one archive's copy, or None and why there is none."""
    if source.is_file() and len(group) > 1 and source.name != archive.file:
        return None, f"{archive.file} is one of {len(group)} archives; name the folder of all"
    # In a folder the name decides; a file that is named itself may have any.
    path = source if source.is_file() else source / archive.file
    if not path.is_file():
        return None, f"there is no {archive.file}"
    wrong = _wrong(archive, path, downloads, say)
    what = "the published one" if path.name == archive.file else archive.file
    return (None, f"{path.name} is not {what}: {wrong}") if wrong else (path, "")


def _wrong(archive: Archive, path: pathlib.Path, downloads: pathlib.Path, say: Say) -> str:
    """Returns what is wrong with a file's digest; nothing if it is right."""
    digests = file_digests(path)
    expected = archive.digest or _first_seen(archive, digests["sha256"], downloads, say)
    kind, _, digest = expected.partition(":")
    if digests[kind] == digest:
        return ""
    first = "" if archive.digest else f", the first one seen ({_record(archive, downloads)})"
    return f"its {kind.upper()} is {digests[kind]}, not {digest}{first}"


def _first_seen(archive: Archive, digest: str, downloads: pathlib.Path, say: Say) -> str:
    """Trusts on first use: returns the digest that was seen first, which may be now."""
    record = _record(archive, downloads)
    seen = record.read_text(encoding="utf-8").split() if record.exists() else []
    if seen:
        return f"sha256:{seen[0]}"
    downloads.mkdir(parents=True, exist_ok=True)
    record.write_text(f"{digest}  {archive.file}\n", encoding="utf-8")
    say(
        f"no digest of {archive.file} is known; this one's SHA-256, {digest}, is trusted from now "
        f"on and recorded in {record}"
    )
    return f"sha256:{digest}"


def _record(archive: Archive, downloads: pathlib.Path) -> pathlib.Path:
    return downloads / f"{archive.file}.sha256"
