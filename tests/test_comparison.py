"""The comparison of recipes: its summary, its tables, and the claims on it."""

import numpy as np
import pytest

from robust_ssl.report import pages, tables
from robust_ssl.report.claims import check_claim, judge, leader_of
from robust_ssl.report.comparison import (
    COLUMNS,
    SHARES,
    Estimate,
    decided,
    differ,
    differences,
    summarize,
)


def row(recipe="baseline", seed=0, robust=0.25, **changed):
    return {
        "recipe": recipe,
        "seed": seed,
        "clean": 0.75,
        "robust_public": robust,
        "robust_hardened": robust,
        "robust_worst": robust,
        "autoattack": None,
        "images": 1000,
        "autoattack_images": None,
        "verdict": "believable",
        "training_seconds": 1234.56,
        "cost_factor": 1.0,
        "gradients": 1.0,
        "gradients_per_epoch": 1.0,
        "seconds_per_image": 0.0025,
        "peak_bytes": None,
        **changed,
    }


def test_mean_deviation_and_number_over_seeds():
    rows = [
        row("b", 0, 0.25, autoattack=0.1, autoattack_images=100),
        row("a", 0, 0.5, verdict="believable, with notes"),
        row("b", 1, 0.75, verdict="not examined"),
        row("b", 2, 0.5, verdict="believable, with notes", images=500),
    ]
    summary = summarize(rows)
    assert list(summary) == ["b", "a"]
    assert summary["b"]["robust_public"] == Estimate(0.5, pytest.approx(0.25), 3)
    assert summary["b"]["autoattack"] == Estimate(0.1, None, 1)
    assert summary["b"]["peak_bytes"] == Estimate(None, None, 0)
    assert summary["a"]["robust_public"] == Estimate(0.5, None, 1)
    assert [summary[m]["verdict"] for m in "ba"] == ["not examined", "believable, with notes"]
    assert (summary["b"]["seeds"], summary["b"]["images"]) == (3, 500)
    assert (summary["b"]["autoattack_images"], summary["a"]["autoattack_images"]) == (100, None)


def test_not_believable_is_the_worst_verdict():
    rows = [row(seed=0, verdict="not believable"), row(seed=1, verdict="not examined")]
    assert summarize(rows)["baseline"]["verdict"] == "not believable"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to compare"),
        ([row(), row()], "'baseline', seed 0 is there twice"),
        ([row(clean=75.0)], r"clean is 75.0; it must be in \[0, 1\]"),
        ([row(clean=float("nan"))], "clean is nan"),
        ([row(clean=None)], "clean was not measured"),
        ([row(images=0)], "images is 0"),
        ([row(training_seconds=float("inf"))], "training_seconds is inf"),
        ([row(verdict="fine")], "'fine' is no verdict"),
        ([row(accuracy=0.5)], r"unknown fields \['accuracy'\]"),
        ([{k: v for k, v in row().items() if k != "clean"}], r"missing fields \['clean'\]"),
        ([row(autoattack=0.5)], "go together"),
    ],
)
def test_rows_that_are_none_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        summarize(rows)


def cells(rows, columns=tuple(COLUMNS)):
    return tables.summary_rows(summarize(rows), columns)


def test_tables_have_mean_deviation_and_mark():
    rows = [
        row("baseline", 0, 0.25, peak_bytes=3 * 2**20),
        row("baseline", 1, 0.75, peak_bytes=5 * 2**20),
        row("trades", 0, 0.5, verdict="not believable", autoattack=0.25, autoattack_images=100),
    ]
    baseline, trades = cells(rows)
    assert baseline == {
        "recipe": "baseline (frozen encoder)",
        "clean": "75.0 ± 0.0 %",
        "public suite": "50.0 ± 35.4 %",
        "hardened suite": "50.0 ± 35.4 %",
        "both suites": "50.0 ± 35.4 %",
        "AutoAttack": "n/a",
        "cost": "1.00x",
        "gradients": "1.0",
        "gradients/epoch": "1.0",
        "ms/image": "2.50",
        "training": "1,234.6 ± 0.0 s",
        "memory": "4 MiB",
    }
    assert trades["clean"] == "75.0 %"
    assert trades["public suite"] == "50.0 % NOT BELIEVABLE"
    assert trades["AutoAttack"] == "25.0 % NOT BELIEVABLE"
    assert trades["memory"] == "n/a"
    legend = tables.legend(summarize(rows))
    shown = {*cells(rows, SHARES)[0], *cells(rows, tables.COST_COLUMNS)[0]} - {"recipe"}
    assert all(f"- {heading}: " in legend for heading in shown)
    assert "1,000 test images: a share is known to ± 3.1 points" in legend
    assert "AutoAttack: 100 test images" in legend
    assert all(len(cells(rows, part)[0]) <= 6 for part in (SHARES, tables.COST_COLUMNS))


