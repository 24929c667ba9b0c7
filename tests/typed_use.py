"""What somebody who writes against the package may rely on; checked by mypy, not run."""

from __future__ import annotations

from typing import assert_type

import jax

import robust_ssl


def loss(inputs: robust_ssl.LossInputs) -> jax.Array:
    """A loss, one value for each image."""
    outputs = inputs.adversarial
    assert outputs is not None and outputs.logits is not None
    return outputs.logits.sum(axis=1)


def whole(folder: str) -> robust_ssl.Result:
    """Attacks, secures and measures."""
    encoder = robust_ssl.load_encoder("simclr-cifar10-r18w24")
    assert_type(encoder, robust_ssl.Encoder)
    assert_type(encoder.replace(name="mine"), robust_ssl.Encoder)
    assert_type(encoder(jax.numpy.zeros((1, 32, 32, 3))), robust_ssl.Outputs)
    robust_ssl.check("loss", loss)
    robust_ssl.check_loss(loss)
    perturbation = robust_ssl.attack(encoder, "photo_crops")
    assert_type(perturbation, robust_ssl.Perturbation)
    classifier = robust_ssl.secure(encoder, "digits")
    assert_type(classifier, robust_ssl.Classifier)
    robust_ssl.save_classifier(classifier, folder)
    assert_type(robust_ssl.load_classifier(folder), robust_ssl.Classifier)
    first: str = robust_ssl.list("attacks")[0]
    names: list[str] = robust_ssl.list_encoders()
    print(first, names, robust_ssl.encoder_card(names[0])["name"])
    return robust_ssl.measure(classifier, "digits")
