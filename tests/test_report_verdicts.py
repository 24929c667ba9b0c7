"""A figure that is not trusted is never shown without its mark."""

import csv

import pytest
from test_report import COSTS, entry, three

from robust_ssl import report
from robust_ssl.evaluation.checks import Check, Verdict
from robust_ssl.report.leaderboard import over_seeds, ranking

MODEL = tuple(Check(number, 0.0, 0.0, "passed", "") for number in range(1, 7))
FAILED = Check(16, 0.39, 0.002, "failed", "Square found more.", "Attack without gradients.")
BAD = Verdict((*MODEL, FAILED)).as_dict()
GOOD = Verdict(MODEL).as_dict()


def marked(model="stage2", **other):
    return entry(model, verdict="not trusted", robust=45, clean=45, **other)


def test_the_mark_is_in_every_table_and_sentence():
    results = [entry("usual", robust=10), marked()]
    for line in report.summary_table(results, COSTS).splitlines():
        if line.startswith("| secure stage 2"):
            assert "90.0 % (45/50" in line  # the clean accuracy needs no mark
            assert line.count("NOT TRUSTED") == 3  # robust accuracy and both rates
        else:
            assert "NOT TRUSTED" not in line
    sentences = report.conclusions(results)
    assert [("NOT TRUSTED" in sentence) for sentence in sentences] == [False, True, True]


def test_the_terminal_shows_the_mark_in_eighty_columns():
    import io

    import rich.console

    out = io.StringIO()
    report.print_table([marked()], COSTS, console=rich.console.Console(file=out, width=80))
    assert "NOT" in out.getvalue() and "TRUSTED" in out.getvalue() and "…" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_results_and_verdicts_must_agree(tmp_path):
    report.write_results(tmp_path / "r.json", {}, [marked()], {"stage2": BAD})
    assert (
        report.read_results(tmp_path / "r.json")["verdicts"]["stage2"]["verdict"] == "not trusted"
    )
    with pytest.raises(ValueError, match=r"\[0\]\.verdict: 'trusted', but .* 'not trusted'"):
        trusted = entry("stage2", verdict="trusted")
        report.write_results(tmp_path / "s.json", {}, [trusted], {"stage2": BAD})
    with pytest.raises(ValueError, match=r"verdict: 'trusted', but .* 'not examined'"):
        report.write_results(tmp_path / "s.json", {}, [entry("stage2", verdict="trusted")])
    assert not (tmp_path / "s.json").exists()


def test_a_verdict_is_what_its_checks_say(tmp_path):
    forged = {**BAD, "verdict": "trusted"}
    with pytest.raises(ValueError, match="'trusted' is not what its checks say"):
        trusted = entry("stage2", verdict="trusted")
        report.write_results(tmp_path / "r.json", {}, [trusted], {"stage2": forged})


def test_without_an_examined_model_there_is_no_trust():
    assert Verdict((Check(27, 0.0, 0.0, "passed", ""),)).word == "not examined"
    assert Verdict((*MODEL, Check(27, 0.0, 0.0, "passed", ""))).word == "trusted"


def test_one_line_then_only_what_did_not_pass(tmp_path):
    results = [entry("usual", verdict="trusted"), marked(), entry("stage1")]
    document = {"results": results, "verdicts": {"usual": GOOD, "stage2": BAD}}
    assert report.verdict_lines(document) == [
        "usual fine-tuning: trusted (6 of 6 checks passed)",
        "secure stage 1: not examined",
        "secure stage 2: not trusted (6 of 7 checks passed)",
        "  failed: 16 black box not stronger: 0.39 (limit 0.002). Square found more. "
        "Attack without gradients.",
    ]
    report.write_report(tmp_path / "report.md", {}, results, verdicts=document["verdicts"])
    text = (tmp_path / "report.md").read_text()
    assert "- secure stage 2: **not trusted** (6 of 7 checks passed)\n  - failed: 16 black" in text


def test_the_leaderboard_ranks_and_marks(tmp_path):
    results = [
        entry("ours", attack="a", robust=20, seed=0, verdict="trusted"),
        entry("ours", attack="a", robust=30, seed=1, verdict="trusted"),
        entry("ours", attack="worst", robust=18, verdict="trusted"),
        marked("theirs", attack="a", seed=0),
    ]
    assert ranking(results) == [(1, "ours"), (None, "theirs")]  # whatever its figure
    report.write_leaderboard(tmp_path, results, {"ours": GOOD, "theirs": BAD})
    for name, lines in (("leaderboard.csv", 2), ("attacks.csv", 4)):
        with open(tmp_path / name) as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == lines
        verdicts = {row["model"]: row["verdict"] for row in rows}
        assert verdicts == {"ours": "trusted", "theirs": "not trusted"}
    text = (tmp_path / "leaderboard.md").read_text()
    assert text.count("NOT TRUSTED") == 4  # the worst case; the robust accuracy and both rates
    assert "| - | theirs |" in text
    assert "| ours | a | public encoder | 10/255 | 2 | 50.0 ± 14.1 (36.6-63.4)" in text


def test_seeds_do_not_narrow_the_interval():
    found = over_seeds([entry(robust=20), entry(robust=30)])
    once = over_seeds([entry(robust=25)])
    assert (found["low"], found["high"]) == (once["low"], once["high"])
    assert found["deviation"] == pytest.approx(0.1414, abs=1e-4) and once["deviation"] is None


def test_budgets_of_all_threats_have_their_unit():
    patch = entry("usual", threat="Patch", epsilon=0.03)
    text = report.summary_table([patch, entry("usual", threat="L2", epsilon=0.5, robust=5)])
    assert "patch of 3 % of the area" in text and "epsilon 0.5 (L2)" in text
    assert report.conclusions(three())  # and the old ones still read
