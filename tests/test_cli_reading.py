"""Commands that read: list, check, show, track, completion; and output that nobody waits for."""

import ast
import importlib.util
import inspect
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest

import robust_ssl
from robust_ssl import experiment, report, settings
from robust_ssl.build import text_of
from robust_ssl.cli import flags, listing, main
from robust_ssl.report import trackers
from robust_ssl.report.metrics import read_metrics
from robust_ssl.workdir import open_stage
from robust_ssl.workdir.manifest import seal

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def work(tmp_path):
    """A run with a finished stage, and a recipe that is under way."""
    folder = tmp_path / "runs" / "mine"
    with open_stage(folder, "attack", {"suite": 1}, {}, seed=0) as stage:
        stage.log(0, attack="ssp", objective=[1.0, 2.0])
        stage.finish({"done": 1})
    with open_stage(folder, "recipes/pgd_at-seed0", {"recipe": {"epochs": 5}}, {}, seed=0) as stage:
        for step in range(6):
            stage.log(step, loss=1.0 / (step + 1), clean_accuracy=0.5, skipped=0.0)
        stage.log(6, loss=0.125, clean_accuracy=0.5, epoch=1)
        stage.log(7, loss=None, probe={"knn": 0.25})
    return folder


# --- list -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("configs", "quickstart"),
        ("encoders", "simclr-cifar10-r18w24"),
        ("attacks", "AdvEncoderPER"),
        ("losses", "trades_kl"),
        ("objectives", "info_nce"),
        ("recipes", "gen_af"),
    ],
)
def test_a_list_has_a_name_and_a_sentence_a_line(kind, name, capsys):
    assert main.main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = [line.split(maxsplit=1) for line in lines]
    assert all(len(entry) == 2 for entry in entries)
    assert name in [entry[0] for entry in entries]


def test_list_without_a_kind_lists_the_kinds(capsys):
    assert main.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert {line.split()[0] for line in printed.splitlines()} == {*listing._KINDS}


def test_attacks_are_those_that_a_config_can_name(capsys):
    from robust_ssl import attacks

    assert main.main(["list", "attacks"]) == 0
    out, err = capsys.readouterr()
    names = {line.split()[0] for line in out.splitlines()}
    assert {"PGD", "APGD", "TDAA", "UAP", "RandomNoise"} <= names <= {*attacks.__all__}
    assert not names & {"UniversalAttack", "UniversalPerturbation", "FitBatch", "fit", "members"}
    assert "robust_ssl.attacks:NAME" in err


