"""Makes a release: checks what must agree, builds wheel and sdist, and tags the commit.

    python tools/release.py            # says what is missing, changes nothing
    python tools/release.py --tag      # builds into dist/ and makes the tag

The version stands in ``robust_ssl/__init__.py`` alone.  The changelog must have a section of it
with a date, CITATION.cff the same version, and the working tree no change.  Nothing is pushed and
nothing is uploaded: the commands for that are printed.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]


def version(root: pathlib.Path = ROOT) -> str:
    """Returns the version, read and not imported: jax need not be there."""
    text = (root / "robust_ssl" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[1]


def problems(root: pathlib.Path = ROOT) -> Iterator[str]:
    """Yields what stands in the way of a release."""
    number = version(root)
    if not re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", number):
        yield f"robust_ssl/__init__.py: {number!r} is not a version such as 0.2.0 or 0.2.0rc1"
    log = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(rf"^## \[?{re.escape(number)}\]?(.*)$", log, re.MULTILINE)
    if heading is None:
        yield f"CHANGELOG.md has no section {number}"
    elif not re.search(r"\d{4}-\d{2}-\d{2}", heading[1]):
        yield f"CHANGELOG.md: section {number} has no date; write '## {number} - YYYY-MM-DD'"
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    if not re.search(rf"^version: [\"']?{re.escape(number)}[\"']?$", citation, re.MULTILINE):
        yield f"CITATION.cff has another version than {number}"
    if _git(root, "status", "--porcelain"):
        yield "the working tree has changes; commit them"
    if _git(root, "tag", "--list", f"v{number}"):
        yield f"there is a tag v{number}; raise __version__"


def _git(root: pathlib.Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> int:
    """Checks, and with ``--tag`` builds and tags; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tag", action="store_true", help="build into dist/ and make the tag")
    options = parser.parse_args()
    found = list(problems())
    for problem in found:
        print(f"release: {problem}", file=sys.stderr)
    if found:
        return 1
    tag = f"v{version()}"
    if not options.tag:
        print(f"ready: {tag}; --tag builds and tags")
        return 0
    # `pip install build` first: it makes the sdist, and the wheel from it.
    subprocess.run([sys.executable, "-m", "build", "--outdir", "dist"], cwd=ROOT, check=True)
    _git(ROOT, "tag", "--annotate", tag, "--message", f"robust_ssl {tag}")
    print(f"made {tag}; to publish: git push origin {tag} && python -m twine upload dist/*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
