"""``robust-ssl encoder``: inspect, convert, export, lock and verify weights.

As in `main`, JAX is imported only once the arguments are understood.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from robust_ssl import settings, words
from robust_ssl.cli import provenance
from robust_ssl.cli.flags import DONE, USAGE, add_command, add_debug

_EXAMPLES = """\
examples:
  robust-ssl encoder inspect simclr-cifar10-r18w24
      the card of a shipped encoder

  robust-ssl encoder inspect resnet18.pth
      what the file holds, and what must be named before it can be converted

  robust-ssl encoder convert byol-cifar10.ckpt --out encoders/byol \\
      --normalization cifar10 --image-size 32
      then `config.encoder.path` is "encoders/byol"; a foreign file does too, with
      --config.encoder.normalization=cifar10 and --config.encoder.image_size=32 beside it

  robust-ssl encoder export encoders/byol --out secured.safetensors \\
      --classifier runs/gen_af/recipes/gen_af-seed0
      the encoder that a run has secured, under torchvision's or timm's names

  robust-ssl encoder export simclr-cifar10-r18w24 --torch secured --onnx secured.onnx \\
      --classifier runs/quickstart/recipes/gen_af-seed0
      the whole model that a run has secured: secured/model.py loads it without this package

Nothing in a file is executed.  Exit codes: 0 done (inspect: it can be converted like this),
2 wrong usage or a file that cannot be used."""


def add_parser(commands: Any) -> None:
    """Adds the command to argparse's `commands`."""
    command = add_command(
        commands, "encoder", "inspect, convert, export, lock and verify encoders", _EXAMPLES
    )
    actions = command.add_subparsers(
        dest="action", required=True, metavar="inspect | convert | export | lock | verify"
    )
    # Inspecting and converting take the same file and the same names for what it does not tell.
    text = "say what a file of weights holds and whether it can be converted"
    inspect = add_command(actions, "inspect", text, _EXAMPLES)
    text = "write a foreign encoder as this package has it"
    convert = add_command(actions, "convert", text, _EXAMPLES)
    for action in (inspect, convert):
        action.add_argument(
            "file",
            metavar="FILE",
            help="safetensors, PyTorch .pth, .pt, .ckpt or .bin, or a folder of one with its JSON; "
            "hf://owner/name@<commit>"
            + ("; or a shipped encoder's name" if action is inspect else ""),
        )
        _add_names(action)
        add_debug(action)
    convert.add_argument("--out", required=True, metavar="DIR", help="the encoder's new directory")
    convert.add_argument("--name", help="for tables and manifests (default: the file's)")
    provenance.add_parsers(actions, _add_names)
    text = "write an encoder or a whole model for PyTorch, ONNX or StableHLO"
    export = add_command(actions, "export", text, _EXAMPLES)
    add_debug(export)
    export.add_argument(
        "encoder", metavar="NAME_OR_DIR", help="a shipped encoder, or a directory of one"
    )
    export.add_argument(
        "--classifier",
        metavar="DIR",
        help="a finished recipe of a run that started from this encoder, such as "
        "runs/gen_af/recipes/gen_af-seed0: its weights, and its head for all but --out",
    )
    export.add_argument(
        "--out", metavar="FILE", help="safetensors with torchvision's names (ResNet), timm's (ViT)"
    )
    export.add_argument(
        "--torch",
        metavar="DIR",
        help="model.safetensors and a model.py that loads it: encoder, head and normalization",
    )
    export.add_argument(
        "--onnx", metavar="FILE", help="the same as one ONNX file, compared by onnxruntime"
    )
    export.add_argument(
        "--stablehlo",
        metavar="FILE",
        help="one program for CPU, CUDA and TPU, weights and normalization inside",
    )
    export.add_argument(
        "--batch", type=int, metavar="N", help="images per call of the program (default: any)"
    )


