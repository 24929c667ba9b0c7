"""Pages of the repository that lie outside docs/, and links that lead there.

The pages are copied into docs/repository/ before each build, which Git ignores.  Links are written
for the repository, where they are read too.  On the site they lead to the copy, or, where a file
has no page, to the file in the repository.
"""

import pathlib
import posixpath
import re

import reference

ROOT = pathlib.Path(__file__).parents[2]
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "notebooks/*.ipynb",
    "robust_ssl/zoo/*/README.md",
)
COPIES = "repository"
_LINK = re.compile(r"(?<=\]\()[^()\s]+(?=\))")


def copied() -> list[str]:
    """Returns the repository's paths of the pages that are copied."""
    files = [file for pattern in PAGES for file in sorted(ROOT.glob(pattern))]
    return [file.relative_to(ROOT).as_posix() for file in files]


def _place(page: str, path: str) -> str:
    """Returns a link's path seen from the repository's root; a folder's is its README."""
    place = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    readme = posixpath.join(place, "README.md")
    return readme if (ROOT / readme).is_file() else place


def on_site(place: str) -> str | None:
    """Returns where a file of the repository lies under docs/, or None if it has no page.

    Example:
      >>> on_site("docs/attacks.md"), on_site("CHANGELOG.md"), on_site("setup.py")
      ('attacks.md', 'repository/CHANGELOG.md', None)
    """
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    if place.endswith(".py"):
        return reference.page_of(place)
    return f"{COPIES}/{place}" if place in copied() else None


def site_link(page: str, link: str, url: str, has_api: bool = True) -> str:
    """Returns a link as the site needs it.

    Args:
      page: The page that has the link, as a path of the repository.
      link: What is written there.
      url: Of the repository, for files that have no page.
      has_api: Whether the site has the API reference.

    Example:
      >>> site_link("docs/attacks.md", "../CHANGELOG.md#changed", "https://here")
      'repository/CHANGELOG.md#changed'
      >>> site_link("CHANGELOG.md", "setup.py", "https://here")
      'https://here/blob/main/setup.py'
    """
    path, mark, anchor = link.partition("#")
    place = _place(page, path)
    if not path or ":" in path or not (ROOT / place).exists():
        return link
    target = on_site(place)
    if target is None or (not has_api and (place.endswith(".py") or target == "api.md")):
        return f"{url}/blob/main/{place}"
    return posixpath.relpath(target, posixpath.dirname(on_site(page))) + mark + anchor


def _copy_pages(app, config):
    for page in copied():
        source, copy = ROOT / page, pathlib.Path(app.srcdir, COPIES, page)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file() or copy.read_bytes() != source.read_bytes():
            copy.write_bytes(source.read_bytes())


def _rewrite_links(app, docname, source):
    path = pathlib.Path(app.env.doc2path(docname)).relative_to(app.srcdir).as_posix()
    page = path.removeprefix(f"{COPIES}/") if path.startswith(f"{COPIES}/") else f"docs/{path}"
    url = app.config.html_theme_options["repository_url"]
    has_api = "autoapi.extension" in app.extensions
    source[0] = _LINK.sub(lambda match: site_link(page, match[0], url, has_api), source[0])


def setup(app):
    """Copies the pages first, and mends the links of each page as it is read."""
    app.connect("config-inited", _copy_pages)
    app.connect("source-read", _rewrite_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
