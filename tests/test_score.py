"""The stage `score`: any classifier, the whole suite, resumable, and what it leaves to read."""

import csv
import json
import pathlib
import re
import shutil
import types

import jax
import numpy as np
import pytest
import tiny
import tiny_recipes
from tiny_recipes import ATTACKS, FROZEN, context, go

from robust_ssl import evaluation, experiment, models, report, settings, threats, weights
from robust_ssl.evaluation import PerImage, checks
from robust_ssl.experiment import examine, examined, groups, pages, score
from robust_ssl.stopping import Stopped
from robust_ssl.workdir import ConfigChangedError

L2 = {"epsilon": 0.5, "threat": "robust_ssl.threats:L2"}


def classifier(seed=0, classes=4, size=8):
    """A classifier from a function: with random weights in its head."""
    encoder = tiny.encoder(image_size=size)
    return models.classifier(jax.random.key(seed), encoder, classes, head="linear")


def with_mlp():
    return models.classifier(jax.random.key(0), tiny.encoder(), 4, head="mlp")


def no_classifier():
    return tiny.encoder()


def config():
    changed = settings.load_config(f"{tiny.CONFIGS}/score.py").unlock()
    changed.encoder = {"function": "tiny:encoder"}
    changed.surrogate = {"function": "tiny:unlabelled"}
    changed.downstream = {"function": "tiny:images", "validation": 0.25}
    changed.classifiers = {
        "one": {"function": "test_score:classifier"},
        "two": {"function": "test_score:classifier", "seed": 1},
    }
    changed.suite.attacks = {
        "universal_pgd": f"{ATTACKS}UniversalPGD",
        "patch": {
            "function": f"{ATTACKS}UniversalPGD",
            "threat": {"function": "robust_ssl.threats:Patch", "location": "fixed"},
            "epsilon": 0.1,
        },
        "random_noise": f"{ATTACKS}RandomNoise",
    }
    changed.suite.update(num_steps=2, batch_size=16)
    changed.scoring = {
        **{"seeds": (0, 1), "batch_size": 32, "checks": False, "adaptive_curve": True},
        "per_image": {
            "attacks": {
                "tdaa": {"function": f"{ATTACKS}TDAA", "num_steps": 2, "target": 0},
                "pgd": {"function": f"{ATTACKS}PGD", "num_steps": 2},
            },
            "budgets": (8 / 255, L2),
        },
        "autoattack": {"budgets": (), "images": 16, "batch_size": 16},
    }
    return changed


