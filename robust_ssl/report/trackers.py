"""Metrics of a run, sent to an experiment tracker from its files.

Training knows nothing of it.  So runs of long ago can be sent, and a tracker that is down harms no
run.  Each stage is a run of its own at the tracker, in one group, since each counts its own steps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from robust_ssl import disk
from robust_ssl.evaluation.checks.result import NOT_BELIEVABLE
from robust_ssl.report import comparison
from robust_ssl.report.metrics import numbers, read_metrics, stage_directories
from robust_ssl.report.tables import MARK
from robust_ssl.workdir import WorkdirError, read_manifest, write_atomically

_log = logging.getLogger(__name__)

SHARES = ("clean_accuracy", "robust_accuracy", "attack_success_rate", "fooling_rate")
MEMORY = "tracked"  # the folder of a run that remembers what was sent; no stage reads it

Send = Callable[[Mapping[str, float], int], None]


class Series(NamedTuple):
    """One run at a tracker.

    Attributes:
      project: Where the tracker keeps it; for TensorBoard a folder.
      group: The robust_ssl run that it belongs to.
      name: The stage.
      identity: The same whenever it is sent, and another after the stage began anew.
      config: What the stage was told, sent once.
      handle: What the tracker calls it; None before the first time.
    """

    project: str
    group: str
    name: str
    identity: str
    config: Mapping[str, Any]
    handle: str | None


# --- The trackers -------------------------------------------------------------------------------
# Each opens a series, yields how a line is sent and what the tracker calls the series, closes it.

Opened = Iterator[tuple[Send, str | None]]


@contextlib.contextmanager
def wandb(series: Series) -> Opened:
    """Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine."""
    import wandb

    run = wandb.init(
        project=series.project,
        group=series.group,
        name=series.name,
        id=series.handle or series.identity,
        resume="allow",
        config=dict(series.config),
    )
    try:
        yield lambda metrics, step: run.log(dict(metrics), step=step), run.id
    finally:
        run.finish()


@contextlib.contextmanager
def trackio(series: Series) -> Opened:
    """Trackio, on this machine."""
    import trackio

    trackio.init(
        project=series.project,
        group=series.group,
        name=f"{series.group}/{series.name}",
        config=dict(series.config),
        resume="allow",
        embed=False,  # in a notebook it would show a dashboard for each stage
    )
    try:
        yield lambda metrics, step: trackio.log(dict(metrics), step=step), None
    finally:
        trackio.finish()


@contextlib.contextmanager
def mlflow(series: Series) -> Opened:
    """MLflow, at ``MLFLOW_TRACKING_URI``."""
    import mlflow

    mlflow.set_experiment(series.project)
    new = {"run_name": f"{series.group}/{series.name}", "tags": {"group": series.group}}
    with mlflow.start_run(**({"run_id": series.handle} if series.handle else new)) as run:
        if not series.handle:  # its parameters cannot be changed
            mlflow.log_params(_params(series.config))
        yield lambda metrics, step: mlflow.log_metrics(_plain(metrics), step=step), run.info.run_id


@contextlib.contextmanager
def tensorboard(series: Series) -> Opened:
    """TensorBoard: a folder for each stage below the project, which is a folder too."""
    writer = _summary_writer()(str(pathlib.Path(series.project) / series.name))

    def send(metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    try:
        if not series.handle:
            text = json.dumps(series.config, indent=2)
            writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), 0)
        yield send, series.identity
    finally:
        writer.close()


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


TRACKERS = {"wandb": wandb, "trackio": trackio, "mlflow": mlflow, "tensorboard": tensorboard}


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Names as MLflow takes them."""
    return {re.sub(r"[^\w\-. /]", "_", name): value for name, value in metrics.items()}


def _params(config: Mapping[str, Any]) -> dict[str, str]:
    """A config as flat names and short texts, which is all that MLflow keeps."""
    flat: dict[str, str] = {}
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping) and value:
            waiting += [(f"{name}/{key}" if name else str(key), v) for key, v in value.items()]
        else:
            flat[name[:250]] = json.dumps(value)[:500]
    return _plain(flat)


# --- Sending ------------------------------------------------------------------------------------


