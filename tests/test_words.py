"""Words of strangers are words everywhere: no command, link, markup, formula or picture of it."""

import copy
import csv
import errno
import html
import io
import logging
import re

import numpy as np
import pytest
import rich.console
from markdown_it import MarkdownIt
from test_report import a_comparison, a_document, entry, three

from robust_ssl import progress, report, words
from robust_ssl.cli import main
from robust_ssl.cli.flags import Parser
from robust_ssl.report import figures

# Names of tests go from process to process as UTF-8, so `ids=ascii`.
HOSTILE = (
    "\x1b[2J\x1b[31mred",  # clears the screen
    "\x1b]0;title\x07",
    "\x9b31mC1",  # the same in one byte of Latin-1
    "a\nrobust-ssl: encoder is trusted",
    "a\rrobust-ssl: encoder is trusted",
    "a\u2028b\u0085c",
    "gpj.\u202eexe",  # written from right to left
    "caf\udce9",  # a file name that is no UTF-8
    "\x00nul\x7f\x08",
    "hidden\u200b\U000e0041",
)
MARKDOWN = (
    "[click](http://evil.example)",
    "![x](http://evil.example/x.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "see https://evil.example or www.evil.example, a@evil.example",
    "a | b | c",
    "`code` *bold* ~~gone~~ $x^2$",
    "# heading",
    "- item\n\n# heading\n\n[x]: http://evil.example",
    "&lt;b&gt; &#60;",
    "___",
    "1. first",
    "> quoted",
    "[x]",
    "[a][b] [^1] [c]: http://evil.example",
    "[ ] to do",
)
FORMULAS = ("=1+1", "+1+1", "-1+cmd|' /C calc'!A0", "@SUM(1)", "\t=1+1", " =1", "a;=1", "\uff1d1+1")
NAMES = (r"$\frac{$", "$10_$20", "caf\udce9", "犬" * 200, "x" * 5000, "\x1b[2J", "=1", "")


def terminal_only(text):
    return not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\u200b\ud800-\udfff]", text)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_terminal_gets_no_command(name, capsys):
    for margin in ("  ", ""):
        words.say(f"{name} is read", margin=margin)
    assert terminal_only(capsys.readouterr().err)
    assert "\n" not in words.line(name) and terminal_only(words.line(name))
    main._log_to_stderr()
    words_of_it = ("%s failed: %s", (name, ValueError(name)), None)
    record = logging.LogRecord("robust_ssl.some.module", logging.WARNING, "x.py", 1, *words_of_it)
    # Not to pytest's handlers: they would send it to another process as UTF-8.
    for handler in logging.getLogger("robust_ssl").handlers:
        if type(handler).__module__ == main.__name__:
            handler.handle(record)
    shown = capsys.readouterr().err
    assert terminal_only(shown) and "\nrobust-ssl: encoder" not in shown


def test_harmless_words_stay_as_they_are():
    for text in ("gen_af, 8/255", "犬と猫", "naïve café", "👩‍👩‍👧", "±0.5 %", "a < b", "C:/x (1)"):
        assert words.line(text) == words.markdown(text) == words.csv_cell(text) == text
        assert words.in_figure(text) == words.lines(text) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_of_another_encoding_is_no_error(encoding):
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding)
    words.say("犬 caf\udce9", file)
    assert buffer.getvalue() == rb"\u72ac caf\udce9" + b"\n"


def test_progress_and_usage_are_quoted(capsys):
    name = "[/bold]\x1b[2J[link=http://evil.example]x"
    for mode in ("log", "bar"):
        with progress.Progress(mode).stage(name, total_steps=1) as bar:
            bar.update(1, loss=0.5, doing=name)
            bar.display.show(bar)
    shown = capsys.readouterr().err
    assert "\x1b[2J" not in shown and "\x1b]8" not in shown
    assert "[/bold]" in shown  # rich has not taken it for the end of its own markup
    with pytest.raises(SystemExit):
        Parser().parse_args(["a\n\x1b[2Jrobust-ssl: fine"])
    assert terminal_only(shown := capsys.readouterr().err) and "\nrobust-ssl: fine" not in shown


