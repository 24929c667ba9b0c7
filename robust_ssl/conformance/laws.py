"""What the checks share: made-up images, small models, and assertions that name a law."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robust_ssl import struct
from robust_ssl.build import resolve
from robust_ssl.types import Encoder, Outputs


@struct.dataclass
class Bilinear:
    """The smallest model with features, logits and blocks that depend on every pixel."""

    weights: jax.Array  # [H * W * 3, dim]
    head: jax.Array  # [dim, classes]

    def __call__(self, images: jax.Array) -> Outputs:
        """Returns the outputs, for a batch or for one image."""
        linear = (images.reshape(*images.shape[:-3], -1) - 0.5) @ self.weights
        features = jnp.tanh(linear)
        # Four, because an attack on a middle layer takes the block at place 3 by default.
        taps = {f"block{place}": jnp.tanh(place * linear) for place in (1, 2, 3, 4)}
        return Outputs(features=features, logits=features @ self.head, taps=taps)


def small_model(random: np.random.Generator, image_size: int) -> Bilinear:
    """Returns a model of 8 features and 4 classes."""
    pixels = image_size * image_size * 3
    weights = jnp.asarray(random.normal(size=(pixels, 8)) / np.sqrt(pixels), jnp.float32)
    return Bilinear(weights, jnp.asarray(random.normal(size=(8, 4)), jnp.float32))


class ConvolutionNorm(nn.Module):
    """The smallest network with batch norm."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False):
        """Returns features ``[batch, 8]`` and one tap."""
        x = nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)
        axis_name = self.axis_name if train else None
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=axis_name)(x)
        x = nn.relu(x)
        return jnp.mean(x, axis=(1, 2)), {"block1": x}


@functools.cache
def small_encoder(image_size: int) -> Encoder:
    """Returns an encoder with batch norm and 8 features."""
    module = ConvolutionNorm()
    variables = module.init(jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)))
    return Encoder(variables, module, (0.5,) * 3, (0.25,) * 3, image_size, 8, "small")


def check_batch(batch: int, least: int = 2) -> None:
    """Raises ValueError for so few images that laws of a batch would say nothing."""
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < least:
        raise ValueError(f"batch must be a whole number of at least {least}, got {batch!r}")


def made_up_images(random: np.random.Generator, batch: int, image_size: int) -> jax.Array:
    """Returns random images, the first with black and white pixels, float ``[batch, H, W, 3]``."""
    images = jnp.asarray(random.uniform(size=(batch, image_size, image_size, 3)), jnp.float32)
    # Corners of the box: what leaves [0, 1] there is seen at once.
    return images.at[0, 0].set(0.0).at[0, 1].set(1.0)


def made_of(value: Any, *arguments: Any) -> Any:
    """Returns the value that ``"module:Class"`` or a class makes; other values as they are."""
    value = resolve(value) if isinstance(value, str) else value
    return value(*arguments) if isinstance(value, type) else value


def name_of(value: Any) -> str:
    """Returns what a message calls a value; a partial is called as its function."""
    while isinstance(value, functools.partial):
        value = value.func
    return getattr(value, "__name__", None) or type(value).__name__


def share_of_devices(batch: int) -> int:
    """Returns on how many of the devices a batch is tried: 4, 2, or 1 if there is only one."""
    return next(n for n in (4, 2, 1) if n <= len(jax.devices()) and batch % n == 0)


def without_budget(threat: Any) -> Any:
    """Returns the threat with an epsilon of 0, its own or an inner threat's; None if none has."""
    fields = getattr(threat, "__dataclass_fields__", ())
    if "epsilon" in fields:
        return dataclasses.replace(threat, epsilon=0.0)
    inner = without_budget(threat.threat) if "threat" in fields else None
    return None if inner is None else dataclasses.replace(threat, threat=inner)


def one_by_one(function: Callable, *batches: jax.Array) -> jax.Array:
    """Returns what a function makes of each example without its neighbors."""
    return jnp.stack([function(*example) for example in zip(*batches, strict=True)])


_SIGNS = (" ", ".", ",", "'")