def test_a_column_without_a_figure_is_left_out_and_a_part_is_said():
    text = str(cells([row()])) + tables.legend(summarize([row()]))
    assert "AutoAttack" not in text and "memory" not in text and "±  " not in text
    rows = [row(seed=0, cost_factor=2.0), row(seed=1, cost_factor=None)]
    assert cells(rows)[0]["cost"] == "2.00x (1 of 2 seeds)"


def ordering(summary, names, by="robust_hardened", **entries):
    claim = {"order": tuple(names), "by": by, **entries}
    check_claim(claim, [*summary, *names])
    return judge(claim, summary)


def order(*robust, **changed):
    recipes = "abcd"[: len(robust)]
    rows = [
        row(m, 0, share, **changed.get(m, {})) for m, share in zip(recipes, robust, strict=True)
    ]
    return ordering(summarize(rows), list(recipes), by="robust_public")


def test_an_order_that_holds_is_confirmed_with_numbers():
    assert order(0.1, 0.2, 0.3) == (
        "The order a < b < c holds under the public suite. Measured: a 10.0 %, b 20.0 %, c 30.0 %."
    )


def test_an_order_is_somebodys():
    summary = summarize([row("a", 0, 0.1), row("b", 0, 0.9)])
    assert ordering(summary, "ab", of="Them (2024)").startswith(
        "The order a < b of Them (2024) holds under the hardened suite."
    )
    assert judge({"order": "ab"}, summary).startswith("The order a < b holds under both suites.")


def test_an_order_that_breaks_names_the_neighbors():
    assert order(0.1, 0.4, 0.3, 0.5) == (
        "The order a < b < c < d does not hold under the public suite. Measured: a 10.0 %, "
        "b 40.0 %, c 30.0 %, d 50.0 %. b and c stand the other way round (-10.0 points)."
    )


@pytest.mark.parametrize("second", [0.21, 0.19, 0.2])
def test_a_difference_inside_the_interval_is_undecided(second):
    sentence = order(0.2, second)
    assert sentence.startswith("The order a < b is undecided")
    points = f"{100 * second - 20:+.1f} points"
    assert f"Between a and b chance may decide ({points})." in sentence


def test_a_difference_inside_the_deviation_is_undecided():
    apart = [row("a", 0, 0.2), row("b", 0, 0.4)]
    assert " holds " in ordering(summarize(apart), "ab")
    spread = [row("a", 0, 0.2), row("b", 0, 0.1), row("b", 1, 0.7)]
    assert " is undecided " in ordering(summarize(spread), "ab")


def test_the_number_of_images_decides_what_is_decided():
    few = order(0.2, 0.4, a={"images": 20}, b={"images": 20})
    assert " is undecided " in few and " holds " in order(0.2, 0.4)


def test_what_was_not_measured_or_not_believable_is_said():
    rows = [
        row("a", autoattack=0.1, autoattack_images=100),
        row("b"),
        row("c", autoattack=0.9, autoattack_images=100, verdict="not believable"),
    ]
    summary = summarize(rows)
    assert ordering(summary, "abc", by="autoattack") == (
        "The order a < b < c holds under AutoAttack. Measured: a 10.0 %, c 90.0 %. "
        "Not measured: b. NOT BELIEVABLE: c."
    )
    assert ordering(summary, "ab", by="autoattack") == (
        "The order a < b cannot be judged under AutoAttack. Not measured: b."
    )
    assert "NOT BELIEVABLE" not in ordering(summary, "ac", by="clean")
    assert ordering(summary, "az") == (  # z failed in training
        "The order a < z cannot be judged under the hardened suite. Not measured: z."
    )


def images(count, n=1000, first=0):
    """`count` of `n` images were right, from the first."""
    return (np.arange(n) >= first) & (np.arange(n) < first + count)


