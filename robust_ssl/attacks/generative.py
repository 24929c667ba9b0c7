"""AdvEncoder: a universal perturbation or patch that comes out of a generator."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

from robust_ssl import objectives, struct
from robust_ssl.attacks.perturbation import delta_of_pattern
from robust_ssl.models.generator import Generator
from robust_ssl.types import Objective

FORMS = {"paper": objectives.advencoder_paper, "released": objectives.advencoder_released}
_ADAM = optax.scale_by_adam(b1=0.5, b2=0.999)  # DCGAN, and AdvEncoder's released code


@struct.dataclass
class GeneratorState:
    """State of `AdvEncoderPER` and `AdvEncoderPAT`."""

    params: Any  # of the generator
    opt_state: Any  # of Adam
    noise: jax.Array  # the generator's fixed input, [noise_vectors, 100]
    image_shape: tuple[int, int, int] = struct.field(pytree_node=False)


@struct.dataclass
class AdvEncoderPER:
    """AdvEncoder's perturbation: a generator with fixed noise, trained to upset the features.

    The generator is a way to search: neighbouring pixels share parameters, so it finds smooth and
    structured perturbations.  After fitting only its one output is kept.

    Attributes:
      learning_rate: Of Adam.  The default is meant for some 4,000 steps; with 100 steps, 2e-3.
      form: ``"released"`` (`objectives.advencoder_released`) or ``"paper"``
        (`objectives.advencoder_paper`), or any objective of one's own.  In the paper's form the
        frequency term can outweigh the features and leave little but noise.
      width: Channels of the generator's last hidden layer.
      noise_vectors: How many images are mixed to one.  The released code takes as many as its
        batch, 256, and then works at that batch size only; they are independent of it here.

    Raises:
      ValueError: If `form` is neither.

    Example:
      >>> from robust_ssl import threats
      >>> attack = AdvEncoderPER(form="released", width=8, noise_vectors=2)
      >>> state = attack.init(jax.random.key(0), (8, 8, 3), threats.Linf(0.25))
      >>> delta = attack.delta(state, threats.Linf(0.25))
      >>> delta.shape, bool(jnp.max(jnp.abs(delta)) <= 0.25)
      ((8, 8, 3), True)

    References:
      Zhou et al., "Downstream-agnostic Adversarial Examples", ICCV 2023; the authors'
      code, github.com/CGCL-codes/AdvEncoder, commit 3dd1c4e.
    """

    learning_rate: jax.Array | float = 2e-4  # the released code
    form: Literal["released", "paper"] | Objective = struct.field(
        pytree_node=False, default="released"
    )
    width: int = struct.field(pytree_node=False, default=128)
    noise_vectors: int = struct.field(pytree_node=False, default=16)
    name: str = struct.field(pytree_node=False, default="advencoder")

    def __post_init__(self):
        """Checks the form."""
        if not callable(self.form) and self.form not in FORMS:
            raise ValueError(f"form must be one of {sorted(FORMS)}, got {self.form!r}")

    @property
    def objective(self):
        """What is maximized."""
        return self.form if callable(self.form) else FORMS[self.form]

    def init(self, key, image_shape, threat) -> GeneratorState:
        """Draws the noise and the generator's weights."""
        noise_key, params_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (self.noise_vectors, 100))
        params = self._module(image_shape).init(params_key, noise)["params"]
        return GeneratorState(params, _ADAM.init(params), noise, tuple(image_shape))

    def step(self, state, threat, batch):
        """Updates the generator once; returns the new state and the objective before it."""

        def delta_of(params):
            # Each device draws some of the images: the generator costs as much as the encoder.
            return self._delta(state.replace(params=params), threat, batch.share)

        value, gradient = batch.value_and_grad(self.objective, state.params, delta_of)
        direction, opt_state = _ADAM.update(gradient, state.opt_state)
        params = jax.tree.map(
            lambda weight, change: weight + self.learning_rate * change, state.params, direction
        )
        return state.replace(params=params, opt_state=opt_state), value

    def delta(self, state, threat) -> jax.Array:
        """Returns the perturbation, ``[H, W, 3]``, inside the budget."""
        return self._delta(state, threat)

    def _delta(self, state, threat, *share) -> jax.Array:
        module = self._module(state.image_shape)
        return delta_of_pattern(module.apply({"params": state.params}, state.noise, *share), threat)

    def _module(self, image_shape) -> Generator:
        height, width, _ = image_shape
        return Generator(height=height, width=width, channels=self.width)


@struct.dataclass
class AdvEncoderPAT(AdvEncoderPER):
    """AdvEncoder's patch: the same generator and the same terms, but its output replaces pixels.

    The generator fills a canvas of the image's size, of which the threat keeps the patch.  From -1
    to 1 its output runs from black to white, so the patch's pixels lie in [0, 1]; the released code
    takes the output itself for pixels, where everything below 0 is no image.  Its attributes are
    those of `AdvEncoderPER`.

    It is fitted with ``threat=threats.Patch``, whose budget is the patch's share of the area, 0.03
    in the released code; in a config,
    ``{"threat": {"function": "robust_ssl.threats:Patch"}, "epsilon": 0.03}``.

    Example:
      >>> from robust_ssl import threats
      >>> attack, patch = AdvEncoderPAT(width=8, noise_vectors=2), threats.Patch(0.25)
      >>> delta = attack.delta(attack.init(jax.random.key(0), (8, 8, 3), patch), patch)
      >>> int(jnp.sum(delta[..., 0] > 0)), bool(jnp.max(delta) <= 1)
      (16, True)

    References:
      As `AdvEncoderPER`: AdvEncoder-PAT, and ``gan_pat_attack.py`` of the authors' code.
    """

    name: str = struct.field(pytree_node=False, default="advencoder_pat")

    def init(self, key, image_shape, threat) -> GeneratorState:
        """Draws the noise and the generator's weights.

        Raises:
          ValueError: If the threat adds instead of replacing.
        """
        if not hasattr(threat, "area"):
            raise ValueError(
                f"{self.name} makes a patch, but the threat is {type(threat).__name__}; fit it "
                "with threat=threats.Patch (in a config, add the method's own "
                '"threat": {"function": "robust_ssl.threats:Patch"} and "epsilon": 0.03, the '
                "area), or use AdvEncoderPER"
            )
        return super().init(key, image_shape, threat)
