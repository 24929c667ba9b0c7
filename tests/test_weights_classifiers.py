"""A classifier on disk comes back bit-equal or not at all."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from robust_ssl import models, weights
from robust_ssl.models import JPEG, Quantize, Smooth
from robust_ssl.weights import cards, native
from robust_ssl.weights.classifiers import CARD_FILE, HEAD_FILE


def small(head):
    encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
    return models.classifier(jax.random.key(1), encoder, 3, head=head)


def with_step(classifier, step):
    return classifier.replace(encoder=classifier.encoder.replace(preprocess=step))


def ensemble():
    vit = models.vit_tiny(jax.random.key(2), depth=1, image_size=8, mean=(0.1, 0.2, 0.3))
    other = models.classifier(jax.random.key(3), vit, 3, head="mlp")
    nets = [small("linear"), with_step(other, Quantize(4))]
    return models.confidence_ensemble(nets, temperature=1.5)


def assert_bit_equal(ours, want):
    assert jax.tree.structure(ours) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


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


def tiny_head(num_classes):
    """What a user would keep in a module, and name in a config."""
    return OwnHead(num_classes)


def test_an_encoder_and_a_head_of_ones_own_are_named_by_strings(tmp_path):
    classifier = models.classifier(jax.random.key(0), tiny.encoder(), 3, head=OwnHead(3))
    weights.save_classifier(classifier, tmp_path, builder=tiny.encoder)
    card = weights.encoder_card(tmp_path)
    assert card["builder"] == "tiny:encoder"
    hint = rf'builder=, or in a config write {{"path": "{tmp_path}", "builder": "tiny:encoder"}}'
    with pytest.raises(ValueError, match=re.escape(hint)):
        weights.load_classifier(tmp_path)
    with pytest.raises(
        ValueError, match=r'head=, or .* write \{"path": ".*", "head": "module:func'
    ):
        weights.load_classifier(tmp_path, builder=card["builder"])
    names = {"builder": card["builder"], "head": f"{__name__}:tiny_head"}
    assert_bit_equal(weights.load_classifier(tmp_path, **names), classifier)
    assert_bit_equal(weights.load_encoder(tmp_path, builder="tiny:encoder"), classifier.encoder)
    with pytest.raises(ValueError, match=r"tiny has no function 'encode'.*did you mean encoder"):
        weights.load_encoder(tmp_path, builder="tiny:encode")


def test_strings_reach_every_member_of_an_ensemble(tmp_path):
    net = models.classifier(jax.random.key(0), tiny.encoder(), 3, head=OwnHead(3))
    both = models.confidence_ensemble([net, net])
    weights.save_classifier(both, tmp_path, builder=tiny.encoder)
    names = {"builder": "tiny:encoder", "head": f"{__name__}:tiny_head"}
    assert_bit_equal(weights.load_classifier(tmp_path, **names), both)


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


@pytest.mark.parametrize(
    "step",
    [Quantize(5, straight_through=False), Smooth(0.7), JPEG(31, subsample=True)],
    ids=str,
)
def test_an_input_transformation_is_kept(tmp_path, step):
    classifier = with_step(small("linear"), step)
    weights.save_classifier(classifier, tmp_path)
    loaded = weights.load_classifier(tmp_path)
    assert loaded.encoder.preprocess == step
    assert_bit_equal(loaded, classifier)
    assert_bit_equal(weights.load_encoder(tmp_path), classifier.encoder)
    weights.save_encoder(classifier.encoder.replace(preprocess=None), tmp_path)
    assert weights.load_encoder(tmp_path).preprocess is None


def test_an_unknown_transformation_is_not_lost_in_silence(tmp_path):
    for step in (jnp.sqrt, lambda images: images):
        classifier = with_step(small("linear"), step)
        with pytest.raises(ValueError, match="cannot name the input transformation"):
            weights.save_classifier(classifier, tmp_path / "net")
    with pytest.raises(ValueError, match="know no input transformation"):
        weights.export_safetensors(
            with_step(small("linear"), JPEG()).encoder, tmp_path / "out.safetensors"
        )
    assert not list(tmp_path.iterdir())


def test_a_transformation_of_the_same_name_is_another_one(tmp_path):
    own = type("JPEG", (JPEG,), {})()
    weights.save_classifier(with_step(small("linear"), own), tmp_path)
    with pytest.raises(ValueError, match="which is not one of"):
        weights.load_classifier(tmp_path)


def test_a_builder_may_bring_its_own_transformation(tmp_path):
    def builder(key):
        return models.resnet18(key, width=8, image_size=8).replace(preprocess=jnp.sqrt)

    classifier = with_step(small("linear"), jnp.sqrt)
    weights.save_classifier(classifier, tmp_path, builder=builder)
    loaded = weights.load_classifier(tmp_path, builder=builder)
    assert_bit_equal(loaded, classifier)
    with pytest.raises(ValueError, match="does not rebuild"):
        weights.save_classifier(small("linear"), tmp_path, builder=builder)


@pytest.mark.parametrize(
    "entry, says",
    [
        ("JPEG", '"preprocess" must be'),
        ({"name": "eval", "options": {}}, "transformation 'eval', which is not one of"),
        ({"name": ["JPEG"], "options": {}}, '"preprocess" must be'),
        ({"name": "JPEG", "options": {"quality": 0}}, "cannot make JPEG: quality must be"),
        ({"name": "JPEG", "options": {"speed": 1}}, "cannot make JPEG: .*speed"),
    ],
)
def test_a_transformation_that_is_none(tmp_path, entry, says):
    weights.save_encoder(small("linear").encoder, tmp_path)
    card = json.loads((tmp_path / native.CARD_FILE).read_text())
    (tmp_path / native.CARD_FILE).write_text(json.dumps({**card, "preprocess": entry}))
    with pytest.raises(ValueError, match=says):
        weights.load_encoder(tmp_path)


def test_an_ensemble_is_its_members(tmp_path):
    classifier = ensemble()
    weights.save_classifier(classifier, tmp_path, {"why": "both"})
    loaded = weights.load_classifier(tmp_path)
    assert_bit_equal(loaded, classifier)
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 3)), jnp.float32)
    run = jax.jit(lambda model, images: model(images).logits)
    np.testing.assert_array_equal(run(loaded, images), run(classifier, images))
    first, second = models.ensemble_members(classifier)
    assert_bit_equal(weights.load_classifier(tmp_path / "members" / "0"), first)
    assert_bit_equal(weights.load_classifier(tmp_path / "members" / "1"), second)
    assert json.loads((tmp_path / CARD_FILE).read_text())["card"] == {"why": "both"}


def test_an_ensemble_of_ensembles_with_a_transformation_of_its_own(tmp_path):
    net = small("linear")
    inner = with_step(models.confidence_ensemble([net, net]), Smooth())
    outer = models.confidence_ensemble([inner, net])
    weights.save_classifier(outer, tmp_path)
    assert_bit_equal(weights.load_classifier(tmp_path), outer)
    other = outer.replace(encoder=outer.encoder.replace(mean=(0.5,) * 3))
    with pytest.raises(ValueError, match="not one of its members any more"):
        weights.save_classifier(other, tmp_path)


def test_an_ensemble_in_place_of_a_classifier(tmp_path):
    net = small("linear")
    weights.save_classifier(net, tmp_path)
    both = models.confidence_ensemble([net, net])
    weights.save_classifier(both, tmp_path)
    assert_bit_equal(weights.load_classifier(tmp_path), both)
    with pytest.raises(FileNotFoundError):  # nothing of the old one can be taken for the new
        weights.load_encoder(tmp_path)
    weights.save_classifier(net, tmp_path)
    assert_bit_equal(weights.load_classifier(tmp_path), net)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"members": 1}, "at least two classifiers"),
        ({"members": "2"}, "wrong type: members"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"num_classes": 4}, "says 4 classes, its members have 3"),
        ({"preprocess": 3}, '"preprocess" must be'),
    ],
)
def test_the_card_of_an_ensemble_is_checked(tmp_path, changes, says):
    net = small("linear")
    weights.save_classifier(models.confidence_ensemble([net, net]), tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    (tmp_path / CARD_FILE).write_text(json.dumps({**card, **changes}))
    with pytest.raises(ValueError, match=says):
        weights.load_classifier(tmp_path)


def test_a_member_that_is_missing_or_damaged(tmp_path):
    net = small("linear")
    weights.save_classifier(models.confidence_ensemble([net, net]), tmp_path)
    file = tmp_path / "members" / "1" / HEAD_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"members/1/head\.safetensors is not the file"):
        weights.load_classifier(tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    (tmp_path / CARD_FILE).write_text(json.dumps({**card, "members": 3}))
    file.write_bytes(content)
    with pytest.raises(FileNotFoundError, match="members/2"):
        weights.load_classifier(tmp_path)


def test_what_is_left_of_an_interruption_is_no_classifier(tmp_path, monkeypatch):
    weights.save_classifier(small("linear"), tmp_path)
    replace = cards.replace_file

    def full(file, content):
        if file.name == "head.safetensors":
            raise OSError(28, "No space left on device")
        replace(file, content)

    monkeypatch.setattr(cards, "replace_file", full)
    with pytest.raises(OSError, match="No space left"):
        weights.save_classifier(small("mlp"), tmp_path)
    with pytest.raises(FileNotFoundError):
        weights.load_classifier(tmp_path)


def test_what_is_refused_leaves_what_was_there(tmp_path):
    net = small("linear")
    weights.save_classifier(net, tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        weights.save_classifier(net, tmp_path, {"accuracy": float("nan")})
    assert_bit_equal(weights.load_classifier(tmp_path), net)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, net.head_variables)
    with pytest.raises(ValueError, match="finite"):
        weights.save_classifier(
            models.confidence_ensemble([net, net.replace(head_variables=broken)]), tmp_path
        )
    assert_bit_equal(weights.load_classifier(tmp_path), net)
