"""Checks: each by hand on numbers, then the verdicts on eight victims, then bad input."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import victims

from robust_ssl import attacks, evaluation, threats
from robust_ssl.evaluation import checks
from robust_ssl.evaluation.checks import bench, path
from robust_ssl.evaluation.checks.result import (
    status_at_most,
    status_of_difference,
    status_of_gain,
)
from robust_ssl.parallel import Parallel
from robust_ssl.types import AttackInputs, Outputs

THREAT = threats.Linf(victims.EPSILON)
THREAT_32 = path.with_budget(THREAT, victims.EPSILON)  # as the checks use it: no other compile
KEY = jax.random.key(5)
BROKEN = [*victims.EXPECTED]
SAMPLE = 256


def right(count, n=500):
    """The first `count` of `n` images are right."""
    return np.arange(n) < count


# ---------------------------------------------------------------------------- values and verdicts


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (["passed", "passed"], "trusted"),
        (["passed", "not run"], "trusted"),
        (["passed", "note"], "trusted with notes"),
        (["passed", "note", "failed"], "not trusted"),
    ],
)
def test_a_verdict_is_the_worst_of_its_checks(found, word):
    honest = [checks.Check(n, 0.0, 0.0, "passed", "") for n in range(1, 7)]
    others = [checks.Check(n, 0.5, 0.25, status, "Why.") for n, status in enumerate(found, 7)]
    verdict = checks.Verdict((*honest, *others))
    assert verdict.word == word and verdict.trusted == (word != "not trusted")
    lines = str(verdict).splitlines()
    assert lines[0].startswith(f"{word}: ")
    assert len(lines) == 1 + sum(status in ("note", "failed") for status in found)


@pytest.mark.parametrize("statuses", [[], ["not run"], ["passed"], ["passed", "note"]])
def test_without_an_examined_model_nothing_is_trusted(statuses):
    found = [checks.Check(n, 0.5, 0.25, status, "Why.") for n, status in enumerate(statuses, 20)]
    verdict = checks.Verdict(tuple(found))
    assert verdict.word == "not examined" and not verdict.trusted
    failed = checks.Check(27, 0.5, 0.25, "failed", "Why.")
    assert checks.Verdict((*found, failed)).word == "not trusted"


def test_a_verdict_goes_into_json_whatever_was_measured():
    odd = checks.Check(1, float("nan"), np.float32(0.5), "failed", "Why.", "Do.", "Who.")
    other = checks.not_run([17], "no surrogate")
    verdict = checks.Verdict((odd, *other), images=np.int64(3), gradient_evaluations=1 / 3)
    stored = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))
    assert stored["verdict"] == "not trusted" and stored["images"] == 3
    assert stored["checks"][0]["value"] == "nan" and stored["checks"][0]["limit"] == 0.5
    assert stored["checks"][1] == {
        **{"number": 17, "name": "transfer not stronger", "value": None, "limit": None},
        **{"status": "not run", "meaning": "no surrogate", "advice": "", "source": ""},
    }
    assert (verdict + verdict).numbers("failed") == (1, 1) and verdict[17].status == "not run"


def test_a_check_has_a_known_number_and_status():
    for number, status in ((0, "passed"), (28, "passed"), (1, "fine")):
        with pytest.raises(ValueError, match="1 to 27"):
            checks.Check(number, None, None, status, "")


def test_a_difference_is_judged_by_the_images_on_which_two_attacks_disagree():
    difference = evaluation.difference
    assert difference(right(400), right(390)) == (0.02, pytest.approx(1.96 * 10**0.5 / 500))
    assert difference(right(10), right(20))[0] == -0.02
    # Over two repetitions: the first image was right in one of them only, the others agree.
    halves = np.array([0.5, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])
    assert difference(*halves) == (0.125, pytest.approx(1.96 * 0.5 / 4))
    # Three images of 500 more are over a limit of 0.2 points, but no more than an accident.
    few, many = difference(right(400), right(397)), difference(right(400), right(390))
    assert status_of_difference(*few, 0.002) == "note"
    assert status_of_difference(*many, 0.002) == "failed"
    assert status_of_difference(*many, 0.02) == "passed"
    assert status_of_gain(0.03, 0.0, 0.02) == "passed" and status_of_gain(0, 0.5, 0.02) == "failed"
    assert status_at_most(float("nan"), 1.0, note=2.0) == "failed"


# ------------------------------------------------------------------------------- each check by hand

LOGITS = np.array([[3.0, 1.0, -2.0], [0.5, 0.2, 0.1]])
SLOPES = np.random.default_rng(0).normal(size=(64, 8))
RISING = np.linspace(0.0, 1.0, 21).reshape(1, -1)  # the last ten of twenty steps bring a half
EARLY = np.minimum(4 * RISING, 1.0)
BY_HAND = [
    (checks.finite_logits, (LOGITS,), (np.full((2, 3), np.nan),), 1.0),
    (checks.deterministic, (LOGITS, [LOGITS], LOGITS), (LOGITS, [LOGITS + 0.175], LOGITS), 0.1),
    (checks.deterministic, (LOGITS, [LOGITS], LOGITS), (LOGITS, [LOGITS], LOGITS - 0.175), 0.1),
    (checks.gives_logits, (LOGITS,), (np.full((2, 4), 0.25),), 1.0),
    (checks.zero_gradient, (right(5),), (right(6),), 0.012),
    (checks.zero_margin_gradient, (right(5),), (right(500),), 1.0),
    (checks.finite_differences, (SLOPES, 2 * SLOPES), (SLOPES, -SLOPES), -1.0),
    (checks.finite_differences, (SLOPES, 1e3 * SLOPES), (0 * SLOPES, SLOPES), 0.0),
    (checks.falling_steps, (RISING,), (-RISING,), 1.0),
    (checks.falling_steps, (RISING,), (np.full((2, 4), np.nan),), np.nan),
    (checks.converged, (EARLY,), (np.repeat(RISING, 8, axis=0),), 0.5),
    (checks.converged, (1 + 1e-7 * RISING,), (np.full((2, 4), np.nan),), np.nan),
    (checks.silent_hits, (right(200), ~right(200)), (right(200), right(50)), 0.1),
    (checks.twice_the_steps, (right(300), right(290)), (right(300), right(250)), 0.1),
    (checks.iterative_not_weaker, (right(300), right(300)), (right(300), right(250)), 0.1),
    (checks.full_range_breaks_all, (right(5),), (right(6),), 0.012),
    (checks.beats_noise, (right(311), right(300)), (right(300), right(300)), 0.0),
    (checks.black_box_not_stronger, (right(300), right(299)), (right(300), right(250)), 0.1),
    (checks.transfer_not_stronger, (right(300), right(400)), (right(300), right(250)), 0.1),
    (checks.budget_kept, (np.full(3, 1e-6),), (np.array([0.0, 0.1]),), 0.1),
    (checks.survives_rounding, (right(300), right(305)), (right(300), right(350)), 0.1),
    (checks.per_image_not_weaker, (right(300), right(300)), (right(250), right(300)), 0.1),
    (checks.holds_on_new_images, (right(300), right(250)), (right(300), right(150)), 0.3),
    (checks.seeds_agree, ([right(300), right(310)],), ([right(300), right(350)],), 0.1),
    (checks.statistics_unchanged, ({"m": np.ones(3)},) * 2, ({"m": np.ones(3)}, {}), np.inf),
]


@pytest.mark.parametrize(("check", "good", "bad", "value"), BY_HAND)
def test_a_check_passes_what_is_good_and_fails_what_is_bad_with_its_value(check, good, bad, value):
    assert check(*good).status == "passed", check(*good)
    failed = check(*bad)
    assert failed.status == "failed" and failed.value == pytest.approx(value, abs=1e-6, nan_ok=True)
    assert failed.meaning and failed.advice and failed.source


def test_checks_over_several_attacks_take_the_worst():
    by_objective = {"cross_entropy": right(300), "margin": right(250), "dlr": right(320)}
    found = checks.objectives_agree(by_objective)
    assert found.status == "failed" and found.value == 0.1 and "margin" in found.meaning
    assert checks.objectives_agree({**by_objective, "margin": right(295)}).status == "passed"
    rising = checks.falls_with_epsilon({0.2: right(250), 0.1: right(300), 0.4: right(280)})
    assert rising.status == "failed" and rising.value == pytest.approx(0.06)
    assert checks.falls_with_epsilon({0.1: right(300), 0.2: right(250)}).status == "passed"
    baselines = {"random noise": right(400), "its own pixels shuffled": right(305)}
    found = checks.beats_noise_and_shuffle(right(304), baselines)
    assert found.status == "failed" and "shuffled" in found.meaning
    assert checks.beats_noise_and_shuffle(right(200), baselines).status == "passed"


def test_a_robust_model_is_no_proof_against_an_attack_that_works_elsewhere():
    assert checks.beats_noise(right(300), right(300)).status == "failed"
    assert checks.beats_noise(right(300), right(300), able=True).status == "note"
    assert checks.beats_noise(right(311), right(300), able=True).status == "passed"


def test_only_images_that_are_left_can_be_broken_by_more_steps():
    rising = np.arange(21.0) * np.ones((500, 1))
    assert checks.converged(rising).status == "failed"
    assert checks.converged(rising, still_right=right(100)).status == "failed"
    assert checks.converged(rising, still_right=right(20)).status == "note"
    assert checks.converged(rising, still_right=right(0)).status == "not run"
    broken = np.where(right(20)[:, None], np.nan, rising)
    assert checks.converged(broken, still_right=right(20)).status == "failed"


@pytest.mark.parametrize(("late", "status"), [(0.04, "passed"), (0.053, "note"), (0.2, "failed")])
def test_what_images_differ_in_may_be_why_a_loss_still_rises(late, status):
    """Sixteen images whose last ten steps bring shares around `late` of their rise."""
    shares = late * np.random.default_rng(0).lognormal(0, 0.8, 16)
    shares *= late / shares.mean()
    steps = np.arange(21)
    losses = np.where(steps <= 10, steps / 10 * (1 - shares[:, None]), np.nan)
    losses[:, 11:] = 1 - shares[:, None] * (1 - np.arange(1, 11) / 10)
    found = checks.converged(losses)
    assert found.value == pytest.approx(late) and found.status == status
    assert "16 images" in found.meaning


@pytest.mark.parametrize(
    ("count", "n", "status"),
    [
        *[(1, 100, "passed"), (1, 16, "note"), (1, 58, "note"), (2, 58, "note"), (3, 100, "note")],
        *[(3, 58, "failed"), (4, 100, "failed"), (50, 500, "failed"), (0, 5, "passed")],
    ],
)
def test_silent_hits_are_held_against_an_exact_binomial_test(count, n, status):
    found = checks.silent_hits(right(count, n), np.ones(n, bool))
    assert found.status == status and found.value == count / n
    tail = sum(math.comb(n, k) * 0.01**k * 0.99 ** (n - k) for k in range(count, n + 1))
    assert found.value <= 0.01 or (tail <= 0.05) == (status == "failed")
    assert checks.silent_hits(np.ones(0, bool), np.ones(0, bool)).status == "not run"


def test_what_nobody_tried_fails_and_few_images_are_a_note():
    assert checks.crafted_again(right(300), None).status == "failed"
    assert checks.patch_places(right(300), None).status == "failed"
    weaker = checks.crafted_again(right(300), right(320))  # who sees more has done less
    assert weaker.status == "note" and " do less than " in weaker.meaning
    assert checks.crafted_again(right(300), right(302)).status == "passed"
    for check, limit in ((checks.crafted_again, 1), (checks.patch_places, 10)):
        assert check(right(300), right(300 - limit)).status == "passed"
        lower = check(right(300), right(250))
        assert lower.status == "note" and lower.value == pytest.approx(0.1)
    assert checks.enough_images(1200, 2401).status == "passed"
    assert checks.enough_images(250, 500).status == "note"
    assert checks.enough_images(0, 1).status == "note"


# ------------------------------------------------------------------------------- the recorded path


def test_a_climb_reaches_the_optimum_of_a_linear_model_and_keeps_its_best_point():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(12, 2)), jnp.float32)

    def model(images):
        logits = images.reshape(len(images), -1) @ weights
        return Outputs(features=logits, logits=logits)

    image, label = jnp.full((2, 2, 3), 0.5), jnp.array(0)
    climb = path.Climb(threats.Linf(0.1), 1, 20)
    found = jax.jit(climb, static_argnums=0)(model, image, image, label)
    direction = (weights[:, 1] - weights[:, 0]).reshape(2, 2, 3)
    np.testing.assert_allclose(found.best, image + 0.1 * jnp.sign(direction), atol=1e-6)
    assert float(found.losses[0]) <= float(found.best_value) == float(found.losses.max())
    assert float(found.losses[0]) < float(found.losses[-1])


# ------------------------------------------------------------------------------------- the victims


@functools.cache
def sample():
    images, labels = victims.digits()[1]
    return images[:SAMPLE], labels[:SAMPLE]


@functools.cache
def verdict(name):
    return checks.examine(
        victims.all_victims()[name], *sample(), threat=THREAT, key=KEY, batch_size=SAMPLE
    )


@functools.cache
def whole(name):
    """Scores PGD over all 2,500 test images: the figure that is to be believed."""
    everything = bench.Bench(*victims.digits()[1], Parallel.create(num_devices=1), SAMPLE)
    model, climb = victims.all_victims()[name], path.Climb(THREAT_32, jnp.int32(0), 20)
    found = everything.run(
        bench.climb, (KEY, model, climb, jnp.asarray(False)), start=everything.images
    )["best"]
    scored = everything.run(bench.scored, (model, THREAT_32), adversarial=found)["rounded"]
    clean = everything.run(bench.scored, (model, THREAT_32), adversarial=everything.images)
    clean = clean["rounded"]
    return evaluation.PerImage(clean, scored & clean, clean & ~scored)


@pytest.mark.parametrize("name", ["plain", "adversarially trained"])
def test_an_honest_classifier_comes_out_clean(name):
    scored = whole(name)
    found = checks.examine(
        victims.all_victims()[name],
        *sample(),
        threat=THREAT,
        key=KEY,
        reported=scored.robust_correct[:SAMPLE],
        counts=scored.counts,
        surrogate=victims.all_victims()["plain"],
        batch_size=SAMPLE,
    )
    assert str(found) == "trusted: 20 of 20 checks passed"
    assert scored.counts.clean_accuracy > 0.9
    # Without the figure over 2,500 images all that is left to say is that 256 are few.
    assert verdict(name).word == "trusted with notes" and verdict(name).numbers("note") == (20,)
    assert verdict(name).numbers("not run") == (17,)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_classifier_is_flagged_by_the_named_check(name):
    found = verdict(name)
    assert found.word == "not trusted"
    assert victims.EXPECTED[name] in found.numbers("failed"), str(found)
    assert str(found).startswith("not trusted: ")


def test_the_checks_tell_the_faults_apart():
    assert {4, 5, 6, 14, 15, 16} <= set(verdict("rounded input").numbers("failed"))
    saturated = verdict("logits x 1000").numbers("failed")
    assert {4, 12, 14, 16} <= set(saturated) and 5 not in saturated
    assert verdict("straight through").numbers("failed") == (6,)
    assert verdict("randomized").numbers("failed") == (2,)
    assert verdict("probabilities").numbers("failed") == (3,)


def test_a_figure_that_is_too_good_is_not_trusted_though_the_model_is_honest():
    name = "plain"
    found = checks.examine(
        victims.all_victims()[name],
        *sample(),
        threat=THREAT,
        key=KEY,
        reported=np.ones(SAMPLE, bool),
        adversarial=np.clip(sample()[0] + 0.2, 0, 1),
        batch_size=SAMPLE,
    )
    assert found.numbers("failed") == (10, 11, 12, 15, 16, 18)


def test_a_climb_keeps_a_misclassified_point_where_it_has_seen_one():
    """Of three classes the loss can be higher where the answer is right."""
    right_but_high, wrong_but_low = jnp.array([0.1, 0.0, 0.0]), jnp.array([0.0, 0.2, -9.0])

    def model(images):
        logits = jnp.where(images[..., :1, :1, :1] > 0.5, right_but_high, wrong_but_low)
        return Outputs(features=None, logits=logits[:, 0, 0])

    image = jnp.zeros((1, 1, 3))
    seen = path.Path(image, image, -jnp.inf, jnp.zeros((), bool), jnp.zeros(3))
    values = []
    for number, pixel in enumerate((1.0, 0.0, 1.0)):
        last = jnp.full((1, 1, 3), pixel)
        logits = path.logits_of(model, last)
        values.append(float(path.objective_value(logits, jnp.int32(0), 0)))
        wrong = path.is_wrong(logits, 0)
        seen = seen.replace(last=last).seen(number, values[-1], wrong)
    assert values[0] > values[1]
    assert bool(seen.hit) and float(seen.best[0, 0, 0]) == 0
    assert seen.best_value == pytest.approx(values[1])


def test_noise_that_is_seeded_by_the_pixels_is_noise():
    model = victims.NoisyByImage(victims.trained(adversarial=False))
    images = sample()[0][:32]
    logits, moved = model(images).logits, model(images + 1e-6).logits
    found = checks.deterministic(logits, [model(images).logits], moved)
    assert found.status == "failed" and found.limit == 1e-2


# -------------------------------------------------------------------------------- universal attacks


@functools.cache
def fitted():
    """Fits one perturbation on training images with their labels, which none is stronger than."""
    model = victims.all_victims()["plain"]
    images, labels = (part[:SAMPLE] for part in victims.digits()[0])

    @jax.jit
    def gradient(delta):
        def value(delta):
            outputs = model(jnp.clip(images + delta[None], 0, 1))
            blank = jnp.zeros((1, 1, 1, 3))
            return path.cross_entropy(AttackInputs(outputs, outputs, blank, blank, labels))

        return jax.grad(value)(delta)

    delta = jnp.zeros(images.shape[1:])
    for _ in range(20):
        delta = jnp.clip(delta + 0.03 * jnp.sign(gradient(delta)), -0.1, 0.1)
    return attacks.UniversalPerturbation(delta, THREAT_32)


def test_a_fitted_perturbation_comes_out_clean_and_noise_does_not():
    model, first = victims.all_victims()["plain"], fitted()
    examine = functools.partial(checks.examine_universal, model, batch_size=SAMPLE, key=KEY)
    found = examine(
        first,
        *sample(),
        fitted_images=victims.digits()[0][0][:SAMPLE],
        variables_before=model.variables,
    )
    assert found.numbers("passed") == (21, 22, 23, 27), str(found)
    assert found.numbers("not run") == (24, 25, 26)
    delta = 0.1 * jax.random.uniform(KEY, first.delta.shape, minval=-1)
    noise = first.replace(delta=delta)
    found = examine(noise, *sample(), hardened=True, other_seeds=[first, noise])
    assert found.numbers("failed") == (22, 24, 25) and found[25].value is None
    again = examine(noise, *sample(), hardened=True, crafted_again=first)
    assert again[25].status == "note" and again[25].value > 0.1


def test_a_patch_must_be_tried_elsewhere():
    patch = attacks.UniversalPerturbation(jnp.ones((8, 8, 3)), threats.Patch(0.25))
    moved = patch.replace(threat=threats.Patch(0.25, location="random"))
    examine = functools.partial(checks.examine_universal, answers([1.0, 0.0]), num_steps=4, key=KEY)
    images, labels = sample()[0][:8], np.arange(8) % 2
    alone = examine(patch, images, labels)
    both = examine(patch, images, labels, elsewhere=moved)
    assert alone[26].status == "failed" and alone[26].value is None
    assert both[26].status == "passed" and both[21].status == "passed"


# --------------------------------------------------------------------------------------- bad input


def answers(logits):
    return victims.Answers(jnp.asarray(logits, jnp.float32))


def small(model, n=8, labels=None, **options):
    images = sample()[0][:n]
    labels = np.arange(n) % 4 if labels is None else labels
    options = {"threat": THREAT, "key": KEY, "num_steps": 4, "num_queries": 5, **options}
    return checks.examine(model, images, labels, **options)


def test_constant_logits_and_nan_have_a_verdict_each():
    constant = small(answers([1.0, 0.0, 0.0, 0.0]))
    assert {4, 5} <= set(constant.numbers("failed"))
    broken = small(answers([np.nan, 0.0, 0.0, 0.0]))
    assert broken.numbers("failed") == (1,) and len(broken.numbers("not run")) == 19
    json.dumps(broken.as_dict(), allow_nan=False)


def test_where_nothing_is_correct_there_is_nothing_to_attack():
    found = small(answers([0.0, 0.0, 0.0, 9.0]), labels=np.arange(8) % 3)
    assert found[20].status == "note" and "none of the 8 images" in found[20].meaning
    assert found.numbers("not run") == tuple(range(7, 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threat": threats.Linf(0.0)}, "epsilon is 0.0: .*no robustness figure"),
        ({"threat": threats.L2(jnp.zeros(()))}, "take epsilon above 0"),
        ({"threat": threats.Linf(8)}, "pixel units"),
        ({"threat": threats.Linf(jnp.ones(2))}, "one epsilon"),
        ({"threat": threats.Patch(0.1)}, "examine_universal"),
        ({"labels": np.zeros(8, int)}, "of class 0"),
        ({"labels": np.arange(8)}, "0 to 3"),
        ({"labels": np.zeros(7, int)}, "labels"),
        ({"num_steps": 1}, "at least 4"),
        ({"n": 0}, "at least 1"),
    ],
)
def test_what_no_verdict_can_be_had_on_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        small(answers([0.0, 0.0, 0.0, 0.0]), **change)


def test_a_model_without_classes_is_refused():
    with pytest.raises(ValueError, match="one class"):
        small(answers([0.0]), labels=np.zeros(8, int))
    with pytest.raises(ValueError, match="no logits"):
        small(victims.trained(adversarial=False).encoder)
    delta = attacks.UniversalPerturbation(jnp.zeros((4, 4, 3)), THREAT)
    with pytest.raises(ValueError, match=r"resized\(\(8, 8\)\)"):
        checks.examine_universal(answers([0.0, 1.0]), delta, *sample(), key=KEY)


def test_the_cost_is_a_quarter_at_most():
    for steps, queries in ((20, 200), (10, 100)):
        spent = 10_000 * 60.0
        images = checks.affordable_images(spent, steps, queries)
        assert images * checks.cost(steps, queries) <= spent / 4
        assert (images + 1) * checks.cost(steps, queries) > spent / 4
    assert checks.affordable_images(0) == 64
    assert verdict("plain").gradient_evaluations == checks.cost()
