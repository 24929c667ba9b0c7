"""The analysis of a run: what it leaves, what it skips, what it refuses."""

import errno
import json

import jax
import numpy as np
import pytest
import tiny
from tiny_recipes import FROZEN, context, go, manifest

from robust_ssl import disk, experiment, models, settings, weights
from robust_ssl.experiment import analyze as stage
from robust_ssl.experiment.sources import EncoderSource
from robust_ssl.stopping import Stopped
from robust_ssl.workdir import UnwritableError, sum_files
from robust_ssl.workdir.manifest import seal

pytestmark = pytest.mark.usefixtures("quick_programs")


def config(recipes, parts=stage.PARTS, encoders=()):
    changed = tiny.config("attack", "analyze")
    changed.recipes = recipes
    changed.analyze = {
        **{"parts": parts, "images": 8},
        "fourier": {"norm": 1.0, "stride": 2, "images": 8},
        "filtering": {"cutoffs": (0.2,)},
        "transfer": {"encoders": encoders, "head_epochs": 1},
    }
    return changed


def analyze(changed, workdir):
    return stage.analyze(context(changed, workdir))


@pytest.fixture(scope="module")
def shelf():
    """Encoders that are loaded by name: ``of8`` for 8 pixels, as the run's, ``of16`` for 16."""
    sizes = {"of8": 8, "of16": 16}
    card, load, builder = weights.encoder_card, EncoderSource.load, EncoderSource.own_builder

    def own_builder(source):
        size = sizes.get(source.path)
        return (tiny.encoder, {"image_size": size}) if size else builder.fget(source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "encoder_card", lambda name: name in sizes or card(name))
        patch.setattr(EncoderSource, "resizing", lambda source, image_size=None: None)
        patch.setattr(
            EncoderSource,
            "load",
            lambda source, key: (
                tiny.encoder(image_size=sizes[source.path])
                if source.path in sizes
                else load(source, key)
            ),
        )
        patch.setattr(EncoderSource, "own_builder", property(own_builder))
        yield tuple(sizes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shelf):
    workdir = tmp_path_factory.mktemp("finished")
    changed = config({"baseline": FROZEN}, encoders=shelf)
    changed.analyze.transfer.resize = "bilinear"
    return changed, workdir, analyze(changed, workdir)


def numbers(workdir):
    return json.loads((workdir / "analysis" / "analysis.json").read_text())


def test_every_part_leaves_its_figure_and_its_numbers(finished):
    _, workdir, _ = finished
    attacks = ["advencoder", "random_noise", "universal_pgd"]
    figures = [
        *(f"layers-{attack}" for attack in attacks),
        "energy",
        "fourier",
        "filtering-baseline",
    ]
    for name in [*figures, "transfer"]:
        for suffix in ("png", "svg", "csv"):
            assert (workdir / "analysis" / f"{name}.{suffix}").stat().st_size > 100, name
    page = (workdir / "analysis" / "analysis.md").read_text()
    assert all(f"({name}.png)" in page for name in figures)
    analysis = numbers(workdir)
    assert list(analysis["layers"]) == list(analysis["energy"]) == attacks
    assert list(analysis["layers"]["advencoder"]["baseline"]) == ["conv1", "conv2", "features"]
    assert analysis["fourier"]["baseline"]["measure"] == "error_rate"
    assert np.shape(analysis["fourier"]["baseline"]["harm"]) == (4, 4)
    assert analysis["about"]["images"].startswith("8 of ")


def test_the_most_harmful_band_is_the_stages_result(finished):
    _, workdir, done = finished
    band = done.results["most_harmful_band"]["baseline"]
    harm = [h for h in numbers(workdir)["fourier"]["baseline"]["harm_by_band"] if h is not None]
    assert band["harm"] == max(harm) and band["low"] < band["high"] <= 0.71


