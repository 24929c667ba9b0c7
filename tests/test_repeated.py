"""Announced claims: intervals over seeds and images, Holm, Fieller, and what is said of them."""

import runpy

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq
from test_report import a_comparison, a_row, entry
from test_report import write as write_results

from robust_ssl import report
from robust_ssl.evaluation.counts import wilson_interval
from robust_ssl.evaluation.repeated import advantage, gain_ratio, half_width_over_seeds, holm
from robust_ssl.report import announced, claims
from robust_ssl.report.comparison import Estimate

RANDOM = np.random.default_rng(0)


def right(share, seeds=4, n=500, of=None):
    """Outcomes in which images are hard for all seeds alike, to a part."""
    hard = RANDOM.uniform(size=n) if of is None else of
    noise = RANDOM.normal(0, 0.2, (seeds, n)) + RANDOM.normal(0, 0.02, (seeds, 1))
    return hard + noise < share


def test_an_advantage_is_its_closed_form():
    first, second = right(0.7), right(0.6)
    each = first.astype(float) - second
    by_seed, by_image = each.mean(1), each.mean(0)
    parts = np.array([by_seed.var(ddof=1) / 4, by_image.var(ddof=1) / 500])
    freedom = parts.sum() ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 499)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(parts.sum())
    found = advantage(first, second)
    np.testing.assert_allclose(found[:3], [each.mean(), each.mean() - half, each.mean() + half])
    t = (each.mean() + 0.02) / np.sqrt(parts.sum())
    assert advantage(first, second, margin=0.02).p == pytest.approx(stats.t.sf(t, freedom))


def test_one_seed_is_students_test_over_images():
    first, second = right(0.7, seeds=1), right(0.6, seeds=1)
    expected = stats.ttest_rel(first[0].astype(float), second[0].astype(float))
    assert advantage(first, second).p == pytest.approx(expected.pvalue / 2)


def test_what_all_images_say_is_as_certain_as_they_are_many():
    def outcomes(n):
        return np.ones((2, n)), np.zeros((2, n))

    one, none = outcomes(5)
    assert advantage(one, one).p == advantage(none, one).p == 1
    # No image of five against it: 0.98^5 where each fiftieth would be, 0.5^5 where each other is.
    assert advantage(one, one, margin=0.02).p == pytest.approx(0.98**5)
    assert advantage(one, none).p == pytest.approx(0.5**5)
    unseen = wilson_interval(0, 5)[1]
    assert advantage(one, one)[:3] == pytest.approx((0, -unseen, unseen))
    assert advantage(one, none)[:3] == pytest.approx((1, 1 - 2 * unseen, 1))
    # Each of 30 images with one of three seeds: the mean of thirds is a third but for rounding.
    third = np.tile(np.eye(3), 10)
    found = advantage(third, np.zeros_like(third))
    assert found.p == pytest.approx(0.75**30) and found.low < 1 / 3 - 0.1
    many, alike = outcomes(500)
    assert advantage(many, many, margin=0.02).p < 1e-4
    assert gain_ratio(many, alike, many) == pytest.approx((1, 1, 1))
    two, wrong = outcomes(2)
    assert gain_ratio(two, wrong, two) is None  # a gain on two images may be chance


def test_by_chance_alone_a_claim_holds_in_one_case_of_twenty():
    """Both recipes are one and the same: seeds and images are all that differs."""
    p = [advantage(right(0.5, n=200, of=hard), right(0.5, n=200, of=hard)).p
         for hard in RANDOM.uniform(size=(400, 200))]  # fmt: skip
    assert np.mean(np.array(p) < 0.05) < 0.08


def test_a_ratio_holds_all_values_that_are_within_chance():
    hard = RANDOM.uniform(size=500)
    first, base, leader = (right(share, of=hard) for share in (0.6, 0.4, 0.7))
    value, low, high = gain_ratio(first, base, leader)
    assert low < value < high
    a, b, c = (x.mean() for x in (first, base, leader))
    assert value == pytest.approx((a - b) / (c - b))
    assert gain_ratio(leader, base, leader) == pytest.approx((1, 1, 1))
    assert gain_ratio(first, base, right(0.4, of=hard)) is None  # no gain, no share of it
    assert gain_ratio(first, leader, base) is None


