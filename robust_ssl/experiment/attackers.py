"""Who attacks with one perturbation for all images: whose weights are known, what is crafted."""

from __future__ import annotations

from collections.abc import Mapping

from robust_ssl.build import inside
from robust_ssl.experiment import train
from robust_ssl.experiment.attack import attack, attack_with_labels
from robust_ssl.experiment.context import Context, identity
from robust_ssl.types import Classifier
from robust_ssl.workdir import StageDirectory

# Whose weights an attacker may have besides; see `groups.Group`.
MORE = ("twin", "half", "labelled")
# Added to the run's.  Not one past the defender's: seeds may come to a run, and that one must stay.
HALF_SEED = 1000


def check_half(context: Context) -> None:
    """Raises ValueError unless every scored recipe can be trained on half of the images."""
    with inside("config.scoring.half_twin"):
        count = len(context.halved.downstream[0])
        for recipe in context.plan.scored:
            for other in recipe.chain():
                if other.is_trained and other.batch_size > count:
                    raise ValueError(
                        f"half of the training images are {count}, and a batch of {other.name} is "
                        f"{other.batch_size}; take smaller batches, more images, or leave it out"
                    )


def fits(
    context: Context, models: Mapping[str, Classifier], public: StageDirectory
) -> dict[str, dict[str, StageDirectory]]:
    """Crafts all that models are scored under besides attacks on single images.

    Args:
      context: The run.
      models: The classifiers by name.
      public: The suite on the public encoder.

    Returns:
      By whose weights the attacker has (`groups.Group`), and by model, the stage with the
      perturbations; a model without such an attacker has none there.
    """
    crafted = {name: crafted_again(context, name, model) for name, model in models.items()}
    twins = {name: crafted[twin] for name, twin in train.twins_of(context, models).items()}
    labelled = {}
    if context.plan.scoring.labelled is not None:
        for name, model in models.items():
            labelled[name] = attack_with_labels(context, f"labelled_{name}", model)
    return {
        "public": dict.fromkeys(models, public),
        "hardened": {name: stage for name, stage in crafted.items() if stage is not None},
        # Where the encoder did not move, these are the public ones.
        "twin": {name: stage for name, stage in twins.items() if stage.path != public.path},
        "half": _crafted_on_half(context) if context.plan.scoring.half_twin else {},
        "labelled": labelled,
    }


def _crafted_on_half(context: Context) -> dict[str, StageDirectory]:
    """Fits the suite on what an attacker makes of half of the images; by model, alike for seeds."""
    half, public = context.halved, identity(context.encoder)
    by_recipe = {}
    for name, twin in half_twins(context).items():
        if identity(twin.encoder) != public:
            curve = context.plan.scoring.adaptive_curve
            by_recipe[name] = attack(half, f"attack_{name}", twin.encoder, curve=curve)
    pairs = train.scored(context, train.trained(context))
    made = {train.model_name(*pair): by_recipe.get(pair[0].name) for pair in pairs}
    return {name: stage for name, stage in made.items() if stage is not None}


def half_twins(context: Context) -> dict[str, Classifier]:
    """Makes each scored recipe of half of the images with a seed of its own; by recipe.

    That is what an attacker makes who knows the published recipe and has half of the data.  One
    that fails is left out: its recipe then has no such attacker.
    """
    half, recipes = context.halved, context.plan.scored
    seed = HALF_SEED + context.plan.seed
    made = train.train_all(half, recipes, [seed]).results
    there = [recipe for recipe in recipes if train.model_name(recipe, seed) in made]
    return {recipe.name: train.load_trained(half, recipe, seed) for recipe in there}


def crafted_again(context: Context, name: str, model: Classifier) -> StageDirectory | None:
    """Fits the suite on the classifier's own encoder; None where that is not asked."""
    scoring = context.plan.scoring
    if not scoring.adaptive:
        return None
    if identity(model.encoder) == identity(context.encoder):
        return attack(context)
    return attack(context, f"attack_{name}", model.encoder, curve=scoring.adaptive_curve)
