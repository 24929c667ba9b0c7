"""Laws of the counts, the intervals and the scoring of attacked images."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from robust_ssl import evaluation, struct, threats
from robust_ssl.attacks import APGD, FABT, PGD, UniversalPerturbation
from robust_ssl.evaluation import Counts, PerImage, score, wilson_interval, worst_case
from robust_ssl.evaluation.counts import independent_difference
from robust_ssl.experiment.groups import Reseeded, Transferred
from robust_ssl.parallel import KINDS, Parallel
from robust_ssl.types import Classifier, Encoder

CLASSES = 4


class FirstPixel(nn.Module):
    """The class is written in the red value of the first pixel: level k is class k."""

    @nn.compact
    def __call__(self, x, *, train=False):
        level = jnp.round(x[:, 0, 0, 0] * 255)
        distance = level[:, None] - jnp.arange(CLASSES, dtype=x.dtype)[None, :]
        return -jnp.square(distance), {"pixel": x[:, 0, 0, :]}


class AtATenth(nn.Module):
    """As `FirstPixel`, with the boundary of a class a tenth of a level above it."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return FirstPixel()(jnp.ceil(x * 255 - 0.1) / 255)


class Identity(nn.Module):
    @nn.compact
    def __call__(self, features, *, train=False):
        return features


def first_pixel_classifier(module=None):
    encoder = Encoder(
        variables={},
        module=module or FirstPixel(),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        image_size=2,
        dim=CLASSES,
    )
    return Classifier(encoder=encoder, head_variables={}, head=Identity(), num_classes=CLASSES)


@struct.dataclass
class Shift:
    """Adds `levels` 8-bit steps to every pixel of the images whose label is `victim`."""

    levels: jax.Array
    victim: jax.Array

    def __call__(self, key, model, image, label=None):
        return image + jnp.where(label == self.victim, self.levels, 0.0) / 255


@struct.dataclass
class Unrounded(Shift):
    """The same, whose images are classified as they are."""

    eight_bit: ClassVar[bool] = False


@struct.dataclass
class Leaving:
    """Adds twice what its threat allows."""

    threat: threats.Linf

    def __call__(self, key, model, image, label=None):
        return image + 2 * self.threat.epsilon


@struct.dataclass
class Lottery:
    """Writes a random class into the image."""

    def __call__(self, key, model, image, label=None):
        return jnp.full_like(image, jax.random.randint(key, (), 0, CLASSES) / 255)


@struct.dataclass
class Tracer:
    """Counts how often Python runs it, which is once per compilation."""

    epsilon: jax.Array

    def __call__(self, key, model, image, label=None):
        TRACES.append(1)
        return image + self.epsilon


@struct.dataclass
class Broken:
    def __call__(self, key, model, image, label=None):
        return jnp.where(label == 1, jnp.nan, image)


TRACES: list[int] = []


def images_of(levels):
    return np.repeat(np.asarray(levels, np.uint8), 2 * 2 * 3).reshape(-1, 2, 2, 3)


def batches_of(levels, labels, size):
    for start in range(0, len(levels), size):
        stop = start + size
        yield {
            "images": images_of(levels[start:stop]),
            "labels": np.asarray(labels[start:stop], np.int64),
        }


@pytest.fixture(scope="module")
def two():
    return Parallel.create(num_devices=2)


def test_wilson_is_the_root_of_its_equation():
    # Both ends p solve (k/n - p)^2 = z^2 p (1 - p) / n.
    z = 1.959963984540054
    for successes, n in ((1, 7), (3, 10), (50, 100), (2399, 2401)):
        for p in wilson_interval(successes, n):
            assert math.isclose(
                (successes / n - p) ** 2, z**2 * p * (1 - p) / n, rel_tol=1e-9, abs_tol=1e-15
            )


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [  # Newcombe 1998, table II, method 10
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((6, 7, 2, 7), 0.0582, 0.8062),
        ((5, 56, 0, 29), -0.0381, 0.1926),
        ((0, 10, 0, 20), -0.1611, 0.2775),
        ((10, 10, 0, 10), 0.6075, 1.0),
    ],
)
def test_a_difference_of_images_that_are_not_paired_has_the_published_interval(counts, low, high):
    assert independent_difference(*counts) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_its_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 9)[0] == 0.0
    assert wilson_interval(9, 9)[1] == 1.0
    low, high = wilson_interval(3, 9, confidence=0.5)
    assert wilson_interval(3, 9)[0] < low < 3 / 9 < high < wilson_interval(3, 9)[1]
    for bad in ((-1, 4, 0.95), (5, 4, 0.95), (1, 4, 1.0), (1, 4, 0.0)):
        with pytest.raises(ValueError, match="between 0 and"):
            wilson_interval(*bad)


