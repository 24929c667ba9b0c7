"""The three calls: what they return, that they are what a run does, and what people guess first."""

import json
import logging
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import robust_ssl
from robust_ssl import attacks, data, experiment, models, objectives, progress, struct, threats
from robust_ssl.api import attacking, choice, inputs, measuring, securing
from robust_ssl.api.names import KINDS, PER_IMAGE, UNIVERSAL
from robust_ssl.attacks import UniversalPerturbation, universal
from robust_ssl.build import Function, name_of, text_of
from robust_ssl.evaluation import checks
from robust_ssl.experiment.train import load_trained
from robust_ssl.parallel import Parallel
from robust_ssl.types import Outputs
from robust_ssl.workdir import fingerprint

QUIET = {"progress": "quiet"}
SMALL = {"epochs": 1, "batch_size": 16, "head": "linear", **QUIET}
INNER = {"attack": {"num_steps": 1}}


@pytest.fixture(scope="module")
def perturbation():
    images, _ = tiny.images()
    return robust_ssl.attack(tiny.encoder(), images, num_steps=3, batch_size=16, **QUIET)


@pytest.fixture(scope="module")
def classifier():
    return models.classifier(jax.random.key(0), tiny.encoder(), 4, head="linear")


# --- attack -------------------------------------------------------------------------------------


def test_a_perturbation_keeps_its_budget_and_is_applied_to_any_images(perturbation):
    images, _ = tiny.images("test", n=5)
    attacked = perturbation.apply(images)
    assert attacked.shape == (5, 8, 8, 3) and attacked.dtype == np.float32
    assert np.abs(attacked - images / 255).max() <= 10 / 255 + 1e-6
    assert np.abs(attacked - images / 255).max() > 9 / 255
    np.testing.assert_array_equal(perturbation.apply(images[0]), attacked[0])
    # Floats are not rounded to 8 bits.
    fine = np.full((1, 8, 8, 3), 0.5001, np.float32)
    np.testing.assert_allclose(
        perturbation.apply(fine)[0] - fine[0], perturbation.numpy(), atol=1e-6
    )


def test_no_form_of_floats_is_rounded(perturbation):
    floats = np.random.default_rng(0).uniform(size=(5, 8, 8, 3)).astype(np.float32)
    attacked = perturbation.apply(floats)
    for form in (np.moveaxis(floats, 3, 1), list(floats), floats.tolist(), jnp.asarray(floats)):
        np.testing.assert_allclose(perturbation.apply(form), attacked, atol=1e-7)
    gray = floats[..., 0]
    repeated = perturbation.apply(np.repeat(gray[..., None], 3, axis=-1))
    np.testing.assert_array_equal(perturbation.apply(gray), repeated)
    half = jnp.asarray(floats, jnp.bfloat16)
    np.testing.assert_array_equal(
        perturbation.apply(half), perturbation.apply(np.asarray(half, np.float32))
    )


def test_a_perturbation_is_what_a_fit_returns(perturbation):
    images, _ = tiny.images()
    keys, epsilons = attacks.members(seeds=[0], epsilons=[10 / 255])
    parallel = Parallel.create(num_devices=1)
    batches = data.Batches(data.from_arrays(images), 16, seed=0, stage="attack", parallel=parallel)
    fitted = attacks.fit(
        attacks.UniversalPGD(),
        tiny.encoder(),
        [{"images": np.asarray(batches(step)["images"], np.float32) / 255} for step in range(3)],
        keys=keys,
        epsilons=epsilons,
        image_shape=(8, 8, 3),
        parallel=parallel,
    )
    np.testing.assert_allclose(perturbation.numpy(), fitted.member(0).delta, atol=1e-6)
    np.testing.assert_allclose(perturbation.curve, fitted.curve[:, 0], rtol=1e-5)


def test_a_perturbation_is_saved_loaded_resized_and_drawn(perturbation, tmp_path):
    perturbation.save(tmp_path / "p.npz")
    loaded = robust_ssl.Perturbation.load(tmp_path / "p.npz")
    np.testing.assert_array_equal(loaded.numpy(), perturbation.numpy())
    assert repr(loaded) == "Perturbation('universal_pgd', 8x8 pixels, budget 10/255)"
    assert loaded.resized(16).numpy().shape == (16, 16, 3)
    perturbation.plot(tiny.images("test", n=3)[0]).savefig(tmp_path / "images.png")
    perturbation.plot().savefig(tmp_path / "alone.png")
    assert (tmp_path / "images.png").stat().st_size > 1000


@pytest.mark.parametrize("name", sorted(UNIVERSAL))
def test_every_universal_attack_has_its_name(name):
    value = robust_ssl.api.attacking.universal_attack(name, {})
    assert value.name == name
    assert {*UNIVERSAL} == {
        kind().name
        for kind in vars(attacks).values()
        if isinstance(kind, type) and hasattr(kind, "init") and hasattr(kind, "delta")
        if kind is not attacks.UniversalAttack
    }


def test_other_threats_and_options(perturbation):
    images, _ = tiny.images()
    patch = robust_ssl.attack(
        tiny.encoder(),
        images,
        epsilon=0.1,
        threat=threats.Patch,
        num_steps=1,
        batch_size=8,
        **QUIET,
    )
    assert patch.epsilon == pytest.approx(0.1) and "10 % of the area" in repr(patch)
    value = attacks.UniversalPGD(step_size=0.01)
    by_value = robust_ssl.attack(
        tiny.encoder(), images, attack=value, num_steps=3, batch_size=16, **QUIET
    )
    by_name = robust_ssl.attack(
        tiny.encoder(), images, step_size=0.01, num_steps=3, batch_size=16, **QUIET
    )
    np.testing.assert_array_equal(by_value.numpy(), by_name.numpy())
    assert not np.array_equal(by_value.numpy(), perturbation.numpy())


