"""The stage `audit` brings together what was measured; the command decides by its exit code."""

import argparse
import json
import logging
import pathlib
import subprocess
import sys
import types

import audit_cases as cases
import jax
import numpy as np
import pytest
import tiny_recipes
from tiny_recipes import FROZEN, go, snapshot

from robust_ssl import experiment, inspection, models, provenance, settings, weights
from robust_ssl.audit import decision, document, gates, pages
from robust_ssl.cli import main
from robust_ssl.experiment import (
    audit,
    audit_baseline,
    audit_pictures,
    audit_provenance,
    audit_screening,
    groups,
    sections,
)
from robust_ssl.workdir import ConfigChangedError, WorkdirError, open_stage

ROOT = pathlib.Path(__file__).parents[1]
PILOT, STAGED, FULL = ("--stage=pilot", "--stage=staged", "--stage=full")


def command(capsys, *argv):
    """Exit code, standard output, standard error."""
    code = main.main(["audit", *map(str, argv)])
    return (code, *capsys.readouterr())


def _context(**values):
    """A stand-in for a run's context, which makes each value once."""
    made = {}

    def once(key, make):
        if key not in made:
            made[key] = make()
        return made[key]

    return types.SimpleNamespace(once=once, **values)


@pytest.fixture
def measured(tmp_path):
    """A working directory in which everything was measured."""
    document.write(tmp_path / "audit.json", cases.sealed())
    (tmp_path / "mine.yaml").write_text(cases.answers_text(), encoding="utf-8")
    return tmp_path


def test_a_decision_is_an_exit_code(measured, capsys):
    answers = f"--answers={measured / 'mine.yaml'}"
    code, out, _ = command(capsys, "decide", measured, answers, FULL)
    assert code == 0 and out.startswith("full: PASSED (11 passed, 0 failed")
    assert (measured / "audit.ja.html").is_file()
    # What was given is kept: a stage and answers need not be said again.
    code, out, _ = command(capsys, "decide", measured)
    assert code == 0 and out.startswith("full: PASSED")
    document.write(measured / "audit.json", cases.sealed(provenance=cases.provenance((1,))))
    code, out, _ = command(capsys, "decide", measured, PILOT)
    assert code == 1 and "  failed: no-provenance-failure: 1 against 0" in out
    document.write(measured / "audit.json", cases.untrusted())
    code, out, _ = command(capsys, "decide", measured, PILOT)
    assert code == 3 and "not decidable: robust-accuracy (untrusted: secured)" in out


OWN = """gates:
- {id: two, measure: /measured/data/test_distinct, comparison: at_least,
   limit: 2, title: t, reason: r}
- {id: robust-accuracy, measure: /measured/attacked/secured/accuracy, comparison: at_least,
   limit: 0.2, title: t, reason: r}
"""


def test_an_own_policy_is_named_with_each_decision_that_it_made(measured, capsys):
    document.write(measured / "audit.json", cases.sealed(provenance=cases.provenance((1,))))
    (measured / "pol.yaml").write_text(OWN, encoding="utf-8")
    own = f"--policy={measured / 'pol.yaml'}"
    for argv, name in (((own, FULL), "pol.yaml"), ((), "policy.yaml")):
        code, out, _ = command(capsys, "decide", measured, *argv)
        assert code == 0 and f"  own policy: {name}, SHA-256 " in out
        assert "  left out: no-provenance-failure, in the shipped policy at_most 0\n" in out
        assert "  looser, 0.2: robust-accuracy, in the shipped policy at_least 0.85\n" in out
        assert "  looser, 2: enough-images, in the shipped policy at_least 1000\n" in out
    (measured / "policy.yaml").unlink()
    code, out, _ = command(capsys, "decide", measured)
    assert code == 1 and "own policy" not in out and "shipped" not in out


