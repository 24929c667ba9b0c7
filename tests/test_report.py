"""The results contract, the first table, the sentences, the figures and the page."""

import csv
import io
import json
import math
import os
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import report
from robust_ssl.evaluation import Counts
from robust_ssl.report import results, sentences, tables
from robust_ssl.report.cases import strongest_cases, suite_cases
from robust_ssl.report.comparison import FIELDS, summarize
from robust_ssl.report.tables import headline

RUN = {
    "encoder": {"name": "simclr", "fingerprint": "0123"},
    "downstream": {"name": "digits", "train": 1000, "validation": 200, "test": 50},
    "surrogate": {"name": "textures", "images": 500},
    "suite": {"epsilon": 10 / 255, "attacks": ["pgd"], "seeds": [0]},
    "seeds": [0],
}


def entry(model="baseline-seed0", attack="pgd", crafted_against="public", robust=10, clean=40, **o):
    counts = Counts(
        n=50,
        clean_correct=clean,
        robust_correct=robust,
        succeeded=max(clean - robust, 0),
        flipped=abs(clean - robust),
    )
    whole = {
        "model": model,
        "attack": attack,
        "seed": None,
        "family": "universal",
        "threat": "Linf",
        "crafted_against": crafted_against,
        "epsilon": 10 / 255,
        "verdict": "not examined",
        "seconds": 1.5,
        "gradient_evaluations": 10,
    }
    return {**whole, **counts.as_dict(), **o}


def three(**other):
    return [
        entry(**other),
        entry("gen_af_stage1-seed0", robust=30),
        entry("gen_af-seed0", robust=35),
    ]


def models_of(entries):
    """A model is a recipe with a seed where its name says so, else a saved classifier."""
    models = {}
    for name in dict.fromkeys(each["model"] for each in entries):
        recipe, _, seed = name.partition("-seed")
        models[name] = {"recipe": recipe if seed else None, "seed": int(seed) if seed else None}
    return models


def a_document(entries, **other):
    parts = {"run": RUN, "models": models_of(entries), "verdicts": {}, "comparison": None}
    return {"schema": 3, **parts, "results": entries, **other}


def a_row(recipe, robust, cost=1.0, seed=0, clean=0.8, **other):
    shares = {name: robust for name in ("robust_public", "robust_hardened", "robust_worst")}
    row = dict.fromkeys(FIELDS)
    row |= {"recipe": recipe, "seed": seed, "verdict": "not examined", "clean": clean, **shares}
    row |= {"images": 50, "cost_factor": cost, "gradients": cost, "training_seconds": 9.0}
    return {**row, **other}


def a_comparison(**other):
    rows = [
        a_row("baseline", 0.2, 0.5),
        a_row("gen_af_stage1", 0.6, 3.0),
        a_row("gen_af", 0.7, 9.8),
    ]
    parts = {"baseline": "baseline", "reference": None, "failed": {}, "claims": []}
    return {"rows": rows, "sentences": [], **parts, **other}


def write(path, entries, **other):
    document = a_document(entries, **other)
    del document["schema"]
    return results.write(path, **document)


