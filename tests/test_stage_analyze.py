"""The analysis of a run: what it leaves, what it skips, what it refuses."""

import json
import pathlib

import jax
import numpy as np
import pytest
import tiny

from robust_ssl import models, settings, stages, weights
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress, Stopped
from robust_ssl.stages import analyze as stage
from robust_ssl.stages import fitting

QUIET = Progress("quiet")


def a_config(*before, parts=stage.PARTS, encoders=()):
    config = tiny.config(*before).unlock()
    asked = settings.load_config(str(tiny.CONFIGS / "analyze.py")).analyze
    config.analyze = asked.to_dict()
    config.analyze.update(parts=parts, images=8)
    config.analyze.fourier.update(norm=1.0, stride=2, images=8)
    config.analyze.filtering.cutoffs = (0.2,)
    config.analyze.transfer.update(encoders=encoders, head_epochs=1)
    return config


def a_run(config, workdir):
    parallel = Parallel.create(num_devices=2)
    return stages.Run(settings.to_json(config), pathlib.Path(workdir), parallel, QUIET)


def analyze(config, workdir):
    return stage.analyze(a_run(config, workdir))


@pytest.fixture(scope="module")
def shelf():
    """Encoders that are loaded by name: ``of8`` for 8 pixels, as the run's, ``of16`` for 16."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"of8": 8, "of16": 16}
        patch.setattr(weights, "load_encoder", lambda name: tiny.encoder(image_size=sizes[name]))
        patch.setattr(fitting, "keep_classifier", lambda *args: None)  # of a stranger's builder
        yield tuple(sizes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shelf):
    workdir = tmp_path_factory.mktemp("finished")
    config = a_config("attack", "usual", encoders=shelf)
    config.analyze.transfer.resize = "bilinear"
    return config, workdir, analyze(config, workdir)


def numbers(workdir):
    return json.loads((workdir / "analysis" / "analysis.json").read_text())


def test_every_part_leaves_its_figure_and_its_numbers(finished):
    _, workdir, _ = finished
    methods = ["advencoder", "random_noise", "universal_pgd"]
    figures = [*(f"layers-{method}" for method in methods), "energy", "fourier", "filtering-usual"]
    for name in [*figures, "transfer"]:
        for suffix in ("png", "svg", "csv"):
            assert (workdir / "analysis" / f"{name}.{suffix}").stat().st_size > 100, name
    page = (workdir / "analysis" / "analysis.md").read_text()
    assert all(f"({name}.png)" in page for name in figures)
    found = numbers(workdir)
    assert list(found["layers"]) == list(found["energy"]) == methods
    assert list(found["layers"]["advencoder"]["usual"]) == ["conv1", "conv2", "features"]
    assert found["fourier"]["usual"]["measure"] == "error_rate"
    assert np.shape(found["fourier"]["usual"]["harm"]) == (4, 4)
    assert found["about"]["images"].startswith("8 of ")


def test_the_most_harmful_band_is_the_stages_result(finished):
    _, workdir, done = finished
    band = done.results["most_harmful_band"]["usual"]
    harm = [h for h in numbers(workdir)["fourier"]["usual"]["harm_by_band"] if h is not None]
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
    config, workdir, done = finished
    monkeypatch.setattr(stage, "_look", lambda looked: pytest.fail("it looked again"))
    assert analyze(config, workdir).results == done.results


def test_the_encoders_own_runs_are_kept_when_it_is_stopped(finished, tmp_path, shelf, monkeypatch):
    config = a_config("attack", "usual", parts=("transfer",), encoders=shelf[:1])
    monkeypatch.setattr(stage, "stop_requested", lambda: True)
    with pytest.raises(Stopped, match="analyze stopped"):
        analyze(config, tmp_path)
    manifests = (tmp_path / "encoders" / "of8").glob("*/manifest.json")
    assert {json.loads(file.read_text())["status"] for file in manifests} == {"done"}
    assert not (tmp_path / "analysis").exists()
    monkeypatch.setattr(stage, "stop_requested", lambda: False)
    done = analyze(config, tmp_path)
    assert done.done and list(numbers(tmp_path)["transfer"]) == ["of8", "random noise"]


def test_without_a_classifier_features_are_looked_at(tmp_path):
    done = analyze(a_config("attack", parts=("layers", "fourier", "filtering")), tmp_path)
    found = numbers(tmp_path)
    assert found["fourier"]["public encoder"]["measure"] == "feature_drift"
    assert found["filtering"] == {} and "energy" not in found and "transfer" not in found
    assert list(done.results["most_harmful_band"]) == ["public encoder"]
    assert not (tmp_path / "usual").exists()


def test_the_test_split_is_never_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stages.Run, "test", property(lambda run: pytest.fail("test was read")))
    analyze(a_config("attack", parts=("energy",)), tmp_path)
    assert list(numbers(tmp_path)) == ["about", "edges", "energy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("layer",)}, r"\['layer'\]; there are layers"),
        ({"parts": ()}, "empty"),
        ({"images": 0}, "at least 1"),
        ({"edges": (0.5, 0.1)}, "rising"),
        ({"transfer.method": "pap"}, "'pap' is none of config.attack.methods"),
        ({"transfer.resize": "crop"}, "must be one of"),
        ({"transfer.encoders": ("a/x", "b/x")}, "names must differ"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_run(change, message, tmp_path):
    config = a_config("attack")
    config.analyze.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        analyze(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_image_size_is_refused_unless_asked_for(finished, shelf, tmp_path):
    _, workdir, _ = finished
    config = a_config("attack", "usual", parts=("transfer",), encoders=shelf)
    for made in ("attack", "encoders"):  # what has been crafted need not be crafted again
        (tmp_path / made).symlink_to(workdir / made)
    (tmp_path / "usual").symlink_to(workdir / "usual")
    with pytest.raises(ValueError, match=r'crafted on .* resize="bilinear"'):
        analyze(config, tmp_path)


def test_the_config_takes_the_arguments_of_gen_af():
    config = settings.load_config(f"{tiny.CONFIGS}/analyze.py:downstream=cifar10,epochs=3")
    assert config.downstream.source == "cifar10" and config.usual.epochs == 3
    assert config.stages[-1] == "analyze"
    stage.check_analyze(settings.to_json(config))


@pytest.mark.slow
def test_encoders_are_taken_from_where_they_were_saved(tmp_path):
    paths = []
    for size in (8, 16):
        encoder = models.resnet18(jax.random.key(size), width=8, image_size=size)
        paths.append(str(weights.save_encoder(encoder, tmp_path / f"of{size}")))
    config = a_config("attack", parts=("transfer",), encoders=tuple(paths))
    config.analyze.transfer.resize = "bilinear"
    analyze(config, tmp_path / "run")
    assert list(numbers(tmp_path / "run")["transfer"]) == ["of8", "of16", "random noise"]
