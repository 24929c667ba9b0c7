"""The evaluation protocol: any saved classifier, the whole suite, resumable, with a leaderboard."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from robust_ssl import models, report, settings, stages, weights
from robust_ssl.evaluation import PerImage
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress, Stopped
from robust_ssl.stages import protocol as protocol_stage
from robust_ssl.stages import scoring

ATTACKS = "robust_ssl.attacks:"


def classifier(seed=0, classes=4, size=8):
    """A classifier from a function: with random weights in its head."""
    encoder = tiny.encoder(image_size=size)
    return models.classifier(jax.random.key(seed), encoder, classes, head="linear")


def with_mlp():
    return models.classifier(jax.random.key(0), tiny.encoder(), 4, head="mlp")


def no_classifier():
    return tiny.encoder()


def config():
    made = settings.load_config(str(tiny.CONFIGS / "evaluate.py")).unlock()
    made.encoder = {"builder": "tiny:encoder"}
    made.surrogate = {"source": "tiny:unlabelled"}
    made.downstream = {"source": "tiny:images", "validation": 0.25}
    made.classifiers = {
        "one": {"function": "test_protocol:classifier"},
        "two": {"function": "test_protocol:classifier", "seed": 1},
    }
    made.attack.methods = {
        "universal_pgd": {"function": f"{ATTACKS}UniversalPGD"},
        "patch": {
            "function": f"{ATTACKS}UniversalPGD",
            "threat": {"function": "robust_ssl.threats:Patch", "location": "fixed"},
            "epsilon": 0.1,
        },
        "random_noise": {"function": f"{ATTACKS}RandomNoise"},
    }
    made.attack.num_steps = 2
    made.attack.batch_size = 16
    made.protocol.seeds = (0, 1)
    made.protocol.batch_size = 32
    made.protocol.per_image = {
        "methods": {
            "tdaa": {"function": f"{ATTACKS}TDAA", "num_steps": 2, "target": 0},
            "pgd": {"function": f"{ATTACKS}PGD", "num_steps": 2},
        },
        "epsilons": (8 / 255,),
    }
    made.protocol.autoattack = {
        "version": "standard",
        "threats": {},
        "images": 16,
        "batch_size": 16,
    }
    made.protocol.checks = False
    return made


def go(made, workdir):
    layout = Parallel.create(num_devices=2)
    return stages.run(made, workdir, parallel=layout, progress=Progress("quiet"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("protocol")
    return workdir, go(config(), workdir)


def test_every_classifier_is_scored_under_every_attack(finished):
    workdir, _ = finished
    entries = report.read_results(workdir / "leaderboard.json")["results"]
    assert {entry["model"] for entry in entries} == {"one", "two"}
    assert {entry["verdict"] for entry in entries} == {"not examined"}
    found = {
        (
            e["attack"],
            e["family"],
            e["threat"],
            e["crafted_against"],
            round(e["epsilon"], 3),
            e["seed"],
        )
        for e in entries
        if e["model"] == "one" and e["attack"] != "worst"
    }
    for seed in (0, 1, 2):
        assert ("patch", "universal", "Patch", "public", 0.1, seed) in found
        for epsilon in (0.02, 0.039):
            assert ("universal_pgd", "universal", "Linf", "public", epsilon, seed) in found
            assert ("random_noise", "universal", "Linf", "public", epsilon, seed) in found
    for seed in (0, 1):
        assert ("tdaa", "per_image", "Linf", "public", 0.031, seed) in found
        assert ("pgd", "per_image", "Linf", "hardened", 0.031, seed) in found
    assert not [key for key in found if key[0] == "pgd" and key[3] == "public"]


def test_what_happened_to_each_image_is_kept_and_found_again(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    file = workdir / "protocol" / protocol_stage.OUTCOMES
    entries = report.read_results(workdir / "leaderboard.json")["results"]
    with np.load(file) as stored:
        kept = dict(stored)
    group = scoring.Group("one", "hardened", "universal", "Linf", 10 / 255)
    wanted = ("one", "hardened", "Linf", group.epsilon, "worst")
    fields = ("model", "crafted_against", "threat", "epsilon", "attack")
    [entry] = [e for e in entries if tuple(e[field] for field in fields) == wanted]
    assert kept["one, clean"].mean() == entry["clean_accuracy"]
    assert kept[scoring.outcome_name(group)].mean() == entry["robust_accuracy"]
    file.unlink()
    monkeypatch.setattr(scoring.evaluation, "score", None)  # nothing is attacked again
    go(config(), workdir)
    with np.load(file) as stored:
        assert stored.keys() == kept.keys()
        assert all(np.array_equal(stored[name], kept[name]) for name in kept)


def test_the_leaderboard_is_markdown_and_csv(finished):
    workdir, _ = finished
    text = (workdir / "leaderboard.md").read_text()
    assert text.startswith("# Leaderboard") and "| rank | classifier |" in text
    assert "| - | one |" in text  # no rank without an examination
    with open(workdir / "leaderboard.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"one", "two"}
    assert {row["verdict"] for row in rows} == {"not examined"}
    assert all(0 <= float(row["robust_accuracy"]) <= float(row["robust_high"]) for row in rows)
    with open(workdir / "attacks.csv") as file:
        seeds = {(row["attack"], row["seed"]) for row in csv.DictReader(file)}
    assert {("universal_pgd", "2"), ("pgd", "1"), ("worst", "")} <= seeds


def test_a_killed_evaluation_goes_on_where_it_was(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    original, scored = scoring.Scorer._score, []

    def dies(self, model, chosen, test):
        if len(scored) == 3:
            raise Stopped("killed")
        scored.append(sorted(chosen))
        return original(self, model, chosen, test)

    monkeypatch.setattr(scoring.Scorer, "_score", dies)
    with pytest.raises(Stopped):
        go(config(), tmp_path)
    kept = sorted((tmp_path / "protocol" / "groups").glob("*.npz"))
    assert len(kept) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:50])  # and one was cut short by the power failure
    again = []
    monkeypatch.setattr(
        scoring.Scorer,
        "_score",
        lambda self, *args: (again.append(1), original(self, *args))[1],
    )
    go(config(), tmp_path)
    groups = len(list((workdir / "protocol" / "groups").glob("*.npz")))
    assert len(again) == groups - 2

    def counted(folder):
        entries = report.read_results(folder / "leaderboard.json")["results"]
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]

    assert counted(tmp_path) == counted(workdir)


@pytest.mark.slow
def test_autoattack_and_the_verdict(tmp_path):
    made = config()
    made.classifiers = {"one": {"function": "test_protocol:classifier"}}
    made.protocol.autoattack.threats = {"Linf": (8 / 255,)}
    made.protocol.checks = True
    go(made, tmp_path)
    document = report.read_results(tmp_path / "leaderboard.json")
    turns = [e for e in document["results"] if e["family"] == "autoattack"]
    names = ["apgd-ce", "apgd-t", "fab-t", "square", "worst"]
    assert [entry["attack"] for entry in turns] == names
    left = [entry["robust_accuracy"] for entry in turns]
    assert left == sorted(left, reverse=True) and left[-1] == left[-2]
    assert {entry["n"] for entry in turns} == {16}
    found = document["verdicts"]["one"]
    assert {entry["verdict"] for entry in turns} == {found["verdict"]}
    assert {c["number"] for c in found["checks"]} == set(range(1, 28))
    assert "images" in found["examined"]
    # Its encoder is the public one, so what was crafted again is what was crafted: not a bit less.
    [again] = [check for check in found["checks"] if check["number"] == 25]
    assert (again["value"], again["status"]) == (0.0, "passed")


def test_other_statics_are_another_model():
    """The same weights behind another normalization are another classifier."""
    one = classifier()
    other = one.replace(encoder=one.encoder.replace(mean=(0.9, 0.9, 0.9)))
    assert scoring.identity(one) != scoring.identity(other)
    assert scoring.identity(one) == scoring.identity(classifier())


def test_budgets_that_print_alike_are_kept_apart():
    group = scoring.Group("m", "hardened", "autoattack", "Linf", 0.04996)
    assert scoring.file_name(group, ["a"]) != scoring.file_name(
        group._replace(epsilon=0.05004), ["a"]
    )


def test_a_saved_stage_is_a_classifier(tmp_path):
    made = tiny.config("usual")
    go(made, tmp_path)
    loaded = weights.load_classifier(tmp_path / "usual", builder=lambda key: tiny.encoder())
    assert loaded.num_classes == 4
    card = json.loads((tmp_path / "usual" / "classifier" / "classifier.json").read_text())["card"]
    assert card["stage"] == "usual"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classifiers": {}}, "config.classifiers is empty"),
        ({"classifiers": {"a": {"path": "nowhere"}}}, r"no classifier in nowhere.*classifiers\.a"),
        ({"classifiers": {"a": {}}}, r'give \{"path": directory\} or .*got \{\}'),
        ({"classifiers": {"a": "runs/x"}}, r"give \{\"path\": directory\} or .*'runs/x'"),
        ({"classifiers": {"a/b": {"path": "x"}}}, r"'a/b' cannot be a name"),
        (
            {"classifiers": {"a": {"function": "test_protocol:classifier", "classes": 3}}},
            "has 3 classes and .* 4: it was made for another task",
        ),
        (
            {"classifiers": {"a": {"function": "test_protocol:classifier", "size": 16}}},
            r"takes 16 x 16 pixels and the public encoder tiny 8 x 8",
        ),
        ({"protocol.autoattack.threats": {"Linf": (8.0,)}}, r"epsilon must lie in \[0, 1\]"),
        ({"protocol.autoattack.batch_size": 0}, "batch"),
        ({"protocol.adaptve": True}, "must have the entries .*adaptve"),
        (
            {"protocol.per_image.methods": {"t": {"function": f"{ATTACKS}TDAA", "target": 99}}},
            "target 99 is not the place of one of the 32",
        ),
        (
            {"protocol.per_image.methods": {"t": {"fuction": "x"}}},
            "attack 't' needs a \"function\"",
        ),
        ({"attack.methods": {"worst": {"function": f"{ATTACKS}RandomNoise"}}}, "'worst' cannot"),
        ({"attack.seeds": (0, 0)}, "none twice"),
        (
            {
                "protocol.autoattack.version": "rand",
                "protocol.autoattack.threats": {"Linf": (0.1,)},
            },
            "eot=20",
        ),
        (
            {"classifiers": {"a": {"function": "test_protocol:no_classifier"}}},
            "must return a robust_ssl.Classifier, got Encoder",
        ),
        ({"protocol.seeds": ()}, "at least one seed"),
        ({"protocol.autoattack.version": "best"}, "version 'best'"),
        ({"protocol.per_image.epsilons": (8.0,)}, r"epsilon must lie in \[0, 1\]"),
        ({"attack.batch_size": 64}, "the surrogate set"),
    ],
)
def test_bad_configs_are_refused_before_the_first_step(tmp_path, change, says):
    made = config()
    for name, value in change.items():
        made.unlock()
        *parents, last = name.split(".")
        place = made
        for parent in parents:
            place = place[parent]
        place[last] = value
    with pytest.raises(stages.UsageError, match=f"(?s){says}"):
        go(made, tmp_path)
    assert not list(tmp_path.iterdir())


def test_per_image_results_of_a_sample_meet_those_of_the_split():
    """A figure over AutoAttack's sample and a whole split is that of the sample."""
    from robust_ssl.stages import examining

    right = np.array([True, False, True, True])
    whole = PerImage(right, right, ~right)
    part = PerImage(right[[1, 2]], np.array([True, False]), right[[1, 2]])
    group = scoring.Group("m", "hardened", "per_image", "Linf", 0.1)
    rows, figure = examining._figure(
        [
            scoring.Scored(group, (), {"worst": whole}),
            scoring.Scored(group, (), {"worst": part}, np.array([1, 2])),
        ],
        4,
    )
    assert rows.tolist() == [1, 2]
    assert figure.robust_correct.tolist() == [False, False]


def test_what_is_alike_is_traced_once(tmp_path, monkeypatch):
    made = config()
    made.classifiers["wide"] = {"function": "test_protocol:with_mlp"}
    made.protocol.autoattack.threats = {"Linf": (0.02, 0.03)}
    traced = []
    monkeypatch.setattr(
        protocol_stage, "_trace", lambda attack, *_: traced.append(type(attack).__name__)
    )
    run = stages.Run(
        settings.to_json(made), tmp_path, Parallel.create(num_devices=2), Progress("quiet")
    )
    protocol_stage.check(run)
    # Two heads; budgets and targets are values of one attack, and so are the weights of a head.
    assert sorted(traced) == sorted(2 * ["PGD", "TDAA", "APGD", "APGD", "FABT", "Square"])


def test_a_targeted_attack_takes_a_surrogate_image():
    made = settings.to_json(config())
    run = stages.Run(made, None, Parallel.create(num_devices=1), Progress("quiet"))
    built = protocol_stage.build_methods(run, 8 / 255)
    assert built["tdaa"].target_image.shape == (8, 8, 3)
    assert (
        0 <= float(built["tdaa"].target_image.min()) <= float(built["tdaa"].target_image.max()) <= 1
    )