# --- measure ------------------------------------------------------------------------------------


def test_a_result_counts_what_is_right(classifier, perturbation):
    images, labels = tiny.images("test", n=10)
    result = robust_ssl.measure(
        classifier, images, labels, attacks=[perturbation, "fgsm"], examine=False, **QUIET
    )
    right = np.asarray(classifier(images / np.float32(255)).logits).argmax(1) == labels
    attacked = np.round(perturbation.apply(images) * 255) / np.float32(255)
    after = np.asarray(classifier(attacked.astype("f4")).logits).argmax(1) == labels
    assert result.clean_accuracy == right.mean()
    rows = {row.attack: row for row in result.rows}
    assert rows["universal_pgd"].accuracy == after.mean()
    assert result.robust_accuracy <= min(row.accuracy for row in result.rows)
    assert list(rows) == ["none", "universal_pgd", "fgsm", "worst case per image"]
    assert rows["fgsm"].budget == "10/255"  # of the perturbation
    assert result.verdict.word == "not examined"


def test_a_result_is_shown_and_written(classifier, tmp_path):
    images, labels = tiny.images("test", n=8)
    result = robust_ssl.measure(classifier, images, labels, attacks={"<b>": "fgsm"}, **QUIET)
    assert "8/255" in repr(result) and result.verdict.word in repr(result)
    assert "&lt;b&gt;" in result._repr_html_() and "<b>" not in result._repr_html_()
    result.to_json(tmp_path / "result.json")
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["worst"]["n"] == 8 and document["results"][0]["attack"] == "<b>"
    assert document["verdict"]["verdict"] == result.verdict.word != "not examined"
    assert len(document["verdict"]["checks"]) > 15


def test_classes_go_by_their_names(classifier):
    images, labels = tiny.images("test", n=8)
    named = classifier.replace(class_names=("a", "b", "c", "d"))
    sorted_otherwise = {"images": images, "labels": 3 - labels, "class_names": ("d", "c", "b", "a")}
    once = {"attacks": "fgsm", "examine": False, **QUIET}
    turned = robust_ssl.measure(named, data.from_arrays(**sorted_otherwise), **once)
    straight = robust_ssl.measure(classifier, images, labels, **once)
    assert turned.clean_accuracy == straight.clean_accuracy
    others = data.from_arrays(images, labels, class_names=("a", "b", "c", "x"))
    with pytest.raises(ValueError, match="which are not"):
        robust_ssl.measure(named, others, **once)


@pytest.mark.slow
def test_autoattack_is_one_line(classifier):
    images, labels = tiny.images("test", n=8)
    result = robust_ssl.measure(
        classifier, images, labels, attacks="autoattack", examine=False, **QUIET
    )
    assert [row.attack for row in result.rows] == ["none", "autoattack"]
    [entry] = result.as_dict()["results"]
    assert entry["family"] == "autoattack" and entry["gradient_evaluations"] > 1000


# --- secure -------------------------------------------------------------------------------------


def test_securing_is_the_stage_train_of_a_run(tmp_path):
    images, labels = tiny.images()
    secured = robust_ssl.secure(
        tiny.encoder(), images, labels, recipe="pgd_at", validation=0.25, **SMALL, **INNER
    )
    config = {
        "stages": ["train"],
        "encoder": "tiny:encoder",
        "downstream": {"function": "tiny:images", "validation": 0.25},
        "common": {"epochs": 1, "batch_size": 16, "head": "linear"},
        "recipes": {"pgd_at": {"function": "robust_ssl.recipes:pgd_at", **INNER}},
    }
    run = experiment.Context(
        experiment.plan(config),
        tmp_path,
        Parallel.create(num_devices=1),
        progress.Progress("quiet"),
    )
    trained = load_trained(run, run.plan.recipes["pgd_at"], 0)
    assert fingerprint(secured.variables) == fingerprint(trained.variables)


@pytest.mark.slow
def test_gen_af_brings_its_first_stage():
    images, labels = tiny.images()
    small = {**SMALL, "num_steps": 1, "select": {"layers": 1}}  # of three
    secured = robust_ssl.secure(tiny.encoder(), images, labels, recipe="gen_af", **small)
    assert secured.num_classes == 4


def test_a_recipe_brings_its_teacher_and_its_epochs(monkeypatch):
    """What it is made from, and what its function cannot do without."""
    from robust_ssl.api import securing

    common = {"epochs": 8, "batch_size": 16, "head": "linear"}
    name, recipes = securing._recipes("ramp_teacher", {}, common, 0.03)
    assert name == "ramp_teacher" and {"full", "ramp_teacher"} == {*recipes}
    _, recipes = securing._recipes("free_at", {}, common, 0.03)
    assert recipes["free_at"].epochs == 2  # each batch is shown four times


