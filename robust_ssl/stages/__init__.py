"""The story of a run: pretrain, attack, finetune, sensitivity, evaluate; or a protocol.

``run(config, workdir)`` is what the command line, a notebook and a test call.  A finished stage is
skipped, an unfinished one goes on.  Everything a config can get wrong is found before the first
step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from robust_ssl import checkpoints, data, report, settings
from robust_ssl.build import resolve
from robust_ssl.parallel import Parallel, shared_programs
from robust_ssl.progress import Progress
from robust_ssl.settings import describe
from robust_ssl.stages import analyze as analyze_stage
from robust_ssl.stages import attack as attack_stage
from robust_ssl.stages import compare as compare_stage
from robust_ssl.stages import evaluate as evaluate_stage
from robust_ssl.stages import finetune as finetune_stages
from robust_ssl.stages import fitting, methods
from robust_ssl.stages import pretrain as pretrain_stage
from robust_ssl.stages import protocol as protocol_stage
from robust_ssl.stages import sweep as sweep_stage
from robust_ssl.stages.run import Run, UsageError, build_encoder

__all__ = ["STAGES", "Run", "UsageError", "check", "describe", "run"]

_log = logging.getLogger(__name__)

STAGES = {
    "pretrain": pretrain_stage.pretrain,
    "attack": attack_stage.attack,
    "usual": finetune_stages.usual,
    "stage1": finetune_stages.stage1,
    "sensitivity": finetune_stages.sensitivity,
    "stage2": finetune_stages.stage2,
    "evaluate": evaluate_stage.evaluate,
    "defend": methods.defend,
    "analyze": analyze_stage.analyze,
    "protocol": protocol_stage.protocol,
    "compare": compare_stage.compare,
    "sweep": sweep_stage.sweep,
}


# What is printed at the end, of the last of these stages that was run.
_PAGES = {"compare": "comparison.md", "sweep": "sweep.md", "protocol": "leaderboard.md"}


def run(
    config: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    parallel: Parallel | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs the stages that ``config.stages`` names, in order.

    Args:
      config: Resolved configuration, a mapping or an ``ml_collections.ConfigDict``.
      workdir: Where each stage has its directory; made if it does not exist.
      parallel: The devices; None is `pmap` over all of them.
      progress: How to report; None is a bar on a terminal and lines elsewhere.

    Returns:
      Stage name to its results; for a run with an `evaluate` stage ``results.json`` holds the
      same under its contract.

    Raises:
      UsageError: If the config, or the data it names, cannot be used.  Nothing has been run.
      checkpoints.ConfigChangedError: If the workdir holds the work of another config.
      checkpoints.WorkdirError: If the workdir cannot be written.
      progress.Stopped: If a stop was asked for; run again to go on.
    """
    workdir = checkpoints.make_directory(workdir)
    whole = Run(
        config=settings.to_json(config),
        workdir=pathlib.Path(workdir),
        parallel=parallel or Parallel.create(),
        progress=progress or Progress(),
    )
    check(whole)
    results = {}
    with shared_programs():
        for name in whole.config["stages"]:
            stage = STAGES[name](whole)
            results[name] = stage.results
            _log.info("%s: done (%.0f s) in %s", name, stage.manifest["seconds"], stage.path)
    if jax.process_index() == 0:
        if "evaluate" in results:
            _print_table(whole)
        for name, page in _PAGES.items():
            if name in results:
                print((whole.workdir / page).read_text(encoding="utf-8"))
                break
    return results


def _print_table(run: Run) -> None:
    """Prints what the public encoder's perturbations do; the report has everything else."""
    document = report.read_results(run.workdir / "results.json")
    epsilon = run.config["attack"]["epsilon"]
    shown = [
        entry
        for entry in document["results"]
        if (entry["crafted_against"], entry["epsilon"]) == ("public", epsilon)
    ]
    report.print_table(shown, document["run"]["costs"])
    for line in [*report.conclusions(document["results"]), *report.verdict_lines(document)]:
        print(line)
    print(f"every attack, crafted again on each model too: {run.workdir / 'report.md'}")


def check(run: Run) -> None:
    """Builds everything a run needs, without a step of it.

    Raises:
      UsageError: With what is wrong, where in the config, and what to do.
    """
    try:
        _check(run)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
        if isinstance(error, checkpoints.ConfigChangedError | checkpoints.WorkdirError):
            raise
        missing = isinstance(error, KeyError)
        message = f"the config has no entry {error}" if missing else str(error)
        raise UsageError("; ".join([message, *getattr(error, "__notes__", [])])) from error


