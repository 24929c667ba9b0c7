import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_ssl import models
from robust_ssl.optimizers import layerwise
from robust_ssl.optimizers.layerwise import (
    adam_l2,
    frozen_paths,
    keep_frozen,
    label_paths,
    layer_rates,
    layerwise_optimizer,
    match_paths,
)
from robust_ssl.optimizers.table import layer_table, render_table

PARAMS = {
    "encoder": {
        "stem": {"conv": {"kernel": jnp.ones((3, 3))}, "norm": {"scale": -jnp.zeros(3)}},
        "stage1": {"conv1": {"kernel": jnp.full((2, 2), 2.0)}},
        "stage2": {"conv1": {"kernel": jnp.full((2, 2), 3.0)}},
    },
    "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
}
PATHS = [
    "encoder/stem/conv/kernel",
    "encoder/stem/norm/scale",
    "encoder/stage1/conv1/kernel",
    "encoder/stage2/conv1/kernel",
    "head/kernel",
    "head/bias",
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", PATHS),
        ("encoder/**", PATHS[:4]),
        ("**/kernel", [PATHS[0], PATHS[2], PATHS[3], PATHS[4]]),
        ("encoder/stage*/conv1/kernel", PATHS[2:4]),
        ("encoder/*/kernel", None),  # one star stays within one name
        ("**/norm/**", [PATHS[1]]),
        ("head/bias", [PATHS[5]]),
        ("encoder/stage1", None),  # a layer is not a parameter: exact paths mean what they say
        ("encoder/stage[12]/**/kernel", PATHS[2:4]),
    ],
)
def test_patterns(pattern, expected):
    if expected is None:
        with pytest.raises(ValueError, match="matches no parameter"):
            match_paths(PATHS, pattern)
    else:
        assert match_paths(PATHS, pattern) == expected


def test_every_parameter_gets_exactly_one_label_and_the_later_rule_wins():
    labels = label_paths(PARAMS, {"**": "a", "encoder/**": "b", "encoder/stage1/**": "c"})
    assert labels == dict(zip(PATHS, ["b", "b", "c", "b", "a", "a"], strict=True))


def test_an_uncovered_parameter_is_an_error_that_lists_it_and_the_patterns():
    with pytest.raises(ValueError, match=r"no label covers head/kernel, head/bias.*'encoder/\*\*'"):
        label_paths(PARAMS, {"encoder/**": 1.0})


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names():
    with pytest.raises(ValueError, match=r"'encoder/stage7/\*\*'.*encoder/stage1"):
        layer_rates(PARAMS, {"**": 1e-3, "encoder/stage7/**": "freeze"})


@pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf"), "frozen", None, True])
def test_a_rate_that_is_none_is_an_error(rate):
    with pytest.raises(ValueError, match=r"the rate of '\*\*'"):
        layer_rates(PARAMS, {"**": rate})


def test_every_group_learns_at_its_own_rate_and_frozen_leaves_are_bit_equal():
    rules = {"encoder/**": 0.1, "encoder/stem/**": "freeze", "head/**": 0.5}
    rates = layer_rates(PARAMS, rules)
    tx = layerwise_optimizer(
        PARAMS, rates, lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate))
    )
    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(10):
        updates, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
        params = keep_frozen(
            {"params": optax.apply_updates(params, updates)},
            {"params": params},
            frozen_paths(rates),
        )["params"]
    for new, old in zip(
        jax.tree.leaves(params["encoder"]["stem"]),
        jax.tree.leaves(PARAMS["encoder"]["stem"]),
        strict=True,
    ):
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()  # -0.0 stays -0.0
    for path, rate in (("stage1", 0.1), ("head", 0.5)):
        kernel = params["head"]["kernel"] if path == "head" else params["encoder"][path]["conv1"]
        w = 1.0 if path == "head" else 2.0
        for _ in range(10):
            w -= rate * (1 + 0.1 * w)
        np.testing.assert_allclose(jax.tree.leaves(kernel)[0], w, rtol=1e-5)


def test_adam_l2_decays_inside_the_gradient_and_slows_by_epochs():
    tx = adam_l2(0.1, weight_decay=0.5, decay=0.5, steps_per_epoch=2)
    params, opt_state = jnp.array(4.0), tx.init(jnp.array(4.0))
    lengths = []
    for _ in range(4):
        # The gradient -2 and the decay 0.5 * 4 cancel: L2 in the gradient leaves exactly nothing.
        updates, opt_state = tx.update(jnp.array(-2.0), opt_state, params)
        assert float(updates) == 0.0
    opt_state = tx.init(params)
    for _ in range(4):
        updates, opt_state = tx.update(jnp.array(1.0), opt_state, params)
        lengths.append(float(updates))
    np.testing.assert_allclose(lengths, [-0.1, -0.1, -0.05, -0.05], rtol=1e-4)