def test_the_matrix_has_every_pair_and_noise(finished):
    _, workdir, _ = finished
    matrix = numbers(workdir)["transfer"]
    assert list(matrix) == ["of8", "of16", "random noise"]
    for row in matrix.values():
        assert list(row) == ["of8", "of16"]
        assert {counts["n"] for counts in row.values()} == {8}
    clean = [{row[j]["clean_accuracy"] for row in matrix.values()} for j in ("of8", "of16")]
    assert all(len(shares) == 1 for shares in clean)  # whatever it was attacked with


def test_a_finished_analysis_is_skipped(finished, monkeypatch):
    changed, workdir, done = finished
    monkeypatch.setattr(stage, "_run_parts", lambda subject: pytest.fail("it looked again"))
    assert analyze(changed, workdir).results == done.results


@pytest.fixture
def copy(tmp_path):
    """A small analysis that is finished, to be changed."""
    changed = config({}, parts=("layers", "energy"))
    analyze(changed, tmp_path)
    return changed, tmp_path, tmp_path / "analysis"


def test_notes_on_the_page_are_kept_and_nothing_is_looked_at_again(copy, monkeypatch, caplog):
    changed, workdir, folder = copy
    page = (folder / "analysis.md").read_text()
    assert page.count(".png)") == 4
    monkeypatch.setattr(stage, "_run_parts", lambda subject: pytest.fail("it looked again"))
    (folder / "analysis.md").write_text(f"{page}my note")
    for _ in range(2):
        analyze(changed, workdir)
        assert (folder / "analysis.md").read_text() == page
        assert (folder / "analysis.md.changed").read_text() == f"{page}my note"
        assert caplog.text.count("analysis.md has ") == 1
    (folder / "analysis.md").unlink()
    analyze(changed, workdir)
    assert (folder / "analysis.md").read_text() == page


def test_an_analysis_of_before_had_its_page_among_its_files(copy, monkeypatch):
    changed, workdir, folder = copy
    page = folder / "analysis.md"
    old = manifest(workdir, "analyze")
    old["files"] |= sum_files(workdir / "analyze", [page])
    (workdir / "analyze" / "manifest.json").write_text(json.dumps(seal(old)))
    (workdir / "analyze" / ".pages.json").unlink()
    monkeypatch.setattr(stage, "_run_parts", lambda subject: pytest.fail("it looked again"))
    analyze(changed, workdir)
    assert not list(folder.glob("*.changed"))
    page.write_text("my note")
    analyze(changed, workdir)
    assert (folder / "analysis.md.changed").read_text() == "my note"


def test_only_what_was_drawn_is_a_result(copy):
    changed, workdir, folder = copy
    for name in (".fourier.png.2ef82ef82ef82ef8.tmp", "mine.png", "notes.txt"):
        (folder / name).write_text("others'")
    (folder / "energy.png").unlink()
    analyze(changed, workdir)
    files = {name for name in manifest(workdir, "analyze")["files"] if "/" in name}
    stems = ["energy", *(f"layers-{n}" for n in ("advencoder", "random_noise", "universal_pgd"))]
    drawn = {f"../analysis/{stem}.{kind}" for stem in stems for kind in ("png", "svg", "csv")}
    assert files == drawn | {"../analysis/analysis.json"}
    assert not list(folder.glob(".*.tmp")) and (folder / "mine.png").exists()


def test_a_figure_that_finds_no_room_is_drawn_by_the_next_start(tmp_path, monkeypatch):
    changed, replacing = config({}, parts=("energy",)), disk.replacing

    def full(path):
        if path.suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "replacing", full)
        with pytest.raises(
            UnwritableError, match=r"cannot write .*energy\.png: No space.*make room"
        ):
            analyze(changed, tmp_path)
    assert analyze(changed, tmp_path).done
    assert "energy.png" in (tmp_path / "analysis" / "analysis.md").read_text()
    assert (tmp_path / "analysis" / "energy.png").stat().st_size > 100


