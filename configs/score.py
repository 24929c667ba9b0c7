r"""Any saved classifiers under the whole suite of attacks, with a verdict on every figure.

    robust-ssl run score:classifier=runs/gtsrb/recipes/gen_af-seed0 \
        --workdir=runs/score
    robust-ssl run score:scale=small --workdir=runs/score \
        classifiers.secured.path=runs/gtsrb/recipes/gen_af-seed0 \
        classifiers.usual.path=runs/gtsrb/recipes/baseline-seed0

``classifier`` is a finished recipe's directory or what `robust_ssl.weights.save_classifier` wrote;
more of them go under ``config.classifiers``, each with a ``path`` (and the ``builder`` and ``head``
of your own, ``"module:function"``), or with a ``function`` that returns a `robust_ssl.Classifier`.
Other arguments: ``encoder`` (the public encoder, which is all that the downstream-agnostic attacker
sees), ``downstream`` and ``surrogate`` (data sets), ``test_limit`` (images of the test split; 0
takes all) and ``scale``: ``paper`` has the published numbers of steps, ``small`` is for a CPU.

``docs/results/attacks.md`` has the tables of ``scale=small`` with the commands that made them, on
two CPU cores; nobody has run ``scale=paper`` yet.
"""

from ml_collections import ConfigDict

from robust_ssl.settings import load_beside, parse_arguments

common = load_beside(__file__, "common")

ARGUMENTS = {
    "classifier": "",
    "encoder": common.ENCODER,
    "downstream": "gtsrb32",
    "surrogate": common.SURROGATE,
    "test_limit": 0,
    "scale": "paper",
}

ATTACKS = common.ATTACKS
PATCH = "robust_ssl.threats:Patch"


def universal(small: bool) -> dict:
    """Returns every downstream-agnostic universal attack, by name."""
    generated = {"form": "released", **({"learning_rate": 1e-3, "width": 32} if small else {})}
    patch = {"function": f"{ATTACKS}AdvEncoderPAT", **generated, "epsilon": 0.03}
    # The published steps of 2e-4 need thousands; a step of 2e-3 crosses the budget in twenty.
    quick = {"step_size": 2e-3} if small else {}
    l4a = {**quick, "fit": {"batch_size": 16}}
    low = {
        "function": "robust_ssl.threats:Band",
        "threat": "robust_ssl.threats:Linf",
        "high": 0.125,
    }
    return {
        "advencoder": {"function": f"{ATTACKS}AdvEncoderPER", **generated},
        "advencoder_paper": {"function": f"{ATTACKS}AdvEncoderPER", **generated, "form": "paper"},
        "advencoder_pat": {**patch, "threat": {"function": PATCH, "location": "fixed"}},
        "advencoder_pat_random": {**patch, "threat": {"function": PATCH, "location": "random"}},
        "l4a_base": {"function": f"{ATTACKS}L4ABase", **l4a},
        "l4a_fuse": {"function": f"{ATTACKS}L4AFuse", **l4a},
        "l4a_ugs": {"function": f"{ATTACKS}L4AUGS", **l4a},
        "ssp": {"function": f"{ATTACKS}SSP", **quick},
        "fff": {
            "function": f"{ATTACKS}FFF",
            **({"learning_rate": 1e-3} if small else {}),
            "fit": {"num_steps": 500 if small else 2000, "batch_size": 16},
        },
        "std": {"function": f"{ATTACKS}STD", **quick},
        "uap": {"function": f"{ATTACKS}UAP", "fit": {"num_steps": 20 if small else 400}},
        "uap_pgd": {"function": f"{ATTACKS}UAPPGD", "fit": {"num_steps": 10 if small else 200}},
        "universal_pgd": f"{ATTACKS}UniversalPGD",
        "universal_pgd_low": {"function": f"{ATTACKS}UniversalPGD", "threat": low},
        # What noise of the same size and place does: the baseline of each kind of threat.
        "random_noise": f"{ATTACKS}RandomNoise",
        "random_noise_low": {"function": f"{ATTACKS}RandomNoise", "threat": low},
        "random_patch": {
            "function": f"{ATTACKS}RandomNoise",
            "threat": {"function": PATCH, "location": "fixed"},
            "epsilon": 0.03,
        },
    }


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; see the file's docstring for the arguments."""
    given = parse_arguments(arguments, ARGUMENTS)
    if given["scale"] not in ("paper", "small"):
        raise ValueError(f"scale must be paper or small, got {given['scale']!r}")
    small = given["scale"] == "small"
    config = ConfigDict()
    config.seed = 0
    config.stages = ("attack", "score")
    config.encoder = {"path": given["encoder"]}
    config.surrogate = common.surrogate(given["surrogate"])
    config.downstream = common.downstream(given["downstream"], test_limit=given["test_limit"])
    config.classifiers = {"secured": {"path": given["classifier"]}} if given["classifier"] else {}
    config.suite = {
        "attacks": universal(small),
        "epsilon": 10 / 255,
        "curve": (5 / 255,),
        "seeds": (0, 1, 2),
        "num_steps": 200 if small else 4000,
        "batch_size": 64 if small else 256,
    }
    config.scoring = {
        "seeds": (0, 1, 2),
        "adaptive_curve": True,
        "per_image": {
            "attacks": {
                "fgsm": f"{ATTACKS}FGSM",
                "embed": {"function": f"{ATTACKS}EmbedAttack", "num_steps": 20},
                "tdaa": {"function": f"{ATTACKS}TDAA", "num_steps": 20, "target": 0},
                "pgd": {"function": f"{ATTACKS}PGD", "num_steps": 20 if small else 50},
            },
            "budgets": (8 / 255,) if small else (4 / 255, 8 / 255),
        },
        "autoattack": {"budgets": (8 / 255,), "images": 200 if small else 1000},
    }
    return config
