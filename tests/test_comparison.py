"""The comparison of methods: its summary, its files, and the sentence on their order."""

import csv

import numpy as np
import pytest

from robust_ssl.report.columns import FIELDS
from robust_ssl.report.comparison import Figure, ordering, summarize, write_comparison
from robust_ssl.report.differences import decided, differ, differences
from robust_ssl.report.goals import better_on_all, cheap_robustness


def row(method="usual", seed=0, robust=0.25, **changed):
    return {
        "method": method,
        "seed": seed,
        "clean": 0.75,
        "robust_public": robust,
        "robust_hardened": robust,
        "robust_worst": robust,
        "autoattack": None,
        "images": 1000,
        "autoattack_images": None,
        "verdict": "trusted",
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
        row("a", 0, 0.5, verdict="trusted with notes"),
        row("b", 1, 0.75, verdict="not examined"),
        row("b", 2, 0.5, verdict="trusted with notes", images=500),
    ]
    found = summarize(rows)
    assert list(found) == ["b", "a"]
    assert found["b"]["robust_public"] == Figure(0.5, pytest.approx(0.25), 3)
    assert found["b"]["autoattack"] == Figure(0.1, None, 1)
    assert found["b"]["peak_bytes"] == Figure(None, None, 0)
    assert found["a"]["robust_public"] == Figure(0.5, None, 1)
    assert [found[m]["verdict"] for m in "ba"] == ["not examined", "trusted with notes"]
    assert (found["b"]["seeds"], found["b"]["images"]) == (3, 500)
    assert (found["b"]["autoattack_images"], found["a"]["autoattack_images"]) == (100, None)


