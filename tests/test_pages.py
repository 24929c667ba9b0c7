"""Pages, tables and figures of a run: nobody's notes are lost, and nothing is left out for good."""

import errno
import json

import pytest
from tiny_recipes import FROZEN, config, go

from robust_ssl import disk, report
from robust_ssl.experiment import pages
from robust_ssl.workdir import UnwritableError, open_stage, readable, write_pages

pytestmark = pytest.mark.usefixtures("quick_programs")


def scored():
    changed = config({"baseline": FROZEN}, "attack", "score")
    changed.scoring.update(checks=False, adaptive=False)
    changed.scoring.per_image.attacks = {}
    return changed


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    go(scored(), folder)
    return folder


@pytest.fixture
def full_disk(monkeypatch):
    """Makes a disk full for files of these suffixes."""

    def fill(*suffixes):
        replacing = disk.replacing

        def fails(path):
            if str(path).endswith(suffixes):
                raise OSError(errno.ENOSPC, "No space left on device")
            return replacing(path)

        monkeypatch.setattr(disk, "replacing", fails)

    return fill


@pytest.mark.parametrize("suffix", [".png", ".svg", "stability.csv"])
def test_a_figure_that_finds_no_room_is_drawn_by_the_next_start(workdir, full_disk, suffix):
    for file in (workdir / "figures").iterdir():
        file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "replacing", disk.replacing)
        full_disk(suffix)
        with pytest.raises(UnwritableError, match=r"cannot write .*figures/.*make room"):
            go(scored(), workdir)
    go(scored(), workdir)
    for name in ("examples", "stability"):
        for file in report.files_of(workdir / "figures" / f"{name}.png"):
            assert file.is_file() and f"figures/{file.name}" in record(workdir)


def record(workdir):
    return json.loads((workdir / pages.WRITTEN).read_text())["files"]


def test_what_only_the_drawing_lacks_ends_no_run(tmp_path, caplog, full_disk):
    def figure_broken(directory):
        raise FileNotFoundError("the font is not there")

    assert report.attempt(figure_broken, tmp_path) == []
    assert "the figure broken is left out: FileNotFoundError: the font" in caplog.text
    full_disk(".svg")
    with pytest.raises(UnwritableError, match="make room"):
        report.attempt(report.figure_sensitivity, tmp_path, {"conv": 1.0}, ["conv"])


def test_what_others_leave_among_the_figures_does_not_count(workdir, caplog):
    others = [".DS_Store", ".epsilon.png.2ef82ef82ef82ef8.tmp", "mine.png"]
    for name in others:
        (workdir / "figures" / name).write_text("others'")
    (workdir / "report.md").unlink()
    go(scored(), workdir)
    assert not {f"figures/{name}" for name in others} & record(workdir).keys()
    # Of before there are records that have them.
    sums = {**record(workdir), "figures/.DS_Store": {"bytes": 1, "sha256": "0"}}
    readable.write_record(workdir / pages.WRITTEN, sums)
    (workdir / "figures" / ".DS_Store").unlink()
    caplog.clear()
    go(scored(), workdir)
    assert "is written again" not in caplog.text
    assert (workdir / "figures" / "mine.png").read_text() == "others'"


def test_notes_in_a_report_are_kept_when_there_are_other_results(workdir):
    document = report.results.read(workdir / "results.json")
    document["results"][0]["robust_accuracy"] = 0.5
    (workdir / "results.json").write_text(json.dumps(document))
    with open(workdir / "report.md", "a") as page:
        page.write("my note")
    go(scored(), workdir)
    assert (workdir / "report.md.changed").read_text().endswith("my note")
    assert "my note" not in (workdir / "report.md").read_text()


def test_names_with_blanks_are_kept_too(tmp_path):
    file = tmp_path / "a recipe of mine.csv"
    file.write_text("written")
    readable.write_record(tmp_path / pages.WRITTEN, pages.sum_files(tmp_path, [file]))
    file.write_text("edited")
    assert not pages._as_written(tmp_path)
    assert (tmp_path / f"{file.name}.changed").read_text() == "edited"


# --- Pages of other stages ---------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path):
    with open_stage(tmp_path, "s", {}, {}, 0) as stage:
        stage.finish({})
    return stage


def test_a_page_is_written_once_and_edited_text_is_set_aside(stage, tmp_path, caplog):
    page = tmp_path / "page.md"
    for _ in range(2):
        write_pages(stage, {page: "ours"})
        before = page.stat().st_mtime_ns
    write_pages(stage, {page: "ours"})
    assert page.stat().st_mtime_ns == before and not caplog.text
    for number in ("", "1"):
        page.write_text(f"mine {number}")
        write_pages(stage, {page: "ours"})
        kept = f"page.md.changed{number}"
        assert page.read_text() == "ours" and (tmp_path / kept).read_text() == f"mine {number}"
        assert caplog.text.count(f"what was there is {kept}") == 1


def test_a_page_that_nobody_edited_gives_way_without_a_word(stage, tmp_path, caplog):
    page = tmp_path / "page.md"
    write_pages(stage, {page: "of an older version"})
    write_pages(stage, {page: "of this version"})
    assert page.read_text() == "of this version" and not caplog.text
    page.unlink()
    write_pages(stage, {page: "of this version"})
    assert page.read_text() == "of this version"
    assert "page.md is not there; it is written again" in caplog.text
    assert {file.name for file in tmp_path.iterdir()} == {"s", "page.md"}


def test_a_page_of_which_nothing_is_known_is_nobodys_to_destroy(stage, tmp_path, caplog):
    (tmp_path / "page.md").write_text("whose is it?")
    write_pages(stage, {tmp_path / "page.md": "ours"})
    assert (tmp_path / "page.md.changed").read_text() == "whose is it?"
    assert "what was there is page.md.changed" in caplog.text