def test_a_cosine_takes_the_rate_to_zero_by_the_last_update():
    tx = adam_l2(0.1, weight_decay=0.0, decay="cosine", steps_per_epoch=2, total_steps=8)
    state, moved = tx.init(jnp.zeros(1)), []
    for _ in range(9):
        update, state = tx.update(jnp.ones(1), state, jnp.zeros(1))
        moved.append(-float(update[0]))  # a constant gradient: Adam moves by the rate itself
    expected = 0.1 * (1 + np.cos(np.pi * np.arange(9) / 8)) / 2
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    with pytest.raises(ValueError, match="needs total_steps"):
        adam_l2(0.1, decay="cosine", steps_per_epoch=2)


def test_frozen_statistics_go_with_the_parameters_of_their_norm():
    old = {
        "params": {"a": {"norm": {"scale": 0, "bias": 0}, "conv": {"kernel": 0}},
                   "b": {"norm": {"scale": 0, "bias": 0}},
                   "c": {"conv": {"kernel": 0}}},
        "batch_stats": {"a": {"norm": {"mean": 0}}, "b": {"norm": {"mean": 0}},
                        "c": {"norm": {"mean": 0}}},
    }  # fmt: skip
    new = jax.tree.map(lambda _: 1, old)
    frozen = {"a/norm/scale", "a/norm/bias", "b/norm/scale", "c/conv/kernel"}
    variables = keep_frozen(new, old, frozen)
    assert variables["batch_stats"] == {
        "a": {"norm": {"mean": 0}},  # all its parameters are frozen; the convolution's play no part
        "b": {"norm": {"mean": 1}},  # its bias is free
        "c": {"norm": {"mean": 0}},  # no parameters of its own: those of the module around it
    }
    assert variables["params"]["a"] == {"norm": {"scale": 0, "bias": 0}, "conv": {"kernel": 1}}


def test_an_unknown_frozen_path_is_an_error():
    with pytest.raises(ValueError, match="encoder/stage9"):
        layerwise.stop_frozen(PARAMS, {"encoder/stage9"})


def test_the_table_reads_as_rules_a_later_row_overrides_an_earlier_one():
    rates = layer_rates(PARAMS, {"**": "freeze", "encoder/stage*/**": 1e-4, "head/kernel": 5e-3})
    rows = layer_table(PARAMS, rates)
    assert [tuple(row) for row in rows] == [
        ("encoder/stage1/**", 1, 4, 1e-4),
        ("encoder/stage2/**", 1, 4, 1e-4),
        ("encoder/stem/**", 1, 12, "freeze"),
        ("head/bias", 0, 2, "freeze"),
        ("head/kernel", 1, 6, 5e-3),
    ]
    assert "14 of 28 parameters are trained" in render_table(rows)


@pytest.mark.parametrize(
    ("rules", "lines"),
    [
        ({"encoder/**": "freeze", "head/**": 5e-3}, 2),
        ({"**": 1e-3, "encoder/stage1/**": "freeze", "head/**": 5e-3}, 6),
        ({"**": "freeze", "encoder/stage*/block2/conv2/**": 1e-3, "head/**": 5e-3}, 10),
    ],
)
def test_the_table_of_a_resnet18_is_short_and_adds_up(rules, lines):
    encoder = models.resnet18(jax.random.key(0), width=8, image_size=8)
    params = models.classifier(jax.random.key(1), encoder, 3).variables["params"]
    rates = layer_rates(params, rules)
    rows = layer_table(params, rates)
    assert len(rows) == lines
    assert len(layer_rates(params, {"**": "freeze"})) > 40
    assert sum(row.size for row in rows) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert layer_rates(params, {row.pattern: row.rate for row in rows}) == rates


def test_layers_stand_in_natural_order_and_a_single_parameter_stays_visible():
    encoder = {f"block{n}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for n in range(1, 12)}
    params = {"encoder": encoder, "head": {"kernel": jnp.ones((2, 2))}}
    rules = {"**": "freeze", "encoder/block2/bias": 1e-3, "encoder/block10/**": 1e-4}
    rows = layer_table(params, layer_rates(params, rules))
    assert [row.pattern for row in rows] == [
        *("encoder/block1/**", "encoder/block2/**", "encoder/block2/bias"),
        *(f"encoder/block{n}/**" for n in range(3, 12)),
        "head/**",
    ]
    assert rows[2] == ("encoder/block2/bias", 0, 2, 1e-3)