def test_recipes_are_compared_on_the_same_images():
    """Shares of 50 and 47 % of 1,000 images: by their intervals undecided, by the images not."""
    rows = [row("lead", robust=0.5), row("nested", robust=0.47), row("other", robust=0.47)]
    right = {
        "lead": {"robust_hardened": images(500)},
        "nested": {"robust_hardened": images(470)},  # right only where the leader is
        "other": {"robust_hardened": images(470, first=530)},  # right only where it is not
    }
    alone, summary = summarize(rows), summarize(rows, right)
    assert not decided(alone["lead"], alone["nested"], "robust_hardened")
    assert differ(alone["lead"], alone["nested"], "robust_hardened") is None
    assert differ(summary["nested"], summary["lead"], "robust_hardened") == (
        pytest.approx(-0.03),
        pytest.approx(1.96 * 30**0.5 / 1000),
    )
    assert decided(summary["nested"], summary["lead"], "robust_hardened")
    assert not decided(summary["other"], summary["lead"], "robust_hardened")
    assert " does not hold " in ordering(summary, ["lead", "nested"])
    assert " is undecided " in ordering(summary, ["lead", "other"])
    assert " is undecided " in ordering(alone, ["lead", "nested"])
    lines = differences(summary, "lead")
    assert [(line["recipe"], line["share"], line["decided"]) for line in lines] == [
        ("nested", "robust_hardened", "yes"),
        ("other", "robust_hardened", "no"),
    ]


def test_a_difference_inside_the_deviation_over_seeds_is_not_decided():
    shares = {"a": (0.5, 0.5), "b": (0.3, 0.5)}
    rows = [row(m, s, robust) for m, both in shares.items() for s, robust in enumerate(both)]
    halves = {
        m: sum(images(1000 * r).astype(float) for r in both) / 2 for m, both in shares.items()
    }
    summary = summarize(rows, {name: {"robust_public": each} for name, each in halves.items()})
    value, half = differ(summary["b"], summary["a"], "robust_public")
    # Welch's: a does not vary, so Student's factor is that of two seeds alone.
    assert value == pytest.approx(-0.1) and half == pytest.approx(12.706 * 0.2 / 2, rel=1e-3)
    assert not decided(summary["b"], summary["a"], "robust_public")


def test_images_that_say_another_share_are_refused():
    with pytest.raises(ValueError, match=r"baseline: clean is 0\.75 by the rows and 0\.5 by image"):
        summarize([row()], {"baseline": {"clean": images(500)}})


def test_differences_from_a_leader_have_a_table():
    rows = [row("lead", robust=0.5), row("worse", robust=0.4, verdict="not believable")]
    right = {
        "lead": {"clean": images(750), "robust_public": images(500)},
        "worse": {"clean": images(750), "robust_public": images(400)},
    }
    lines = differences(summarize(rows, right), "lead")
    assert [line["share"] for line in lines] == ["clean", "robust_public"]
    assert float(lines[1]["difference"]) == -0.1 and lines[1]["verdict"] == "not believable"
    assert tables.difference_rows(lines) == [
        {
            "recipe": "worse",
            "clean": "+0.0 ± 0.0",
            "public suite": "**-10.0 ± 2.0** NOT BELIEVABLE",
        }
    ]


def test_a_table_of_many_shares_is_two():
    more = {"robust_twin": 0.3, "robust_half": 0.35, "robust_labelled": 0.1}
    rows = tables.summary_rows(summarize([row("a", 0, 0.5, **more)]), SHARES)
    assert {"twin", "half twin", "with labels"} <= {*rows[0]}
    first, second = pages._narrow(rows)
    assert first.startswith("| recipe | clean | public suite |")
    assert second.startswith("| recipe |") and second.splitlines()[0].endswith("| with labels |")
    [whole] = pages._narrow([{"recipe": "a", "clean": "1"}])
    assert whole.splitlines() == ["| recipe | clean |", "| --- | --- |", "| a | 1 |"]


REACH = {"reach": 0.9, "of": "gen_af", "over": "baseline", "within": 1.5}
BETTER = {"better_than": "gen_af"}
MORE = {"more": "a", "than": "b", "by": "clean"}


def goal(**recipes):
    """The two sentences; each recipe is (clean, hardened, cost, **changes)."""
    rows = [
        row(name, 0, robust, clean=clean, cost_factor=cost, **(more[0] if more else {}))
        for name, (clean, robust, cost, *more) in recipes.items()
    ]
    summary = summarize(rows)
    return judge(REACH, summary), judge(BETTER, summary)


BASE = {"baseline": (0.7, 0.1, 0.5), "gen_af": (0.8, 0.6, 9.0)}
DOUBT = {"verdict": "not believable"}


