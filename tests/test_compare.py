"""The comparison from end to end: every figure in it is one that a stage has measured."""

import csv
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_recipes
from tiny_recipes import (
    ATTACKS,
    BROKEN,
    FROZEN,
    ON_ADVERSARIAL,
    PGD_AT,
    SMOOTH,
    UNIVERSAL,
    context,
    go,
    manifest,
)

from robust_ssl import attacks, evaluation, experiment, finetuning, report
from robust_ssl.evaluation.checks import Check
from robust_ssl.experiment import attack as attack_stage
from robust_ssl.experiment import attackers as attackers_stage
from robust_ssl.experiment import compare, costs, fitting, groups, score, train
from robust_ssl.finetuning import step
from robust_ssl.workdir.manifest import seal

pytestmark = pytest.mark.usefixtures("quick_programs")

slow = pytest.mark.slow  # a minute: each recipe and each attack is compiled

KEY = jax.random.key(0)
SHARES = {"clean", "robust_public", "robust_hardened", "robust_worst"}
RECIPES = {
    "baseline": FROZEN,
    "full": {},
    "pgd_at": PGD_AT,
    "universal": UNIVERSAL,
    "smoothed": SMOOTH,
    "ensemble": {"members": ("baseline", "pgd_at")},
}
STAGES = ("attack", "train", "score", "compare")


def config(recipes=RECIPES):
    changed = tiny_recipes.config(recipes, *STAGES)
    changed.training.seeds, changed.scoring.twin = (0, 1), True
    announced = {"more": "pgd_at", "than": "full", "by": "clean", "seen": 10}
    share = {"reach": 0.5, "of": "full", "over": "baseline", "within": 9.0, "by": "clean"}
    changed.compare.claims = (*changed.compare.claims, announced, share)
    return changed


def few(recipes):
    changed = tiny_recipes.config(recipes, *STAGES)
    changed.compare.claims = ()
    return changed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compare")
    return workdir, go(config(), workdir)


def rows_of(results):
    return {(row["recipe"], row["seed"]): row for row in results["compare"]["rows"]}


def entry_of(workdir, model, against):
    """The worst case per image over the suite, at its main budget."""
    entries = report.results.read(workdir / "results.json")["results"]
    suite = ("universal", "Linf", round(10 / 255, 6))
    fields = [
        entry
        for entry in entries
        if (entry["family"], entry["threat"], round(entry["epsilon"], 6)) == suite
        and (entry["model"], entry["crafted_against"]) == (model, against)
    ]
    worst = [entry for entry in fields if entry["attack"] == evaluation.WORST]
    return [*worst, *fields][0]


@slow
def test_every_recipe_and_seed_has_a_row_that_agrees_with_the_results(finished):
    workdir, results = finished
    rows = rows_of(results)
    assert set(rows) == {(name, seed) for name in RECIPES for seed in (0, 1)}
    for (name, seed), row in rows.items():
        public, hardened = (
            entry_of(workdir, f"{name}-seed{seed}", w) for w in ("public", "hardened")
        )
        assert row["clean"] == public["clean_accuracy"]
        assert row["robust_public"] == public["robust_accuracy"]
        assert row["robust_hardened"] == hardened["robust_accuracy"]
        assert (row["images"], row["verdict"]) == (64, "not examined")
        assert row["autoattack"] is None and row["autoattack_images"] is None
    worst = [row["robust_worst"] for row in results["compare"]["rows"]]
    assert worst == sorted(worst, reverse=True)
    assert report.results.read(workdir / "results.json")["comparison"] == results["compare"]


@slow
def test_recipes_are_compared_image_by_image(finished):
    workdir, results = finished
    run = context(config(), workdir)
    pairs = [(recipe, seed) for recipe in run.plan.scored for seed in (0, 1)]
    right = compare.outcomes_of(run, score.score(run), pairs)
    means = compare.over_seeds(right)
    for (recipe, seed), shares in right.items():
        row = rows_of(results)[recipe.name, seed]
        # No AutoAttack was asked for.
        assert {*shares} - {"robust_twin"} == SHARES
        for share, images in shares.items():
            assert images.shape == (64,) and images.mean() == row[share]
            other = right[recipe, 1 - seed][share]
            np.testing.assert_array_equal(means[recipe.name][share], (1.0 * images + other) / 2)
        assert row["robust_worst"] <= min(row["robust_public"], row["robust_hardened"])


