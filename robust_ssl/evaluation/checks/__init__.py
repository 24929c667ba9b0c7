"""Can a robustness figure be believed?  Twenty-seven checks, each a small pure function.

`examine` runs 1 to 20 on a classifier and `examine_universal` 21 to 27 on a perturbation; both
return a `Verdict`: ``trusted``, ``trusted with notes`` or ``not trusted``.  Each check holds one
number against a limit, which is its default argument, and says what it means and what to do.
"""

from robust_ssl.evaluation.checks.examination import affordable_images, cost, examine
from robust_ssl.evaluation.checks.gradients import (
    finite_differences,
    zero_gradient,
    zero_margin_gradient,
)
from robust_ssl.evaluation.checks.model import (
    Randomized,
    deterministic,
    finite_logits,
    gives_logits,
)
from robust_ssl.evaluation.checks.perturbations import examine_universal, shuffled
from robust_ssl.evaluation.checks.result import (
    NAMES,
    NOT_TRUSTED,
    TRUSTED,
    WITH_NOTES,
    Check,
    Verdict,
    not_run,
)
from robust_ssl.evaluation.checks.scoring import budget_kept, enough_images, survives_rounding
from robust_ssl.evaluation.checks.strength import (
    beats_noise,
    black_box_not_stronger,
    converged,
    falling_steps,
    falls_with_epsilon,
    full_range_breaks_all,
    iterative_not_weaker,
    objectives_agree,
    silent_hits,
    transfer_not_stronger,
    twice_the_steps,
)
from robust_ssl.evaluation.checks.universal import (
    beats_noise_and_shuffle,
    crafted_again,
    holds_on_new_images,
    patch_places,
    per_image_not_weaker,
    seeds_agree,
    statistics_unchanged,
)

__all__ = [
    "NAMES",
    "NOT_TRUSTED",
    "TRUSTED",
    "WITH_NOTES",
    "Check",
    "Randomized",
    "Verdict",
    "affordable_images",
    "beats_noise",
    "beats_noise_and_shuffle",
    "black_box_not_stronger",
    "budget_kept",
    "converged",
    "cost",
    "crafted_again",
    "deterministic",
    "enough_images",
    "examine",
    "examine_universal",
    "falling_steps",
    "falls_with_epsilon",
    "finite_differences",
    "finite_logits",
    "full_range_breaks_all",
    "gives_logits",
    "holds_on_new_images",
    "iterative_not_weaker",
    "not_run",
    "objectives_agree",
    "patch_places",
    "per_image_not_weaker",
    "seeds_agree",
    "shuffled",
    "silent_hits",
    "statistics_unchanged",
    "survives_rounding",
    "transfer_not_stronger",
    "twice_the_steps",
    "zero_gradient",
    "zero_margin_gradient",
]