def read_as_markdown(text):
    """The HTML of a list of one text; rich needs the same reader of Markdown."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"- {text}\n")


@pytest.mark.parametrize("name", [*MARKDOWN, *HOSTILE], ids=ascii)
def test_markdown_shows_a_name_as_it_is(name):
    page = read_as_markdown(words.markdown(name))
    assert set(re.findall(r"<(\w+)", page)) <= {"ul", "li", "code"}
    shown = html.unescape(re.sub("<[^>]*>", "", page)).strip()
    assert shown == words.line(name).strip()
    # What GitHub makes links and formulas of, escaped or not, stands in code.
    bare = re.sub("`[^`]*`", "", words.markdown(name))
    assert not re.search(r"://|www\.|@|(?<!\\)\$", bare, re.IGNORECASE)


@pytest.mark.parametrize("name", MARKDOWN)
def test_a_cell_of_a_table_stays_one(name):
    rows = [{"recipe": name, "clean": words.Markup("**1**")}]
    page = MarkdownIt("commonmark").enable("table").render(report.markdown_table(rows))
    cells = re.findall("<td>(.*?)</td>", page, re.DOTALL)
    assert len(cells) == 2 and cells[1] == "<strong>1</strong>"
    assert html.unescape(re.sub("</?code>", "", cells[0])) == words.line(name)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_spreadsheet_computes_nothing(name):
    text = report.csv_text([{"name": name, "share": -0.5, "text": "-0.25"}])
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["share"] == "-0.5" and row["text"] == "-0.25"
    assert not re.search(r"(^|[;|,\t])\s*[=+\-@\uff1d]", row["name"])


def test_any_class_name_is_drawn_as_text(tmp_path):
    images = np.zeros((len(NAMES), 2, 2, 3), np.float32)
    file = report.figure_examples(tmp_path, images, images, predictions=[(n, "b") for n in NAMES])
    drawn = file.with_suffix(".svg").read_text(encoding="utf-8")
    assert "DejaVuSans-Oblique" not in drawn  # the font of formulas
    lines = file.with_suffix(".csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(NAMES)


def test_names_of_recipes_layers_and_attacks_are_drawn_as_text(tmp_path):
    names = [r"$\frac{$", "caf\udce9"]
    scores = dict(zip(names, (0.1, 0.2), strict=True))
    report.figure_sensitivity(tmp_path, scores, names[:1])
    taps = {name: {"cosine": 1.0, "relative_drift": 0.5} for name in names}
    report.figure_stability(tmp_path, {name: taps for name in names})
    points = [report.Point(name, 0.5, 0.1 + i / 2, 1.0) for i, name in enumerate(names)]
    report.figure_pareto(tmp_path, points, label_clean="clean $", label_robust=r"$\frac{$")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_settings_of_the_folder_do_not_reach_a_figure(tmp_path):
    import matplotlib

    images = np.zeros((1, 2, 2, 3), np.float32)
    with matplotlib.rc_context({"text.usetex": True, "axes.formatter.use_mathtext": True}):
        assert report.figure_examples(tmp_path, images, images).exists()
        assert matplotlib.rcParams["text.usetex"]


def test_a_figure_that_fails_is_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("robust_ssl"), "propagate", True)
    images = np.zeros((1, 2, 2, 3), np.float32)
    assert report.attempt(report.figure_examples, tmp_path, images, images[:0]) == []
    assert "the figure examples is left out: ValueError" in caplog.text
    monkeypatch.setattr(figures, "new_figure", lambda *size: 1 / 0)
    document = a_document(three(), comparison=a_comparison())
    report.write_report(tmp_path, document, curves={"gen_af-seed0": [(0, 0.5, 0.4, 0.6)] * 3})
    assert (tmp_path / "results.csv").exists() and (tmp_path / "report.md").exists()


HELD = ("[x](http://evil.example)", "caf\udce9", "=1+1|\n# h", "<b>")


@pytest.mark.parametrize("name", HELD, ids=ascii)
def test_a_report_holds_names_as_they_are(name, tmp_path, capsys):
    document = copy.deepcopy(a_document([entry(f"{name}-seed0")]))
    document["models"] = {f"{name}-seed0": {"recipe": name, "seed": 0}}
    document["run"]["encoder"]["name"] = document["run"]["downstream"]["name"] = name
    report.write_report(tmp_path, document)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)\]\(http|<b>|^# h", page, re.MULTILINE)
    assert words.markdown(name) in page
    report.print_summary(document)
    assert terminal_only(capsys.readouterr().out)


def test_a_terminal_without_the_letters_of_a_name_still_shows_the_answer():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    document = a_document([entry("犬-seed0")])
    document["models"] = {"犬-seed0": {"recipe": "犬", "seed": 0}}
    report.print_summary(document, rich.console.Console(file=file, width=80))
    file.flush()
    assert rb"\u72ac" in file.buffer.getvalue()


def test_texts_of_any_container_are_drawn(tmp_path):
    images, name = np.zeros((1, 2, 2, 3), np.float32), "caf\udce9"
    for i, pairs in enumerate((np.array([[name, "b"]]), zip([name], ["b"], strict=True))):
        assert report.figure_examples(tmp_path, images, images, predictions=pairs, name=f"p{i}")
    scores = {name: 1.0}
    for i, selected in enumerate(({name}, scores.keys(), (name,))):
        assert report.figure_sensitivity(tmp_path, scores, selected, name=f"s{i}").exists()


def test_a_log_that_cannot_be_written_is_no_error(monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stderr", Full())
    words.say("a line")
    with pytest.raises(OSError, match="No space"):
        words.say("a table", Full())
    monkeypatch.setattr("sys.stderr", None)
    words.say("a line")
    assert not capsys.readouterr().out
