"""``robust-ssl describe`` and ``check``: what a config says and takes, without running it."""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import disk, settings, words
from robust_ssl.cli import run as running
from robust_ssl.cli.flags import DONE, add_command, add_config

_EXAMPLES = """\
examples:
  robust-ssl describe quickstart
      every setting and what the functions it names are for

  robust-ssl check gen_af:downstream=cifar10 common.epochs=5
      reads the data, traces every step, says what each recipe takes; writes nothing

  robust-ssl check mine.py --workdir=runs/mine
      the same, and whether config and images still fit what is done there"""

_PER_IMAGE = (
    "gradients: evaluations per training image, of the attack and of the updates together; time "
    "goes with them"
)


def add_parser(commands: Any) -> None:
    """Adds the commands to argparse's `commands`."""
    text = "print a config's settings and what the functions in it do"
    add_config(add_command(commands, "describe", text, _EXAMPLES))
    text = "read a config's data and trace its steps, and say what they take; writes nothing"
    check = add_command(commands, "check", text, _EXAMPLES)
    add_config(check)
    check.add_argument("--workdir", metavar="DIR", help="compare with what is done there")
    check.add_argument(
        "--memory",
        action="store_true",
        help="compile each recipe's step to say what memory it plans (some seconds each)",
    )
    check.add_argument(
        "--devices", type=int, metavar="N", help="how many devices to use (default: all)"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints what was asked and returns the exit code."""
    given = None if arguments.command == "describe" else arguments.workdir
    given = None if given is None else disk.rooted(given)  # a config may change the directory
    config = settings.load_config(arguments.config, overrides)
    if arguments.command == "describe":
        from robust_ssl import experiment

        words.say(experiment.describe(config), sys.stdout, margin="")
        return DONE
    layout = running.devices(arguments.devices)
    from robust_ssl import experiment, progress
    from robust_ssl.workdir import workdir_path

    planned = experiment.plan(config)
    with tempfile.TemporaryDirectory() as nowhere:
        workdir = pathlib.Path(nowhere) if given is None else workdir_path(given)
        context = experiment.Context(planned, workdir, layout, progress.Progress())
        experiment.check(context)
        words.say("\n\n".join(_parts(context, arguments.memory)), sys.stdout, margin="")
        new = "" if workdir.exists() else f"; nothing is in {workdir} yet"
    print(f"\nnothing was found wrong, and nothing was written{new}")
    return DONE


def _parts(context: Any, memory: bool) -> list[str]:
    """What a run takes, as paragraphs and tables."""
    from robust_ssl.experiment import forecast

    planned = context.plan
    stages = {*planned.stages}
    parts = [f"stages: {', '.join(planned.stages)}; devices: {len(context.parallel.devices)}"]
    if "pretrain" in stages:
        parts.append(_pretraining(context))
        if planned.encoder.is_pretrained:
            return parts  # the other steps are traced once the encoder is there
    if stages - {"pretrain"}:
        parts.append(_images(context))
    if planned.suite is not None and stages - {"pretrain", "train"}:
        parts.append(_table([_fit_row(fit) for fit in forecast.fits(context)]))
    fitted = {"train", "score", "screen", "compare", "audit", "sweep", "analyze"}
    if planned.recipes and stages & fitted:
        rows = [_row(one, memory) for one in forecast.forecasts(context, memory=memory)]
        seeds = len(planned.training.seeds)
        times = f"; each is made {seeds} times, once a seed" if seeds > 1 else ""
        parts += [_table(rows), _PER_IMAGE + times]
    if forecast.can_be_told(context):
        parts.append(forecast.line(context))
    return parts


def _pretraining(context: Any) -> str:
    from robust_ssl import data

    section = context.plan.pretrain
    images = len(context.load(section.data, "train"))
    steps = section.epochs * data.steps_per_epoch(images, section.batch_size)
    return f"pretrain: {images:,} images, {section.epochs} epochs, {steps:,} steps"


def _images(context: Any) -> str:
    planned, lines = context.plan, []
    if planned.surrogate is not None:
        lines.append(f"the attacker's images: {len(context.surrogate):,}")
    if planned.downstream is not None:
        train, validation = context.downstream
        lines.append(
            f"the defender's images: {len(train):,} to train, {len(validation):,} to validate, "
            f"{len(context.test):,} to test, in {context.num_classes} classes"
        )
    return "\n".join(lines)


def _fit_row(fit: Any) -> dict[str, str]:
    return {
        "attack": fit.name,
        "steps": f"{fit.steps:,}",
        "perturbations": str(fit.members),
        "gradients of each": f"{fit.gradients:,}",
    }


def _row(one: Any, memory: bool) -> dict[str, str]:
    trained = "chosen on the way" if one.trained is None else f"{one.trained:,}"
    planned = {"step memory": _megabytes(one.step_bytes)} if memory else {}
    return {
        "recipe": one.name,
        "starts from": one.start or "the encoder",
        "epochs": str(one.epochs),
        "steps": f"{one.steps:,}",
        "trained": f"{trained} of {one.parameters:,}",
        "gradients": f"{one.gradients:,}",
        "state memory": _megabytes(one.state_bytes),
        **planned,
    }


def _megabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:,.1f} MB"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Aligns cells in columns: numbers to the right, others to the left."""
    columns = []
    for name in rows[0]:
        cells = [name, *(row[name] for row in rows)]
        width = max(map(len, cells))
        numbers = all(cell[:1].isdigit() for cell in cells[1:])
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