def test_data_are_those_built_in_and_those_prepared(tmp_path, capsys):
    for path in ("mine/1.0.0", "many/config/2.0.0"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "dataset_info.json").write_text("{}")
    assert main.main(["list", "data", f"--data-dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "robust_ssl.data:digits" in out
    assert re.search(rf"^mine .*\[in {tmp_path}\]$", out, re.MULTILINE)
    assert re.search(r"^many/config ", out, re.MULTILINE)
    assert main.main(["list", "data", "--data-dir=nowhere"]) == 0


def test_an_encoder_shows_its_card(capsys, tmp_path):
    assert main.main(["encoder", "inspect", "simclr-cifar10-r18w24"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("simclr-cifar10-r18w24: resnet18 of width 24, 32 pixels, SimCLR on")
    assert "| linear probe" in out
    (tmp_path / "own").mkdir()
    card = ROOT / "robust_ssl" / "zoo" / "byol-cifar10-r18w16" / "encoder.json"
    (tmp_path / "own" / "encoder.json").write_bytes(card.read_bytes())
    assert main.main(["encoder", "inspect", str(tmp_path / "own")]) == 0
    assert '"sha256"' in capsys.readouterr().out


# --- check ----------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("import tiny\n\ndef get_config():\n    return tiny.config()\n")
    return str(file)


def test_check_says_what_a_run_takes_and_writes_nothing(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    epochs = [f"recipes.{name}.epochs=2" for name in ("baseline", "gen_af_stage1")]
    assert main.main(["check", config, *epochs, "--devices=2"]) == 0
    out = capsys.readouterr().out
    assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before
    # 48 images in batches of 16, twice; the head alone, one pass each.
    assert re.search(r"^baseline +the encoder +2 +6 +36 of [\d,]+ +2 +\d", out, re.MULTILINE)
    # The attack's two steps and two passes of the update, clean and under attack.
    assert re.search(r"^gen_af_stage1 +the encoder +2 +6 .* 8 +[\d.]+ MB$", out, re.MULTILINE)
    assert re.search(r"^gen_af +gen_af_stage1 .*chosen on the way of", out, re.MULTILINE)
    assert re.search(r"^random_noise +0 +\d+ +0$", out, re.MULTILINE)
    assert out.endswith("nothing was found wrong, and nothing was written\n")


def test_check_refuses_what_a_run_refuses(config, capsys):
    assert main.main(["check", config, "recipes.gen_af.epoch=3", "--devices=1"]) == 2
    assert "did you mean 'epochs'" in capsys.readouterr().err
    assert main.main(["check", config, "--devices=99"]) == 2


def made_of(planned, stage):
    """What a run tells a stage."""
    compare = planned.compare
    timing = ("reference", "memory", "rounds", "steps_per_round")
    return {
        "attack": {"suite": planned.suite, "curve": True},
        "score": {"scoring": planned.scoring},
        "cost": {name: getattr(compare, name) for name in timing},
        "cost-seed1": {name: getattr(compare, name) for name in timing},
        "compare": compare,
        "analyze": planned.analyze,
        "screen": {"screening": planned.screening, "per_image": planned.scoring.per_image},
    }[stage]


@pytest.mark.parametrize(
    ("stage", "seed", "changed", "said"),
    [
        ("attack", 0, "suite.num_steps=99", "num_steps"),
        ("score", 0, "scoring.batch_size=8", "scoring.batch_size: 16 -> 8"),
        ("cost", 7, "compare.rounds=9", "rounds"),
        ("cost-seed1", 1, "compare.rounds=9", "rounds"),
        ("compare", 0, "compare.rounds=9", "rounds"),
        ("analyze", 0, "analyze.images=8", "images"),
        ("screen", 0, "screening.batch_size=8", "batch_size"),
    ],
)
def test_check_refuses_stages_of_other_settings_as_a_run_does(
    stage, seed, changed, said, config, tmp_path, capsys
):
    with open(config, "a") as file:
        stages = ("attack", "train", "score", "compare", "analyze", "screen")
        file.write(f"\ndef get_config():\n    c = tiny.config(*{stages})\n")
        file.write("    c.analyze, c.screening = {}, {}\n    return c\n")
    planned = experiment.plan(settings.load_config(config))
    told = text_of(made_of(planned, stage))
    with open_stage(tmp_path / "w", stage, told, {}, seed=seed) as directory:
        directory.finish({})
    options = ["check", config, "--devices=2", f"--workdir={tmp_path / 'w'}"]
    assert main.main(options) == 0
    capsys.readouterr()
    assert main.main([*options, changed]) == 2
    assert said in capsys.readouterr().err
    if not stage.startswith("cost"):
        assert main.main([*options, "seed=9"]) == 2
        assert "seed: 0 -> 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "said"),
    [("file", "it is a file"), ("file/x", "file is a file"), ("", "--workdir is empty")],
)
def test_check_and_run_refuse_a_place_where_nothing_can_be(place, said, config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    workdir = f"--workdir={tmp_path / place if place else ''}"
    for command in ("check", "run"):
        assert main.main([command, config, "--devices=2", workdir]) == 2
        assert said in capsys.readouterr().err


def test_check_and_run_refuse_a_workdir_of_before(config, tmp_path, capsys):
    (tmp_path / "w" / "stage1").mkdir(parents=True)
    manifest = {"schema": 1, "stage": "stage1", "status": "done"}
    (tmp_path / "w" / "stage1" / "manifest.json").write_text(json.dumps(manifest))
    for command in ("check", "run"):
        assert main.main([command, config, "--devices=2", f"--workdir={tmp_path / 'w'}"]) == 2
        assert "robust_ssl 0.1" in capsys.readouterr().err


def test_check_says_that_a_workdir_is_new(config, tmp_path, capsys):
    assert main.main(["check", config, "--devices=2", f"--workdir={tmp_path / 'typo'}"]) == 0
    assert capsys.readouterr().out.endswith(f"written; nothing is in {tmp_path / 'typo'} yet\n")


# --- show -----------------------------------------------------------------------------------------


def test_show_says_how_far_a_run_is(work, capsys):
    assert main.main(["show", str(work)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.match(r"attack +done", first)
    assert re.match(r"recipes/pgd_at-seed0  unfinished .*step 8 of 35  .*written \d+ s ago", second)


def test_show_names_what_is_damaged_and_what_failed(work, capsys):
    (work / "attack" / "manifest.json").write_text("{")
    with open_stage(work, "train", {}, {}, seed=0) as stage:
        stage.finish({"trained": {}, "failed": {"mart-seed0": "FloatingPointError: no"}})
    with open(work / "recipes" / "pgd_at-seed0" / "metrics.jsonl", "ab") as log:
        log.write(b"\xff\xfe no line\n[1]\n" + b'{"step": 8, "lo')
    assert main.main(["show", str(work)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^attack +cannot be read: ", out, re.MULTILINE)
    assert re.search(r"^recipes/mart-seed0 +failed: FloatingPointError: no$", out, re.MULTILINE)
    assert "step 8 of 35" in out


def test_show_ends_with_the_table_and_the_verdict(work, capsys, monkeypatch):
    (work / "results.json").write_text("{}")
    monkeypatch.setattr(report.results, "read", lambda file: {"models": {}})
    monkeypatch.setattr(report, "print_summary", lambda document: print("the table"))
    (work / "report.md").write_text("")
    (work / "sweep.md").write_text("the sweep\n")
    assert main.main(["show", str(work)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        *("the table", "", "the sweep", f"everything else: {work / 'report.md'}"),
    ]
    monkeypatch.undo()
    assert main.main(["show", str(work)]) == 0
    assert "results.json cannot be read" in capsys.readouterr().err


def test_show_reads_a_zoo_and_a_stage_by_itself(tmp_path, work, capsys):
    open_stage(tmp_path / "zoo" / "runs" / "byol", "pretrain", {"epochs": 3}, {}, seed=0)
    assert main.main(["show", str(tmp_path / "zoo")]) == 0
    assert capsys.readouterr().out.startswith("runs/byol/pretrain  unfinished")
    (tmp_path / "zoo" / "byol").mkdir()
    (tmp_path / "zoo" / "byol" / "encoder.json").write_text("{}")
    (tmp_path / "zoo" / "README.md").write_text("| encoder |\n")
    assert main.main(["show", str(tmp_path / "zoo")]) == 0
    assert "| encoder |" in capsys.readouterr().out
    assert main.main(["show", str(work / "attack")]) == 0
    assert capsys.readouterr().out.startswith("attack  done")


@pytest.mark.parametrize("command", [["show"], ["track", "--to=wandb"]])
def test_what_is_no_run_is_refused(tmp_path, work, command, capsys):
    for folder, message in [
        (tmp_path / "runs", f"not the directory of a run.*; runs near: {re.escape(str(work))}"),
        (tmp_path / "runs" / "min", f"there is no directory .*; runs near: {re.escape(str(work))}"),
        (tmp_path / "nowhere" / "x", "there is no directory"),
    ]:
        assert main.main([*command, str(folder)]) == 2
        assert re.search(message, capsys.readouterr().err)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "a web app"}')
    assert main.main([*command, str(tmp_path / "other")]) == 2


# --- track ----------------------------------------------------------------------------------------


def _fake_wandb(sent):
    """`init`, `log` and `finish` as Weights & Biases has them."""

    class Run:
        def __init__(self, id):
            self.id = id

        def log(self, metrics, step):
            sent.append((self.id, step, metrics))

        def finish(self):
            sent.append((self.id, "finished"))

    def init(*, project, group, name, id, resume, config):
        assert (resume == "allow" and set(config) >= {"config", "seed"}) or name == "results"
        sent.append((id, "opened", project, group, name))
        return Run(id)

    return {"wandb": types.SimpleNamespace(init=init)}


def _fake_trackio(sent):
    opened = []

    def init(*, project, group, name, config, resume, embed):
        opened.append(name)
        sent.append((name, "opened", project, group, name.partition("/")[2]))

    return {
        "trackio": types.SimpleNamespace(
            init=init,
            log=lambda metrics, step: sent.append((opened[-1], step, metrics)),
            finish=lambda: sent.append((opened[-1], "finished")),
        )
    }


def _fake_mlflow(sent):
    import contextlib

    opened, names = [], {}

    @contextlib.contextmanager
    def start_run(run_id=None, run_name=None, tags=None):
        opened.append(run_id or f"id-{len(opened)}")
        name = names.setdefault(opened[-1], (run_name or "").partition("/")[2])
        sent.append((opened[-1], "opened", "P", "mine", name))
        yield types.SimpleNamespace(info=types.SimpleNamespace(run_id=opened[-1]))
        sent.append((opened[-1], "finished"))

    def log_metrics(metrics, step):
        assert all(re.fullmatch(r"[\w\-. /]+", name) for name in metrics)
        sent.append((opened[-1], step, metrics))

    def log_params(params):
        assert all(len(value) <= 500 for value in params.values())

    module = types.SimpleNamespace(
        set_experiment=lambda name: None,
        start_run=start_run,
        log_metrics=log_metrics,
        log_params=log_params,
    )
    return {"mlflow": module}


def _fake_tensorboard(sent):
    class SummaryWriter:
        def __init__(self, logdir):
            self.name = logdir
            stage = logdir.partition("/P/")[2]
            sent.append((logdir, "opened", "P", "mine", stage))

        def add_scalar(self, tag, value, global_step):
            sent.append((self.name, global_step, {tag: value}))

        def add_text(self, tag, text, global_step):
            assert tag == "config"

        def close(self):
            sent.append((self.name, "finished"))

    return {"tensorboardX": types.SimpleNamespace(SummaryWriter=SummaryWriter)}


FAKES = {
    "wandb": _fake_wandb,
    "trackio": _fake_trackio,
    "mlflow": _fake_mlflow,
    "tensorboard": _fake_tensorboard,
}


@pytest.fixture(params=FAKES)
def tracker(request, monkeypatch, tmp_path):
    """Name, what was sent, and how to call it."""
    sent = []
    for name, module in FAKES[request.param](sent).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)

    def call(folder, *more):
        sent.clear()
        return main.main(["track", str(folder), f"--to={request.param}", "--project=P", *more])

    return request.param, sent, call


def _numbers(sent):
    """What was sent, by stage and step."""
    names = {entry[0]: entry[4] for entry in sent if entry[1] == "opened"}
    numbers = {}
    for series, step, *metrics in sent:
        if isinstance(step, int):
            numbers.setdefault((names[series], step), {}).update(metrics[0])
    return numbers


def test_a_tracker_gets_every_line_once(tracker, work, capsys):
    _, sent, call = tracker
    assert call(work) == 0
    numbers = _numbers(sent)
    assert numbers["attack", 0] == {"ssp/objective/0": 1.0, "ssp/objective/1": 2.0}
    assert numbers["recipes/pgd_at-seed0", 6]["loss"] == 0.125
    assert numbers["recipes/pgd_at-seed0", 7] == {"probe/knn": 0.25}
    assert len(numbers) == 9 and [e[1] for e in sent].count("finished") == 2
    assert call(work) == 0 and not sent
    with open(work / "recipes" / "pgd_at-seed0" / "metrics.jsonl", "ab") as log:
        log.write(b'{"step": 3, "loss": 9.0}\nnothing\n{"step": 8, "loss": 0.5}\n{"step": 9')
    assert call(work) == 0  # of a step that it has, nothing; the last line is not whole yet
    assert [metrics for _, step, *metrics in sent if isinstance(step, int)] == [[{"loss": 0.5}]]
    assert re.search(r"metrics\.jsonl, line 10 is damaged", capsys.readouterr().err)


def test_a_tracker_gets_the_table_when_it_changes(tracker, work, monkeypatch):
    _, sent, call = tracker
    call(work)
    shares = dict.fromkeys(trackers.SHARES, 0.5)
    entry = {"model": "a-seed0", "attack": "worst", "epsilon": 0.25, "seed": 0, **shares}
    entry |= {"family": "per_image", "threat": "Linf", "verdict": "believable"}
    doubted = {"verdict": "not believable"}
    document = {
        "run": {"encoder": {"name": "e"}},
        "verdicts": {"a-seed0": {"verdict": "believable"}},
        "results": [
            {**entry, "crafted_against": "own"},
            {**entry, "crafted_against": "own", "family": "autoattack"},
            {**entry, "crafted_against": "own", "threat": "L2"},
            {**entry, "crafted_against": "own", "model": "b-seed0", **doubted},
        ],
        "comparison": {
            "rows": [
                {"recipe": "a", "seed": 0, "clean": 1.0, "verdict": "believable"},
                {"recipe": "b", "seed": 0, "clean": 1.0, "robust_worst": 1.0, **doubted},
            ]
        },
    }
    (work / "results.json").write_text(json.dumps(document))
    assert call(work) == 0
    numbers = _numbers(sent)["results", 0]
    marked = {f"{name} NOT BELIEVABLE" for name in {*shares, "robust_worst"} - {"clean_accuracy"}}
    assert {name.rpartition("/")[2] for name in numbers} == {*shares, *marked, "clean", "seed"}
    assert all("b-seed0" in name for name in numbers if "NOT BELIEVABLE" in name)
    assert sum(name.endswith("/robust_accuracy") for name in numbers) == 3  # each its own
    assert call(work) == 0 and not sent
    (work / "results.json").write_text("{")
    assert call(work) == 0 and not sent  # said, and everything else goes on


def test_a_stage_that_began_anew_is_sent_anew(tracker, work):
    _, sent, call = tracker
    call(work)
    manifest = work / "attack" / "manifest.json"
    text = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**text, "started": "2026-01-01T00:00:00+00:00"}))
    assert call(work) == 0
    assert {stage for stage, _ in _numbers(sent)} == {"attack"}


def test_following_ends_with_the_run(tracker, work, monkeypatch):
    _, sent, call = tracker
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            recipe = work / "recipes" / "pgd_at-seed0"
            with open(recipe / "metrics.jsonl", "a") as log:
                log.write('{"step": 9, "loss": 0.75}\n')
            manifest = json.loads((recipe / "manifest.json").read_text())
            done = seal({**manifest, "status": "done"})
            (recipe / "manifest.json").write_text(json.dumps(done))

    # This module's own: a lock's thread of another test sleeps as well.
    monkeypatch.setattr("robust_ssl.cli.track.time", types.SimpleNamespace(sleep=sleep))
    assert call(work, "--follow", "--every=7") == 0
    assert _numbers(sent)["recipes/pgd_at-seed0", 9] == {"loss": 0.75}
    assert looks == [7.0] * 12  # two until it was done, and ten without news

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("robust_ssl.cli.track.time", types.SimpleNamespace(sleep=interrupt))
    assert call(work, "--follow") == 0


@pytest.mark.parametrize("every", ["-1", "0", "nan", "inf", "soon"])
def test_a_pause_that_is_none_is_refused_before_anything_is_sent(work, capsys, every):
    with pytest.raises(SystemExit, match="2"):
        main.main(["track", str(work), "--to=wandb", "--follow", f"--every={every}"])
    assert f"'{every}' is no number of seconds above 0" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_named(work, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main.main(["track", str(work), "--to=wandb"]) == 2
    assert "pip install 'robust-ssl[wandb]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "code"),
    [
        ({"torch.utils.tensorboard"}, 2),
        ({"tensorboard"}, 2),
        ({"tensorboard", "torch.utils.tensorboard"}, 0),
        ({"tensorboardX"}, 0),
    ],
)
def test_torchs_writer_needs_the_package_that_it_imports(
    installed, code, work, capsys, monkeypatch
):
    from robust_ssl.report import trackers

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in installed else None
    )
    monkeypatch.setattr(trackers.Sender, "send", lambda self: False)
    assert main.main(["track", str(work), "--to=tensorboard"]) == code
    assert ("pip install 'robust-ssl[tensorboard]'" in capsys.readouterr().err) == (code == 2)


def test_no_stage_reads_what_tracking_remembers(work, tracker):
    _, _, call = tracker
    before = {file: file.read_bytes() for file in work.rglob("*") if file.is_file()}
    call(work)
    assert all(file.read_bytes() == text for file, text in before.items())
    files = [file for file in work.rglob("*") if file.is_file() and file not in before]
    assert {file.relative_to(work).parts[0] for file in files} == {"tracked"}
    (memory,) = (work / "tracked").iterdir()
    for damaged in ("{", "[1]", "[]", "5", '{"train": 5}'):
        memory.write_text(damaged)
        assert call(work) == 2  # rather than all of it twice


def test_lines_are_read_one_by_one(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n{"step": true}\n\n[]\n\xff\n{"step": 1}\n{"step": 2}')
    assert [number for number, entry in read_metrics(file) if entry is not None] == [1, 6]
    assert not list(read_metrics(tmp_path / "none"))


# --- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_is_printed(shell, capsys):
    pytest.importorskip("shtab")
    assert main.main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "quickstart" in out or shell != "bash"
    assert "workdir" in out or shell == "tcsh"


def test_completion_says_how_it_is_installed(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main.main(["completion", "bash"]) == 2
    assert "pip install 'robust-ssl[completion]'" in capsys.readouterr().err


# --- Output that nobody waits for, and other terminals --------------------------------------------


def _python(code, **environment):
    return subprocess.run(
        ["bash", "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
    )


@pytest.mark.parametrize("what", ["list configs", "run --help"])
def test_a_reader_that_leaves_is_no_error(what):
    command = f"{sys.executable} -m robust_ssl.cli.main {what}"
    done = _python(f"set -o pipefail; {command} | true")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("argv", "printed", "code"),
    [
        (["list", "configs"], False, 0),
        (["audit", "decide", "w"], False, 75),  # nobody knows what it was about to say
        (["audit", "decide", "w"], True, 3),
        (["encoder", "verify", "lock.json"], False, 75),
        (["encoder", "verify", "lock.json"], True, 1),
        (["inspect", "net", "--baseline=b"], False, 75),
    ],
)
def test_an_answer_is_never_0_because_its_reader_left(argv, printed, code, monkeypatch):
    class Left(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    def answers(arguments, overrides):
        if not printed:
            raise BrokenPipeError
        return code

    monkeypatch.setattr(sys, "stdout", Left())
    monkeypatch.setattr(main.streams, "silence", lambda: None)
    monkeypatch.setattr(main._COMMANDS[argv[0]], "run", answers)
    assert main.main(argv) == code


def test_another_encoding_prints_what_it_can(monkeypatch, capsysbinary):
    class Terminal(io.TextIOWrapper):
        pass

    stream = Terminal(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(listing, "_KINDS", {**listing._KINDS, "configs": lambda: [("ä", "±")]})
    assert main.main(["list", "configs"]) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"?  ?\n"


def test_every_command_explains_itself(capsys):
    for command in main._COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main.main([command, "--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert "examples:" in out and "usage: robust-ssl" in out


def test_the_page_of_the_command_line_has_every_command_as_it_is():
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for command in main._COMMANDS:
        assert f"`{command}" in page, f"docs/command-line.md has nothing of {command}"
    parser, lines = main._parser(), re.findall(r"^robust-ssl (.*)$", page, re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        argv = shlex.split(line.partition(" > ")[0])
        arguments, unknown = parser.parse_known_args(argv)
        flags.take_settings(arguments, unknown, argv)


# --- What type checkers see -----------------------------------------------------------------------


def test_type_checkers_see_the_public_names():
    tree = ast.parse(inspect.getsource(robust_ssl))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {name.asname or name.name for node in block.body for name in node.names}
    assert seen == robust_ssl._HOMES.keys() == {*robust_ssl.__all__}
    for node in block.body:
        for name in node.names:
            public = getattr(robust_ssl, name.asname or name.name)
            assert public is getattr(importlib.import_module(node.module), name.name)


def test_a_public_set_under_another_librarys_name_is_listed_once(tmp_path, capsys):
    (tmp_path / "svhn_cropped" / "3.1.0").mkdir(parents=True)
    (tmp_path / "svhn_cropped" / "3.1.0" / "dataset_info.json").write_text("{}")
    assert main.main(["list", "data", f"--data-dir={tmp_path}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("svhn")]
    assert len(lines) == 1 and f"[in {tmp_path}]" in lines[0]