def test_counts_without_a_correct_image_are_zero_and_say_that_nothing_is_known():
    counts = Counts(n=5, clean_correct=0, robust_correct=0, succeeded=0, flipped=2)
    assert counts.attack_success_rate == 0.0
    assert counts.ci95["attack_success_rate"] == (0.0, 1.0)
    nothing = Counts(n=0, clean_correct=0, robust_correct=0, succeeded=0, flipped=0).as_dict()
    assert all(not math.isnan(v) for v in nothing.values() if isinstance(v, float))


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="flipped=6"):
        Counts(n=5, clean_correct=0, robust_correct=0, succeeded=0, flipped=6)
    with pytest.raises(ValueError, match="succeeded=3"):
        Counts(n=5, clean_correct=2, robust_correct=0, succeeded=3, flipped=3)


def test_intervals_hold_their_shares():
    counts = Counts(n=16, clean_correct=10, robust_correct=2, succeeded=9, flipped=12).as_dict()
    for name, (low, high) in counts["ci95"].items():
        assert 0 <= low <= counts[name] <= high <= 1


def test_worst_case_is_per_image_and_at_most_each():
    rng = np.random.default_rng(0)
    clean = rng.random(200) < 0.8
    each = [PerImage(clean, rng.random(200) < 0.7, rng.random(200) < 0.3, 1.5) for _ in range(3)]
    worst = worst_case(each)
    assert worst.seconds == 4.5
    expected = sum(all(r.robust_correct[i] for r in each) for i in range(200))
    assert worst.counts.robust_correct == expected
    for result in each:
        assert worst.counts.robust_accuracy <= result.counts.robust_accuracy
        assert worst.counts.attack_success_rate >= result.counts.attack_success_rate
        assert worst.counts.fooling_rate >= result.counts.fooling_rate


def test_how_far_an_attack_left_its_budget_is_measured_where_it_names_one():
    images = np.full((6, 2, 2, 3), 0.5, np.float32)
    ball, change = threats.Linf(0.1), jnp.full((2, 2, 3), 0.1)
    attacks = {
        "leaving": Leaving(ball),
        "pgd": PGD(ball, num_steps=1),
        "fitted": UniversalPerturbation(change, ball, "fitted"),
        "nobody": Shift(jnp.float32(0), jnp.int32(-5)),
    }
    parts = [images[:4], images[4:]]
    found = score(
        first_pixel_classifier(),
        [{"images": part, "labels": np.zeros(len(part), int)} for part in parts],
        attacks,
        key=jax.random.key(0),
        parallel=Parallel.create(num_devices=1),
    )
    assert found["leaving"].excess == pytest.approx(0.1, abs=1e-6)
    assert 0 <= found["pgd"].excess < 1e-6
    assert math.isnan(found["fitted"].excess) and math.isnan(found["nobody"].excess)
    assert found["worst"].excess == found["leaving"].excess


def test_quantize_rounds_by_at_most_half_a_level_and_keeps_whole_levels():
    pixels = jnp.linspace(-0.1, 1.1, 997)
    stored = evaluation.quantize(pixels)
    assert float(jnp.max(jnp.abs(stored - jnp.clip(pixels, 0, 1)))) <= 1 / 510 + 1e-7
    levels = evaluation.to_pixels(np.arange(256, dtype=np.uint8))
    np.testing.assert_array_equal(evaluation.quantize(levels), levels)
    # 8-bit image, epsilon of whole levels: rounding stays inside the ball.
    moved = evaluation.quantize(levels + 8 / 255) - levels
    assert float(jnp.max(jnp.abs(moved))) <= 8 / 255 + 1e-6


def test_an_attack_may_say_that_its_images_are_not_rounded(two):
    model = first_pixel_classifier(AtATenth())
    labels = np.zeros(4, np.int64)
    shift = (jnp.float32(0.3), jnp.int32(0))
    found = score(
        model,
        batches_of(labels, labels, 4),
        {"rounded": Shift(*shift), "as they are": Unrounded(*shift)},
        key=jax.random.key(0),
        parallel=two,
    )
    left = {name: counts.counts.robust_accuracy for name, counts in found.items()}
    assert left == {"rounded": 1.0, "as they are": 0.0, evaluation.WORST: 0.0}
    assert not FABT.eight_bit
    # Nor what is made of it.
    made = [Reseeded(Unrounded(*shift), jnp.int32(1)), Transferred(Unrounded(*shift), model)]
    assert not any(attack.eight_bit for attack in made)
    assert Reseeded(Shift(*shift), jnp.int32(1)).eight_bit


