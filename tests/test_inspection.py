"""The light inspection: a healthy classifier passes each time, and what has changed is found."""

import json
import pathlib
import re
import shlex
import shutil
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml
from PIL import Image

from robust_ssl import data, inspection, models, provenance, threats, weights
from robust_ssl.attacks import UniversalPerturbation
from robust_ssl.cli import inspect, main
from robust_ssl.inspection import baselines, findings, measuring
from robust_ssl.weights import cards

SIZE, CLASSES = 16, 4


def network(seed=0, **changes):
    options = {"width": 16, "heads": 2, "depth": 1, "patch_size": 8, "image_size": SIZE, **changes}
    encoder = models.vision_transformer(jax.random.key(seed), **options)
    classifier = models.classifier(jax.random.key(1), encoder, CLASSES, head="linear")
    return fitted(classifier)


def fitted(classifier):
    """The head by least squares: a classifier that is right without training."""
    images, labels = tiny.images("train", n=200, size=SIZE, classes=CLASSES)
    features, _ = measuring.outputs(classifier, images)
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(design, 6 * np.eye(CLASSES)[labels], rcond=None)
    (name,) = classifier.head_variables["params"]
    layer = {"kernel": jnp.float32(solution[:-1]), "bias": jnp.float32(solution[-1])}
    return classifier.replace(head_variables={"params": {name: layer}})


@pytest.fixture(scope="module")
def approved(tmp_path_factory):
    """A saved classifier and its baseline, with short fits that are shorter still."""
    folder = tmp_path_factory.mktemp("approved")
    patch = pytest.MonkeyPatch()
    patch.setattr(measuring, "STEPS", 4)
    patch.setattr(baselines, "_FITS", 2)
    weights.save_classifier(network(), folder / "net")
    images, labels = tiny.images("test", n=120, size=SIZE, classes=CLASSES)
    delta = 0.06 * np.sign(np.random.default_rng(0).normal(size=(SIZE, SIZE, 3)))
    stored = UniversalPerturbation(jnp.float32(delta), threats.Linf(jnp.float32(0.06)), "noise")
    made = inspection.baseline(folder / "net", images, labels, [stored], folder / "baseline")
    assert made.record["figures"]["accuracy"] > 0.6
    yield folder
    patch.undo()


@pytest.fixture
def place(approved, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(approved, tmp_path / "copy")


def new_images(n=60, seed=5):
    pixels, _ = tiny.images("x" * (4 + seed), n=n, size=SIZE, classes=CLASSES)
    return pixels


def outcomes(result):
    assert [check.name for check in result.checks] == list(inspection.NAMES)
    assert all(check.said for check in result.checks)
    return {check.name: check.outcome for check in result.checks}


def failed(result):
    return {name for name, outcome in outcomes(result).items() if outcome == "fail"}


@pytest.mark.slow
def test_a_healthy_classifier_passes_ten_times_in_a_row(approved):
    for seed in range(10):
        result = inspection.inspect(
            approved / "net", approved / "baseline", new_images(seed=seed), seed=seed
        )
        assert not failed(result) - {"latency"}, result


def recard(folder, file, change):
    card = json.loads((folder / file).read_text())
    change(card)
    (folder / file).write_bytes(cards.encode(card))


def change_a_layer(folder):
    net = weights.load_classifier(folder)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: -leaf if "qkv" in str(path) and leaf.ndim > 1 else leaf,
        net.encoder.variables,
    )
    weights.save_classifier(net.replace(encoder=net.encoder.replace(variables=variables)), folder)


def swap_the_encoder(folder):
    net = weights.load_classifier(folder)
    other = network(seed=3).encoder
    weights.save_classifier(net.replace(encoder=other), folder)


def another_normalization(folder):
    recard(folder, "encoder.json", lambda card: card["options"].update(std=[0.3, 0.3, 0.3]))


def flip_a_bit(folder):
    content = bytearray((folder / "head.safetensors").read_bytes())
    content[-2] ^= 1
    (folder / "head.safetensors").write_bytes(bytes(content))


def delete_the_head(folder):
    (folder / "head.safetensors").unlink()