def test_a_recipe_has_nearly_all_of_the_gain_at_little_cost():
    cheap, _ = goal(
        **BASE,
        on_both_limits=(0.1, 0.55, 1.5),
        too_weak=(0.9, 0.54, 1.0),
        too_dear=(0.9, 0.9, 1.51),
        doubted=(0.9, 0.9, 1.0, DOUBT),
        no_cost=(0.9, 0.9, None),
    )
    assert cheap == (
        "At least 90% of gen_af's gain over baseline under both suites, at a cost of at most "
        "1.5x: on_both_limits (90%, 1.50x). The whole gain is +50.0 points."
    )
    assert goal(**BASE)[0].endswith("1.5x: no recipe. The whole gain is +50.0 points.")
    assert goal(**{**BASE, "gen_af": (0.8, 0.1, 9)})[0].endswith("gains nothing (+0.0 points).")
    assert goal(**{**BASE, "baseline": (0.7, 0.1, 1.0, DOUBT)})[0].endswith(
        "cannot be judged. NOT BELIEVABLE: baseline."
    )
    assert goal(gen_af=BASE["gen_af"])[0].endswith("cannot be judged. Not measured: baseline.")


def test_a_recipe_is_better_on_all():
    auto = {"autoattack": 0.3, "autoattack_images": 1000}
    _, better = goal(
        baseline=(0.7, 0.1, 0.5),
        gen_af=(0.8, 0.6, 9.0, auto),
        best=(0.9, 0.7, 2.0, {**auto, "autoattack": 0.5}),
        by_chance=(0.81, 0.7, 2.0),
        broken=(0.9, 0.9, 2.0, {**auto, "autoattack": 0.0}),
        as_clean=(0.8, 0.9, 2.0),
        under_one_suite=(0.9, 0.7, 2.0, {"robust_public": 0.59}),
        doubted=(0.9, 0.9, 1.0, DOUBT),
    )
    assert better == (
        "Better than gen_af in every measured share: best (clean +10.0, both suites +10.0 points), "
        "by_chance (clean +1.0, both suites +10.0 points, not all beyond chance)."
    )
    assert goal(**BASE)[1].endswith(": no recipe.")
    doubted = {**BASE, "gen_af": (0.8, 0.6, 9.0, DOUBT)}
    assert goal(**doubted)[1].endswith("cannot be judged. NOT BELIEVABLE: gen_af.")


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({}, "a claim has one of the entries order, reach, better_than"),
        ({**BETTER, "order": ("a", "b")}, "one of the entries"),
        ({**BETTER, "off": "a"}, "unknown entry 'off'"),
        ({**REACH, "whithin": 2}, "unknown entry 'whithin' in .*; did you mean within"),
        ({"reach": 0.9, "of": "gen_af"}, "has no 'over', 'within'"),
        ({**REACH, "reach": 90}, "reach=90 in .* must be above 0 and at most 1"),
        ({**REACH, "within": float("nan")}, "within=nan in .* must be finite and above 0"),
        ({**REACH, "within": True}, "within=True"),
        ({**REACH, "over": "base_line"}, "'base_line' in .* is not compared; did you mean baseli"),
        ({"better_than": "z"}, "'z' in .* is not compared; known: baseline, gen_af, a, b"),
        ({"order": ("a", "z")}, "'z' in .* is not compared"),
        ({"order": ("a",)}, "two or more different"),
        ({"order": ("a", "a")}, "two or more different"),
        ({**MORE, "margin": "2 %"}, "margin='2 %' in .* must be a share, at least 0 and below 1"),
        ({**MORE, "margin": 2}, "margin=2 in .* must be a share"),
        ({**MORE, "margin": -0.02}, "margin=-0.02 in .* must be a share"),
        ({**MORE, "margin": None}, "margin=None in .* must be a share"),
        ({**MORE, "seen": -10}, "seen=-10 in .* must be a whole number of at least 0"),
        ({**REACH, "seen": 0.5}, "seen=0.5 in .* must be a whole number"),
        ({"order": ("a", "b"), "by": "gradients"}, "by='gradients' in .* is no share"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(claim, message):
    with pytest.raises(ValueError, match=message):
        check_claim(claim, ["baseline", "gen_af", "a", "b"])


def test_claims_name_the_recipe_that_others_are_held_against():
    assert leader_of([{"order": ("a", "b"), "of": "Them"}, REACH], "b") == "gen_af"
    assert leader_of([BETTER], None) == "gen_af" and leader_of([], "b") == "b"
