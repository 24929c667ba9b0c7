"""Where in a file of torch.save the state dict is: dictionaries in dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from robust_ssl.weights import torch_pickle
from robust_ssl.weights.torch_pickle import RefusedError

SAVE_AGAIN = "save the weights as safetensors or, with torch.save, as a state dict"
# Where files of weights keep the state dict, the likeliest first; otherwise it is the whole file.
PLACES = ("state_dict", "model", "teacher", "model_state_dict", "net")
_DEEPEST = 6  # VISSL's trunk is the fifth
_NOT_WEIGHTS = {"optimizer", "optimizers", "optimizer_states", "lr_schedulers", "loss_scaler"}


def find(saved: Mapping[Any, Any], has_tensors: Callable[[Any], bool]) -> dict[str, Mapping]:
    """Returns the dictionaries that hold tensors, by the keys that lead there, ``"a.b.c"``.

    Args:
      saved: What the file holds.
      has_tensors: Whether a value is a dictionary of tensors; the search does not enter it.

    Example:
      >>> saved = {"epoch": 3, "base": {"trunk": {"w": 1.0}}}
      >>> list(find(saved, lambda value: isinstance(value, dict) and 1.0 in value.values()))
      ['base.trunk']
    """
    places: dict[str, Mapping] = {}
    # By id: a dictionary that holds itself would be searched for ever.
    seen: set[int] = set()
    level = [("", saved)]
    for _ in range(_DEEPEST):
        deeper = []
        for place, value in level:
            for key, inner in value.items():
                named = isinstance(key, str) and key not in _NOT_WEIGHTS
                if not named or not isinstance(inner, Mapping) or id(inner) in seen:
                    continue
                seen.add(id(inner))
                name = f"{place}.{key}" if place else key
                if has_tensors(inner):
                    places[name] = inner
                else:
                    deeper.append((name, inner))
        level = deeper
    return places


def likeliest(places: Mapping[str, Any]) -> str | None:
    """Returns the usual place, or the only one; None where the reader must choose.

    Example:
      >>> likeliest({"optimizer": 0, "model.state_dict": 0}), likeliest({"a": 0, "b": 0})
      ('model.state_dict', None)
    """
    for name in (*PLACES, ""):
        if name in places:
            return name
    usual = [name for name in places if set(name.split(".")) <= set(PLACES)]
    if len(usual or places) == 1:
        return next(iter(usual or places))
    return None


def words(saved: Mapping[Any, Any]) -> dict[str, str]:
    """Returns what the file says in words beside the weights, such as ``{"arch": "resnet50"}``."""
    return {key: text for key, text in saved.items() if type(key) is str and type(text) is str}


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(map(is_tensor, value.values()))


def is_tensor(value: Any) -> bool:
    """True for a described tensor and for torch's own."""
    return isinstance(value, torch_pickle.Tensor) or hasattr(value, "untyped_storage")


def locate(saved: Any, under: str | None) -> tuple[str, Mapping[str, Any], list[str]]:
    """Finds the dictionary of tensors: its key, itself, and notes about what was passed over.

    Args:
      saved: What the file holds.
      under: Its key, ``"a.b"`` for one inside another; None to find it.

    Raises:
      RefusedError: If there is none there, or several and none is the usual one.
    """
    if not isinstance(saved, Mapping):
        raise RefusedError(
            f"it holds a {type(saved).__name__} instead of a dictionary of tensors; {SAVE_AGAIN}"
        )
    places = find(saved, _has_tensors)
    if _has_tensors(saved):
        places[""] = saved
    place = likeliest(places) if under is None else under
    if place not in places:
        choices = ", ".join(map(repr, places)) or "nowhere"
        keys = ", ".join(repr(key) for key in saved if isinstance(key, str)) or "none"
        lack = "usual state dict" if under is None else f"tensors under {under!r}"
        raise RefusedError(
            f"it has no {lack}; tensors are under: {choices} (keys of the file: {keys[:500]}); "
            "choose with under="
        )
    notes = []
    others = [name for name in places if name != place]
    if others:
        notes.append(f"tensors were taken from {place!r}; there are others under {others}")
    held = {name.partition(".")[0] for name in places} | places.keys()
    rest = [str(key) for key in saved if isinstance(key, str) and key not in held]
    if place and rest:
        notes.append(f"left out, not weights: {', '.join(sorted(rest))}")
    return place, places[place], notes
