"""A network of another library in the place of a linen module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from robust_ssl.parallel.devices import AXIS


@dataclasses.dataclass(frozen=True)
class Bridge:
    """What an `Encoder` or a `Classifier` has for a module where the network is not linen's.

    It can be attacked and measured, in evaluation mode and on one device.  Its weights are not
    this package's: nothing here trains, saves or exports them.

    Attributes:
      function: ``function(variables, inputs)`` returns what the module's ``apply`` would.
      kind: What it is, for messages, such as ``"the torch module ResNet"``.
      shape: Of one input, such as ``(32, 32, 3)``.
      closes_over: Whether the function reads more than its arguments, which may change.

    Example:
      >>> head = Bridge(lambda variables, features: 2 * features, "a function", (2,))
      >>> head.apply({}, jax.numpy.ones((1, 2)), train=False).tolist()
      [[2.0, 2.0]]
    """

    function: Callable[[Any, jax.Array], Any]
    kind: str
    shape: tuple[int, ...]
    closes_over: bool = False

    def apply(self, variables: Any, inputs: jax.Array, *, train: bool = False, **_: Any) -> Any:
        """Returns what the function returns.

        Raises:
          ValueError: In training mode, on several devices, or for inputs of another shape.
        """
        if train:
            raise ValueError(self._not_ours("trained"))
        if tuple(inputs.shape[1:]) != self.shape:
            raise ValueError(
                f"{self.kind} was taken for inputs {list(self.shape)}, got "
                f"{list(inputs.shape[1:])}; name another image_size where it is taken"
            )
        if _devices() > 1:
            raise ValueError(
                f"{self.kind} lies in one place, and {_devices()} devices ask for it; pass "
                "parallel=robust_ssl.parallel.Parallel.create(num_devices=1), or --devices 1"
            )
        return self.function(variables, inputs)

    def clone(self, **_: Any) -> Any:
        """Refuses: linen modules are cloned to be trained."""
        raise ValueError(self._not_ours("trained"))

    def copy(self, **_: Any) -> Any:
        """Refuses: linen modules are copied into ensembles."""
        raise ValueError(self._not_ours("a member of an ensemble"))

    def _not_ours(self, what: str) -> str:
        return (
            f"{self.kind} cannot be {what} here: its weights are not this package's. Bring them as "
            "a file: robust_ssl.import_encoder(path)"
        )


def _devices() -> int:
    """Returns over how many devices the step that is being traced is spread."""
    try:
        return jax.lax.axis_size(AXIS)
    except NameError:
        return 1


def refuse_bridge(model: Any, what: str) -> None:
    """Raises ValueError if a model's weights belong to another library.

    Args:
      model: An `Encoder`, a `Classifier`, or anything else, which passes.
      what: What cannot be done with it, such as ``"saved"``.
    """
    encoder = getattr(model, "encoder", model)
    for module in (getattr(encoder, "module", None), getattr(model, "head", None)):
        if isinstance(module, Bridge):
            raise ValueError(module._not_ours(what))
