"""Classifiers on disk: an encoder's two files, and the head's weights with a card beside them.

An ensemble is a card and one such directory per member: ``members/0``, ``members/1``, ...
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl import disk
from robust_ssl.build import resolve
from robust_ssl.models import ensembles, heads
from robust_ssl.models.bridge import refuse_bridge
from robust_ssl.types import Classifier, Encoder
from robust_ssl.weights import cards, native, transforms

HEAD_FILE = "head.safetensors"
CARD_FILE = "classifier.json"

_MEMBERS = "members"
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
      classifier: What to save; every variable float32 and finite.  Its class names are written
        to the card.
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
    directory = pathlib.Path(directory)
    # All that may fail comes before anything is written.
    files = _files_of(classifier, card, builder=builder, options=options)
    # Cards go first and come last: an interruption leaves no classifier, never one of two halves.
    left_over = {HEAD_FILE, native.CARD_FILE, native.WEIGHTS_FILE} - files.keys()
    for name in left_over | {name for name in files if name.endswith(CARD_FILE)}:
        (directory / name).unlink(missing_ok=True)
    for name, content in files.items():
        cards.replace_file(directory / name, content)
    return directory


def _files_of(classifier: Classifier, card, **how: Any) -> dict[str, bytes]:
    """Returns what `save_classifier` writes, by name, in order, and refuses what it refuses."""
    from safetensors.numpy import save

    if not isinstance(classifier, Classifier):
        raise ValueError(
            f"this takes a Classifier, got a {type(classifier).__name__}; an encoder alone is "
            "written by save_encoder"
        )
    refuse_bridge(classifier, "saved")
    if isinstance(classifier.head, heads.Reordered):  # as it was before it was turned
        names = dict(zip(classifier.head.order, classifier.class_names, strict=True))
        ordered = [names[place] for place in range(classifier.num_classes)]
        classifier = heads.in_order_of(classifier, ordered)
    if ensembles.ensemble_members(classifier):
        return _files_of_ensemble(classifier, card, **how)
    arrays = cards.to_arrays(classifier.head_variables)
    cards.check_arrays(arrays, arrays, "the head to save")
    weights = save(arrays)
    record = {
        "schema": cards.SCHEMA,
        "head": _head_name(classifier),
        "num_classes": classifier.num_classes,
        **_names(classifier),
        "weights": cards.describe_file(HEAD_FILE, weights),
        "card": dict(card or {}),
    }
    encoder = native.files_of(classifier.encoder, card, **how)
    return {**encoder, HEAD_FILE: weights, CARD_FILE: cards.encode(record)}


def _names(classifier: Classifier) -> dict[str, list[str]]:
    return {"class_names": list(classifier.class_names)} if classifier.class_names else {}


def _head_name(classifier: Classifier) -> str:
    # Equal to a fresh one: an MLP of another width has the type, but not what the name rebuilds.
    for name, head in heads.HEADS.items():
        if classifier.head == head(classifier.num_classes):
            return name
    return type(classifier.head).__name__


def load_classifier(
    directory: str | os.PathLike,
    *,
    head: str | Callable[[int], nn.Module] | None = None,
    builder: str | Callable[..., Encoder] | None = None,
    preprocess: str | Callable[..., Any] | None = None,
) -> Classifier:
    """Reads a classifier and checks all of it; nothing that the files say is executed.

    Args:
      directory: What `save_classifier` wrote, or a fine-tuning stage's directory that holds it
        in ``classifier/``.
      head: ``head(num_classes) -> module``, for a head of your own, or its name,
        ``"module:function"``; of an ensemble, of every member.
      builder: For an encoder of your own, likewise; see `load_encoder`.
      preprocess: For an input transformation of your own, likewise.

    Returns:
      The classifier, bit-equal to the one that was saved.

    Raises:
      ValueError: If a card is not valid, or weights differ from their card or their network.
      FileNotFoundError: If the directory or one of its files is not there.
    """
    folder = _folder(directory)
    record = _read_card(folder)
    if record["head"] == _FUSION:
        return _load_ensemble(folder, record, head, builder, preprocess)
    encoder = native.load_encoder(folder.absolute(), builder=builder, preprocess=preprocess)
    make_head = _allowed_head(record["head"], folder) if head is None else resolve(head)
    module = make_head(record["num_classes"])
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, encoder.dim)))
    variables = cards.read_variables(folder, record["weights"], HEAD_FILE, like)
    cards.check_seal(record, folder / CARD_FILE)
    names = tuple(record.get("class_names", ()))
    return Classifier(encoder, variables, module, record["num_classes"], names)


def _files_of_ensemble(classifier: Classifier, card, **how: Any) -> dict[str, bytes]:
    encoder, temperature = classifier.encoder, classifier.head.temperature
    members = ensembles.ensemble_members(classifier)
    rebuilt = ensembles.confidence_ensemble(members, temperature=temperature)
    # Name and input transformation are written beside the members; all else must come from them.
    outer = rebuilt.encoder.replace(
        name=encoder.name, preprocess=encoder.preprocess, resizing=encoder.resizing
    )
    structure: Any = jax.tree.structure(rebuilt.replace(encoder=outer))
    if structure != jax.tree.structure(classifier):
        raise ValueError(
            "the ensemble is not one of its members any more (its encoder was replaced); save the "
            "members, or the ensemble as confidence_ensemble made it"
        )
    record = {
        "schema": cards.SCHEMA,
        "head": _FUSION,
        "num_classes": classifier.num_classes,
        **_names(classifier),
        "name": encoder.name,
        "members": len(members),
        "temperature": temperature,
        **cards.describe_preprocess(encoder.preprocess),
        **native.transform_entry(encoder),
        "card": dict(card or {}),
    }
    files = {
        f"{_MEMBERS}/{index}/{name}": content
        for index, member in enumerate(members)
        for name, content in _files_of(member, card, **how).items()
    }
    return {**files, CARD_FILE: cards.encode(record)}


def _load_ensemble(
    folder: pathlib.Path, record: Mapping[str, Any], head, builder, preprocess
) -> Classifier:
    load = functools.partial(load_classifier, head=head, builder=builder, preprocess=preprocess)
    members = [load(folder / _MEMBERS / str(index)) for index in range(record["members"])]
    where = folder / CARD_FILE
    try:
        ensemble = ensembles.confidence_ensemble(members, temperature=record["temperature"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if ensemble.num_classes != record["num_classes"]:
        raise ValueError(
            f"{where} says {record['num_classes']} classes, its members have {ensemble.num_classes}"
        )
    outer = cards.read_preprocess(record, where, preprocess)
    cards.check_seal(record, where)
    encoder = ensemble.encoder.replace(
        name=record["name"], preprocess=outer, resizing=transforms.of_saved(record, where)
    )
    return ensemble.replace(encoder=encoder)


def classifier_card(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns what ``classifier.json`` says, without reading any weights.

    Args:
      directory: As in `load_classifier`.

    Raises:
      ValueError: If the card is not valid.
      FileNotFoundError: If there is none.
    """
    return _read_card(_folder(directory))


