"""``robust-ssl audit``: may we use this encoder, what does securing it cost, what must we watch.

``init`` and ``decide`` never import JAX; ``run`` does once everything that was typed is understood.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from robust_ssl import disk, settings, stopping, words
from robust_ssl.audit import decision, document, files, gates, pages, summary
from robust_ssl.audit.answers import LANGUAGES, STAGES, template
from robust_ssl.cli import run as run_command
from robust_ssl.cli.flags import DONE, add_command, add_debug

_log = logging.getLogger(__name__)

_EXAMPLES = """\
examples:
  robust-ssl audit run --workdir=runs/audit
      the first page, of the digits that the package has: under five minutes on two cores

  robust-ssl audit init --lang=ja > answers.yaml
      the questions to a company, each with what it means

  robust-ssl audit run --encoder=simclr-cifar10-r18w24 --data=parts/ \\
      --answers=answers.yaml --stage=pilot --workdir=runs/parts
      your own images; the same command again goes on where it was

  robust-ssl audit decide runs/parts --stage=full
      another stage, other answers: in a second, without measuring again

Exit codes: 0 all gates of the stage pass, 1 one fails, 2 wrong usage, 3 not decidable (evidence is
missing, or an evaluation is not trusted), 75 stopped (run the same command again to go on)."""


def add_parser(commands: Any) -> None:
    """Adds the commands to argparse's `commands`."""
    text = "decide whether an encoder may be used: evidence, money, gates, pages to print"
    command = add_command(commands, "audit", text, _EXAMPLES)
    actions = command.add_subparsers(dest="action", required=True, metavar="init|run|decide")
    text = "print the questions that a company answers, a file to fill in"
    init = add_command(actions, "init", text, _EXAMPLES)
    init.add_argument("--lang", choices=LANGUAGES, default="en", help="of the explanations")
    add_debug(init)
    text = "attack, secure, measure, and decide; finished stages are skipped"
    _add_run(add_command(actions, "run", text, _EXAMPLES))
    text = "decide again on what was measured, in a second"
    decide = add_command(actions, "decide", text, _EXAMPLES)
    decide.set_defaults(decides=True)
    decide.add_argument("workdir", metavar="WORKDIR", help="of an `audit run`")
    _add_rules(decide)
    add_debug(decide)


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings over the config `audit`: suite.num_steps=300",
    )
    command.add_argument("--encoder", metavar="E", help="a shipped name, a directory or a file")
    command.add_argument(
        "--data",
        metavar="D",
        help="a data set, or a folder of images with a slash: parts/ (default: digits)",
    )
    command.add_argument(
        "--classifier", metavar="DIR", help="audit this classifier, made elsewhere, as secured"
    )
    command.add_argument("--lock", metavar="FILE", help="the encoder's encoder.lock.json")
    command.add_argument(
        "--workdir", required=True, metavar="DIR", help="where everything is written; made if new"
    )
    _add_rules(command)
    run_command.add_run_flags(command)
    add_debug(command)
    command.set_defaults(config=["audit"], many=False)


