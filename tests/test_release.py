"""A release is refused while version, changelog, citation and tags do not agree."""

import importlib.util
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("release", ROOT / "tools" / "release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)


@pytest.fixture
def ready(tmp_path):
    """A checkout that may be released."""
    (tmp_path / "robust_ssl").mkdir()
    (tmp_path / "robust_ssl" / "__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 - 2026-11-28\n")
    (tmp_path / "CITATION.cff").write_text('version: "1.2.0"\n')
    words = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", *words, *command], cwd=tmp_path, check=True)
    return tmp_path


def test_what_agrees_is_ready(ready):
    assert list(release.problems(ready)) == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("robust_ssl/__init__.py", '__version__ = "1.2"\n', "not a version"),
        ("robust_ssl/__init__.py", '__version__ = "1.3.0"\n', "no section 1.3.0"),
        ("CHANGELOG.md", "## 1.2.0 (unreleased)\n", "has no date"),
        ("CITATION.cff", "version: 1.1.0\n", "another version than 1.2.0"),
        ("new.txt", "", "has changes"),
    ],
)
def test_what_does_not_agree_is_named(ready, file, text, said):
    (ready / file).write_text(text)
    assert any(said in problem for problem in release.problems(ready))


def test_a_tag_is_made_once(ready):
    subprocess.run(["git", "tag", "v1.2.0"], cwd=ready, check=True)
    assert list(release.problems(ready)) == ["there is a tag v1.2.0; raise __version__"]


def test_the_version_stands_in_one_place():
    import robust_ssl

    assert release.version() == robust_ssl.__version__