CHANGES = {
    delete_the_head: {"files"},
    change_a_layer: {"files", "references", "canaries"},
    swap_the_encoder: {"files", "references", "canaries", "accuracy"},
    another_normalization: {"files", "architecture", "references"},
    flip_a_bit: {"files"},
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_has_changed_is_found(change, place):
    change(place / "net")
    result = inspection.inspect(place / "net", place / "baseline", seed=1)
    assert result.verdict == "fail"
    assert CHANGES[change] <= failed(result)


def test_a_changed_classifier_without_a_lock_is_found_by_its_answers(approved, place):
    swap_the_encoder(place / "net")
    net = weights.load_classifier(place / "net")
    result = inspection.inspect(net, approved / "baseline", seed=1)
    assert {"canaries", "accuracy"} <= failed(result)
    assert outcomes(result)["files"] == "absent"


def test_shifted_images_are_found_and_new_ones_of_the_kind_are_not(approved):
    baseline = inspection.read_baseline(approved / "baseline")
    shifted = (0.6 * new_images() + 90).astype(np.uint8)
    for images, outcome in ((shifted, "fail"), (new_images(), "pass")):
        result = inspection.inspect(approved / "net", baseline, images, seed=1)
        assert outcomes(result)["drift"] == outcome


def test_pictures_of_formats_that_are_not_read_are_counted(tmp_path, approved):
    for place in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{place}.png")
        (tmp_path / f"{place}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    Image.new("RGB", (8, 8)).save(tmp_path / "no_suffix", "PNG")
    (tmp_path / "notes.txt").write_text("of the camera")
    (tmp_path / "._0.png").write_bytes(b"of macOS")
    baseline = inspection.read_baseline(approved / "baseline")
    images, broken = inspect._pictures(tmp_path, baseline)
    assert len(images) == 4 and broken == ["0.heic", "1.heic", "2.heic"]


@pytest.mark.parametrize(("count", "verdict"), [(None, "pass"), (0, "missing"), (5, "missing")])
def test_no_new_images_is_no_evidence_where_some_were_asked_for(count, verdict, approved):
    images = None if count is None else new_images()[:count]
    result = inspection.inspect(approved / "net", approved / "baseline", images, seed=1)
    assert outcomes(result)["drift"] == "absent"
    assert failed(result) <= {"latency"}
    assert result.verdict in (verdict, "fail" if failed(result) else verdict)


# ------------------------------------------------------------------------------- what is left


def test_the_record_is_added_to_and_a_cut_line_costs_itself_only(approved, tmp_path):
    result = inspection.inspect(approved / "net", approved / "baseline", seed=1)
    inspection.record(result, tmp_path)
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"when": "2026-01')
    files = inspection.record(result, tmp_path)
    assert {file.name for file in files} == {
        *("inspection.json", "history.jsonl", "junit.xml", "trend.png")
    }
    assert len(inspection.read_history(tmp_path)) == 2
    document = json.loads((tmp_path / "inspection.json").read_text())
    assert document["verdict"] == result.verdict
    assert [check["number"] for check in document["checks"]] == list(range(1, 10))
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("9", str(len(failed(result))))


@pytest.mark.slow
def test_the_command_line_makes_a_baseline_and_inspects(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(findings, "_SLOWER", 1e9)
    net, folder = str(place / "net"), tmp_path / "made"
    command = ["inspect", net, "--make-baseline", str(folder), "--data", "test_inspection:held_out"]
    (stored,) = (place / "baseline" / "perturbations").iterdir()
    command += ["--perturbation", str(stored)] * 2
    assert main.main(command) == 0
    assert len(inspection.read_baseline(folder).perturbations) == 2  # of one name, and both kept
    pictures = tmp_path / "new" / "cam 1"
    pictures.mkdir(parents=True)
    inspect = ["inspect", net, "--baseline", str(folder), "--images", str(pictures.parent)]
    assert main.main(inspect) == 3
    for place_, image in enumerate(new_images()):
        Image.fromarray(image).save(pictures / f"猫{place_}.png")
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main.main([*inspect, "--junit", str(tmp_path / "junit.xml")]) == 0
    assert "1 cannot be read, broken.png first" in capsys.readouterr().out
    assert len(inspection.read_history(folder / "inspections")) == 2
    swap_the_encoder(place / "net")
    assert main.main(inspect) == 1
    for wrong in (
        command,  # a baseline is not replaced
        [*inspect, "--data", "digits"],
        [*command, "--images", "new"],
        ["inspect", str(tmp_path / "none"), "--baseline", str(folder)],
        ["inspect", net, "--baseline", str(tmp_path / "none")],
        ["inspect", net, "--baseline", str(folder), "--images", str(tmp_path / "none")],
        ["inspect", net, "--make-baseline", str(tmp_path / "other")],
    ):
        assert main.main(wrong) == 2


def held_out(split="test"):
    return tiny.images("test", n=80, size=SIZE, classes=CLASSES)


# -------------------------------------------------------------------------------- bad baselines


def test_a_baseline_of_another_model_is_refused(approved):
    encoder = tiny.encoder()
    other = models.classifier(jax.random.key(1), encoder, CLASSES, head="linear")
    with pytest.raises(ValueError, match="baseline of another model: image_size 16, here 8"):
        inspection.inspect(other, approved / "baseline")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace('"schema": 1', '"schema": 2', 1), "take a newer robust-ssl"),
        (lambda text: text[:200], "not JSON"),
        (lambda text: text.replace('"accuracy": ', '"accuracy": NaN, "x": ', 1), "no number"),
        (lambda text: text.replace('"canaries": 1', '"canaries": 2', 1), "not what was written"),
        (lambda text: "{}", "no baseline"),
    ],
    ids=["newer", "truncated", "NaN", "edited", "empty"],
)
def test_a_baseline_that_cannot_be_used_is_refused(change, said, place):
    file = place / "baseline" / "baseline.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=said):
        inspection.read_baseline(place / "baseline")


