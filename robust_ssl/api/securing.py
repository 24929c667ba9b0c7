"""`secure`: an encoder and labelled images in, a fine-tuned classifier out."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from robust_ssl import data
from robust_ssl.api import inputs
from robust_ssl.build import Function, Range, as_loaded, near, read, text_of
from robust_ssl.experiment import Context, Plan, Recipe, linking
from robust_ssl.experiment.sections import Training
from robust_ssl.experiment.suites import InnerAttack
from robust_ssl.experiment.train import load_trained
from robust_ssl.models.bridge import refuse_bridge
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress
from robust_ssl.recipes import pgd
from robust_ssl.types import Classifier, Encoder
from robust_ssl.weights.cards import describe_preprocess

_RECIPES = "robust_ssl.recipes:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Given(Context):
    """A run whose encoder and images are values, and not named by a config."""

    given: Encoder
    images: tuple[Any, Any]

    @functools.cached_property
    def encoder(self) -> Encoder:
        """What was given."""
        return self.given

    @functools.cached_property
    def downstream(self) -> tuple[Any, Any]:
        """Training and validation images."""
        return self.images

    @property
    def num_classes(self) -> int:
        """Classes of the images."""
        return self.images[0].num_classes

    @property
    def own_builder(self) -> tuple[Callable[..., Encoder] | None, dict[str, Any]]:
        """An encoder of another module is its own builder: it is never read from elsewhere."""
        if type(self.given.module).__module__.startswith("robust_ssl.models"):
            return None, {}
        return lambda key: self.given, {}


def secure(
    encoder: Any,
    images: Any,
    labels: Any = None,
    *,
    recipe: Any = "gen_af",
    head: Any = None,
    epsilon: float | None = None,
    epochs: int = 8,
    batch_size: int = 64,
    validation: float = 0.1,
    seed: int = 0,
    parallel: Parallel | None = None,
    progress: str = "auto",
    **options: Any,
) -> Classifier:
    """Fine-tunes an encoder into a classifier by a recipe, and keeps the best epoch.

    It is the stage `train` of a run: the same seed gives the same weights.  What the recipe starts
    from is made first; nothing is left on disk.

    Args:
      encoder: An `Encoder`, a shipped name, or a path.
      images: ``uint8`` or float in [0, 1], ``[n, H, W, 3]``; `data.Examples`; or a name, such as
        ``"digits"``, whose training split is taken.
      labels: Integers ``[n]``; None where `images` has its own.
      recipe: A name of ``robust_ssl.list("recipes")``, ``"module:function"``, or a mapping of
        entries of `experiment.Recipe`.
      head: ``"mlp"``, ``"linear"``, or the name of a function of the number of classes.  None is
        what the recipe says, and ``"mlp"`` where it says nothing.
      epsilon: Budget of every attack of training and validation, pixel units.  None is what the
        recipe says, 8/255 for those of the package, and 8/255 for validation.
      epochs: Passes over the images, of each recipe on the way.
      batch_size: Images of an update; of fewer images the largest power of two.
      validation: Share of the images by which epochs are chosen.
      seed: Of the head's first weights, the batches and the keys.
      parallel: The devices; None is the first one.
      progress: ``"auto"``, or ``"quiet"`` for none.
      **options: Options and entries of this recipe alone, for example ``adv_ratio=0.5``.

    Returns:
      The classifier: call it on pixels in [0, 1], save it with `robust_ssl.save_classifier`.

    Raises:
      ValueError: If there is no such recipe, an option is wrong, entries of your own give another
        budget than `epsilon`, no loss reads what an attack makes, or images do not fit the encoder.
      FloatingPointError: If training had no finite update, or none with a gradient.

    Example:
      >>> net = secure("simclr-cifar10-r18w24", "digits", recipe="linear_probe", epochs=1,
      ...              progress="quiet")
      >>> net.num_classes
      10
    """
    resizing = inputs.resizing_of(encoder)
    encoder, parallel = inputs.encoder_of(encoder), inputs.devices_of(parallel)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"only a robust_ssl.Encoder can be trained, got {type(encoder).__name__}")
    refuse_bridge(encoder, "trained")
    examples = inputs.examples_of(images, labels, encoder.image_size, "train", resizing)
    epochs, batch_size = inputs.count(epochs, "epochs"), inputs.count(batch_size, "batch_size")
    seed = inputs.seed(seed)
    if epsilon is not None:
        epsilon = inputs.one_budget(epsilon, "call secure once for each")
    validation = read(Annotated[float, Range(0, 1, below=True)], validation, "validation")
    left = len(examples) - round(len(examples) * validation)
    common = {
        "epochs": epochs,
        "batch_size": inputs.batch_of(batch_size, left, parallel),
        "head": "mlp" if head is None else head,
    }
    name, recipes = _recipes(recipe, options, common, epsilon)
    first = recipes[name].first
    if head is not None and first.text.get("head", text_of(head)) != text_of(head):
        raise ValueError(
            f"recipe {first.name} has the head {first.text['head']!r}, and secure(head={head!r}) "
            "another; leave it out"
        )
    if not examples.class_names:
        raise ValueError("labels are needed to train a head: secure(encoder, images, labels)")
    parts = data.carve(examples, validation, seed=seed)
    for each in recipes.values():
        linking.check_against(each, encoder, f"recipe {each.name}")
    attack = InnerAttack.read(pgd(_usual(epsilon)), "validation")
    plan = Plan(stages=("train",), seed=seed, recipes=recipes, training=Training(validation=attack))
    with as_loaded(), tempfile.TemporaryDirectory(prefix="robust_ssl-") as folder:
        run = _Given(
            plan=plan,
            workdir=pathlib.Path(folder),
            parallel=parallel,
            progress=Progress(progress),
            given=encoder,
            images=parts,
        )
        return _trained(run, recipes[name], seed)


def _trained(run: _Given, recipe: Recipe, seed: int) -> Classifier:
    """Trains in a directory that is gone afterwards; no error advises to go on from there."""
    if run.own_builder[0] is None:  # what is saved on the way is said first
        describe_preprocess(run.given.preprocess)
    try:
        return load_trained(run, recipe, seed)
    except FloatingPointError as error:
        error.__notes__ = []  # of going on from what is on disk
        error.add_note("secure keeps nothing on disk: no state is left to go on from")
        raise
    except OSError as error:
        if str(run.workdir) in str(error):
            error.add_note(f"{run.workdir} is temporary; TMPDIR names a disk with more room")
        raise


def _recipes(
    recipe: Any, options: Mapping[str, Any], common: Mapping[str, Any], epsilon: float | None
) -> tuple[str, dict[str, Recipe]]:
    """Returns the recipe's name, and it with all that it is made from."""
    if isinstance(recipe, Mapping):
        name, value = "mine", {**recipe, **options}
    elif not isinstance(recipe, str):
        raise ValueError(
            f"a recipe is a name, 'module:function' or a mapping of entries, got {recipe!r}; "
            "what a function returns is a mapping: recipe=my_recipe()"
        )
    else:
        name, value = recipe.rpartition(":")[2], {"function": _function(recipe), **options}
    whole, missing = {}, {name: value}
    while missing:
        other, value = missing.popitem()
        whole[other] = entries = _entries(value, common, epsilon, other)
        made_from = (entries.get("start"), entries.get("teacher"))
        needed = [*entries.get("members", ()), *filter(None, made_from)]
        missing |= {n: {"function": _function(n)} for n in needed if n not in whole}
    return name, linking.link(whole, "recipes")


