"""The AutoAttack benchmark carries the same network over, sets both sides alike, and reports."""

import argparse
import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import autoattack

    # The authors' package has this script's name; only one of them can be imported at a time.
    yield autoattack
    sys.modules.pop("autoattack", None)


class Stranger:
    """Stands in for the authors' `AutoAttack`: it takes the settings and inverts every image."""

    made = ()

    def __init__(self, model, **settings):
        names = ("apgd", "apgd_targeted", "fab", "square")
        self.__dict__ |= {name: types.SimpleNamespace() for name in names} | settings
        Stranger.made = (*Stranger.made, self)

    def run_standard_evaluation(self, pixels, labels, bs):
        return 1 - pixels


def test_the_torch_network_is_the_same(benchmark):
    classifier = benchmark.untrained(16, 10)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    examples = types.SimpleNamespace(images=images)
    assert benchmark.agree(classifier, benchmark.to_torch(classifier), examples) < 1e-5
    other = classifier.replace(
        head_variables=jax.tree.map(lambda x: x + 0.1, classifier.head_variables)
    )
    with pytest.raises(SystemExit, match="networks differ"):
        benchmark.agree(other, benchmark.to_torch(classifier), examples)


def test_both_sides_are_set_alike(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=Stranger))
    options = argparse.Namespace(seed=0, steps_scale=0.5)
    theirs = benchmark.official_adversary(None, "standard", "L2", 10, options, "cpu")
    ours = benchmark.our_attacks("standard", "L2", 10, 0.5)
    assert theirs.attacks_to_run == list(ours) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert theirs.eps == ours["apgd-ce"][0].threat.epsilon == 0.5
    for name, side in (("apgd-ce", theirs.apgd), ("fab-t", theirs.fab)):
        assert side.n_iter == ours[name][0].num_steps == 50 and side.n_restarts == 1
    assert theirs.apgd_targeted.n_target_classes == len(ours["apgd-t"]) == 9
    assert theirs.fab.n_target_classes == len(ours["fab-t"]) == 9
    assert theirs.square.n_queries == ours["square"][0].num_queries == 2500


def test_it_runs_and_reports_what_it_promises(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=Stranger))
    path = tmp_path / "found.json"
    arguments = "--images 10 --epochs 1 --image-size 8 --steps-scale 0.01 --batch 10 --models plain"
    command = ["autoattack.py", *arguments.split(), "--norms", "Linf", "--devices", "1"]
    command += ["--attacks", "apgd-ce", "standard", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    found = json.loads(path.read_text())
    assert [row["attack"] for row in found["rows"]] == ["apgd-ce", "standard"]
    for row in found["rows"]:
        assert row["points"] == pytest.approx(100 * (row["ours"] - row["official"]))
        assert row["ours"] <= found["clean_accuracy"]["plain"] and row["our_seconds"] > 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and all(line.count("|") == 11 for line in table)
