"""A run, from the text of its config to its report: ``run(config, workdir)``.

`plan` reads the config, the only function that does; below it values run.
"""

from robust_ssl.experiment.context import Context
from robust_ssl.experiment.plan import STAGES, Plan, UsageError, plan
from robust_ssl.experiment.recipe import Recipe
from robust_ssl.experiment.stages import check, describe, run

__all__ = ["STAGES", "Context", "Plan", "Recipe", "UsageError", "check", "describe", "plan", "run"]
