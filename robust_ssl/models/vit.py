"""Vision transformers (Dosovitskiy et al., ICLR 2021) in linen, as timm and public files have them.

Pre-norm blocks, learned positions; what public models do differently (layer scale, register
tokens, CLIP's first norm, gated MLPs, rotary positions) are options of `vision_transformer`.
Parameter paths are what layer-wise rules are written against: ``embed/patch``, ``embed/position``,
``block1/attention/qkv``, ``block1/mlp/dense1``, ``norm`` and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from robust_ssl.models.resnet import CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN, IMAGENET_STD
from robust_ssl.models.sizes import check_sizes, first_variables, number_type
from robust_ssl.models.transformer import (
    ACTIVATIONS,
    AttentionPool,
    Block,
    Embedding,
    layer_norm,
)
from robust_ssl.types import Encoder

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, attention heads; DeiT
_MOST_PATCHES = 512  # along a side; their angles are computed while the network is built
DEPTH = 12  # blocks of all three sizes
POOLINGS = ("token", "mean", "attention")


class ViT(nn.Module):
    """Vision transformer up to its pooled features.

    Attributes:
      width: Size of a token.
      heads: Attention heads; divides `width`.
      depth: Number of blocks.
      patch_size: Height and width of a patch, pixels; divides `image_size`.
      image_size: Height and width of the images it has positions for, pixels.
      mlp_width: Size between the two layers of an MLP (of its gated half for ``"swiglu"``).
      pooling: ``"token"``: features are the class token.  ``"mean"``: the mean of all patches.
        ``"attention"``: what a learned query attends to.
      class_token: Whether there is one.
      norm_after_pooling: The last layer norm sees the pooled features, not the tokens.
      registers: Further tokens without positions, which pooling leaves out.
      pre_norm: A layer norm before the first block.
      patch_bias: Whether the patch map has a bias.
      layer_scale: Whether each branch of a block is multiplied by a learned vector.
      activation: A name in `ACTIVATIONS`.
      norm_epsilon: Added to the variance in every layer norm.
      rotary: Base of rotary positions; None for learned ones alone.
      rotary_reference: Patches along a side by which rotary positions count, beside learned ones;
        None: rotary ones count from -1 to 1 and take the place of learned ones.
      attention_norm: A layer norm before attention's last map.
      mlp_norm: A layer norm before an MLP's last map.
      dtype: What is computed in; parameters stay float32.
      axis_name: Accepted like every encoder's and unused: there are no batch statistics.
      remat: Whether a gradient computes each block's activations again instead of keeping them.
    """

    width: int = 192
    heads: int = 3
    depth: int = DEPTH
    patch_size: int = 4
    image_size: int = 32
    mlp_width: int = 768
    pooling: str = "token"
    class_token: bool = True
    norm_after_pooling: bool = False
    registers: int = 0
    pre_norm: bool = False
    patch_bias: bool = True
    layer_scale: bool = False
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    rotary: float | None = None
    rotary_reference: int | None = None
    attention_norm: bool = False
    mlp_norm: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns float32 features ``[batch, width]`` and taps ``embed``, ``block1``, ..."""
        del train  # no dropout, no batch statistics
        x = Embedding(
            self.width, self.patch_size, self.image_size, self.class_token, self.registers,
            self.pre_norm, self.patch_bias, self.norm_epsilon, self.has_positions, self.dtype,
            name="embed",
        )(x.astype(self.dtype))  # fmt: skip
        taps = {"embed": x}
        block = nn.remat(Block) if self.remat else Block
        for index in range(self.depth):
            name = f"block{index + 1}"
            x = block(
                self.heads, self.mlp_width, self.activation, self.layer_scale,
                self.norm_epsilon, self.rotary, self.rotary_reference, self.attention_norm,
                self.mlp_norm, self._prefix, self.dtype, name=name,
            )(x)  # fmt: skip
            taps[name] = x
        norm = layer_norm(self, "norm")
        # One norm, one name: only its place differs, so parameter paths are the same.
        if self.norm_after_pooling:
            return norm(self._pool(x)).astype(jnp.float32), taps
        if self.pooling == "attention":
            pool = AttentionPool(
                self.heads, self.mlp_width, self.activation, self.norm_epsilon, self.dtype,
                name="pool",
            )  # fmt: skip
            return pool(norm(x)[:, self._prefix :]).astype(jnp.float32), taps
        return self._pool(norm(x)), taps

    @property
    def has_positions(self) -> bool:
        """Whether there are learned positions."""
        return self.rotary is None or self.rotary_reference is not None

    @property
    def _prefix(self) -> int:
        """How many tokens are no patches; they come first."""
        return int(self.class_token) + self.registers

    def _pool(self, x: jax.Array) -> jax.Array:
        # Before the mean: a mean of many tokens in bfloat16 would keep two or three digits.
        x = x.astype(jnp.float32)
        if self.pooling == "token":
            return x[:, 0]
        return jnp.mean(x[:, self._prefix :], axis=1)


