"""Laws of the analysis: layers, frequencies, filters, transfer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import frequencies, models, struct, threats
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.evaluation import analysis
from robust_ssl.evaluation.analysis import (
    EDGES,
    FourierMap,
    energy_by_band,
    filtered,
    filtering,
    filtering_curves,
    fourier_sensitivity,
    harm_by_band,
    linear_cka,
    most_harmful_band,
    per_layer_stability,
    sensitivity_by_tap,
    transfer_matrix,
)
from robust_ssl.parallel import Parallel
from robust_ssl.types import Outputs

KEY = jax.random.key(0)
ONE = Parallel.create(num_devices=1)


@struct.dataclass
class Pixels:
    """Its features are the pixels, its logits whether a pixel and its neighbour differ."""

    def __call__(self, images):
        stripes = jnp.abs(images[:, :, 1:] - images[:, :, :-1]).mean((1, 2, 3))
        logits = jnp.stack([jnp.full_like(stripes, 0.05), stripes], axis=1)
        return Outputs(features=images.reshape(len(images), -1), logits=logits)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# --- Layers -------------------------------------------------------------------------------------


def cka_of_grams(x, y):
    """By the definition, in float64: centered Gram matrices."""
    n = len(x)
    center = np.eye(n) - 1 / n
    k, m = (center @ (a @ a.T) @ center for a in (x, y))
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


@pytest.mark.parametrize("dims", [(3, 4), (20, 30), (3, 30), (12, 12)])  # both forms, n = 12
def test_cka_is_its_definition_in_both_forms(dims):
    x = random((12, dims[0])) + 3
    y = 100 * (random((12, dims[1]), 1) + x[:, :1])
    measured = linear_cka(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    assert float(measured) == pytest.approx(cka_of_grams(x, y), abs=1e-5)


def test_the_two_forms_of_cka_agree():
    x, y = (jnp.asarray(random((12, 6), seed), jnp.float32) for seed in (0, 1))
    padded = jnp.pad(y, ((0, 0), (0, 20)))  # zeros change nothing, but the other form is cheaper
    assert float(linear_cka(x, y)) == pytest.approx(float(linear_cka(x, padded)), abs=1e-6)


def test_cka_does_not_see_rotation_scale_or_a_common_shift():
    x = random((10, 4))
    rotation = np.linalg.qr(random((4, 4), 2))[0]
    moved = jnp.asarray(7e8 * (x @ rotation + 2), jnp.float32)
    assert float(linear_cka(jnp.asarray(x, jnp.float32), moved)) == pytest.approx(1.0, abs=1e-5)


def test_cka_where_nothing_varies_is_a_number():
    constant, varies = jnp.full((5, 3), 0.1), jnp.asarray(random((5, 3)), jnp.float32)
    assert float(linear_cka(constant, 2 * constant)) == 1.0
    assert float(linear_cka(constant, varies)) == 0.0
    assert float(linear_cka(varies[:1], varies[1:2])) == 1.0  # one image has no relations
    with pytest.raises(AssertionError):
        linear_cka(varies, varies[:4])


def test_stability_is_one_and_zero_where_nothing_moved_and_keeps_the_order():
    encoder = models.resnet18(KEY, width=8, image_size=8)
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    still = per_layer_stability(encoder, images, images)
    assert next(iter(still)) == "stem"
    assert list(still)[-2:] == ["stage4/block2", "features"]
    for numbers in still.values():
        expected = {"cosine": 1.0, "cka": 1.0, "relative_drift": 0.0}
        assert numbers == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        per_layer_stability(encoder, images, images[:1])


def test_stability_has_its_closed_form_and_is_never_nan():
    image = jnp.zeros((1, 1, 2, 3)).at[0, 0, 0, 0].set(0.5)
    turned = jnp.zeros((1, 1, 2, 3)).at[0, 0, 0, 1].set(0.5)
    zero = jnp.zeros((1, 1, 2, 3))

    def features(clean, adversarial):
        return per_layer_stability(Pixels(), clean, adversarial)["features"]

    expected = {"cosine": 0.0, "cka": 1.0, "relative_drift": np.sqrt(2)}
    assert features(image, turned) == pytest.approx(expected)
    expected = {"cosine": 1.0, "cka": 1.0, "relative_drift": 0.5}
    assert features(image, image / 2) == pytest.approx(expected)
    assert features(zero, zero) == {"cosine": 1.0, "cka": 1.0, "relative_drift": 0.0}
    assert features(zero, image)["cosine"] == 0.0


def test_stability_is_a_float64_rederivation():
    clean, delta = np.abs(random((6, 2, 2, 3))) / 8, random((2, 2, 3), 3) / 50
    attacked = clean + delta
    found = per_layer_stability(Pixels(), jnp.float32(clean), jnp.float32(attacked))["features"]
    x, y = clean.reshape(6, -1), attacked.reshape(6, -1)
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    assert found["cosine"] == pytest.approx(np.mean((x * y).sum(1) / norms[0] / norms[1]), abs=1e-5)
    assert found["relative_drift"] == pytest.approx(
        np.mean(np.linalg.norm(y - x, axis=1) / norms[0]), abs=1e-5
    )
    assert found["cka"] == pytest.approx(1.0, abs=1e-5)  # one shift for all images


def test_a_plain_function_is_a_model_too():
    images = jnp.linspace(0, 1, 24).reshape(2, 2, 2, 3)
    weights = jnp.float32(2.0)

    def foreign(images):
        return Outputs(features=weights * images.reshape(len(images), -1))

    found = per_layer_stability(foreign, images, images / 2)
    assert found["features"]["relative_drift"] == pytest.approx(0.5)
    mapped = fourier_sensitivity(foreign, images, key=KEY, norm=0.1)
    assert mapped.measure == "feature_drift" and np.isfinite(mapped.harm).all()


def test_a_tap_is_as_sensitive_as_its_worst_kernel():
    scores = {
        "encoder/block1/mlp/kernel": 0.2,
        "encoder/block1/attention/kernel": 0.7,
        "encoder/block10/mlp/kernel": 0.9,
        "encoder/other/kernel": 5.0,
        "head/output/kernel": 0.1,
    }
    found = sensitivity_by_tap(scores, ["embed", "block1", "block10"])
    assert found == {"block1": 0.7, "block10": 0.9, "head": 0.1}
    assert list(found) == ["block1", "block10", "head"]


# --- Frequencies --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8, 3), (7, 6, 3), (2, 5, 9, 3)])
def test_bands_add_up_to_the_whole_energy(shape):
    delta = random(shape)
    found = np.asarray(energy_by_band(jnp.asarray(delta, jnp.float32)))
    assert found.shape == (*shape[:-3], len(EDGES) - 1)
    np.testing.assert_allclose(found.sum(-1), np.sum(delta**2, axis=(-3, -2, -1)), rtol=1e-5)


def test_the_energy_of_a_band_is_that_of_the_whole_plane_and_of_the_filtered_image():
    delta, edges = random((9, 8, 3)), (0.1, 0.3, 0.55)  # these leave something out
    radius = np.hypot(np.fft.fftfreq(9)[:, None], np.fft.fftfreq(8)[None])
    power = np.sum(np.abs(np.fft.fft2(delta, axes=(0, 1))) ** 2, axis=2) / 72
    found = np.asarray(energy_by_band(jnp.asarray(delta, jnp.float32), edges))
    for energy, low, high in zip(found, edges, edges[1:], strict=False):
        assert energy == pytest.approx(power[(radius >= low) & (radius < high)].sum(), rel=1e-5)
        kept = frequencies.band_pass(jnp.asarray(delta, jnp.float32), low, high)
        assert energy == pytest.approx(float(jnp.sum(kept**2)), rel=1e-4)
    for wrong in ((0.1,), (0.2, 0.1), (-0.1, 0.2), (0.1, 0.1)):
        with pytest.raises(ValueError, match="rising"):
            energy_by_band(jnp.zeros((4, 4, 3)), wrong)


def test_every_frequency_is_measured_once_and_shown_twice():
    mapped = fourier_sensitivity(Pixels(), np.full((2, 6, 5, 3), 0.5), key=KEY, norm=0.2, chunk=7)
    assert mapped.harm.shape == (6, 5)
    np.testing.assert_allclose(mapped.vertical * 6, np.arange(-3, 3))
    np.testing.assert_allclose(mapped.horizontal * 5, np.arange(-2, 3))
    np.testing.assert_array_equal(mapped.harm[1:], mapped.harm[1:][::-1, ::-1])
    np.testing.assert_array_equal(mapped.harm[0], mapped.harm[0, ::-1])  # -3 is its own mirror
    # Features are pixels and nothing is cut off, so the drift is the noise over the image.
    drift = 0.2 * np.sqrt(3) / (0.5 * np.sqrt(6 * 5 * 3))
    np.testing.assert_allclose(mapped.harm, drift, rtol=1e-5)
    assert mapped.clean == 0.0


def test_each_wave_has_one_frequency_and_its_mirror():
    seen = []

    def spy(images):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
        return Outputs(features=images.reshape(len(images), -1))

    calls = []
    image = np.full((1, 4, 4, 3), 0.5, np.float32)
    fourier_sensitivity(
        spy, image, key=KEY, norm=0.3, chunk=1, on_chunk=lambda *done: calls.append(done)
    )
    jax.effects_barrier()
    assert calls == [(done, 10) for done in range(1, 11)]  # 4 * 4 / 2 + 2
    noises = [s.reshape(4, 4, 3) - 0.5 for s in seen[1:]]
    spectra = {tuple(map(tuple, np.argwhere(_power(noise) > 1e-3))) for noise in noises}
    assert len(spectra) == 10
    for noise in noises:
        np.testing.assert_allclose(np.linalg.norm(noise, axis=(0, 1)), 0.3, rtol=1e-5)
        assert 1 <= np.sum(_power(noise) > 1e-3) <= 2
        assert np.abs(np.abs(noise) - np.abs(noise[..., :1])).max() < 1e-6  # up to the sign


def _power(noise):
    return np.abs(np.fft.fft2(noise[..., 0]))


def test_a_map_depends_neither_on_chunks_nor_on_devices_nor_on_the_stride():
    encoder = models.resnet18(KEY, width=8, image_size=8)
    classifier = models.classifier(KEY, encoder, 3, head="linear")
    images = np.random.default_rng(0).uniform(size=(5, 8, 8, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1])
    options = {"key": KEY, "norm": 1.0}
    coarse = fourier_sensitivity(classifier, images, labels, stride=2, chunk=5, **options)
    two = Parallel.create(num_devices=2)
    other = fourier_sensitivity(
        classifier, images, labels, stride=4, chunk=3, parallel=two, **options
    )
    assert coarse.harm.shape == (4, 4) and other.harm.shape == (2, 2)
    np.testing.assert_array_equal(coarse.harm[::2, ::2], other.harm)
    answers = np.argmax(np.asarray(classifier(images).logits), axis=1)
    assert coarse.clean == other.clean == np.mean(answers != labels)
    assert coarse.measure == "error_rate"
    drift = fourier_sensitivity(encoder, images, stride=4, **options)
    assert drift.measure == "feature_drift" and (drift.harm > 0).all()


def test_a_model_that_looks_at_fine_stripes_is_hurt_there_most():
    images, labels = np.full((3, 16, 16, 3), 0.5, np.float32), np.zeros(3, int)
    mapped = fourier_sensitivity(Pixels(), images, labels, key=KEY, norm=0.8)
    assert mapped.clean == 0.0
    # Pixel and neighbour differ by 2 * amplitude at horizontal frequency 0.5, by nothing at 0.
    middle = len(mapped.horizontal) // 2
    assert mapped.harm[:, middle].max() == 0.0 and mapped.harm[:, 0].min() == 1.0
    band = most_harmful_band(mapped)
    assert band.low >= 0.25 and band.harm == np.nanmax(harm_by_band(mapped))


def test_bands_of_a_map_are_means_and_empty_ones_do_not_count():
    cycles = np.array([-0.5, -0.25, 0.0, 0.25])
    harm = np.arange(16.0).reshape(4, 4)
    mapped = FourierMap(cycles, cycles, harm, 0.0, "error_rate", 1.0)
    found = harm_by_band(mapped, (0.0, 0.1, 0.2, 0.3, 0.71))
    inner = [harm[2, 1], harm[2, 3], harm[1, 2], harm[3, 2]]
    rest = [harm[i, j] for i in range(4) for j in range(4) if np.hypot(cycles[i], cycles[j]) > 0.3]
    np.testing.assert_allclose(found, [harm[2, 2], np.nan, np.mean(inner), np.mean(rest)])
    assert most_harmful_band(mapped, (0.0, 0.1, 0.2, 0.3, 0.71)).low == 0.0  # 10, 10 and less
    with pytest.raises(ValueError, match="no frequency"):
        most_harmful_band(mapped, (0.1, 0.2))


@pytest.mark.parametrize(
    "wrong", [{"norm": 0.0}, {"norm": np.nan}, {"norm": np.inf}, {"stride": 0}, {"chunk": 0}]
)
def test_an_impossible_map_is_refused(wrong):
    with pytest.raises(ValueError, match="positive"):
        fourier_sensitivity(Pixels(), np.zeros((1, 4, 4, 3)), key=KEY, **wrong)
    for labels in (np.zeros(2, int), np.zeros((1, 1), int), np.zeros((1, 10), int), np.zeros(1)):
        with pytest.raises(ValueError, match=r"labels must be integers \[1\], one for each image"):
            fourier_sensitivity(Pixels(), np.zeros((1, 4, 4, 3)), labels, key=KEY)


# --- Filters ------------------------------------------------------------------------------------


def perturbation(size=8, threat=None, seed=0):
    threat = threat or threats.Linf(jnp.float32(0.1))
    delta = jnp.asarray(np.sign(random((size, size, 3), seed)) / 10, jnp.float32)
    return UniversalPerturbation(delta, threat)


def test_a_filtered_perturbation_is_applied_as_it_was_filtered():
    """A high-pass overshoots the budget: cut off there, low frequencies would be back."""
    whole = perturbation(32)
    rest = filtering._inside_budget(filtered(whole, "high_pass", 0.125))
    assert float(jnp.abs(filtered(whole, "high_pass", 0.125).delta).max()) > 0.11
    gray = jnp.full((1, 32, 32, 3), 0.5)
    applied = whole.replace(delta=rest.apply(gray)[0] - 0.5)
    low, all_of_it = (filtered(applied, "low_pass", 0.125).delta, applied.delta)
    assert float(jnp.sum(low**2)) < 1e-6 * float(jnp.sum(all_of_it**2))
    np.testing.assert_allclose(jnp.abs(rest.delta).max(), 0.1, rtol=1e-5)


def test_low_and_high_pass_are_two_halves_of_the_whole():
    whole = perturbation()
    parts = [filtered(whole, name, 0.2).delta for name in ("low_pass", "high_pass")]
    np.testing.assert_allclose(sum(parts), whole.delta, atol=1e-6)


@pytest.mark.parametrize("threat", [threats.Linf(0.1), threats.L2(2.0)])
def test_what_is_left_can_be_brought_to_the_size_of_the_whole(threat):
    whole = perturbation(threat=threat)
    order = 2 if isinstance(threat, threats.L2) else np.inf
    for name in ("low_pass", "high_pass"):
        plain = np.ravel(filtered(whole, name, 0.3).delta)
        scaled = np.ravel(filtered(whole, name, 0.3, rescale=True).delta)
        size = np.linalg.norm(np.ravel(whole.delta), order)
        assert np.linalg.norm(scaled, order) == pytest.approx(size, rel=1e-5)
        np.testing.assert_allclose(scaled * np.linalg.norm(plain, order) / size, plain, atol=1e-6)


def test_nothing_is_left_of_nothing_rescaled_or_not():
    flat = UniversalPerturbation(jnp.full((8, 8, 3), 0.1), threats.Linf(0.1))
    for rescale in (False, True):
        rest = filtered(flat, "high_pass", 0.1, rescale=rescale).delta
        np.testing.assert_allclose(rest, 0.0, atol=1e-6)
        zero = filtered(flat.replace(delta=jnp.zeros((8, 8, 3))), "low_pass", 0.1, rescale=rescale)
        assert np.abs(zero.delta).max() == 0.0


def test_a_filter_that_is_none_is_refused():
    with pytest.raises(ValueError, match="filter must be one of"):
        filtered(perturbation(), "band_pass", 0.1)
    with pytest.raises(ValueError, match="a norm such as Linf; got Patch"):
        filtered(perturbation(threat=threats.Patch(0.25)), "low_pass", 0.1)


def gray_batches(n=4, size=8):
    images = np.full((n, size, size, 3), 0.5, np.float32)
    yield {"images": images, "labels": np.zeros(n, np.int32)}


def test_a_curve_says_which_frequencies_do_the_work():
    stripes = jnp.full((8, 8, 3), -0.1).at[:, ::2].set(0.1)
    attack = UniversalPerturbation(stripes, threats.Linf(jnp.float32(0.1)))
    curves = filtering_curves(Pixels(), gray_batches(), attack, (0.25, 0.6), key=KEY, parallel=ONE)
    share = {
        name: {cutoff: counts.fooling_rate for cutoff, counts in curve.items()}
        for name, curve in curves.items()
    }
    assert share == {
        "whole": {0.0: 1.0},
        "low_pass": {0.25: 0.0, 0.6: 1.0},
        "high_pass": {0.25: 1.0, 0.6: 0.0},
    }
    with pytest.raises(ValueError, match="cutoff"):
        filtering_curves(Pixels(), gray_batches(), attack, (), key=KEY, parallel=ONE)


# --- Transfer -----------------------------------------------------------------------------------


def test_the_matrix_counts_every_pair():
    stripes = jnp.full((8, 8, 3), -0.1).at[:, ::2].set(0.1)
    crafted = {
        "striped": UniversalPerturbation(stripes, threats.Linf(jnp.float32(0.1)), name="a"),
        "flat": UniversalPerturbation(0 * stripes + 0.1, threats.Linf(jnp.float32(0.1)), name="b"),
    }

    def blind(images):
        outputs = Pixels()(images)
        return outputs.replace(logits=jnp.flip(outputs.logits * 0 + jnp.arange(2.0)[None], axis=1))

    found = transfer_matrix(
        crafted,
        {"sees": Pixels(), "blind": blind},
        lambda name: gray_batches(n=3 if name == "sees" else 4),
        key=KEY,
        parallel=ONE,
    )
    assert {i: {j: c.fooling_rate for j, c in row.items()} for i, row in found.items()} == {
        "striped": {"sees": 1.0, "blind": 0.0},
        "flat": {"sees": 0.0, "blind": 0.0},
    }
    assert [found["flat"][j].n for j in ("sees", "blind")] == [3, 4]


def test_another_size_is_resized_only_if_asked():
    crafted, model = {"small": perturbation(size=4)}, {"sees": Pixels()}
    options = {"key": KEY, "parallel": ONE}
    with pytest.raises(ValueError, match=r"crafted on 'small' has size \(4, 4\).*bilinear"):
        transfer_matrix(crafted, model, lambda name: gray_batches(), **options)
    found = transfer_matrix(
        crafted, model, lambda name: gray_batches(), resize="bilinear", **options
    )
    assert found["small"]["sees"].n == 4
    with pytest.raises(ValueError, match="resize must be"):
        transfer_matrix(crafted, model, lambda name: gray_batches(), resize="crop", **options)
    with pytest.raises(ValueError, match="no images"):
        transfer_matrix(crafted, model, lambda name: iter(()), **options)


def test_what_the_module_offers_is_there():
    assert all(callable(getattr(analysis, name)) or name == "EDGES" for name in analysis.__all__)
