"""The main job on handwritten digits: offline, no accelerator.

    robust-ssl run quickstart --workdir=runs/quickstart

The shipped encoder (SimCLR on CIFAR-10) is attacked with crops of two photographs.  It is
fine-tuned for digits in the usual way (`baseline`) and securely (`gen_af`), and both are scored on
360 test images.  Digits are nearly black and white, so the budget is larger than the 10/255 that
photographs get.

On two CPU cores it takes two minutes the first time and one with a warm cache of programs
(docs/results/speed.md).  The attack takes 37 points from `baseline`, and 3 points from `gen_af`.

One argument: ``size``.  ``small`` trains as briefly as keeps what is shown; ``full``, which is
``quickstart:size=full``, trains and attacks longer, scores Gen-AF's first stage too, and draws
accuracy against the budget.
"""

from ml_collections import ConfigDict

from robust_ssl.settings import load_beside, parse_arguments

common = load_beside(__file__, "common")

EPSILON = 24 / 255
# Of the attack in training, by size.
INNER = {
    "small": {"epsilon": EPSILON, "step_size": 16 / 255, "num_steps": 2},
    "full": {"epsilon": EPSILON, "step_size": 6 / 255, "num_steps": 7},
}
# In the small size as few passes over the training images as keep what is shown, in batches of half
# the usual size: twice as many steps.
EPOCHS = {"baseline": 5, "gen_af_stage1": 1, "gen_af": 1}


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; see the file's docstring for the argument."""
    size = parse_arguments(arguments, {"size": "small"})["size"]
    if size not in ("small", "full"):
        raise ValueError(f"size must be small or full, got {size!r}")
    full = size == "full"
    config = ConfigDict()
    config.seed = 0
    config.stages = ("attack", "train", "score", "compare")

    config.encoder = {"path": common.ENCODER}
    config.surrogate = {"function": "robust_ssl.data:photo_crops", "n": 2000}
    config.downstream = {"function": "robust_ssl.data:digits"}

    config.suite = {
        "attacks": common.suite(width=16),
        "epsilon": EPSILON,
        # Without it the attack on the public encoder is the program of those crafted again.
        "curve": (6 / 255, 12 / 255, 18 / 255) if full else (),
        "num_steps": 100 if full else 30,
    }
    if not full:
        pgd = {"function": f"{common.ATTACKS}PGD", "num_steps": 10}
        config.scoring = {"per_image": {"attacks": {"pgd": pgd}, "images": 200}}

    # What all recipes have, and the attack by which each one's best epoch is chosen.
    config.common = {"epochs": 8, "batch_size": 64 if full else 32}
    config.training = {"validation": {"function": f"{common.ATTACKS}PGD", **INNER[size]}}
    # The first stage is scored in the full size only: the second one starts from it.
    options = {
        "gen_af_stage1": {**INNER[size], "scored": full},
        "gen_af": {"num_steps": 3} if full else {"images": 64, "num_steps": 2},
    }
    for name, epochs in () if full else EPOCHS.items():
        options.setdefault(name, {})["epochs"] = epochs
    config.recipes = common.recipes("baseline", "gen_af_stage1", "gen_af", **options)
    timed = {} if full else {"steps_per_round": 1}
    config.compare = {"reference": "baseline", "memory": False, **timed}
    return config
