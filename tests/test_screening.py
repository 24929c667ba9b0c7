"""Detectors by closed forms, their figures by scikit-learn's, and attacks that know them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import frequencies, screening, struct
from robust_ssl.conformance import check
from robust_ssl.conformance.laws import small_model
from robust_ssl.parallel import Parallel
from robust_ssl.screening import statistics, verdict
from robust_ssl.screening.detector import divergence
from robust_ssl.screening.squeeze import median
from robust_ssl.screening.template import ROUNDING, fit_whitening
from robust_ssl.threats import Linf
from robust_ssl.types import Outputs

SIZE = 8
KINDS = ("template", "squeeze", "neighbors", "spectrum", "disagreement")


def pixels(n, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 0.8, (n, SIZE, SIZE, 3)).astype(np.float32)


def textures(n, seed=0):
    """Images with less energy at high frequencies, but some, uint8."""
    noise = pixels(n, seed)
    mixed = 0.75 * frequencies.low_pass(noise, cutoff=0.3) + 0.25 * noise
    return np.asarray(255 * mixed).round().astype("u1")


# --- Figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_the_area_is_that_of_scikit_learn(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    clean, attacked = random.normal(size=70), random.normal(0.7, 1.0, 40)
    if ties:
        clean, attacked = clean.round(), attacked.round()
    truth = np.r_[np.zeros(70), np.ones(40)]
    expected = metrics.roc_auc_score(truth, np.r_[clean, attacked])
    assert statistics.auc(clean, attacked) == pytest.approx(expected, abs=1e-12)


def test_the_area_of_two_normal_distributions_is_the_closed_form():
    random = np.random.default_rng(1)
    area = statistics.auc(random.normal(size=20_000), random.normal(1.0, 1.0, 20_000))
    assert area == pytest.approx(0.76025, abs=5e-3)  # Phi(1 / sqrt(2))


def test_the_interval_of_an_area_holds_it_95_times_of_100():
    random = np.random.default_rng(2)
    holds = []
    for _ in range(400):
        area = statistics.auc(random.normal(size=50), random.normal(1.0, 1.0, 30))
        low, high = statistics.auc_interval(area, 50, 30)
        holds.append(low <= 0.76025 <= high)
    assert 0.92 <= np.mean(holds) <= 0.99


@pytest.mark.parametrize("area", [0.0, 1.0])
def test_a_perfect_area_has_an_interval_of_some_width(area):
    low, high = statistics.auc_interval(area, 20, 20)
    assert 0 <= low <= area <= high <= 1
    assert 0.01 < high - low < 0.3


@pytest.mark.parametrize(("n", "rate"), [(100, 0.01), (100, 0.05), (37, 0.05), (5, 0.01)])
def test_a_threshold_keeps_the_rate_of_false_alarms_on_its_own_images(n, rate):
    scores = np.random.default_rng(n).normal(size=n)
    above = scores > statistics.threshold(scores, rate)
    assert above.mean() <= rate
    assert above.sum() == int(rate * n)


def test_equal_scores_raise_no_alarm():
    assert statistics.alarms(np.zeros(50), np.zeros(50))["at_5_percent"]["share"] == 0


# --- Detectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_keeps_the_laws_of_detectors(kind):
    check("detector", f"robust_ssl.screening:fit_{kind}")


@struct.dataclass
class Sloppy:
    """A detector that breaks one law."""

    how: str = struct.field(pytree_node=False)

    def score(self, key, model, image):
        if self.how == "vector":
            return image[0, 0]
        if self.how == "constant":
            return jnp.zeros(())
        if self.how == "nan":
            return jnp.log(image.mean())
        return jnp.sqrt(jnp.ptp(image))  # a slope without end where all pixels are equal


@pytest.mark.parametrize(
    ("how", "law"),
    [
        ("vector", "must return a scalar"),
        ("constant", "same for all images"),
        ("nan", "not finite"),
        ("slope", "gradient that is not finite"),
    ],
)
def test_a_broken_detector_is_named(how, law):
    with pytest.raises(AssertionError, match=f"Sloppy.*{law}"):
        check("detector", Sloppy(how))


def test_whitening_is_that_of_numpy_in_float64():
    images = pixels(50)
    _, whiten = fit_whitening(images, ring_images=0)
    waves = np.asarray(frequencies.transform(jnp.asarray(images)), np.float64)
    for place in ((0, 1), (3, 5), (4, 4)):
        covariance = np.cov(waves[:, *place].T, bias=True) + ROUNDING * np.eye(3)
        product = whiten[place] @ covariance @ whiten[place].T
        np.testing.assert_allclose(product, np.eye(3), atol=1e-8)


def test_spectrum_is_the_mahalanobis_distance_of_numpy():
    images = jnp.asarray(pixels(200))
    detector = screening.fit_spectrum(None, None, images, None, num_bands=3)
    energies = _energies(np.asarray(images, np.float64), np.asarray(detector.bands))
    covariance = np.cov(energies.T, bias=True)
    centered = energies - energies.mean(axis=0)
    expected = np.einsum("ni,ij,nj->n", centered, np.linalg.inv(covariance), centered)
    scores = [float(detector.score(None, None, image)) for image in images[:5]]
    np.testing.assert_allclose(scores, expected[:5] / energies.shape[1], rtol=2e-2)


def _energies(images, bands):
    spectrum = np.abs(np.fft.fft2(images, axes=(1, 2), norm="ortho"))
    gray = np.abs(np.fft.fft2(images.sum(-1) / np.sqrt(3), norm="ortho")) ** 2
    color = (spectrum**2).sum(axis=-1) - gray
    both = np.stack([gray, color], axis=1)
    sums = np.einsum("nkyx,byx->nkb", both, bands) / bands.sum(axis=(1, 2))
    return np.log(sums + ROUNDING).reshape(len(images), -1)


def test_a_matched_filter_has_mean_0_and_deviation_1_on_clean_images():
    images = pixels(400)
    change = np.random.default_rng(1).choice([-0.05, 0.05], (1, SIZE, SIZE, 3))
    known = screening.Known(jnp.asarray(change, jnp.float32), ("noise",))
    detector = screening.fit_template(None, None, jnp.asarray(images), known)
    others = [float(detector.score(None, None, image)) for image in jnp.asarray(pixels(200, 9))]
    assert abs(np.mean(others)) < 0.3
    assert np.std(others) == pytest.approx(1.0, abs=0.25)


def test_an_attack_left_out_is_not_looked_for():
    changes = jnp.asarray(np.random.default_rng(1).choice([-0.1, 0.1], (3, SIZE, SIZE, 3)))
    known = screening.Known(changes.astype(jnp.float32), ("a", "a", "b"))
    detector = screening.fit_template(None, None, jnp.asarray(pixels(64)), known)
    image = jnp.full((SIZE, SIZE, 3), 0.5) + changes[1]
    assert detector.score(None, None, image) > 5 * detector.without("a").score(None, None, image)
    nothing = detector.without("a").without("b")
    assert nothing.score(None, None, image) == 0


def test_the_median_is_that_of_numpy():
    image = pixels(1)[0]
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))
    np.testing.assert_array_equal(median(jnp.asarray(image)), np.median(windows, axis=(-2, -1)))


def test_the_divergence_is_zero_at_equality_and_that_of_scipy_elsewhere():
    logits = np.random.default_rng(0).normal(size=(2, 4))
    first, second = (Outputs(jnp.zeros(2), jnp.asarray(row, jnp.float32)) for row in logits)
    p, q = (np.exp(row) / np.exp(row).sum() for row in logits)
    expected = (p * np.log(p / q)).sum() + (q * np.log(q / p)).sum()
    assert divergence(first, first) == 0
    assert float(divergence(first, second)) == pytest.approx(expected, rel=1e-5)


def test_a_disagreement_needs_two_classifiers_of_the_same_classes():
    random = np.random.default_rng(0)
    model, images = small_model(random, SIZE), jnp.asarray(pixels(2))
    known = screening.Known.of({}, images)
    with pytest.raises(ValueError, match="no second classifier"):
        screening.fit_disagreement(None, model, images, known)
    other = model.replace(head=model.head[:, :3])
    with pytest.raises(ValueError, match="same classes"):
        screening.fit_disagreement(None, model, images, known.replace(public=other))


# --- Evaluation ---------------------------------------------------------------------------------


def test_a_surprise_keeps_the_order_and_goes_on_beyond_all_clean_scores():
    clean = np.random.default_rng(0).normal(size=500)
    surprise = screening.Surprise.fit(clean)
    nats = np.asarray(surprise(jnp.linspace(clean.min(), 50.0, 200)))
    assert (np.diff(nats) > 0).all()
    assert surprise(np.median(clean)) == pytest.approx(np.log(2), abs=1e-2)


def test_a_score_that_many_clean_images_share_surprises_as_little_as_its_share():
    constant = screening.Surprise.fit(np.zeros(100))
    assert float(constant(0.0)) == 0.0 and float(constant(1.0)) > 100
    mostly = screening.Surprise.fit(np.r_[np.zeros(97), 0.5, 0.6, 0.7])
    assert float(mostly(0.0)) == 0.0 and float(mostly(0.4)) >= np.log(20)
    half = screening.Surprise.fit(np.r_[np.zeros(50), np.linspace(1.0, 2.0, 50)])
    nats = [float(half(score)) for score in (-1.0, 0.0, 1.0, 1.5, 2.0)]
    assert nats == sorted(nats) and nats[:2] == [0.0, 0.0]
    np.testing.assert_allclose(nats[2:4], [np.log(2), np.log(4)], atol=0.1)


def test_a_detector_without_spread_has_a_finite_surprise():
    surprise = screening.Surprise.fit(np.zeros(10))
    assert surprise(0.0) == pytest.approx(0.0, abs=3.0)
    assert np.isfinite(surprise(1.0))
    assert surprise(1.0) > surprise(0.0)


def bench(keep=None, n=64):
    random = np.random.default_rng(0)
    model = small_model(random, SIZE)
    clean = textures(n, 3)
    labels = np.asarray(jnp.argmax(model(jnp.asarray(clean / 255.0, jnp.float32)).logits, axis=-1))
    images = screening.Images(
        textures(64), textures(n, 2), clean, labels.astype("i4"), textures(n, 4)
    )
    options = {} if keep is None else {"keep": keep}
    layout = Parallel.create(num_devices=1)
    return screening.Bench(model, images, jax.random.key(0), layout, 64, **options)


@struct.dataclass
class Checkerboard:
    """Adds the finest pattern there is; the model is not asked."""

    threat: Linf

    def __call__(self, key, model, image, label=None):
        y, x = jnp.mgrid[:SIZE, :SIZE]
        board = self.threat.epsilon * (1.0 - 2.0 * ((x + y) % 2))
        return self.threat.project(image + board.reshape(SIZE, SIZE, 1), image)


@pytest.fixture(scope="module")
def evaluated():
    parts = {}

    def keep(name, compute):
        parts[name] = compute()
        return parts[name]

    tried = bench(keep)
    images = jnp.asarray(tried.images.fit / 255.0, jnp.float32)
    detectors = {"spectrum": screening.fit_spectrum(None, None, images, None, num_bands=4)}
    cases = [screening.Case("board", Checkerboard(Linf(0.05)), {"seed": None, "epsilon": 0.05})]
    settings = screening.Adaptive(0.2, images=64, num_steps=10, cutoffs=(1.0,), universal_steps=2)
    return screening.evaluate(detectors, tried, cases, settings), parts, tried, cases, settings


def test_what_is_easily_seen_is_found_and_shift_is_told_apart(evaluated):
    evaluation, *_ = evaluated
    spectrum, fused = evaluation.entries
    assert (spectrum["detector"], fused["detector"]) == ("spectrum", "fused")
    [board] = spectrum["attacks"]
    assert board["auc"] > 0.99
    assert board["at_5_percent"]["share"] > 0.95
    assert spectrum["clean"]["at_5_percent"]["share"] < 0.2
    assert 0.3 < spectrum["shifted"]["auc"] < 0.7  # of the same distribution here


def test_of_one_member_the_fusion_is_the_member(evaluated):
    evaluation, *_ = evaluated
    spectrum, fused = evaluation.entries
    assert fused["attacks"][0]["at_1_percent"] == spectrum["attacks"][0]["at_1_percent"]


def test_the_adaptive_attack_passes_what_it_knows(evaluated):
    evaluation, *_ = evaluated
    per_image, universal = evaluation.entries[0]["adaptive"]
    assert per_image["verdict"] == "defeated"
    assert evaluation.entries[0]["verdict"] == "defeated"
    assert per_image["undetected_success"]["share"] > 0.8
    assert per_image["at_5_percent"]["share"] < evaluation.entries[0]["attacks"][0]["auc"]
    assert universal["family"] == "universal"


def test_parts_are_as_many_as_announced_and_give_the_same_again(evaluated):
    evaluation, parts, _, cases, settings = evaluated
    assert len(parts) == screening.parts_of(1, 1, settings)
    detectors = {"spectrum": evaluation.fused.members["spectrum"].detector}
    again = bench(lambda name, compute: parts[name])
    assert screening.evaluate(detectors, again, cases, settings).entries == evaluation.entries


def test_without_an_adaptive_attack_nothing_is_said_to_withstand():
    tried = bench(n=8)
    images = jnp.asarray(tried.images.fit / 255.0, jnp.float32)
    detectors = {"spectrum": screening.fit_spectrum(None, None, images, None)}
    entries = screening.evaluate(detectors, tried, []).entries
    assert {entry["verdict"] for entry in entries} == {"not tried"}


def test_a_template_is_scored_on_an_attack_without_knowing_it():
    tried = bench(n=16)
    images = jnp.asarray(tried.images.fit / 255.0, jnp.float32)
    board = Checkerboard(Linf(0.05))
    moved = types.SimpleNamespace(apply=jax.vmap(lambda x: board(None, None, x)))
    known = screening.Known.of({"board": [moved]}, images)
    detectors = {"template": screening.fit_template(None, None, images, known)}
    cases = [screening.Case(name, board, {}) for name in ("board", "unknown")]
    own, other = screening.evaluate(detectors, tried, cases).entries[0]["attacks"]
    assert (own["left_out"], other["left_out"]) == (True, False)
    assert own["auc"] == 0.5
    assert other["auc"] > 0.99


def test_few_successes_of_the_plain_attack_decide_nothing():
    yes, no = np.ones(9, bool), np.zeros(9, bool)
    assert verdict.judge(yes, yes, no, yes)["verdict"] == "not decidable"


def test_a_score_that_is_not_finite_is_refused():
    tried = bench(n=4)
    with pytest.raises(ValueError, match=r"Sloppy: the score of image\(s\) \[0\]"):
        tried.scores(Sloppy("nan"), np.zeros((1, SIZE, SIZE, 3), np.uint8))