def is_classifier(path: str | os.PathLike) -> bool:
    """Whether a path is a directory that `load_classifier` takes."""
    return (_folder(path) / CARD_FILE).is_file()


def encoder_record(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns the card of a classifier's encoder; of an ensemble its own, which has no other."""
    folder = _folder(directory)
    record = _read_card(folder)
    if record["head"] == _FUSION:
        cards.check_seal(record, folder / CARD_FILE)
        return record
    return native.encoder_card(folder.absolute())


def _folder(directory: str | os.PathLike) -> pathlib.Path:
    folder = disk.expanded(directory)
    inner = folder / "classifier"
    return inner if not (folder / CARD_FILE).is_file() and (inner / CARD_FILE).is_file() else folder


def _read_card(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / CARD_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"no classifier in {folder} (there is no {CARD_FILE}); give a directory that "
            "save_classifier wrote, or a finished recipe such as runs/gtsrb/recipes/gen_af-seed0"
        )
    record = cards.decode(cards.read_bytes(folder, CARD_FILE), file)
    kinds = {"schema": int, "head": str, "num_classes": int}
    if isinstance(record, dict) and record.get("head") == _FUSION:
        kinds |= {"name": str, "members": int, "temperature": float}
    else:
        kinds["weights"] = dict
    cards.check_card(record, kinds, file)
    _check_names(record, file)
    return record


def _check_names(record: Mapping[str, Any], file: pathlib.Path) -> None:
    if "class_names" not in record:  # of a classifier that was saved without
        return
    names = record["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: class_names must be a list of texts, got {names!r}")
    if len(names) != record["num_classes"]:
        raise ValueError(f"{file} has {record['num_classes']} classes and {len(names)} class_names")


def _allowed_head(name: str, folder: pathlib.Path) -> Callable[[int], nn.Module]:
    # A card names its head; only these names are ever looked up, whatever the card says.
    if name not in heads.HEADS:
        raise ValueError(
            f"{folder}/{CARD_FILE} has the head {name!r}, which is not one of "
            f"{sorted(heads.HEADS)}; pass the function that makes it as head=, or in a config "
            f'write {{"path": "{folder}", "head": "module:function"}}'
        )
    return heads.HEADS[name]