def test_results_come_back_as_they_were(tmp_path):
    run = {**RUN, "config": {"lr": jnp.float32(0.5)}, "devices": ("cpu:0",), "seed": np.int64(3)}
    written = write(tmp_path / "results.json", three(), run=run, comparison=a_comparison())
    document = results.read(tmp_path / "results.json")
    assert document == written and document["schema"] == 3
    parts = {name: part for name, part in document.items() if name != "schema"}
    assert results.document(**parts) == document
    assert document["run"] == {**RUN, "config": {"lr": 0.5}, "devices": ["cpu:0"], "seed": 3}
    assert document["results"] == json.loads(json.dumps(three()))
    assert document["models"]["gen_af-seed0"] == {"recipe": "gen_af", "seed": 0}
    assert document["comparison"] == a_comparison()
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"robust_accuracy": math.nan}, r"results\[0\]\.robust_accuracy: nan"),
        ({"robust_accuracy": np.float32("nan")}, r"results\[0\]\.robust_accuracy: nan"),
        ({"seconds": math.inf}, r"results\[0\]\.seconds: inf"),
        ({"robust_accuracy": 1.5}, r"results\[0\]\.robust_accuracy: 1.5"),
        ({"fooling_rate": -0.1}, r"results\[0\]\.fooling_rate"),
        ({"model": ""}, r"results\[0\]\.model: ''"),
        ({"model": "nobody"}, r"results\[0\]\.model: 'nobody' is none of the models"),
        ({"crafted_against": "both"}, r"results\[0\]\.crafted_against"),
        ({"epsilon": 10}, r"results\[0\]\.epsilon"),
        ({"n": 0}, r"results\[0\]\.n"),
        ({"n": 50.5}, r"results\[0\]\.n"),
        ({"gradient_evaluations": 1.5}, r"results\[0\]\.gradient_evaluations"),
        ({"attack": ""}, r"results\[0\]\.attack"),
        ({"ci95": {}}, r"results\[0\]\.ci95"),
        ({"ci95": {**entry()["ci95"], "fooling_rate": [0.1]}}, r"ci95\.fooling_rate"),
        ({"ci95": {**entry()["ci95"], "fooling_rate": [0.9, 1.0]}}, r"does not hold the share 0.6"),
        ({"surprise": 1}, r"results\[0\]: .*'surprise'"),
    ],
)
def test_a_broken_entry_is_refused_by_name_and_nothing_is_written(tmp_path, change, field):
    with pytest.raises(ValueError, match=field):
        write(tmp_path / "results.json", [entry(**change)], models=models_of([entry()]))
    assert list(tmp_path.iterdir()) == []


def largest(images, **other):
    """What changes in a document of a largest class."""
    downstream = {**RUN["downstream"], **other, "largest_class": {"name": "a", "images": images}}
    return {"run": {**RUN, "downstream": downstream}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"run": {}}, "run: 'encoder' is a required property"),
        ({"run": {**RUN, "suite": {"epsilon": -1}}}, r"run\.suite"),
        ({"models": {"baseline-seed0": {"recipe": "baseline"}}}, r"models\.baseline-seed0.*'seed'"),
        ({"models": {"a": {"recipe": "b", "seed": None}}}, r"models\.a: recipe and seed go tog"),
        (
            {
                "models": {
                    "a-seed0": {"recipe": "a", "seed": 0},
                    "a": {"recipe": None, "seed": None},
                }
            },
            r"models\.a: a classifier must not be called as a recipe",
        ),
        ({"verdicts": {"a": {"verdict": "not examined", "checks": []}}}, "no such model"),
        ({"comparison": {**a_comparison(), "rows": []}}, "comparison.rows: there is nothing"),
        ({"comparison": a_comparison(rows=[a_row("a", 1.5)])}, "robust_public is 1.5"),
        ({"comparison": a_comparison(reference="full")}, "comparison.reference: 'full' has no row"),
        ({"comparison": {"rows": []}}, "comparison: 'baseline' is a required property"),
        ({"comparison": a_comparison(rows=[a_row("a", "0.5")])}, "robust_public is '0.5', which"),
        (
            {"comparison": a_comparison(rows=[a_row("a", [])])},
            r"robust_public is \[\], which is no",
        ),
        ({"comparison": a_comparison(rows=[a_row(["a"], 0.5)])}, "recipe is a name and seed a who"),
        (largest(60, classes=2), "largest_class.images: 60 are more than all 50 test images"),
        (largest(30), "downstream.classes: is not there"),
        (largest(30, classes=0), "downstream.classes: 0 is less than the minimum"),
    ],
)
def test_a_document_that_does_not_hold_together_is_refused(change, field):
    with pytest.raises(ValueError, match=field):
        results.check(a_document(three(), **change))


