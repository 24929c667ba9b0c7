"""Two functions on the host, forwards and backwards, as one differentiable function of JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Arrays = tuple[np.ndarray, ...]
Forward = Callable[[np.ndarray], Arrays]
Backward = Callable[[np.ndarray, Arrays], np.ndarray]


def differentiable(
    forward: Forward,
    backward: Backward | None,
    shapes: Sequence[tuple[int, ...]],
    *,
    rank: int,
    kind: str,
    remembering: Forward | None = None,
) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """Makes a function that can be compiled, batched and differentiated once.

    Under `jax.vmap` all images go through one call, however many axes are mapped.

    Args:
      forward: Maps float32 ``[n, ...]`` to a tuple of float arrays ``[n, *shape]``.
      backward: Maps the same and a cotangent for each output to the cotangent of the input; None
        where there is no gradient.
      shapes: Of each output, for one input.
      rank: Of one input: 3 for an image.
      kind: What it is, for messages.
      remembering: As `forward`, called where `backward` will follow; None for the same.

    Returns:
      A function of float32 ``[batch, ...]`` that returns float32 arrays ``[batch, *shape]``.

    Example:
      >>> double = differentiable(
      ...     lambda x: (2 * x,), lambda x, cotangents: 2 * cotangents[0], [(3,)], rank=1,
      ...     kind="double",
      ... )
      >>> jax.grad(lambda x: double(x)[0].sum())(jnp.ones((1, 3))).tolist()
      [[2.0, 2.0, 2.0]]
    """

    def calling(function):
        def call(inputs):
            results = [jax.ShapeDtypeStruct((len(inputs), *s), jnp.float32) for s in shapes]
            return _on_host(_as_one_batch(function, rank), results, inputs)

        return call

    def call_and_keep(inputs):
        return calling(remembering or forward)(inputs), inputs

    def pull(inputs, cotangents):
        if backward is None:
            raise ValueError(
                f"{kind} has no gradient, and this attack or check needs one; give the gradient, "
                "or take an attack without: attacks='square', examine=False"
            )
        like = jax.ShapeDtypeStruct(inputs.shape, jnp.float32)

        def all_cotangents(inputs, *cotangents):
            return (backward(inputs, cotangents),)

        return _on_host(_as_one_batch(all_cotangents, rank), [like], inputs, *cotangents)

    call = jax.custom_vjp(calling(forward))
    call.defvjp(call_and_keep, pull)
    return call


def _as_one_batch(function: Callable[..., Arrays], rank: int) -> Callable[..., Arrays]:
    """Returns the function for any number of leading axes, which it sees as one."""

    def call(*arrays):
        leading = arrays[0].shape[: arrays[0].ndim - rank]
        values = function(*(x.reshape(-1, *x.shape[len(leading) :]) for x in arrays))
        return tuple(np.asarray(v, np.float32).reshape(*leading, *v.shape[1:]) for v in values)

    return call


def _on_host(function: Callable[..., Arrays], results: list, *inputs) -> tuple[jax.Array, ...]:
    """Calls a function of NumPy arrays from inside a compiled program."""
    from jax.experimental.buffer_callback import buffer_callback

    def write(_, places, *buffers):
        # Copies: the program takes its memory back, and a function may keep what it was given.
        arrays = [np.asarray(buffer).copy() for buffer in buffers]
        for place, value in zip(places, function(*arrays), strict=True):
            np.asarray(place)[...] = value

    def in_place(*inputs):
        return tuple(buffer_callback(write, results, vmap_method="broadcast_all")(*inputs))

    def copied(*inputs):
        def host(*arrays):
            return function(*map(np.array, arrays))

        return tuple(jax.pure_callback(host, tuple(results), *inputs, vmap_method="broadcast_all"))

    # On CPU not `pure_callback`: it copies its arguments in the pool of threads that it runs in,
    # and waits for ever where that has one thread, or where two calls are under way.
    return jax.lax.platform_dependent(*inputs, cpu=in_place, default=copied)
