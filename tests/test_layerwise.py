import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_ssl.finetuning import layerwise
from robust_ssl.finetuning.layerwise import (
    adam_l2,
    frozen_paths,
    keep_frozen,
    label_paths,
    layer_rates,
    layer_table,
    layerwise_optimizer,
    match_paths,
    render_table,
)

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
    kept = keep_frozen(new, old, frozen)
    assert kept["batch_stats"] == {
        "a": {"norm": {"mean": 0}},  # all its parameters are frozen; the convolution's play no part
        "b": {"norm": {"mean": 1}},  # its bias is free
        "c": {"norm": {"mean": 0}},  # no parameters of its own: those of the module around it
    }
    assert kept["params"]["a"] == {"norm": {"scale": 0, "bias": 0}, "conv": {"kernel": 1}}


def test_an_unknown_frozen_path_is_an_error():
    with pytest.raises(ValueError, match="encoder/stage9"):
        layerwise.stop_frozen(PARAMS, {"encoder/stage9"})


def test_the_table_lists_every_layer_with_size_and_rate():
    rates = layer_rates(PARAMS, {"**": "freeze", "encoder/stage*/**": 1e-4, "head/kernel": 5e-3})
    rows = layer_table(PARAMS, rates)
    assert [tuple(row) for row in rows] == [
        ("encoder/stem/conv", 9, "freeze"),
        ("encoder/stem/norm", 3, "freeze"),
        ("encoder/stage1/conv1", 4, 1e-4),
        ("encoder/stage2/conv1", 4, 1e-4),
        ("head/kernel", 6, 5e-3),
        ("head/bias", 2, "freeze"),
    ]
    assert "14 of 28 parameters are trained" in render_table(rows)