def test_nan_in_the_run_is_refused_too(tmp_path):
    run = {**RUN, "config": {"rates": np.array([0.0, np.nan])}}
    with pytest.raises(ValueError, match=r"run\.config\.rates\[1\]: nan"):
        write(tmp_path / "r.json", three(), run=run)


def test_every_field_is_required():
    for name in entry():
        part = entry()
        del part[name]
        with pytest.raises(ValueError, match=name):
            results.check({**a_document([entry()]), "results": [part]})
    with pytest.raises(ValueError, match="results"):
        results.check(a_document([]))


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_an_older_version_are_refused_as_such(tmp_path, version):
    old = {"schema": version, "run": {}, "verdicts": {}, "results": three()}
    (tmp_path / "leaderboard.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=f"schema: {version}, which an older version .* wrote"):
        results.read(tmp_path / "leaderboard.json")


def test_the_schema_is_a_schema():
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(results.schema())


def test_the_first_table_has_a_line_for_each_recipe_the_most_robust_first():
    entries = [*three(), entry("theirs", robust=40)]
    document = a_document(entries)
    results.check(document)
    cells = tables.headline_cells(document)
    assert [row["recipe"][0] for row in cells] == [
        *("theirs", "gen_af", "gen_af_stage1"),
        "baseline (frozen encoder)",
    ]
    assert list(cells[0]) == ["recipe", "clean", "under attack", "verdict"]
    assert cells[-1]["clean"] == ("80.0 %", "67-89")
    assert cells[-1]["under attack"] == ("20.0 %", "11-33")
    assert cells[-1]["verdict"] == ("not examined",)


def test_a_comparison_gives_the_worst_case_over_both_suites_and_the_cost():
    rows = [a_row("baseline", 0.1, 0.5), a_row("gen_af", 0.5, 9.8)]
    document = a_document(
        [*three(), entry("gen_af-seed0", "worst", "hardened", robust=30)],
        comparison=a_comparison(rows=rows),
    )
    lines = {line.name: line for line in headline(document)}
    assert lines["gen_af"].attacked.mean == 0.5 and lines["gen_af"].cost == 9.8
    assert lines["gen_af_stage1"].attacked.mean == 0.6 and lines["gen_af_stage1"].cost is None
    cells = tables.headline_cells(document)
    assert {row["recipe"][0]: row["cost"] for row in cells}["gen_af_stage1"] == ("n/a",)
    alone = headline(a_document(document["results"]))  # then the lower of the two suites
    assert {line.name: line.attacked.mean for line in alone}["gen_af"] == 0.6


def test_seeds_of_a_recipe_share_a_line_and_do_not_narrow_the_interval():
    seeds = [entry("a-seed0", robust=20), entry("a-seed1", robust=30)]
    (line,) = headline(a_document(seeds))
    (once,) = headline(a_document([entry("a-seed0", robust=25)]))
    assert line.attacked[:3] == once.attacked[:3]
    assert line.attacked.deviation == pytest.approx(0.1414, abs=1e-4)
    assert once.attacked.deviation is None
    assert tables.headline_cells(a_document(seeds))[0]["under attack"][0] == "50.0 ± 14.1 %"
    assert list(report.names(a_document(seeds)["models"]).values()) == ["a, seed 0", "a, seed 1"]


def test_the_strongest_attack_has_a_column_where_it_was_scored():
    per_image = entry("a-seed0", "worst", "hardened", robust=5, family="per_image", epsilon=4 / 255)
    auto = entry("a-seed0", "worst", "hardened", robust=2, family="autoattack", epsilon=8 / 255)
    entries = [entry("a-seed0"), entry("b-seed0"), per_image]
    cells = tables.headline_cells(a_document(entries))
    assert [row["per image"][0] for row in cells] == ["10.0 %", "n/a"]
    cells = tables.headline_cells(a_document([*entries, auto]))
    assert cells[0]["AutoAttack"] == ("4.0 %", "1-13")
    square = {**auto, "attack": "square"}
    assert "AutoAttack: 8/255 on 50 images." in tables.headline_caption(
        a_document([*entries, auto, square])
    )
    parts = [{**auto, "attack": name} for name in ("apgd-ce", "apgd-t")]
    assert "on 50 images, apgd-ce and apgd-t alone." in tables.headline_caption(
        a_document([*entries, auto, *parts])
    )


def test_what_sees_no_label_is_not_the_column_per_image():
    """What is scored on the public encoder too has no labels, however large its budget is."""
    blind = {"attack": "embed", "family": "per_image", "epsilon": 10 / 255}
    white = {"attack": "pgd", "family": "per_image", "epsilon": 8 / 255}
    entries = [
        entry(**blind, crafted_against="public", robust=30),
        entry(**blind, crafted_against="hardened", robust=20),
        entry(**white, crafted_against="hardened", robust=5),
    ]
    document = a_document([entry(), *entries])
    assert [group.epsilon for group in strongest_cases(document)] == [8 / 255]
    assert [group.epsilon for group in strongest_cases(a_document(entries[:2]))] == [10 / 255] * 2


def test_the_suite_is_judged_at_its_own_budget():
    weak = entry(robust=39, epsilon=1 / 255)
    assert [group.epsilon for group in suite_cases(a_document([weak, *three()]))] == [10 / 255]
    assert [group.epsilon for group in suite_cases(a_document([weak]))] == [1 / 255]


def test_the_worst_case_is_taken_where_there_is_one():
    entries = [
        entry(attack="a", robust=20),
        entry(attack="b", robust=10),
        entry(attack="worst", robust=5),
        entry(attack="a", crafted_against="hardened", robust=8),
    ]
    public, hardened = suite_cases(a_document(entries)).values()
    assert public["baseline-seed0"]["attack"] == "worst"
    assert hardened["baseline-seed0"]["robust_accuracy"] == pytest.approx(0.16)
    (case,) = suite_cases(a_document(entries[:2])).values()
    assert case["baseline-seed0"]["attack"] == "b"
    rows = tables.attack_rows(entries, report.names(models_of(entries)))
    assert [(row["attack"], row["crafted on"]) for row in rows] == [
        ("a", "public encoder"),
        ("b", "public encoder"),
        ("worst of universal", "public encoder"),
        ("a", "itself"),
    ]


def printed(document, width=80):
    import rich.console

    out = io.StringIO()
    report.print_summary(document, rich.console.Console(file=out, width=width))
    return out.getvalue()


def test_a_narrow_terminal_cuts_no_figure():
    text = printed(a_document(three(), comparison=a_comparison()), width=40)
    assert max(map(len, text.splitlines())) <= 40
    for line in ("recipe: baseline (frozen encoder)", "  clean: 80.0 % 67-89", "  cost: 9.8x"):
        assert line in text.splitlines()


def test_the_terminal_table_fits_eighty_columns():
    entries = [
        *three(),
        entry("interpolated_gen_af_of_its_own_seed-seed0", clean=50, robust=50),
        entry("gen_af-seed0", "worst", "hardened", robust=5, family="autoattack"),
    ]
    text = printed(a_document(entries, comparison=a_comparison()))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for word in ("100.0 %", "93-100", "11-33", "frozen", "9.8x", "AutoAttack", "not examined"):
        assert word in text
    assert "cut the accuracy of baseline from 80.0 % to 20.0 %" in " ".join(text.split())


def test_the_first_sentence_has_the_mark_of_any_seed():
    believed = entry(verdict="believable")
    doubted = entry("baseline-seed1", verdict="not believable")
    for entries in ([believed, doubted], [doubted, believed]):
        assert sentences.answer(a_document(entries))[0].endswith("20.0 % (NOT BELIEVABLE).")
    assert "NOT BELIEVABLE" not in sentences.answer(a_document([believed]))[0]


def test_sentences_say_what_the_numbers_say():
    entries = [*three(), entry("gen_af-seed0", "worst", "hardened", robust=33)]
    assert sentences.answer(a_document(entries)) == [
        "Attacks crafted on the public encoder (10/255) cut the accuracy of baseline from 80.0 % "
        "to 20.0 %.",
        "The most robust, gen_af, keeps 66.0 % under the attacks of the stronger suite, where "
        "baseline keeps 20.0 %.",
        "gen_af keeps the clean accuracy within overlapping 95 % intervals (80.0 % to 80.0 %).",
        "No figure under attack was examined.",
    ]
    rows = [a_row("baseline", 0.2, 0.5), a_row("gen_af", 0.7, 9.8, clean=0.5), a_row("full", 0.1)]
    comparison = a_comparison(rows=rows, reference="full")
    dear = [entry(), entry("gen_af-seed0", robust=20, clean=25), entry("full-seed0", robust=5)]
    assert sentences.answer(a_document(dear, comparison=comparison))[2] == (
        "gen_af takes 9.8x the training time of full and loses 30.0 points of clean accuracy "
        "(80.0 % to 50.0 %)."
    )
    close = sentences.answer(a_document([entry(), entry("gen_af-seed0", robust=12)]))
    assert close[1].endswith("baseline keeps 20.0 %. The two 95 % intervals overlap.")
    rows = [a_row("baseline", 0.2), a_row("gen_af", 0.24)]
    shares = {"clean": np.arange(50) < 40, "robust_worst": np.arange(50) < 10}
    helped = {**shares, "robust_worst": np.arange(50) < 12}  # two images more, and none less
    summary = summarize(rows, {"baseline": shares, "gen_af": helped})
    paired = sentences.answer(a_document([entry(), entry("gen_af-seed0", robust=12)]), summary)
    assert paired[1].endswith("baseline keeps 20.0 %. The difference may be chance.")
    assert paired[2] == "gen_af does not measurably change the clean accuracy (80.0 % to 80.0 %)."
    rows = [a_row("baseline", 0.2), a_row("gen_af", 0.5), a_row("full", 0.48)]
    shares["robust_worst"], near = np.arange(50) < 10, np.arange(50) < 24
    summary = summarize(
        rows,
        {
            "baseline": shares,
            "gen_af": {**shares, "robust_worst": np.arange(50) < 25},
            "full": {**shares, "robust_worst": near},
        },
    )
    three_of_them = [entry(), entry("gen_af-seed0", robust=25), entry("full-seed0", robust=24)]
    best = sentences.answer(a_document(three_of_them), summary)[1]
    assert best.endswith("Between it and full chance may decide.")
    worse = sentences.answer(a_document([entry(), entry("gen_af-seed0", robust=8)]))
    assert worse[1].startswith("Nothing is more robust than baseline: gen_af keeps 16.0 %")
    theirs = sentences.answer(a_document([entry("theirs")]))
    assert theirs[1:] == [
        "The most robust, theirs, keeps 20.0 % under the attacks of the suite.",
        "No figure under attack was examined.",
    ]


@pytest.mark.parametrize(
    ("robust", "words"),
    [
        (39, "change nothing measurable in the accuracy of a (80.0 % to 78.0 %)"),
        (40, "change nothing measurable in the accuracy of a (80.0 % to 80.0 %)"),
        (42, "change nothing measurable in the accuracy of a (80.0 % to 84.0 %)"),
        (50, "do not lower the accuracy of a (80.0 % to 100.0 %)"),
        (30, "cut the accuracy of a from 80.0 % to 60.0 %"),
    ],
)
def test_a_change_within_chance_is_none(robust, words):
    assert sentences.change([entry(robust=robust)], "a") == words


def test_what_attacks_change_is_counted_seed_by_seed():
    # Ten of a hundred answers fall, all with one seed.  The product of both means has 27 fall.
    seeds = [entry(clean=45, robust=45), entry(clean=10, robust=0)]
    assert sentences.change(seeds, "a") == "cut the accuracy of a from 55.0 % to 45.0 %"


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_png(png):
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in png.with_suffix(".svg").read_text()


def test_figures_leave_png_svg_and_their_numbers(tmp_path):
    clean = np.full((10, 4, 4, 3), 0.5, np.float32)
    attacked = clean + np.float32(10 / 255)
    png = report.figure_examples(tmp_path, clean, attacked, predictions=[(3, 3), (4, 9)] * 5)
    assert_png(png)
    _, second, *others = rows_of(png.with_suffix(".csv"))
    assert len(others) == 6  # the first eight are drawn
    assert (second["clean"], second["under_attack"]) == ("4", "9")
    assert float(second["largest_change_255"]) == pytest.approx(10, abs=1e-4)

    png = report.figure_epsilon(tmp_path, CURVES)
    assert_png(png)
    models = [row["model"] for row in rows_of(png.with_suffix(".csv"))]
    assert models == ["baseline", "baseline", "theirs"]

    for name in ("sensitivity-gen_af_0.2", "sensitivity-gen_af_0.5"):  # not endings of files
        assert report.figure_sensitivity(tmp_path, {"stem": 0.1}, {"stem"}, name=name).stem == name
        assert (tmp_path / f"{name}.csv").exists()
    png = report.figure_sensitivity(tmp_path, {"stem": 0.1, "head": 0.7}, {"stem"})
    assert_png(png)
    assert rows_of(png.with_suffix(".csv")) == [
        {"layer": "head", "sensitivity": "0.7", "selected": "0"},
        {"layer": "stem", "sensitivity": "0.1", "selected": "1"},
    ]

    drift = {"stem": {"cosine": 1.0, "relative_drift": 0.2}}
    png = report.figure_stability(tmp_path, {"baseline": drift})
    assert_png(png)
    assert rows_of(png.with_suffix(".csv"))[0]["relative_drift"] == "0.2"


def test_a_figure_under_attack_that_is_not_believable_says_so(tmp_path):
    verdicts = {"theirs": {"verdict": "not believable"}, "baseline": {"verdict": "believable"}}
    images = np.zeros((2, 4, 4, 3))
    drifts = {name: {"stem": {"cosine": 1.0, "relative_drift": 0.2}} for name in CURVES}
    drawn = {
        "epsilon": lambda folder, **said: report.figure_epsilon(folder, CURVES, **said),
        "stability": lambda folder, **said: report.figure_stability(folder, drifts, **said),
    }
    for name, draw in drawn.items():
        png, plain = draw(tmp_path / "marked", verdicts=verdicts), draw(tmp_path / "plain")
        words = {row["model"]: row["verdict"] for row in rows_of(png.with_suffix(".csv"))}
        assert words == {"theirs": "not believable", "baseline": "believable"}, name
        words = {row["verdict"] for row in rows_of(plain.with_suffix(".csv"))}
        assert words == {"not examined"}, name
        assert png.read_bytes() != plain.read_bytes(), name
    marked = report.figure_examples(tmp_path / "marked", images, images, verdict="not believable")
    plain = report.figure_examples(tmp_path / "plain", images, images)
    assert {r["verdict"] for r in rows_of(marked.with_suffix(".csv"))} == {"not believable"}
    assert {r["verdict"] for r in rows_of(plain.with_suffix(".csv"))} == {"not examined"}
    assert _texts(report.draw_examples(images, images, verdict="not believable")) >= {
        "under attack\nNOT BELIEVABLE"
    }


def _texts(figure):
    return {axis.get_ylabel() for axis in figure.axes}


CURVES = {
    "baseline": [(0.0, 0.9, 0.8, 0.95), (8 / 255, 0.1, 0.05, 0.2)],
    "theirs": [(0.0, 1, 0, 1)],
}


@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_figures_take_any_number_of_recipes(tmp_path, count):
    recipes = ["baseline", *(f"recipe{i}" for i in range(1, count))]
    curves = {name: CURVES["baseline"] for name in recipes}
    png = report.figure_epsilon(tmp_path, curves)
    assert_png(png)
    assert len(rows_of(png.with_suffix(".csv"))) == 2 * count
    drifts = {name: {"stem": {"cosine": 1.0, "relative_drift": 0.2}} for name in recipes}
    assert len(rows_of(report.figure_stability(tmp_path, drifts).with_suffix(".csv"))) == count


def test_the_same_numbers_draw_the_same_bytes(tmp_path):
    scores = {"stem": 0.1, "head": 0.7}
    first = report.figure_sensitivity(tmp_path / "a", scores, ["stem"])
    again = report.figure_sensitivity(tmp_path / "b", scores, ["stem"])
    for suffix in (".png", ".svg", ".csv"):
        assert first.with_suffix(suffix).read_bytes() == again.with_suffix(suffix).read_bytes()


def test_figures_refuse_what_does_not_belong_together(tmp_path):
    with pytest.raises(ValueError, match=r"the same images .*\(2, 4, 4, 3\) and \(1, 4, 4, 3\)"):
        report.figure_examples(tmp_path, np.zeros((2, 4, 4, 3)), np.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"without a score: \['tail'\]"):
        report.figure_sensitivity(tmp_path, {"stem": 0.1}, ["tail"])
    # An attack that changed nothing is drawn as plain gray, not as NaN.
    still = np.zeros((1, 4, 4, 3))
    assert_png(report.figure_examples(tmp_path, still, still))


def a_page(workdir, **other):
    comparison = a_comparison(
        claims=[{"claim": {"better_than": "gen_af"}, "sentence": "Nothing is better."}],
        sentences=["A shortfall."],
        failed={"mart": "not finite"},
    )
    run = {**RUN, "devices": ["cpu:0"], "versions": {"jax": "1"}, "config": {"epsilon": 0.04}}
    document = a_document(three(), run=run, comparison=comparison)
    results.check(document)
    report.write_report(workdir, document, **other)
    return (workdir / "report.md").read_text()


def test_the_page_answers_first_and_ends_with_how_it_was_run(tmp_path):
    text = a_page(tmp_path)
    places = [
        "# Robustness of simclr on digits",
        "- Attacks crafted on the public encoder (10/255) cut the accuracy of baseline",
        "- Nothing is better.",
        "| recipe | clean | under attack | cost | verdict |",
        "| gen_af | 80.0 % (67-89) | 70.0 % (56-81) | 9.8x | not examined |",
        "- A shortfall.",
        "- mart failed: not finite",
        "## Plots",
        "## Can the figures under attack be believed?",
        "## All tables",
        "## How it was run",
        "- Surrogate set, the attacker's: textures, images 500.",
        "<details><summary>Versions and devices",
        "- devices: cpu:0",
        "<details><summary>Configuration",
        '"epsilon": 0.04',
    ]
    assert [text.index(place) for place in places] == sorted(text.index(place) for place in places)
    assert str(tmp_path) not in text


def test_a_picture_that_is_given_is_not_drawn_again(tmp_path):
    text = a_page(tmp_path, figures=[tmp_path / "figures" / "pareto.png"])
    assert text.count("![pareto]") == 1 and not (tmp_path / "figures").exists()


def test_tables_of_the_page_have_at_most_six_columns(tmp_path):
    for line in a_page(tmp_path).splitlines():
        assert line.count("|") <= 7, line


def spoken(text):
    """The sentences of a page outside its tables, links and code."""
    text = re.sub(r"```.*?```|\[[A-Z]+\]\([^)]*\)|!\[.*?\]\(.*?\)", "", text, flags=re.S)
    lines = [line for line in text.splitlines() if line[:1] not in ("|", "#", "<")]
    return [part for line in lines for part in re.split(r"(?<=[.:]) (?=[A-Z0-9*])", line)]


def test_no_sentence_of_the_page_is_long(tmp_path):
    text = a_page(tmp_path, curves={"baseline-seed0": CURVES["baseline"]})
    captions = list(report.pages.CAPTIONS.values())
    for sentence in [*spoken(text), *(part for c in captions for part in spoken(c))]:
        words = re.findall(r"[^\s]*[A-Za-z][^\s]*", sentence)
        assert len(words) <= 25, sentence
    assert "safe" not in text and "adds" not in text


def test_csv_files_have_every_number(tmp_path):
    images = np.arange(50) < 35
    outcomes = {
        "gen_af": {"robust_worst": images},
        "baseline": {"robust_worst": np.arange(50) < 10},
    }
    text = a_page(tmp_path, outcomes=outcomes)
    assert [row["model"] for row in rows_of(tmp_path / "results.csv")] == [
        *("baseline-seed0", "gen_af_stage1-seed0", "gen_af-seed0"),
    ]
    assert len(rows_of(tmp_path / "attacks.csv")) == 3
    assert rows_of(tmp_path / "comparison.csv")[2]["robust_worst"] == "0.7"
    (line,) = rows_of(tmp_path / "differences.csv")
    assert (line["recipe"], line["decided"]) == ("baseline", "yes")
    assert "### Against gen_af" in text and "**-50.0 ± 19.6**" in text


def test_pictures_show_wherever_the_run_was_begun(tmp_path, monkeypatch):
    """A relative workdir: links must hold from the page's folder, not from where it was begun."""
    monkeypatch.chdir(tmp_path)
    workdir = pathlib.Path("runs/quickstart")
    examples = report.figure_examples(
        workdir / "figures", np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 4, 3))
    )
    assert not examples.is_absolute()
    text = a_page(
        workdir,
        curves={"baseline-seed0": CURVES["baseline"]},
        figures=[examples, (tmp_path / "runs" / "other.png").absolute()],
    )
    monkeypatch.chdir(os.sep)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert "figures/epsilon.png" in links and "../other.png" in links
    for link in links:
        assert (tmp_path / workdir / link).exists() or "other" in link, link