def test_the_encoders_own_runs_are_kept_when_it_is_stopped(tmp_path, shelf, monkeypatch):
    changed = config({"baseline": FROZEN}, parts=("transfer",), encoders=shelf[:1])
    monkeypatch.setattr(stage, "stop_requested", lambda: True)
    with pytest.raises(Stopped, match="analyze stopped"):
        analyze(changed, tmp_path)
    manifests = list((tmp_path / "encoders" / "of8").rglob("manifest.json"))
    assert {json.loads(file.read_text())["status"] for file in manifests} == {"done"}
    assert not (tmp_path / "analysis").exists()
    monkeypatch.setattr(stage, "stop_requested", lambda: False)
    done = analyze(changed, tmp_path)
    assert done.done and list(numbers(tmp_path)["transfer"]) == ["of8", "random noise"]


def test_without_a_classifier_features_are_looked_at(tmp_path):
    done = analyze(config({}, parts=("layers", "fourier", "filtering")), tmp_path)
    analysis = numbers(tmp_path)
    assert analysis["fourier"]["public encoder"]["measure"] == "feature_drift"
    assert analysis["filtering"] == {} and not {"energy", "transfer"} & analysis.keys()
    assert list(done.results["most_harmful_band"]) == ["public encoder"]
    assert not (tmp_path / "recipes").exists()


def test_the_test_split_is_never_read(tmp_path, monkeypatch):
    never = property(lambda run: pytest.fail("test was read"))
    monkeypatch.setattr(experiment.Context, "test", never)
    analyze(config({}, parts=("energy",)), tmp_path)
    assert list(numbers(tmp_path)) == ["about", "edges", "energy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("layer",)}, r"analyze\.parts\[0\] must be one of 'layers', .*got 'layer'"),
        ({"parts": ()}, r"analyze: parts is empty"),
        ({"images": 0}, r"analyze\.images .*at least 1"),
        ({"edges": (0.5, 0.1)}, "analyze: .*rising"),
        ({"filtering": {"cutoffs": ()}}, "analyze.filtering: cutoffs is empty"),
        ({"transfer.attack": "pap"}, r"transfer\.attack is 'pap', .*not in config\.suite\.attacks"),
        ({"transfer.resize": "crop"}, r"transfer\.resize must be one of"),
        ({"transfer.encoders": ("a/x", "b/x")}, r"transfer\.encoders: .*names must differ"),
        ({"transfer.encoders": ("nowhere",)}, r"transfer\.encoders: .*nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_run(change, message, tmp_path):
    changed = config({})
    changed.analyze.update_from_flattened_dict(change)
    with pytest.raises(experiment.UsageError, match=message):
        go(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_image_size_is_refused_unless_asked_for(finished, shelf, tmp_path):
    _, workdir, _ = finished
    changed = config({"baseline": FROZEN}, parts=("transfer",), encoders=shelf)
    for directory in ("attack", "encoders", "recipes"):  # what is there need not be made again
        (tmp_path / directory).symlink_to(workdir / directory)
    with pytest.raises(ValueError, match=r'crafted on .* resize="bilinear"'):
        analyze(changed, tmp_path)


def test_the_config_takes_the_arguments_of_gen_af():
    changed = settings.load_config(f"{tiny.CONFIGS}/analyze.py:downstream=cifar10,epochs=3")
    planned = experiment.plan(changed)
    assert planned.downstream.source == "cifar10" and planned.recipes["baseline"].epochs == 3
    assert planned.stages[-1] == "analyze"


@pytest.mark.slow
def test_encoders_are_taken_from_where_they_were_saved(tmp_path):
    paths = []
    for size in (8, 16):
        encoder = models.resnet18(jax.random.key(size), width=8, image_size=size)
        paths.append(str(weights.save_encoder(encoder, tmp_path / f"of{size}")))
    changed = config({"baseline": FROZEN}, parts=("transfer",), encoders=tuple(paths))
    changed.analyze.transfer.resize = "bilinear"
    go(changed, tmp_path / "run")
    assert list(numbers(tmp_path / "run")["transfer"]) == ["of8", "of16", "random noise"]
