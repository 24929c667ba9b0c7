"""Which parameter learns how fast: path patterns, learning rates, and what stays frozen.

A path is ``encoder/stage1/block1/conv1/conv/kernel``.  In a pattern ``*`` stands for any letters
within one name, ``**`` for any number of whole names.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

FREEZE = "freeze"
COSINE = "cosine"
Rate = float | str  # a learning rate, or "freeze"


def match_paths(paths: Iterable[str], pattern: str) -> list[str]:
    """Returns the paths that a pattern matches, in order.

    Args:
      paths: Such as ``encoder/stem/conv/kernel``.
      pattern: ``*`` within one name, ``**`` for any number of whole names.

    Returns:
      The matching paths; at least one.

    Raises:
      ValueError: If nothing matches; the message lists near paths.

    Example:
      >>> match_paths(["encoder/stem/kernel", "head/kernel", "head/bias"], "**/kernel")
      ['encoder/stem/kernel', 'head/kernel']
    """
    paths = list(paths)
    globs = pattern.strip("/").split("/")
    matches = [path for path in paths if _matches(path.split("/"), globs)]
    if not matches:
        # Layers, too, are near names: who writes "encoder/stage9/**" looks for a stage.
        layers = {"/".join(p.split("/")[:depth]) for p in paths for depth in range(1, 9)}
        layer = pattern.replace("/**", "").replace("**/", "")
        near = difflib.get_close_matches(layer, sorted(layers), n=5, cutoff=0.4)
        raise ValueError(
            f"pattern {pattern!r} matches no parameter; near names: "
            f"{', '.join(near or sorted(paths)[:5])}"
        )
    return matches


def _matches(names: list[str], globs: list[str]) -> bool:
    if not globs:
        return not names
    if globs[0] == "**":
        return any(_matches(names[i:], globs[1:]) for i in range(len(names) + 1))
    return (
        bool(names) and fnmatch.fnmatchcase(names[0], globs[0]) and _matches(names[1:], globs[1:])
    )


def label_paths(params: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    """Gives every parameter exactly one label.

    Args:
      params: Nested mapping of parameters.
      rules: Pattern to label, in order; **a later rule overrides an earlier one**, so write the
        general rule first and the exception after it.

    Returns:
      Path to label, for every parameter.

    Raises:
      ValueError: If a parameter has no label, or a pattern matches nothing.

    Example:
      >>> params = {"encoder": {"kernel": 1.0}, "head": {"kernel": 1.0, "bias": 0.0}}
      >>> label_paths(params, {"**": "slow", "head/bias": "fast"})
      {'encoder/kernel': 'slow', 'head/kernel': 'slow', 'head/bias': 'fast'}
    """
    paths = list(flatten_dict(params, sep="/"))
    labels: dict[str, Any] = {}
    # In order, so that the later of two rules that match has the last word.
    for pattern, label in rules.items():
        labels.update(dict.fromkeys(match_paths(paths, pattern), label))
    uncovered = [path for path in paths if path not in labels]
    if uncovered:
        shown = ", ".join(uncovered[:10]) + (", ..." if len(uncovered) > 10 else "")
        raise ValueError(
            f"no label covers {shown} ({len(uncovered)} of {len(paths)} parameters); "
            f"patterns tried: {', '.join(map(repr, rules)) or 'none'}; add a rule such as "
            f"'**': \"freeze\" before the others"
        )
    return {path: labels[path] for path in paths}


def layer_rates(params: Mapping[str, Any], rules: Mapping[str, Rate]) -> dict[str, Rate]:
    """Gives every parameter a learning rate, or freezes it.

    Args:
      params: Nested mapping of parameters, as ``classifier.variables["params"]``.
      rules: Pattern to learning rate (a float, 0 or more) or ``"freeze"``; a later rule overrides
        an earlier one.

    Returns:
      Path to rate, for every parameter.

    Raises:
      ValueError: If a rate is negative, not finite or a word other than ``"freeze"``; if a
        parameter has no rule; if a pattern matches nothing.

    Example:
      >>> params = {"encoder": {"stem": 1.0, "stage1": 1.0}, "head": {"bias": 0.0}}
      >>> layer_rates(params, {"encoder/**": 1e-4, "encoder/stem": "freeze", "head/**": 5e-3})
      {'encoder/stem': 'freeze', 'encoder/stage1': 0.0001, 'head/bias': 0.005}
    """
    for pattern, rate in rules.items():
        # True is an int in Python, and no learning rate.
        number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
        if rate != FREEZE and not (number and math.isfinite(rate) and rate >= 0):
            raise ValueError(
                f"the rate of {pattern!r} must be a learning rate of at least 0 or {FREEZE!r}, "
                f"got {rate!r}"
            )
    return label_paths(params, rules)


def adam_l2(
    rate: float,
    *,
    weight_decay: float = 8e-4,
    decay: float | str = 0.96,
    steps_per_epoch: int | None = None,
    total_steps: int | None = None,
) -> optax.GradientTransformation:
    """Adam as Gen-AF uses it: weight decay inside the gradient, a little slower every epoch.

    Args:
      rate: Learning rate of the first epoch.
      weight_decay: Times the weights, added to the gradient before Adam (L2, unlike AdamW).
      decay: The rate is multiplied by this after each epoch; ``"cosine"`` takes it to zero
        along half a cosine.
      steps_per_epoch: Updates per epoch; None keeps the rate constant, if there is no cosine.
      total_steps: Updates until a cosine is at zero; nothing else needs them.

    Returns:
      An optax transformation.

    Raises:
      ValueError: If a cosine does not know when it ends.

    Example:
      >>> tx = adam_l2(0.1, weight_decay=0.0)
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
      >>> updates.round(3).tolist()
      [-0.1..., -0.1...]

    References:
      Zhou et al., IEEE S&P 2024, released code (both tracks).  Loshchilov and Hutter, "SGDR", ICLR
      2017, for the cosine.
    """
    schedule = rate
    if decay == COSINE:
        if total_steps is None:
            raise ValueError('decay="cosine" needs total_steps, the update at which it is at zero')
        schedule = optax.cosine_decay_schedule(rate, total_steps)
    elif steps_per_epoch is not None:
        schedule = optax.exponential_decay(rate, steps_per_epoch, decay, staircase=True)
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(schedule),
    )


def layerwise_optimizer(
    params: Mapping[str, Any],
    rates: Mapping[str, Rate],
    make_tx: Callable[[float], optax.GradientTransformation] = adam_l2,
) -> optax.GradientTransformation:
    """Builds one optimizer per learning rate; a frozen parameter gets an update of zero.

    Args:
      params: The parameters, for their structure only.
      rates: Path to rate, as `layer_rates` returns.
      make_tx: Learning rate to transformation.  Parameters of one rate share one.

    Returns:
      An optax transformation of the whole tree.  Weight decay inside `make_tx` never reaches a
      frozen parameter.  Its state holds the rates, so it may be read (and changed) there.

    Example:
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> rates = layer_rates(params, {"encoder": "freeze", "head": 0.5})
      >>> tx = layerwise_optimizer(params, rates, optax.sgd)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["encoder"].tolist(), updates["head"].tolist()
      ([0.0, 0.0], [-0.5, -0.5])
    """
    # Numbered, and the rate itself in the state: two runs that differ in a rate share one program.
    groups: dict[Rate, str] = {}
    for rate in rates.values():
        groups.setdefault(rate, f"group{len(groups):02d}")
    transforms = {group: _transform(rate, make_tx) for rate, group in groups.items()}
    labels = {path: groups[rates[path]] for path in flatten_dict(params, sep="/")}
    return optax.multi_transform(transforms, unflatten_dict(labels, sep="/"))


def _transform(rate: Rate, make_tx: Callable) -> optax.GradientTransformation:
    if rate == FREEZE:
        return optax.set_to_zero()
    # A lambda of the rate alone: `make_tx`'s numbers by default would go into the state as well.
    return optax.inject_hyperparams(lambda rate: make_tx(rate))(float(rate))


def frozen_paths(rates: Mapping[str, Rate]) -> frozenset[str]:
    """Returns the paths that are frozen; what a fine-tuning step takes as `frozen`.

    Example:
      >>> sorted(frozen_paths({"encoder/kernel": "freeze", "head/kernel": 0.1}))
      ['encoder/kernel']
    """
    return frozenset(path for path, rate in rates.items() if rate == FREEZE)


def keep_frozen(new: Mapping[str, Any], old: Mapping[str, Any], frozen: Collection[str]) -> dict:
    """Returns the new variables with every frozen leaf taken, bit by bit, from the old ones.

    A batch norm's statistics (``.../norm/mean``) are frozen with the parameters of that norm
    (``.../norm/scale``, ``.../norm/bias``); of a norm without parameters, with those of the
    smallest module around it that has any.

    Args:
      new: ``{"params": ..., "batch_stats": ...}`` after an update.
      old: The same before it.
      frozen: Paths of frozen parameters.

    Returns:
      Variables of the same structure.

    Example:
      >>> old = {"params": {"norm": {"scale": 1}}, "batch_stats": {"norm": {"mean": 2}}}
      >>> new = {"params": {"norm": {"scale": 3}}, "batch_stats": {"norm": {"mean": 4}}}
      >>> keep_frozen(new, old, {"norm/scale"})
      {'params': {'norm': {'scale': 1}}, 'batch_stats': {'norm': {'mean': 2}}}
    """
    params = list(flatten_dict(old["params"], sep="/"))

    def is_frozen(collection, path):
        if collection == "params":
            return path in frozen
        owners = []
        while "/" in path and not owners:
            path = path.rpartition("/")[0]
            owners = [p for p in params if p.startswith(f"{path}/")]
        return bool(owners) and all(p in frozen for p in owners)

    variables = {}
    for collection, tree in new.items():
        before, after = flatten_dict(old[collection], sep="/"), flatten_dict(tree, sep="/")
        # An update of zero is not enough: -0.0 + 0.0 is 0.0, and statistics have no update.
        for path in after:
            if is_frozen(collection, path):
                after[path] = before[path]
        variables[collection] = unflatten_dict(after, sep="/")
    return variables


def stop_frozen(params: Mapping[str, Any], frozen: Collection[str]) -> dict:
    """Returns the parameters with no gradient into the frozen ones; the compiler skips it.

    Raises:
      ValueError: If `frozen` names a parameter that is not there.

    Example:
      >>> loss = lambda p: sum(jax.tree.leaves(stop_frozen(p, {"a"})))
      >>> jax.tree.map(float, jax.grad(loss)({"a": 1.0, "b": 1.0}))
      {'a': 0.0, 'b': 1.0}
    """
    flat = flatten_dict(params, sep="/")
    unknown = sorted(set(frozen) - set(flat))
    if unknown:
        raise ValueError(f"frozen names parameters that do not exist: {', '.join(unknown[:10])}")
    stopped = {p: jax.lax.stop_gradient(x) if p in frozen else x for p, x in flat.items()}
    return unflatten_dict(stopped, sep="/")