@contextlib.contextmanager
def _inside(entry: str) -> Iterator[None]:
    """Says of an error which entry of the config it comes from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in config.{entry}")
        raise


def _check(run: Run) -> None:
    config, stages = run.config, run.config["stages"]
    unknown = [name for name in stages if name not in STAGES]
    if unknown or not stages:
        raise ValueError(f"config.stages: {unknown or 'empty'}; there are {', '.join(STAGES)}")
    if "pretrain" in stages:
        with _inside("pretrain"):
            _check_pretrain(run)
    if set(stages) == {"pretrain"}:
        return
    if "pretrain" in stages and not config["encoder"]:
        # The encoder is yet to be trained; one of its shape shows what would go wrong later.
        run = dataclasses.replace(run, config={**config, "encoder": config["pretrain"]["encoder"]})
    with _inside("encoder"):
        _ = run.encoder
    if "protocol" in stages:
        _check_protocol(run)
    elif "attack" in stages:
        with _inside("surrogate"):
            _ = run.surrogate
        with _inside("attack"):
            _check_fits(run)
    if {"defend", "sweep"} & set(stages):
        with _inside("downstream"):
            _ = run.downstream
        if "defend" in stages:
            methods.check(run)
        if "sweep" in stages:
            with _inside("sweep"):
                sweep_stage.check(run)
    if "compare" in stages:
        with _inside("compare"):
            compare_stage.check(config)
    if set(stages) <= {"attack", "defend", "protocol", "compare", "sweep"}:
        return
    if "analyze" in stages:
        with _inside("analyze"):
            analyze_stage.check_analyze(config)
    _check_data(run)
    _check_attacks(run)
    _check_finetuning(run)


def _check_pretrain(run: Run) -> None:
    config = run.config["pretrain"]
    encoder = build_encoder(jax.random.key(run.seed), config["encoder"])
    method = resolve(config["method"])(**config["method_options"])
    train, test = (run.load(config["data"], split) for split in ("train", "test"))
    for examples in (train, test):
        data.check_image_size(examples, encoder.image_size)
        data.check_classes(examples, train.num_classes)  # the probes need labels
    tx = pretrain_stage.build_optimizer(
        config, data.steps_per_epoch(len(train), config["batch_size"])
    )
    run.parallel.check_batch(config["batch_size"])
    if config["monitor"]["every_epochs"] < 1:
        raise ValueError("monitor.every_epochs must be at least 1")
    pretrain_stage.check_step(config, encoder, method, tx, train)


def _check_protocol(run: Run) -> None:
    with _inside("surrogate"):
        _ = run.surrogate
    with _inside("downstream"):
        _ = run.test
    with _inside("attack"):
        _check_fits(run)
    with _inside("protocol"):
        protocol_stage.check(run)


def _check_data(run: Run) -> None:
    """Reads every split that the run will read; nothing is scored on the test split here."""
    with _inside("surrogate"):
        _ = run.surrogate
    with _inside("downstream"):
        _, validation = run.downstream
        _ = run.test
    images, devices = run.config["sensitivity"]["images"], len(run.parallel.devices)
    if min(images, len(validation)) < devices:
        raise ValueError(
            f"config.sensitivity.images is {images} and there are {len(validation)} validation "
            f"images; at least one per device ({devices}) is needed"
        )


def _check_fits(run: Run) -> None:
    config = run.config["attack"]
    attack_stage.check_config(config, run.surrogate)
    run.parallel.check_batch(config["batch_size"])


def _check_attacks(run: Run) -> None:
    with _inside("attack"):
        _check_fits(run)
    with _inside("evaluate"):
        evaluate_stage.check_models(run.config["evaluate"]["models"])
        evaluate_stage.build_per_image(run.config["evaluate"]["per_image"])


def _check_finetuning(run: Run) -> None:
    config = run.config
    with _inside("downstream_head"):
        classifier = run.classifier(config["downstream_head"])
    with _inside("finetune.attack"):
        pgd = finetune_stages.build_pgd(config["finetune"]["attack"])
    everything = {"**": config["stage2"]["learning_rate"]}  # which layers move is found out later
    for name, entry, build_losses in (
        ("usual", config["usual"], finetune_stages.clean_losses),
        ("finetune", config["finetune"], finetune_stages.build_losses),
        ("stage2", {**config["stage2"], "rates": everything}, finetune_stages.clean_losses),
    ):
        with _inside(name):
            steps = data.steps_per_epoch(len(run.downstream[0]), entry["batch_size"])
            run.parallel.check_batch(entry["batch_size"])
            attack = pgd if name == "finetune" else None
            losses = build_losses(entry)
            fitting.build_step(run, name, classifier, entry, losses, attack, steps)