def vision_transformer(
    key: jax.Array,
    *,
    width: int,
    heads: int,
    depth: int = DEPTH,
    patch_size: int = 16,
    image_size: int = 224,
    mlp_width: int | None = None,
    pooling: str = "token",
    class_token: bool = True,
    norm_after_pooling: bool = False,
    registers: int = 0,
    pre_norm: bool = False,
    patch_bias: bool = True,
    layer_scale: bool = False,
    activation: str = "gelu",
    norm_epsilon: float = 1e-6,
    rotary: float | None = None,
    rotary_reference: int | None = None,
    attention_norm: bool = False,
    mlp_norm: bool = False,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    dtype: Literal["float32", "bfloat16"] = "float32",
    name: str = "vision_transformer",
) -> Encoder:
    """Builds a vision transformer of any shape, with random weights.

    The defaults are timm's ``vit_*_patch16_224``; the options are what public models need.

    Args:
      key: Random key of the initialization.
      width: Size of a token, and number of features.
      heads: Attention heads; divides `width`.
      depth: Number of blocks.
      patch_size: Height and width of a patch, pixels; must divide `image_size`.
      image_size: Height and width, pixels; positions are for this size only.
      mlp_width: Size between the two layers of an MLP; None is ``4 * width``.
      pooling: ``"token"``: the features are the class token.  ``"mean"``: the mean of all
        patches, without class token and registers.  ``"attention"``: a learned query attends to
        them (SigLIP).
      class_token: Whether there is a class token.
      norm_after_pooling: The last layer norm comes after pooling (timm's ``fc_norm``, MAE's
        fine-tuned models) instead of before it.
      registers: Further tokens without positions (DINOv2 with registers: 4).
      pre_norm: A layer norm before the first block (CLIP); the tap ``embed`` is after it.
      patch_bias: Whether the patch map has a bias (CLIP: no).
      layer_scale: Each branch of a block is multiplied by a learned vector (DINOv2).
      activation: ``"gelu"`` (exact), ``"gelu_tanh"`` (SigLIP), ``"quick_gelu"`` (OpenAI's CLIP)
        or ``"swiglu"`` (DINOv2 giant; then `mlp_width` is that of the gated values).
      norm_epsilon: 1e-6 in timm, DINO, MAE and DINOv2; 1e-12 in Hugging Face's ViT, 1e-5 in CLIP.
      rotary: Base of rotary positions, which take the place of learned ones (DINOv3: 100).
      rotary_reference: Patches along a side by which rotary positions count (EVA-02: 16, with a
        base of 10,000); then there are learned ones too.
      attention_norm: A layer norm before attention's last map (EVA-02's CLIP).
      mlp_norm: A layer norm before an MLP's last map (EVA-02 base and large).
      mean: Per-channel mean of the training pixels, in [0, 1].
      std: Per-channel standard deviation of the training pixels.
      dtype: ``"float32"`` or ``"bfloat16"``: what is computed in; parameters stay float32.
      name: For tables and manifests.

    Returns:
      An `Encoder` of `width` features with the taps ``embed``, ``block1``, ``block2``, ...

    Raises:
      ValueError: If a choice is not known, the patches do not tile the image, the heads do not
        divide the width, or the class token is to be pooled and there is none.

    Example:
      >>> encoder = vision_transformer(
      ...     jax.random.key(0), width=12, heads=2, depth=1, image_size=32, layer_scale=True
      ... )
      >>> encoder(jnp.zeros((2, 32, 32, 3))).taps["block1"].shape
      (2, 5, 12)

    References:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, Section 3.1.
      Oquab et al., "DINOv2", TMLR 2024; Darcet et al., "Vision Transformers Need Registers",
      ICLR 2024; Radford et al., "Learning Transferable Visual Models", ICML 2021 (CLIP);
      Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023 (SigLIP); Simeoni et
      al., "DINOv3", 2025; Fang et al., "EVA-02", 2023.
    """
    check_sizes(mean, std, width=width, depth=depth, image_size=image_size, patch_size=patch_size)
    if registers < 0:
        raise ValueError(f"registers must be at least 0, got {registers}")
    module = ViT(
        width=width, heads=heads, depth=depth, patch_size=patch_size, image_size=image_size,
        mlp_width=4 * width if mlp_width is None else mlp_width, pooling=pooling,
        class_token=class_token, norm_after_pooling=norm_after_pooling, registers=registers,
        pre_norm=pre_norm, patch_bias=patch_bias, layer_scale=layer_scale, activation=activation,
        norm_epsilon=norm_epsilon, rotary=rotary, rotary_reference=rotary_reference,
        attention_norm=attention_norm, mlp_norm=mlp_norm, dtype=number_type(dtype),
    )  # fmt: skip
    # Before any tracing, so that a wrong option is named instead of a shape deep inside.
    check(module)
    variables = first_variables(module, key, image_size)
    return Encoder(variables, module, tuple(mean), tuple(std), image_size, width, name)


