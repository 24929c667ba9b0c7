"""The alarm of single-step training: rings for the one illness, and not for others or noise."""

import json
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_recipes
from tiny_recipes import ON_ADVERSARIAL, PGD, go

from robust_ssl import attacks, data, struct, threats
from robust_ssl.experiment import alarm, fitting
from robust_ssl.finetuning.overfitting import overfitting_epoch, overfitting_warning
from robust_ssl.types import Outputs


def epoch_of(one_step, multi_step, images=1000, **options):
    return overfitting_epoch(list(zip(one_step, multi_step, strict=True)), images=images, **options)


@pytest.mark.parametrize(
    ("one_step", "multi_step", "expected"),
    [
        ([0.5, 0.6, 0.6, 0.7], [0.30, 0.36, 0.40, 0.41], None),
        ([0.5, 0.6, 0.9, 0.95], [0.30, 0.40, 0.01, 0.0], 3),  # the first, not the worst
        ([0.5, 0.6, 0.1, 0.1], [0.30, 0.40, 0.01, 0.0], None),  # both fall: it has diverged
        ([0.5, 0.6, 0.6, 0.6], [0.40, 0.33, 0.27, 0.22], None),  # falls, but not to half
        ([0.5, 0.6, 0.6, 0.6], [0.40, 0.30, 0.20, 0.10], 4),  # slowly, against its best
        ([0.9], [0.0], None),  # nothing to fall from
        ([], [], None),
        ([0.9, 0.9], [0.0, 0.0], None),
    ],
)
def test_it_rings_when_only_the_stronger_attack_wins(one_step, multi_step, expected):
    assert epoch_of(one_step, multi_step) == expected


def test_few_images_ring_only_for_what_they_can_tell():
    one_step, multi_step = [0.6, 0.6], [0.40, 0.15]
    assert epoch_of(one_step, multi_step, images=5000) == 2
    assert epoch_of(one_step, multi_step, images=50) is None
    assert epoch_of(one_step, multi_step, images=50, margin=0.0) == 2
    # A dip of the one-step accuracy within its noise is no fall; a larger one is.
    assert epoch_of([0.60, 0.58], [0.4, 0.0]) == 2
    assert epoch_of([0.60, 0.50], [0.4, 0.0]) is None


def test_the_margin_is_in_standard_errors():
    # 0.1 is below half of 0.4 by 0.1, which has to be more than two of
    # sqrt((0.1 * 0.9 + 0.4 * 0.6 / 4) / images): 60 images.
    assert epoch_of([0.5, 0.5], [0.4, 0.1], images=59) is None
    assert epoch_of([0.5, 0.5], [0.4, 0.1], images=61) == 2
    assert epoch_of([0.5, 0.5], [0.4, 0.1], images=59, margin=1.9) == 2


def test_what_follows_does_not_change_the_answer():
    one_step, multi_step = [0.5, 0.6, 0.9, 0.5, 0.9], [0.30, 0.40, 0.01, 0.41, 0.0]
    answers = [epoch_of(one_step[:n], multi_step[:n]) for n in range(1, 6)]
    assert answers == [None, None, 3, 3, 3]


def test_the_warning_names_both_epochs_and_what_to_do():
    text = overfitting_warning([(0.5, 0.4), (0.6, 0.3), (0.9, 0.01)], 3)
    for part in ("at epoch 3", "from 40.0% (epoch 1) to 1.0%", "50.0% to 90.0%", "smaller step"):
        assert part in text
    with pytest.raises(ValueError, match=r"in \[2, 1\]"):
        overfitting_warning([(0.5, 0.4)], 1)


@pytest.mark.parametrize(
    ("one_step", "multi_step", "options", "message"),
    [
        ([0.5, 1.5], [0.5, 0.5], {}, "epoch 2: accuracies"),
        ([0.5], [float("nan")], {}, "epoch 1: accuracies"),
        ([], [], {"images": 0}, "images must be at least 1"),
        ([], [], {"margin": -1.0}, "margin at least 0"),
    ],
)
def test_nonsense_is_refused(one_step, multi_step, options, message):
    with pytest.raises(ValueError, match=message):
        epoch_of(one_step, multi_step, **options)


# --- In a training ----------------------------------------------------------------------------

ONE_STEP = {
    **ON_ADVERSARIAL,
    "attack": {**PGD, "num_steps": 1, "step_size": 10 / 255},
}


def fgsm_rs(workdir, epochs):
    """The results of training by one step from a random start."""
    config = tiny_recipes.config({"fgsm_rs": {**ONE_STEP, "epochs": epochs}})
    return go(config, workdir)["train"]["trained"]["fgsm_rs-seed0"]


def test_catastrophic_overfitting_reaches_the_results(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "robust_ssl")
    history = iter([(0.5, 0.5), (1.0, 0.0), (1.0, 0.0)])

    def collapses(*args):
        one_step, pgd = next(history)
        return {
            "validation_clean_accuracy": 1.0,
            "validation_robust_accuracy": pgd,
            "validation_one_step_accuracy": one_step,
        }

    monkeypatch.setattr(fitting, "validate", collapses)
    results = fgsm_rs(tmp_path, epochs=3)
    assert results["catastrophic_overfitting"] == 2
    assert results["best_epoch"] == 1 and results["validation_score"] == 0.5
    assert "fgsm_rs-seed0: catastrophic overfitting at epoch 2" in caplog.text