def test_a_recipe_of_ones_own_is_a_mapping():
    images, labels = tiny.images()
    losses = {"mine": "robust_ssl.losses:clean_cross_entropy"}
    secured = robust_ssl.secure(
        tiny.encoder(), images, labels, recipe={"losses": losses, "best": "last"}, **SMALL
    )
    fresh = models.classifier(jax.random.key(1), tiny.encoder(), 4, head="linear")
    assert fingerprint(secured.encoder.variables) != fingerprint(fresh.encoder.variables)


# --- names --------------------------------------------------------------------------------------


def test_without_a_kind_the_kinds_are_listed():
    assert [*robust_ssl.list()] == [*KINDS]
    assert repr(robust_ssl.list()).splitlines()[0].startswith("attacks     Perturbations")


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_has_a_purpose(kind):
    names = robust_ssl.list(kind)
    assert len(names) >= 2 and all(names.purposes.values())
    assert "(no docstring)" not in names.purposes.values()
    assert repr(names).count("\n") == len(names) - 1


def test_every_attack_on_single_images_is_listed():
    named = {path.rpartition(":")[2] for path in PER_IMAGE.values()}
    unlisted = {"DriftPGD", "TDAA"}  # which need a source, and a target image
    assert named | unlisted == {"FGSM", "PGD", "APGD", "FABT", "Square", "EmbedAttack", *unlisted}


# --- what people guess first --------------------------------------------------------------------


def brightness(images):
    """A function of images that is no encoder."""
    return images.mean(axis=(1, 2))


