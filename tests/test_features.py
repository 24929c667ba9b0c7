"""Features of a frozen encoder, kept for all epochs: one pass, the same head."""

import numpy as np
import pytest
import tiny_recipes
from tiny_recipes import FROZEN, PGD_AT, context, final, go

from robust_ssl.experiment import Recipe, costs, plan
from robust_ssl.experiment.trace import check_recipe

CACHED = {**FROZEN, "cache_features": True}


def test_a_head_on_kept_features_is_the_head_that_it_was(tmp_path):
    results = []
    for folder, entries in (("without", FROZEN), ("with", CACHED)):
        config = tiny_recipes.config({"head": entries, "reference": FROZEN})
        config.recipes["reference"] = {**FROZEN, "epochs": 1}
        config.compare.reference = "reference"
        results.append(go(config, tmp_path / folder)["train"]["trained"]["head-seed0"])
    without, kept = (final(tmp_path / folder, "head") for folder in ("without", "with"))
    for path in without:
        np.testing.assert_allclose(kept[path], without[path], atol=1e-6, err_msg=path)
        if path.startswith("params/encoder"):
            np.testing.assert_array_equal(kept[path], without[path])
    assert results[0]["validation_score"] == results[1]["validation_score"]
    assert [r["gradient_evaluations_per_image"] for r in results] == [2, 1]
    run = context(config, tmp_path / "with")
    measured = costs.measure(run, [*run.plan.recipes.values()], 0)
    assert measured["head"]["factor"] > 0 and measured["head"]["gradients"] == 1


def test_features_are_not_kept_where_images_are_needed():
    frozen = {"batch_statistics": "frozen", "cache_features": True}
    with pytest.raises(ValueError, match="cache_features and augment, which needs images"):
        Recipe("mine", **frozen, augment=print)
    with pytest.raises(ValueError, match="cache_features with batch_statistics='clean'"):
        Recipe("mine", cache_features=True)
    for entries, reason in (
        ({**frozen}, "which caches features: its updates"),
        ({**frozen, "attack": PGD_AT["attack"]}, "cache_features and attack"),
    ):
        config = tiny_recipes.config({"baseline": {**FROZEN, **entries}}, "train", "compare")
        config.compare.update(reference="baseline", claims=())
        with pytest.raises(ValueError, match=reason):
            plan(config)


def test_a_moving_encoder_and_a_loss_at_a_tap_are_refused(tmp_path):
    config = tiny_recipes.config(
        {"moving": {"batch_statistics": "frozen", "cache_features": True}, "pgd_at": PGD_AT}
    )
    with pytest.raises(ValueError, match="needs a frozen encoder, and rates move encoder/conv1"):
        run = context(config, tmp_path)
        check_recipe(run, run.plan.recipes["moving"])
    drift = {"tap": "test_features:at_a_tap"}
    config = tiny_recipes.config({"tapped": {**CACHED, "losses": drift}})
    run = context(config, tmp_path)
    with pytest.raises(ValueError, match="a loss reads the tap 'conv1'"):
        check_recipe(run, run.plan.recipes["tapped"])


def at_a_tap(inputs):
    """A loss of an activation."""
    return inputs.clean.taps["conv1"].mean(axis=(1, 2, 3))