def check(module: ViT) -> None:
    """Raises ValueError where a module's choices do not go together."""
    if module.pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}, got {module.pooling!r}")
    if module.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {tuple(ACTIVATIONS)}, got {module.activation!r}"
        )
    if module.pooling == "token" and not module.class_token:
        raise ValueError("pooling='token' needs class_token=True; or take pooling='mean'")
    if module.heads < 1 or module.width % module.heads:
        raise ValueError(
            f"{module.heads} heads do not divide a width of {module.width}; take a number that does"
        )
    if module.norm_after_pooling and module.pooling == "attention":
        raise ValueError("pooling='attention' has its norm before it: norm_after_pooling=False")
    if module.rotary_reference is not None and (
        module.rotary is None or module.rotary_reference < 1
    ):
        raise ValueError(
            f"rotary_reference={module.rotary_reference} must be positive, and needs rotary too: "
            "the base of its frequencies"
        )
    if module.rotary is not None and (module.width // module.heads) % 4:
        raise ValueError(
            f"rotary positions need heads of a multiple of 4 features, these have "
            f"{module.width // module.heads}"
        )
    if module.rotary is not None and module.image_size > _MOST_PATCHES * max(module.patch_size, 1):
        raise ValueError(
            f"rotary positions are for at most {_MOST_PATCHES} patches along a side; images of "
            f"{module.image_size} pixels have more"
        )
    if module.patch_size < 1 or module.image_size % module.patch_size:
        raise ValueError(
            f"patches of {module.patch_size} pixels do not tile an image of {module.image_size}; "
            f"patch_size must divide image_size"
        )


def _builder(size: str) -> Callable[..., Encoder]:
    """Makes the public function of a published size; they differ in width and heads only."""
    width, heads = SIZES[size]

    def build(
        key: jax.Array,
        *,
        patch_size: int = 4,
        image_size: int = 32,
        pooling: str = "token",
        depth: int | None = None,
        mean: tuple[float, float, float] = CIFAR10_MEAN,
        std: tuple[float, float, float] = CIFAR10_STD,
        dtype: Literal["float32", "bfloat16"] = "float32",
        name: str = f"vit_{size}",
    ) -> Encoder:
        """Builds a ViT-TITLE encoder (WIDTH features, HEADS heads) with random weights.

        Args:
          key: Random key of the initialization.
          patch_size: Height and width of a patch, pixels; must divide `image_size`.  4 for CIFAR,
            16 for ImageNet.
          image_size: Height and width, pixels; positions are learned for this size only.
          pooling: ``"token"``: the features are the class token.  ``"mean"``: there is no class
            token and the features are the mean over patches (timm's ``gap`` models).
          depth: Number of blocks; None is 12.
          mean: Per-channel mean of the training pixels, in [0, 1].
          std: Per-channel standard deviation of the training pixels.
          dtype: ``"float32"`` or ``"bfloat16"``: what is computed in; parameters stay float32.
          name: For tables and manifests.

        Returns:
          An `Encoder` of WIDTH features with the taps ``embed``, ``block1``, ``block2``, ...

        Raises:
          ValueError: If `pooling` is not known or the patches do not tile the image.

        Example:
          >>> shapes = jax.eval_shape(lambda key: vit_SIZE(key, depth=1), jax.random.key(0))
          >>> shapes.dim
          WIDTH

        References:
          Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, Section 3.1.
          Touvron et al., "Training data-efficient image transformers", ICML 2021, Table 1 (sizes).
        """
        return vision_transformer(
            key, width=width, heads=heads, depth=DEPTH if depth is None else depth,
            patch_size=patch_size, image_size=image_size, pooling=pooling,
            class_token=pooling == "token", mean=mean, std=std, dtype=dtype, name=name,
        )  # fmt: skip

    build.__name__ = build.__qualname__ = f"vit_{size}"  # a saved encoder's card names its builder
    # One text, so that the three functions cannot come to say different things.
    title = size.capitalize()
    values = {"TITLE": title, "SIZE": size, "WIDTH": str(width), "HEADS": str(heads)}
    for placeholder, value in values.items():
        build.__doc__ = build.__doc__.replace(placeholder, value)
    return build


vit_tiny = _builder("tiny")
vit_small = _builder("small")
vit_base = _builder("base")