@slow
def test_the_files_say_what_the_rows_say(finished):
    workdir, results = finished
    with open(workdir / "comparison.csv") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, results["compare"]["rows"], strict=True):
        assert (line["recipe"], int(line["seed"])) == (row["recipe"], row["seed"])
        for name in ("clean", "robust_public", "robust_hardened", "gradients", "cost_factor"):
            assert float(line[name]) == row[name]
    [judged] = [c for c in results["compare"]["claims"] if "reach" in c["claim"]]
    page = (workdir / "report.md").read_text()
    shares = judged["shares"]
    title = "### Shares of full's gain over baseline, without an attack"
    assert (title in page) == bool(shares) == ("not beyond chance" not in judged["sentence"])
    assert all(share["low"] <= share["share"] <= share["high"] for share in shares)
    for name in RECIPES:
        assert f"| {report.label(name)} | " in page
        for seed in (0, 1):
            assert f"| {name}, seed {seed} | worst of universal |" in page
    assert page.count("The order baseline < pgd_at of us ") == 1
    assert "pgd_at has more than full without an attack: " in page
    assert "after Holm over 1; seeds: 2, images: 54." in page  # ten of 64 were seen
    picture = (workdir / "figures" / "pareto.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


@slow
def test_the_page_says_what_was_compared(finished):
    page = (finished[0] / "report.md").read_text()
    assert "- Encoder: tiny, " in page
    assert "- Downstream set: images, train 48, validation 16, test 64, classes 4." in page
    assert "- Surrogate set, the attacker's: unlabelled, images 32." in page
    assert "- Suite, at 10/255: random_noise, universal_pgd; seeds 0." in page
    assert "- Seeds of training: 0, 1." in page
    assert '"num_steps": 2' in page and '"epochs": 2' in page  # the whole config, folded


@slow
def test_costs_are_relative_to_the_reference(finished):
    rows = rows_of(finished[1])
    assert rows["full", 0]["cost_factor"] == rows["full", 1]["cost_factor"] == 1
    assert {name: rows[name, 0]["gradients_per_epoch"] for name in RECIPES} == {
        **{"baseline": 1.0, "full": 1.0, "pgd_at": 3.0, "universal": 1.0},
        **{"smoothed": None, "ensemble": None},
    }
    assert {name: rows[name, 0]["gradients"] for name in RECIPES} == {
        "baseline": 1.0,
        "full": 1.0,
        "pgd_at": 3.0,  # two steps of PGD and the update's own
        "universal": 1.0,
        "smoothed": 1.0,  # its start's
        "ensemble": 4.0,  # its members'
    }
    factor = {name: rows[name, 0]["cost_factor"] for name in RECIPES}
    assert factor["smoothed"] == factor["baseline"] > 0
    assert factor["ensemble"] == pytest.approx(factor["baseline"] + factor["pgd_at"])
    assert rows["universal", 0]["training_seconds"] > 0


@slow
def test_a_cost_is_steps_times_seconds(finished):
    workdir, _ = finished
    measured = manifest(workdir, "cost")["results"]
    assert set(measured) == set(RECIPES)
    reference = measured["full"]["seconds_per_step"]
    for name in ("baseline", "pgd_at", "universal"):
        step = measured[name]["seconds_per_step"]
        assert measured[name]["factor"] == pytest.approx(step / reference)  # all have six steps
        assert measured[name]["seconds_per_image"] == pytest.approx(step / 16)
    assert measured["smoothed"]["seconds_per_step"] is None


def test_choosing_layers_counts_by_its_gradients_and_replays_by_the_images(tmp_path):
    """Closed forms, with measurements that are made up."""
    free = {"function": "robust_ssl.finetuning:FreeReplays", "epsilon": 0.03, "replays": 2}
    recipes = {
        **{"baseline": FROZEN, "full": {}},
        "free": {**ON_ADVERSARIAL, "attack": free},
        "rift": {"start": "full", "select": {"layers": 1}},
    }
    run = context(few(recipes), tmp_path)
    full, free, rift = (run.plan.recipes[name] for name in ("full", "free", "rift"))
    results = {
        full: {"epochs": 2, "steps": 6, "gradient_evaluations_per_image": 4},
        free: {"epochs": 2, "steps": 12, "gradient_evaluations_per_image": 4},
        rift: {
            **{"epochs": 1, "steps": 3, "gradient_evaluations_per_image": 1},
            **{"selection_gradient_evaluations_per_image": 10, "selection_seconds": 1e9},
        },
    }
    cost = finetuning.Cost(0.5, None)
    numbers = {recipe: costs._own(recipe, results[recipe], cost) for recipe in results}
    assert numbers[full]["seconds_per_image"] == 0.5 / 16
    assert numbers[free]["seconds_per_image"] == 2 * 0.5 / 16
    assert [numbers[recipe]["gradients_per_epoch"] for recipe in results] == [2, 2, 1]
    assert costs._seconds(run, [full], results, numbers) == 6 * 0.5
    selecting = 10 * 48 * (0.5 / 16 / 2)
    assert costs._seconds(run, rift.chain(), results, numbers) == 6 * 0.5 + 3 * 0.5 + selecting


@slow
def test_a_comparison_follows_what_was_scored_again(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    file = workdir / "score" / "manifest.json"
    scored = json.loads(file.read_text())
    failed = Check(name="gradient_not_zero", status="failed", value=0.25, limit=0.01)
    verdict = {"verdict": "not believable", "checks": [failed.as_dict()]}
    scored["results"]["verdicts"]["baseline-seed0"] = verdict
    for entry in scored["results"]["results"]:
        if entry["model"] == "baseline-seed0":
            entry["verdict"] = "not believable"
    file.write_text(json.dumps(seal(scored)))  # as if it had been scored so
    rows = rows_of(go(config(), workdir))
    marked = {key for key, row in rows.items() if row["verdict"] == "not believable"}
    assert marked == {("baseline", 0)}
    assert "baseline,0,not believable," in (workdir / "comparison.csv").read_text()


def test_what_went_wrong_in_training_is_said():
    fine = {"skipped": 0, "steps": 6, "catastrophic_overfitting": None}
    trained = train.Trained(
        {
            "fine-seed0": fine,
            "fgsm_rs-seed1": {**fine, "catastrophic_overfitting": 3, "best_epoch": 2},
            "ramp_fgsm-seed0": {**fine, "catastrophic_overfitting": 4, "best_epoch": 5},
            "shaky-seed0": {**fine, "skipped": 2},
        },
        {"broken-seed0": "no luck"},
    )
    assert compare._what_happened(trained) == [
        "fgsm_rs-seed1 overfitted catastrophically at epoch 3: it withstood the one step of its "
        "own attack and no longer PGD. The weights of epoch 2 were kept.",
        "ramp_fgsm-seed0 overfitted catastrophically at epoch 4: it withstood the one step of its "
        "own attack and no longer PGD. The weights of epoch 5 were kept, so its figures are those "
        "of a model that has overfitted.",
        "shaky-seed0: 2 of 6 updates were not finite and were skipped.",
    ]


@slow
def test_what_was_trained_is_timed_without_another_program(tmp_path, monkeypatch):
    traced, trained, of_step, fit = [], [], step._update, fitting.train

    def counts(plan, *arguments):
        traced.append(plan)
        return of_step(plan, *arguments)

    def ends(*arguments, **options):
        kept = fit(*arguments, **options)
        trained.append(len(traced))
        return kept

    monkeypatch.setattr(step, "_update", counts)
    monkeypatch.setattr(fitting, "train", ends)
    ramp = {**PGD_AT, "ramp": {"start": 0.0, "end": 0.5}}
    changed = few({"baseline": FROZEN, "full": {}, "pgd_at": PGD_AT})
    changed.stages = ("train", "attack", "score", "compare")
    go(changed, tmp_path)
    assert len(trained) == 3 and len(traced) == trained[-1]
    # With a ramp the whole attack is timed, wherever the training was: a program of its own.
    go(few({"baseline": FROZEN, "full": {}, "ramp": ramp}), tmp_path)
    assert len(traced) > trained[-1]


@slow
def test_the_same_command_again_recomputes_nothing(finished, monkeypatch):
    workdir, results = finished
    before = tiny_recipes.snapshot(workdir)

    def never(*args, **kwargs):
        pytest.fail("this was done before")

    for place, name in (
        (fitting, "train"),
        (costs, "_measure_steps"),
        (attacks, "fit"),
        (groups.Scorer, "_score"),
        (report, "write_report"),
    ):
        monkeypatch.setattr(place, name, never)
    assert go(config(), workdir) == results
    assert tiny_recipes.snapshot(workdir) == before


@slow
def test_seeds_from_machines_that_share_nothing_are_brought_together(tmp_path, monkeypatch):
    """As docs/clusters says: what was made of each seed is copied into one workdir."""
    changed = few({"baseline": FROZEN, "full": {}})
    whole = tmp_path / "whole"
    for seed in (0, 1):
        changed.training.seeds = (seed,)
        go(changed, tmp_path / str(seed))
        for pattern in ("attack", "attack_*", "recipes/*", "score/groups/*"):
            for made in (tmp_path / str(seed)).glob(pattern):
                target = whole / made.relative_to(tmp_path / str(seed))
                target.parent.mkdir(parents=True, exist_ok=True)
                if made.is_dir():
                    shutil.copytree(made, target, dirs_exist_ok=True)
                else:
                    shutil.copy(made, target)

    def never(*args, **kwargs):
        pytest.fail("this was done on the other machine")

    for place, name in ((fitting, "train"), (attacks, "fit"), (groups.Scorer, "_score")):
        monkeypatch.setattr(place, name, never)
    changed.training.seeds = (0, 1)
    rows = rows_of(go(changed, whole))
    assert rows.keys() == {(name, seed) for name in ("baseline", "full") for seed in (0, 1)}


@slow
def test_a_recipe_that_failed_is_named_and_not_compared(tmp_path):
    recipes = {"baseline": FROZEN, "full": {}}
    go(few(recipes), tmp_path)  # finished before the broken one comes
    results = go(few({**recipes, "broken": BROKEN}), tmp_path)
    assert {row["recipe"] for row in results["compare"]["rows"]} == {"baseline", "full"}
    assert set(results["compare"]["failed"]) == {"broken-seed0"}
    page = (tmp_path / "report.md").read_text()
    assert "broken-seed0 failed: the last 2" in page and "lower the learning rate" in page


@slow
def test_what_others_start_from_may_be_scored_later(tmp_path):
    recipes = {"baseline": FROZEN, "full": {}, "more": {"start": "first", "epochs": 1}}
    go(few({**recipes, "first": {"epochs": 1, "scored": False}}), tmp_path)
    cost = manifest(tmp_path, "cost")
    results = go(few({**recipes, "first": {"epochs": 1}}), tmp_path)
    rows = {row["recipe"]: row["cost_factor"] for row in results["compare"]["rows"]}
    assert set(rows) == {"baseline", "full", "more", "first"} and rows["first"] < rows["more"]
    assert manifest(tmp_path, "cost") == cost  # it was measured with what starts from it
    # A directory that has not: it is measured now.
    del cost["results"]["first"]
    (tmp_path / "cost" / "manifest.json").write_text(json.dumps(seal(cost)))
    again = go(few({**recipes, "first": {"epochs": 1}}), tmp_path)
    assert {row["recipe"] for row in again["compare"]["rows"]} == set(rows)


@slow
def test_without_the_reference_there_are_no_cost_factors(tmp_path):
    results = go(few({"baseline": FROZEN, "full": BROKEN}), tmp_path)
    [row] = results["compare"]["rows"]
    assert row["recipe"] == "baseline" and row["cost_factor"] is None
    assert row["seconds_per_image"] > 0 and row["gradients"] == 2 / BROKEN["epochs"]
    assert "full-seed0 failed" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare.reference": "ful"}, "config.compare.reference is 'ful'.*did you mean 'full'"),
        ({"compare.baseline": "usual"}, "config.compare.baseline is 'usual'"),
        ({"compare.reference": "smoothed"}, "nothing is trained"),
        ({"compare.claims": ({"better_than": "gen_af"},)}, r"compare.claims\[0\].*'gen_af'"),
        ({"compare.max_cost": 0}, "config.compare.max_cost must be a number above 0"),
        ({"recipes.universal.batch_size": 8}, "one batch size"),
        ({"scoring.adaptive": False}, "config.scoring.adaptive"),
        ({"suite.attacks": {"n": {"function": f"{ATTACKS}RandomNoise"}}}, "suite.attacks .*noise"),
        ({"sweep": {"recipes": "full"}}, "unknown entry 'recipes' in config.sweep"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_step(tmp_path, change, message):
    changed = config({**RECIPES, "universal": {**UNIVERSAL, "batch_size": 16}})
    tiny_recipes.put(changed, change)
    with pytest.raises(experiment.UsageError, match=f"(?s){message}"):
        go(changed, tmp_path)
    assert not list(tmp_path.iterdir())


@slow
def test_a_twin_is_attacked_by_what_was_crafted_on_the_other_seed(finished):
    workdir, results = finished
    rows, run = rows_of(results), context(config(), workdir)
    full = run.plan.recipes["full"]
    assert rows["baseline", 0]["robust_twin"] is None  # its encoder did not move: the public one
    images, labels = (jnp.asarray(x) for x in tiny.images("test"))
    for seed, other in ((0, 1), (1, 0)):
        model, twin = (train.load_trained(run, full, each) for each in (seed, other))
        crafted = attack_stage.attack(run, f"attack_full-seed{other}", twin.encoder, curve=False)
        right = np.ones(len(labels), bool)
        for one in attack_stage.load_perturbations(run, crafted):
            if one.attack != "random_noise":
                moved = attacks.attack_batch(one.perturbation, KEY, None, images / 255)
                answers = model(evaluation.quantize(moved)).logits.argmax(-1)
                right &= np.asarray(answers == labels)
        assert rows["full", seed]["robust_twin"] == pytest.approx(right.mean())
    assert "| twin |" in (workdir / "report.md").read_text()


@pytest.mark.parametrize(
    ("made", "twins"),
    [
        ((3, 4, 5), {3: 5, 4: 3, 5: 4}),
        ((3, 5), {3: 5, 5: 3}),  # the one between has failed
        ((4,), {}),
        ((), {}),
    ],
)
def test_each_seed_attacks_one_other(made, twins):
    changed = few({"full": {}})
    changed.stages, changed.training.seeds, changed.scoring.twin = ("score",), (3, 4, 5), True
    run = types.SimpleNamespace(plan=experiment.plan(changed))
    models = {f"full-seed{seed}": None for seed in made}
    named = {f"full-seed{seed}": f"full-seed{twin}" for seed, twin in twins.items()}
    assert train.twins_of(run, models) == named


@slow
def test_a_seed_that_comes_later_gives_the_first_one_another_twin(tmp_path):
    changed = few({"full": {}})
    changed.stages, changed.scoring.twin = STAGES[:3], True
    changed.training.seeds = (0, 1)
    go(changed, tmp_path)
    twin_of = {seed: _twin_group(tmp_path, seed) for seed in (0, 1)}
    before = {seed: file.read_bytes() for seed, file in twin_of.items()}
    changed.training.seeds = (0, 1, 2)
    go(changed, tmp_path)
    assert twin_of[1].read_bytes() == before[1] and twin_of[0].read_bytes() != before[0]
    run = context(changed, tmp_path)
    model, other = (train.load_trained(run, run.plan.recipes["full"], seed) for seed in (0, 2))
    crafted = attack_stage.attack(run, "attack_full-seed2", other.encoder, curve=False)
    some = [
        one for one in attack_stage.load_perturbations(run, crafted) if one.attack != "random_noise"
    ]
    entry = entry_of(tmp_path, "full-seed0", "twin")
    assert entry["robust_accuracy"] == pytest.approx(right_under(model, some))


def _twin_group(workdir, seed):
    [file] = (workdir / "score" / "groups").glob(f"full-seed{seed}-twin-universal-*.npz")
    return file


LABELLED = {
    "attacks": {
        "universal_ce": {
            "function": f"{ATTACKS}UniversalPGD",
            "objective": "robust_ssl.objectives:cross_entropy",
        }
    },
    **{"epsilon": 12 / 255, "num_steps": 3, "batch_size": 16},
}


def attackers():
    """Two recipes, one of which moves its encoder, under the attackers who know the most."""
    changed = few({"baseline": FROZEN, "full": {}})
    changed.scoring.update(half_twin=True, labelled=LABELLED)
    changed.scoring.per_image.attacks = {}
    return changed


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    run = context(attackers(), tmp_path_factory.mktemp("attackers"))
    pairs = [(recipe, 0) for recipe in run.plan.scored]
    scored = score.score(run)
    right = compare.outcomes_of(run, scored, pairs)
    shares = {r.name: {by: each.mean() for by, each in right[r, 0].items()} for r, _ in pairs}
    return run, shares, scored.results["results"]


def right_under(model, perturbations):
    images, labels = (jnp.asarray(x) for x in tiny.images("test"))
    right = np.ones(len(labels), bool)
    for one in perturbations:
        moved = attacks.attack_batch(one.perturbation, KEY, None, images / 255)
        answers = model(evaluation.quantize(moved)).logits.argmax(-1)
        right &= np.asarray(answers == labels)
    return right.mean()


@slow
def test_a_half_twin_is_the_recipe_on_half_of_the_images_with_a_seed_of_its_own(attacked):
    run, shares, _ = attacked
    full, half, seed = run.plan.recipes["full"], run.halved, attackers_stage.HALF_SEED
    assert [len(part) for part in half.downstream] == [24, 8]
    assert {*half.downstream[0].labels} == {*run.downstream[0].labels}
    assert half.downstream[0].fingerprint() != run.downstream[0].fingerprint()
    left = manifest(run.workdir / "half", f"recipes/full-seed{seed}")
    assert left["inputs"]["train"] == half.downstream[0].fingerprint() and left["seed"] == seed
    twin = train.load_trained(half, full, seed)
    crafted = attack_stage.attack(half, "attack_full", twin.encoder, curve=False)
    model = train.load_trained(run, full, 0)
    expected = right_under(model, attack_stage.load_perturbations(half, crafted))
    assert shares["full"]["robust_half"] == pytest.approx(expected)
    assert "robust_half" not in shares["baseline"]  # its encoder did not move


@slow
def test_an_attack_with_labels_is_fitted_on_the_whole_classifier(attacked):
    run, shares, entries = attacked
    for name in ("baseline", "full"):  # of a frozen encoder too: the head is its own
        stage = f"labelled_{name}-seed0"
        left = manifest(run.workdir, stage)
        assert left["inputs"]["train"] == run.downstream[0].fingerprint()
        model = train.load_trained(run, run.plan.recipes[name], 0)
        fitted = attack_stage.load_perturbations(
            run, attack_stage.attack_with_labels(run, stage, model)
        )
        assert [(one.attack, one.epsilon) for one in fitted] == [("universal_ce", 12 / 255)]
        assert shares[name]["robust_labelled"] == pytest.approx(right_under(model, fitted))
    rows = report.tables.attack_rows(entries, {f"{name}-seed0": name for name in shares})
    assert {row["crafted on"] for row in rows} >= {"half twin", "itself, with labels"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training.seeds": (0,), "scoring.twin": True}, "twin needs another seed.*half_twin"),
        ({"scoring.half_twin": True, "scoring.adaptive": False}, "half_twin has the suite"),
        ({"scoring.half_twin": True, "recipes.full.batch_size": 32}, "half of the training images"),
        ({"scoring.labelled": {"attacks": {}}}, r"labelled\.attacks is empty"),
        (
            {"scoring.labelled": {"attacks": {"n": f"{ATTACKS}RandomNoise"}}},
            r"labelled\.attacks\.n is noise",
        ),
        (
            {"scoring.labelled": {**LABELLED, "batch_size": 64}},
            r"labelled\.attacks\.universal_ce.*training images.*64",
        ),
    ],
)
def test_attackers_that_cannot_be_are_refused(tmp_path, change, message):
    changed = few({"baseline": FROZEN, "full": {"batch_size": 16}})
    changed.compare.reference = "baseline"
    changed.stages = ("score",)
    tiny_recipes.put(changed, change)
    with pytest.raises(experiment.UsageError, match=f"(?s){message}"):
        go(changed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_twin_of_no_recipe_is_refused(tmp_path):
    changed = few({})
    changed.stages, changed.scoring.half_twin = ("score",), True
    changed.classifiers = {"mine": {"function": "tiny:encoder"}}
    with pytest.raises(experiment.UsageError, match="half_twin is for recipes"):
        go(changed, tmp_path)


def test_what_nobody_asks_for_is_in_no_manifest():
    text = experiment.plan(few({"baseline": FROZEN, "full": {}})).text["scoring"]
    assert not {"twin", "half_twin", "labelled"} & {*text}