def test_without_answers_money_is_not_decided(measured, capsys):
    code, out, _ = command(capsys, "decide", measured, STAGED)
    assert code == 3 and "not decidable: worth-it (not measured)" in out
    assert "money: not computed; answers.yaml lacks decisions_per_year" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--answers={}/wrong.yaml",), "wrong.yaml, line 1: unknown entry 'busines'"),
        (("--answers={}/none.yaml",), "`robust-ssl audit init > answers.yaml` begins one"),
        (("--policy={}/none.yaml",), "none.yaml cannot be read: No such file or directory\n"),
        (("--answers={}",), "is a directory; give a regular file"),
        (("--policy={}",), "is a directory; give a regular file"),
        (("--answers={}/large.yaml",), "at most 1,048,576 are read"),
        (("--policy={}/rules.yaml",), "rules.yaml, line 2, gate a: there is no figure /measured/x"),
    ],
)
def test_a_mistake_changes_nothing(measured, capsys, argv, message):
    (measured / "wrong.yaml").write_text("busines: {}")
    (measured / "large.yaml").write_text("#" * (2**20 + 1))
    gate = "gates:\n- {id: a, measure: /measured/x, comparison: is, limit: b, title: t, reason: r}"
    (measured / "rules.yaml").write_text(gate)
    before = snapshot(measured)
    code, _, err = command(capsys, "decide", measured, *(a.format(measured) for a in argv))
    assert code == 2 and message in err
    assert snapshot(measured) == before


def test_a_directory_without_an_audit_says_what_comes_first(tmp_path, capsys):
    code, _, err = command(capsys, "decide", tmp_path)
    assert code == 2 and "first: robust-ssl audit run --workdir=" in err


