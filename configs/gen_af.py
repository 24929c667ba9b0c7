r"""Gen-AF on real color images: attack, usual and secure fine-tuning, evaluation.

    robust-ssl run gen_af:downstream=gtsrb32 --workdir=runs/gtsrb
    robust-ssl run gen_af:downstream=cifar10,epsilon=10/255 \
        recipes.gen_af_stage1.adv_ratio=0.5 --workdir=runs/cifar10

The encoder was pre-trained on CIFAR-10; the attacker fits perturbations on crops of two photographs
that come with the package, or on another set, ``surrogate=cifar100_small``.  Data sets are prepared
once: ``robust-ssl data prepare gtsrb32``.  Arguments: ``downstream`` and ``surrogate`` (data sets),
``encoder`` (a shipped name, a directory, a file), ``epsilon`` (of the universal attacks),
``epochs``, ``train_limit`` (images of the downstream training split; 0 takes all) and
``batch_size``.
"""

from ml_collections import ConfigDict

from robust_ssl.settings import load_beside, parse_arguments

common = load_beside(__file__, "common")

ARGUMENTS = {
    "downstream": "gtsrb32",
    "surrogate": common.SURROGATE,
    "encoder": common.ENCODER,
    "epsilon": 10 / 255,
    "epochs": 50,
    "train_limit": 0,
    "batch_size": 256,
}


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; see the file's docstring for the arguments."""
    given = parse_arguments(arguments, ARGUMENTS)
    config = ConfigDict()
    config.seed = 0
    config.stages = ("attack", "train", "score", "compare")
    config.encoder = {"path": given["encoder"]}
    config.surrogate = common.surrogate(given["surrogate"])
    config.downstream = common.downstream(given["downstream"], given["train_limit"])
    config.suite = {
        "attacks": common.suite(),
        "epsilon": given["epsilon"],
        "curve": (2 / 255, 5 / 255, 15 / 255),
        "num_steps": 300,
    }
    config.common = {"epochs": given["epochs"], "batch_size": given["batch_size"]}
    config.recipes = common.recipes("baseline", "gen_af_stage1", "gen_af")
    config.compare = {"reference": "baseline"}
    config.scoring = {"batch_size": 500}
    return config