def test_a_model_of_given_logits_scores_two_of_sixteen(two):
    levels = [0, 1] + [3] * 14  # two are right under labels 0, 1, 2, 2, ...
    labels = [0, 1] + [2] * 14
    nobody = Shift(jnp.float32(0), jnp.int32(-5))
    results = score(
        first_pixel_classifier(),
        batches_of(levels, labels, 5),  # 5, 5, 5, 1: a short last batch, odd on two devices
        {"none": nobody},
        key=jax.random.key(0),
        parallel=two,
    )
    counts = results["none"].counts
    assert (counts.n, counts.clean_correct, counts.robust_correct) == (16, 2, 2)
    assert counts.clean_accuracy == counts.robust_accuracy == 2 / 16
    assert counts.flipped == counts.succeeded == 0


def test_attacks_are_counted_apart_and_together(two):
    levels = labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 1]
    attacks = {
        "zeros": Shift(jnp.float32(1), jnp.int32(0)),  # three images
        "twos": Shift(jnp.float32(-2), jnp.int32(2)),  # four others
        "rounds away": Shift(jnp.float32(0.4), jnp.int32(1)),  # not half a level
    }
    results = score(
        first_pixel_classifier(),
        batches_of(levels, labels, 4),
        attacks,
        key=jax.random.key(0),
        parallel=two,
    )
    assert [results[a].counts.succeeded for a in (*attacks, "worst")] == [3, 4, 0, 7]
    assert results["worst"].counts.robust_accuracy == 0.3
    np.testing.assert_array_equal(results["zeros"].flipped, [True] * 3 + [False] * 7)


@pytest.mark.parametrize("method", KINDS)
def test_results_do_not_depend_on_batches_or_devices(method):
    levels = labels = list(np.arange(10) % CLASSES)
    runs = [
        score(
            first_pixel_classifier(),
            batches_of(levels, labels, size),
            {"lottery": Lottery()},
            key=jax.random.key(3),
            parallel=Parallel.create(num_devices=devices, kind=method),
        )["lottery"]
        for size, devices in ((10, 1), (4, 2))
    ]
    np.testing.assert_array_equal(runs[0].robust_correct, runs[1].robust_correct)
    # The key of an image is that of its place in the split.
    keys = [jax.random.fold_in(jax.random.key(3), i) for i in range(10)]
    drawn = [int(jax.random.randint(key, (), 0, CLASSES)) for key in keys]
    np.testing.assert_array_equal(runs[0].robust_correct, np.array(drawn) == np.array(labels))


def test_one_compilation_serves_all_epsilons_and_the_short_batch(two):
    TRACES.clear()
    results = evaluation.score(
        first_pixel_classifier(),
        batches_of([0, 0, 1, 1, 2], [0, 0, 1, 1, 2], 2),
        {str(e): Tracer(jnp.float32(e / 255)) for e in (2, 1)},
        key=jax.random.key(0),
        parallel=two,
    )
    assert len(TRACES) == 1
    assert results["worst"].counts.clean_accuracy == 1.0
    assert [results[name].counts.robust_accuracy for name in ("2", "1", "worst")] == [0.0] * 3


@struct.dataclass
class Budgeted:
    """Counts its compilations; its budget and its target are leaves."""

    threat: threats.Linf
    rank: int = 1

    def __call__(self, key, model, image, label=None):
        TRACES.append(1)
        return image + self.threat.epsilon * jnp.where(self.rank > 0, 1.0, 0.0)


def test_one_compilation_serves_all_types_of_a_number(two):
    TRACES.clear()
    budgets = (1.0, 1, np.float32(1), np.float64(1), np.int64(1), jnp.ones(()), jnp.array(1))
    attacks = {str(i): Budgeted(threats.Linf(budget)) for i, budget in enumerate(budgets)}
    attacks |= {"np": Budgeted(threats.Linf(1), np.int64(1))}
    attacks |= {"jnp": Budgeted(threats.Linf(1), jnp.int32(1))}
    shared = {"key": jax.random.key(0), "parallel": two}
    results = score(first_pixel_classifier(), batches_of([3], [3], 1), attacks, **shared)
    assert len(TRACES) == 1 and len(results) == 10
    TRACES.clear()
    evaluation.score_in_turn(
        first_pixel_classifier(), batches_of([3], [3], 1), {"all": list(attacks.values())}, **shared
    )
    assert len(TRACES) == 1


def test_one_compilation_serves_perturbations_of_any_name(two):
    delta, shared = jnp.zeros((2, 2, 3)), {"key": jax.random.key(0), "parallel": two}
    named = {n: UniversalPerturbation(delta, threats.Linf(0.1), name=n) for n in ("a", "b", "c")}
    with tiny.programs() as compiled:
        score(first_pixel_classifier(), batches_of([3], [3], 1), named, **shared)
    assert sum("_fun" in name for name in compiled) <= 2, compiled  # clean and attacked


