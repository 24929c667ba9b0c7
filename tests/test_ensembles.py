"""Ensembles are classifiers like any other, and say what their members' confidence says."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from robust_ssl import attacks, models, threats
from robust_ssl.models import Quantize, ensembles
from robust_ssl.types import Encoder
from robust_ssl.workdir import fingerprint

SIZE, CLASSES = 8, 3


class Pixels(nn.Module):
    """Another architecture: one layer on all pixels, with dropout."""

    dim: int = 5
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        x = x.reshape(len(x), -1)
        features = nn.Dense(self.dim, name="layer")(nn.Dropout(0.5, deterministic=not train)(x))
        return features, {"stem": x, "block1": features}


def other_encoder():
    module = Pixels()
    variables = module.init(jax.random.key(7), jnp.zeros((1, SIZE, SIZE, 3)))
    return Encoder(variables, module, (0.2, 0.3, 0.4), (0.5,) * 3, SIZE, 5, "pixels", Quantize(16))


def members():
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        models.classifier(keys[0], tiny.encoder(), CLASSES, head="linear"),
        models.classifier(keys[1], other_encoder(), CLASSES, head="linear"),
        models.classifier(keys[2], other_encoder(), CLASSES, head="mlp"),
    )


def images(*shape):
    return jnp.asarray(np.random.default_rng(1).uniform(size=(*shape, SIZE, SIZE, 3)), jnp.float32)


def fused(logits, temperature=1.0):
    """What `fuse` is, in float64 and with probabilities."""
    logits = np.asarray(logits, np.float64) / temperature
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    weights = shares.max(-1, keepdims=True)
    return np.log((weights / weights.sum(0) * shares).sum(0))


def test_fusion_by_hand():
    sure, unsure = np.log([0.9, 0.1]), np.log([0.4, 0.6])
    logits = ensembles.fuse(jnp.asarray([[sure], [unsure]], jnp.float32))
    np.testing.assert_allclose(np.exp(logits), [[0.7, 0.3]], rtol=1e-6)  # weights 0.6 and 0.4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_fusion_in_float64(temperature):
    logits = np.random.default_rng(0).normal(0, 4, (4, 6, 5)).astype(np.float32)
    ours = ensembles.fuse(jnp.asarray(logits), temperature=temperature)
    np.testing.assert_allclose(ours, fused(logits, temperature), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(np.exp(ours).sum(-1), 1.0, rtol=1e-5)


def test_one_opinion_is_kept():
    logits = jnp.array([[2.0, -1.0, 0.5]])
    fused = ensembles.fuse(jnp.stack([logits, logits]))
    np.testing.assert_allclose(fused, jax.nn.log_softmax(logits), atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e3, 1e30])
def test_extreme_logits_stay_finite(size):
    logits = size * jnp.array([[[1.0, -1.0, 0.0]], [[-1.0, 1.0, 1.0]]])
    value, gradient = jax.value_and_grad(lambda z: ensembles.fuse(z)[0, 2])(logits)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    assert jnp.isfinite(ensembles.fuse(logits)).all()


def test_an_ensemble_says_what_its_members_say():
    nets, batch = members(), images(4)
    ensemble = models.confidence_ensemble(nets, temperature=2.0)
    outputs = jax.jit(lambda m, x: m(x))(ensemble, batch)
    alone = [net(batch) for net in nets]
    np.testing.assert_allclose(
        outputs.logits, fused([one.logits for one in alone], 2.0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        outputs.features, np.concatenate([one.features for one in alone], axis=-1), atol=1e-5
    )
    names = []
    for index, outputs_alone in enumerate(alone):
        names += [f"member{index}/{tap}" for tap in outputs_alone.taps]
    assert sorted(outputs.taps) == sorted(names) and "member1/block1" in names
    np.testing.assert_allclose(outputs.taps["member0/conv1"], alone[0].taps["conv1"], atol=1e-5)
    assert (ensemble.image_size, ensemble.encoder.dim, ensemble.num_classes) == (SIZE, 18, CLASSES)


def test_one_image_a_batch_and_vmap_agree():
    ensemble, batch = models.confidence_ensemble(members()), images(2)
    want = ensemble(batch)
    for outputs in (ensemble(batch[1]), jax.tree.map(lambda x: x[1], jax.vmap(ensemble)(batch))):
        np.testing.assert_allclose(outputs.logits, want.logits[1], atol=1e-5)
        np.testing.assert_allclose(outputs.features, want.features[1], atol=1e-5)
    assert ensemble.encoder(batch[0]).features.shape == (18,)


def test_every_variable_is_in_the_tree():
    nets = members()
    ensemble = models.confidence_ensemble(nets)
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(ensemble.variables)
    }
    assert "params/encoder/member0/conv1/kernel" in paths
    assert "batch_stats/encoder/member0/norm1/mean" in paths
    assert "params/head/member2/output/bias" in paths
    assert len(paths) == sum(len(jax.tree.leaves(net)) for net in nets)
    moved = jax.tree.map(lambda x: x, ensemble.variables)
    moved["params"]["encoder"]["member1"]["layer"]["bias"] += 1.0
    assert fingerprint(moved) != fingerprint(ensemble.variables)
    other = ensemble.with_variables(moved)
    assert jnp.abs(other(images(1)).logits - ensemble(images(1)).logits).max() > 0


def test_members_come_back_bit_equal():
    nets = members()
    back = models.ensemble_members(models.confidence_ensemble(nets))
    assert jax.tree.structure(back) == jax.tree.structure(nets)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(nets), strict=True):
        np.testing.assert_array_equal(a, b)


def test_ensembles_of_one_kind_compile_once():
    def count(model, image):
        nonlocal traced
        traced += 1
        return model(image).logits

    traced, run = 0, jax.jit(count)
    for _ in range(2):
        run(models.confidence_ensemble(members()), images()).block_until_ready()
    assert traced == 1
    run(models.confidence_ensemble(members(), temperature=2.0), images()).block_until_ready()
    assert traced == 2


def test_an_ensemble_of_ensembles():
    first, second, third = members()
    inner = models.confidence_ensemble([first, second])
    outer, batch = models.confidence_ensemble([inner, third]), images(2)
    want = fused([inner(batch).logits, third(batch).logits])
    np.testing.assert_allclose(outer(batch).logits, want, rtol=1e-4, atol=1e-5)
    assert "member0/member1/block1" in outer(batch).taps


def test_training_mode_updates_the_members_statistics():
    nets, batch = members(), images(4)
    ensemble = models.confidence_ensemble(nets)
    outputs, statistics = ensemble.apply_train(batch, key=jax.random.key(0))
    alone, want = nets[0].encoder.apply_train(batch)
    np.testing.assert_allclose(outputs.features[:, :8], alone.features, atol=1e-5)
    first = statistics["encoder"]["member0"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, dict(want))
    other, _ = ensemble.apply_train(batch, key=jax.random.key(1))  # dropout has its keys
    assert jnp.abs(other.features[:, 8:] - outputs.features[:, 8:]).max() > 0
    np.testing.assert_allclose(other.features[:, :8], alone.features, atol=1e-5)


def test_batch_statistics_cross_devices():
    ensemble, batch = models.confidence_ensemble(members()), images(4)

    def statistics(part):
        _, updated = ensemble.apply_train(part, key=jax.random.key(0), axis_name="devices")
        return updated

    halves = jax.vmap(statistics, axis_name="devices")(batch.reshape(2, 2, SIZE, SIZE, 3))
    _, whole = ensemble.apply_train(batch, key=jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-5), halves, whole)


def test_pgd_attacks_all_members():
    ensemble, batch = models.confidence_ensemble(members()), images(4)
    labels = ensemble(batch).logits.argmax(-1)
    attack = attacks.PGD(threats.Linf(0.3), step_size=0.1, num_steps=6)
    moved = attacks.attack_batch(attack, jax.random.key(0), ensemble, batch, labels)
    assert jnp.abs(moved - batch).max() <= 0.3 + 1e-6

    def of_the_label(x):
        return jnp.take_along_axis(ensemble(x).logits, labels.reshape(-1, 1), axis=1)

    assert (of_the_label(moved) < of_the_label(batch)).all()
    assert (ensemble(moved).logits.argmax(-1) != labels).mean() >= 0.5
    gradient = jax.grad(lambda m: m(batch).logits[:, 0].sum())(ensemble)
    for index in range(3):  # both the encoder and the head of each
        for part in (gradient.encoder.variables, gradient.head_variables):
            leaves = jax.tree.leaves(part["params"][f"member{index}"])
            assert all(jnp.abs(leaf).max() > 0 for leaf in leaves)


def test_what_makes_no_ensemble_is_refused():
    nets = members()
    with pytest.raises(ValueError, match="at least two classifiers, got 1"):
        models.confidence_ensemble(nets[:1])
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            models.confidence_ensemble(nets, temperature=temperature)
    two = models.classifier(jax.random.key(0), tiny.encoder(), 2, head="linear")
    with pytest.raises(ValueError, match=r"one num_classes, got \[3, 2\]"):
        models.confidence_ensemble([nets[0], two])
    large = nets[0].replace(encoder=tiny.encoder(image_size=16))
    with pytest.raises(ValueError, match=r"one image_size, got \[8, 16\]"):
        models.confidence_ensemble([nets[0], large])
