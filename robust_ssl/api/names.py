"""What the package has, by the short names that the three calls and the command line take."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from robust_ssl.build import near

# Perturbations for all images, fitted from the encoder alone.
UNIVERSAL = {
    "advencoder": "robust_ssl.attacks:AdvEncoderPER",
    "advencoder_pat": "robust_ssl.attacks:AdvEncoderPAT",
    "fff": "robust_ssl.attacks:FFF",
    "l4a_base": "robust_ssl.attacks:L4ABase",
    "l4a_fuse": "robust_ssl.attacks:L4AFuse",
    "l4a_ugs": "robust_ssl.attacks:L4AUGS",
    "random_noise": "robust_ssl.attacks:RandomNoise",
    "ssp": "robust_ssl.attacks:SSP",
    "std": "robust_ssl.attacks:STD",
    "uap": "robust_ssl.attacks:UAP",
    "uap_pgd": "robust_ssl.attacks:UAPPGD",
    "universal_pgd": "robust_ssl.attacks:UniversalPGD",
}
# One perturbation for each image, crafted on the model that is measured.
PER_IMAGE = {
    "apgd": "robust_ssl.attacks:APGD",
    "embed_attack": "robust_ssl.attacks:EmbedAttack",
    "fab_t": "robust_ssl.attacks:FABT",
    "fgsm": "robust_ssl.attacks:FGSM",
    "pgd": "robust_ssl.attacks:PGD",
    "square": "robust_ssl.attacks:Square",
}
AUTOATTACK = "autoattack"
# Data sets that need neither a download nor a folder.
BUILTIN = {"digits": "robust_ssl.data:digits", "photo_crops": "robust_ssl.data:photo_crops"}
KINDS = {
    "attacks": "Perturbations for all images, and of each image by itself.",
    "encoders": "Pre-trained encoders that come with the package.",
    "losses": "What a recipe's training minimizes.",
    "objectives": "What an attack maximizes.",
    "recipes": "How a classifier is fine-tuned.",
    "data": "Images that are built in, or that can be fetched.",
}


@dataclasses.dataclass(frozen=True, repr=False)
class Names(Sequence):
    """Names in order, each with what it is for; prints as a table.

    Example:
      >>> Names({"fgsm": "One step.", "pgd": "Many steps."})
      fgsm  One step.
      pgd   Many steps.
    """

    purposes: Mapping[str, str]

    def __getitem__(self, index: Any) -> Any:
        """Returns a name by its place."""
        return list(self.purposes)[index]

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self.purposes)

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self.purposes)

    def __repr__(self) -> str:
        """Shows a name and its purpose a line."""
        width = max(map(len, self.purposes), default=0)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in self.purposes.items())


def list_names(kind: str | None = None) -> Names:
    """Lists what the package has of a kind: `robust_ssl.list`.

    Args:
      kind: ``"attacks"``, ``"encoders"``, ``"losses"``, ``"objectives"``, ``"recipes"`` or
        ``"data"``; without it the kinds themselves are listed.

    Returns:
      The names that the three calls take, and what each is for.

    Raises:
      ValueError: If there is no such kind.

    Example:
      >>> list_names("attacks")[:2]
      ['advencoder', 'advencoder_pat']
      >>> "gen_af" in list_names("recipes")
      True
    """
    if kind is None:
        return Names(KINDS)
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}{near(str(kind), KINDS)}")
    return Names(_PURPOSES[kind]())


def first_line(value: Any) -> str:
    """Returns the first line of a docstring."""
    return (inspect.getdoc(value) or "(no docstring)").splitlines()[0]


def _attacks() -> dict[str, str]:
    from robust_ssl.attacks import autoattack
    from robust_ssl.build import resolve

    named = {name: first_line(resolve(path)) for name, path in {**UNIVERSAL, **PER_IMAGE}.items()}
    return {**named, AUTOATTACK: first_line(autoattack.standard)}


def _encoders() -> dict[str, str]:
    from robust_ssl import weights

    return {name: describe_encoder(weights.encoder_card(name)) for name in weights.list_encoders()}


def describe_encoder(card: Mapping[str, Any]) -> str:
    """Returns what an encoder is in one line, as far as its card says it."""
    options, details = card["options"], card["card"]
    config = details.get("config", {})
    method = config.get("method", "")
    method = method["function"] if isinstance(method, Mapping) else method
    source = config.get("data", {}).get("source", "")
    trained = " on ".join(filter(None, [method.rpartition(":")[2], source]))
    network = card["builder"].rpartition(":")[2]
    parts = [
        f"{network} of width {options['width']}" if "width" in options else network,
        f"{options['image_size']} pixels" if "image_size" in options else "",
        trained,
    ]
    if "linear_accuracy" in details:
        parts.append(f"linear probe {100 * details['linear_accuracy']:.1f} %")
    return ", ".join(filter(None, parts))


def describe_set(public: Any) -> str:
    """Returns how large a public data set is, in one line."""
    images = " + ".join(f"{count:,} {split}" for split, count in public.images.items())
    return f"{images} images, {public.classes} classes, {public.image_size} pixels"


def _recipes() -> dict[str, str]:
    from robust_ssl import recipes

    parts = ("fgsm", "pgd")  # inner attacks
    return {n: first_line(getattr(recipes, n)) for n in recipes.__all__ if n not in parts}


def _functions(module: str) -> Callable[[], dict[str, str]]:
    def named() -> dict[str, str]:
        import importlib

        home = importlib.import_module(f"robust_ssl.{module}")
        public = getattr(home, "__all__", None) or [n for n in vars(home) if not n.startswith("_")]
        functions = {n: getattr(home, n) for n in public if inspect.isfunction(getattr(home, n))}
        of_package = {n: f for n, f in functions.items() if f.__module__.startswith(home.__name__)}
        return {name: first_line(function) for name, function in of_package.items()}

    return named


def _data() -> dict[str, str]:
    from robust_ssl.build import resolve
    from robust_ssl.data.public import SETS

    built_in = {name: first_line(resolve(path)) for name, path in BUILTIN.items()}
    return {**built_in, **{public.name: describe_set(public) for public in SETS}}


_PURPOSES = {
    "attacks": _attacks,
    "encoders": _encoders,
    "losses": _functions("losses"),
    "objectives": _functions("objectives"),
    "recipes": _recipes,
    "data": _data,
}