def _add_names(command: argparse.ArgumentParser) -> None:
    """Flags for what a file may not tell."""
    where = command.add_argument_group("where the weights are")
    where.add_argument("--layout", help="how the tensors are called (default: found out)")
    where.add_argument(
        "--allow-moving",
        action="store_true",
        default=None,
        help="of the hub: take a branch or a tag, whose files may change, in place of a commit",
    )
    where.add_argument("--under", metavar="KEY", help="which entry of the file holds them")
    where.add_argument(
        "--reader",
        choices=("safe", "torch"),
        help="of PyTorch files: this package's own (default), or torch.load(weights_only=True)",
    )
    where.add_argument(
        "--prefix", metavar="NAME", help="what the encoder's names begin with (default: found out)"
    )
    where.add_argument(
        "--drop", action="append", metavar="PART", help="leave out a part; may be given many times"
    )
    where.add_argument(
        "--inert",
        action="append",
        metavar="NAME",
        help="pass over a harmless name in a pickle, module.name; never imported",
    )
    images = command.add_argument_group(
        "images", "a part of the encoder; needed where no file beside the weights says it"
    )
    images.add_argument(
        "--normalization",
        metavar="NAME",
        help="imagenet, cifar10, cifar100, clip, half ([-1, 1]) or none ([0, 1])",
    )
    images.add_argument("--mean", type=_three, metavar="R,G,B", help="of pixels in [0, 1]")
    images.add_argument("--std", type=_three, metavar="R,G,B", help="of pixels in [0, 1]")
    images.add_argument("--image-size", type=int, metavar="N", help="height and width, pixels")
    images.add_argument("--channels", choices=("rgb", "bgr"), help="the order of colors")
    network = command.add_argument_group("network", "what weights do not tell")
    network.add_argument("--variant", metavar="plain", help="of a ResNet whose name says otherwise")
    network.add_argument("--stem", help="of a ResNet: cifar, cifar_half or imagenet")
    network.add_argument("--stem-padding", type=int, metavar="N", help="zeros around the image")
    network.add_argument("--heads", type=int, metavar="N", help="attention heads of a ViT")
    network.add_argument("--pooling", help="of a ViT: token or mean")
    network.add_argument("--activation", help="of a ViT: gelu or quick_gelu")
    network.add_argument(
        "--norm-epsilon", type=float, metavar="X", help="of a ViT's or a ConvNeXt's norms"
    )
    network.add_argument(
        "--rotary-reference", type=int, metavar="N", help="of EVA-02: patches a side it counts by"
    )
    network.add_argument(
        "--position-resizing",
        metavar="NAME",
        help="of a ViT, with --image-size: bicubic, antialias, offset or corners",
    )


