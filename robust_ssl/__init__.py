"""Adversarial robustness of pre-trained encoders: attack, secure fine-tuning, evidence.

A public encoder goes in, a secured classifier and the proof come out:
``robust_ssl.experiment.run(config, workdir)``, or ``robust-ssl run`` on the command line.
"""

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # editors and type checkers do not run `__getattr__`
    from robust_ssl.api import Perturbation, Result, attack, measure, secure
    from robust_ssl.api import list_names as list
    from robust_ssl.bridges import from_callable, from_nnx, from_torch
    from robust_ssl.conformance import check, check_attack, check_loss
    from robust_ssl.types import (
        AttackInputs,
        Classifier,
        Encoder,
        LossInputs,
        Outputs,
        TrainState,
    )
    from robust_ssl.weights import (
        encoder_card,
        export_onnx,
        export_safetensors,
        export_stablehlo,
        export_torch,
        import_encoder,
        list_encoders,
        load_classifier,
        load_encoder,
        load_screen,
        load_stablehlo,
        save_classifier,
        save_encoder,
        save_screen,
    )

__version__ = "0.2.0"

# Public names and where they live.  They are imported when they are first asked for, so that the
# command line answers mistakes before JAX is there.
_HOMES = {
    "AttackInputs": "types",
    "Classifier": "types",
    "Encoder": "types",
    "LossInputs": "types",
    "Outputs": "types",
    "Perturbation": "api",
    "Result": "api",
    "TrainState": "types",
    "attack": "api",
    "check": "conformance",
    "check_attack": "conformance",
    "check_loss": "conformance",
    "encoder_card": "weights",
    "export_onnx": "weights",
    "export_safetensors": "weights",
    "export_stablehlo": "weights",
    "export_torch": "weights",
    "from_callable": "bridges",
    "from_nnx": "bridges",
    "from_torch": "bridges",
    "import_encoder": "weights",
    "list": "api",
    "list_encoders": "weights",
    "load_classifier": "weights",
    "load_encoder": "weights",
    "load_screen": "weights",
    "load_stablehlo": "weights",
    "measure": "api",
    "save_classifier": "weights",
    "save_encoder": "weights",
    "save_screen": "weights",
    "secure": "api",
}

__all__ = [
    "AttackInputs",
    "Classifier",
    "Encoder",
    "LossInputs",
    "Outputs",
    "Perturbation",
    "Result",
    "TrainState",
    "attack",
    "check",
    "check_attack",
    "check_loss",
    "encoder_card",
    "export_onnx",
    "export_safetensors",
    "export_stablehlo",
    "export_torch",
    "from_callable",
    "from_nnx",
    "from_torch",
    "import_encoder",
    "list",
    "list_encoders",
    "load_classifier",
    "load_encoder",
    "load_screen",
    "load_stablehlo",
    "measure",
    "save_classifier",
    "save_encoder",
    "save_screen",
    "secure",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'robust_ssl' has no attribute {name!r}")
    home = importlib.import_module(f"robust_ssl.{_HOMES[name]}")
    return getattr(home, "list_names" if name == "list" else name)


def __dir__() -> Iterable[str]:
    """Lists the public names."""
    return [*globals(), *_HOMES]
