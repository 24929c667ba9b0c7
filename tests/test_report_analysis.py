"""The figures of an analysis: their numbers, their sameness, their page."""

import csv
import json
import re

import numpy as np
import pytest

from robust_ssl.evaluation import Counts
from robust_ssl.evaluation.analysis import EDGES, FourierMap, HarmfulBand
from robust_ssl.report import analysis


def counts(correct, flipped=3):
    return Counts(
        10, clean_correct=8, robust_correct=correct, succeeded=8 - correct, flipped=flipped
    )


def rows(path):
    with open(path.with_suffix(".csv"), newline="") as file:
        return list(csv.DictReader(file))


STABILITY = {
    model: {
        tap: {"cosine": 0.9, "cka": 0.8, "relative_drift": drift}
        for tap, drift in (("stem", 0.1), ("block1", 0.2), ("features", 0.4))
    }
    for model in ("baseline", "another")
}


def test_layers_stand_with_their_sensitivity(tmp_path):
    path = analysis.figure_layers(tmp_path, STABILITY, {"block1": 0.5, "head": 0.25})
    found = rows(path)
    assert [(row["model"], row["tap"]) for row in found[:3]] == [
        ("baseline", "stem"),
        ("baseline", "block1"),
        ("baseline", "features"),
    ]
    assert found[1] == {
        "model": "baseline",
        "tap": "block1",
        "cosine": "0.9",
        "cka": "0.8",
        "relative_drift": "0.2",
        "sensitivity": "0.5",
    }
    assert found[-1]["tap"] == "head" and found[-1]["sensitivity"] == "0.25"
    assert all(
        row["sensitivity"] == "" for row in rows(analysis.figure_layers(tmp_path, STABILITY))
    )


def test_shares_of_energy_add_up_and_a_zero_perturbation_has_none(tmp_path):
    energy = {"one": np.arange(9.0), "nothing": np.zeros(9)}
    found = rows(analysis.figure_energy(tmp_path, energy, EDGES))
    shares = [sum(float(row["share"]) for row in found if row["attack"] == a) for a in energy]
    assert shares == pytest.approx([1.0, 0.0])
    assert [float(row["low"]) for row in found[:9]] == list(EDGES[:-1])
    assert float(found[3]["energy"]) == 3.0


def a_map(measure="error_rate", n=4):
    cycles = np.arange(-(n // 2), n // 2) / n
    harm = np.linspace(0, 1, n * n).reshape(n, n)
    return FourierMap(cycles, cycles, harm, 0.1, measure, 4.0)


def test_a_map_keeps_its_places(tmp_path):
    band = HarmfulBand(0.2, 0.3, 0.5)
    found = rows(analysis.figure_fourier(tmp_path, {"baseline": a_map()}, {"baseline": band}))
    assert len(found) == 16
    place = next(r for r in found if (r["vertical"], r["horizontal"]) == ("-0.25", "0.0"))
    assert float(place["error_rate"]) == pytest.approx(6 / 15)
    analysis.figure_fourier(tmp_path, {"a": a_map("feature_drift"), "b": a_map("feature_drift", 2)})
    with pytest.raises(ValueError, match="one measure"):
        analysis.figure_fourier(tmp_path, {"a": a_map("feature_drift"), "b": a_map()})


@pytest.mark.parametrize("attacks", [1, 4])
def test_filtering_has_every_point(tmp_path, attacks):
    curve = {
        "low_pass": {0.1: counts(7), 0.2: counts(5)},
        "high_pass": {0.1: counts(2), 0.2: counts(3)},
        "whole": {0.0: counts(1)},
    }
    curves = {f"attack{i}": curve for i in range(attacks)}
    found = rows(analysis.figure_filtering(tmp_path, curves))
    assert len(found) == 5 * attacks
    low = [float(r["robust_accuracy"]) for r in found[:5] if r["filter"] == "low_pass"]
    assert low == [0.7, 0.5]


def test_transfer_has_every_pair(tmp_path):
    matrix = {"a": {"a": counts(0), "b": counts(7)}, "noise": {"a": counts(8, 0), "b": counts(8)}}
    found = rows(analysis.figure_transfer(tmp_path, matrix))
    pairs = [(row["crafted_on"], row["applied_to"]) for row in found]
    assert pairs == [("a", "a"), ("a", "b"), ("noise", "a"), ("noise", "b")]
    assert found[1]["robust_accuracy"] == "0.7" and found[2]["fooling_rate"] == "0.0"


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        analysis.figure_fourier(tmp_path / name, {"baseline": a_map()})
        analysis.figure_energy(tmp_path / name, {"one": np.arange(9.0)}, EDGES)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


def test_the_page_says_what_was_found(tmp_path):
    band = {"low": 0.1875, "high": 0.25, "harm": 0.612}
    fourier = {
        "baseline": {"measure": "error_rate", "clean": 0.1, "most_harmful_band": band},
        "public encoder": {"measure": "feature_drift", "clean": 0.0, "most_harmful_band": band},
    }
    numbers = {"fourier": fourier, "edges": np.array([0.0, np.nan])}
    numbers |= {"layers": {"pgd": {}, "noise": {}}, "energy": {}, "filtering": {"baseline": {}}}
    analysis.write_numbers(tmp_path / "analysis.json", {"images": "8 of digits"}, numbers)
    document = json.loads((tmp_path / "analysis.json").read_text())
    drawn = {"layers-pgd.png", "layers-noise.png", "fourier.png", "filtering-baseline.png"}
    page = analysis.analysis_page(document, drawn | {".fourier.png.0f.tmp", "mine.png"})
    assert "| images | 8 of digits |" in page
    shown = re.findall(r"\]\((.*\.png)\)", page)
    assert shown == ["layers-pgd.png", "layers-noise.png", "fourier.png", "filtering-baseline.png"]
    assert (
        "Against baseline (frozen encoder), single frequencies harm most from 0.188 to 0.25 cycles "
        "per pixel (61.2 % errors, 10.0 % without noise)."
    ) in page
    before = page.split("Against public encoder")[0]
    assert "0.612 (mean relative drift of the features)" not in before
    assert document["edges"] == [0.0, None] and document["about"] == {"images": "8 of digits"}