@pytest.mark.parametrize(("name", "said"), [("", "is empty"), ("gs://bucket/w", "is an address")])
def test_a_workdir_that_is_no_place_is_refused(tmp_path, capsys, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robust_ssl.cli.run.started", None)
    code, _, err = command(capsys, "run", f"--workdir={name}")
    assert code == 2 and said in err and not list(tmp_path.iterdir())


def test_run_refuses_before_jax_is_asked_for_devices(tmp_path, capsys, monkeypatch):
    (tmp_path / "answers.yaml").write_text("busines: {}")
    monkeypatch.setattr("robust_ssl.cli.run.started", None)
    argv = ("run", f"--workdir={tmp_path / 'w'}", f"--answers={tmp_path / 'answers.yaml'}")
    code, _, err = command(capsys, *argv)
    assert code == 2 and "did you mean business" in err and not (tmp_path / "w").exists()
    monkeypatch.setattr(pages.importlib.util, "find_spec", lambda name: None)
    code, _, err = command(capsys, *argv[:2])
    assert code == 2 and "robust-ssl[audit]" in err


@pytest.mark.parametrize("language", ["en", "ja"])
def test_init_prints_what_can_be_read(capsys, language, tmp_path):
    code, out, _ = command(capsys, "init", f"--lang={language}")
    assert code == 0
    document.write(tmp_path / "audit.json", cases.sealed())
    (tmp_path / "answers.yaml").write_text(out, encoding="utf-8")
    assert command(capsys, "decide", tmp_path, PILOT)[0] == 0


def test_help_and_decisions_need_no_jax(measured):
    program = f"""
import sys
from robust_ssl.cli import main
assert main.main(["audit", "decide", {str(measured)!r}]) == 0
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)


def config():
    changed = tiny_recipes.config({"baseline": FROZEN, "full": {}}, "audit")
    changed.compare.claims = ()
    changed.suite.attacks = {"universal_pgd": changed.suite.attacks.universal_pgd}
    changed.audit = {"secured": "full", "examples": 2}
    return changed


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"secured": "fulll"}, "config.audit.secured is 'fulll'.*did you mean 'full'"),
        ({"usual": "basline"}, "config.audit.usual is 'basline', .*did you mean 'baseline'"),
        ({"usual": "full"}, "are both 'full'"),
        ({"stage": "pilto"}, "config.audit.stage must be one of 'pilot', 'staged', 'full'"),
        ({"secure": "full"}, "unknown entry 'secure' in config.audit; did you mean 'secured'"),
    ],
)
def test_what_an_audit_is_of_is_checked_with_the_config(section, message):
    changed = config()
    changed.audit.update(section)
    with pytest.raises(experiment.UsageError, match=message):
        experiment.plan(changed)


@pytest.mark.parametrize(
    ("own", "others"),
    [
        ({"embed": 16 / 255}, 8 / 255),  # more than PGD has, and sees no label
        ({"embed": 4 / 255}, 8 / 255),  # a smaller budget is within the larger
        ({"fgsm": 16 / 255}, 8 / 255),  # a larger one leaves what a stronger attack took
    ],
)
def test_who_knows_the_model_has_all_budgets_below_the_widest(own, others):
    kinds = {"pgd": "PGD", "embed": "EmbedAttack", **({"fgsm": "FGSM"} if "fgsm" in own else {})}
    entries = {name: {"function": f"robust_ssl.attacks:{kind}"} for name, kind in kinds.items()}
    for name, epsilon in own.items():
        entries[name]["budgets"] = (epsilon,)
    changed = config()
    changed.scoring.per_image = {"attacks": entries, "budgets": (others,)}
    planned = experiment.plan(changed)
    context = types.SimpleNamespace(plan=planned)
    suite = ("universal", "Linf", planned.suite.epsilon)
    everything = [("full, clean", True)]
    everything += [
        (groups.outcome_name(groups.Group("full", against, *suite)), True)
        for against in ("public", "hardened")
    ]
    outcomes = {name: np.array([value] * 4) for name, value in everything}
    # PGD leaves the first image, the others all but the last.
    left = {others: np.array([True, False, False, False])}
    left |= dict.fromkeys(own.values(), np.array([True, True, True, False]))
    for epsilon, right in left.items():
        group = groups.Group("full", "hardened", "per_image", "Linf", epsilon)
        outcomes[groups.outcome_name(group)] = right
    found = audit._right(context, outcomes, "full")["per_image"]
    assert found.tolist() == [place == 0 for place in range(4)]


def test_the_shipped_config_takes_a_classifier_from_elsewhere():
    loaded = settings.load_config("audit:classifier=somewhere,data=parts")
    assert settings.to_json(loaded)["classifiers"] == {"secured": {"path": "somewhere"}}
    assert list(loaded.recipes) == ["baseline"]


@pytest.mark.parametrize(
    ("elsewhere", "shared", "known"), [(False, 0, 0), (True, 0, None), (False, 3, 3), (True, 3, 3)]
)
def test_what_a_classifier_from_elsewhere_was_trained_on_is_not_known(elsewhere, shared, known):
    names = ("train", "validation", "classes")
    split = {"name": "parts", "test": 240, "test_among_train": shared, "test_distinct": 4}
    run = {"downstream": {**dict.fromkeys(names, 9), **split}}
    measured = audit._data(run, elsewhere=elsewhere)
    assert measured["test_among_train"] == known and measured["test_distinct"] == 4
    whole = cases.sealed(data={**cases.MEASURED["data"], **measured})
    decided = decision.decide(whole, "pilot", *decision.rules(None, None))
    outcomes = {gate["id"]: gate["outcome"] for gate in decided["decided"]["gates"]}
    expected = {0: "passed", 3: "failed", None: "not decidable"}[known]
    assert outcomes["no-leakage"] == expected
    assert outcomes["enough-images"] == "failed"  # four, however many copies


def test_what_is_typed_of_an_encoder_stays_beside_its_path(tmp_path):
    """A file of somebody's weights does not say how its images were normalized."""
    from robust_ssl.cli import audit

    typed = ["--config.encoder.normalization=imagenet", "--config.encoder.image_size=224"]
    names = ("data", "classifier", "answers", "policy", "lock", "stage")
    options = {**dict.fromkeys(names), "workdir": str(tmp_path)}
    given = argparse.Namespace(encoder="ours.pth", **options)
    encoder = settings.to_json(audit._config(given, typed))["encoder"]
    assert encoder == {"path": "ours.pth", "normalization": "imagenet", "image_size": 224}


def test_an_audit_without_a_stage_is_of_the_last_one(tmp_path, monkeypatch):
    from robust_ssl.cli import audit

    names = ("encoder", "data", "classifier", "answers", "policy", "lock", "stage")
    given = argparse.Namespace(**dict.fromkeys(names), workdir=str(tmp_path))

    def stage(*typed):
        return audit._config(given, [f"--config.audit.stage={word}" for word in typed]).audit.stage

    assert stage() == "pilot"
    (tmp_path / "audit.json").write_text("{}")
    decided = {"decided": {"stage": "full"}}
    monkeypatch.setattr(audit.document, "read", lambda file: decided)
    assert (stage(), stage("staged")) == ("full", "staged")
    given.stage = "pilot"
    assert stage() == "pilot"


def cut(text):
    return text[:300]


def edited(text):
    return text.replace('"epsilon": 0.', '"epsilon": 1.', 1)


@pytest.mark.parametrize("damage", [cut, edited])
def test_a_damaged_audit_is_no_reason_to_make_none(damage, measured, capsys, monkeypatch, caplog):
    from robust_ssl.cli import run as running

    monkeypatch.setattr(logging.getLogger("robust_ssl"), "propagate", True)
    assert command(capsys, "decide", measured, FULL)[0] in gates.EXIT_CODES.values()
    whole = (measured / "audit.json").read_text()
    (measured / "audit.json").write_text(damage(whole))
    assert (measured / "audit.json").read_text() != whole
    code, _, err = command(capsys, "decide", measured)
    assert code == 2 and "run `robust-ssl audit run` again" in err
    stages = []

    def run_again(config, workdir, *, parallel):
        stages.append(config.audit.stage)
        (measured / "audit.json").write_text(whole)

    monkeypatch.setattr(experiment, "run", run_again)
    monkeypatch.setattr(running, "started", lambda *given: None)
    assert command(capsys, "run", f"--workdir={measured}")[0] in gates.EXIT_CODES.values()
    assert stages == ["pilot"] and "the stage of the last time is not known" in caplog.text
    command(capsys, "run", f"--workdir={measured}")
    assert stages == ["pilot", "full"]


def test_a_directory_in_the_way_of_a_page_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "audit.json").mkdir()
    with pytest.raises(WorkdirError, match=r"audit\.json is a directory, and a file of this name"):
        go(config(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["audit.json"]


ONE_GATE = """gates:
  - id: only-pilot
    measure: /measured/provenance/failed
    comparison: at_most
    limit: {pilot: 0}
    unit: count
    title: {en: t, ja: t}
    reason: {en: r, ja: r}
"""


def test_files_of_an_audit_are_the_same_when_the_process_has_moved(measured, monkeypatch):
    monkeypatch.chdir(measured)
    (measured / "elsewhere").mkdir()
    kept = measured / "run"
    kept.mkdir()
    weights.save_encoder(_encoder(), "encoder")
    provenance.write_lock(provenance.lock("encoder"), "encoder.lock.json")
    section = types.SimpleNamespace(
        answers="mine.yaml", policy=None, lock="encoder.lock.json", stage="full", secured="own"
    )
    source = types.SimpleNamespace(is_pretrained=False, path=measured / "encoder", options={})
    plan = types.SimpleNamespace(audit=section, encoder=source, recipes={"own": None})
    context = _context(
        plan=plan, workdir=kept, encoder=_encoder(), check_unchanged=lambda *given: None
    )
    monkeypatch.setattr(audit, "_settings", lambda context: {})
    monkeypatch.setattr(audit_provenance, "_other_encoder", lambda context: "")
    audit.check(context)
    monkeypatch.chdir(measured / "elsewhere")
    assert _outcomes(audit_provenance.examine(context))["files"] == "pass"
    audit._decide(context, cases.sealed()["measured"])
    assert (kept / "answers.yaml").read_text("utf-8") == (measured / "mine.yaml").read_text("utf-8")


def test_a_lock_that_is_none_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "lock.json").write_text("{}")
    for name, error in (("lock.json", ValueError), ("none.json", OSError)):
        section = types.SimpleNamespace(lock=str(tmp_path / name))
        with pytest.raises(error, match=name):
            audit_provenance.check(_context(plan=types.SimpleNamespace(audit=section)))


def test_a_policy_without_a_gate_at_the_stage_is_refused_first_and_forgets_no_stage(
    measured, capsys, monkeypatch
):
    from robust_ssl.cli import audit as commands

    answers = f"--answers={measured / 'mine.yaml'}"
    assert command(capsys, "decide", measured, answers, FULL)[0] == 0
    (measured / "pilot.yaml").write_text(ONE_GATE, encoding="utf-8")
    section = types.SimpleNamespace(answers=None, policy=measured / "pilot.yaml", stage="full")
    context = _context(plan=types.SimpleNamespace(audit=section), workdir=measured)
    monkeypatch.setattr(audit_provenance, "check", lambda context: None)
    for step in (audit.check, lambda run: audit._decide(run, cases.sealed()["measured"])):
        with pytest.raises(
            settings.SettingsError, match="no gate has a limit for the stage 'full'"
        ):
            step(context)
        assert commands._last_stage(measured) == "full"


@pytest.mark.parametrize(("model", "shown"), [("full", True), ("other", False)])
def test_a_screening_is_shown_if_it_is_of_the_audited_classifier(tmp_path, caplog, model, shown):
    plan = types.SimpleNamespace(
        audit=types.SimpleNamespace(secured="full"), suite=types.SimpleNamespace(epsilon=0.1)
    )
    context = types.SimpleNamespace(workdir=tmp_path, plan=plan)
    with open_stage(tmp_path, "screen", {}, {}, seed=0) as stage:
        stage.finish({"model": model, "detectors": []})
    found = audit_screening.read_screening(context)
    assert (found is not None) == shown
    assert ("the screening is of other and the audit of full" in caplog.text) != shown


@pytest.mark.parametrize(
    ("changed", "shown"),
    [((), [0, 7]), ((5,), [5, 0]), ((1, 3, 6), [1, 6]), (range(8), [0, 7])],
)
def test_images_whose_answer_the_attack_changes_are_shown_first(changed, shown):
    answers = np.array([[str(n), "other" if n in changed else str(n)] for n in range(8)])
    clean = np.zeros((8, 4, 4, 3), np.float32)
    look = {"clean": clean, "attacked": clean + 0.1, "answers": answers}
    examples = audit_pictures.examples(look, 2)
    assert [example["said_clean"] for example in examples] == [str(n) for n in shown]
    assert [example["said_attacked"] == "other" for example in examples] == [
        n in changed for n in shown
    ]
    assert len(audit_pictures.examples(look, 20)) == 8


def test_a_recipe_that_is_not_scored_cannot_be_decided_on():
    for role, name in (("usual", "baseline"), ("secured", "full")):
        changed = config()
        changed.recipes[name] = {**dict(changed.recipes[name]), "scored": False}
        with pytest.raises(experiment.UsageError, match=f"audit.{role} is '{name}'.*not scored"):
            experiment.plan(changed)


def test_a_baseline_has_the_labels_of_its_classifiers_own_order(tmp_path):
    encoder = models.resnet18(jax.random.key(0), width=4, image_size=8)
    names = tuple("dcba")
    net = models.classifier(jax.random.key(0), encoder, 4, head="linear", class_names=names)
    weights.save_classifier(net, tmp_path / "elsewhere net")
    saved = sections.SavedClassifier.read(str(tmp_path / "elsewhere net"), "classifiers.theirs")
    labels = np.array([0, 1, 2, 3])
    found = audit_baseline._labels(labels, saved, ("a", "b", "c", "d"))
    assert found.tolist() == [3, 2, 1, 0]
    ours = sections.SavedClassifier()
    assert audit_baseline._labels(labels, ours, ("a", "b", "c", "d")).tolist() == [0, 1, 2, 3]


# --- Provenance of what is deployed -------------------------------------------------------------


def _encoder(name="ours", width=4, seed=0):
    return models.resnet18(jax.random.key(seed), width=width, image_size=8).replace(name=name)


def _audited(monkeypatch, tmp_path, encoder, deployed, lock=None):
    """A context that audits `encoder` and deploys a classifier of another, or the same, one."""
    weights.save_encoder(encoder, tmp_path / "encoder")
    source = types.SimpleNamespace(is_pretrained=False, path=tmp_path / "encoder", options={})
    section = types.SimpleNamespace(secured="secured", lock=lock)
    plan = types.SimpleNamespace(audit=section, encoder=source, recipes={}, classifiers={})
    classifier = models.classifier(jax.random.key(1), deployed, 3, head="linear")
    monkeypatch.setattr(
        audit_provenance, "saved_classifiers", lambda context: {"secured": classifier}
    )
    return _context(plan=plan, encoder=encoder)


def _outcomes(found):
    return {one["name"]: one["outcome"] for one in found["checks"]}


def test_the_scanners_opinion_closes_no_gate(monkeypatch, tmp_path):
    def warns(source):
        return provenance.Check(9, "scanner", "fail", "picklescan warns of uuid.UUID")

    monkeypatch.setattr("robust_ssl.provenance.content.check_scanner", warns)
    context = _audited(monkeypatch, tmp_path, _encoder(), _encoder(seed=2))
    found = audit_provenance.examine(context)
    assert _outcomes(found)["scanner"] == "fail" and found["failed"] == 0
    shown = cases.sealed(provenance=found)
    limits, items, read = decision.rules(None, None)
    decided = decision.decide(shown, "pilot", limits, items, read)["decided"]
    assert {g["id"]: g["outcome"] for g in decided["gates"]}["no-provenance-failure"] == "passed"


def test_a_lock_inside_its_encoders_folder_is_no_file_of_it(monkeypatch, tmp_path):
    weights.save_encoder(_encoder(), tmp_path / "encoder")
    lock = tmp_path / "encoder" / "approved.json"
    provenance.write_lock(provenance.lock(tmp_path / "encoder"), lock)
    context = _audited(monkeypatch, tmp_path, _encoder(), _encoder(seed=2), lock)
    assert _outcomes(audit_provenance.examine(context))["files"] == "pass"
    assert not provenance.differs(provenance.verify(lock))


def test_locked_files_of_another_encoder_than_the_deployed_one_decide_nothing(
    monkeypatch, tmp_path, caplog
):
    weights.save_encoder(_encoder(), tmp_path / "encoder")
    lock = tmp_path / "lock.json"
    provenance.write_lock(provenance.lock(tmp_path / "encoder"), lock)
    same = _audited(monkeypatch, tmp_path, _encoder(), _encoder(seed=2), lock)
    audit_provenance.check(same)
    assert _outcomes(audit_provenance.examine(same))["files"] == "pass" and not caplog.records

    other = _audited(monkeypatch, tmp_path, _encoder(), _encoder("theirs"), lock)
    audit_provenance.check(other)
    assert "secured was fine-tuned from 'theirs', not 'ours'" in caplog.text
    found = audit_provenance.examine(other)
    assert _outcomes(found)["files"] == "absent"
    limits, items, read = decision.rules(None, None)
    shown = cases.sealed(provenance=found)
    decided = decision.decide(shown, "full", limits, items, read)["decided"]
    gates = {gate["id"]: gate["outcome"] for gate in decided["gates"]}
    states = {item["id"]: item["state"] for item in decided["checklist"]}
    assert gates["hashes-locked"] == "not decidable" and states["files-locked"] == "not done"

    wider = _audited(monkeypatch, tmp_path, _encoder(), _encoder(width=8), lock)
    with pytest.raises(settings.SettingsError, match="another network than the audited one, 'our"):
        audit_provenance.check(wider)


def test_a_recipe_with_an_encoder_of_its_own_has_no_locked_files(tmp_path):
    own = models.resnet18(jax.random.key(0), width=4, image_size=32)
    weights.save_encoder(own, tmp_path / "own")
    changed = config()
    changed.encoder = {"path": "simclr-cifar10-r18w24"}
    for path, said in (
        (str(tmp_path / "own"), "full is fine-tuned from an encoder of its own, not 'ours'"),
        ("simclr-cifar10-r18w24", ""),
    ):
        changed.recipes.full.encoder = {"path": path}
        context = types.SimpleNamespace(plan=experiment.plan(changed), encoder=_encoder())
        assert audit_provenance._other_encoder(context) == said


def test_every_member_of_an_ensemble_is_asked_for_its_encoder():
    each = [models.classifier(jax.random.key(1), _encoder(name), 3) for name in ("ours", "theirs")]
    encoders = audit_provenance._encoders(models.confidence_ensemble(each))
    assert [one.name for one in encoders] == ["ours", "theirs"]
    assert not any(audit_provenance._unlike(one, _encoder()) for one in encoders)


def test_costs_are_held_against_the_usual_recipe_whatever_the_comparisons_reference_is():
    rows = [
        {"recipe": recipe, "clean": 0.9, "robust_worst": 0.5, "cost_factor": factor, "verdict": ""}
        for recipe, factor in (("baseline", 1.0), ("tuned", 9.9), ("full", 19.8), ("theirs", None))
    ]
    section = types.SimpleNamespace(usual="tuned", secured="full")
    points = {p["recipe"]: p["cost_factor"] for p in audit._trade_off(rows, section)}
    assert points["tuned"] == 1 and points["full"] == pytest.approx(2)
    assert points["baseline"] == pytest.approx(1 / 9.9) and points["theirs"] is None
    section.usual = "baseline"
    assert audit._trade_off(rows, section)[1]["cost_factor"] == 9.9


@pytest.mark.slow
def test_the_stage_measures_once_and_decides_again(tmp_path):
    results = go(config(), tmp_path)
    whole = document.read_workdir(tmp_path)
    measured = whole["measured"]
    assert results["audit"] == measured
    rows = json.loads((tmp_path / "results.json").read_text())["comparison"]["rows"]
    row = {row["recipe"]: row for row in rows}
    for role, recipe in (("usual", "baseline"), ("secured", "full")):
        assert measured["clean"][role]["value"] == row[recipe]["clean"]
        assert measured["attacked"][role]["accuracy"]["value"] == row[recipe]["robust_worst"]
        assert measured["attacked"][role]["per_image"]["n"] == measured["data"]["test"] == 64
    loss = measured["clean"]["loss"]
    assert loss["value"] == pytest.approx(row["baseline"]["clean"] - row["full"]["clean"])
    assert sum(band["share"] for band in measured["bands"]) == pytest.approx(1)
    assert len(measured["examples"]) == 2 and measured["cost"]["same_network"]
    assert measured["models"]["usual"]["trains_encoder"] is False
    kept = inspection.read_baseline(tmp_path / measured["inspection"]["baseline"])
    assert kept.record["figures"]["accuracy"] == measured["clean"]["secured"]["value"]
    assert (tmp_path / measured["inspection"]["model"]).is_dir()
    # Nothing was examined, so nothing is trusted.
    gates = {gate["id"]: gate["outcome"] for gate in whole["decided"]["gates"]}
    assert gates["robust-accuracy"] == "not decidable"

    before = snapshot(tmp_path)
    again = config()
    again.audit.stage = "full"
    go(again, tmp_path)
    after = snapshot(tmp_path)
    changed = {name for name in after if after[name][1] != before.get(name, (0, b""))[1]}
    assert changed == {"audit.json", "audit.html", "audit.ja.html", "checklist.csv", "junit.xml"}
    assert document.read_workdir(tmp_path)["measured"] == measured

    other = config()
    other.audit.update(usual="full", secured="baseline")
    with pytest.raises(ConfigChangedError, match=r'config\.secured: "full" -> "baseline"'):
        go(other, tmp_path)
    assert {name: kept for name, (_, kept) in snapshot(tmp_path).items()} == {
        name: kept for name, (_, kept) in after.items()
    }

    text = (tmp_path / "results.json").read_text().replace("not examined", "believable")
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(document.AuditFileError, match="somebody has edited it"):
        document.read_workdir(tmp_path)
    go(again, tmp_path)  # it is written anew from the stages
    mended = document.read_workdir(tmp_path)["measured"]
    assert {**mended, "made": {}} == {**measured, "made": {}}