IMAGES, LABELS = tiny.images("test", n=4)
LINF, PGD_L2 = threats.Linf(0.1), attacks.PGD(threats.L2(0.5), num_steps=1)
CALLS = {
    "budget in a universal attack": (
        lambda _: attacks.UniversalPGD(epsilon=8 / 255),
        "UniversalPGD takes no 'epsilon'.*robust_ssl.attack\\(encoder, images, attack=Univ",
    ),
    "budget in PGD": (lambda _: attacks.PGD(eps=8 / 255), "threat=robust_ssl.threats.Linf"),
    "misspelt field": (lambda _: attacks.UniversalPGD(step_sise=1), "did you mean 'step_size'"),
    "a name that is not there": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, attack="universal_pdg"),
        "did you mean 'universal_pgd'.*robust_ssl.list",
    ),
    "a per-image attack on an encoder": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, attack="pgd"),
        "measure\\(classifier, images, labels, attacks='pgd'\\)",
    ),
    "a universal attack on a classifier": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, attacks="uap"),
        "robust_ssl.attack\\(encoder, surrogate_images, attack='uap'\\)",
    ),
    "an unfitted attack": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, attacks=attacks.UniversalPGD()),
        "yet to be fitted",
    ),
    "no labels": (lambda net: robust_ssl.measure(net, IMAGES), "labels are needed"),
    "too large a label": (
        lambda net: robust_ssl.measure(net, IMAGES, [0, 1, 2, 9]),
        "label 9, and the classifier has 4 classes",
    ),
    "an encoder to measure": (
        lambda _: robust_ssl.measure(tiny.encoder(), IMAGES, LABELS),
        "put a head on it",
    ),
    "a recipe that is not there": (
        lambda _: robust_ssl.secure(tiny.encoder(), IMAGES, LABELS, recipe="gen_fa"),
        "did you mean 'gen_af'.*robust_ssl.list",
    ),
    "an option that is not there": (
        lambda _: robust_ssl.secure(tiny.encoder(), IMAGES, LABELS, recipe="trades", epoch=3),
        "epoch",
    ),
    "another size": (
        lambda net: robust_ssl.measure(net, np.zeros((4, 9, 9, 3), np.uint8), LABELS),
        "resize them: robust_ssl.data.load\\(\\(images, labels\\), image_size=8\\)",
    ),
    "pixels of 0 to 255": (
        lambda net: robust_ssl.measure(net, IMAGES.astype(np.float32), LABELS),
        "divide by 255",
    ),
    "a misspelt built-in set": (
        lambda _: robust_ssl.attack(tiny.encoder(), "photo_crop"),
        "did you mean 'photo_crops'",
    ),
    "a function for an encoder": (
        lambda _: robust_ssl.attack(brightness, IMAGES),
        r"brightness returns an array \(2, 3\).*Outputs; .*from_callable\(brightness, image_size\)",
    ),
    "an empty name": (lambda _: robust_ssl.attack(tiny.encoder(), ""), "images is empty"),
    "an attack's class": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, attack=attacks.UniversalPGD),
        r"UniversalPGD is a class; make one: UniversalPGD\(",
    ),
    "a class to measure with": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, attacks=attacks.FGSM),
        r"FGSM is a class; make one",
    ),
    "no attack": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, attacks=None),
        "None is no attack",
    ),
    "a threat in place of its class": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, threat=threats.Linf(8 / 255)),
        "threat=threats.Linf, epsilon=",
    ),
    "several budgets": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, epsilon=[1 / 255, 2 / 255]),
        "one budget, got .*call attack once for each",
    ),
    "a recipe's function": (
        lambda _: robust_ssl.secure(
            tiny.encoder(), IMAGES, LABELS, recipe=robust_ssl.recipes.pgd_at
        ),
        r"recipe=my_recipe\(\)",
    ),
    "another head than the recipe's": (
        lambda _: robust_ssl.secure(
            tiny.encoder(), IMAGES, LABELS, recipe="linear_probe", head="mlp"
        ),
        "linear_probe has the head 'linear', and secure\\(head='mlp'\\) another",
    ),
    "epochs as text": (
        lambda _: robust_ssl.secure(tiny.encoder(), IMAGES, LABELS, epochs="2"),
        "epochs= is a whole number of at least 1, got '2'",
    ),
    "a share that is none": (
        lambda _: robust_ssl.secure(tiny.encoder(), IMAGES, LABELS, validation=float("nan")),
        "validation must be a number in",
    ),
    "labels twice": (
        lambda net: robust_ssl.measure(net, (IMAGES, LABELS), LABELS),
        "have their own labels; leave out `labels`",
    ),
    "fewer classes than logits": (
        lambda net: robust_ssl.measure(
            net, {"images": IMAGES, "labels": LABELS % 2, "class_names": ["b", "a"]}
        ),
        "4 logits, and .* the classes 'b', 'a'",
    ),
    "no image in an update": (
        lambda _: robust_ssl.secure(tiny.encoder(), IMAGES, LABELS, batch_size=0),
        "batch_size= is a whole number of at least 1, got 0",
    ),
    "several budgets of what is measured": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, epsilon=[1 / 255, 2 / 255]),
        "one budget, got .*call measure once for each",
    ),
    "a budget as text": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, epsilon="8/255"),
        "epsilon= is a number, for example 8/255, got '8/255'",
    ),
    "a switch for a budget": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, epsilon=True),
        "epsilon= is a number",
    ),
    "a budget of training as text": (
        lambda _: robust_ssl.secure(tiny.encoder(), IMAGES, LABELS, epsilon="8/255"),
        "epsilon= is a number, for example 8/255, got '8/255'",
    ),
    "a seed as text": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, seed="1"),
        "seed= must be a whole number in .*got '1'",
    ),
    "half a seed": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, seed=1.5),
        "seed= must be a whole number",
    ),
    "a seed whose key is that of 0": (
        lambda _: robust_ssl.secure(tiny.encoder(), IMAGES, LABELS, seed=2**32),
        "seed= must be a whole number in .*got 4294967296",
    ),
    "a text for a switch": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, examine="no"),
        "examine= must be true or false, got 'no'",
    ),
    "an attack's name in capitals": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, attacks="FGSM"),
        "did you mean 'fgsm'",
    ),
    "half a step": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, num_steps=2.5),
        "num_steps= is a whole number of at least 1, got 2.5",
    ),
    "half an image": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, batch_size=2.5),
        "batch_size= is a whole number",
    ),
    "a threat's name": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, threat="robust_ssl.threats:L2"),
        "threat= is a class and no name",
    ),
    "entries for a threat": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, threat=lambda e: {"epsilon": e}),
        "a dict is no threat: it has no sample, project and steepest",
    ),
    "a text for a threat": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, threat=lambda e: "linf"),
        "threat=<lambda> must make a threat of a budget: a str is no threat",
    ),
    "a threat's class that makes a class": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, threat=lambda e: threats.L2),
        r"L2 is a class and no threat; make one: L2\(\.\.\.\)",
    ),
    "a band of nothing": (
        lambda _: robust_ssl.attack(tiny.encoder(), IMAGES, threat=threats.Band),
        r"lambda epsilon: threats\.Band\(threats\.Linf\(epsilon\), high=",
    ),
    "an objective that needs labels": (
        lambda _: robust_ssl.attack(
            tiny.encoder(), IMAGES, objective="robust_ssl.objectives:cross_entropy"
        ),
        "robust_ssl.attack and others .* take none: .* feature_l2.*robust_ssl.measure",
    ),
    "a seed for a key": (
        lambda _: _gray().apply(IMAGES, key=7),
        r"such as jax.random.key\(7\), got 7",
    ),
    "a number for an attack": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, attacks=3),
        "3 attacks no image",
    ),
    "a config's entries for an attack": (
        lambda net: robust_ssl.measure(
            net, IMAGES, LABELS, attacks={"function": "robust_ssl.attacks:PGD", "num_steps": 3}
        ),
        "is what a config says of an attack; measure takes its value",
    ),
    "a config's attacks": (
        lambda net: robust_ssl.measure(
            net, IMAGES, LABELS, attacks={"mine": {"function": "robust_ssl.attacks:PGD"}}
        ),
        "is what a config says of an attack; measure takes its value",
    ),
    "a file for an attack": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, attacks=pathlib.Path("a.npz")),
        r"name of a file; read it: .*Perturbation.load\('a.npz'\)",
    ),
    "a threat for an attack": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, attacks=threats.Linf(0.1)),
        "attacks no image",
    ),
    "an ensemble without a name": (
        lambda net: robust_ssl.measure(
            net, IMAGES, LABELS, attacks=attacks.autoattack.standard(threats.L2(0.5), 4)
        ),
        'give them a name: attacks={"autoattack": ...}',
    ),
    "an ensemble of two budgets": (
        lambda net: robust_ssl.measure(
            net, IMAGES, LABELS, attacks={"two": {"a": [PGD_L2], "b": [attacks.FGSM(LINF)]}}
        ),
        "its attacks have several budgets",
    ),
    "a function of logits": (
        lambda net: robust_ssl.measure(lambda x: net(x).logits, IMAGES, LABELS),
        r"must return robust_ssl.Outputs with logits .*got an array \(2, 4\) for 2 images",
    ),
    "features of the first image alone": (
        lambda _: robust_ssl.attack(lambda x: Outputs(features=x[0, 0]), IMAGES),
        r"returns an array \(8, 3\) of features for 2 images; they must be \[n, numbers\]",
    ),
    "maps for features": (
        lambda _: robust_ssl.attack(lambda x: Outputs(features=x), IMAGES),
        r"array \(2, 8, 8, 3\) of features",
    ),
    "a function of NumPy": (
        lambda net: robust_ssl.measure(
            lambda x: Outputs(features=x, logits=np.asarray(x).mean((1, 2))), IMAGES, LABELS
        ),
        "no function of JAX: .*from_callable.*on_host=True",
    ),
    "a function of NumPy to attack": (
        lambda _: robust_ssl.attack(lambda x: np.asarray(x).mean((1, 2)), IMAGES),
        "no function of JAX",
    ),
    "whole numbers for logits": (
        lambda net: robust_ssl.measure(
            lambda x: Outputs(features=x, logits=jnp.round(net(x).logits).astype(int)),
            IMAGES,
            LABELS,
        ),
        "logits are of int32, which have no gradient",
    ),
    "one logit for all": (
        lambda net: robust_ssl.measure(
            lambda x: Outputs(features=x, logits=net(x).logits[:, 0]), IMAGES, LABELS
        ),
        r"logits \[n, classes\], got an array \(2,\) of logits",
    ),
    "a label that a function has no logit for": (
        lambda net: robust_ssl.measure(lambda x: net(x), IMAGES, [0, 1, 2, 4]),
        "label 4, and the classifier has 4 classes",
    ),
    "logits that are no numbers": (
        lambda net: robust_ssl.measure(
            lambda x: Outputs(features=x, logits=net(x).logits * jnp.nan), IMAGES, LABELS
        ),
        r"classifier's logits are NaN when nobody attacks, on images \[0, 1, 2, 3\]",
    ),
    "the worst case's name": (
        lambda net: robust_ssl.measure(
            net, IMAGES, LABELS, attacks={"worst": {"a": attacks.FGSM(LINF)}}
        ),
        "'worst' cannot be what an attack is called",
    ),
    "a number for a name": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, attacks={1: "fgsm"}),
        "1 cannot be what an attack is called",
    ),
    "another way to report": (
        lambda net: robust_ssl.measure(net, IMAGES, LABELS, progress="silent"),
        "progress must be one of .*'quiet'.*got 'silent'",
    ),
    "an encoder's class": (lambda _: robust_ssl.attack(robust_ssl.Encoder, IMAGES), "shipped name"),
    "an encoder that ships with the package, to measure": (
        lambda _: robust_ssl.measure("simclr-cifar10-r18w24", IMAGES, LABELS),
        "'simclr-cifar10-r18w24' is an encoder; .*put a head on it",
    ),
    "a kind that is not there": (lambda _: robust_ssl.list("attack"), "did you mean 'attacks'"),
}