def test_arrays_that_were_changed_or_lie_elsewhere_are_refused(place):
    folder, outside = place / "baseline", {"../../etc/hostname": "0" * 64}
    with open(folder / "baseline.npz", "ab") as arrays:
        arrays.write(b"x")
    with pytest.raises(ValueError, match="bring it back from a copy"):
        inspection.read_baseline(folder)
    recard(folder, "baseline.json", lambda card: card.update(files=outside))
    with pytest.raises(ValueError, match="outside its folder"):
        inspection.read_baseline(folder)


def test_a_baseline_is_found_beneath_and_its_absence_says_how_to_make_one(approved, tmp_path):
    assert inspection.read_baseline(approved).lock is not None
    with pytest.raises(FileNotFoundError, match="--make-baseline"):
        inspection.read_baseline(tmp_path)


OPERATIONS = pathlib.Path(__file__).parents[1] / "docs" / "operations"
FILES = ("crontab", "robust-ssl-inspect.service", "github-workflow.yml", "cronjob.yaml")


@pytest.mark.parametrize("name", FILES)
def test_the_files_to_copy_call_what_there_is(name):
    text = (OPERATIONS / name).read_text(encoding="utf-8")
    if name.endswith((".yml", ".yaml")):
        yaml.safe_load(text)
    if name == "cronjob.yaml":
        job = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        words = job["containers"][0]["command"]
    else:
        words = shlex.split(re.search(r"robust-ssl inspect [^|\n]*", text)[0])
    assert words[0] == "robust-ssl"
    arguments, unknown = main._parser().parse_known_args(words[1:])
    assert arguments.command == "inspect" and arguments.images and not unknown


# ------------------------------------------------------------------------------------ findings


def test_a_tie_may_be_broken_otherwise_and_a_move_may_not():
    then = np.array([[1.0, 1.0 - 1e-6], [3.0, 0.0]])
    tie, move = np.array([[1.0 - 1e-6, 1.0], [3.0, 0.0]]), np.array([[0.0, 0.0], [0.2, 0.0]])
    assert findings.canaries(then, tie).outcome == "pass"
    assert findings.canaries(then, then + move).outcome == "fail"
    assert findings.canaries(then, np.full_like(then, np.nan)).outcome == "fail"


def test_accuracy_fails_only_where_it_is_worse_than_chance_says():
    right = np.ones(100, bool)
    for lost, outcome in ((3, "pass"), (12, "fail")):
        now = right.copy()
        now[:lost] = False
        assert findings.accuracy(right, now).outcome == outcome
        assert findings.accuracy(now, right).outcome == "pass"


def test_a_new_fit_may_be_as_much_stronger_as_seeds_differ():
    random = np.random.default_rng(0)
    then = [random.random(400) < share for share in (0.7, 0.6)]
    assert findings.new_fit(then, random.random(400) < 0.55, 7).outcome == "pass"
    assert findings.new_fit(then, random.random(400) < 0.2, 7).outcome == "fail"


