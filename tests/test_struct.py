"""Classes are told apart by `jax.jit`, and are otherwise what `flax.struct` makes."""

import dataclasses
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import attacks, models, objectives, struct, threats
from robust_ssl.parallel import KINDS, Parallel
from robust_ssl.types import Outputs, TrainState


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
    structures = []
    for room in (threats, attacks, models, objectives):
        for kind in vars(room).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                value = object.__new__(kind)  # no constructor: what it checks is not the question
                for field in dataclasses.fields(kind):
                    is_child = field.metadata.get("pytree_node", True)
                    object.__setattr__(value, field.name, leaf if is_child else None)
                structure = jax.tree.structure(value)
                if not jax.tree_util.treedef_is_leaf(structure):  # a layer of flax is one
                    structures.append((kind.__name__, structure))
    assert len(structures) > 15
    for (one, structure), (other, another) in itertools.combinations(structures, 2):
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


@pytest.mark.parametrize("method", KINDS)
def test_what_is_mapped_over_a_batch_tells_even_classes_of_flax_apart(method):
    # Enough of them that JAX itself would take one for another: about one pair in 128.
    def kind(number):
        cls = type("Plus", (), {"__annotations__": {"by": float}, "number": number})
        return flax.struct.dataclass(cls)

    layout = Parallel.create(num_devices=1, kind=method)
    mapped = layout.map(lambda plus, batch: batch + plus.number + plus.by)
    for number in range(40):
        plus = kind(number)(0.5)
        np.testing.assert_array_equal(mapped(plus, np.zeros(1, np.float32)), [number + 0.5])


def _short(text):
    lines = text.splitlines()
    assert len(lines) <= 6
    assert all(len(line) <= 100 for line in lines)
    assert "Array(" not in text and "dtype=" not in text  # no contents of arrays
    return text


@pytest.fixture(scope="module")
def encoder():
    return models.resnet18(jax.random.key(0), image_size=32)


def test_the_repr_of_an_encoder_says_what_it_is_in_few_lines(encoder):
    assert repr(encoder).splitlines()[0] == "Encoder 'resnet18': ResNet, 11,168,832 parameters"
    assert "images 32x32x3 to 512 features" in _short(repr(encoder))
    quantized = encoder.replace(preprocess=models.Quantize(levels=8))
    assert "after Quantize(levels=8" in _short(repr(quantized))
    _short(repr(encoder.replace(name="a name " * 40, preprocess=lambda images: images)))
    classifier = models.classifier(jax.random.key(1), quantized, 10, head="linear")
    assert "10 classes" in _short(repr(classifier)) and "5,130 parameters" in repr(classifier)


def test_the_repr_of_outputs_and_of_a_state_has_shapes_only(encoder):
    outputs = jax.eval_shape(encoder, jnp.zeros((2, 32, 32, 3)))
    assert "features: float32[2, 512], logits: None" in _short(repr(outputs))
    state = TrainState(jnp.int32(3), encoder.variables, (), {"skipped": jnp.int32(0)})
    assert "step: int32[], counters: skipped" in _short(repr(state))


def test_a_repr_works_for_shapes_tracers_and_placeholders(encoder):
    shapes = jax.eval_shape(lambda: encoder)
    assert repr(shapes) == repr(encoder)
    seen = []

    @jax.jit
    def trace(value):
        seen.append(repr(value))
        seen.append(repr(Outputs(value.variables["params"]["stem"]["conv"]["kernel"])))
        return 0

    trace(encoder)
    assert seen[0] == repr(encoder)
    assert seen[1] == "Outputs(features: float32[3, 3, 3, 64], logits: None)"
    leaves, structure = jax.tree.flatten(encoder)
    _short(repr(jax.tree.unflatten(structure, [object()] * len(leaves))))
    _short(repr(encoder.replace(variables=None)))


def test_a_repr_changes_nothing_else(encoder):
    again = jax.tree.unflatten(jax.tree.structure(encoder), jax.tree.leaves(encoder))
    assert jax.tree.structure(again) == jax.tree.structure(encoder)
    assert hash(jax.tree.structure(again)) == hash(jax.tree.structure(encoder))
    assert "Encoder '" not in repr(jax.tree.structure(encoder))  # which names what was scored