def test_not_trusted_is_the_worst_verdict():
    rows = [row(seed=0, verdict="not trusted"), row(seed=1, verdict="not examined")]
    assert summarize(rows)["usual"]["verdict"] == "not trusted"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "nothing to compare"),
        ([row(), row()], "'usual', seed 0 is there twice"),
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
def test_rows_that_are_none_are_refused(rows, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        summarize(rows)
    with pytest.raises(ValueError, match=said):
        write_comparison(tmp_path, rows)
    assert not list(tmp_path.iterdir())


def test_csv_brings_every_row_back(tmp_path):
    rows = [row(seed=0, robust=1 / 3), row(seed=1, autoattack=0.1, autoattack_images=100)]
    table, page = write_comparison(tmp_path / "new", rows)
    assert (table.name, page.name) == ("comparison.csv", "comparison.md")
    with open(table, newline="") as file:
        read = list(csv.DictReader(file))
    texts = ("method", "verdict")
    assert list(read[0]) == list(FIELDS)
    assert [
        {k: v if k in texts else float(v) if v else None for k, v in line.items()} for line in read
    ] == rows


def test_page_has_sentences_table_and_legend(tmp_path):
    rows = [
        row("usual", 0, 0.25, peak_bytes=3 * 2**20),
        row("usual", 1, 0.75, peak_bytes=5 * 2**20),
        row("trades", 0, 0.5, verdict="not trusted", autoattack=0.25, autoattack_images=100),
    ]
    _, page = write_comparison(tmp_path, rows, ["First.", "Second."])
    text = page.read_text()
    assert text.startswith("# Comparison\n\nFirst.\n\nSecond.\n\n| method |")
    lines = [[c.strip() for c in s.split("|")[1:-1]] for s in text.splitlines() if s[:1] == "|"]
    usual, trades = (dict(zip(lines[0], cells, strict=True)) for cells in lines[2:])
    assert usual == {
        "method": "usual (frozen encoder)",
        "seeds": "2",
        "clean": "75.0 ± 0.0 %",
        "robust, public": "50.0 ± 35.4 %",
        "robust, hardened": "50.0 ± 35.4 %",
        "robust, both": "50.0 ± 35.4 %",
        "AutoAttack": "n/a",
        "cost": "1.00 ± 0.00x",
        "grads": "1.0 ± 0.0",
        "grads/epoch": "1.0 ± 0.0",
        "ms/image": "2.50 ± 0.00",
        "training": "1,234.6 ± 0.0 s",
        "memory": "4 ± 1 MiB",
        "verdict": "trusted",
    }
    assert trades["clean"] == "75.0 %"
    assert trades["robust, public"] == "50.0 % NOT TRUSTED"
    assert trades["AutoAttack"] == "25.0 % NOT TRUSTED"
    assert trades["memory"] == "n/a" and trades["verdict"] == "not trusted"
    legend = text.split("\n\n")[-1]
    assert all(f"- {name}: " in legend for name in lines[0] if name not in ("method", "seeds"))
    assert "1,000 test images, so that a share is known to ± 3.1 points" in legend
    assert "AutoAttack: 100 test images" in legend


def test_a_column_without_a_figure_is_left_out_and_a_part_is_said(tmp_path):
    text = write_comparison(tmp_path, [row()])[1].read_text()
    assert "AutoAttack" not in text and "memory |" not in text and "±  " not in text
    rows = [row(seed=0, cost_factor=2.0), row(seed=1, cost_factor=None)]
    assert "| 2.00x (1 of 2 seeds) |" in write_comparison(tmp_path, rows)[1].read_text()


def order(*robust, **changed):
    methods = "abcd"[: len(robust)]
    rows = [
        row(m, 0, share, **changed.get(m, {})) for m, share in zip(methods, robust, strict=True)
    ]
    return ordering(summarize(rows), list(methods), by="robust_public")


WHAT = "by accuracy in the worst case per image over the attacks crafted on the public encoder (a"


def test_an_order_that_holds_is_confirmed_with_numbers():
    assert order(0.1, 0.2, 0.3) == f"The order a < b < c holds {WHAT} 10.0 %, b 20.0 %, c 30.0 %)."


def test_an_order_is_somebodys():
    found = summarize([row("a", 0, 0.1), row("b", 0, 0.9)])
    assert ordering(found, "ab", of="They").startswith(
        "The order a < b, which They report, holds by accuracy"
    )


def test_an_order_that_breaks_names_the_neighbours():
    assert order(0.1, 0.4, 0.3, 0.5) == (
        f"The order a < b < c < d does not hold {WHAT} 10.0 %, b 40.0 %, c 30.0 %, d 50.0 %): "
        "b and c stand the other way round (-10.0 points)."
    )


@pytest.mark.parametrize("second", [0.21, 0.19, 0.2])
def test_a_difference_inside_the_interval_is_undecided(second):
    said = order(0.2, second)
    assert said.startswith("The order a < b is undecided")
    assert f"a and b are undecided ({100 * second - 20:+.1f} points, inside" in said


def test_a_difference_inside_the_deviation_is_undecided():
    apart = [row("a", 0, 0.2), row("b", 0, 0.4)]
    assert " holds " in ordering(summarize(apart), "ab", by="robust_hardened")
    spread = [row("a", 0, 0.2), row("b", 0, 0.1), row("b", 1, 0.7)]
    assert " is undecided " in ordering(summarize(spread), "ab", by="robust_hardened")


def test_the_number_of_images_decides_what_is_decided():
    few = order(0.2, 0.4, a={"images": 20}, b={"images": 20})
    assert " is undecided " in few and " holds " in order(0.2, 0.4)


def test_what_was_not_measured_or_not_trusted_is_said():
    rows = [
        row("a", autoattack=0.1, autoattack_images=100),
        row("b"),
        row("c", autoattack=0.9, autoattack_images=100, verdict="not trusted"),
    ]
    found = summarize(rows)
    assert ordering(found, "abc", by="autoattack") == (
        "The order a < b < c holds by accuracy under AutoAttack (a 10.0 %, c 90.0 %). "
        "Not measured: b. NOT TRUSTED: c."
    )
    assert ordering(found, "ab", by="autoattack") == (
        "The order a < b cannot be judged by accuracy under AutoAttack. Not measured: b."
    )
    assert "NOT TRUSTED" not in ordering(found, "ac", by="clean")


def images(count, n=1000, first=0):
    """`count` of `n` images were right, from the first."""
    return (np.arange(n) >= first) & (np.arange(n) < first + count)


def test_methods_are_compared_on_the_same_images():
    """Shares of 50 and 47 % of 1,000 images: by their intervals undecided, by the images not."""
    rows = [row("lead", robust=0.5), row("nested", robust=0.47), row("other", robust=0.47)]
    right = {
        "lead": {"robust_hardened": images(500)},
        "nested": {"robust_hardened": images(470)},  # right only where the leader is
        "other": {"robust_hardened": images(470, first=530)},  # right only where it is not
    }
    alone, found = summarize(rows), summarize(rows, right)
    assert not decided(alone["lead"], alone["nested"], "robust_hardened")
    assert differ(alone["lead"], alone["nested"], "robust_hardened") is None
    assert differ(found["nested"], found["lead"], "robust_hardened") == (
        pytest.approx(-0.03),
        pytest.approx(1.96 * 30**0.5 / 1000),
    )
    assert decided(found["nested"], found["lead"], "robust_hardened")
    assert not decided(found["other"], found["lead"], "robust_hardened")
    assert " does not hold " in ordering(found, ["lead", "nested"])
    assert " is undecided " in ordering(found, ["lead", "other"])
    assert " is undecided " in ordering(alone, ["lead", "nested"])
    lines = differences(found, "lead")
    assert [(line["method"], line["share"], line["decided"]) for line in lines] == [
        ("nested", "robust_hardened", "yes"),
        ("other", "robust_hardened", "no"),
    ]


def test_a_difference_inside_the_deviation_over_seeds_is_not_decided():
    shares = {"a": (0.5, 0.5), "b": (0.3, 0.5)}
    rows = [row(m, s, robust) for m, both in shares.items() for s, robust in enumerate(both)]
    halves = {
        m: sum(images(1000 * r).astype(float) for r in both) / 2 for m, both in shares.items()
    }
    found = summarize(rows, {name: {"robust_public": each} for name, each in halves.items()})
    value, half = differ(found["b"], found["a"], "robust_public")
    assert value == pytest.approx(-0.1) and half == pytest.approx(0.2 / 2**0.5)
    assert not decided(found["b"], found["a"], "robust_public")


def test_images_that_say_another_share_are_refused():
    with pytest.raises(ValueError, match=r"usual: clean is 0\.75 by the rows and 0\.5 by image"):
        summarize([row()], {"usual": {"clean": images(500)}})


def test_differences_from_a_leader_are_written(tmp_path):
    rows = [row("lead", robust=0.5), row("worse", robust=0.4, verdict="not trusted")]
    right = {
        "lead": {"clean": images(750), "robust_public": images(500)},
        "worse": {"clean": images(750), "robust_public": images(400)},
    }
    page, numbers = tmp_path / "comparison.md", tmp_path / "differences.csv"
    assert numbers in write_comparison(tmp_path, rows, (), right, "lead")
    assert "## Against lead" in page.read_text()
    assert (
        "| worse | +0.0 ± 0.0 | **-10.0 ± 2.0** NOT TRUSTED | n/a | n/a | n/a |" in page.read_text()
    )
    with numbers.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["share"] for line in lines] == ["clean", "robust_public"]
    assert float(lines[1]["difference"]) == -0.1 and lines[1]["verdict"] == "not trusted"
    write_comparison(tmp_path / "without", rows, (), right, "nobody")
    assert not (tmp_path / "without" / "differences.csv").exists()


