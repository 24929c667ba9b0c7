"""``robust-ssl inspect``: whether a deployed classifier still is what was approved."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from robust_ssl import disk, settings, words
from robust_ssl.cli.flags import (
    DONE,
    FAILED,
    MISSING,
    add_command,
    add_debug,
    add_own,
    fraction,
    own_of,
    reason,
)

_EXAMPLES = """\
examples:
  robust-ssl inspect runs/gen_af/recipes/gen_af-seed0 --make-baseline baselines/gen_af \\
      --data gtsrb --perturbation runs/gen_af/attack/advencoder-eps10-seed0.npz
      once, when it is approved: a lock, images with its answers, perturbations, figures

  robust-ssl inspect runs/gen_af/recipes/gen_af-seed0 --baseline baselines/gen_af --images new/
      every month: nine checks, one line, a history with a trend

Exit codes: 0 it is what was approved, 1 something has changed, 2 wrong usage, 3 evidence is missing
(no new image in --images, for example)."""

# Of the one way or the other: what would be passed over is refused.
_INSPECTING, _MAKING = ("images", "out", "junit"), ("data", "perturbation", "epsilon")
_EXIT = {"pass": DONE, "fail": FAILED, "missing": MISSING}
_MOST = 256  # new pictures that are read, drawn at random


def add_parser(commands: Any) -> None:
    """Adds the command to argparse's `commands`."""
    command = add_command(
        commands, "inspect", "compare a deployed classifier with what was approved", _EXAMPLES
    )
    command.set_defaults(decides=True)
    command.add_argument(
        "model", metavar="MODEL", help="the directory of a saved classifier, or a finished recipe's"
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--baseline", metavar="DIR", help="what it is compared with")
    what.add_argument("--make-baseline", metavar="DIR", help="write a baseline, from --data")
    inspecting = command.add_argument_group("inspecting")
    inspecting.add_argument(
        "--images", metavar="DIR", help="new pictures without labels, in folders or not"
    )
    inspecting.add_argument(
        "--out", metavar="DIR", help="results and history (default: inspections/ of the baseline)"
    )
    inspecting.add_argument("--junit", metavar="FILE", help="JUnit XML there too")
    making = command.add_argument_group("making a baseline")
    making.add_argument(
        "--data",
        metavar="DATA",
        help="images with labels that it was not trained on: a name, a folder, or a function",
    )
    making.add_argument("--split", default="test", help="of the data (default: test)")
    making.add_argument(
        "--perturbation",
        action="append",
        default=[],
        metavar="FILE",
        help="a fitted perturbation, .npz, whose effect is replayed; may be given many times",
    )
    making.add_argument(
        "--epsilon",
        type=fraction,
        metavar="X",
        help="budget of the short fits, 8/255 (default: that of the perturbations)",
    )
    command.add_argument("--seed", type=_seed, metavar="N", help="(default: another each time)")
    add_own(command)
    add_debug(command)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"a seed is a whole number below 2**31, got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Inspects, or makes a baseline, and returns the exit code.

    Raises:
      SettingsError: If the model, the baseline, the data or a flag cannot be used.
    """
    others, way = (_INSPECTING, "make-") if arguments.make_baseline else (_MAKING, "")
    wrong = [f"--{name}" for name in others if getattr(arguments, name)]
    if wrong:
        raise settings.SettingsError(f"{', '.join(wrong)} cannot stand beside --{way}baseline")
    from robust_ssl import xla

    try:
        with xla.cache_in(None):
            return _make(arguments) if arguments.make_baseline else _inspect(arguments)
    except (ValueError, OSError, ModuleNotFoundError) as error:  # 1 is an answer here
        raise settings.SettingsError(reason(error)) from error


def _make(arguments: argparse.Namespace) -> int:
    if not arguments.data:
        raise ValueError("--make-baseline needs --data: images with labels of the task")
    disk.check_place(pathlib.Path(arguments.make_baseline, "baseline.json"))
    import numpy as np

    from robust_ssl import data, inspection, weights
    from robust_ssl.api.names import BUILTIN
    from robust_ssl.attacks import UniversalPerturbation

    classifier = weights.load_classifier(arguments.model, **own_of(arguments))
    size = classifier.encoder.image_size
    source = BUILTIN.get(arguments.data, arguments.data)
    if pathlib.Path(source).is_dir():
        source = pathlib.Path(source)
    options = {"image_size": size, "resizing": classifier.encoder.resizing}
    examples = data.load(source, split=arguments.split, limit=512, **options)
    if examples.labels is None:
        raise ValueError(f"{arguments.data} has no labels, and accuracy is a part of a baseline")
    stored = []
    for path in map(pathlib.Path, arguments.perturbation):
        stored.append(UniversalPerturbation.load(path).resized(size).replace(name=path.stem))
    labels = inspection.in_order_of_logits(classifier, examples.labels, examples.class_names)
    batch = examples.read(np.arange(len(examples)))["images"]
    made = inspection.baseline(
        arguments.model,
        batch,
        labels,
        stored,
        arguments.make_baseline,
        epsilon=arguments.epsilon,
        seed=arguments.seed or 0,
        **own_of(arguments),
    )
    figures = made.record["figures"]
    under = ", ".join(f"{100 * share:.1f} % {name}" for name, share in figures["under"].items())
    words.say(f"written: {made.folder}")
    words.say(f"accuracy {100 * figures['accuracy']:.1f} %; under {under}", sys.stdout)
    return DONE


def _inspect(arguments: argparse.Namespace) -> int:
    from robust_ssl import inspection, provenance
    from robust_ssl.inspection.record import HISTORY, JSON, JUNIT

    baseline = inspection.read_baseline(arguments.baseline)
    out = pathlib.Path(arguments.out) if arguments.out else baseline.folder / "inspections"
    for name in (JSON, HISTORY, JUNIT):  # before a picture is looked at
        disk.check_place(out / name)
    if arguments.junit:
        disk.check_place(arguments.junit)
    if not pathlib.Path(arguments.model).is_dir():
        raise FileNotFoundError(f"{arguments.model} is no directory of a saved classifier")
    images, broken = None, []
    if arguments.images:
        images, broken = _pictures(pathlib.Path(arguments.images), baseline)
    note = f"; {len(broken)} cannot be read, {broken[0]} first" if broken else ""
    result = inspection.inspect(
        arguments.model,
        baseline,
        images,
        seed=arguments.seed,
        note=note,
        unreadable=len(broken),
        **own_of(arguments),
    )
    words.say(provenance.show(result.checks), sys.stdout, margin="")
    inspection.record(result, out)
    if arguments.junit:
        from robust_ssl.workdir import write_atomically

        write_atomically(pathlib.Path(arguments.junit), inspection.as_junit(result))
    words.say(f"\n{result}; written: {out}", sys.stdout, margin="")
    return _EXIT[result.verdict]


def _pictures(folder: pathlib.Path, baseline: Any) -> tuple[Any, list[str]]:
    """Returns new pictures, uint8 ``[n, size, size, 3]``, and names of those that are broken."""
    import numpy as np

    from robust_ssl.data import pictures

    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder} is no folder")
    files = [file for file in sorted(folder.rglob("*")) if pictures.looks_like_one(file)]
    size = baseline.record["image_size"]
    order = np.random.default_rng(len(files)).permutation(len(files))[:_MOST]
    images, broken = [], []
    for place in sorted(order):
        try:
            images.append(pictures.decode(files[place], size, str(files[place]), baseline.resizing))
        except (ValueError, OSError):
            broken.append(files[place].name)  # one bad picture is no reason to inspect nothing
    stacked = np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)
    return stacked, broken
