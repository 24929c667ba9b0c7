"""A classifier on disk comes back bit-equal or not at all."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import models, weights
from robust_ssl.weights.classifiers import CARD_FILE, HEAD_FILE


def small(head):
    encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
    return models.classifier(jax.random.key(1), encoder, 3, head=head)


class OwnHead(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, features, *, train=False):
        return nn.Dense(self.num_classes)(features)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_round_trip_is_bit_equal(tmp_path, head):
    classifier = small(head)
    weights.save_classifier(classifier, tmp_path / "net", {"data": "none"})
    loaded = weights.load_classifier(tmp_path / "net")
    assert loaded.head == classifier.head
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(classifier), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    image = jnp.full((8, 8, 3), 0.3)
    np.testing.assert_array_equal(loaded(image).logits, classifier(image).logits)


def test_a_stage_directory_is_enough(tmp_path):
    weights.save_classifier(small("linear"), tmp_path / "stage2" / "classifier")
    assert weights.load_classifier(tmp_path / "stage2").num_classes == 3


def test_ones_own_head_needs_its_maker(tmp_path):
    weights.save_classifier(small(OwnHead(3)), tmp_path)
    with pytest.raises(ValueError, match=r"OwnHead.*head="):
        weights.load_classifier(tmp_path)
    assert weights.load_classifier(tmp_path, head=OwnHead).head == OwnHead(3)


def test_a_flipped_bit_is_seen(tmp_path):
    weights.save_classifier(small("linear"), tmp_path)
    content = bytearray((tmp_path / HEAD_FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / HEAD_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{HEAD_FILE} is not the file"):
        weights.load_classifier(tmp_path)


def test_another_number_of_classes_is_seen(tmp_path):
    weights.save_classifier(small("linear"), tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    (tmp_path / CARD_FILE).write_text(json.dumps({**card, "num_classes": 4}))
    with pytest.raises(ValueError, match=r"linear/kernel has shape \(64, 3\)"):
        weights.load_classifier(tmp_path)


@pytest.mark.parametrize(
    "content, says",
    [("{", "not JSON"), ("[]", "missing or of the wrong type"), ('{"head": 1}', "schema, head")],
)
def test_a_card_that_is_none(tmp_path, content, says):
    weights.save_classifier(small("linear"), tmp_path)
    (tmp_path / CARD_FILE).write_text(content)
    with pytest.raises(ValueError, match=says):
        weights.load_classifier(tmp_path)


def test_no_classifier_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {CARD_FILE}"):
        weights.load_classifier(tmp_path)


def test_nan_is_not_saved(tmp_path):
    broken = small("linear")
    broken = broken.replace(
        head_variables=jax.tree.map(lambda x: x * jnp.nan, broken.head_variables)
    )
    with pytest.raises(ValueError, match="the head to save"):
        weights.save_classifier(broken, tmp_path)
    assert not list(tmp_path.iterdir())
