"""Checks 2, 3 and 9: the bytes of the files, their formats, and what their pickles ask for."""

from __future__ import annotations

import hashlib
import io
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

from robust_ssl import disk, pickles
from robust_ssl.provenance.check import INSTALL, Check, absent, failed, passed, some
from robust_ssl.provenance.source import Source
from robust_ssl.weights import cards, classifiers, native, torch_pickle, torch_reader

_PICKLE_NAMES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle")
_CODE = (".py", ".so", ".dll", ".dylib", ".sh", ".exe")
_DESCRIBED = {
    native.CARD_FILE: native.WEIGHTS_FILE,
    classifiers.CARD_FILE: classifiers.HEAD_FILE,
}
_STREAM = 5  # pickles of torch's format before 1.6


def sums(source: Source) -> dict[str, dict[str, Any]]:
    """Returns length and SHA-256 of every file, by its path."""
    described = {}
    for name, file in source.files.items():
        with disk.open_regular(file) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            described[name] = {"bytes": stream.tell(), "sha256": digest}
    return described


def check_files(source: Source, lock: Mapping[str, Any] | None) -> Check:
    """Check 2: every file is that of the lock; without a lock, of its own card."""
    try:
        now = sums(source)
    except (OSError, ValueError) as error:
        return failed("files", f"a file cannot be read: {error}")
    if lock is None:
        return _against_cards(source, now)
    then = lock["files"]
    changed = [f"{name} has changed" for name in now if name in then and now[name] != then[name]]
    changed += [f"{name} is missing" for name in sorted(then.keys() - now.keys())]
    changed += [f"{name} is not in the lock" for name in sorted(now.keys() - then.keys())]
    if changed:
        return failed("files", some(changed), changed=changed, files=now)
    return passed("files", f"all {len(now)} files are those of the lock", files=now)


def _against_cards(source: Source, now: Mapping[str, Mapping[str, Any]]) -> Check:
    wrong = []
    for name, file in source.files.items():
        path = pathlib.PurePosixPath(name)
        if path.name not in _DESCRIBED:
            continue
        try:
            record = cards.decode(disk.read_bytes(file), name)
            cards.check_seal(record, name)
        except (ValueError, OSError) as error:
            wrong.append(str(error).splitlines()[0])
            continue
        beside = path.with_name(_DESCRIBED[path.name]).as_posix()
        said = record.get("weights") if isinstance(record, dict) else None
        if isinstance(said, dict) and now.get(beside, {}).get("sha256") != said.get("sha256"):
            wrong.append(f"{beside} is not the file that {name} describes")
    if wrong:
        return failed("files", some(wrong), changed=wrong, files=now)
    return absent(
        "files",
        "there is no lock to compare with: robust-ssl encoder lock SOURCE -o encoder.lock.json",
        files=now,
    )


# ------------------------------------------------------------------------------------- formats


def check_format(source: Source) -> Check:
    """Check 3: the format of each file, and that no pickle asks for what weights do not need."""
    formats, names, wrong = {}, {}, []
    for name, file in source.files.items():
        try:
            with disk.open_regular(file) as stream:
                formats[name], asked, problem = _look(name, file, stream)
        except (OSError, ValueError) as error:
            formats[name], asked, problem = "unreadable", [], str(error)
        if asked:
            names[name] = asked
        wrong += [f"{name}: {problem}"] if problem else []
    known = _inert(source)
    unsafe = sorted({n for asked in names.values() for n in asked if not _is_known(n, known)})
    evidence = {"formats": formats, "pickle_names": names, "unsafe": unsafe, "problems": wrong}
    evidence["inert"] = list(known)
    evidence["code"] = [name for name in formats if name.endswith(_CODE)]
    if unsafe:
        return failed("format", f"a pickle asks for {some(unsafe)}: do not open it", **evidence)
    if wrong:
        return failed("format", some(wrong, 2), **evidence)
    kinds = sorted({kind for kind in formats.values() if kind != "text"})
    passed_over = f"; passed over as harmless: {some(known)}" if known else ""
    note = f"; code lies beside it and is never run: {some(evidence['code'])}"
    said = f"{', '.join(kinds) or 'text'}; pickles ask for nothing that weights do not need"
    if not names:
        said = f"{', '.join(kinds) or 'text'}; no pickle is in it"
    return passed("format", said + passed_over + (note if evidence["code"] else ""), **evidence)


