"""The stage `screen`, what it leaves, what it refuses, and the screen that is served."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_recipes import FROZEN, config, context, go, manifest, put, snapshot

import robust_ssl
from robust_ssl import experiment, models, screening, struct
from robust_ssl.experiment import UsageError
from robust_ssl.experiment import screen as stage
from robust_ssl.screening import Calibrated, Fused, Screen, Surprise
from robust_ssl.stopping import Stopped
from robust_ssl.weights import cards
from robust_ssl.workdir import ConfigChangedError

pytestmark = pytest.mark.usefixtures("quick_programs")

PLACE = "robust_ssl.screening:fit_"


def screened(**change):
    """A config of two recipes whose second is screened."""
    changed = config({"baseline": FROZEN, "other": {**FROZEN, "epochs": 1}}, "screen")
    changed.compare.claims = ()
    changed.screening = {
        "detectors": {n: f"{PLACE}{n}" for n in ("template", "disagreement")},
        **{"images": 32, "calibration": 16, "test": 16, "batch_size": 16},
        "adaptive": {"images": 8, "num_steps": 2, "cutoffs": (1.0,), "universal_steps": 2},
    }
    put(changed, change)
    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"screening.modle": "other"}, "unknown entry 'modle' in config.screening; did you mean"),
        ({"screening.model": "othr"}, "config.screening.model is 'othr'.*did you mean 'other'"),
        ({"screening.public": "x"}, "config.screening.public is 'x', which is neither"),
        ({"screening.detectors": {"a": f"{PLACE}spectrm"}}, "no function 'fit_spectrm'; did you"),
        ({"screening.detectors": {"fused": f"{PLACE}spectrum"}}, "name at least one, and none"),
        ({"screening.detectors": {}}, "config.screening: detectors: name at least one"),
        ({"screening.images": 0}, "config.screening.images must be a whole number of at least 1"),
        (
            {"screening.detectors": {"a": {"function": f"{PLACE}spectrum", "bands": 3}}},
            "takes no option 'bands'; did you mean 'num_bands'",
        ),
        ({"screening.adaptive.cutoffs": ()}, "cutoffs is empty"),
    ],
)
def test_the_plan_refuses(change, words):
    with pytest.raises(UsageError, match=words):
        experiment.plan(screened(**change))


def a_screen():
    encoder = tiny.encoder()
    net, public = (
        models.classifier(jax.random.key(seed), encoder, 4, head="linear") for seed in (1, 2)
    )
    images = jnp.asarray(tiny.images("calibration", n=32)[0] / 255.0, jnp.float32)
    known = screening.Known(jnp.full((1, 8, 8, 3), 0.05).at[0, ::2].set(-0.05), ("x",), public)
    members = {}
    for name in ("template", "spectrum", "disagreement"):
        detector = getattr(screening, f"fit_{name}")(None, net, images, known)
        clean = jax.vmap(lambda image, d=detector: d.score(None, net, image))(images)
        members[name] = Calibrated(detector, Surprise.fit(np.asarray(clean)))
    return Screen(net, Fused(members), jnp.float32(4.0), jax.random.key(3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    made = a_screen()
    robust_ssl.save_screen(made, folder, builder=tiny.encoder)
    return made, folder


def load(folder):
    return robust_ssl.load_screen(folder, builder=tiny.encoder)


def test_what_is_loaded_screens_as_what_was_saved(saved):
    made, folder = saved
    images = np.concatenate([tiny.images("test", n=8)[0], np.full((1, 8, 8, 3), 128, np.uint8)])
    before, after = made(images), load(folder)(images)
    np.testing.assert_array_equal(before.score, after.score)
    np.testing.assert_array_equal(before.suspicious, before.score > 4.0)
    assert before.reason == after.reason
    assert after.reason[-1] == "spectrum"


@struct.dataclass
class Spectrum(screening.Spectrum):
    """A detector of one's own by the name of one of the package's."""

    def score(self, key, model, image):
        return 100 * jnp.mean(image)


def test_a_detector_of_ones_own_is_loaded_as_that_or_refused(tmp_path):
    made = a_screen()
    mine = made.fused.members["spectrum"]
    fields = {f.name: getattr(mine.detector, f.name) for f in dataclasses.fields(mine.detector)}
    members = {"mine": Calibrated(Spectrum(**fields), mine.surprise)}
    robust_ssl.save_screen(
        dataclasses.replace(made, fused=Fused(members)), tmp_path, builder=tiny.encoder
    )
    with pytest.raises(ValueError, match="'test_screen:Spectrum', which is not one of"):
        load(tmp_path)
    for name in ("test_screen:Spectrum", "Spectrum"):
        detectors = {name: Spectrum}
        loaded = robust_ssl.load_screen(tmp_path, builder=tiny.encoder, detectors=detectors)
        assert type(loaded.fused.members["mine"].detector) is Spectrum


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((8, 8, 3), np.uint8), r"must be \[n, H, W, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "there are no images"),
        (np.full((1, 8, 8, 3), 128), "must be uint8, or float pixels"),
        (np.full((1, 8, 8, 3), 128.0), "must be uint8, or float pixels"),
    ],
)
def test_a_screen_refuses_what_is_no_image(saved, images, words):
    with pytest.raises(ValueError, match=words):
        saved[0](images)


def test_an_image_that_cannot_be_judged_is_suspicious(saved):
    blind = saved[0].replace(threshold=jnp.float32("nan"))
    assert blind(tiny.images("test", n=1)[0]).suspicious.all()


def _edited(folder, tmp_path, file, edit):
    copy = tmp_path / "copy"
    for source in (f for f in folder.rglob("*") if f.is_file()):
        target = copy / source.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (copy / file).write_bytes(edit((copy / file).read_bytes()))
    return copy


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        ("screen.json", lambda b: b.replace(b"4.0", b"9.0"), "is not what was written"),
        ("screen.json", lambda b: b[:-20], "screen.json"),
        ("screen.safetensors", lambda b: b[:-1] + b"\x01", "is not the file its card describes"),
        ("head.safetensors", lambda b: b[:-1] + b"\x01", "is not the file its card describes"),
    ],
)
def test_an_edited_screen_is_refused(saved, tmp_path, file, edit, words):
    copy = _edited(saved[1], tmp_path, file, edit)
    with pytest.raises(ValueError, match=words):
        load(copy)


def _resealed(change):
    def edit(content):
        record = json.loads(content)
        change(record)
        return cards.encode({name: entry for name, entry in record.items() if name != "sha256"})

    return edit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["members"]["spectrum"].update(kind="System"), "is not one of"),
        (lambda r: r["members"]["spectrum"].pop("shapes"), "missing or of the wrong type: shapes"),
        (lambda r: r["members"].update({"../x": r["members"]["spectrum"]}), "cannot be a name"),
        (lambda r: r["members"]["spectrum"]["options"].update(x=1), "do not make a screen"),
        (lambda r: r.update(key=["a"]), "do not make a screen|could not convert|invalid literal"),
        (lambda r: r.update(threshold="4"), "missing or of the wrong type: threshold"),
    ],
)
def test_a_card_that_makes_no_screen_is_refused(saved, tmp_path, change, words):
    copy = _edited(saved[1], tmp_path, "screen.json", _resealed(change))
    with pytest.raises(ValueError, match=words):
        load(copy)


def test_a_screen_of_another_classifier_is_refused(saved, tmp_path):
    _, folder = saved
    copy = _edited(folder, tmp_path, "screen.json", lambda b: b)
    other = models.classifier(jax.random.key(9), tiny.encoder(), 4, head="linear")
    robust_ssl.save_classifier(other, copy, builder=tiny.encoder)
    with pytest.raises(ValueError, match="another classifier than the one beside it"):
        load(copy)


def test_where_there_is_no_screen_it_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no screen in"):
        robust_ssl.load_screen(tmp_path)


@pytest.mark.slow
def test_the_stage_leaves_figures_and_a_screen_and_goes_on_where_it_was(tmp_path, monkeypatch):
    keep = stage._Keeper.__call__
    asked = []

    def stop_at_the_third(keeper, name, compute):
        asked.append(name)
        if len(asked) == 3:
            raise Stopped("now")
        return keep(keeper, name, compute)

    with monkeypatch.context() as patch:
        patch.setattr(stage._Keeper, "__call__", stop_at_the_third)
        with pytest.raises(Stopped):
            go(screened(), tmp_path)
    parts = snapshot(tmp_path / "screen" / "parts")
    assert len(parts) == 2
    go(screened(), tmp_path)
    assert parts.items() <= snapshot(tmp_path / "screen" / "parts").items()
    document = json.loads((tmp_path / "screening.json").read_text())
    assert document == manifest(tmp_path, "screen")["results"]
    assert document["model"] == "other"
    assert document["public"] == "baseline"
    assert document["images"]["shifted"]["n"] == 16
    names = [entry["detector"] for entry in document["detectors"]]
    assert names == ["disagreement", "template", "fused"]
    attacks = {entry["attack"]: entry for entry in document["detectors"][1]["attacks"]}
    assert set(attacks) == {"universal_pgd", "random_noise", "pgd"}
    assert attacks["universal_pgd"]["left_out"]
    assert not attacks["pgd"]["left_out"]
    for entry in document["detectors"]:
        kinds = [adaptive["family"] for adaptive in entry["adaptive"]]
        assert kinds == ["per_image", "universal"]
    screen = robust_ssl.load_screen(tmp_path / "screen", builder=tiny.encoder)
    assert screen(tiny.images("test", n=8)[0]).score.shape == (8,)
    assert "| template" in (tmp_path / "screening.md").read_text()
    before = snapshot(tmp_path / "screen")
    go(screened(), tmp_path)
    assert snapshot(tmp_path / "screen") == before
    page = (tmp_path / "screening.md").read_text()
    (tmp_path / "screening.md").write_text("my note")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_try_detectors", lambda *args: pytest.fail("it tried again"))
        go(screened(), tmp_path)
    assert (tmp_path / "screening.md").read_text() == page
    assert (tmp_path / "screening.md.changed").read_text() == "my note"
    (tmp_path / "screening.json").unlink()
    more = screened()  # what comes later is not meant while the other is there
    more.recipes.last = {**FROZEN, "epochs": 1}
    go(more, tmp_path)
    assert json.loads((tmp_path / "screening.json").read_text()) == document
    del more.recipes.other
    with pytest.raises(ConfigChangedError, match="the screening of 'other', and 'last' is to be"):
        stage.check(context(more, tmp_path))


@pytest.mark.slow
def test_without_a_second_classifier_the_rest_is_done(tmp_path):
    changed = screened(**{"screening.adaptive": None, "screening.model": "baseline"})
    go(changed, tmp_path)
    document = json.loads((tmp_path / "screening.json").read_text())
    assert document["public"] is None
    assert [entry["detector"] for entry in document["absent"]] == ["disagreement"]
    assert {entry["verdict"] for entry in document["detectors"]} == {"not tried"}
