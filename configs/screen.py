"""Does an input look attacked?  Detectors on the usual classifier, and attacks that know them.

    robust-ssl run screen --workdir=runs/screen-digits
    robust-ssl run screen:downstream=gtsrb32,train_limit=2000 --workdir=runs/screen-gtsrb

`attack` and `train` are those of `quickstart.py`.  Leaves ``screening.md`` to read,
``screening.json``, and ``screen/`` with the classifier and its screen for
``robust_ssl.load_screen``.  Two arguments: ``downstream`` (the package's digits, or a data set that
is prepared) and ``train_limit`` (0 takes all images).

docs/results/screening.md has the time on two CPU cores and the tables that you should see.
"""

from ml_collections import ConfigDict

from robust_ssl.settings import load_beside, parse_arguments

common = load_beside(__file__, "common")
quickstart = load_beside(__file__, "quickstart")

EPSILON = 10 / 255


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; see the file's docstring for the arguments."""
    given = parse_arguments(arguments, {"downstream": "digits", "train_limit": 0})
    config = quickstart.get_config()
    config.stages = ("attack", "train", "screen")
    if given["downstream"] != "digits":
        config.downstream = common.downstream(given["downstream"], given["train_limit"])
        # Of photographs, which are not black and white: the budget of the published runs.
        config.suite.epsilon = EPSILON
        for attack in (config.training.validation, config.recipes.gen_af_stage1):
            attack.update(epsilon=EPSILON, step_size=EPSILON / 2)
    # The attacks that do not know the detectors have the budget of those that do.
    config.scoring.per_image.budgets = (config.suite.epsilon,)
    config.screening = {
        # The secured one withstands digits' attacks, so there would be little to detect.
        "model": "baseline",
        "public": "gen_af",
        "images": 512,
        "calibration": 200,
        "test": 200,
        # Enough to see a detector fall; more images and steps are for one that seems to hold.
        "adaptive": {
            "images": 40,
            "num_steps": 15,
            "universal_steps": 20,
            "universal_batch": 32,
        },
    }
    return config
