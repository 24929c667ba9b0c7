"""Links of the pages hold in the repository, and the site turns them into its own."""

import ast
import doctest
import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def _extension(name):
    sys.path.insert(0, str(ROOT / "docs/_ext"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def _pages():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md", "*.ipynb"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [name for name in listed if (ROOT / name).is_file()]


def _anchors(page):
    """Returns the anchors that GitHub and the site give to a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = [match[1].lower() for match in re.finditer(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", _pages())
def test_links_hold_in_the_repository(name):
    text = FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{name}: {link}"


def test_links_on_the_site():
    repository, reference = _extension("repository"), _extension("reference")
    for module in (repository, reference):
        assert not doctest.testmod(module).failed
    link = repository.site_link
    assert link("docs/results/speed.md", "../../benchmarks/README.md", "U") == (
        "../repository/benchmarks/README.md"
    )
    assert link("docs/api.md", "../robust_ssl/struct.py", "U") == "api/robust_ssl/struct/index.rst"
    assert link("CHANGELOG.md", "docs/results/", "U") == "../results/README.md"
    assert link("docs/index.md", "https://x.org/#a", "U") == "https://x.org/#a"
    assert link("docs/index.md", "#results", "U") == "#results"


def test_reference_names_modules_that_say_what_they_export():
    for name in _extension("reference").PUBLIC:
        assert importlib.util.find_spec(name), name
        assert (importlib.import_module(name).__doc__ or "").strip(), name


TASKS = sorted((ROOT / "docs/tasks").glob("*.md"))
CATALOGS = ROOT / "docs/locale/ja/LC_MESSAGES/tasks"
ENTRY = re.compile(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"\n)+)', re.MULTILINE)


def _catalog(page):
    """Returns the Japanese of a page by its English."""
    text = (CATALOGS / f"{page.stem}.po").read_text(encoding="utf-8")
    assert "#, fuzzy" not in text.partition("\n\n")[2], "a translation is to be looked at again"
    pairs = [[ast.literal_eval(f"({lines})") for lines in pair] for pair in ENTRY.findall(text)]
    return {english: japanese for english, japanese in pairs if english}


def _sentences(page):
    """Returns the paragraphs, headings and cells of a page that have words."""
    for block in FENCE.sub("", page.read_text(encoding="utf-8")).split("\n\n"):
        lines = block.strip().splitlines()
        cells = [cell for line in lines for cell in line.strip("|").split("|")]
        table = block.lstrip().startswith("|")
        for text in cells if table else [" ".join(lines)]:
            plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
            if re.search("[a-z]{3} [a-z]", plain):
                yield text.strip("# ")


@pytest.mark.parametrize("page", TASKS, ids=lambda page: page.stem)
def test_every_sentence_of_a_task_page_has_its_japanese(page):
    catalog = _catalog(page)
    missing = [text for text in _sentences(page) if not catalog.get(text)]
    assert not missing, f"run docs/build --catalogs, and translate: {missing}"


def test_the_japanese_readme_has_the_code_of_the_english_one():
    english, japanese = (
        FENCE.findall((ROOT / name).read_text(encoding="utf-8"))
        for name in ("README.md", "README.ja.md")
    )
    assert japanese == english
