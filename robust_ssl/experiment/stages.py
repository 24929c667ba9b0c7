"""The story of a run: the config is read once, everything is traced, then stages run in order."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from robust_ssl import data, report, words
from robust_ssl.audit import pages as audit_pages
from robust_ssl.audit import summary
from robust_ssl.audit.files import ANSWERS, POLICY
from robust_ssl.build import as_loaded
from robust_ssl.experiment import forecast, pages, sweep
from robust_ssl.experiment.analyze import analyze
from robust_ssl.experiment.attack import attack
from robust_ssl.experiment.attack import check as check_attack
from robust_ssl.experiment.audit import audit
from robust_ssl.experiment.audit import check as check_audit
from robust_ssl.experiment.compare import check as check_compare
from robust_ssl.experiment.compare import compare
from robust_ssl.experiment.context import Context
from robust_ssl.experiment.plan import Plan, UsageError, plan
from robust_ssl.experiment.pretrain import check as check_pretrain
from robust_ssl.experiment.pretrain import pretrain
from robust_ssl.experiment.score import check as check_score
from robust_ssl.experiment.score import score
from robust_ssl.experiment.screen import FILE as SCREENING
from robust_ssl.experiment.screen import PAGE as SCREENING_PAGE
from robust_ssl.experiment.screen import check as check_screen
from robust_ssl.experiment.screen import screen
from robust_ssl.experiment.trace import check as check_train
from robust_ssl.experiment.train import train
from robust_ssl.parallel import Parallel, everywhere
from robust_ssl.progress import Progress
from robust_ssl.stopping import Stopped, stop_requested
from robust_ssl.workdir import (
    ConfigChangedError,
    StageDirectory,
    WorkdirError,
    check_files,
    check_layout,
    check_place,
    hold,
    make_directory,
    workdir_path,
)
from robust_ssl.xla import shared_programs

_log = logging.getLogger(__name__)

_RUN: dict[str, Callable[[Context], StageDirectory]] = {
    "pretrain": pretrain,
    "attack": attack,
    "train": train,
    "score": score,
    "screen": screen,
    "compare": compare,
    "audit": audit,
    "sweep": sweep.sweep,
    "analyze": analyze,
}


_REPORT = ("results.json", "report.md", "results.csv", "attacks.csv", "figures/epsilon.png")
_COMPARED = (*_REPORT, "comparison.csv", "differences.csv")
# Files beside the stages' directories, written when hours have gone by.
_LEAVES: dict[str, tuple[str, ...]] = {
    "score": _REPORT,
    "compare": _COMPARED,
    "screen": (SCREENING, SCREENING_PAGE),
    "audit": (*_COMPARED, *audit_pages.NAMES, ANSWERS, POLICY),
    "sweep": ("sweep.csv", "sweep.md"),
}


def run(
    config: Mapping[str, Any] | Plan,
    workdir: str | os.PathLike,
    *,
    parallel: Parallel | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs the stages that ``config.stages`` names, in order.

    A finished stage is skipped, an interrupted one goes on.

    Args:
      config: What `plan` reads, or a plan.
      workdir: Where each stage has its directory; made if it does not exist.
      parallel: The devices; None is `pmap` over all of them.
      progress: How to report; None is a bar on a terminal and lines elsewhere.

    Returns:
      Stage name to its results.  With a stage `score` or `compare` there are ``results.json``,
      under its contract, and ``report.md``.

    Raises:
      UsageError: If the config, or the data it names, cannot be used.  Nothing has been run.
      ConfigChangedError: If the workdir holds the work of another config.
      WorkdirError: If the workdir cannot be written.
      progress.Stopped: If a stop was asked for; run again to go on.
    """
    workdir = workdir_path(workdir)  # before a function of the config may change the directory
    planned = config if isinstance(config, Plan) else plan(config)
    context = Context(
        plan=planned,
        workdir=workdir,
        parallel=parallel or Parallel.create(),
        progress=progress or Progress(),
    )
    with contextlib.ExitStack() as held:
        held.enter_context(as_loaded())
        # At once where it can be: who is refused should not read its data first.
        early = everywhere(context.workdir.is_dir() and os.access(context.workdir, os.W_OK))
        if early:
            held.enter_context(hold(context.workdir))
        check(context)
        if not early:
            held.enter_context(hold(make_directory(workdir)))
        _say_how_long(context)
        return _run_stages(context)


