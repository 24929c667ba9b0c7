"""A file from the network onto the disk: resumed where it was cut off, never half there.

What has arrived lies in ``FILE.part`` until all of it has; then it is renamed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

from robust_ssl import disk
from robust_ssl.progress import Progress

try:
    import fcntl
except ImportError:  # where there are no locks of files
    fcntl = None

ATTEMPTS = 4  # in a row without a single new byte
TIMEOUT = 60.0  # seconds without an answer
_CHUNK = 2**20
_WORTH_ANOTHER_TRY = (408, 425, 429, 500, 502, 503, 504)


class DownloadError(OSError):
    """A file that could not be fetched, with the reason and the way out."""


class _Broken(Exception):  # noqa: N818 - never leaves this file
    """A transfer that ended early and may go on."""


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects from http(s) to http(s) only: a server must not name files of ours."""

    def redirect_request(self, request, file, code, message, headers, url):
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            file.close()
            raise DownloadError(f"{request.full_url} leads to {url}, which is not on the web")
        return super().redirect_request(request, file, code, message, headers, url)


def download(
    url: str,
    path: pathlib.Path,
    *,
    size: int | None = None,
    progress: Progress | None = None,
    attempts: int = ATTEMPTS,
    timeout: float = TIMEOUT,
    wait: Callable[[float], None] = time.sleep,
) -> pathlib.Path:
    """Fetches a file, or the rest of it.

    Args:
      url: Where it is, http or https.
      path: Where it goes; its folder is made if it is new.
      size: Bytes it must have; None takes what the server says.
      progress: How to report.
      attempts: How many tries in a row may bring nothing.
      timeout: Seconds without an answer that end a try.
      wait: Sleeps so many seconds between two tries.

    Returns:
      `path`.

    Raises:
      DownloadError: If the file cannot be fetched or written; what has arrived is kept.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url} is not on the web; only http and https are fetched")
    part = path.with_name(f"{path.name}.part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    # Its steps are MiB, so that rate and time left mean something.
    total = max(1, -(-(size or _CHUNK) // _CHUNK))
    bars = progress or Progress()
    with _alone(part), bars.stage(f"download {path.name}", total) as bar:
        failures = 0
        while True:
            before = _length(part)
            try:
                _fetch(url, part, size, timeout, lambda got: _report(bar, got, size))
                break
            except _Broken as error:
                # A slow line may break a hundred times: only standing still counts.
                failures = 1 if _length(part) > before else failures + 1
                if failures >= attempts:
                    raise DownloadError(_gave_up(url, part, size, str(error))) from error
                pause = min(2.0**failures, 30.0)
                # Said at once: the pauses are longer than most people wait without a word.
                bar.update(_length(part) // _CHUNK, doing=f"{error}; again in {pause:.0f} s")
                bar.display.show(bar)
                wait(pause)
        with _writing(path):
            os.replace(part, path)
            _state(part).unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _alone(part: pathlib.Path):
    """Keeps a second process from writing into the same part; one that is empty is not left."""
    if fcntl is None:
        yield
        return
    with _writing(part):
        file = part.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(
                f"another process is fetching {part}; wait until it is done, then run this again"
            ) from error
        try:
            yield
        finally:
            if part.exists() and not _length(part):
                part.unlink()


def _fetch(url, part, size, timeout, report) -> None:
    have = _length(part)
    if size is not None and have == size:
        return
    if size is not None and have > size:
        have = 0
    headers = {"User-Agent": "robust-ssl", "Accept-Encoding": "identity"}
    validator = _read_state(part, url)
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator:  # a file that has changed since then comes from its start
            headers["If-Range"] = validator
    opener = urllib.request.build_opener(_WebOnly)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        _judge(error, url, part)
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_reason(error)) from error
    with response:
        _receive(response, url, part, have, size, report)


def _judge(error: urllib.error.HTTPError, url: str, part: pathlib.Path) -> None:
    """Raises what an answer of 400 and above means."""
    if error.code == 416 and _length(part):  # what is here is no beginning of what is there
        os.truncate(part, 0)
        raise _Broken("what had arrived was not the beginning of the file") from error
    if error.code in _WORTH_ANOTHER_TRY:
        raise _Broken(f"the server answered {error.code} {error.reason}") from error
    raise DownloadError(
        f"{part.name.removesuffix('.part')} cannot be fetched: the server answered {error.code} "
        f"{error.reason}\n  {url}\nfetch it by other means and name it with --from"
    ) from error


def _receive(response, url, part, have, size, report) -> None:
    start, total = 0, _number(response.headers.get("Content-Length"))
    if response.status == 206:
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != have:
            os.truncate(part, 0)
            raise _Broken("the server sent another part than was asked for")
        start, total = have, _number(match[2])
    if None not in (size, total) and total != size:
        raise DownloadError(
            f"{url} has {total:,} bytes, not {size:,}: it is another file now\nfetch the published "
            "one by other means and name it with --from"
        )
    with _writing(part):
        _write_state(part, url, response.headers)
        file = part.open("ab" if start else "wb")
    with file:
        got = start
        while True:
            try:
                chunk = response.read1(_CHUNK)  # what is there, not a whole chunk or nothing
            except (OSError, http.client.HTTPException) as error:
                raise _Broken(_reason(error)) from error
            if not chunk:
                break
            with _writing(part):
                file.write(chunk)
                file.flush()
            got += len(chunk)
            report(got)
    if total is not None and got < total:
        raise _Broken(f"the connection ended after {got:,} of {total:,} bytes")


@contextlib.contextmanager
def _writing(path: pathlib.Path):
    """Names the path and the way out where the disk is at fault."""
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"{path} cannot be written: {error.strerror or error}\nmake room, or take another "
            "place with --data-dir; the same command goes on with what has arrived"
        ) from error


def _gave_up(url: str, part: pathlib.Path, size: int | None, reason: str) -> str:
    of = f" of {size:,}" if size else ""
    return (
        f"{part.name.removesuffix('.part')} could not be fetched: {reason}\n  {url}\n"
        f"{_length(part):,}{of} bytes are in {part}\n"
        "the same command goes on there; or fetch the file by other means and name it with --from"
    )


def _reason(error: BaseException) -> str:
    cause = getattr(error, "reason", None) or error
    return f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__


def _report(bar, got: int, size: int | None) -> None:
    of = f" of {size / 1e6:,.0f}" if size else ""
    bar.update(min(got // _CHUNK, bar.total), doing=f"{got / 1e6:,.0f}{of} MB")


def _length(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


# Beside a part stands which file it is the beginning of.
def _state(part: pathlib.Path) -> pathlib.Path:
    return part.with_name(f"{part.name}.json")


def _write_state(part: pathlib.Path, url: str, headers) -> None:
    tag = headers.get("ETag", "")
    # A weak tag may stand for other bytes.
    validator = tag if tag.startswith('"') else headers.get("Last-Modified", "")
    _state(part).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")


def _read_state(part: pathlib.Path, url: str) -> str:
    try:
        state = disk.read_json(_state(part))
        return str(state["validator"]) if state["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