def goal(**methods):
    """The two sentences; each method is (clean, hardened, cost, **changes)."""
    rows = [
        row(name, 0, robust, clean=clean, cost_factor=cost, **(more[0] if more else {}))
        for name, (clean, robust, cost, *more) in methods.items()
    ]
    found = summarize(rows)
    return cheap_robustness(found), better_on_all(found)


BASE = {"usual": (0.7, 0.1, 0.5), "gen_af": (0.8, 0.6, 9.0)}
DOUBT = {"verdict": "not trusted"}


def test_a_method_has_nearly_all_of_the_gain_at_little_cost():
    cheap, _ = goal(
        **BASE,
        on_both_limits=(0.1, 0.55, 1.5),
        too_weak=(0.9, 0.54, 1.0),
        too_dear=(0.9, 0.9, 1.51),
        doubted=(0.9, 0.9, 1.0, DOUBT),
        no_cost=(0.9, 0.9, None),
    )
    assert cheap == (
        "At least 90% of gen_af's gain over usual (frozen encoder) in accuracy in the worst case "
        "over both suites, at a cost of at most 1.5x that of full (all of it is 50.0 points): "
        "on_both_limits (90% of the gain, cost 1.50x)."
    )
    assert goal(**BASE)[0].endswith("(all of it is 50.0 points): no method has that.")
    assert goal(**{**BASE, "gen_af": (0.8, 0.1, 9)})[0].endswith("gains nothing (+0.0 points).")
    assert goal(**{**BASE, "usual": (0.7, 0.1, 1.0, DOUBT)})[0].endswith(
        "cannot be judged, NOT TRUSTED: usual (frozen encoder)."
    )


def test_a_method_is_better_on_all():
    auto = {"autoattack": 0.3, "autoattack_images": 1000}
    _, better = goal(
        usual=(0.7, 0.1, 0.5),
        gen_af=(0.8, 0.6, 9.0, auto),
        best=(0.9, 0.7, 2.0, {**auto, "autoattack": 0.5}),
        by_chance=(0.81, 0.7, 2.0),
        broken=(0.9, 0.9, 2.0, {**auto, "autoattack": 0.0}),
        as_clean=(0.8, 0.9, 2.0),
        under_one_suite=(0.9, 0.7, 2.0, {"robust_public": 0.59}),
        doubted=(0.9, 0.9, 1.0, DOUBT),
    )
    assert better == (
        "Better than gen_af in clean accuracy, in accuracy under both suites and, where measured, "
        "in accuracy under AutoAttack: best (clean +10.0, robust, public +10.0, robust, hardened "
        "+10.0, robust, both +10.0, AutoAttack +20.0 points), by_chance (clean +1.0, robust, "
        "public +10.0, robust, hardened +10.0, robust, both +10.0 points; not all of it more than "
        "chance)."
    )
    assert goal(**BASE)[1].endswith(": no method is.")
    doubted = {**BASE, "gen_af": (0.8, 0.6, 9.0, DOUBT)}
    assert goal(**doubted)[1].endswith("cannot be judged, NOT TRUSTED: gen_af.")


@pytest.mark.parametrize(
    ("names", "by", "said"),
    [
        (["a", "z"], "clean", r"not compared: \['z'\]; known: a, b"),
        (["a"], "clean", "two or more different"),
        (["a", "a"], "clean", "two or more different"),
        (["a", "b"], "gradients", "'gradients' is no share"),
    ],
)
def test_an_order_of_strangers_is_refused(names, by, said):
    with pytest.raises(ValueError, match=said):
        ordering(summarize([row("a"), row("b")]), names, by=by)
