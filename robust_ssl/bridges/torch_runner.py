"""Calls a PyTorch module on NumPy arrays, forwards and backwards.

PyTorch is imported in functions only: it is an extra.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from robust_ssl.bridges import probing
from robust_ssl.build import near


class Runner:
    """A module with what is looked at in it; images in and out are NumPy's, colors last.

    Args:
      module: A `torch.nn.Module`.
      kind: What it is, for messages.
      output: Which of its outputs; see `probing.pick`.
      taps: Names of taps and of submodules.
      head: Name of the submodule whose input is taken in place of the module's output.

    Raises:
      ValueError: If the module is in training mode, on several devices or none, or has no
        submodule of a name.
    """

    def __init__(
        self,
        module: Any,
        kind: str,
        output: str | int | None = None,
        taps: dict[str, str] | None = None,
        head: str | None = None,
    ):
        self.module, self.kind, self.output = module, kind, output
        self.taps, self.head = taps or {}, head
        # Two calls of a program may be under way at once, and hooks are the module's.
        self._lock = threading.Lock()
        self._graph: tuple[Any, ...] | None = None
        self._check_mode()
        self.device, self.dtype = _place(module, kind)
        parts = dict(module.named_modules())
        for name in [*self.taps.values(), *([head] if head is not None else [])]:
            if name not in parts or not name:
                raise ValueError(f"{kind} has no submodule {name!r}{near(name, parts)}")

    def forward(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the output and the taps for ``[n, H, W, 3]``, or for features ``[n, dim]``."""
        import torch

        with self._lock, torch.no_grad():
            return tuple(_to_numpy(x) for x in self._run(self._tensor(images)))

    def remembering(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the same, and keeps torch's graph for the next gradient at these images."""
        with self._lock, _differentiating():
            leaf, values = self._forward_from_leaf(images)
            self._graph = (images, self._versions(), leaf, values)
            return tuple(_to_numpy(x) for x in values)

    def backward(self, images: np.ndarray, cotangents: tuple[np.ndarray, ...]) -> np.ndarray:
        """Returns the gradient for the images of the outputs times their cotangents."""
        gradient = self.gradient(images, cotangents)
        return np.zeros(images.shape, np.float32) if gradient is None else gradient

    def gradient(
        self, images: np.ndarray, cotangents: tuple[np.ndarray, ...], *, output_only: bool = False
    ) -> np.ndarray | None:
        """Returns the same, or None where no output depends on the images in torch's eyes."""
        import torch

        with self._lock, _differentiating():
            leaf, values = self._remembered(images) or self._forward_from_leaf(images)
            values = values[: 1 if output_only else None]
            pairs = zip(values, cotangents, strict=not output_only)
            pairs = [(v, self._tensor(c).to(v.dtype)) for v, c in pairs if v.requires_grad]
            if not pairs:
                return None
            outputs, given = zip(*pairs, strict=True)
            (gradient,) = torch.autograd.grad(outputs, leaf, given, allow_unused=True)
            return None if gradient is None else _to_numpy(gradient)

    def _forward_from_leaf(self, images: np.ndarray) -> tuple[Any, list[Any]]:
        leaf = self._tensor(images).requires_grad_()
        # A copy, since a module may change its input in place, and a leaf may not change.
        return leaf, self._run(leaf.clone())

    def _remembered(self, images: np.ndarray) -> tuple[Any, list[Any]] | None:
        """Returns the graph of these very images, once; it holds every activation."""
        if self._graph is None or not np.array_equal(self._graph[0], images):
            return None
        (_, versions, leaf, values), self._graph = self._graph, None
        self._check_mode()
        return (leaf, values) if versions == self._versions() else None

    def _versions(self) -> list[int]:
        """Returns what torch counts up when somebody changes a weight in place."""
        return [x._version for x in (*self.module.parameters(), *self.module.buffers())]

    def output_of(self, images: np.ndarray) -> Any:
        """Returns the tensor that is taken for the output."""
        import torch

        with self._lock, torch.no_grad():
            return self._run(self._tensor(images))[0]

    def whole(self, images: np.ndarray) -> np.ndarray:
        """Returns what the module itself gives, whatever `head` is."""
        return Runner(self.module, self.kind, self.output).forward(images)[0]

    def head_runner(self) -> Runner:
        """Returns the head as a module of its own, under the same lock."""
        part = Runner(self.module.get_submodule(self.head), f"the head {self.head!r}")
        part._lock = self._lock
        return part

    def _run(self, inputs: Any) -> list[Any]:
        """Calls the module; returns its output and the taps, as tensors."""
        self._check_mode()
        seen: dict[str, list[Any]] = {}
        with self._watching(seen):
            try:
                value = self.module(inputs)
            except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
                raise ValueError(
                    f"{self.kind} does not take inputs {list(inputs.shape)}: {error}"
                ) from error
        if self.head is None:
            value = probing.pick(value, self.output, self.kind, _is_tensor)
        else:
            value = self._once(seen, "head", self.head)
        return [value, *(self._once(seen, f"tap {tap}", part) for tap, part in self.taps.items())]

    @contextlib.contextmanager
    def _watching(self, seen: dict[str, list[Any]]) -> Iterator[None]:
        """Keeps what goes into the head and comes out of the tapped submodules."""

        def keep(name):
            return lambda _, inputs, value: seen.setdefault(name, []).append(_copy(value))

        def keep_input(_, inputs):
            seen.setdefault("head", []).append(_copy(inputs[0]) if inputs else None)

        handles = [
            self.module.get_submodule(part).register_forward_hook(keep(f"tap {tap}"))
            for tap, part in self.taps.items()
        ]
        if self.head is not None:
            part = self.module.get_submodule(self.head)
            handles.append(part.register_forward_pre_hook(keep_input))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _once(self, seen: dict[str, list[Any]], key: str, part: str) -> Any:
        values = seen.get(key, [])
        if len(values) != 1:
            raise ValueError(
                f"{self.kind} calls its submodule {part!r} {len(values)} times for a batch; name "
                "one that it calls once"
            )
        if not _is_tensor(values[0]):
            kind = type(values[0]).__name__
            raise ValueError(f"submodule {part!r} of {self.kind} has a {kind} there, no tensor")
        return values[0]

    def _tensor(self, array: np.ndarray) -> Any:
        """Returns a fresh tensor, colors first, where the module is."""
        import torch

        array = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
        # A copy, since arrays of JAX are not to be written to.
        return torch.from_numpy(np.array(array, order="C")).to(self.device, self.dtype)

    def _check_mode(self) -> None:
        training = [name or "itself" for name, m in self.module.named_modules() if m.training]
        if training:
            more = f" and {len(training) - 3} more" if len(training) > 3 else ""
            raise ValueError(
                f"{self.kind} is in training mode ({', '.join(training[:3])}{more}): its answers "
                "would depend on the batch or on chance; call module.eval() first"
            )


@contextlib.contextmanager
def _differentiating() -> Iterator[None]:
    """Switches gradients on, whatever the caller's mode."""
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        yield


def _place(module: Any, kind: str) -> tuple[Any, Any]:
    """Returns the device and the type of number that a module takes its images in."""
    import torch

    weights = [*module.named_parameters(), *module.named_buffers()]
    devices = {str(tensor.device): name for name, tensor in reversed(weights)}
    if len(devices) > 1 or "meta" in devices:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(
            f"{kind} must lie on one device, with its weights: {where}; move it: module.to('cpu')"
        )
    floats = [t.dtype for _, t in weights if t.is_floating_point()]
    return torch.device(next(iter(devices), "cpu")), floats[0] if floats else torch.float32


def _copy(value: Any) -> Any:
    """Returns what a part that comes later cannot change: many activations work in place."""
    return value.clone() if _is_tensor(value) else value


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _to_numpy(tensor: Any) -> np.ndarray:
    array = tensor.detach().float().cpu().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