def _gray():
    delta = jnp.zeros(IMAGES.shape[1:])
    return robust_ssl.Perturbation(UniversalPerturbation(delta, threats.Linf(0.1)))


@pytest.mark.parametrize("guess", CALLS)
def test_a_guess_is_answered(guess, classifier):
    call, message = CALLS[guess]
    with pytest.raises((ValueError, TypeError), match=message):
        call(classifier)


def test_progress_in_a_notebook_is_one_line_that_is_written_over(monkeypatch):
    lines = []

    class Handle:
        def update(self, line, raw):
            lines[-1] = line["text/plain"]

    def display(line, raw, display_id):
        lines.append(line["text/plain"])
        return Handle()

    shell = types.SimpleNamespace(kernel=None)
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(progress.sys.modules, "IPython", ipython)
    monkeypatch.setitem(
        progress.sys.modules, "IPython.display", types.SimpleNamespace(display=display)
    )
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    with progress.Progress().stage("fit", 4) as bar:
        bar.update(1, loss=2.0)
        bar.update(2, loss=1.0)
        assert len(lines) == 1 and lines[0].startswith("fit █████")
        bar.update(4, loss=0.5)
    assert len(lines) == 1 and lines[0].startswith("fit: 4/4 steps in ")


def test_a_perturbation_can_be_measured_as_a_value(classifier, perturbation):
    value = UniversalPerturbation(perturbation.value.delta, threats.Linf(10 / 255), name="mine")
    result = robust_ssl.measure(classifier, IMAGES, LABELS, attacks=value, examine=False, **QUIET)
    assert [row.attack for row in result.rows] == ["none", "mine"]


@pytest.mark.parametrize("name", ["fgsm_rs", "ramp_fgsm", "ramp_ema", "ramp_teacher", "warm_fgsm"])
def test_a_recipes_step_goes_with_its_budget(name):
    common = {"epochs": 4, "batch_size": 8, "head": "linear"}
    for epsilon in (4 / 255, 16 / 255):
        attack = securing._recipes(name, {}, common, epsilon)[1][name].build_attack(None)
        assert attack.step_size == pytest.approx(1.25 * epsilon)
        assert attack.threat.epsilon == pytest.approx(epsilon)


CE = {"losses": {"a": "robust_ssl.losses:adversarial_cross_entropy"}}
OWN_PGD = {"function": "robust_ssl.attacks:PGD"}


