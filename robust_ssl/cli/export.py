"""``robust-ssl encoder export``: an encoder, or a whole model, for other frameworks.

As in `main`, JAX is imported only once the arguments are understood.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from robust_ssl import disk, words
from robust_ssl.cli import provenance
from robust_ssl.cli.flags import DONE, add_command, add_debug

CARDS = ("encoder.json", "classifier.json", "manifest.json")  # beside them nothing is exported
_TARGETS = ("out", "torch", "onnx", "stablehlo")


def add_parser(actions: Any, examples: str) -> None:
    """Adds the command to those of ``robust-ssl encoder``."""
    text = "write an encoder or a whole model for PyTorch, ONNX or StableHLO"
    export = add_command(actions, "export", text, examples)
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


def run(arguments: argparse.Namespace) -> int:
    """Writes what ``robust-ssl encoder export`` was asked for and returns the exit code.

    Raises:
      ValueError: If an encoder, a classifier or a place cannot be used.
    """
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
    with _whole_or_nothing(places.values()):
        _write(arguments)
    return DONE


def _write(arguments: argparse.Namespace) -> None:
    from robust_ssl import weights

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


def _check_free(flag: str, place: pathlib.Path) -> None:
    """Raises ValueError if something is there: it may be what is exported, or a run's work."""
    if place.is_dir() and flag != "--torch":
        raise ValueError(f"{flag}={place} is a folder; name a file in it")
    # What a killed call was writing is seen by nobody, and in nobody's way.
    free = place.is_dir() and all(map(disk.is_partial, place.iterdir()))
    if place.exists() and not free:
        raise ValueError(f"{flag}={place} is there already; remove it, or name another place")
    disk.check_place(place / "model.py" if flag == "--torch" else place)
    if any((place.parent / card).exists() for card in CARDS):
        raise ValueError(f"{flag}={place} lies among an encoder's own files; name another folder")


@contextlib.contextmanager
def _whole_or_nothing(places: Iterable[str]) -> Iterator[None]:
    """Removes what the block wrote if it is left by an error or a signal.

    The same command then is not refused for what it has left itself.
    """
    targets = [pathlib.Path(place) for place in places]
    before = {file for place in targets for file in (place, *_written(place)) if file.exists()}
    try:
        yield
    except BaseException:
        for place in targets:
            for file in sorted(_written(place) - before):
                with contextlib.suppress(OSError):
                    file.unlink()
                    words.say(f"removed: {file}")
            if place not in before and place.is_dir():
                with contextlib.suppress(OSError):  # somebody else has put something there
                    place.rmdir()
        raise


def _written(place: pathlib.Path) -> set[pathlib.Path]:
    """Returns what lies in a folder, or a file with those that are named after it."""
    if place.is_dir():
        return set(place.iterdir())
    names = (place.name, f"{place.name}.", f".{place.name}.")
    near = place.parent.iterdir() if place.parent.is_dir() else ()
    return {file for file in near if file.name == names[0] or file.name.startswith(names[1:])}


def _export_whole(arguments: argparse.Namespace, model: Any, origins: tuple[str, ...]) -> None:
    """Writes a model with its head and its normalization, and says how exact it is."""
    from robust_ssl import weights

    for place, export in ((arguments.torch, weights.export_torch),
                          (arguments.onnx, weights.export_onnx)):  # fmt: skip
        if place:
            path, difference = export(model, place)
            exact = "not compared: torch is not installed"
            if difference is not None:
                exact = f"same outputs to {difference:.0e} of the largest"
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
