"""Classes are told apart by `jax.jit`, and are otherwise what `flax.struct` makes."""

import dataclasses
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import attacks, models, objectives, struct, threats
from robust_ssl.parallel import METHODS, Parallel


@struct.dataclass
class Scaled:
    """One child that has children, one plain, one static."""

    tree: dict
    by: float = 2.0
    axis: int = struct.field(pytree_node=False, default=0)


VALUE = Scaled({"b": jnp.ones(2), "a": jnp.zeros(())}, 3.0, axis=1)


def test_two_classes_with_the_same_fields_are_two_structures():
    kinds = [threats.Linf, threats.L2]
    assert len({jax.tree.structure(kind(0.5)) for kind in kinds}) == 2
    assert jax.tree.structure(threats.L2(0.5)) != jax.tree.structure(threats.Linf(0.5))
    assert jax.tree.structure(threats.L2(0.5)) == jax.tree.structure(threats.L2(0.1))


def test_no_two_public_classes_are_one_structure():
    leaf = object()
    made = []
    for room in (threats, attacks, models, objectives):
        for kind in vars(room).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                value = object.__new__(kind)  # no constructor: what it checks is not the question
                for field in dataclasses.fields(kind):
                    is_child = field.metadata.get("pytree_node", True)
                    object.__setattr__(value, field.name, leaf if is_child else None)
                structure = jax.tree.structure(value)
                if not jax.tree_util.treedef_is_leaf(structure):  # a layer of flax is one
                    made.append((kind.__name__, structure))
    assert len(made) > 15
    for (one, structure), (other, another) in itertools.combinations(made, 2):
        assert structure != another, f"jax.jit may run {one} as {other}"


def test_its_values_are_pytrees_with_named_children_and_frozen():
    leaves = jax.tree_util.tree_leaves_with_path(VALUE)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".tree['a']", ".tree['b']", ".by"]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, VALUE)
    assert isinstance(doubled, Scaled) and doubled.axis == 1 and doubled.by == 6.0
    np.testing.assert_array_equal(doubled.tree["b"], [2.0, 2.0])
    assert VALUE.replace(by=1.0).by == 1.0 and VALUE.by == 3.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        VALUE.by = 1.0
    assert jax.tree.structure(VALUE) == jax.tree.structure(doubled)
    assert jax.tree.structure(VALUE) != jax.tree.structure(VALUE.replace(axis=0))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_mapped_over_a_batch_tells_even_classes_of_flax_apart(method):
    # Enough of them that JAX itself would take one for another: about one pair in 128.
    def kind(number):
        cls = type("Plus", (), {"__annotations__": {"by": float}, "number": number})
        return flax.struct.dataclass(cls)

    layout = Parallel.create(num_devices=1, method=method)
    mapped = layout.map(lambda plus, batch: batch + plus.number + plus.by)
    for number in range(40):
        plus = kind(number)(0.5)
        np.testing.assert_array_equal(mapped(plus, np.zeros(1, np.float32)), [number + 0.5])