@pytest.mark.parametrize(
    ("recipe", "options", "epsilon", "threat"),
    [
        ("pgd_at", {}, None, threats.Linf(8 / 255)),
        ("pgd_at", {}, 4 / 255, threats.Linf(4 / 255)),
        ("gen_af_released_stage1", {}, None, threats.Linf(0.03)),  # as published
        ("pgd_at", {"attack": {**OWN_PGD, "epsilon": 0.1}}, None, threats.Linf(0.1)),
        ({**CE, "attack": {**OWN_PGD, "epsilon": 0.1}}, {}, None, threats.Linf(0.1)),
        ({**CE, "attack": {**OWN_PGD, "epsilon": 0.1}}, {}, 0.1, threats.Linf(0.1)),
        ({**CE, "attack": "robust_ssl.attacks:PGD"}, {}, None, threats.Linf(8 / 255)),
        ({**CE, "attack": "robust_ssl.attacks:PGD"}, {}, 0.1, threats.Linf(0.1)),
        (
            {**CE, "attack": {**OWN_PGD, "epsilon": 0.5, "threat": "robust_ssl.threats:L2"}},
            {},
            None,
            threats.L2(0.5),
        ),
        (
            {**CE, "attack": {**OWN_PGD, "epsilon": 0.1, "threat": "robust_ssl.threats:Patch"}},
            {},
            None,
            threats.Patch(0.1),
        ),
    ],
)
def test_a_budget_is_the_one_that_was_given(recipe, options, epsilon, threat):
    common = {"epochs": 1, "batch_size": 8, "head": "linear"}
    name, made = securing._recipes(recipe, options, common, epsilon)
    found = made[name].build_attack(None).threat
    assert type(found) is type(threat)
    leaves = [jax.tree.leaves(each) for each in (found, threat)]
    np.testing.assert_allclose(*leaves)


def test_numbers_of_numpy_and_functions_are_options(monkeypatch):
    given = objectives.feature_cosine_distance
    fit = attacking.universal_attack("universal_pgd", {"objective": given})
    assert fit.objective is given
    options = {"step_size": np.float32(0.5), "objective": objectives.margin}
    pgd = Function.read({"function": "robust_ssl.attacks:PGD", **options}, "attack")
    assert pgd.options["step_size"] == 0.5 and pgd(LINF).objective is objectives.margin
    assert json.loads(json.dumps(text_of(pgd)))["objective"] == name_of(objectives.margin)
    monkeypatch.setattr(securing, "load_trained", lambda run, recipe, seed: recipe)
    recipe = robust_ssl.secure(
        tiny.encoder(), *tiny.images("train", n=16), recipe="pgd_at", epsilon=np.float32(0.25)
    )
    assert recipe.attack.text["epsilon"] == 0.25


def test_two_budgets_or_none_under_a_threat_of_ones_own_are_refused():
    own = {**CE, "attack": {**OWN_PGD, "epsilon": 0.1}}
    common = {"epochs": 1, "batch_size": 8, "head": "linear"}
    with pytest.raises(ValueError, match=r"epsilon=0\.1, and secure\(epsilon=0\.2\) another"):
        securing._recipes(own, {}, common, 0.2)
    silent = {**CE, "attack": {**OWN_PGD, "threat": "robust_ssl.threats:L2"}}
    with pytest.raises(ValueError, match='needs an "epsilon"'):
        securing._recipes(silent, {}, common, None)


@struct.dataclass
class Cheat:
    """Leaves its budget."""

    threat: threats.Linf

    def __call__(self, key, model, image, label=None):
        return jnp.clip(image + 0.5, 0.0, 1.0)


def test_an_attack_that_leaves_its_budget_is_no_believable_figure(classifier):
    images, labels = tiny.images("test", n=16)
    given = {
        "cheat": Cheat(threats.Linf(4 / 255)),
        "pgd": attacks.PGD(threats.Linf(8 / 255), num_steps=2),
    }
    result = robust_ssl.measure(classifier, images, labels, attacks=given, batch_size=8, **QUIET)
    kept = {check.name: check for check in result.verdict.checks}["budget_kept"]
    assert kept.status == "failed" and kept.value > 0.1
    assert "NOT BELIEVABLE" in str(result).upper()


def test_a_figure_that_was_not_examined_says_why(classifier):
    images, labels = tiny.images("test", n=8)
    same, once = np.zeros_like(labels), {"attacks": "fgsm", "batch_size": 8, **QUIET}
    told = str(robust_ssl.measure(classifier, images, same, **once))
    assert told.endswith(
        "not examined\n  not run: all 8 images are of class 0: accuracy on one class tells "
        "nothing; take a sample of several classes"
    )
    assert str(robust_ssl.measure(classifier, images, same, **once, examine=False)).endswith(
        "8 images; not examined"
    )


@pytest.mark.parametrize("seeing", [True, False])
def test_what_sees_no_label_is_no_figure_to_examine(classifier, monkeypatch, seeing):
    looked = {}

    def of_sample(model, batch, figure, rows, *, threat, **_):
        looked.update(figure=figure, epsilon=float(threat.epsilon))
        return checks.Verdict(checks.not_run(measuring.PER_IMAGE_CHECKS, "not here"))

    monkeypatch.setattr(measuring, "of_sample", of_sample)
    images, labels = tiny.images("test", n=16)
    given = {"embed": attacks.EmbedAttack(threats.Linf(16 / 255), num_steps=1)}
    if seeing:
        given["pgd"] = attacks.PGD(threats.Linf(8 / 255), num_steps=1)
    robust_ssl.measure(classifier, images, labels, attacks=given, batch_size=8, **QUIET)
    assert (looked["figure"] is not None) == seeing
    assert looked["epsilon"] == pytest.approx((8 if seeing else 16) / 255)


