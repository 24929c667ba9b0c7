"""Randomized models: every attack draws them anew, and none asks for the key that they carry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import attacks, struct, threats
from robust_ssl.types import Outputs

KEY = jax.random.key(0)
IMAGE = np.random.default_rng(0).uniform(size=(8, 8, 3)).astype(np.float32)


def _linear(weights):
    def model(images):
        scores = images.reshape(len(images), -1) @ weights
        return Outputs(features=scores, logits=scores)

    return model


@struct.dataclass
class Noisy:
    """A randomized model: it answers for the image with noise on it."""

    weights: jax.Array
    key: jax.Array

    def with_key(self, key):
        return self.replace(key=key)

    def __call__(self, images):
        noise = jax.random.normal(self.key, images.shape)
        return jax.tree.map(jnp.tanh, _linear(self.weights)(images + 0.1 * noise))


@pytest.mark.parametrize(
    "attack",
    [
        attacks.FGSM(threats.Linf(0.05)),
        attacks.PGD(threats.Linf(0.05), num_steps=2, restarts=2),
        attacks.PGD(threats.Linf(0.05), num_steps=2, random_start=False, keep_best=False),
        attacks.EmbedAttack(threats.Linf(0.05), num_steps=2),
        attacks.FABT(threats.L2(9.0), num_steps=3, restarts=2),
        attacks.Square(threats.Linf(0.3), num_queries=3),
    ],
)
def test_an_attack_draws_a_randomized_model_and_never_asks_for_the_key_it_carries(attack):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(192, 3)), jnp.float32)
    image, one = jnp.asarray(IMAGE), Noisy(weights, jax.random.key(5))
    label = jnp.argmax(_linear(weights)(image[None]).logits[0])
    run = jax.jit(lambda key, model: attack(key, model, image, label))
    found = run(KEY, one)
    np.testing.assert_array_equal(found, run(KEY, one.with_key(jax.random.key(6))))
    assert not np.array_equal(found, run(jax.random.key(1), one))
    assert not np.array_equal(found, image)


def test_every_step_of_pgd_has_a_draw_of_its_own():
    seen = []

    class Counted(Noisy):
        def with_key(self, key):
            seen.append(key)
            return self

    model = Counted(jnp.ones((192, 3)), KEY)
    attack = attacks.PGD(threats.Linf(0.05), num_steps=2, restarts=2)
    with jax.disable_jit():
        attack(KEY, model, jnp.asarray(IMAGE), jnp.array(1))
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in seen}) == len(seen) == 7