def _function(name: str) -> str:
    from robust_ssl import recipes

    if ":" in name:
        return name
    if name not in recipes.__all__:
        raise ValueError(
            f'no recipe {name!r}{near(name, recipes.__all__)}; see robust_ssl.list("recipes")'
        )
    return f"{_RECIPES}{name}"


def _entries(
    value: Mapping[str, Any], common: Mapping[str, Any], epsilon: float | None, name: str
) -> dict[str, Any]:
    """Returns all entries of a recipe, its attack at the one budget, or at its own."""
    where = f"recipe {name}"
    own = [*_epsilons(value), *_epsilons(value.get("attack"))]
    if epsilon is not None and any(said != epsilon for said in own):
        raise ValueError(
            f"{where} gives its attack epsilon={own[0]:.4g}, and secure(epsilon={epsilon:.4g}) "
            "another; leave one of them out"
        )
    if epsilon is not None and "function" in value and "epsilon" not in value:
        function = Function.read({"function": value["function"]}, where)
        if function.takes("epsilon"):  # what it makes of its budget, as a step, goes with it
            value = {**value, "epsilon": epsilon}
    entries = linking.entries_of(value, common, where)
    attack = entries.get("attack")
    if isinstance(attack, str):
        attack = {"function": attack}
    if isinstance(attack, Mapping):
        # Units are those of Linf: under another threat somebody has to say what is meant.
        silent = epsilon is None and ("epsilon" in attack or "threat" in attack)
        entries["attack"] = attack if silent else {**attack, "epsilon": _usual(epsilon)}
    return entries


def _epsilons(entries: Any) -> list[float]:
    found = entries.get("epsilon") if isinstance(entries, Mapping) else None
    return [found] if isinstance(found, int | float) else []


def _usual(epsilon: float | None) -> float:
    return 8 / 255 if epsilon is None else epsilon