def rederived(first, base, leader):
    """Fieller's ends as the roots of (u - r v)^2 = t^2 Var(u - r v), all in float64."""
    u, v = first.astype(np.float64) - base, leader.astype(np.float64) - base
    k, n = u.shape

    def pieces(x):
        return np.array([x.mean(0).var(ddof=1) / n, x.mean(1).var(ddof=1) / k])

    freedoms = [p.sum() ** 2 / (p**2 / [n - 1, k - 1]).sum() for p in (pieces(u), pieces(v))]
    t = stats.t.ppf(0.975, min(freedoms))
    over = lambda r: (u.mean() - r * v.mean()) ** 2 - t**2 * pieces(u - r * v).sum()  # noqa: E731
    ratio = u.mean() / v.mean()
    return ratio, brentq(over, ratio - 5, ratio), brentq(over, ratio, ratio + 5)


def test_fiellers_interval_is_where_the_difference_is_just_within_chance():
    hard = RANDOM.uniform(size=500)
    three = [right(share, of=hard) for share in (0.6, 0.4, 0.7)]
    np.testing.assert_allclose(gain_ratio(*three), rederived(*three), rtol=1e-9)


def test_the_interval_holds_the_true_ratio_in_nineteen_cases_of_twenty():
    held = []
    for hard in RANDOM.uniform(size=(300, 300)):
        first, base, leader = (right(share, n=300, of=hard) for share in (0.55, 0.4, 0.7))
        _, low, high = gain_ratio(first, base, leader)
        held.append(low <= 0.5 <= high)
    assert np.mean(held) > 0.93


def shares_of(*recipes, seeds=4, of=None, **claim):
    """A claim, outcomes of recipes with about these shares, and what is measured of their gains."""
    hard = RANDOM.uniform(size=500) if of is None else of
    outcomes = {
        (name, "clean"): dict(enumerate(right(share, seeds, of=hard))) for name, share in recipes
    }
    unseen = {("clean", 0): np.ones(500, bool), ("clean", 100): np.arange(500) >= 100}
    whole = {"reach": 0.9, "of": "lead", "over": "base", "within": 2, "by": "clean", **claim}
    return whole, outcomes, report.gain_shares(whole, outcomes, unseen)


def summary_of(outcomes, **costs):
    """The least that `judge` reads of a summary."""
    estimate = lambda value: Estimate(value, None, 1)  # noqa: E731
    return {
        name: {
            "clean": estimate(float(np.mean(list(images.values())))),
            "cost_factor": estimate(costs.get(name, 1.0)),
            "verdict": "believable",
        }
        for (name, _), images in outcomes.items()
    }


def test_a_share_of_a_gain_comes_with_its_interval():
    claim, outcomes, gains = shares_of(
        *(("base", 0.3), ("lead", 0.6), ("near", 0.61), ("half", 0.45), ("dear", 0.7)), seen=100
    )
    three = [np.stack([*outcomes[n, "clean"].values()])[:, 100:] for n in ("near", "base", "lead")]
    assert gains.shares["near"] == (*gain_ratio(*three), 4) and gains.images == 400
    assert {*gains.shares} == {"near", "half", "dear"}
    summary = summary_of(outcomes, dear=3.0)
    sentence = claims.judge(claim, summary, gains)
    ratio, low, high, _ = gains.shares["near"]
    assert f"at most 2x: near ({ratio:.0%}, {100 * low:.0f} to {100 * high:.0f}%, 1.00x). " in (
        sentence
    )
    assert sentence.endswith("; images: 400.") and "The whole gain is +" in sentence
    rows = report.share_rows(gains, summary)
    assert [row["recipe"] for row in rows] == ["dear", "near", "half"]
    assert rows[0]["cost"] == 3.0 and rows[0]["low"] < rows[0]["share"] < rows[0]["high"]


def test_no_share_is_given_of_a_gain_that_may_be_chance():
    hard = RANDOM.uniform(size=500)
    claim, outcomes, gains = shares_of(("base", 0.4), ("lead", 0.4), ("a", 0.7), of=hard)
    assert not gains.shares and report.share_rows(gains, {}) == []
    sentence = claims.judge(claim, summary_of(outcomes), gains)
    assert "lead's gain is not beyond chance, so no share is given. It is " in sentence
    assert "70%" not in sentence and "a (" not in sentence


def test_a_gain_that_nobody_else_could_have_is_a_gain():
    claim, outcomes, gains = shares_of(("base", 0.3), ("lead", 0.9))
    assert gains.beyond_chance and not gains.shares
    sentence = claims.judge(claim, summary_of(outcomes), gains)
    assert "no recipe. The whole gain is +" in sentence


