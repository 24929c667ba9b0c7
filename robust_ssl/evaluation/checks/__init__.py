"""Can a robustness figure be believed?  Many checks, each a small pure function.

`examine` runs those of a model and its per-image figure; those of universal perturbations
(`table.CHECKS`, group ``"universal"``) take what was scored anyway.  All end in a `Verdict`:
``believable``, ``believable, with notes``, ``not believable`` or ``not examined``.  Each check
holds one number against a limit, which is its default argument, and says what it means and what to
do.
"""

from robust_ssl.evaluation.checks.comparisons import settle
from robust_ssl.evaluation.checks.data import leakage, one_answer
from robust_ssl.evaluation.checks.examination import affordable_images, cost, examine
from robust_ssl.evaluation.checks.gradients import (
    gradient_matches_differences,
    gradient_not_zero,
    margin_gradient_not_zero,
)
from robust_ssl.evaluation.checks.model import (
    Randomized,
    deterministic,
    finite_logits,
    gives_logits,
)
from robust_ssl.evaluation.checks.result import (
    BELIEVABLE,
    NOT_BELIEVABLE,
    NOT_EXAMINED,
    WITH_NOTES,
    Check,
    Verdict,
    not_run,
)
from robust_ssl.evaluation.checks.scoring import budget_kept, enough_images, survives_rounding
from robust_ssl.evaluation.checks.strength import (
    accuracy_falls_with_epsilon,
    beats_noise,
    black_box_not_stronger,
    converged,
    full_range_breaks_all,
    no_silent_hits,
    objectives_agree,
    one_step_not_stronger,
    steps_raise_loss,
    transfer_not_stronger,
    twice_the_steps_not_stronger,
)
from robust_ssl.evaluation.checks.table import CHECKS, ESSENTIAL, GROUPS, names_of
from robust_ssl.evaluation.checks.universal import (
    beats_noise_and_shuffle,
    crafted_again_agrees,
    holds_on_new_images,
    model_unchanged,
    patch_places_agree,
    per_image_not_weaker,
    seeds_agree,
    shuffled,
)

__all__ = [
    "BELIEVABLE",
    "CHECKS",
    "ESSENTIAL",
    "GROUPS",
    "NOT_BELIEVABLE",
    "NOT_EXAMINED",
    "WITH_NOTES",
    "Check",
    "Randomized",
    "Verdict",
    "accuracy_falls_with_epsilon",
    "affordable_images",
    "beats_noise",
    "beats_noise_and_shuffle",
    "black_box_not_stronger",
    "budget_kept",
    "converged",
    "cost",
    "crafted_again_agrees",
    "deterministic",
    "enough_images",
    "examine",
    "finite_logits",
    "full_range_breaks_all",
    "gives_logits",
    "gradient_matches_differences",
    "gradient_not_zero",
    "holds_on_new_images",
    "leakage",
    "margin_gradient_not_zero",
    "model_unchanged",
    "names_of",
    "no_silent_hits",
    "not_run",
    "objectives_agree",
    "one_answer",
    "one_step_not_stronger",
    "patch_places_agree",
    "per_image_not_weaker",
    "seeds_agree",
    "settle",
    "shuffled",
    "steps_raise_loss",
    "survives_rounding",
    "transfer_not_stronger",
    "twice_the_steps_not_stronger",
]