def entries_of(workdir):
    return report.results.read(workdir / "results.json")["results"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("score")
    return workdir, go(config(), workdir)


def test_every_classifier_is_scored_under_every_attack(finished):
    entries = entries_of(finished[0])
    assert {entry["model"] for entry in entries} == {"one", "two"}
    assert {entry["verdict"] for entry in entries} == {"not examined"}
    names = ("attack", "family", "threat", "crafted_against")
    scored = {
        (*(entry[name] for name in names), round(entry["epsilon"], 3), entry["seed"])
        for entry in entries
        if entry["model"] == "one" and entry["attack"] != "worst"
    }
    for seed in (0, 1, 2):
        assert ("patch", "universal", "Patch", "public", 0.1, seed) in scored
        for epsilon in (0.02, 0.039):
            assert ("universal_pgd", "universal", "Linf", "public", epsilon, seed) in scored
            assert ("random_noise", "universal", "Linf", "public", epsilon, seed) in scored
    for seed in (0, 1):
        for threat, epsilon in (("Linf", 0.031), ("L2", 0.5)):
            assert ("tdaa", "per_image", threat, "public", epsilon, seed) in scored
            assert ("pgd", "per_image", threat, "hardened", epsilon, seed) in scored
    assert not [key for key in scored if key[0] == "pgd" and key[3] == "public"]


def test_what_happened_to_each_image_is_kept_and_made_again(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    file = workdir / "score" / score.OUTCOMES
    with np.load(file) as stored:
        outcomes = dict(stored)
    group = groups.Group("one", "hardened", "universal", "Linf", 10 / 255)
    wanted = (*group, "worst")
    fields = (*group._fields, "attack")
    [entry] = [e for e in entries_of(workdir) if tuple(e[field] for field in fields) == wanted]
    assert outcomes["one, clean"].mean() == entry["clean_accuracy"]
    assert outcomes[groups.outcome_name(group)].mean() == entry["robust_accuracy"]
    file.unlink()
    monkeypatch.setattr(evaluation, "score", None)  # nothing is attacked again
    go(config(), workdir)
    with np.load(file) as stored:
        assert stored.keys() == outcomes.keys()
        assert all(np.array_equal(stored[name], outcomes[name]) for name in outcomes)


def test_results_are_a_page_and_tables(finished):
    workdir, _ = finished
    page = (workdir / "report.md").read_text()
    assert page.startswith("# Robustness of tiny on images")
    assert "| one | " in page and "No figure under attack was examined." in page
    assert "0.5 (L2)" in page and "10 % of the area" in page
    with open(workdir / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"one", "two"}
    assert {row["verdict"] for row in rows} == {"not examined"}
    assert all(0 <= float(row["robust_accuracy"]) <= float(row["robust_high"]) for row in rows)
    with open(workdir / "attacks.csv") as file:
        seeds = {(row["attack"], row["seed"]) for row in csv.DictReader(file)}
    assert {("universal_pgd", "2"), ("pgd", "1")} <= seeds


def test_the_numbers_are_there_whatever_becomes_of_the_figures(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    (workdir / "report.md").unlink()
    (workdir / "results.json").unlink()
    monkeypatch.setattr(pages, "look", None)
    with pytest.raises(TypeError):
        go(config(), workdir)
    assert entries_of(workdir) == entries_of(finished[0])
    monkeypatch.undo()
    monkeypatch.setattr(report, "figure_stability", lambda *args, **kwargs: 1 / 0)
    go(config(), workdir)
    page = (workdir / "report.md").read_text()
    assert "examples.png" in page and "stability.png" not in page


def test_a_killed_evaluation_goes_on_where_it_was(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    original, calls = groups.Scorer._score, []

    def counts(self, model, chosen, test):
        calls.append(sorted(chosen))
        return original(self, model, chosen, test)

    def dies(*args):
        if len(calls) == 3:
            raise Stopped("killed")
        return counts(*args)

    monkeypatch.setattr(groups.Scorer, "_score", dies)
    with pytest.raises(Stopped):
        go(config(), tmp_path)
    files = sorted((tmp_path / "score" / "groups").glob("*.npz"))
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:50])  # and one was cut short by the power failure
    calls.clear()
    monkeypatch.setattr(groups.Scorer, "_score", counts)
    go(config(), tmp_path)
    whole = [f for f in (workdir / "score" / "groups").glob("*.npz") if "-look" not in f.name]
    assert len(calls) == len(whole) - 2

    def without_seconds(folder):
        return [{**entry, "seconds": None} for entry in entries_of(folder)]

    assert without_seconds(tmp_path) == without_seconds(workdir)


def test_an_attack_that_comes_later_is_scored_alone(finished, tmp_path, monkeypatch, caplog):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    original, calls = groups.Scorer._score, []

    def counts(self, model, chosen, rows):
        calls.append(sorted(chosen))
        return original(self, model, chosen, rows)

    monkeypatch.setattr(groups.Scorer, "_score", counts)
    changed = config()
    changed.scoring.per_image.attacks.later = {"function": f"{ATTACKS}PGD", "num_steps": 1}
    go(changed, tmp_path)
    assert calls and all(name.startswith("later") for [name] in calls)
    assert "damaged" not in caplog.text
    alone = [e for e in entries_of(tmp_path) if e["attack"] not in ("later", "worst")]
    before = [e for e in entries_of(workdir) if e["attack"] != "worst"]
    kept = ("model", "attack", "crafted_against", "epsilon", "robust_accuracy", "seconds")
    assert [[e[n] for n in kept] for e in alone] == [[e[n] for n in kept] for e in before]
    # It may go, too; what is there may not become another under its name.
    calls.clear()
    go(config(), tmp_path)
    assert not calls and entries_of(tmp_path) == entries_of(workdir)
    changed = config()
    changed.scoring.per_image.attacks.pgd.num_steps = 3
    with pytest.raises(ConfigChangedError, match=r"attacks\.pgd\.num_steps: \d+ -> 3"):
        go(changed, tmp_path)


def test_two_seeds_are_compared_and_figures_are_linked_from_the_page(tmp_path, monkeypatch):
    """Also where the workdir was said from another folder than the page's."""
    changed = tiny_recipes.config(
        {"baseline": FROZEN, "full": {}}, "attack", "train", "score", "compare"
    )
    changed.training.seeds = (0, 1)
    changed.compare.claims = ()
    monkeypatch.chdir(tmp_path)
    rows = go(changed, pathlib.Path("runs", "one"))["compare"]["rows"]
    assert {(row["recipe"], row["seed"]) for row in rows} == {
        (name, seed) for name in ("baseline", "full") for seed in (0, 1)
    }
    folder = tmp_path / "runs" / "one"
    page = (folder / "report.md").read_text()
    for seed in (0, 1):
        assert f"| baseline, seed {seed} | " in page and f"| full, seed {seed} | " in page
    assert "- Seeds of training: 0, 1." in page
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert {"figures/pareto.png", "figures/examples.svg", "figures/stability.csv"} <= {*links}
    assert all((folder / link).is_file() for link in links), links


@pytest.mark.slow
def test_autoattack_and_the_verdict(tmp_path):
    changed = config()
    changed.classifiers = {"one": {"function": "test_score:classifier"}}
    changed.scoring.autoattack.budgets = (8 / 255, L2)
    changed.scoring.checks = True
    changed.scoring.per_image.images = 16
    go(changed, tmp_path)
    document = report.results.read(tmp_path / "results.json")
    verdict = document["verdicts"]["one"]
    for threat in ("Linf", "L2"):
        turns = [e for e in document["results"] if e["family"] == "autoattack"]
        turns = [entry for entry in turns if entry["threat"] == threat]
        names = ["apgd-ce", "apgd-t", "fab-t", "square", "worst"]
        assert [entry["attack"] for entry in turns] == names
        right = [entry["robust_accuracy"] for entry in turns]
        assert right == sorted(right, reverse=True) and right[-1] == right[-2]
        assert {entry["n"] for entry in turns} == {16}
        assert {entry["verdict"] for entry in turns} == {verdict["verdict"]}
    assert {check["number"] for check in verdict["checks"]} == set(range(1, 30))
    [leakage] = [check for check in verdict["checks"] if check["name"] == "leakage"]
    assert leakage["status"] == "not run"  # nobody here knows what it was trained on
    assert "images" in verdict["examined"]
    # Its encoder is the public one, so what was crafted again is what was crafted: not a bit less.
    [again] = [check for check in verdict["checks"] if check["number"] == 25]
    assert (again["value"], again["status"]) == (0.0, "passed")


def test_other_statics_are_another_model():
    """The same weights behind another normalization are another classifier."""
    one = classifier()
    other = one.replace(encoder=one.encoder.replace(mean=(0.9, 0.9, 0.9)))
    assert groups.identity(one) != groups.identity(other)
    assert groups.identity(one) == groups.identity(classifier())


def test_budgets_that_print_alike_are_kept_apart():
    group = groups.Group("m", "hardened", "autoattack", "Linf", 0.04996)
    other = group._replace(epsilon=0.05004)
    assert groups.file_name(group, ["a"]) != groups.file_name(other, ["a"])


def test_a_finished_recipe_is_a_classifier(tmp_path):
    go(tiny_recipes.config({"baseline": FROZEN}, "train"), tmp_path)
    folder = tmp_path / "recipes" / "baseline-seed0"
    assert weights.load_classifier(folder, builder=tiny.encoder).num_classes == 4
    card = json.loads((folder / "classifier" / "classifier.json").read_text())["card"]
    assert card["stage"] == "baseline-seed0"
    saved = {"path": str(folder), "builder": "tiny:encoder"}
    planned = experiment.plan({**settings.to_json(config()), "classifiers": {"saved": saved}})
    loaded = planned.classifiers["saved"].load()
    np.testing.assert_array_equal(
        tiny_recipes.final(tmp_path, "baseline")["params/head/linear/kernel"],
        loaded.variables["params"]["head"]["linear"]["kernel"],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifiers": {}}, "config.classifiers is empty"),
        (
            {"classifiers": {"a": {"path": "nowhere"}}},
            r"classifiers\.a: no classifier in now",
        ),
        ({"classifiers": {"a": {}}}, r'classifiers\.a: give \{"path": directory\} or .*got \{\}'),
        ({"classifiers": {"a": "runs/x"}}, r"classifiers\.a: .*no classifier in runs/x"),
        (
            {"classifiers": {"a/b": {"function": "test_score:classifier"}}},
            r"classifiers: 'a/b' cannot be a name",
        ),
        (
            {"classifiers": {"a": {"function": "test_score:classifier", "classes": 3}}},
            r"has 3 classes and .* 4: it was made for another task.*config\.classifiers\.a",
        ),
        (
            {"classifiers": {"a": {"function": "test_score:classifier", "size": 16}}},
            r"takes 16 x 16 pixels and the public encoder tiny 8 x 8.*config\.classifiers\.a",
        ),
        (
            {"classifiers": {"a": {"function": "test_score:no_classifier"}}},
            r"must return a robust_ssl.Classifier, got Encoder.*config\.classifiers\.a",
        ),
        (
            {"scoring.autoattack.budgets": (8.0,)},
            r"autoattack\.budgets\[0\].*epsilon must lie in \[0, 1\]",
        ),
        (
            {"scoring.autoattack.budgets": ({**L2, "threat": "robust_ssl.threats:Patch"},)},
            "autoattack: budgets: AutoAttack is for Linf and L2, got Patch",
        ),
        ({"scoring.autoattack.batch_size": 0}, r"scoring\.autoattack\.batch_size .*at least 1"),
        (
            {"scoring.autoattack.version": "best"},
            r"version must be .*'rand', got 'best'",
        ),
        (
            {"scoring.autoattack.version": "rand", "scoring.autoattack.budgets": (0.1,)},
            "eot=20 averages over draws of a randomized model",
        ),
        ({"scoring.adaptve": True}, "unknown entry 'adaptve' in config.scoring; .*'adaptive'"),
        (
            {"scoring.per_image.attacks": {"t": {"function": f"{ATTACKS}TDAA", "target": 99}}},
            r"per_image\.attacks\.t: target 99 is not the place of one of the 32",
        ),
        (
            {"scoring.per_image.attacks": {"t": {"fuction": "x"}}},
            r"per_image\.attacks\.t must be .*\"function\"",
        ),
        ({"scoring.per_image.budgets": (8.0,)}, r"budgets\[0\].*epsilon must lie in \[0, 1\]"),
        ({"scoring.seeds": ()}, "config.scoring: seeds: need at least one seed"),
        ({"suite.attacks": {"worst": f"{ATTACKS}RandomNoise"}}, r"suite\.attacks: 'worst' cannot"),
        ({"suite.seeds": (0, 0)}, r"suite\.seeds: .*none twice"),
        ({"suite.batch_size": 64}, "the surrogate set"),
    ],
)
def test_bad_configs_are_refused_before_the_first_step(tmp_path, change, message):
    changed = config()
    tiny_recipes.put(changed, change)
    with pytest.raises(experiment.UsageError, match=f"(?s){message}"):
        go(changed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_per_image_results_of_a_sample_meet_those_of_the_split():
    """A figure over AutoAttack's sample and a whole split is that of the sample."""
    right = np.array([True, False, True, True])
    whole = PerImage(right, right, ~right)
    part = PerImage(right[[1, 2]], np.array([True, False]), right[[1, 2]])
    group = groups.Group("m", "hardened", "per_image", "Linf", 0.1)
    rows, figure = examined.figure_of(
        [
            groups.Scored(group, (), {"worst": whole}),
            groups.Scored(group, (), {"worst": part}, np.array([1, 2])),
        ],
        4,
    )
    assert rows.tolist() == [1, 2]
    assert figure.robust_correct.tolist() == [False, False]


def scored(group, rows=None, threat=None, label_free=False, excess=0.0):
    """A group that leaves right what its clean accuracy leaves, but for every third image."""
    count = 64 if rows is None else len(rows)
    right = np.arange(count) % 3 > 0
    result = PerImage(np.ones(count, bool), right, ~right, excess=excess)
    threat = threat or threats.Linf(group.epsilon)
    value = types.SimpleNamespace(threat=threat, delta=None, label_free=label_free)
    member = groups.Member("one", 0, value, 1.0, 10)
    return groups.Scored(group, (member,), {member.label: result, "worst": result}, rows)


def test_universal_checks_are_made_at_the_budget_that_is_compared():
    """A curve may go above it, and what was crafted again may be at the main budget alone."""
    at = lambda against, epsilon: scored(  # noqa: E731
        groups.Group("one", against, "universal", "Linf", epsilon)
    )
    public = [at("public", epsilon) for epsilon in (0.02, 0.04, 0.06)]
    both = [*public, at("hardened", 0.04)]
    for main, expected in ((0.04, 0.04), (0.02, 0.02), (0.5, 0.04)):
        assert examine._compared(public, both, main).group.epsilon == expected
    assert examine._compared(public, public, 0.5).group.epsilon == 0.06


def test_two_budgets_that_tables_could_not_tell_apart_are_refused(tmp_path):
    changed = config()
    patches = [
        {"epsilon": 0.1, "threat": {"function": "robust_ssl.threats:Patch", **more}}
        for more in ({}, {"location": "random"})
    ]
    changed.scoring.per_image = {
        "attacks": {"pgd": {"function": f"{ATTACKS}PGD", "num_steps": 1, "budgets": tuple(patches)}}
    }
    with pytest.raises(ValueError, match="two budgets that tables call"):
        score.check(context(changed, tmp_path))


def test_a_sample_of_images_is_compared_with_the_same_images(tmp_path, monkeypatch):
    """Attacks on single images may have seen a part of those that one perturbation was tried on."""
    for name in ("_against_baselines", "_on_new_images"):
        check = checks.not_run("beats_noise", "It is not asked.")[0]
        monkeypatch.setattr(examine, name, lambda *args, check=check: check)
    run, rows = context(config(), tmp_path), np.arange(0, 64, 4)
    some = [
        scored(groups.Group("one", "public", "universal", "Linf", 10 / 255)),
        scored(groups.Group("one", "hardened", "per_image", "Linf", 10 / 255), rows),
        scored(
            groups.Group("one", "hardened", "per_image", "Patch", 0.1), rows, threats.Patch(0.1)
        ),
    ]
    scorer = types.SimpleNamespace(context=run)
    verdict = examine._universal(scorer, classifier(), some)
    by_name = {check.name: check for check in verdict.checks}
    assert by_name["per_image_not_weaker"].status == "passed"
    # A patch of one image has no place but its own: nothing to compare.
    assert by_name["patch_places_agree"].status == "not run"
    kept = np.arange(64) % 3 > 0
    np.testing.assert_array_equal(some[1].among(kept), kept[rows])
    np.testing.assert_array_equal(some[0].among(kept), kept)


def test_attacks_without_labels_are_no_figure_to_be_examined(tmp_path):
    """At a larger budget than those with labels, they would be found too weak."""
    run = context(config(), tmp_path)
    white = scored(groups.Group("one", "hardened", "per_image", "Linf", 8 / 255))
    larger = groups.Group("one", "hardened", "per_image", "Linf", 10 / 255)
    blind, both = scored(larger, label_free=True), scored(larger)
    assert examined.subject_of(run, [white, blind]).groups == [white]
    assert examined.subject_of(run, [white, both]).groups == [both]
    alone = examined.subject_of(run, [blind])
    assert alone.figure is None and "no per-image attack" in alone.words


def test_an_attack_that_left_its_budget_on_some_image_is_not_believed(tmp_path):
    """Whichever images the examination takes: what is scored says it of all."""
    run = context(config(), tmp_path)
    group = groups.Group("one", "hardened", "per_image", "Linf", 8 / 255)
    scorer = groups.Scorer(run, None, 64)
    for excess, status in ((0.0, "passed"), (0.01, "failed")):
        _, verdict = examine._per_image(scorer, classifier(), [scored(group, excess=excess)])
        [check] = [check for check in verdict.checks if check.name == "budget_kept"]
        assert check.status == status and check.value == pytest.approx(excess, abs=1e-6)


def test_without_attacks_on_single_images_the_printed_figure_is_asked_for_enough_images(tmp_path):
    run = context(config(), tmp_path)
    suites = [
        scored(groups.Group("one", against, "universal", "Linf", 10 / 255))
        for against in ("public", "hardened")
    ]
    weaker = scored(groups.Group("one", "public", "universal", "Linf", 4 / 255))
    patch = scored(groups.Group("one", "public", "universal", "Patch", 0.5))
    printed = evaluation.worst_case(group.worst for group in suites).counts
    assert examined.counts_of(None, [*suites, weaker, patch]) == printed
    assert examined.counts_of(None, [patch]) is None
    _, verdict = examine._per_image(groups.Scorer(run, None, 64), classifier(), suites)
    [check] = [check for check in verdict.checks if check.name == "enough_images"]
    assert f": {printed.n} images are few" in check.meaning


def test_per_image_attacks_may_be_scored_on_a_part_of_the_split(tmp_path):
    changed = config()
    changed.scoring.per_image.images = 32
    run = context(changed, tmp_path)
    rows = groups.sample(run, 32)
    [pgd] = groups.per_image_members(
        run, {"pgd": score.build_per_image(run, run.plan.scoring.per_image.budgets[0])["pgd"]},
        "hardened",
    )  # fmt: skip
    assert pgd.gradient_evaluations == 2 * 32
    group = groups.Group("one", "hardened", "per_image", "Linf", 8 / 255)
    with run.open("score", {}, {}) as stage:
        scorer = groups.Scorer(run, stage, 32)
        part = scorer.score(group, classifier(), [pgd], rows)
        whole = scorer.score(group, classifier(), [pgd])
        assert scorer.score(group, classifier(), [pgd]).worst.excess == whole.worst.excess <= 1e-5
    np.testing.assert_array_equal(part.rows, rows)
    for name in ("clean_correct", "robust_correct"):
        expected = getattr(whole.worst, name)[rows]  # an image's key is that of its place
        np.testing.assert_array_equal(getattr(part.worst, name), expected)
    assert whole.rows is None and len(whole.worst.clean_correct) == 64
    assert not any(", clean" in name for name in groups.outcomes([part]))
    # A text without a limit is what it was before there were limits.
    assert "images" not in context(config(), tmp_path).plan.text["scoring"]["per_image"]


@pytest.mark.parametrize(
    ("images", "most", "size"), [(360, 250, 180), (250, 250, 250), (1000, 250, 250), (7, 3, 3)]
)
def test_batches_of_scoring_are_few_and_alike(images, most, size):
    """A short last batch is filled up to the others' size, and costs what they cost."""
    assert groups.Scorer(None, None, most).at_once(images) == size


PATCH = {"epsilon": 0.05, "threat": "robust_ssl.threats:Patch"}


def test_an_attack_may_have_budgets_of_its_own(tmp_path):
    changed = config()
    own = {"function": f"{ATTACKS}PGD", "num_steps": 2, "budgets": (PATCH, 8 / 255)}
    changed.scoring.per_image = {
        "attacks": {"pgd": changed.scoring.per_image.attacks.pgd, "patch": own},
        "budgets": (8 / 255, L2),
    }
    run = context(changed, tmp_path)
    per_image = run.plan.scoring.per_image
    kinds = [(type(b.threat).__name__, sorted(per_image.at(b))) for b in per_image.scored]
    assert kinds == [("Linf", ["patch", "pgd"]), ("L2", ["pgd"]), ("Patch", ["patch"])]
    patch = per_image.scored[-1]
    built = score.build_per_image(run, patch)
    assert [*built] == ["patch"] and built["patch"].threat == threats.Patch(0.05)
    # Scored for a model, the patch replaces a square of some images alone.
    [member] = groups.per_image_members(run, built, "hardened")
    group = groups.Group("one", "hardened", "per_image", "Patch", 0.05)
    with run.open("score", {}, {}) as stage:
        rows = groups.sample(run, 16)
        scored = groups.Scorer(run, stage, 16).score(group, classifier(), [member], rows)
    assert scored.worst.counts.n == 16
    assert scored.worst.counts.robust_accuracy <= scored.worst.counts.clean_accuracy


def test_budgets_that_nothing_is_scored_under_are_none(tmp_path):
    changed = config()
    own = {"function": f"{ATTACKS}PGD", "num_steps": 2, "budgets": (PATCH,)}
    changed.scoring.per_image = {"attacks": {"patch": own}}
    [budget] = context(changed, tmp_path).plan.scoring.per_image.scored
    assert budget.threat == threats.Patch(0.05)
    changed.scoring.per_image = {"attacks": {"patch": {**own, "budgets": 0.1}}}
    with pytest.raises(experiment.UsageError, match=r"patch\.budgets must be a list"):
        context(changed, tmp_path)


def test_what_is_alike_is_traced_once(tmp_path, monkeypatch):
    changed = config()
    changed.classifiers["wide"] = {"function": "test_score:with_mlp"}
    changed.scoring.autoattack.budgets = (0.02, 0.03, L2)
    traced = []

    def record(attack, *_):
        traced.append((type(attack.threat).__name__, type(attack).__name__))

    monkeypatch.setattr(score, "_trace", record)
    score.check(context(changed, tmp_path))
    # Two heads; budgets and targets are values of one attack, and so are the weights of a head.
    names = ["PGD", "TDAA", "APGD", "APGD", "FABT", "Square"]
    assert sorted(traced) == sorted(2 * [(t, name) for t in ("L2", "Linf") for name in names])


def test_a_targeted_attack_takes_a_surrogate_image_and_any_threat():
    run = context(config(), None, num_devices=1)
    for budget, threat in zip(
        run.plan.scoring.per_image.budgets, (threats.Linf(8 / 255), threats.L2(0.5)), strict=True
    ):
        built = score.build_per_image(run, budget)
        assert built["pgd"].threat == built["tdaa"].threat == threat
        image = built["tdaa"].target_image
        assert image.shape == (8, 8, 3) and 0 <= float(image.min()) <= float(image.max()) <= 1


def test_a_stop_waits_for_one_batch_of_a_part(monkeypatch):
    asked = iter([False, False, True])
    monkeypatch.setattr(groups, "stop_requested", lambda: next(asked))
    stage = types.SimpleNamespace(path=pathlib.Path("runs/score"))
    scorer, passed = groups.Scorer(None, stage, 4), []
    with pytest.raises(Stopped, match=r"^score stopped, and what was scored is kept$"):
        for batch in scorer._until_stopped(iter(range(9))):
            passed.append(batch)
    assert passed == [0, 1]