def test_pace_on_another_device_is_not_compared():
    assert findings.latency(1.0, 9.0, same_device=True).outcome == "fail"
    assert findings.latency(1.0, 9.0, same_device=False).outcome == "absent"


def test_p_of_the_energy_test_is_even_where_nothing_has_moved():
    random = np.random.default_rng(0)
    p = [
        inspection.energy_test(random.normal(size=(30, 3)), random.normal(size=(30, 3)),
                               permutations=199)[1]
        for _ in range(60)
    ]  # fmt: skip
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.asarray(p) <= 0.1) < 0.25


def test_checks_of_provenance_and_of_inspection_are_one_kind(approved):
    result = inspection.inspect(approved / "net", approved / "baseline", seed=2)
    assert all(isinstance(check, provenance.Check) for check in result.checks)


def test_labels_come_in_the_order_of_the_logits():
    named = network().replace(class_names=("d", "b", "a", "c"))
    labels = np.array([0, 1, 2, 3, 3])
    found = inspection.in_order_of_logits(named, labels, ("a", "b", "c", "d"))
    assert found.tolist() == [2, 1, 3, 0, 0]
    numbered = inspection.in_order_of_logits(named, labels, ("0", "1", "2", "3"))
    assert numbered.tolist() == labels.tolist()
    with pytest.raises(ValueError, match="which are not"):
        inspection.in_order_of_logits(named, labels, ("a", "b", "c", "e"))


@pytest.mark.parametrize(("unreadable", "outcome"), [(0, "pass"), (5, "pass"), (200, "absent")])
def test_pictures_that_cannot_be_read_are_no_evidence(unreadable, outcome):
    rows = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    found = findings.shift(rows[:100], rows[100:], "; broken.png first", unreadable)
    assert found.outcome == outcome and found.evidence["unreadable"] == unreadable
    if outcome == "absent":
        assert "100 of 300 new images can be read, too few to tell; broken.png first" in found.said


def test_pictures_that_come_class_by_class_are_no_shift(approved, tmp_path, monkeypatch):
    images, labels = tiny.images("test", n=120, size=SIZE, classes=CLASSES)
    order = np.argsort(labels, kind="stable")
    monkeypatch.setattr(inspection.inspecting, "_MOST_NEW", 40)
    made = inspection.baseline(
        approved / "net", images[order], labels[order], [], tmp_path / "baseline", canaries=40
    )
    assert {*made.labels[:40]} == {*range(CLASSES)}
    result = inspection.inspect(approved / "net", made, new_images(120), seed=0)
    assert outcomes(result)["drift"] == "pass"


def test_new_pictures_get_their_size_as_the_classifiers_own(tmp_path):
    from robust_ssl.cli.inspect import _pictures

    squash = data.Resizing("squash")
    net = network()
    net = net.replace(encoder=net.encoder.replace(resizing=squash))
    weights.save_classifier(net, tmp_path / "net")
    images, labels = tiny.images("test", n=24, size=SIZE, classes=CLASSES)
    made = inspection.baseline(tmp_path / "net", images, labels, [], tmp_path / "baseline")
    assert made.resizing.mode == "squash"
    wide = np.random.default_rng(0).integers(0, 256, (SIZE, 4 * SIZE, 3), np.uint8)
    (tmp_path / "new").mkdir()
    Image.fromarray(wide).save(tmp_path / "new" / "0.png")
    (read,), _ = _pictures(tmp_path / "new", made)
    want = data.pictures.resize(wide, SIZE, squash)
    assert np.array_equal(read, want)
    assert not np.array_equal(read, data.pictures.resize(wide, SIZE))


def test_one_perturbation_needs_no_list_and_no_image_is_no_canary(tmp_path):
    images, labels = tiny.images("test", n=24, size=SIZE, classes=CLASSES)
    one = UniversalPerturbation(jnp.zeros((SIZE, SIZE, 3)), threats.Linf(0.1), "one")
    made = inspection.baseline(network(), images, labels, one, tmp_path / "baseline")
    assert [*made.perturbations] == ["one"]
    for wrong in ({"canaries": 0}, {"limit": -1}):
        with pytest.raises(ValueError, match="must be at least 1 image"):
            inspection.baseline(network(), images, labels, one, tmp_path / "other", **wrong)
