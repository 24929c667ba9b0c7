"""The main job on handwritten digits: offline, no accelerator.

    robust-ssl run quickstart --workdir=runs/quickstart

The shipped encoder (SimCLR on CIFAR-10) is attacked with crops of two photographs.  It is
fine-tuned for digits in the usual way (`baseline`) and securely (`gen_af`), and both are scored on
360 test images.  Digits are nearly black and white, so the budget is larger than the 10/255 that
photographs get.
"""

from ml_collections import ConfigDict

from robust_ssl.settings import load_beside

common = load_beside(__file__, "common")

EPSILON = 24 / 255
INNER = {"epsilon": EPSILON, "step_size": 6 / 255, "num_steps": 7}  # of the attack in training


def get_config() -> ConfigDict:
    """Takes no arguments."""
    config = ConfigDict()
    config.seed = 0
    config.stages = ("attack", "train", "score", "compare")

    config.encoder = {"path": common.ENCODER}
    config.surrogate = {"function": "robust_ssl.data:photo_crops", "n": 2000}
    config.downstream = {"function": "robust_ssl.data:digits"}

    config.suite = {
        "attacks": common.suite(width=16),
        "epsilon": EPSILON,
        "curve": (6 / 255, 12 / 255, 18 / 255),
        "num_steps": 100,
    }

    # What all recipes have, and the attack by which each one's best epoch is chosen.
    config.common = {"epochs": 8, "batch_size": 64}
    config.training = {"validation": {"function": f"{common.ATTACKS}PGD", **INNER}}
    config.recipes = common.recipes(
        *("baseline", "gen_af_stage1", "gen_af"),
        gen_af_stage1=INNER,
        gen_af={"num_steps": 3},
    )
    config.compare = {"reference": "baseline", "memory": False}
    return config
