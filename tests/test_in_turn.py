"""Attacks in turn: the worst case of all, whoever is alive, and never more work than needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import struct, threats
from robust_ssl.attacks.apgd import APGD
from robust_ssl.attacks.per_image import PGD
from robust_ssl.attacks.square import Square
from robust_ssl.evaluation import in_turn, metrics
from robust_ssl.objectives import labelled
from robust_ssl.parallel import Parallel
from robust_ssl.types import Outputs

KEY = jax.random.key(0)
ONE, TWO = (Parallel.create(num_devices=n) for n in (1, 2))


@struct.dataclass
class Mlp:
    first: jax.Array
    second: jax.Array

    def __call__(self, images):
        hidden = jnp.tanh((images.reshape(len(images), -1) - 0.5) @ self.first)
        return Outputs(features=hidden, logits=hidden @ self.second)


@struct.dataclass
class Brightness:
    """Says class 1 where the mean pixel is above one half."""

    def __call__(self, images):
        mean = images.mean(axis=(1, 2, 3)) - 0.5
        logits = jnp.stack([-mean, mean], axis=1)
        return Outputs(features=logits, logits=logits)


@struct.dataclass
class Coin:
    """A randomized model: which class it says is a toss."""

    key: jax.Array

    def with_key(self, key):
        return self.replace(key=key)

    def __call__(self, images):
        toss = jax.random.normal(self.key, (len(images), 2))
        return Outputs(features=toss, logits=toss)


@struct.dataclass
class Brighten:
    """Adds a constant; how much is a leaf."""

    by: float

    def __call__(self, key, model, image, label=None):
        return jnp.clip(image + self.by, 0.0, 1.0)


@struct.dataclass
class Whole:
    """Hides that a search can be interrupted."""

    search_of: Square

    def __call__(self, key, model, image, label=None):
        return self.search_of(key, model, image, label)


def _mlp():
    rng = np.random.default_rng(3)
    first, second = 0.4 * rng.normal(size=(192, 10)), rng.normal(size=(10, 4))
    return Mlp(jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32))


def _split(n=21, model=None):
    """Images that the model classifies correctly, but for each fifth."""
    images = np.random.default_rng(1).uniform(size=(n, 8, 8, 3)).astype(np.float32)
    labels = np.array((model or _mlp())(jnp.asarray(images)).logits.argmax(1), np.int32)
    labels[::5] = (labels[::5] + 1) % 4
    return images, labels


def _batches(images, labels, size=8):
    cuts = range(0, len(images), size)
    return [{"images": images[i : i + size], "labels": labels[i : i + size]} for i in cuts]


def _attacks(epsilon=0.006):
    ball = threats.Linf(epsilon)
    targeted = APGD(ball, labelled.margin_targeted, num_steps=3)
    return {
        "pgd": PGD(threats.Linf(epsilon / 2), epsilon, num_steps=1),
        "targeted": [targeted.replace(rank=rank) for rank in (1, 2, 3)],
    }


def test_it_is_the_worst_case_of_attacking_every_image_with_everything():
    batches, attacks = _batches(*_split()), _attacks()
    found = in_turn.score_in_turn(_mlp(), batches, attacks, key=KEY, parallel=ONE, batch_size=8)
    alone = metrics.score(_mlp(), batches, {"pgd": attacks["pgd"]}, key=KEY, parallel=ONE)
    for number, member in enumerate(attacks["targeted"]):
        key = jax.random.fold_in(KEY, number) if number else KEY
        alone[f"{number}"] = metrics.score(_mlp(), batches, {"x": member}, key=key, parallel=ONE)[
            "x"
        ]
    clean = alone["pgd"].clean_correct
    after_pgd = clean & alone["pgd"].robust_correct
    after_all = after_pgd & np.logical_and.reduce([alone[f"{n}"].robust_correct for n in range(3)])
    np.testing.assert_array_equal(found["pgd"].clean_correct, clean)
    np.testing.assert_array_equal(found["pgd"].robust_correct, after_pgd)
    np.testing.assert_array_equal(found["targeted"].robust_correct, after_all)
    np.testing.assert_array_equal(found["worst"].robust_correct, after_all)
    counts = found["worst"].counts
    assert counts.n == 21 and 0 < counts.robust_correct < after_pgd.sum() < clean.sum() < 21
    assert counts.flipped == counts.succeeded == clean.sum() - after_all.sum()
    assert found["worst"].seconds == pytest.approx(found["pgd"].seconds + found["targeted"].seconds)


@pytest.mark.parametrize(("parallel", "batch_size", "size"), [(ONE, 5, 21), (TWO, 8, 4)])
def test_the_outcome_does_not_depend_on_batches_devices_or_neighbours(parallel, batch_size, size):
    def worst(parallel, batch_size, size):
        results = in_turn.score_in_turn(
            _mlp(), _batches(*_split(), size), _attacks(), key=KEY, parallel=parallel,
            batch_size=batch_size,
        )  # fmt: skip
        return results["worst"].robust_correct

    np.testing.assert_array_equal(worst(parallel, batch_size, size), worst(ONE, 8, 8))


def test_it_can_stop_between_attacks_and_go_on():
    attacks = _attacks()
    examples = in_turn.gathered(_batches(*_split()))
    shared = {"key": KEY, "parallel": ONE, "batch_size": 8}
    clean = in_turn.clean_correct(_mlp(), examples, **shared)
    stored = in_turn.strike(_mlp(), examples, attacks["pgd"], clean, **shared)
    alive = in_turn.strike(_mlp(), examples, attacks["targeted"], stored, **shared)
    whole = in_turn.score_in_turn(_mlp(), _batches(*_split()), attacks, **shared)
    np.testing.assert_array_equal(stored, whole["pgd"].robust_correct)
    np.testing.assert_array_equal(alive, whole["worst"].robust_correct)
    # From any subset: what one image does is its own matter.
    some = stored & (np.arange(21) % 2 == 0)
    found = in_turn.strike(_mlp(), examples, attacks["targeted"], some, **shared)
    np.testing.assert_array_equal(found, alive & some)


def test_only_living_images_are_attacked_in_batches_of_one_shape(monkeypatch):
    seen = []
    original = in_turn.on_some

    def counting(function, constants, examples, rows, batch_size):
        seen.append(len(rows))
        return original(function, constants, examples, rows, batch_size)

    monkeypatch.setattr(in_turn, "on_some", counting)
    # Mean brightness 0.40, 0.41, ... 0.49: lifting by 0.05 and by 0.085 breaks 4 and 3 more.
    images = np.stack([np.full((8, 8, 3), 0.405 + i / 100, np.float32) for i in range(10)])
    batches = _batches(images, np.zeros(10, int))
    attacks = {"lift": [Brighten(0.05), Brighten(0.085)], "again": Brighten(0.0)}
    found = in_turn.score_in_turn(
        Brightness(), batches, attacks, key=KEY, parallel=ONE, batch_size=4
    )
    assert seen == [10, 10, 5, 1]  # clean, first member, second member, next attack
    assert found["worst"].counts.robust_correct == 1
    attacks = {"all": Brighten(0.5), "none left": Brighten(0.5)}
    found = in_turn.score_in_turn(
        Brightness(), batches, attacks, key=KEY, parallel=ONE, batch_size=4
    )
    assert seen[-1] == 0 and found["none left"].counts.robust_accuracy == 0


def test_a_search_that_is_interrupted_ends_as_one_that_is_not(monkeypatch):
    monkeypatch.setattr(in_turn, "TOGETHER", 2)  # batches: more than one round
    examples = in_turn.gathered(_batches(*_split(40)))
    shared = {"key": KEY, "parallel": TWO, "batch_size": 8}
    clean = in_turn.clean_correct(_mlp(), examples, **shared)
    search = Square(threats.Linf(0.02), num_queries=60)
    interrupted = in_turn.strike(_mlp(), examples, search, clean, **shared)
    whole = in_turn.strike(_mlp(), examples, Whole(search), clean, **shared)
    np.testing.assert_array_equal(interrupted, whole)
    assert 0 < interrupted.sum() < clean.sum()


@pytest.mark.parametrize(("eight_bit", "right"), [(True, 0), (False, 2)])
def test_rounding_to_eight_bits_is_an_option(eight_bit, right):
    # Five rows of 127.55 / 255 and three of 127.2 / 255: their mean is below one half, class 0;
    # eight bits make them 128 and 127, whose mean is above.
    images = np.full((2, 8, 8, 3), 127.55 / 255, np.float32)
    images[:, 5:] = 127.2 / 255
    found = in_turn.score_in_turn(
        Brightness(), _batches(images, np.zeros(2, int)), {"none": Brighten(0.0)}, key=KEY,
        parallel=ONE, batch_size=2, eight_bit=eight_bit,
    )["none"]  # fmt: skip
    assert found.counts.clean_correct == 2 and found.counts.robust_correct == right


def test_a_randomized_model_is_asked_once_for_each_image_by_its_place():
    images, labels = np.zeros((30, 8, 8, 3), np.float32), np.zeros(30, int)
    results = [
        in_turn.score_in_turn(
            Coin(jax.random.key(7)), _batches(images, labels), {"none": Brighten(0.0)}, key=KEY,
            parallel=ONE, batch_size=size,
        )["none"]
        for size in (30, 8)
    ]  # fmt: skip
    tosses = results[0].clean_correct
    assert 5 < tosses.sum() < 25  # not one toss for all
    np.testing.assert_array_equal(tosses, results[1].clean_correct)
    np.testing.assert_array_equal(results[0].robust_correct, results[1].robust_correct)


@pytest.mark.parametrize("search", [False, True])
def test_members_that_do_nothing_change_nothing_for_a_randomized_model(search):
    images, labels = np.zeros((30, 8, 8, 3), np.float32), np.zeros(30, int)
    nothing = Square(threats.Linf(0.0), num_queries=1) if search else Brighten(0.0)
    found = in_turn.score_in_turn(
        Coin(jax.random.key(7)), _batches(images, labels), {"none": [nothing] * 4}, key=KEY,
        parallel=ONE, batch_size=30,
    )["none"]  # fmt: skip
    assert 5 < found.clean_correct.sum() < 25
    np.testing.assert_array_equal(found.robust_correct, found.clean_correct)


def test_score_and_score_in_turn_ask_a_randomized_model_the_same():
    batches = _batches(np.zeros((30, 8, 8, 3), np.float32), np.zeros(30, int))
    shared = {"key": KEY, "parallel": ONE}
    coin, attacks = Coin(jax.random.key(7)), {"none": Brighten(0.0)}
    one = metrics.score(coin, batches, attacks, **shared)["none"]
    other = in_turn.score_in_turn(coin, batches, attacks, batch_size=8, **shared)["none"]
    np.testing.assert_array_equal(one.clean_correct, other.clean_correct)
    np.testing.assert_array_equal(one.robust_correct, one.clean_correct)
    assert not one.flipped.any()


def test_a_threat_that_makes_no_sense_is_refused_before_anything_is_attacked():
    batches, shared = _batches(*_split(4)), {"key": KEY, "parallel": ONE, "batch_size": 4}
    for threat, words in [
        (threats.Patch(0.0), "share of the image"),
        (threats.Patch(1e-3), "no pixel in an image of 8x8"),
        (threats.Linf(jnp.float32(8)), "epsilon must lie"),
        (threats.L2(14.0), r"at most 13.86 for \(8, 8, 3\)"),
    ]:
        attacks = {"run": Brighten(float("nan")), "later": [PGD(threats.Patch(0.1)), PGD(threat)]}
        with pytest.raises(ValueError, match=words):
            in_turn.score_in_turn(_mlp(), batches, attacks, **shared)
        with pytest.raises(ValueError, match=words):
            alive = np.ones(4, bool)
            in_turn.strike(_mlp(), in_turn.gathered(batches), PGD(threat), alive, **shared)


def test_it_says_what_is_wrong():
    batches = _batches(*_split(4))
    shared = {"key": KEY, "parallel": ONE, "batch_size": 4}
    with pytest.raises(ValueError, match="at least one attack"):
        in_turn.score_in_turn(_mlp(), batches, {}, **shared)
    with pytest.raises(ValueError, match="empty list"):
        in_turn.score_in_turn(_mlp(), batches, {"none": []}, **shared)
    with pytest.raises(ValueError, match="'worst'"):
        in_turn.score_in_turn(_mlp(), batches, {"worst": Brighten(0.1)}, **shared)
    with pytest.raises(ValueError, match="split is empty"):
        in_turn.score_in_turn(_mlp(), [], {"one": Brighten(0.1)}, **shared)
    with pytest.raises(ValueError, match=r"Brighten made pixels.*images \[1, 2, 3\]"):
        in_turn.score_in_turn(_mlp(), batches, {"one": Brighten(float("nan"))}, **shared)
    with pytest.raises(ValueError, match=r"alive must be bool \(4,\)"):
        in_turn.strike(_mlp(), in_turn.gathered(batches), Brighten(0.1), np.ones(4), **shared)


@struct.dataclass
class Levels:
    """An attack that returns the levels of a file, and can be interrupted."""

    threat: object
    restarts = 1
    num_queries = 4

    def start(self, key, model, image, label):
        start = Square(threats.Linf(0.1), num_queries=4).start(key, model, image, label)
        return start.replace(best=jnp.round(255 * image).astype(jnp.uint8))

    def search(self, key, model, image, label, state, until):
        return state

    def __call__(self, key, model, image, label=None):
        return jnp.round(255 * image).astype(jnp.uint8)


@struct.dataclass
class WholeLevels:
    threat: object

    def __call__(self, key, model, image, label=None):
        return jnp.round(255 * image).astype(jnp.uint8)


@pytest.mark.parametrize("attack", [Levels, WholeLevels])
def test_what_is_no_image_is_not_scored(attack):
    shared = {"key": KEY, "parallel": ONE, "batch_size": 4}
    attack = {"levels": attack(threats.Linf(0.1))}
    with pytest.raises(TypeError, match=r"Levels must return.*and returned uint8 \[8, 8, 3\]"):
        in_turn.score_in_turn(_mlp(), _batches(*_split(4)), attack, **shared)