def _say_how_long(context: Context) -> None:
    """Logs an estimate; a run is not stopped for want of one."""
    if forecast.can_be_told(context) and jax.process_count() == 1:
        try:
            _log.info("%s", forecast.line(context))
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            _log.debug("no estimate: %s", error)


def _run_stages(context: Context) -> dict[str, Any]:
    finished: dict[str, StageDirectory] = {}
    right = None
    with shared_programs():
        for name in context.plan.stages:
            if stop_requested():
                raise Stopped(f"stopped before the stage {name}")
            finished[name] = stage = _RUN[name](context)
            _log.info("%s: done (%.0f s) in %s", name, stage.manifest["seconds"], stage.path)
        if {"score", "compare"} & finished.keys() and "audit" not in finished:
            right = pages.write(context, finished.get("compare"))
    results = {name: stage.results for name, stage in finished.items()}
    if jax.process_index() == 0:
        _print(context, results, right)
    return results


def _print(context: Context, results: Mapping[str, Any], right: Any) -> None:
    """Prints the answer, and where everything else is."""
    if "audit" in results:
        for line in summary.lines(context.workdir):
            words.say(line, sys.stdout, margin="")
    elif {"score", "compare"} & results.keys():
        document = report.results.read(context.workdir / "results.json")
        report.print_summary(document, outcomes=right)
        words.say(f"everything else: {context.workdir / 'report.md'}", sys.stdout)
    elif "sweep" in results:
        page = (context.workdir / "sweep.md").read_text(encoding="utf-8")
        words.say(page, sys.stdout, margin="")


def check(context: Context) -> None:
    """Reads the data and traces every step that a run needs, without running one.

    Raises:
      UsageError: With what is wrong, where in the config, and what to do.
      ConfigChangedError: If the workdir holds the work of another config.
      WorkdirError: If the workdir cannot be one, or cannot be written.
    """
    check_place(context.workdir)
    check_layout(context.workdir)
    check_files(context.workdir, (n for s in context.plan.stages for n in _LEAVES.get(s, ())))
    try:
        for examine in _checks(context):
            examine(context)
    except (ConfigChangedError, WorkdirError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
        raise UsageError.of(error) from error


def _checks(context: Context) -> Iterable[Callable[[Context], Any]]:
    stages = {*context.plan.stages}
    if "audit" in stages:
        yield check_audit
        stages |= {"compare"}
    if "pretrain" in stages:
        yield check_pretrain
        if context.plan.encoder.is_pretrained:
            if stages != {"pretrain"}:
                yield check_data
            return  # steps are traced once the encoder is there
    if stages & {"attack", "score", "screen", "compare", "sweep", "analyze"}:
        yield lambda run: _within("config.surrogate", lambda: run.surrogate)
        yield check_attack
    if "attack" in stages:
        yield lambda run: run.check_images("attack", surrogate=run.surrogate)
    if stages & {"train", "score", "screen", "compare", "sweep", "analyze"}:
        yield check_data
    if "train" in stages:
        yield _check_trained_on
    if "score" in stages:
        yield lambda run: run.check_images("score", test=run.test)
    if stages & {"train", "score", "screen", "compare", "analyze"}:
        yield check_train
    if stages & {"score", "compare"}:
        yield check_score
    if "compare" in stages:
        yield check_compare
    if "analyze" in stages:
        yield lambda run: run.check_unchanged("analyze", run.plan.analyze)
    if "screen" in stages:
        yield check_screen
    if "sweep" in stages:
        yield lambda run: _within("config.sweep", lambda: sweep.with_points(run))


def check_data(context: Context) -> None:
    """Reads the downstream images; nothing is scored on the test split here."""
    _within("config.downstream", lambda: (context.downstream, context.test))
    # A set that is read on demand is compared once it has been read: see `examine`.
    if data.are_known(*context.downstream, context.test):
        _ = context.shared  # says what is wrong with it


def _check_trained_on(context: Context) -> None:
    train_set, validation = context.downstream
    context.check_images("train", train=train_set, validation=validation)


def _within(section: str, read: Callable[[], Any]) -> None:
    try:
        read()
    except Exception as error:
        error.add_note(f"in {section}")
        raise


def describe(config: Mapping[str, Any]) -> str:
    """Returns every setting of a plan, one a line, functions with what they are for.

    Raises:
      UsageError: If there is no plan.
    """
    from robust_ssl import settings

    return settings.describe(plan(config).text)