# --- data that flatter -----------------------------------------------------------------------


def of_classes(classes, images, **other):
    downstream = {**RUN["downstream"], "classes": classes, **other}
    downstream["largest_class"] = {"name": "good|part", "images": images}
    return a_document(three(), run={**RUN, "downstream": downstream})


@pytest.mark.parametrize(
    ("classes", "images", "said"),
    [(2, 48, True), (2, 30, True), (2, 26, False), (5, 12, True), (10, 8, False), (10, 15, True)],
)
def test_an_imbalanced_set_has_its_majority_class_as_a_line(classes, images, said):
    document = of_classes(classes, images)
    *_, last = tables.headline_cells(document)
    assert (last["recipe"] == ("always 'good|part'",)) == said
    assert ("majority class" in tables.headline_caption(document)) == said
    if said:
        share = f"{2 * images:.1f} %"
        assert last["clean"][0] == last["under attack"][0] == share
        assert last["verdict"] == ("no model",)


def test_what_was_left_out_and_what_is_in_both_splits_is_told(tmp_path):
    balanced = {"baseline-seed0": 0.5, "gen_af-seed0": 0.75}
    document = of_classes(2, 48, test_among_train=7, notes=["train: left out, no classes: @eaDir/"])
    document["run"]["balanced_accuracy"] = balanced
    results.check(document)
    report.write_report(tmp_path, document)
    page = (tmp_path / "report.md").read_text()
    assert "where one answer has 50.0 %: baseline 50.0 %, gen_af 75.0 %." in page
    assert "Note on train: left out, no classes: `@`eaDir/." in page  # no address
    assert "Test images among the training images: 7 of 50." in page
    assert "always 'good\\|part'" in page