@dataclasses.dataclass(frozen=True)
class Laws:
    """Assertions about one value; a message is the value's name and the law that it breaks."""

    name: str

    @classmethod
    def of(cls, value: Any, *methods: str) -> Laws:
        """Asserts that a value has methods, and that `jax.jit` tells its class from others."""
        laws = cls(name_of(value))
        absent = [method for method in methods if not callable(getattr(value, method, None))]
        laws.hold(not absent, f"has no {' and no '.join(absent)}")
        assert "_flax_dataclass" not in vars(type(value)), (
            f"jax.jit may take {type(value).__name__} for another class of flax.struct: make it "
            "with robust_ssl.struct.dataclass, which is the same otherwise"
        )
        return laws

    def passable(self, value: Any) -> None:
        """Asserts that compiled functions take the value; a function may be closed over."""
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            return
        try:
            struct.check_passable(value)
        except ValueError as error:
            raise AssertionError(str(error)) from error

    def calls(
        self, function: Callable, advice: Callable[[Exception], str] = lambda _: ""
    ) -> Callable:
        """Returns a function whose errors name the value, and say what to do where that is known.

        Args:
          function: Of the user.
          advice: What to add to the message of an error, known of this kind of value.
        """

        @functools.wraps(function)
        def called(*arguments, **options):
            try:
                return function(*arguments, **options)
            except AssertionError:
                raise
            except Exception as error:
                first = str(error).strip().partition("\n")[0]
                hint = advice(error) or _general_advice(error)
                raise AssertionError(
                    f"{self.name} raises {type(error).__name__}: {first}{hint}"
                ) from error

        return called

    def hold(self, holds: Any, law: str) -> None:
        """Asserts a law; one that begins with a sign, as ``".project"``, joins the name."""
        assert holds, f"{self.name}{'' if law.startswith(_SIGNS) else ' '}{law}"

    def images(self, images: Any, shape: tuple[int, ...], part: str = "", slack=1e-6) -> None:
        """Asserts the shape, the type, finite values and the pixel range of what a part returns."""
        actual = jnp.shape(images)
        self.hold(actual == shape, f"{part} must return {shape}, got {actual}")
        self.hold(images.dtype == jnp.float32, f"{part} must return float32, got {images.dtype}")
        self.hold(jnp.isfinite(images).all(), f"{part} returns values that are not finite")
        low, high = float(images.min()), float(images.max())
        # Sums in a resized image are rounded, so a white one may end a hair above 1.
        inside = low >= -slack and high <= 1 + slack
        self.hold(inside, f"{part} leaves [0, 1]: pixels from {low:.4f} to {high:.4f}")

    def finite(self, tree: Any, law: str) -> None:
        """Asserts that every leaf is an array of finite numbers."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if getattr(leaf, "dtype", None) == jax.dtypes.float0:
                continue
            where = jax.tree_util.keystr(path)
            self.hold(jnp.isfinite(_numbers(leaf)).all(), f"{law}, in {where}" if where else law)

    def moves(self, tree: Any, law: str) -> None:
        """Asserts that some leaf has a number that is not zero."""
        leaves = [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]
        self.hold(any(bool(jnp.any(_numbers(leaf) != 0)) for leaf in leaves), law)

    def close(self, actual: Any, desired: Any, law: str, tolerance: float = 1e-5) -> None:
        """Asserts that two trees are equal, up to rounding."""
        same = jax.tree.structure(actual) == jax.tree.structure(desired)
        self.hold(same, f"{law} (of another structure)")
        for pair in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
            one, other = (np.asarray(_numbers(leaf)) for leaf in pair)
            self.hold(one.shape == other.shape, f"{law} (shapes {one.shape} and {other.shape})")
            worst = float(np.max(np.abs(one - other), initial=0.0)) if one.dtype != bool else 0.0
            scale = 1.0 + float(np.max(np.abs(other), initial=0.0))
            self.hold(worst <= tolerance * scale, f"{law} (by up to {worst:.2g})")

    def mostly_close(self, actual: Any, desired: Any, law: str, share: float = 0.02) -> None:
        """Asserts that two images agree but for a few pixels."""
        # Sign steps may differ where a gradient is zero up to rounding.
        differs = float(np.mean(np.abs(np.asarray(actual) - np.asarray(desired)) > 1e-5))
        self.hold(differs <= share, f"{law} ({100 * differs:.1f} % of the pixels differ)")


def _general_advice(error: Exception) -> str:
    if isinstance(error, jax.errors.TracerArrayConversionError):
        return "; compute with jax.numpy, numpy cannot look into a compiled program"
    if isinstance(error, jax.errors.ConcretizationTypeError):  # a truth among them
        return "; an if of a value is no part of a compiled program: take jnp.where"
    return ""


def _numbers(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf).astype(jnp.float32) if is_key else leaf
