"""Patches: values inside a square, nothing outside it, at one place or at random ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import struct, threats
from robust_ssl.attacks import perturbation, universal
from robust_ssl.attacks.generative import AdvEncoderPAT, AdvEncoderPER
from robust_ssl.attacks.per_image import PGD, attack_batch
from robust_ssl.attacks.perturbation import UniversalPerturbation
from robust_ssl.conformance import check_attack
from robust_ssl.parallel import Parallel
from robust_ssl.threats import Patch
from robust_ssl.types import Outputs

SHAPE = (8, 8, 3)
KEY = jax.random.key(0)
QUARTER = Patch(0.25)  # 4x4 of 8x8, at rows and columns 2 to 5
RANDOM = Patch(0.25, "random")


def _square(mask):
    """Returns side, top and left of the True entries, which must be one square."""
    rows, columns = np.nonzero(np.asarray(mask))
    side = rows.max() - rows.min() + 1
    assert len(rows) == side**2 == (columns.max() - columns.min() + 1) ** 2
    return side, rows.min(), columns.min()


def _images(count, seed=0):
    pixels = np.random.default_rng(seed).uniform(0.01, 0.99, (count, *SHAPE))
    return jnp.asarray(pixels, jnp.float32)


# ------------------------------------------------------------------------------------- the threat


def test_the_patch_lies_where_the_released_code_puts_it():
    mask = Patch().mask(64, 64)  # 3 % of 64x64: 11 pixels, ending 14 before the edge
    assert mask.shape == (64, 64, 1) and _square(mask[..., 0]) == (11, 39, 39)


@pytest.mark.parametrize("size", [8, 13, 32, 96])
@pytest.mark.parametrize("area", [0.02, 0.09, 0.25, 0.7, 1.0])
def test_the_side_is_the_largest_that_stays_within_the_area(area, size):
    side, top, left = _square(Patch(area).mask(size, size)[..., 0])
    assert side**2 <= area * size**2 * (1 + 1e-3) < (side + 1) ** 2
    assert top == left >= 0 and top + side <= size


def test_project_is_idempotent_lands_in_the_pixel_range_and_leaves_the_rest_alone():
    image, candidate = _images(2)[0], 3 * jax.random.normal(KEY, SHAPE)
    once = QUARTER.project(candidate, image)
    mask = np.broadcast_to(QUARTER.mask(8, 8), SHAPE)
    np.testing.assert_array_equal(np.asarray(once)[~mask], np.asarray(image)[~mask])
    np.testing.assert_array_equal(
        np.asarray(once)[mask], np.clip(np.asarray(candidate)[mask], 0, 1)
    )
    np.testing.assert_array_equal(QUARTER.project(once, image), once)
    sample = QUARTER.sample(KEY, image)
    np.testing.assert_array_equal(QUARTER.project(sample, image), sample)
    assert np.ptp(np.asarray(sample)[mask]) > 0.8


def test_a_delta_keeps_the_same_laws():
    delta = QUARTER.project_delta(3 * jax.random.normal(KEY, SHAPE))
    np.testing.assert_array_equal(QUARTER.project_delta(delta), delta)
    assert delta.min() == 0 and delta.max() == 1
    assert np.all(np.asarray(delta)[~np.broadcast_to(QUARTER.mask(8, 8), SHAPE)] == 0)
    start = perturbation.random_delta(KEY, SHAPE, QUARTER)
    np.testing.assert_array_equal(perturbation.within_budget(start, QUARTER), start)
    corners = perturbation.delta_of_pattern(jnp.full(SHAPE, -1.0).at[3].set(1.0), QUARTER)
    assert corners[3, 2:6].min() == 1 and corners[4].max() == 0


def test_pixels_of_a_bad_delta_are_cut_and_keep_their_gradient():
    image = _images(1)[0]
    for value, cut in ((7.3, 1.0), (1.1, 1.0), (-0.3, 0.0), (1.0, 1.0), (0.0, 0.0)):
        delta = jnp.full(SHAPE, value)
        moved = QUARTER.apply(delta, image)
        assert moved[3, 3, 0] == cut and moved[0, 0, 0] == image[0, 0, 0]
        gradient = jax.grad(lambda delta: QUARTER.apply(delta, image).sum())(delta)
        np.testing.assert_array_equal(
            gradient, jnp.broadcast_to(QUARTER.mask(8, 8), SHAPE).astype(jnp.float32)
        )


@pytest.mark.parametrize("area", [0.02, 0.25, 0.7, 1.0])
def test_a_random_place_is_inside_reproducible_and_holds_the_whole_patch(area):
    patch, side = Patch(area, "random"), int(Patch(area).place(8, 8)[0])
    delta, image = patch.sample_delta(KEY, SHAPE), jnp.full(SHAPE, -1.0)  # never a patch's pixel
    keys = jax.random.split(jax.random.key(1), 1000)
    moved = jax.jit(jax.vmap(lambda key: patch.apply(delta, image, key)))(keys)
    places, values = set(), np.asarray(delta)[np.asarray(patch.mask(8, 8))[..., 0]]
    for one in np.asarray(moved):
        found, top, left = _square(one[..., 0] >= 0)
        assert found == side
        np.testing.assert_array_equal(one[one[..., 0] >= 0], values)
        places.add((int(top), int(left)))
    assert len(places) == (9 - side) ** 2  # every place, equally likely: 1000 draws find them all
    np.testing.assert_array_equal(moved[7], patch.apply(delta, image, keys[7]))
    np.testing.assert_array_equal(patch.apply(delta, image), Patch(area).apply(delta, image))


def test_one_trace_and_one_vmap_serve_all_areas():
    image, delta = _images(1)[0], jnp.ones(SHAPE)
    areas = jnp.array([0.0, 0.02, 0.25, 1.0])
    moved = jax.jit(jax.vmap(lambda area: Patch(area).apply(delta, image)))(areas)
    counts = np.sum(np.asarray(moved == 1)[..., 0], axis=(1, 2))
    assert counts.tolist() == [0, 1, 16, 64]  # no area is no patch
    np.testing.assert_array_equal(moved[0], image)


@pytest.mark.parametrize(
    ("area", "shape", "words"),
    [
        (0.0, None, "above 0 and at most 1"),
        (-0.1, None, "above 0 and at most 1"),
        (float("nan"), None, "got nan"),
        (3, None, r"0\.03 is 3 %"),
        ([0.03, 2.0], None, "got 2.0"),
        (0.9, (4, 16, 3), "7 pixels wide and larger than the image of 4x16; take at most 0.25"),
        (0.001, SHAPE, "no pixel in an image of 8x8; take at least 0.016"),
    ],
)
def test_an_impossible_area_is_refused_with_advice(area, shape, words):
    with pytest.raises(ValueError, match=words):
        threats.check(Patch(area), shape)
    with pytest.raises(ValueError, match="'fixed' or 'random', got 'anywhere'"):
        Patch(0.1, "anywhere")


# ---------------------------------------------------------------------------------------- attacks


@struct.dataclass
class Linear:
    """One feature, linear in the pixels; the class scores are the feature and its negative."""

    weights: jax.Array  # [8, 8, 3]

    def __call__(self, images):
        score = jnp.sum(images * self.weights[None], axis=(1, 2, 3)).reshape(-1, 1)
        return Outputs(features=score, logits=jnp.concatenate([score, -score], axis=1))


def raise_feature(inputs):
    return jnp.mean(inputs.adversarial.features)


@functools.cache
def _linear():
    return Linear(jnp.asarray(np.random.default_rng(5).normal(size=SHAPE), jnp.float32))


def _fit(attack, *, threat=Patch, budgets=(0.25,), seeds=(0,), devices=1, method="pmap", steps=3):
    keys, budgets = universal.members(seeds, budgets)
    return universal.fit(
        attack,
        _linear(),
        [{"images": np.asarray(_images(8, seed=step))} for step in range(steps)],
        keys=keys,
        epsilons=budgets,
        image_shape=SHAPE,
        parallel=Parallel.create(num_devices=devices, kind=method),
        threat=threat,
    )


PGD_ON_FEATURE = universal.UniversalPGD(step_size=0.3, objective=raise_feature)
PAT = AdvEncoderPAT(learning_rate=5e-3, width=4, noise_vectors=2, form=raise_feature)


def test_a_fitted_patch_is_the_closed_form_optimum_of_a_linear_model_at_every_area():
    fitted = _fit(PGD_ON_FEATURE, budgets=(0.05, 0.25, 1.0), steps=6)
    assert fitted.curve.shape == (6, 3)
    for index, area in enumerate((0.05, 0.25, 1.0)):
        member = fitted.member(index)
        mask = np.asarray(Patch(area).mask(8, 8))
        np.testing.assert_array_equal(member.delta, (np.asarray(_linear().weights) > 0) & mask)
        alone = _fit(PGD_ON_FEATURE, budgets=(area,), steps=6).member(0)
        np.testing.assert_array_equal(alone.delta, member.delta)


def test_a_per_image_patch_reaches_the_same_optimum_and_keeps_the_laws_of_attacks():
    def lower_first_score(inputs):
        return -jnp.mean(inputs.adversarial.logits[:, 0])

    images = _images(3)
    attack = PGD(QUARTER, step_size=0.3, objective=lower_first_score, num_steps=5)
    found = jax.jit(attack_batch)(attack, KEY, _linear(), images)
    best = jnp.where(QUARTER.mask(8, 8)[None], _linear().weights[None] < 0, images)
    np.testing.assert_array_equal(found, best)
    check_attack(attack, model=_linear())


def test_pat_draws_a_patch_between_black_and_white_that_raises_the_objective():
    fitted = _fit(PAT, steps=12)
    delta, mask = np.asarray(fitted.member(0).delta), np.asarray(QUARTER.mask(8, 8))
    assert delta.min() >= 0 and delta.max() <= 1 and np.all(delta[~mask[..., 0]] == 0)
    assert np.ptp(delta[mask[..., 0]]) > 0.1
    assert fitted.curve[-1, 0] > fitted.curve[0, 0] + 0.5
    assert fitted.perturbations.name == "advencoder_pat"
    with pytest.raises(ValueError, match="makes a patch, but the threat is Linf"):
        _fit(PAT, threat=threats.Linf)
    # The perturbation's generator is the same one: with a patch for a threat it makes this patch.
    same = AdvEncoderPER(learning_rate=5e-3, width=4, noise_vectors=2, form=raise_feature)
    np.testing.assert_array_equal(_fit(same, steps=12).member(0).delta, delta)


def test_random_noise_of_a_patch_is_black_and_white():
    delta = np.asarray(_fit(universal.RandomNoise(), steps=1).member(0).delta)
    inside = delta[np.asarray(QUARTER.mask(8, 8))[..., 0]]
    assert set(np.unique(inside)) == {0.0, 1.0} and delta.sum() == inside.sum()


@pytest.mark.parametrize(
    ("attack", "devices", "method"),
    [(PGD_ON_FEATURE, 4, "pmap"), (PGD_ON_FEATURE, 2, "jit"), (PAT, 4, "shard_map")],
)
def test_a_patch_of_random_location_does_not_depend_on_the_devices(attack, devices, method):
    threat = functools.partial(Patch, location="random")
    budgets = (0.05, 0.25)
    one = _fit(attack, threat=threat, budgets=budgets)
    several = _fit(attack, threat=threat, budgets=budgets, devices=devices, method=method)
    np.testing.assert_allclose(several.curve, one.curve, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(several.perturbations.delta, one.perturbations.delta, atol=1e-5)
    fixed = _fit(attack, budgets=budgets)
    assert not np.allclose(fixed.curve, one.curve, atol=1e-3)
    assert one.perturbations.threat.key is None  # the key is a step's, not the result's


def test_each_image_and_each_step_has_a_place_of_its_own_and_of_its_seed():
    images = jnp.full((4, *SHAPE), -1.0)

    def places(seed, step):
        threat = perturbation.at_step(Patch(0.02, "random"), jax.random.key(seed), jnp.int32(step))
        moved = perturbation.attacked_images(jnp.ones(SHAPE), images, threat)
        return tuple(_square(one[..., 0] >= 0)[1:] for one in np.asarray(moved))

    drawn = [places(0, 0), places(0, 1), places(1, 0)]
    assert len(set(drawn)) == 3 and all(len(set(batch)) > 1 for batch in drawn)
    assert places(0, 1) == drawn[1]


def test_another_area_does_not_compile_again():
    parallel = Parallel.create(num_devices=2, kind="jit")
    _fit(PGD_ON_FEATURE, devices=2, method="jit", steps=2)
    before = universal._fit_step(parallel)._cache_size()
    _fit(PGD_ON_FEATURE, budgets=(0.09,), devices=2, method="jit", steps=3)
    assert universal._fit_step(parallel)._cache_size() == before


def test_a_foreign_threat_of_three_methods_goes_on_being_added(tmp_path):
    @struct.dataclass
    class Brighten:
        epsilon: jax.Array

        def sample(self, key, image):
            return self.project(image + self.epsilon * jax.random.uniform(key, image.shape), image)

        def project(self, candidate, image):
            return jnp.clip(jnp.clip(candidate, image, image + self.epsilon), 0, 1)

        def steepest(self, gradient):
            return jnp.sign(gradient)

    fitted = _fit(PGD_ON_FEATURE.replace(step_size=0.1), threat=Brighten, budgets=(0.1,), steps=8)
    best = 0.1 * (np.asarray(_linear().weights) > 0)
    np.testing.assert_allclose(fitted.member(0).delta, best, atol=1e-6)
    with pytest.raises(ValueError, match="epsilon must lie"):
        _fit(PGD_ON_FEATURE, threat=Brighten, budgets=(2.0,))
    fitted.member(0).save(tmp_path / "brighter.npz")
    loaded = UniversalPerturbation.load(tmp_path / "brighter.npz", threat=Brighten)
    np.testing.assert_array_equal(loaded.apply(_images(2)), fitted.member(0).apply(_images(2)))


@pytest.mark.parametrize("budget", [0.0, 1.5])
def test_fit_refuses_an_impossible_area(budget):
    with pytest.raises(ValueError, match="the area of a patch"):
        _fit(PGD_ON_FEATURE, budgets=(0.25, budget))


# ---------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("location", ["fixed", "random"])
def test_a_patch_survives_saving_and_loading(tmp_path, location):
    threat = Patch(jnp.float32(0.25), location)
    attack = UniversalPerturbation(threat.sample_delta(KEY, SHAPE), threat, name="patch")
    attack.save(tmp_path / "patch.npz")
    loaded = UniversalPerturbation.load(tmp_path / "patch.npz")
    assert (loaded.name, loaded.threat.location, float(loaded.threat.area)) == (
        *("patch", location),
        0.25,
    )
    images = _images(4)
    for key in (None, KEY):
        np.testing.assert_array_equal(loaded.apply(images, key), attack.apply(images, key))
    batch = jax.jit(attack_batch)(loaded, KEY, None, images)
    np.testing.assert_array_equal(batch, attack.apply(images, KEY))
    assert np.array_equal(attack.apply(images), batch) == (location == "fixed")


def test_a_resized_patch_keeps_its_share_of_the_area_and_its_picture():
    rows = jnp.linspace(0.2, 0.9, 4).reshape(4, 1, 1)
    delta = QUARTER.project_delta(jnp.zeros(SHAPE).at[2:6].set(jnp.broadcast_to(rows, (4, 8, 3))))
    attack = UniversalPerturbation(delta, QUARTER)
    with pytest.raises(ValueError, match=r"\.resized\(\(16, 16\)\)"):
        attack.apply(jnp.zeros((1, 16, 16, 3)))
    larger = attack.resized(16)
    assert _square(larger.delta[..., 0] > 0) == _square(QUARTER.mask(16, 16)[..., 0])
    side, top, left = (int(number) for number in QUARTER.place(16, 16))
    inside = np.asarray(larger.delta)[top : top + side, left : left + side]
    # Half-pixel centers: 0.2 and 0.9 at the rims, straight in between, no dark edge.
    expected = np.interp((np.arange(8) + 0.5) / 2 - 0.5, np.arange(4), rows[:, 0, 0])
    np.testing.assert_allclose(inside, np.broadcast_to(expected[:, None, None], (8, 8, 3)), 1e-5)
    np.testing.assert_array_equal(QUARTER.project_delta(larger.delta), larger.delta)
    np.testing.assert_allclose(attack.resized((8, 8)).delta, delta, atol=1e-6)
    with pytest.raises(ValueError, match="larger than the image of 1x16"):
        attack.resized((1, 16))


def test_garbage_is_refused_with_a_word_about_what_is_wrong(tmp_path):
    path = tmp_path / "file.npz"
    threat = {"kind": "Patch", "area": np.float32(0.25), "location": "fixed"}
    good = {"delta": np.zeros(SHAPE, np.float32), "name": "p", **threat}
    cases = [
        ({"area": np.float32(-1)}, "the area of a patch"),
        ({"area": "wide"}, "one number as area"),
        ({"area": np.ones(2)}, "one number as area"),
        ({"location": "moon"}, "'fixed' or 'random'"),
        ({"area": np.float32(0.001)}, "no pixel in an image of 8x8"),
        ({"kind": "L7"}, r"a threat of \['Band', 'L2', 'Linf', 'Patch'\], got 'L7'"),
        ({"kind": "Linf"}, "Linf has no entry epsilon"),
        ({"kind": "Band"}, "no entry low and no high and no inner"),
        ({"delta": np.zeros((8, 8), np.float32)}, r"got float32 of shape \(8, 8\)"),
        ({"delta": np.full(SHAPE, np.nan)}, "expected a finite float delta"),
        ({"delta": np.full(SHAPE, "x")}, "expected a finite float delta"),
    ]
    for change, words in cases:
        np.savez(path, **{**good, **change})
        with pytest.raises(ValueError, match=words):
            UniversalPerturbation.load(path)
    np.savez(path, **good)
    assert UniversalPerturbation.load(path).threat.location == "fixed"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a saved universal perturbation"):
        UniversalPerturbation.load(path)
    np.save(tmp_path / "one.npy", np.zeros(SHAPE))
    with pytest.raises(ValueError, match="one array, not named ones"):
        UniversalPerturbation.load(tmp_path / "one.npy")
    with pytest.raises(FileNotFoundError):
        UniversalPerturbation.load(tmp_path / "nowhere.npz")