def _three(text: str) -> tuple[float, ...]:
    try:
        return tuple(settings.parse_fraction(part.strip()) for part in text.split(","))
    except settings.SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Does what ``robust-ssl encoder`` was asked and returns its exit code.

    Raises:
      SettingsError: If a file or a flag cannot be used.
    """
    from robust_ssl import xla

    # Little is compiled here, and JAX would read any directory that the environment names.
    with _as_usage(), xla.cache_in(None):
        return _ACTIONS[arguments.action](arguments)


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    # What can be mended by naming something is one line and exit code 2; a traceback helps nobody.
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise settings.SettingsError(str(error)) from error


def _named(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = ("layout", "under", "reader", "normalization", "mean", "std", "image_size")
    keys += ("inert", "prefix", "drop", "channels", "stem", "stem_padding", "variant", "heads")
    keys += ("pooling", "activation", "norm_epsilon", "position_resizing", "rotary_reference")
    keys += ("allow_moving",)
    return {key: getattr(arguments, key) for key in keys}


def _inspect(arguments: argparse.Namespace) -> int:
    from robust_ssl import weights
    from robust_ssl.weights import hub

    _, arguments.file = hub.located(arguments.file, arguments.allow_moving)
    arguments.allow_moving = None
    path = pathlib.Path(arguments.file)
    # One word is a name, if a misspelt one; resnet18.pth is a file that is not there.
    if not weights.is_foreign(path) and (path.exists() or not path.suffix):
        print(_card(arguments.file))
        return DONE
    inspection = weights.inspect_file(arguments.file, **_named(arguments))
    words.say(inspection, sys.stdout, margin="")
    return USAGE if inspection.problems else DONE


def _card(name_or_path: str) -> str:
    """Returns what an encoder of this package says of itself: its page, or else its card."""
    from robust_ssl import weights

    card = weights.encoder_card(name_or_path)
    folder = importlib.resources.files("robust_ssl.zoo").joinpath(name_or_path)
    if name_or_path not in weights.list_encoders():
        folder = pathlib.Path(name_or_path)
    page = folder.joinpath("README.md")
    text = page.read_text(encoding="utf-8") if page.is_file() else json.dumps(card, indent=2)
    from robust_ssl.api.names import describe_encoder

    return f"{card['name']}: {describe_encoder(card)}\n\n{text.rstrip()}"


def _convert(arguments: argparse.Namespace) -> int:
    from robust_ssl import weights

    _check_same(arguments)
    place = weights.convert_encoder(
        arguments.file, arguments.out, name=arguments.name, **_named(arguments)
    )
    words.say(f"written: {place}")
    provenance.write_beside(place)
    return DONE


def _check_same(arguments: argparse.Namespace) -> None:
    """Raises ValueError if another encoder is there; one of the same file is made again."""
    from robust_ssl import weights
    from robust_ssl.weights import hub

    place = pathlib.Path(arguments.out)
    there = [card for card in _CARDS if (place / card).exists()]
    if not there:
        return
    made_from = {}
    if there == ["encoder.json"]:
        made_from = (weights.encoder_card(place)["card"] or {}).get("imported_from", {})
    address, file = hub.located(arguments.file, arguments.allow_moving or False)
    if address:
        same = made_from.get("source") == str(address)
    else:
        before = made_from.get("sha256")
        named = _named(arguments)
        same = before is not None and weights.inspect_file(file, **named).file.sha256 == before
    if not same:
        raise ValueError(
            f"--out={place} holds something else already ({', '.join(there)}); remove it, or name "
            "another directory"
        )


def _export(arguments: argparse.Namespace) -> int:
    places = {f"--{name}": getattr(arguments, name) for name in _TARGETS}
    places = {flag: place for flag, place in places.items() if place}
    if not places:
        raise ValueError(
            "say where to: --out FILE.safetensors, --torch DIR, --onnx FILE or --stablehlo FILE"
        )
    if arguments.batch is not None and arguments.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {arguments.batch}")
    # One would replace the other without a word.
    if len({pathlib.Path(place).absolute() for place in places.values()}) < len(places):
        raise ValueError(f"{' and '.join(places)} name one place")
    for flag, place in places.items():
        _check_free(flag, pathlib.Path(place))
    from robust_ssl import weights
    from robust_ssl.weights import torch_export

    if arguments.onnx:  # before another target is written
        torch_export.check_onnx()
    # Of a finished recipe it is the classifier's, as elsewhere.
    trained = pathlib.Path(arguments.encoder) / "classifier"
    if (trained / "encoder.json").is_file():
        arguments.encoder = str(trained)
    # Exported from our own format only, where normalization and image size are known.
    if weights.is_foreign(arguments.encoder):
        raise ValueError(
            f"{arguments.encoder} is a foreign file; first: robust-ssl encoder convert "
            f"{arguments.encoder} --out DIR"
        )
    encoder = weights.load_encoder(arguments.encoder)
    origins = tuple(filter(None, (arguments.encoder, arguments.classifier)))
    model = _fine_tuned(encoder, arguments.classifier) if arguments.classifier else encoder
    if arguments.out:
        # PyTorch's layouts have no place for our heads.
        only = model.encoder if arguments.classifier else encoder
        file = weights.export_safetensors(only, arguments.out)
        words.say(f"written: {file}")
        provenance.write_beside(file, made_from=origins)
    _export_whole(arguments, model, origins)
    if arguments.stablehlo:
        file = weights.export_stablehlo(model, arguments.stablehlo, batch=arguments.batch)
        words.say(f"written: {file}")
        provenance.write_beside(file, made_from=origins)
    return DONE


def _check_free(flag: str, place: pathlib.Path) -> None:
    """Raises ValueError if something is there: it may be what is exported, or a run's work."""
    if place.is_dir() and flag != "--torch":
        raise ValueError(f"{flag}={place} is a folder; name a file in it")
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ValueError(f"{flag}={place} is there already; remove it, or name another place")
    if any((place.parent / card).exists() for card in _CARDS):
        raise ValueError(f"{flag}={place} lies among an encoder's own files; name another folder")


def _export_whole(arguments: argparse.Namespace, model: Any, origins: tuple[str, ...]) -> None:
    """Writes a model with its head and its normalization, and says how exact it is."""
    from robust_ssl import weights

    for place, export in ((arguments.torch, weights.export_torch),
                          (arguments.onnx, weights.export_onnx)):  # fmt: skip
        if place:
            path, difference = export(model, place)
            exact = f"same outputs to {difference:.0e} of the largest"
            if difference is None:
                exact = "not compared: torch is not installed"
            words.say(f"written: {path} ({exact})")
            provenance.write_beside(path, made_from=origins)


def _fine_tuned(encoder, directory: str):
    """The classifier in a directory, which must be built on this encoder."""
    import jax

    from robust_ssl import weights

    classifier = weights.load_classifier(directory)
    # Compared whole: one built on another encoder could fit in its head alone.
    expected, stored = (
        jax.tree.map(jax.numpy.shape, dict(part.variables))
        for part in (encoder, classifier.encoder)
    )
    if expected != stored:
        raise ValueError(f"{directory} was not fine-tuned from this encoder: the shapes differ")
    return classifier


def _lock(arguments: argparse.Namespace) -> int:
    return provenance.lock(arguments, _named(arguments))


_CARDS = ("encoder.json", "classifier.json", "manifest.json")  # beside them nothing is exported
_TARGETS = ("out", "torch", "onnx", "stablehlo")
_ACTIONS = {
    "inspect": _inspect,
    "convert": _convert,
    "export": _export,
    "lock": _lock,
    "verify": provenance.verify,
}
