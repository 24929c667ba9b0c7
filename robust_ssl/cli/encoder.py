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

from robust_ssl import disk, settings, words
from robust_ssl.cli import export, provenance
from robust_ssl.cli.flags import DONE, USAGE, add_command, add_debug, reason

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
    export.add_parser(actions, _EXAMPLES)


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
        raise settings.SettingsError(reason(error)) from error


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
    """Returns what an encoder of this package says of itself: its page, or else its card.

    Raises:
      ValueError: If it has weights, and they are not those that the card describes.
    """
    from robust_ssl import weights
    from robust_ssl.weights import cards, native

    card = weights.encoder_card(name_or_path)
    folder = importlib.resources.files("robust_ssl.zoo").joinpath(name_or_path)
    if name_or_path not in weights.list_encoders():
        folder = pathlib.Path(name_or_path)
    if folder.joinpath(native.WEIGHTS_FILE).is_file():
        # Of what loading would refuse the card says nothing.
        cards.read_described(folder, card["weights"], native.WEIGHTS_FILE)
    else:
        words.say(f"{folder} has no {native.WEIGHTS_FILE}: this is its card alone")
    page = folder.joinpath("README.md")
    text = page.read_text(encoding="utf-8") if page.is_file() else json.dumps(card, indent=2)
    from robust_ssl.api.names import describe_encoder

    return f"{card['name']}: {describe_encoder(card)}\n\n{text.rstrip()}"


def _convert(arguments: argparse.Namespace) -> int:
    from robust_ssl import weights
    from robust_ssl.weights import native

    for name in (native.CARD_FILE, native.WEIGHTS_FILE):
        disk.check_place(pathlib.Path(arguments.out, name))  # before seconds of work
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
    there = [card for card in export.CARDS if (place / card).exists()]
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


def _lock(arguments: argparse.Namespace) -> int:
    return provenance.lock(arguments, _named(arguments))


_ACTIONS = {
    "inspect": _inspect,
    "convert": _convert,
    "export": export.run,
    "lock": _lock,
    "verify": provenance.verify,
}
