"""A user's threat goes through fitting, saving, loading and applying; a file executes nothing."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import attacks, struct, threats
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.parallel import Parallel
from robust_ssl.types import Outputs

SHAPE = (8, 8, 3)


@struct.dataclass
class OneChannel:
    epsilon: jax.Array | float
    channel: int = struct.field(pytree_node=False, default=0)

    def norm(self, change):
        return jnp.max(jnp.abs(change))

    def project(self, candidate, image):
        moved = jnp.clip(candidate, image - self.epsilon, image + self.epsilon)
        return jnp.clip(image.at[..., self.channel].set(moved[..., self.channel]), 0.0, 1.0)

    def sample(self, key, image):
        return self.project(image + jax.random.uniform(key, image.shape, minval=-1), image)

    def steepest(self, gradient):
        return jnp.sign(gradient)


@struct.dataclass
class Anything:
    """Holds fields of all kinds."""

    epsilon: Any = 0.1
    inner: Any = None
    table: Any = None
    name: str = struct.field(pytree_node=False, default="anything")
    delta: bool = struct.field(pytree_node=False, default=True)


KIND = f"{__name__}:OneChannel"


def _fitted(threat):
    keys, epsilons = attacks.members((0,), (0.1, 0.2))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(192, 4)), jnp.float32)
    return attacks.fit(
        attacks.UniversalPGD(step_size=0.05),
        Linear(weights),
        [{"images": np.full((2, *SHAPE), 0.5, np.float32)}] * 3,
        keys=keys,
        epsilons=epsilons,
        image_shape=SHAPE,
        parallel=Parallel.create(num_devices=1, kind="jit"),
        threat=threat,
    )


@struct.dataclass
class Linear:
    weights: jax.Array

    def __call__(self, images):
        return Outputs(features=images.reshape(len(images), -1) @ self.weights)


def test_a_users_threat_is_fitted_saved_loaded_and_applied(tmp_path):
    path, fitted = tmp_path / "green.npz", _fitted(functools.partial(OneChannel, channel=1))
    threats.check_saveable(fitted.member(1).threat)
    fitted.member(1).save(path)
    loaded = UniversalPerturbation.load(path, threat=OneChannel)
    assert type(loaded.threat) is OneChannel and loaded.threat.channel == 1
    assert np.float32(loaded.threat.epsilon) == np.float32(0.2)
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(3, *SHAPE)), jnp.float32)
    np.testing.assert_array_equal(loaded.apply(images), fitted.member(1).apply(images))
    moved = np.abs(loaded.apply(images) - images)
    assert np.all(moved[..., [0, 2]] == 0) and 0.1 < moved[..., 1].max() <= 0.2 + 1e-6
    assert loaded.resized(16).delta.shape == (16, 16, 3)
    with np.load(path) as stored:
        assert str(stored["kind"]) == KIND and float(stored["field.channel"]) == 1


def test_nothing_that_a_file_names_is_imported(tmp_path):
    path = tmp_path / "file.npz"
    attack = UniversalPerturbation(jnp.zeros(SHAPE), OneChannel(0.1))
    attack.save(path)
    words = r"file\.npz: .*of the kind '.*:OneChannel', .*pass its class: threat=OneChannel"
    with pytest.raises(ValueError, match=words):
        UniversalPerturbation.load(path)
    with np.load(path) as stored:
        entries = dict(stored)
    before = set(sys.modules)
    np.savez(path, **{**entries, "kind": "antigravity:Threat"})
    with pytest.raises(ValueError, match="not of this package"):
        UniversalPerturbation.load(path)
    assert UniversalPerturbation.load(path, threat=OneChannel).threat.channel == 0  # by any name
    assert "antigravity" not in set(sys.modules) - before
    with pytest.raises(ValueError, match=r"cannot be made of its fields channel, epsilon"):
        UniversalPerturbation.load(path, threat=lambda epsilon: OneChannel(epsilon))
    for bad in (np.array([b"x"]), np.array(["a", "b"]), np.zeros(2, [("x", "f4")])):
        np.savez(path, **{**entries, "field.channel": bad})
        with pytest.raises(ValueError, match="expected a number, an array or a string as channel"):
            UniversalPerturbation.load(path, threat=OneChannel)
    np.savez(path, **{**entries, "field.epsilon": np.float64(8)})
    with pytest.raises(ValueError, match=r"epsilon must lie in \[0, 1\]"):
        UniversalPerturbation.load(path, threat=OneChannel)


@pytest.mark.parametrize(
    "threat",
    [
        Anything(),
        Anything(0.25, threats.Linf(0.1), np.arange(6.0).reshape(2, 3), "", False),
        Anything(jnp.float32(0.25), threats.Band(threats.L2(0.5), 0.1, 0.25)),
        Anything(np.float32(0.5), OneChannel(0.1, 2), jnp.arange(3)),
        Anything(inner=Anything(inner=OneChannel(0.5))),
        threats.Band(OneChannel(0.25, 2), 0.0, 0.2),
    ],
)
def test_every_field_comes_back(threat):
    known = {KIND: OneChannel, f"{__name__}:Anything": Anything}
    again = threats.from_entries(threats.to_entries(threat), known)
    assert jax.tree.structure(again) == jax.tree.structure(threat)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(threat), strict=True):
        np.testing.assert_array_equal(np.float32(one), np.float32(other))


def test_one_class_is_not_taken_for_two():
    entries = threats.to_entries(Anything(inner=OneChannel(0.1)))
    with pytest.raises(
        ValueError, match=r"holds another one, .*OneChannel', in 'inner': .*mapping"
    ):
        threats.from_entries(entries, Anything)
    band = threats.to_entries(threats.Band(OneChannel(0.1, 2), 0.0, 0.2))
    assert threats.from_entries(band, OneChannel).threat.channel == 2


class Linf(threats.Linf):
    """A class of the same name, which is another threat."""


@dataclasses.dataclass
class Plain:
    epsilon: float = 0.1


def test_a_class_of_the_same_name_and_a_plain_dataclass_are_the_users():
    for threat in (Linf(0.25), Plain(0.25)):
        entries = threats.to_entries(threat)
        assert str(entries["kind"]) == f"{__name__}:{type(threat).__name__}"
        assert threats.from_entries(entries, type(threat)) == threat


class NoDataclass:
    epsilon = 0.1


@pytest.mark.parametrize(
    ("threat", "words"),
    [
        (NoDataclass(), "NoDataclass cannot be saved: it is no dataclass"),
        (Anything, "cannot be saved: it is no dataclass"),
        (Anything(table=(1, 2)), "its field 'table' is a tuple"),
        (Anything(table=np.array(["a", None])), "its field 'table' is a ndarray"),
        (Anything(table=jax.random.key(0)), "its field 'table' is a "),
        (Anything(table=jnp.zeros(2, jnp.bfloat16)), "its field 'table' is a "),
        (Anything(inner=Anything(table=len)), "its field 'table' is a builtin_function"),
        (Anything(epsilon=None), "its field 'epsilon' is a NoneType"),
        (threats.Band(threats.Band(threats.Linf(0.1))), "a Band inside a Band"),
        (Anything(inner=threats.Band(threats.Band(threats.Linf(0.1)))), "a Band inside a Band"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_a_fit(threat, words):
    with pytest.raises(ValueError, match=words):
        threats.check_saveable(threat)
