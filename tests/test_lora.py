"""Securing a large encoder in part: adapters, whose product ends in the kernels, or last blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_recipes
from finetuning_steps import KEY, SmoothStep, batches
from flax.traverse_util import flatten_dict
from tiny_recipes import FROZEN, context, go

from robust_ssl import losses, models, optimizers, weights
from robust_ssl.experiment import Recipe
from robust_ssl.experiment.moving import Lora
from robust_ssl.experiment.trace import check_recipe
from robust_ssl.finetuning import adapters, init_state, make_step, merged, served

pytestmark = pytest.mark.usefixtures("quick_programs")

LORA = Lora(rank=2, alpha=6.0)


def vit(key=None, depth=2, **options):
    """A tiny vision transformer."""
    return models.vision_transformer(
        jax.random.key(0) if key is None else key,
        width=8, heads=2, depth=depth, patch_size=4, image_size=8, mlp_width=8,
    )  # fmt: skip


@functools.cache
def net():
    return models.classifier(jax.random.key(1), vit(), 3, head="linear")


def flat(tree):
    return flatten_dict(jax.device_get(tree), sep="/")


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_adapters_alone_move_and_end_in_the_kernels():
    params = net().variables["params"]
    rates = optimizers.layer_rates(params, {"encoder/**": "freeze", "head/**": 0.1})
    LORA.check(params, rates)
    thin = LORA.adapters(params, KEY)
    rates |= optimizers.layer_rates(thin["params"], {"**": 0.1})
    options = {"weight_decay": 0.1, "decay": 1.0, "steps_per_epoch": 1}
    tx, frozen = optimizers.fine_tuning_optimizer({**params, **thin["params"]}, rates, **options)
    step = jax.jit(make_step(
        net(), tx, losses={"robust": (losses.adversarial_cross_entropy, 1.0)}, key=KEY,
        attack=SmoothStep(), frozen=frozen,
    ))  # fmt: skip
    state = init_state(net(), tx, adapters=thin)
    start = flat(served(state.variables))
    np.testing.assert_equal(start, flat(net().variables))  # they change nothing yet
    for batch in batches(3):
        state, _ = step(state, batch)
    kept, whole = flat(state.variables), flat(served(state.variables))
    assert whole.keys() == start.keys()
    for path, before in start.items():
        adapted = "attention" in path and path.endswith("kernel")
        if path.startswith("params/encoder"):
            np.testing.assert_array_equal(kept[path], before)
        assert np.array_equal(whole[path], before) == (not adapted and "head" not in path), path
        if adapted:
            pair = path.replace("params", "params/adapters")
            product = kept[f"{pair}/down"] @ kept[f"{pair}/up"]
            np.testing.assert_allclose(whole[path], before + 3.0 * product, atol=1e-6)
    everything = optimizers.layer_rates(params, {"**": 0.1})
    full, _ = optimizers.fine_tuning_optimizer(params, everything, **options)
    assert bytes_of(state.opt_state) < 0.5 * bytes_of(full.init(params))


def test_merged_kernels_are_the_kernel_and_the_low_rank_path():
    random = jax.random.normal(KEY, (5, 8))
    kernel = {"encoder": {"kernel": jax.random.normal(jax.random.key(3), (8, 6))}}
    thin = adapters(kernel, ["**/kernel"], rank=2, alpha=3, key=KEY)
    pair = thin["params"]["adapters"]["encoder"]["kernel"]
    pair["up"] = jax.random.normal(jax.random.key(4), (2, 6))
    whole = merged({**thin, "params": {**kernel, **thin["params"]}})["params"]
    two_paths = random @ kernel["encoder"]["kernel"] + 1.5 * (random @ pair["down"]) @ pair["up"]
    np.testing.assert_allclose(random @ whole["encoder"]["kernel"], two_paths, atol=1e-5)


def test_only_last_blocks_and_what_follows_keep_their_rates():
    params = net().variables["params"]
    rates = optimizers.last_blocks(optimizers.layer_rates(params, {"**": 0.1}), 1)
    moving = {path.rsplit("/", 1)[0] for path, rate in rates.items() if rate == 0.1}
    assert {path.split("/")[1] for path in moving} == {"block2", "norm", "linear"}
    resnet = models.resnet18(jax.random.key(0), width=8, image_size=8).variables["params"]
    rates = optimizers.layer_rates({"encoder": resnet}, {"**": 0.1})
    moving = {p for p, rate in optimizers.last_blocks(rates, 3).items() if rate == 0.1}
    blocks = {"/".join(path.split("/")[1:3]) for path in moving}
    assert blocks == {"stage3/block2", "stage4/block1", "stage4/block2"}
    with pytest.raises(ValueError, match="last_blocks is 9, and the encoder has 8 blocks: encoder"):
        optimizers.last_blocks(rates, 9)
    with pytest.raises(ValueError, match="rates freeze encoder/stage4/block2"):
        optimizers.last_blocks(dict.fromkeys(rates, "freeze"), 1)


@pytest.mark.slow
def test_recipes_of_adapters_and_last_blocks_are_trained_and_saved(tmp_path):
    short = {"attack": {"num_steps": 1}}
    recipes = {
        "lora": {"function": "robust_ssl.recipes:lora", "rank": 2, **short},
        "last": {"function": "robust_ssl.recipes:last_blocks", "count": 1, **short},
        "averaged": {**FROZEN, "lora": {"rank": 1}, "ema": 0.5},
    }  # fmt: skip
    config = tiny_recipes.config(recipes)
    config.encoder = {"function": "test_lora:vit"}
    config.common.epochs = 1
    assert go(config, tmp_path)["train"]["failed"] == {}
    before = flat(context(config, tmp_path).encoder.variables)
    moved = {}
    for name in recipes:
        saved = weights.load_classifier(tmp_path / "recipes" / f"{name}-seed0", builder=vit)
        after = flat(saved.encoder.variables)
        assert after.keys() == before.keys()
        moved[name] = {p.split("/")[1] for p in before if not np.array_equal(after[p], before[p])}
    assert moved == {"lora": {"block1", "block2"}, "last": {"block2", "norm"},
                     "averaged": {"block1", "block2"}}  # fmt: skip


def test_what_adapters_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="last_blocks and lora each say what moves"):
        Recipe("mine", lora=LORA, last_blocks=1)
    with pytest.raises(ValueError, match="lora with l2_sp"):
        Recipe("mine", lora=LORA, l2_sp=1.0)
    params = {"encoder": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
    for kernels, rank, reason in (
        ("encoder/kernel", 4, r"a rank of 4 saves nothing at encoder/kernel"),
        ("encoder/bias", 1, r"encoder/bias, which has shape \(8,\)"),
        ("encoder/qkv/kernel", 1, "^lora: of its kernels the pattern .* matches no parameter"),
        ("encoder/kernel", 0, "rank must be a whole number of at least 1 .* got 0 and 1"),
        ("encoder/kernel", -1, "rank must be a whole number of at least 1"),
        ("encoder/kernel", 2.0, "rank must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            adapters(params, [kernels], rank=rank, alpha=1, key=KEY)
    for alpha in (0, -1, float("nan"), float("inf")):  # nothing would move, or everything be NaN
        with pytest.raises(ValueError, match="alpha above 0 and finite"):
            adapters(params, ["encoder/kernel"], rank=1, alpha=alpha, key=KEY)
    config = tiny_recipes.config({"lora": {"lora": {"rank": 2}}})
    config.encoder = {"function": "test_lora:vit"}
    with pytest.raises(ValueError, match="has an adapter and moves itself"):
        check_recipe(run := context(config, tmp_path), run.plan.recipes["lora"])
