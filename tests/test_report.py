"""The results contract, the tables, the sentences, the figures and the page."""

import csv
import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import report
from robust_ssl.evaluation import Counts

COSTS = {
    "usual": {"seconds": 12.34, "gradient_evaluations": 20},
    "stage2": {"seconds": 1234.5, "gradient_evaluations": 2420.0},
}


def entry(model="usual", attack="pgd", crafted_against="public", robust=10, clean=40, **other):
    counts = Counts(
        n=50,
        clean_correct=clean,
        robust_correct=robust,
        succeeded=max(clean - robust, 0),
        flipped=abs(clean - robust),
    )
    made = {
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
    return {**made, **counts.as_dict(), **other}


def three(**other):
    return [entry("usual", **other), entry("stage1", robust=30), entry("stage2", robust=35)]


def test_results_come_back_as_they_were(tmp_path):
    run = {"seed": np.int64(3), "config": {"lr": jnp.float32(0.5)}, "devices": ("cpu:0",)}
    report.write_results(tmp_path / "results.json", run, three())
    document = report.read_results(tmp_path / "results.json")
    assert document["schema"] == 2
    assert document["run"] == {"seed": 3, "config": {"lr": 0.5}, "devices": ["cpu:0"]}
    assert document["results"] == json.loads(json.dumps(three()))
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
        report.write_results(tmp_path / "results.json", {}, [entry(**change)])
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_run_is_refused_too(tmp_path):
    with pytest.raises(ValueError, match=r"run\.config\.rates\[1\]: nan"):
        report.write_results(
            tmp_path / "r.json", {"config": {"rates": np.array([0.0, np.nan])}}, three()
        )


def test_every_field_is_required():
    for name in entry():
        whole = entry()
        del whole[name]
        with pytest.raises(ValueError, match=name):
            report.check_results({"schema": 2, "run": {}, "verdicts": {}, "results": [whole]})
    with pytest.raises(ValueError, match="schema: 2 was expected"):
        report.check_results({"schema": 1, "run": {}, "verdicts": {}, "results": three()})
    with pytest.raises(ValueError, match="results"):
        report.check_results({"schema": 2, "run": {}, "verdicts": {}, "results": []})


def test_the_schema_is_a_schema():
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(report.results_schema())


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_row_per_model_with_counts_intervals_and_costs():
    lines = report.summary_table(three(), COSTS).splitlines()
    assert lines[0] == "**pgd; crafted on the public encoder, epsilon 10/255**"
    rows = [cells(line) for line in lines[4:]]
    assert [row[0] for row in rows] == ["usual fine-tuning", "secure stage 1", "secure stage 2"]
    assert rows[0][1:4] == [
        "80.0 % (40/50; 67.0-88.8)",
        "20.0 % (10/50; 11.2-33.0)",
        "75.0 % (30/40; 59.8-85.8)",
    ]
    assert rows[0][5:] == ["12.3", "20"]
    assert rows[1][5:] == ["n/a", "n/a"]
    assert rows[2][5:] == ["1,234", "2,420"]


def test_worst_case_first_then_every_attack():
    results = [
        entry(attack="a", robust=20),
        entry(attack="b", robust=10),
        entry(attack="worst", robust=5),
        entry(attack="a", crafted_against="hardened", robust=8),
    ]
    titles = [line for line in report.summary_table(results).splitlines() if line[:2] == "**"]
    assert titles == [
        "**Worst case per image over a, b; crafted on the public encoder, epsilon 10/255**",
        "**a; crafted again on the fine-tuned model, epsilon 10/255**",
        "**Every attack**",
    ]
    first = report.summary_table(results).splitlines()[4]
    assert cells(first)[2].startswith("10.0 % (5/50;")
    # Without a worst case per image, the lowest accuracy is shown and called what it is.
    text = report.summary_table(results[:2])
    assert text.startswith("**Lowest robust accuracy over a, b;")
    assert cells(text.splitlines()[4])[2].startswith("20.0 % (10/50;")


def test_the_terminal_table_fits_eighty_columns():
    import rich.console

    out = io.StringIO()
    results = [*three(), entry("stage2", attack="worst", clean=50, robust=50)]
    report.print_table(results, COSTS, console=rich.console.Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for word in ("100.0 %", "50/50", "92.9-100.0", "11.2-33.0", "fine-tuning", "stage 2", "2,420"):
        assert word in text


def test_sentences_say_what_the_numbers_say():
    results = [*three(), entry("stage2", crafted_against="hardened", robust=42)]
    assert report.conclusions(results) == [
        "With usual fine-tuning, the attack crafted on the public encoder (epsilon 10/255) takes "
        "60.0 points of accuracy (80.0 % to 20.0 %).",
        "With secure stage 2, the attack crafted on the public encoder (epsilon 10/255) takes "
        "10.0 points of accuracy (80.0 % to 70.0 %).",
        "Secure fine-tuning gains 50.0 points under attack and costs 0.0 points of clean accuracy.",
        "Crafted again on the fine-tuned model (secure stage 2, epsilon 10/255), the attack adds "
        "4.0 points of accuracy (80.0 % to 84.0 %).",
    ]
    close = report.conclusions([entry("usual", robust=30), entry("stage2", robust=29, clean=45)])
    assert close[2] == (
        "Secure fine-tuning loses 2.0 points under attack and gains 10.0 points of clean accuracy; "
        "the two intervals of robust accuracy overlap, so the first may be chance."
    )


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_drawn(png):
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in png.with_suffix(".svg").read_text()


def test_figures_leave_png_svg_and_their_numbers(tmp_path):
    clean = np.full((10, 4, 4, 3), 0.5, np.float32)
    attacked = clean + np.float32(10 / 255)
    png = report.figure_examples(tmp_path, clean, attacked, predictions=[(3, 3), (4, 9)] * 5)
    assert_drawn(png)
    _, second, *others = rows_of(png.with_suffix(".csv"))
    assert len(others) == 6  # the first eight are drawn
    assert (second["clean"], second["under_attack"]) == ("4", "9")
    assert float(second["largest_change_255"]) == pytest.approx(10, abs=1e-4)

    curves = {"usual": [(0.0, 0.9, 0.8, 0.95), (8 / 255, 0.1, 0.05, 0.2)], "mine": [(0.0, 1, 0, 1)]}
    png = report.figure_epsilon(tmp_path, curves)
    assert_drawn(png)
    assert [row["model"] for row in rows_of(png.with_suffix(".csv"))] == ["usual", "usual", "mine"]

    png = report.figure_sensitivity(tmp_path, {"stem": 0.1, "head": 0.7}, {"stem"})
    assert_drawn(png)
    assert rows_of(png.with_suffix(".csv")) == [
        {"layer": "head", "sensitivity": "0.7", "selected": "0"},
        {"layer": "stem", "sensitivity": "0.1", "selected": "1"},
    ]

    drift = {"stem": {"cosine": 1.0, "relative_drift": 0.2}}
    png = report.figure_stability(tmp_path, {"usual": drift})
    assert_drawn(png)
    assert rows_of(png.with_suffix(".csv"))[0]["relative_drift"] == "0.2"


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
    assert_drawn(report.figure_examples(tmp_path, still, still))


def test_the_page_says_what_was_run_and_links_beside_itself(tmp_path):
    run = {
        "command": "robust-ssl run --config=a|b",
        "seed": 0,
        "data": {"downstream": "digits", "test images": 50},
        "config": {"epsilon": 0.04},
        "checkpoints": {"secure stage 2": "stage2/checkpoint"},
    }
    figures = [tmp_path / "figures" / "epsilon.png", "figures/sensitivity.png", "other.png"]
    report.write_report(tmp_path / "report.md", run, three(), COSTS, figures, ["A shortfall."])
    text = (tmp_path / "report.md").read_text()
    assert "| command | robust-ssl run --config=a\\|b |" in text
    assert "| data | downstream: digits, test images: 50 |" in text
    assert '"epsilon": 0.04' in text
    assert "![epsilon](figures/epsilon.png)" in text
    assert "[CSV](figures/sensitivity.csv)" in text
    assert "robust-redundant" in text
    assert "![other](other.png)\n\n[SVG]" in text
    assert "- A shortfall." in text
    assert "- secure stage 2: `stage2/checkpoint`" in text
    assert report.summary_table(three(), COSTS).strip() in text
    assert str(tmp_path) not in text