class Sender:
    """Sends what is new of a run, and remembers it beside the run.

    Attributes:
      sent: Lines that were sent so far in this process.
    """

    def __init__(self, workdir: pathlib.Path, to: str, project: str):
        """Remembers where to, and reads what was sent before.

        Args:
          workdir: The run's.
          to: One of `TRACKERS`.
          project: Of the tracker; for TensorBoard a folder.

        Raises:
          WorkdirError: If what was sent before cannot be read.
        """
        self.sent = 0
        self._workdir, self._project, self._tracker = workdir, project, TRACKERS[to]
        slug = hashlib.sha256(project.encode()).hexdigest()[:8]
        self._memory = workdir / MEMORY / f"{to}-{slug}.json"
        self._series: dict[str, Any] = _remembered(self._memory)
        self._bad: set[tuple[str, int]] = set()

    def send(self) -> int:
        """Sends all that is new; returns how many lines that were."""
        before = self.sent
        for path in stage_directories(self._workdir):
            try:
                manifest = read_manifest(path)
            except WorkdirError:
                continue  # another program's, or damaged: `show` says which
            self._send_stage(path, manifest)
        self._send_results()
        return self.sent - before

    def unfinished(self) -> bool:
        """Returns whether a stage is not done."""
        for path in stage_directories(self._workdir):
            with contextlib.suppress(WorkdirError):
                if read_manifest(path)["status"] != "done":
                    return True
        return False

    def _send_stage(self, path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
        inside = path.relative_to(self._workdir).as_posix()
        name = path.resolve().name if inside == "." else inside
        # One that failed and began anew counts its steps from 0 once more.
        begun = manifest["started"]
        after = self._known(name, begun).get("step", -1)
        lines = [entry for entry in self._entries(path / "metrics.jsonl") if entry["step"] > after]
        if lines:
            config = {entry: manifest.get(entry) for entry in ("config", "seed", "versions")}
            metrics = [(entry["step"], numbers(entry)) for entry in lines]
            self._deliver(name, begun, config, metrics)

    def _entries(self, file: pathlib.Path) -> Iterator[dict[str, Any]]:
        for number, entry in read_metrics(file):
            if entry is not None:
                yield entry
            elif (str(file), number) not in self._bad:
                self._bad.add((str(file), number))
                _log.warning("%s, line %d is damaged; it is left out", file, number)

    def _send_results(self) -> None:
        """Sends the final table, once for each state of ``results.json``."""
        file = self._workdir / "results.json"
        if not file.is_file():
            return
        text = file.read_bytes()
        begun = hashlib.sha256(text).hexdigest()[:16]
        if self._known("results", begun):
            return
        try:
            table = _table(disk.parse_json(text, file))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s cannot be read and is left out: %s", file, error)
            return
        self._deliver("results", begun, table["config"], [(0, table["metrics"])])

    def _known(self, name: str, begun: str) -> dict[str, Any]:
        """What was sent of a series; nothing if it was another one of this name."""
        known = self._series.get(name, {})
        return known if known.get("begun") == begun else {}

    def _deliver(
        self,
        name: str,
        begun: str,
        config: Mapping[str, Any],
        lines: list[tuple[int, dict[str, float]]],
    ) -> None:
        group = self._workdir.resolve().name
        text = f"{self._workdir.resolve()} {name} {begun}"
        series = Series(
            self._project,
            group,
            name,
            hashlib.sha256(text.encode()).hexdigest()[:16],
            config,
            self._known(name, begun).get("handle"),
        )
        with self._tracker(series) as (send, handle):
            for step, metrics in lines:
                if metrics:
                    send(metrics, step)
        self._series[name] = {"begun": begun, "step": lines[-1][0], "handle": handle}
        self._memory.parent.mkdir(exist_ok=True)
        write_atomically(self._memory, json.dumps(self._series, indent=2).encode())
        self.sent += len(lines)


def _remembered(file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        series = disk.read_json(file)
        if not isinstance(series, dict) or not all(isinstance(x, dict) for x in series.values()):
            raise ValueError("it holds something else")
        return series
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{file} says what was sent, and cannot be read ({error}); remove it to send all again"
        ) from error


def _table(document: Mapping[str, Any]) -> dict[str, Any]:
    """The shares of every model under every attack, and the verdicts."""
    metrics = {}
    for entry in document["results"]:
        # A worst case has one name in every family, and under every threat.
        budget = (
            f"{entry['family']}, {entry['threat']} {entry['epsilon']:.4g}, seed {entry['seed']}"
        )
        where = f"{entry['model']}/{entry['attack']}/{entry['crafted_against']}/{budget}"
        mark = _mark(entry)
        metrics |= {f"{where}/{share}{mark(share)}": entry[share] for share in SHARES}
    for row in (document["comparison"] or {}).get("rows", ()):
        where = f"comparison/{row['recipe']}-seed{row['seed']}"
        counts = {name: value for name, value in row.items() if not isinstance(value, str)}
        mark = _mark(row)
        metrics |= {f"{where}/{name}{mark(name)}": v for name, v in numbers(counts).items()}
    verdicts = {model: verdict["verdict"] for model, verdict in document["verdicts"].items()}
    run = {name: document["run"].get(name) for name in ("encoder", "downstream", "suite", "config")}
    return {"config": {**run, "verdicts": verdicts}, "metrics": metrics}


def _mark(judged: Mapping[str, Any]) -> Callable[[str], str]:
    """Returns what the names of figures under attack end with: a chart shows nothing but names."""
    doubted = judged["verdict"] == NOT_BELIEVABLE
    attacked = {*SHARES, *comparison.SHARES} - {"clean", "clean_accuracy"}
    return lambda name: f" {MARK}" if doubted and name in attacked else ""
