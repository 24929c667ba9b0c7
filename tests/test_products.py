"""A dense layer's product and attention are the true ones, with gradients, in every form."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from robust_ssl.models import products

DENSE = (((2,), (0,)), ((), ()))


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_the_product_and_its_gradients_are_those_of_float64():
    x, kernel, cotangent = normal(2, 3, 5), normal(5, 4), normal(2, 3, 4)
    product = jax.jit(lambda x, k: products.dot_general(x, k, DENSE))
    y, pull = jax.vjp(product, x, kernel)
    flat = [np.asarray(a, np.float64).reshape(6, -1) for a in (x, cotangent)]
    expected = (x.astype(np.float64) @ kernel, cotangent @ kernel.T, flat[0].T @ flat[1])
    for ours, right in zip((y, *pull(cotangent)), expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)


def test_members_of_a_fit_each_have_their_own_images():
    x, kernel = normal(3, 2, 4, 5), normal(5, 4)
    loss = lambda x: (products.dot_general(x, kernel, DENSE) ** 2).sum()  # noqa: E731
    together = jax.jit(jax.vmap(jax.grad(loss)))(x)
    np.testing.assert_allclose(together, 2 * (x @ kernel) @ kernel.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dimensions", "options"),
    [
        ((2, 3, 5), (((2,), (1,)), ((), ())), {}),  # a transposed kernel
        ((5, 3), (((0,), (0,)), ((), ())), {}),
        ((2, 3, 5), DENSE, {"precision": lax.Precision.HIGHEST}),
        ((2, 3, 5), DENSE, {"preferred_element_type": jnp.float32}),
    ],
)
def test_all_other_products_are_lax_itself(shape, dimensions, options):
    x, kernel = normal(*shape), normal(5, 5)
    ours = functools.partial(products.dot_general, dimension_numbers=dimensions, **options)
    right = functools.partial(lax.dot_general, dimension_numbers=dimensions, **options)
    assert str(jax.make_jaxpr(ours)(x, kernel)) == str(jax.make_jaxpr(right)(x, kernel))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_and_its_gradients_are_those_of_jax(dtype):
    queries, keys, values = (jnp.asarray(normal(2, n, 3, 4), dtype) for n in (2, 5, 5))
    weights = normal(2, 2, 3, 4)

    def run(attend, *arguments):
        loss = lambda *a: (attend(*a).astype(jnp.float32) * weights).sum()  # noqa: E731
        return jax.jit(attend)(*arguments), *jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)

    ours = run(products.attend, queries, keys, values)
    right = run(jax.nn.dot_product_attention, queries, keys, values)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for x, y in zip(ours, right, strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), atol=tolerance
        )


def test_gelu_is_the_exact_one():
    x = np.linspace(-8, 8, 101, dtype=np.float32)
    np.testing.assert_allclose(products.gelu(x), nn.gelu(x, approximate=False), atol=2e-6)


def test_what_a_product_reads_is_computed_once():
    """And so is its cotangent: both stand behind barriers in the compiled program."""
    x, kernel = normal(2, 3, 5), normal(5, 5)

    def loss(x, kernel):
        return jnp.sum(jnp.cos(products.dot_general(jnp.tanh(x), kernel, DENSE)))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile().as_text()
    assert text.count(" opt-barrier(") == 2


def test_elsewhere_both_are_the_backends_own(monkeypatch):
    monkeypatch.setattr(products, "on_cpu", lambda: False)
    x = normal(2, 3, 2, 4)
    assert products.once(x) is x
    ours, right = jax.make_jaxpr(products.attend), jax.make_jaxpr(jax.nn.dot_product_attention)
    assert str(ours(x, x, x)) == str(right(x, x, x))
    text = str(jax.make_jaxpr(lambda x, k: products.dot_general(x, k, DENSE))(x[0], x[0, 0].T))
    assert "custom_vjp" not in text
