"""The trade-off: the front and its area against brute force, the sentence, the picture."""

import csv
import itertools

import numpy as np
import pytest

from robust_ssl.report.pareto import Point, area_under_front, figure_pareto, front, place
from robust_ssl.report.sentences import advice


def random_points(seed, n=12, steps=8):
    """A coarse grid of values, so that ties and duplicates are common."""
    values = np.random.default_rng(seed).integers(0, steps + 1, (n, 2)) / steps
    return [Point(f"p{i}", float(c), float(r), 1.0 + i) for i, (c, r) in enumerate(values)]


@pytest.mark.parametrize("seed", range(20))
def test_front_is_what_no_other_beats(seed):
    points = random_points(seed)
    kept = {
        (p.clean, p.robust)
        for p in points
        if not any(q.clean >= p.clean and q.robust >= p.robust and q[1:3] != p[1:3] for q in points)
    }
    found = front(points)
    assert {(p.clean, p.robust) for p in found} == kept and len(found) == len(kept)
    assert all(a.clean < b.clean and a.robust > b.robust for a, b in itertools.pairwise(found))
    for point in found:  # of equals the cheapest
        assert point.cost == min(q.cost for q in points if q[1:3] == point[1:3])


@pytest.mark.parametrize("seed", range(20))
def test_area_is_the_share_of_cells_that_some_point_covers(seed):
    steps = 8
    points = random_points(seed, steps=steps)
    middle = (np.arange(steps) + 0.5) / steps
    clean, robust = np.meshgrid(middle, middle)
    covered = np.zeros_like(clean, bool)
    for point in points:
        covered |= (clean < point.clean) & (robust < point.robust)
    assert area_under_front(points) == pytest.approx(covered.mean(), abs=1e-12)


def test_area_at_the_ends():
    assert area_under_front([]) == 0 and front([]) == []
    assert area_under_front([Point("perfect", 1.0, 1.0, 1.0)]) == 1
    assert area_under_front([Point("plain", 0.9, 0.0, 1.0)]) == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([Point("a", float("nan"), 0.5, 1.0)], "no point"),
        ([Point("a", 0.5, float("nan"), 1.0)], "no point"),
        ([Point("a", 90.0, 0.5, 1.0)], "shares"),
        ([Point("a", 0.5, 0.5, float("inf"))], "cost"),
        ([Point("a", 0.5, 0.5, 0.0)], "cost"),
        ([Point("a", 0.5, 0.5, 1.0), Point("a", 0.6, 0.5, 1.0)], r"\['a'\]"),
    ],
)
def test_points_that_are_none_are_refused(wrong, said):
    for function in (front, area_under_front):
        with pytest.raises(ValueError, match=said):
            function(wrong)


PLAIN = Point("plain", 0.9, 0.1, 1.0)


def test_advice_takes_the_most_robust_within_both_limits():
    points = [
        PLAIN,
        Point("on the limits", 0.88, 0.4, 2.0),
        Point("too slow", 0.89, 0.6, 2.1),
        Point("too wrong", 0.87, 0.7, 1.0),
        Point("weaker", 0.95, 0.3, 1.0),
    ]
    assert advice(points, baseline="plain") == (
        "Within 2 points of clean accuracy and 2x the reference's training time, take on the "
        "limits. It keeps 40.0 % under attack (+30.0 points over plain) and 88.0 % clean (-2.0), "
        "cost 2.0x."
    )
    assert "take too slow" in advice(points, baseline="plain", max_cost=3)
    assert "take too wrong" in advice(points, baseline="plain", max_clean_loss=0.03)
    strict = advice(points, baseline="plain", max_clean_loss=0, max_cost=1.5)
    assert "take weaker" in strict and "95.0 % clean (+5.0)" in strict


def test_advice_says_that_nothing_does_it():
    dear = Point("dear", 0.8, 0.5, 9.0)
    assert advice([PLAIN, dear], baseline="plain") == (
        "Within 2 points of clean accuracy and 2x the reference's training time, nothing is more "
        "robust than plain (10.0 %). The most robust at any price is dear. It keeps 50.0 % under "
        "attack (+40.0 points over plain) and 80.0 % clean (-10.0), cost 9.0x."
    )
    assert "nothing is more robust than plain (10.0 %)" in advice([PLAIN], baseline="plain")
    with pytest.raises(ValueError, match=r"no point is called 'full'.*plain, dear"):
        advice([PLAIN, dear], baseline="full")