def _inert(source: Source) -> tuple[str, ...]:
    inert = source.options.get("inert", ())
    return (inert,) if isinstance(inert, str) else tuple(inert)


def _is_known(name: str, inert: tuple[str, ...]) -> bool:
    return torch_pickle.is_known(name, inert)


def _look(name: str, file: pathlib.Path, stream: BinaryIO) -> tuple[str, list[str], str]:
    """Returns format, names in pickles and what is wrong."""
    head = stream.read(512)
    stream.seek(0)
    suffix = pathlib.PurePosixPath(name).suffix
    if head[5:9] == b"\0\0\0{" or suffix == ".safetensors":
        return "safetensors", [], _safetensors_problem(file)
    if head.startswith(b"PK\x03\x04"):
        return _look_into_zip(stream)
    if torch_reader.LEGACY_MAGIC in head[:32]:
        return "torch legacy", *_names(stream, _STREAM)
    if head[:1] == b"\x80" or suffix in _PICKLE_NAMES:
        asked, problem = _names(stream, 1)
        return "pickle", asked, problem
    is_text = b"\0" not in head
    return ("text" if is_text else f"unknown ({suffix or 'no suffix'})"), [], ""


def _safetensors_problem(file: pathlib.Path) -> str:
    import safetensors

    try:
        with safetensors.safe_open(file, "numpy"):
            return ""
    except Exception as error:  # a header may be anything
        return f"it is no whole safetensors file ({error})"


def _look_into_zip(stream: BinaryIO) -> tuple[str, list[str], str]:
    asked, problems = [], []
    try:
        with zipfile.ZipFile(stream) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(_PICKLE_NAMES)]
            is_program = any("/code/" in name for name in archive.namelist())
            for member in members:
                if member.file_size > torch_pickle.PICKLE_LIMIT:
                    problems.append(f"{member.filename} has {member.file_size:,} bytes")
                    continue
                names, problem = _names(io.BytesIO(archive.read(member)), 1)
                asked += names
                problems += [problem] if problem else []
    except Exception as error:  # a damaged zip has many names
        return "zip", asked, f"the archive is damaged ({error})"
    if is_program:
        problems.append("it is a TorchScript program, which is run when it is loaded")
    return ("torch zip" if members else "zip"), sorted(set(asked)), "; ".join(problems)


def _names(stream: BinaryIO, count: int) -> tuple[list[str], str]:
    """Returns what pickles ask for by name, and why one cannot be read; nothing is looked up."""
    asked: dict[str, None] = {}

    def known(path: str) -> bool:
        asked[path] = None
        return True

    def stub(*args: Any) -> pickles.Stub:
        return pickles.Stub()

    rules = pickles.Rules("file of weights", known=known, call=stub, refer=stub)
    try:
        for _ in range(count):
            pickles.load(stream, rules)
    except ValueError as error:
        return list(asked), str(error)
    return list(asked), ""


def _is_harmless(name: str, file: pathlib.Path) -> bool:
    """Whether a scanner of pickles has nothing to look at: text, safetensors, or no file at all."""
    try:
        with disk.open_regular(file) as stream:
            return _look(name, file, stream)[0] in ("text", "safetensors")
    except (OSError, ValueError):
        return True  # a pipe would be read for ever; that it is none, other checks say


# ------------------------------------------------------------------------------------- a scanner


def check_scanner(source: Source) -> Check:
    """Check 9: what picklescan says of the files; an opinion."""
    try:
        from picklescan import scanner
    except ImportError:
        return absent("scanner", INSTALL)
    issues, scanned = [], 0
    for name, file in source.files.items():
        if _is_harmless(name, file):
            continue
        try:
            result = scanner.scan_file_path(str(file.resolve()))
        except Exception as error:  # a scanner meets what its makers have not
            issues.append(f"{name}: the scanner failed ({type(error).__name__})")
            continue
        scanned += result.scanned_files
        dangerous = [g for g in result.globals if g.safety.value == "dangerous"]
        issues += [f"{name}: {g.module}.{g.name}" for g in dangerous]
        issues += [f"{name}: cannot be scanned"] if result.scan_err else []
    said = f"picklescan looked at {scanned} pickles"
    if issues:
        return failed("scanner", f"{said} and warns of {some(issues)}", issues=issues)
    return passed("scanner", f"{said} and warns of nothing", issues=[])