def _add_rules(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--answers",
        metavar="FILE",
        help="what `audit init` began (default: that of the last time in this directory)",
    )
    command.add_argument(
        "--policy", metavar="FILE", help="limits of your own (default: the last, or the shipped)"
    )
    command.add_argument(
        "--stage", choices=STAGES, help="of the roll-out (default: pilot, or the last)"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Does what ``robust-ssl audit`` was asked and returns its exit code.

    Raises:
      SettingsError: If a file or a flag cannot be used.
    """
    if arguments.action == "init":
        sys.stdout.write(template(arguments.lang))
        return DONE
    pages.check_installed()
    workdir = disk.expanded(disk.rooted(arguments.workdir))
    given = files.chosen(workdir, arguments.answers, arguments.policy)
    rules = decision.rules(given.policy, given.answers)
    if arguments.action == "decide":
        return _decide(workdir, arguments.stage, given, rules)
    return _run(arguments, overrides)


def _decide(workdir: pathlib.Path, stage: str | None, given: files.Given, rules: Any) -> int:
    whole = document.read_workdir(workdir)
    decided = decision.decide(whole, stage or _decided_stage(whole), *rules)
    # Before anything is written.
    pages.check_places(workdir)
    files.check_kept(workdir, given)
    files.keep(workdir, given)
    pages.write(workdir, decided)
    return _say(workdir)


def _last_stage(workdir: pathlib.Path) -> str:
    file = workdir / document.NAME
    if not file.is_file():
        return STAGES[0]
    try:
        return _decided_stage(document.read(file))
    except (document.AuditFileError, OSError) as error:  # it is about to be written anew
        _log.warning(
            "the stage of the last time is not known (%s); this is for the %s, if --stage names no "
            "other",
            *(error, STAGES[0]),
        )
        return STAGES[0]


def _decided_stage(whole: Mapping[str, Any]) -> str:
    return (whole["decided"] or {"stage": STAGES[0]})["stage"]


def _say(workdir: pathlib.Path) -> int:
    """Prints the decision and returns its exit code."""
    for line in summary.lines(workdir):
        words.say(line, sys.stdout, margin="")
    return gates.EXIT_CODES[document.read(workdir / document.NAME)["decided"]["outcome"]]


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from robust_ssl.workdir import workdir_path  # it imports JAX

    workdir = workdir_path(disk.rooted(arguments.workdir))  # of what was typed: "" is no "."
    config = _config(arguments, overrides)
    several = run_command.check_cluster(arguments)
    with stopping.stop_on_signals(several, arguments.ends_process) as install:
        layout = run_command.started(arguments, several, install)
        from robust_ssl import experiment

        experiment.run(config, workdir, parallel=layout)
    whole = document.read(workdir / document.NAME)
    return gates.EXIT_CODES[whole["decided"]["outcome"]]


def _config(arguments: argparse.Namespace, overrides: list[str]) -> Any:
    """Returns the config `audit` with what was typed.

    Paths are set in it, not given as its arguments: they may have commas.
    """
    asked = [name for name in ("data", "classifier") if getattr(arguments, name)]
    config = settings.load_config("audit:" + ",".join(f"{name}=given" for name in asked), overrides)
    if arguments.encoder:
        config.encoder.path = arguments.encoder  # what was typed of it besides stays
    if arguments.data:
        config.downstream.source = _source(arguments.data)
    if arguments.classifier:
        config.classifiers.secured.path = arguments.classifier
    for name in ("answers", "policy", "lock"):
        if getattr(arguments, name):
            config.audit[name] = getattr(arguments, name)
    if arguments.stage or not any(o.startswith("--config.audit.stage=") for o in overrides):
        config.audit.stage = arguments.stage or _last_stage(disk.expanded(arguments.workdir))
    config.audit.command = _typed(arguments, overrides)
    return config


def _source(data: str) -> str:
    """Returns what was typed for data as a config takes it, in which a folder begins with a dot.

    Example:
      >>> _source("parts/"), _source("cifar10"), _source("/data/parts"), _source("./parts/")
      ('./parts/', 'cifar10', '/data/parts', './parts/')
    """
    has_slash = data.endswith("/") or ("/" in data and pathlib.Path(data).is_dir())
    return f"./{data}" if has_slash and not data.startswith(("/", ".", "~")) else data


def _typed(arguments: argparse.Namespace, overrides: list[str]) -> str:
    """Returns the command that does the same again, as a shell takes it."""
    names = ("encoder", "data", "classifier", "lock", "answers", "policy", "stage", "workdir")
    flags = [f"--{name}={value}" for name in names if (value := getattr(arguments, name))]
    typed = [override.removeprefix("--config.") for override in overrides]
    return shlex.join(["robust-ssl", "audit", "run", *flags, *typed])