def test_recipes_that_share_no_seed_have_no_share():
    claim, outcomes, _ = shares_of(("base", 0.3), ("lead", 0.6), ("a", 0.6))
    outcomes["a", "clean"] = {9: outcomes["a", "clean"][0]}
    everything = {("clean", 0): np.ones(500, bool)}
    assert not report.gain_shares(claim, outcomes, everything).shares
    outcomes["base", "clean"] = {7: outcomes["base", "clean"][0]}
    gains = report.gain_shares(claim, outcomes, everything)
    assert gains.whole is None
    assert "share no seed" in claims.judge(claim, summary_of(outcomes), gains)


def test_a_verdict_marks_a_tested_claim_and_does_not_change_it():
    _, outcomes, _ = shares_of(("a", 0.6), ("b", 0.5))
    summary = summary_of(outcomes)
    claim = {"more": "a", "than": "b", "by": "robust_public"}
    assert claims.mark(claim, summary) == ""
    summary["a"]["verdict"] = "not believable"
    assert claims.mark(claim, summary) == " NOT BELIEVABLE: a."
    assert claims.mark({**claim, "by": "clean"}, summary) == ""
    assert claims.mark({**claim, "than": "failed"}, summary) == " NOT BELIEVABLE: a."


def test_holm_is_its_published_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_shapes_that_differ_are_refused():
    for other in (np.ones((3, 4)), np.ones((2, 5)), np.ones(4)):
        with pytest.raises(ValueError, match=r"both must be \[seeds, images\]"):
            advantage(np.ones((2, 4)), other)


CLAIMS = (
    {"more": "a", "than": "b", "by": "clean", "seen": 100},
    {"more": "b", "than": "a", "by": "robust_worst", "margin": 0.02},
    {"more": "c", "than": "a", "by": "clean"},
)


def test_announced_claims_are_judged_together_on_unseen_images():
    hard = RANDOM.uniform(size=500)
    first, second = right(0.7, of=hard), right(0.4, of=hard)
    by_seed = {("a", "clean"): dict(enumerate(first)), ("b", "clean"): dict(enumerate(second[:3])),
               ("a", "robust_worst"): dict(enumerate(first)),
               ("b", "robust_worst"): dict(enumerate(second))}  # fmt: skip
    fresh = np.arange(500) >= 100
    unseen = {("clean", 100): fresh, ("robust_worst", 0): np.ones(500, bool),
              ("clean", 0): np.ones(500, bool)}  # fmt: skip
    judged = announced.judge(CLAIMS, by_seed, unseen, claims.PLACES)
    one, two, three = (claim.sentence for claim in judged)
    found = advantage(first[:3, 100:], second[:3, 100:])
    assert one.startswith("a has more than b without an attack: holds. ")
    assert f"{100 * found.mean:+.1f} points" in one and "seeds: 3, images: 400" in one
    assert f"p = {2 * found.p:.2g} after Holm over 2" in one
    assert two.startswith("b has at most 2 points less than a under both suites: is not shown.")
    assert three.endswith("cannot be judged, it was not measured.")
    numbers = judged[0].measured
    assert [numbers[name] for name in ("difference", "low", "high", "p")] == [*found]
    assert numbers["p_holm"] == pytest.approx(2 * found.p)
    assert (numbers["seeds"], numbers["images"]) == (3, 400) and judged[2].measured is None


def test_a_claim_that_is_not_judged_says_why():
    of = {("a", "clean"): {0: np.ones(4, bool)}, ("b", "clean"): {0: np.zeros(4, bool)}}
    claim = {"more": "a", "than": "b", "by": "clean"}

    def said(right, images):
        (one,) = announced.judge(
            [claim], right, {("clean", 0): np.arange(4) < images}, claims.PLACES
        )
        assert one.measured is None
        return one.sentence.partition("cannot be judged, ")[2]

    assert said({**of, ("b", "clean"): {1: np.zeros(4, bool)}}, 4) == "the two share no seed."
    assert said(of, 1) == "it takes two test images, and 1 counts."
    assert said({("a", "clean"): of["a", "clean"]}, 4) == "it was not measured."


def _of_set(*p, **entries):
    shares = zip(("clean", "robust_public", "robust_twin"), p, strict=False)
    return {
        "claims": [
            *({"claim": {"more": "a", "than": "b", "by": by, **entries}, "measured": {"p": one}}
              for by, one in shares),
            {"claim": {"order": ["a", "b"]}, "sentence": "The order of someone: not confirmed."},
        ]
    }  # fmt: skip