def test_classes_without_names_are_taken_in_order_with_a_warning(classifier, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("robust_ssl"), "propagate", True)
    images, labels = tiny.images("test", n=8)
    once = {"attacks": "fgsm", "examine": False, "batch_size": 8, **QUIET}
    pair = robust_ssl.measure(classifier, (images, labels), **once)
    assert not caplog.text
    names = {"images": images, "labels": labels, "class_names": ["d", "c", "b", "a"]}
    named = robust_ssl.measure(classifier, names, **once)
    assert named.rows[0].accuracy == pair.rows[0].accuracy
    assert "taken for the classes 'd', 'c', 'b', 'a' in this order" in caplog.text


@struct.dataclass
class Radius:
    """A threat whose budget has another name."""

    radius: float = 0.1

    def project(self, candidate, image):
        return jnp.clip(candidate, image - self.radius, image + self.radius)

    def sample(self, key, image):
        return image

    def steepest(self, gradient):
        return jnp.sign(gradient)


def test_a_budget_that_nobody_knows_is_not_printed_as_zero(classifier):
    images, labels = tiny.images("test", n=8)
    given = {
        str(radius): attacks.PGD(Radius(radius), num_steps=1, step_size=0.1)
        for radius in (0.1, 0.2)
    }
    result = robust_ssl.measure(
        classifier, images, labels, attacks=given, examine=False, batch_size=8, **QUIET
    )
    assert len(result.groups) == 2  # nobody knows whether their budgets are equal
    assert "unknown (Radius)" in str(result) and "0/255" not in str(result)


def test_attacks_in_turn_have_the_threat_that_they_are_of(classifier):
    images, labels = tiny.images("test", n=8)
    given = {"ensemble": {"pgd": [PGD_L2], "again": PGD_L2}}
    result = robust_ssl.measure(
        classifier, images, labels, attacks=given, examine=False, batch_size=8, **QUIET
    )
    [group] = result.groups
    assert (group.group.threat, group.group.epsilon) == ("L2", 0.5)


def test_a_function_and_an_attack_without_a_threat_can_be_measured(classifier):
    images, labels = tiny.images("test", n=8)
    darker = jax.tree_util.Partial(lambda key, model, image, label: image / 2)
    options = {"attacks": {"mine": darker}, "examine": False, "batch_size": 8, **QUIET}
    plain, value = (
        robust_ssl.measure(net, images, labels, **options)
        for net in (lambda x: classifier(x), classifier)
    )
    [entry] = json.loads(plain.to_json())["results"]
    assert entry["epsilon"] is None and entry["threat"] == "unknown"
    assert plain.robust_accuracy == value.robust_accuracy


def test_autoattack_aims_at_all_classes_of_a_function_whatever_is_labelled(classifier):
    images, labels = tiny.images("test", n=4)
    once = {"attacks": "autoattack", "examine": False, **QUIET}
    value, plain = (
        robust_ssl.measure(net, images, labels % 2, **once)
        for net in (classifier, lambda x: classifier(x))
    )
    targets = [len(result.groups[0].members[0].value["apgd-t"]) for result in (value, plain)]
    assert targets == [3, 3]  # of four logits; two labels left one
    assert plain.robust_accuracy == value.robust_accuracy


