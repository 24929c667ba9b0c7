"""A figure that is not believable is never shown without its mark."""

import csv
import types

import numpy as np
import pytest
from test_report import a_document, entry, printed, three, write

from robust_ssl import report
from robust_ssl.evaluation.checks import ESSENTIAL
from robust_ssl.experiment import pages
from robust_ssl.report import results, sentences, tables


def check(name, title, number, status="passed", meaning="", advice="", value=0.0, limit=0.0):
    return {
        **{"name": name, "title": title, "number": number, "status": status},
        **{"value": value, "limit": limit, "meaning": meaning, "advice": advice},
    }


MODEL = [check(f"check_{number}", f"check {number}", number) for number in range(1, 7)]
FAILED = check(
    *("black_box_not_stronger", "black box not stronger", 16, "failed"),
    *("Square broke more.", "Attack without gradients.", 0.39, 0.002),
)
BAD = {"verdict": "not believable", "checks": [*MODEL, FAILED]}
GOOD = {"verdict": "believable", "checks": MODEL}


def marked(model="gen_af-seed0", **other):
    return entry(model, verdict="not believable", robust=45, clean=45, **other)


DOUBTED = a_document([entry(), marked()], verdicts={"gen_af-seed0": BAD})


def test_the_mark_is_in_every_table_and_sentence():
    results.check(DOUBTED)
    shown = report.names(DOUBTED["models"])
    for rows, marks in (
        (tables.headline_cells(DOUBTED), 2),  # the robust accuracy and the verdict
        (tables.attack_rows(DOUBTED["results"], shown), 2),  # and the attack's success
    ):
        for row in rows:
            doubted = "gen_af" in str(row["recipe"])
            assert str(row).count("NOT BELIEVABLE") == (marks if doubted else 0)
            assert "NOT BELIEVABLE" not in str(row.get("clean"))  # which needs no mark
    answer = sentences.answer(DOUBTED)
    assert len(answer) == 2  # it is not the most robust, whatever its figure
    assert answer[1] == (
        "Of 2 figures under attack: 1 not examined; NOT BELIEVABLE are those of gen_af."
    )
    worse = a_document([marked("baseline-seed0")], verdicts={"baseline-seed0": BAD})
    assert sentences.answer(worse)[0].endswith("(90.0 % to 90.0 %) (NOT BELIEVABLE).")


def test_the_terminal_shows_the_mark_in_eighty_columns():
    text = printed(DOUBTED)
    assert "NOT" in text and "BELIEVABLE" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_results_and_verdicts_must_agree(tmp_path):
    write(tmp_path / "r.json", [marked()], verdicts={"gen_af-seed0": BAD})
    verdicts = results.read(tmp_path / "r.json")["verdicts"]
    assert verdicts["gen_af-seed0"]["verdict"] == "not believable"
    believed = [entry("gen_af-seed0", verdict="believable")]
    with pytest.raises(ValueError, match=r"\[0\]\.verdict: 'believable', but .* 'not believable'"):
        write(tmp_path / "s.json", believed, verdicts={"gen_af-seed0": BAD})
    with pytest.raises(ValueError, match=r"verdict: 'believable', but .* 'not examined'"):
        write(tmp_path / "s.json", believed)
    assert not (tmp_path / "s.json").exists()


def test_a_verdict_is_what_its_checks_say(tmp_path):
    forged = {**BAD, "verdict": "believable"}
    believed = [entry("gen_af-seed0", verdict="believable")]
    with pytest.raises(ValueError, match="'believable' is not what its checks say"):
        write(tmp_path / "r.json", believed, verdicts={"gen_af-seed0": forged})


def test_one_line_then_only_what_did_not_pass(tmp_path):
    entries = [entry(verdict="believable"), marked(), entry("theirs")]
    verdicts = {"baseline-seed0": {**GOOD, "examined": "497 images"}, "gen_af-seed0": BAD}
    document = a_document(entries, verdicts=verdicts)
    assert report.verdict_lines(document) == [
        "The figures of baseline under attack are believable (6 of 6 checks passed; examined: 497 "
        "images).",
        "The figures of gen_af under attack are NOT BELIEVABLE (6 of 7 checks passed).",
        "  failed: 16 black box not stronger: 0.39 (limit 0.002). Square broke more. "
        "Attack without gradients.",
        "The figures of theirs under attack are not examined.",
    ]
    report.write_report(tmp_path, document)
    text = (tmp_path / "report.md").read_text()
    assert "are NOT BELIEVABLE (6 of 7 checks passed).\n  - failed: 16 black" in text
    for name in ("results.csv", "attacks.csv"):
        with open(tmp_path / name, newline="") as file:
            verdict_of = {row["model"]: row["verdict"] for row in csv.DictReader(file)}
        assert verdict_of == {
            "baseline-seed0": "believable",
            "gen_af-seed0": "not believable",
            "theirs": "not examined",
        }


def test_what_was_not_examined_says_why():
    class_0 = "all 9 images are of class 0"
    kept = check("budget_kept", "budget and range kept", 18)
    unrun = [
        check(name, name, number, "not run", class_0, value=None, limit=None)
        for number, name in enumerate(sorted(ESSENTIAL), 1)
    ]
    verdict = {"verdict": "not examined", "checks": [*unrun, kept]}
    document = a_document([entry()], verdicts={"baseline-seed0": verdict})
    results.check(document)
    assert report.verdict_lines(document) == [
        "The figures of baseline under attack are not examined (1 of 1 checks passed).",
        f"  not run: {class_0}",
    ]


def test_what_is_not_believable_has_no_rank():
    entries = [*three(verdict="believable"), marked("theirs")]
    verdicts = {"theirs": BAD, "baseline-seed0": GOOD}
    lines = report.tables.headline(a_document(entries, verdicts=verdicts))
    assert [line.name for line in lines] == ["baseline", "gen_af", "gen_af_stage1", "theirs"]


def test_budgets_of_all_threats_have_their_unit(tmp_path):
    patch = entry(threat="Patch", epsilon=0.03)
    document = a_document([*three(), patch, entry(threat="L2", epsilon=0.5, robust=5)])
    report.write_report(tmp_path, document)
    text = (tmp_path / "report.md").read_text()
    assert "| public encoder | 3 % of the area |" in text and "| 0.5 (L2) |" in text


def test_the_figures_of_a_run_have_the_verdict_of_each_model(tmp_path):
    training = types.SimpleNamespace(seeds=(0,))
    context = types.SimpleNamespace(workdir=tmp_path, plan=types.SimpleNamespace(training=training))
    words = {"a": "not believable", "b": "believable", "c": "not examined"}
    models = {f"{name}-seed0": {"recipe": name, "seed": 0} for name in words}
    verdicts = {f"{name}-seed0": {"verdict": words[name]} for name in ("a", "b")}
    images = np.zeros((2, 4, 4, 3))
    look = {
        **{"clean": images, "attacked": images, "answers": np.array([["x", "y"]] * 2)},
        **{"taps": np.array(["stem"]), "measures": np.array(["cosine", "relative_drift"])},
        "drift": np.array([[1.0, 0.2]]),
    }
    document = {"models": models, "verdicts": verdicts}
    paths = pages._figures(context, document, dict.fromkeys(models, look), {})
    assert [path.stem for path in paths] == ["examples", "stability"]
    with open(tmp_path / "figures" / "stability.csv", newline="") as file:
        assert {row["model"]: row["verdict"] for row in csv.DictReader(file)} == words
    with open(tmp_path / "figures" / "examples.csv", newline="") as file:
        assert {row["verdict"] for row in csv.DictReader(file)} == {"not believable"}  # a's