def test_advice_counts_cost_from_the_reference_whatever_the_baseline_costs():
    cheap = [PLAIN._replace(cost=0.25), Point("a", 0.9, 0.5, 1.9), Point("b", 0.9, 0.6, 2.1)]
    sentence = advice(cheap, baseline="plain")
    assert "take a. " in sentence and sentence.endswith("cost 1.9x.")


def test_advice_says_where_a_gain_may_be_chance():
    few = [PLAIN._replace(images=100), Point("a", 0.9, 0.15, 1.0, images=100)]
    assert advice(few, baseline="plain").endswith("On so few images that gain may be chance.")
    many = [point._replace(images=10_000) for point in few]
    assert "chance" not in advice(many, baseline="plain")
    assert "chance" not in advice([PLAIN, few[1]], baseline="plain")  # not known


def test_what_is_not_believable_has_no_part():
    doubtful = Point("best", 1.0, 1.0, 1.0, believable=False)
    points = [PLAIN, Point("fair", 0.89, 0.5, 1.0)]
    for function in (front, area_under_front):
        assert function([*points, doubtful]) == function(points)
    assert advice([*points, doubtful], baseline="plain") == advice(points, baseline="plain")
    assert "nothing is more robust" in advice([PLAIN, doubtful], baseline="plain")


def test_a_base_that_is_not_believable_gives_its_clean_accuracy():
    base = PLAIN._replace(robust=0.8, believable=False)
    mark = " The figures of plain under attack are NOT BELIEVABLE: only its clean one is used."
    points = [base, Point("fair", 0.89, 0.5, 1.0), Point("far", 0.5, 0.6, 1.0)]
    assert advice(points, baseline="plain").endswith(
        "take fair. It keeps 50.0 % under attack and 89.0 % clean (-1.0), cost 1.0x." + mark
    )
    assert advice([base], baseline="plain").endswith(
        "no recipe with a believable figure fits." + mark
    )
    sentence = advice([base, Point("far", 0.5, 0.6, 1.0)], baseline="plain")
    assert "no recipe with a believable figure fits. " in sentence
    assert "The most robust at any price is far. It keeps 60.0 % under attack and" in sentence


def draw(directory, points, name="pareto"):
    return figure_pareto(
        directory, points, label_clean="clean accuracy", label_robust="robust accuracy", name=name
    )


@pytest.mark.parametrize("long", [False, True])
def test_figure_has_its_numbers_and_the_same_bytes(tmp_path, long):
    points = random_points(3)
    points[4] = points[4]._replace(believable=False)
    if long:
        points = [
            p._replace(name=f"epsilon=0.03, num_steps={i}, m=2") for i, p in enumerate(points)
        ]
    first = draw(tmp_path / "a", points)
    second = draw(tmp_path / "b", points)
    assert first.name == "pareto.png"
    for suffix in (".png", ".svg", ".csv"):
        bytes_ = first.with_suffix(suffix).read_bytes()
        assert bytes_ and bytes_ == second.with_suffix(suffix).read_bytes()
    with open(first.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = ("clean", "robust", "cost")
    read = [
        Point(r["name"], *(float(r[n]) for n in numbers), believable=r["believable"] == "1")
        for r in rows
    ]
    assert read == points
    assert {r["name"] for r in rows if r["on_front"] == "1"} == {p.name for p in front(points)}


def test_figure_of_one_point_and_of_many(tmp_path):
    assert draw(tmp_path, [PLAIN], "one").exists()
    assert draw(tmp_path, [PLAIN._replace(believable=False)], "none").exists()
    assert draw(tmp_path, random_points(0, n=40, steps=50), "many").exists()
    with pytest.raises(ValueError, match="no point to draw"):
        draw(tmp_path, [])


def test_names_cover_neither_each_other_nor_marks():
    rng = np.random.default_rng(0)
    circles = np.column_stack([rng.uniform(30, 370, 15), rng.uniform(30, 270, 15), np.full(15, 5)])
    circles[1] = circles[0]  # one on the other
    sizes = np.tile([45.0, 9.0], (15, 1))
    frame = np.asarray([0.0, 0.0, 400.0, 300.0])
    boxes, fits = place(sizes, circles, frame)
    assert fits and not place(5 * sizes, circles, frame)[1]
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], sizes)
    assert (boxes[:, :2] >= -1e-9).all() and (boxes[:, 2:] <= frame[2:] + 1e-9).all()
    for i, box in enumerate(boxes):
        for other in np.delete(boxes, i, axis=0):
            assert (np.minimum(box[2:], other[2:]) <= np.maximum(box[:2], other[:2]) + 1e-9).any()
        distance = np.linalg.norm(
            np.clip(circles[:, :2], box[:2], box[2:]) - circles[:, :2], axis=1
        )
        assert distance.min() > 4