def test_a_claim_of_every_set_is_as_good_as_on_the_worst():
    sets = [_of_set(0.001, 0.04, 0.02), _of_set(0.03, 0.001, 0.01, seen=100)]
    claims_, p = zip(*announced.on_every_set(sets), strict=True)
    assert claims_[0] == {"more": "a", "than": "b", "by": "clean"}
    # The largest are 0.03, 0.04, 0.02.
    np.testing.assert_allclose(p, [0.06, 0.06, 0.06])
    each = [[one["measured"]["p"] for one in of["claims"][:3]] for of in sets]
    naive = np.max([holm(some) for some in each], axis=0)
    assert (naive <= p).all() and (naive < p).any()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], "every set needs the same claims"),
        ([_of_set(0.1, 0.2), _of_set(0.1)], "every set needs the same claims"),
        ([_of_set()], "one at least"),
        ([{"claims": [{"claim": {"more": "a"}}]}], "run the stage compare again"),
    ],
)
def test_sets_of_other_claims_are_not_put_together(sets, message):
    with pytest.raises(ValueError, match=message):
        announced.on_every_set(sets)


def _write_set(folder, verdict="believable"):
    rows = [a_row("b", 0.2), a_row("a", 0.6, verdict=verdict)]
    measured = {"difference": 0.4, "low": 0.3, "high": 0.5, "p": 0.01, "p_holm": 0.02}
    measured |= {"seeds": 3, "images": 50}
    judged = [
        {"claim": {**CLAIMS[0], "by": by}, "sentence": "It holds.", "measured": measured}
        for by in ("clean", "robust_public")
    ]
    comparison = {**a_comparison(), "rows": rows, "baseline": "b", "claims": judged}
    folder.mkdir(parents=True)
    write_results(folder / "results.json", [entry()], comparison=comparison)
    return str(folder)


def test_the_table_of_all_sets_marks_what_is_not_believable(tmp_path, capsys):
    tool = runpy.run_path("tools/claims_on_every_set.py")["main"]
    sets = [_write_set(tmp_path / "one" / "set"), _write_set(tmp_path / "set", "not believable")]
    tool(sets)
    head, _, clean, public = capsys.readouterr().out.splitlines()
    assert head == f"| claim | {sets[0]} | {sets[1]} | p over all sets |"
    cell = "+40.0 (+30.0 to +50.0), p 0.01"
    assert clean == f"| a against b, clean | {cell} | {cell} | 0.02 |"
    assert public.startswith(f"| a against b, robust_public | {cell} | {cell} NOT BELIEVABLE: a |")
    (tmp_path / "set" / "results.json").unlink()
    with pytest.raises(SystemExit):
        tool(sets)
    assert "results.json" in capsys.readouterr().err


def test_one_seed_shows_nothing_of_others():
    """Two equal recipes are apart by their seeds, and images alone would decide."""
    by_seed = {("a", "clean"): {0: np.arange(500) < 400}, ("b", "clean"): {0: np.arange(500) < 300}}
    (claim,) = announced.judge(
        [{"more": "a", "than": "b", "by": "clean"}],
        by_seed,
        {("clean", 0): np.ones(500, bool)},
        claims.PLACES,
    )
    assert "holds for this one seed, which says nothing of others." in claim.sentence


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"more": "a", "than": "b"}, "has no 'by'"),
        ({"more": "a", "than": "a", "by": "clean"}, "must compare two recipes"),
        ({"more": "a", "than": "d", "by": "clean"}, "'d' in .* is not compared"),
        ({"more": "a", "than": "b", "by": "clen"}, "is no share"),
        ({"more": "a", "than": "b", "by": "clean", "within": 2}, "unknown entry 'within'"),
    ],
)
def test_an_announced_claim_that_cannot_be_is_refused(claim, message):
    with pytest.raises(ValueError, match=message):
        report.claims.check_claim(claim, ["a", "b", "c"])


@pytest.mark.parametrize("seeds", [(2, 2), (3, 5)])
def test_the_half_width_over_seeds_is_that_of_welchs_test(seeds):
    shares = [np.random.default_rng(n).normal(0.5, 0.02 * n, n) for n in seeds]
    test = stats.ttest_ind(*shares, equal_var=False).confidence_interval(0.95)
    half = half_width_over_seeds(*((x.std(ddof=1), len(x)) for x in shares))
    assert half == pytest.approx((test.high - test.low) / 2)
    alone = half_width_over_seeds((shares[0].std(ddof=1), seeds[0]), (None, 1))
    assert alone > 0 and half_width_over_seeds((None, 1), (0.0, 3)) == 0