RAMP = {**ONE_STEP, "best": "last", "ramp": {"start": 0.5, "end": 0.75}, "epochs": 4}


def test_a_ramp_of_one_step_has_the_alarm_too(tmp_path, monkeypatch, caplog):
    """Its first two epochs have no attack: they are not looked at."""
    caplog.set_level(logging.WARNING, "robust_ssl")
    measured = iter([(0.5, 0.5), (1.0, 0.0)])

    def collapses(*args):
        one_step, pgd = next(measured)
        scores = {"validation_clean_accuracy": 1.0, "validation_robust_accuracy": pgd}
        return {**scores, "validation_one_step_accuracy": one_step}

    monkeypatch.setattr(fitting, "validate", collapses)
    config = tiny_recipes.config({"ramp": RAMP})
    results = go(config, tmp_path)["train"]["trained"]["ramp-seed0"]
    assert results["catastrophic_overfitting"] == results["best_epoch"] == 4
    assert "ramp-seed0: catastrophic overfitting at epoch 4" in caplog.text
    assert next(measured, None) is None


@pytest.mark.parametrize(
    ("best", "ends", "epoch"),
    [("robust", 0.0, 3), ("clean", 0.0, 3), ("highest", 0.4, 3), ("robust", 0.4, 4)],
)
def test_what_was_never_attacked_is_no_best_epoch_and_costs_no_patience(
    best, ends, epoch, tmp_path, monkeypatch
):
    """Clean epochs are better by both accuracies, and a growing budget lowers them."""
    measured = iter([(0.5, 0.5), (ends, ends)])

    def falling(*args):
        clean, pgd = next(measured)
        return {"validation_clean_accuracy": clean, "validation_robust_accuracy": pgd}

    monkeypatch.setattr(fitting, "validate", falling)
    config = tiny_recipes.config({"ramp": {**RAMP, "best": best, "patience": 1}})
    results = go(config, tmp_path)["train"]["trained"]["ramp-seed0"]
    assert (results["epochs"], results["best_epoch"], results["clean_epochs"]) == (4, epoch, 2)
    assert next(measured, None) is None


@pytest.mark.slow
def test_the_alarm_changes_no_weight_and_several_steps_have_none(tmp_path, monkeypatch):
    weights, both = [], {"ramp": RAMP, "several": {**RAMP, "attack": PGD, "epochs": 2}}
    for folder, recipes in (("as it is", both), ("without", {"ramp": RAMP})):
        go(tiny_recipes.config(recipes), tmp_path / folder)
        weights.append(tiny_recipes.final(tmp_path / folder, "ramp"))
        monkeypatch.setattr(alarm, "takes_one_step", lambda attack: False)
    for path, leaf in weights[0].items():
        np.testing.assert_array_equal(leaf, weights[1][path])
    recipes = tmp_path / "as it is" / "recipes"
    lines = [json.loads(x) for x in (recipes / "ramp-seed0/metrics.jsonl").read_text().splitlines()]
    seen = [line["epoch"] for line in lines if "validation_one_step_accuracy" in line]
    assert seen == [3, 4]
    assert "validation" not in (recipes / "several-seed0/metrics.jsonl").read_text()


def test_few_images_are_looked_at_where_nothing_is_validated():
    images = data.from_arrays(np.zeros((300, 8, 8, 3), np.uint8), np.arange(300) % 4)
    last, robust = (types.SimpleNamespace(best=best) for best in ("last", "robust"))
    assert len(alarm.looked_at(last, images)) == alarm.IMAGES == 128
    assert alarm.looked_at(robust, images) is images
    assert alarm.looked_at(last, images.subset(100)).where == images.where


@struct.dataclass
class Wave:
    """Two logits of the mean pixel, whose difference waves: at frequency 0 it is a slope."""

    frequency: jax.Array | float

    def __call__(self, images):
        way = images.mean(axis=(1, 2, 3)) - 0.5
        wave = jnp.cos(self.frequency * way + 0.1)
        margin = jnp.where(self.frequency > 0, wave, 0.1 + way)
        return Outputs(features=way[:, None], logits=jnp.stack([margin, -margin], axis=-1))


def test_the_illness_itself_rings():
    """A whole step ends a period away, where the class is right again; half of it is a valley."""
    threat, images = threats.Linf(0.08), jnp.full((8, 4, 4, 3), 0.5)
    one_step = attacks.FGSM(threat)
    several = attacks.PGD(threat, step_size=0.02, num_steps=4)
    history = []
    for frequency in (0.0, 2 * np.pi / 0.08):
        model, key = Wave(frequency), jax.random.key(0)
        pair = []
        for attack in (one_step, several):
            labels = jnp.zeros(8, jnp.int32)
            moved = jax.jit(attacks.attack_batch)(attack, key, model, images, labels)
            pair.append(float((model(moved).logits.argmax(-1) == 0).mean()))
        history.append(tuple(pair))
    assert history == [(1.0, 1.0), (1.0, 0.0)]
    assert overfitting_epoch(history, images=8) == 2


def test_one_step_training_is_measured_under_its_own_attack_too(tmp_path):
    assert fgsm_rs(tmp_path, epochs=1)["catastrophic_overfitting"] is None
    lines = (tmp_path / "recipes" / "fgsm_rs-seed0" / "metrics.jsonl").read_text().splitlines()
    assert "validation_one_step_accuracy" in json.loads(lines[-1])