def test_settled_numbers_keep_their_values_and_arrays_their_types():
    attack = evaluation.metrics.settled(APGD(threats.Linf(0.25), rank=np.int64(3)))
    assert attack == APGD(threats.Linf(0.25), rank=3)
    assert attack.threat.epsilon.dtype == jnp.float32 and attack.rank.dtype == jnp.int32
    patch = PGD(threats.Patch(0.25, "random", jax.random.key(1)))
    assert jax.dtypes.issubdtype(
        evaluation.metrics.settled(patch).threat.key.dtype, jax.dtypes.prng_key
    )
    half = jax.tree_util.Partial(print, jnp.ones(3, jnp.bfloat16))
    assert evaluation.metrics.settled(half).args[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("area", [0.0, -1, 1.5, 0.1])
def test_a_patch_of_no_pixels_or_too_many_is_not_scored(two, area):
    batches = list(batches_of([0, 1], [0, 1], 2))
    attacks = {"patch": PGD(threats.Patch(area), num_steps=1)}
    with pytest.raises(ValueError, match=r"a share of the image, above 0|no pixel in an image"):
        score(first_pixel_classifier(), batches, attacks, key=jax.random.key(0), parallel=two)


def test_rounding_leaves_an_l2_ball_by_its_bound_at_most():
    halves = jnp.full(300, 127.5 / 255) + jnp.where(jnp.arange(300) % 2, 1e-4, -1e-4)
    moved = float(jnp.linalg.norm(evaluation.quantize(halves) - halves))
    assert 0.9 * math.sqrt(300) / 510 < moved <= math.sqrt(300) / 510


def test_nan_logits_are_never_correct():
    class NaNLogits(nn.Module):
        @nn.compact
        def __call__(self, features, *, train=False):
            return jnp.full_like(features, jnp.nan)

    broken = first_pixel_classifier().replace(head=NaNLogits())
    answers = evaluation.predictions(broken, images_of([0, 1]))
    assert answers.tolist() == [-1, -1]
    assert answers.dtype == jnp.int32


def not_a_number(inputs):
    return jnp.nan * jnp.mean(inputs.adversarial.features)


def test_an_attack_whose_objective_is_nan_is_no_evidence(two):
    attack = PGD(threats.Linf(0.1), objective=not_a_number)
    with pytest.raises(ValueError, match=r"'pgd' made pixels.*look at its objective, not_a_number"):
        score(
            first_pixel_classifier(),
            batches_of([0, 1], [0, 1], 2),
            {"pgd": attack},
            key=jax.random.key(0),
            parallel=two,
        )


def test_bad_input_is_refused_before_it_is_counted(two):
    def run(batches, attacks):
        key = jax.random.key(0)
        return score(first_pixel_classifier(), batches, attacks, key=key, parallel=two)

    good = [{"images": images_of([0, 1]), "labels": np.array([0, 1])}]
    nobody = {"none": Shift(jnp.float32(0), jnp.int32(-5))}
    with pytest.raises(
        ValueError, match=r"'broken' made pixels that are not finite, in images \[1\]"
    ):
        run(good, {"broken": Broken()})
    with pytest.raises(ValueError, match="the split is empty"):
        run([], nobody)
    with pytest.raises(ValueError, match="at least one attack"):
        run(good, {})
    with pytest.raises(ValueError, match="'worst'"):
        run(good, {"worst": nobody["none"]})
    with pytest.raises(TypeError, match="'closure' must be a callable pytree"):
        run(good, {"closure": lambda key, model, image, label: image})
    with pytest.raises(ValueError, match="integer labels"):
        run([{**good[0], "labels": np.array([0.0, 1.0])}], nobody)


@struct.dataclass
class ShiftThen:
    """A shift by one pixel, and a threat around what is shifted."""

    threat: threats.Linf

    def project(self, candidate, image):
        return self.threat.project(candidate, jnp.roll(image, 1, axis=0))


def test_a_threat_of_ones_own_is_asked_itself_whatever_it_holds():
    images = jax.random.uniform(jax.random.key(0), (2, 6, 6, 3))
    threat = ShiftThen(threats.Linf(0.05))
    allowed = jax.vmap(threat.project)(jnp.roll(images, 1, axis=1) + 0.03, images)
    np.testing.assert_allclose(evaluation.metrics.excess(threat, allowed, images), 0.0, atol=1e-6)
    low = threats.Band(threats.Linf(0.05), 0.0, 0.125)  # of a band the budget inside
    assert evaluation.metrics.excess(low, images / 2 + 0.06, images / 2).max() < 0.0101
