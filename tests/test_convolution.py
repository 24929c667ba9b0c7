"""The convolution's own gradients are the true ones, wherever attacks and training use it."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from robust_ssl import models
from robust_ssl.models import cpu_forms as forms
from robust_ssl.models import resnet
from robust_ssl.models.convolution import conv_general_dilated

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def normal(*shape):  # NumPy's: many shapes, and jax.random compiles for each
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def arrays(size, kernel, channels, out=5):
    """Images, a kernel; height and width differ, so no swapped axis goes unnoticed."""
    x = normal(2, size, size + 1, channels)
    return jnp.asarray(x), jnp.asarray(normal(kernel, kernel, channels, out))


def ours(x, kernel, cotangent, strides, padding):
    y, pullback = jax.vjp(lambda x, k: conv_general_dilated(x, k, strides, padding), x, kernel)
    return y, *pullback(cotangent)


def by_numpy(x, kernel, cotangent, strides, padding):
    """Output and both gradients in float64, one kernel position at a time."""
    x, kernel, cotangent = (np.asarray(a, np.float64) for a in (x, kernel, cotangent))
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    y, padded_gradient, kernel_gradient = 0, np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in itertools.product(range(kernel.shape[0]), range(kernel.shape[1])):
        window = np.s_[
            :,
            i : i + (cotangent.shape[1] - 1) * strides[0] + 1 : strides[0],
            j : j + (cotangent.shape[2] - 1) * strides[1] + 1 : strides[1],
        ]
        y = y + padded[window] @ kernel[i, j]
        padded_gradient[window] += cotangent @ kernel[i, j].T
        kernel_gradient[i, j] = np.einsum("nhwi,nhwo->io", padded[window], cotangent)
    (top, _), (left, _) = padding
    inside = np.s_[:, top : top + x.shape[1], left : left + x.shape[2]]
    return y, padded_gradient[inside], kernel_gradient


def assert_right(cases, kernel, channels, out=5):
    """One compiled program for all the cases of a kernel size, against NumPy."""
    problems = []
    for strides, padding, size in cases:
        x, weights = arrays(size, kernel, channels, out)
        shape = [
            (x.shape[1 + axis] + sum(padding[axis]) - kernel) // strides[axis] + 1
            for axis in (0, 1)
        ]
        cotangent = normal(2, *shape, out)
        problems.append((x, weights, cotangent))
    results = jax.jit(
        lambda problems: [
            ours(*problem, strides, padding)
            for problem, (strides, padding, _) in zip(problems, cases, strict=True)
        ]
    )(problems)
    for case, problem, result in zip(cases, problems, results, strict=True):
        expected = by_numpy(*problem, *case[:2])
        for what, a, b in zip(("y", "dx", "dkernel"), result, expected, strict=True):
            assert a.shape == b.shape, (case, what)
            error = np.abs(a - b).max() / np.abs(b).max()
            assert error < 2e-6, (case, what, error)


def square(stride, padding, size):
    return (stride, stride), ((padding, padding), (padding, padding)), size


@pytest.mark.parametrize("channels", [3, 5])  # few channels take a path of their own
@pytest.mark.parametrize("kernel", [1, 3])
def test_output_and_gradients(kernel, channels):
    cases = [square(*case) for case in itertools.product([1, 2], [0, 1, 2, 3], [5, 6])]
    assert_right(cases, kernel, channels)


@pytest.mark.parametrize("channels", [3, 5])
def test_output_and_gradients_of_a_large_kernel(channels):
    cases = [square(2, 3, 8), square(1, 2, 7), square(2, 1, 9), square(1, 0, 8)]
    assert_right(cases, 7, channels)


def test_an_image_smaller_than_the_kernel():
    cases = [square(stride, 1, size) for stride, size in itertools.product((1, 2), repeat=2)]
    assert_right(cases, 3, 5)


def test_uneven_padding_and_strides():
    assert_right([((2, 1), ((0, 1), (2, 0)), 6), ((1, 2), ((3, 0), (1, 2)), 5)], 3, 5)


@pytest.mark.parametrize("channels", [3, 8])
def test_few_output_channels_and_columns_that_a_stride_leaves_over(channels):
    # Widths that come out: 10, 16 and 8 pixels, which 2 and 4 pixels at once divide, and 9 and 5.
    cases = [square(1, 1, 9), square(2, 1, 15), square(2, 1, 14), square(1, 1, 8), square(2, 0, 10)]
    cases += [((1, 2), ((1, 1), (2, 0)), 15), ((1, 3), ((0, 2), (1, 1)), 23)]
    for out in (8, 16):
        assert_right(cases, 3, channels, out)


def test_even_and_odd_pixels_apart():
    x, kernel = jnp.asarray(normal(2, 8, 8, 16)), jnp.asarray(normal(3, 3, 16, 4))
    cotangent, around = normal(2, 4, 4, 4), ((1, 1), (1, 1))
    assert forms.has_four_phases(x.shape, kernel, (2, 2), around, cotangent)
    results = jax.jit(lambda *given: ours(*given, (2, 2), around))(x, kernel, cotangent)
    for a, b in zip(results, by_numpy(x, kernel, cotangent, (2, 2), around), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def shipped_shapes():
    """Image, kernel, strides and padding of every convolution of the shipped widths, once each."""
    shapes = {}

    def note(x, kernel, strides, padding, *rest, **options):
        shapes[x.shape[1:], kernel.shape, tuple(strides), tuple(map(tuple, padding))] = None
        return lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "conv_general_dilated", note)
        for width, stem in ((16, "cifar"), (24, "cifar_half"), (32, "cifar")):
            jax.eval_shape(
                lambda key, w=width, s=stem: models.resnet18(key, width=w, stem=s, image_size=32),
                jax.random.key(0),
            )
    return list(shapes)


@pytest.mark.slow
def test_every_shape_of_the_shipped_networks_is_that_of_lax():
    shapes = shipped_shapes()
    assert len(shapes) > 20
    for image, kernel, strides, padding in shapes:
        x, weights = jnp.asarray(normal(2, *image)), jnp.asarray(normal(*kernel))
        size = forms.output_size(x.shape, kernel, strides, padding)
        cotangent = normal(2, *size, kernel[3])

        def both(convolve, x, weights, given=(strides, padding), cotangent=cotangent):
            y, pull = jax.vjp(lambda x, w: convolve(x, w, *given), x, weights)
            return y, *pull(cotangent)

        def by_lax(x, w, strides, padding):
            return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=DIMENSIONS)

        mine = jax.jit(functools.partial(both, conv_general_dilated))(x, weights)
        theirs = jax.jit(functools.partial(both, by_lax))(x, weights)
        for what, a, b in zip(("y", "dx", "dkernel"), mine, theirs, strict=True):
            error = float(jnp.abs(a - b).max() / jnp.abs(b).max())
            assert error < 2e-6, (image, kernel, strides, padding, what, error)


def test_barriers_live_until_kernels_are_made():
    """Without them XLA computes what made an operand once more in each copy of it."""
    x, kernel = arrays(8, 3, 8)

    def loss(kernel, x):
        return jnp.sum(jnp.cos(conv_general_dilated(jnp.sin(x), kernel, (1, 1), "SAME")))

    text = jax.jit(jax.grad(loss)).lower(kernel, x).compile().as_text()
    assert "opt-barrier" in text


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_padding_by_name_is_that_of_lax(padding):
    x, kernel = arrays(8, 3, 5)
    np.testing.assert_allclose(
        conv_general_dilated(x, kernel, (2, 2), padding),
        lax.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=DIMENSIONS),
        rtol=1e-5,
        atol=1e-5,
    )


def test_bfloat16_stays_bfloat16():
    x, kernel = (a.astype(jnp.bfloat16) for a in arrays(8, 3, 5))
    y, gradient = jax.vjp(lambda x: conv_general_dilated(x, kernel, (1, 1), "SAME"), x)
    assert y.dtype == gradient(y)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("channels", [3, 5])
def test_gradients_under_vmap_over_images(channels):
    x, kernel = arrays(6, 3, channels)
    strides, padding = (2, 2), ((1, 1), (1, 1))
    cotangent = normal(2, 3, 4, 5)

    def gradient(image, cotangent):
        return ours(image[None], kernel, cotangent[None], strides, padding)[1][0]

    expected = by_numpy(x, kernel, cotangent, strides, padding)[1]
    np.testing.assert_allclose(
        jax.jit(jax.vmap(gradient))(x, cotangent), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("channels", [3, 5])
def test_gradients_inside_a_scan(channels):
    x, kernel = arrays(6, 3, channels)
    strides, padding = (1, 1), ((1, 1), (1, 1))

    def step(x, _):  # y is the cotangent: gradient ascent on |y|^2 / 2
        y, pullback = jax.vjp(lambda x: conv_general_dilated(x, kernel, strides, padding), x)
        return x + 0.01 * pullback(y)[0], None

    scanned, _ = jax.jit(lambda x: lax.scan(step, x, length=3))(x)
    expected = np.asarray(x, np.float64)
    for _ in range(3):
        y = by_numpy(expected, kernel, np.zeros((2, 6, 7, 5)), strides, padding)[0]
        expected = expected + 0.01 * by_numpy(expected, kernel, y, strides, padding)[1]
    error = np.abs(scanned - expected).max() / np.abs(expected).max()
    assert error < 1e-5


def test_a_second_call_does_not_trace_again():
    x, kernel = arrays(8, 3, 5)
    traces = []

    @jax.jit
    def gradient(x):
        traces.append(1)
        return jax.grad(lambda x: jnp.sum(conv_general_dilated(x, kernel, (1, 1), "SAME")))(x)

    first = gradient(x)
    second = gradient(x + 1)  # linear, so the gradient does not depend on x
    np.testing.assert_array_equal(first, second)
    assert len(traces) == 1


@pytest.mark.parametrize("options", [{"feature_group_count": 2}, {"rhs_dilation": (2, 2)}])
def test_grouped_and_dilated_convolutions_go_to_lax(options):
    x = arrays(8, 3, 4)[0]
    channels = 4 // options.get("feature_group_count", 1)
    kernel = normal(3, 3, channels, 4)
    np.testing.assert_array_equal(
        conv_general_dilated(x, kernel, (1, 1), "SAME", **options),
        lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS, **options
        ),
    )


def test_linen_takes_it_as_its_convolution():
    x = arrays(8, 3, 3)[0]
    plain = nn.Conv(4, (3, 3))
    fast = nn.Conv(4, (3, 3), conv_general_dilated_cls=lambda: conv_general_dilated)
    variables = plain.init(jax.random.key(0), x)
    np.testing.assert_allclose(
        fast.apply(variables, x), plain.apply(variables, x), rtol=1e-5, atol=1e-6
    )
