"""Classifiers on disk: an encoder's two files, and the head's weights with a card beside them.

An ensemble is a card and one such directory per member: ``members/0``, ``members/1``, ...
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl.models import ensembles, heads
from robust_ssl.types import Classifier, Encoder
from robust_ssl.weights import native

SCHEMA = 1
HEAD_FILE = "head.safetensors"
CARD_FILE = "classifier.json"

# A card names its head; only these names are ever looked up, whatever the card says.
_HEADS = {"linear": heads.LinearHead, "mlp": heads.MLPHead}
_FUSION = "confidence"  # what the card of an ensemble has for a head


def save_classifier(
    classifier: Classifier,
    directory: str | os.PathLike,
    card: Mapping[str, Any] | None = None,
    *,
    builder: Callable[..., Encoder] | None = None,
    options: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a classifier: what `save_encoder` writes, ``head.safetensors``, ``classifier.json``.

    An ensemble of `robust_ssl.models.confidence_ensemble` is written as ``classifier.json`` and
    its members in ``members/0``, ``members/1``, ...

    Args:
      classifier: What to save; every variable float32 and finite.
      directory: Made if it is not there; the files in it are replaced.
      card: Anything JSON can say: how it was trained, on what.
      builder: Of an encoder that is not one of `robust_ssl.models`; see `save_encoder`.  Of
        every member of an ensemble.
      options: Keyword arguments of `builder`.

    Returns:
      The directory.

    Raises:
      ValueError: If the encoder cannot be rebuilt (its input transformation is not one of
        `robust_ssl.models.preprocessing`), or a variable is not finite float32.

    Example:
      >>> import tempfile
      >>> from robust_ssl import models
      >>> encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
      >>> net = models.classifier(jax.random.key(1), encoder, 3, head="linear")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_classifier(net, folder)
      ...     load_classifier(folder).num_classes
      3
    """
    from safetensors.numpy import save

    if ensembles.ensemble_members(classifier):
        return _save_ensemble(classifier, pathlib.Path(directory), card, builder, options)
    arrays = {p: np.asarray(leaf) for p, leaf in native.flat(classifier.head_variables).items()}
    native.check_arrays(arrays, native.flat(classifier.head_variables), "the head to save")
    known = [n for n, kind in _HEADS.items() if classifier.head == kind(classifier.num_classes)]
    weights = save(arrays)
    record = {
        "schema": SCHEMA,
        "head": known[0] if known else type(classifier.head).__name__,
        "num_classes": classifier.num_classes,
        "weights": native.describe_file(HEAD_FILE, weights),
        "card": dict(card or {}),
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    directory = native.save_encoder(
        classifier.encoder, directory, card, builder=builder, options=options
    )
    native.replace_file(directory / HEAD_FILE, weights)
    native.replace_file(directory / CARD_FILE, text.encode())
    return directory


def load_classifier(
    directory: str | os.PathLike,
    *,
    head: Callable[[int], nn.Module] | None = None,
    builder: Callable[..., Encoder] | None = None,
) -> Classifier:
    """Reads a classifier and checks all of it; nothing that the files say is executed.

    Args:
      directory: What `save_classifier` wrote, or a fine-tuning stage's directory that holds it
        in ``classifier/``.
      head: ``head(num_classes) -> module``, for a head of your own; of an ensemble, of every
        member.
      builder: For an encoder of your own; see `load_encoder`; likewise.

    Returns:
      The classifier, bit-equal to the one that was saved.

    Raises:
      ValueError: If a card is not valid, or weights differ from their card or their network.
      FileNotFoundError: If the directory or one of its files is not there.
    """
    folder = pathlib.Path(directory).expanduser()
    if not (folder / CARD_FILE).is_file() and (folder / "classifier" / CARD_FILE).is_file():
        folder = folder / "classifier"
    record = _read_card(folder)
    if record["head"] == _FUSION:
        return _load_ensemble(folder, record, head, builder)
    encoder = native.load_encoder(folder.absolute(), builder=builder)
    module = (head or _known_head(record["head"], folder))(record["num_classes"])
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, encoder.dim)))
    variables = native.read_variables(folder, HEAD_FILE, record["weights"], like)
    return Classifier(encoder, variables, module, record["num_classes"])


def _save_ensemble(classifier, directory: pathlib.Path, card, builder, options) -> pathlib.Path:
    encoder, temperature = classifier.encoder, classifier.head.temperature
    members = ensembles.ensemble_members(classifier)
    again = ensembles.confidence_ensemble(members, temperature=temperature)
    kept = again.encoder.replace(name=encoder.name, preprocess=encoder.preprocess)
    if jax.tree.structure(again.replace(encoder=kept)) != jax.tree.structure(classifier):
        raise ValueError(
            "the ensemble is not one of its members any more (its encoder was replaced); save the "
            "members, or the ensemble as confidence_ensemble made it"
        )
    record = {
        "schema": SCHEMA,
        "head": _FUSION,
        "num_classes": classifier.num_classes,
        "name": encoder.name,
        "members": len(members),
        "temperature": temperature,
        **native.describe_preprocess(encoder.preprocess),
        "card": dict(card or {}),
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    # The card goes first and comes last: an interruption shows as a classifier that is not there.
    for name in (CARD_FILE, HEAD_FILE, native.CARD_FILE, native.WEIGHTS_FILE):
        (directory / name).unlink(missing_ok=True)
    for index, member in enumerate(members):
        folder = directory / "members" / str(index)
        save_classifier(member, folder, card, builder=builder, options=options)
    native.replace_file(directory / CARD_FILE, text.encode())
    return directory


def _load_ensemble(folder: pathlib.Path, record: Mapping[str, Any], head, builder) -> Classifier:
    members = [
        load_classifier(folder / "members" / str(index), head=head, builder=builder)
        for index in range(record["members"])
    ]
    where = folder / CARD_FILE
    try:
        ensemble = ensembles.confidence_ensemble(members, temperature=record["temperature"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if ensemble.num_classes != record["num_classes"]:
        raise ValueError(
            f"{where} says {record['num_classes']} classes, its members have {ensemble.num_classes}"
        )
    preprocess = native.read_preprocess(record, str(where))
    encoder = ensemble.encoder.replace(name=record["name"], preprocess=preprocess)
    return ensemble.replace(encoder=encoder)


def _read_card(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / CARD_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"no classifier in {folder} (there is no {CARD_FILE}); give a directory that "
            "save_classifier wrote, or a finished fine-tuning stage such as runs/gtsrb/stage2"
        )
    try:
        record = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    fused = isinstance(record, dict) and record.get("head") == _FUSION
    kinds = {"schema": int, "head": str, "num_classes": int}
    kinds |= {"name": str, "members": int, "temperature": float} if fused else {"weights": dict}
    wrong = [
        key
        for key, kind in kinds.items()
        if not isinstance(record, dict) or not isinstance(record.get(key), kind)
    ]
    if not wrong and not fused and not isinstance(record["weights"].get("sha256"), str):
        wrong.append("weights/sha256")
    if wrong:
        raise ValueError(f"{file}: missing or of the wrong type: {', '.join(wrong)}")
    return record


def _known_head(name: str, folder: pathlib.Path) -> Callable[[int], nn.Module]:
    if name not in _HEADS:
        raise ValueError(
            f"{folder}/{CARD_FILE} has the head {name!r}, which is not one of {sorted(_HEADS)}; "
            "pass the function that makes it as head="
        )
    return _HEADS[name]