def test_few_images_make_the_same_batches_on_any_usual_number_of_devices():
    images, labels = tiny.images(n=25)
    encoder, counts = tiny.encoder(), (1, 2)
    options = {"recipe": "linear_probe", **SMALL, "batch_size": 64}  # 23 are left
    heads, deltas = [], []
    for parallel in (Parallel.create(num_devices=count) for count in counts):
        net = robust_ssl.secure(encoder, images, labels, parallel=parallel, **options)
        heads.append(jax.tree.leaves(net.head_variables))
        fitted = robust_ssl.attack(encoder, images, num_steps=2, parallel=parallel, **QUIET)
        deltas.append(np.asarray(fitted.value.delta))
    for one, other in zip(*heads, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert np.abs(deltas[0] - deltas[1]).mean() < 1e-3


@pytest.mark.parametrize(
    ("images", "devices", "batch"), [(64, 4, 64), (63, 4, 32), (5, 1, 4), (5, 3, 3), (2, 2, 2)]
)
def test_a_batch_is_as_large_as_the_images_allow(images, devices, batch):
    parallel = Parallel.create(num_devices=devices)
    assert inputs.batch_of(64, images, parallel) == batch


def test_fewer_images_than_devices_and_what_are_no_devices_are_refused():
    with pytest.raises(ValueError, match=r"3 images cannot be shared by 4 devices; take fewer"):
        inputs.batch_of(64, 3, Parallel.create(num_devices=4))
    with pytest.raises(ValueError, match=r"parallel= is a robust_ssl.parallel.Parallel.*got 4"):
        inputs.devices_of(4)


def test_attacks_of_one_name_are_all_measured(perturbation):
    named = UniversalPerturbation(perturbation.value.delta, threats.Linf(0.1), "uap (strong)")
    other = named.replace(name="uap")
    given = [named, named, other, other, named]
    assert [*choice.named(given)] == [
        *("uap (strong)", "uap (strong) (2)", "uap", "uap (2)", "uap (strong) (3)"),
    ]


def test_examples_are_drawn(perturbation):
    assert perturbation.plot(data.from_arrays(*tiny.images("test", n=9))).axes


def test_one_image_is_drawn(perturbation):
    pytest.importorskip("matplotlib")
    images, _ = tiny.images("test", n=2)
    assert perturbation.plot(images[0]) is not None


def test_an_attack_under_l2_goes_as_far_as_its_budget():
    images, _ = tiny.images()
    options = {"threat": threats.L2, "epsilon": 3.0, "num_steps": 60, "batch_size": 16, **QUIET}
    usual = robust_ssl.attack(tiny.encoder(), images, **options)
    short = robust_ssl.attack(tiny.encoder(), images, step_size=2e-3, **options)
    assert usual.curve[-1] > 1.3 * short.curve[-1]
    attack = attacks.L4ABase()
    assert attack.step_size is None
    assert universal.usual_length(threats.Band(threats.L2(2.0), high=0.1), 2e-4) < 0.02


ONE_STEP = {"function": "robust_ssl.attacks:PGD", "num_steps": 1}
POOL = {"function": "robust_ssl.finetuning:UniversalPool", "epsilon": 0.04}


@pytest.mark.parametrize("attack", [ONE_STEP, POOL])
def test_an_attack_that_no_loss_reads_is_refused(attack):
    recipe = {"losses": {"mine": "tiny_recipes:of_the_clean"}, "attack": attack}
    with pytest.raises(
        ValueError, match=r"recipe mine has an attack, and none of its losses \(mine\) reads inputs"
    ):
        robust_ssl.secure(tiny.encoder(), *tiny.images(n=32), recipe=recipe, **SMALL)


@pytest.mark.parametrize("reads", [{"batch_statistics": "both"}, {"adv_ratio": 0.0, "losses": {}}])
def test_an_attack_may_be_read_by_statistics_or_weigh_nothing(reads):
    recipe = {"losses": {"mine": "tiny_recipes:of_the_clean"}, "attack": ONE_STEP, **reads}
    net = robust_ssl.secure(tiny.encoder(), *tiny.images(n=32), recipe=recipe, **SMALL)
    assert net.num_classes == 4


@pytest.mark.parametrize(
    "loss",
    [
        "tiny_recipes:held",
        "tiny_recipes:ones",
        {"function": "tiny_recipes:of_the_clean", "weight": 0.0},
    ],
)
def test_losses_without_a_gradient_train_nothing_and_fail(loss):
    with pytest.raises(FloatingPointError, match="no gradient, and nothing was trained"):
        recipe = {"losses": {"mine": loss}}
        robust_ssl.secure(tiny.encoder(), *tiny.images(n=32), recipe=recipe, **SMALL)
    frozen = {"rates": {"**": "freeze"}, "batch_statistics": "frozen", **recipe}
    net = robust_ssl.secure(tiny.encoder(), *tiny.images(n=32), recipe=frozen, **SMALL)
    assert net.num_classes == 4


@pytest.mark.parametrize(
    ("rates", "statistics", "said"),
    [
        ({"**": "freeze"}, "frozen", "nothing is trained"),
        ({"**": "freeze"}, "clean", "only batch statistics change"),
        ({"encoder/**": "freeze", "head/**": 5e-3}, "frozen", None),
    ],
)
def test_a_new_head_that_nothing_moves_is_warned_of(rates, statistics, said, caplog):
    caplog.set_level(logging.WARNING, "robust_ssl")
    losses = {"mine": "robust_ssl.losses:clean_cross_entropy"}
    recipe = {"losses": losses, "rates": rates, "batch_statistics": statistics}
    robust_ssl.secure(tiny.encoder(), *tiny.images(n=32), recipe=recipe, **SMALL)
    warned = [r.getMessage() for r in caplog.records if "freeze every parameter" in r.getMessage()]
    assert len(warned) == (said is not None)
    assert all("recipe " in text and said in text for text in warned)


def test_secure_names_no_state_that_is_gone(monkeypatch):
    images, labels = tiny.images(n=32)
    losses = {"nan": {"function": "tiny_recipes:not_a_number"}}
    with pytest.raises(FloatingPointError) as caught:
        robust_ssl.secure(tiny.encoder(), images, labels, recipe={"losses": losses}, **SMALL)
    assert "secure keeps nothing on disk" in caught.value.__notes__[-1]
    assert not any("goes on" in note for note in caught.value.__notes__)


def test_a_preprocessing_that_cannot_be_saved_is_refused_before_training(monkeypatch):
    images, labels = tiny.images(n=32)
    encoder = models.resnet18(jax.random.key(0), width=4, image_size=8)
    monkeypatch.setattr(securing, "load_trained", None)  # nothing is trained
    with pytest.raises(ValueError, match="a frozen dataclass with __call__"):
        halved = encoder.replace(preprocess=lambda pixels: pixels / 2)
        robust_ssl.secure(halved, images, labels, recipe="linear_probe", **SMALL)


def test_a_function_may_be_the_preprocessing_of_ones_own_encoder():
    images, labels = tiny.images(n=32)
    halved = tiny.encoder().replace(preprocess=lambda pixels: pixels / 2)
    net = robust_ssl.secure(halved, images, labels, recipe="linear_probe", **SMALL)
    pixels = images[:4] / np.float32(255)
    plain = net.replace(encoder=net.encoder.replace(preprocess=None))
    np.testing.assert_allclose(net(pixels).logits, plain(pixels / 2).logits, rtol=1e-5)
