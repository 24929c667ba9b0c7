r"""Every baseline and every defence by one protocol: one table, one trade-off picture.

    robust-ssl run --config=configs/compare.py:downstream=cifar10 --workdir=runs/compare
    robust-ssl sweep --config=configs/compare.py:downstream=cifar10 --workdir=runs/sweep

Arguments: ``encoder``, ``surrogate`` and ``downstream`` as in ``gen_af.py``; ``epochs``,
``train_limit`` and ``test_limit`` (0 takes all); ``scale``: ``research`` has the published numbers
of steps, ``small`` is for a CPU; ``methods``: a part of them, as ``methods=usual+trades+universal``
(what they start from comes with them); ``without``: all but these, for example
``without=twins`` for an encoder without batch norm; ``other``: the ensemble's second encoder, which
must take images of the same size; ``band``: where `universal_band` has its perturbations, in
cycles per pixel: the worst band of the page that ``configs/analyze.py`` leaves for your encoder.

Time and figure: on two CPU cores at ``scale=small``, five epochs of 2,700 CIFAR-10 images and 1,000
test images, all recipes take half an hour to make, each some two minutes to score, all together
some five minutes to time; docs/defences.md has the table and the picture.
"""

from ml_collections import ConfigDict

from robust_ssl.settings import parse_arguments

ARGUMENTS = {
    "encoder": "simclr-cifar10-r18w24",
    "downstream": "cifar10",
    "surrogate": "cifar100_small",
    "epsilon": 10 / 255,
    "epochs": 50,
    "batch_size": 128,
    "train_limit": 0,
    "test_limit": 0,
    "scale": "research",
    "methods": "",
    "without": "",
    "other": "byol-cifar10-r18w16",
    # Where single frequencies hurt most and AdvEncoder has half of its energy (docs/attacks.md).
    "band": "0.125-0.1875",
}

LOSS, ATTACK = "robust_ssl.losses:", "robust_ssl.attacks:"
FROZEN = {"rates": {"encoder/**": "freeze", "head/**": 5e-3}, "batch_statistics": "frozen"}
SLOW = {"encoder/**": 1e-4, "head/**": 1e-3}
TRAINING = 8 / 255  # the budget that every method is trained with
PGD = {
    "function": f"{ATTACK}PGD",
    "epsilon": TRAINING,
    "step_size": 2 / 255,
    "num_steps": 10,
    "keep_best": False,
}
ONE_STEP = {**PGD, "num_steps": 1, "step_size": 10 / 255}  # 1.25 epsilon: Wong et al. 2020
TOWARDS_KL = {**PGD, "objective": "robust_ssl.objectives:kl_divergence"}
ON_ADVERSARIAL = {
    "losses": {"adversarial_cross_entropy": (f"{LOSS}adversarial_cross_entropy", 1.0)},
    "batch_statistics": "adversarial",
}
CLEAN = {"clean_cross_entropy": (f"{LOSS}clean_cross_entropy", 1.0)}
TRADES = {
    "losses": {**CLEAN, "trades_kl": (f"{LOSS}trades_kl", 6.0)},  # Zhang et al. 2019: 1 / lambda
    "attack": TOWARDS_KL,
    "batch_statistics": "both",
}
MART = {
    "boosted_cross_entropy": (f"{LOSS}boosted_cross_entropy", 1.0),
    "misclassification_kl": (f"{LOSS}misclassification_kl", 5.0),  # Wang et al. 2020
}
ALWAYS = ("usual", "full")  # what accuracy (scored) and cost (made) are held against
LAYERS = {
    "images": 256,
    "num_steps": 10,
    "learning_rate": 1.0,
    "radius": 0.1,
    "top_k": None,
    "top_k_fraction": None,
    "rate": 1e-3,
}
BAND = {
    "function": "robust_ssl.threats:Band",
    "threat": {"function": "robust_ssl.threats:Linf"},
}


def pool(**options) -> dict:
    """Returns the recipe of universal adversarial fine-tuning."""
    attack = {
        "function": "robust_ssl.finetuning:UniversalPool",
        "epsilon": TRAINING,
        "clean_share": 0.5,
        "size": 4,
    }
    return {**ON_ADVERSARIAL, "attack": {**attack, **options}}


def warm(attack: dict) -> dict:
    """Returns the recipe of adversarial fine-tuning from a head that fits."""
    return {"start": "usual", "adv_ratio": 0.6, "attack": attack, "batch_statistics": "both"}


def baselines(epochs: int) -> dict:
    """Returns the recipes of the literature, by name."""
    # Shafahi et al. 2019 have 8 replays; with few epochs 4 leave two passes over the data.
    free = {"function": "robust_ssl.finetuning:FreeReplays", "epsilon": TRAINING, "replays": 4}
    drift = {**PGD, "function": f"{ATTACK}DriftPGD"}
    drift = {key: value for key, value in drift.items() if key != "keep_best"}
    preserve = {"preservation": (f"{LOSS}feature_preservation", 1.0)}
    preprocess = "robust_ssl.models.preprocessing:"
    return {
        "linear_probe": {**FROZEN, "head": "linear"},
        "usual": FROZEN,
        "full": {},
        "lp_ft": {"start": "linear_probe", "rates": SLOW},
        "l2_sp": {"l2_sp": 0.1},  # Li et al. 2018 search alpha from 0.001 to 1
        "pruned": {"prune": 0.5},
        "jpeg": {"start": "usual", "epochs": 0, "preprocess": {"function": f"{preprocess}JPEG"}},
        "quantized": {
            "start": "usual",
            "epochs": 0,
            "preprocess": {"function": f"{preprocess}Quantize"},
        },
        "smoothed": {
            "start": "usual",
            "epochs": 0,
            "preprocess": {"function": f"{preprocess}Smooth"},
        },
        "pgd_at": {**ON_ADVERSARIAL, "attack": PGD},
        "trades": TRADES,
        "mart": {"losses": MART, "attack": PGD, "batch_statistics": "both"},
        "fgsm_rs": {**ON_ADVERSARIAL, "attack": ONE_STEP},
        "free_at": {**ON_ADVERSARIAL, "attack": free, "epochs": -(-epochs // 4)},
        "alf": {**FROZEN, "head": "linear", "losses": ON_ADVERSARIAL["losses"], "attack": PGD},
        "aff": {**TRADES, "head": "linear"},
        "roli": {**ON_ADVERSARIAL, "start": "alf", "attack": PGD},
        "twins": {**ON_ADVERSARIAL, "attack": PGD, "batch_statistics": "twins"},
        "rift": {
            "start": "pgd_at",
            "select": {**LAYERS, "top_k": 1},
            "batch_statistics": "frozen",
            "tolerance": 0.01,
        },
        "fare_encoder": {
            "losses": preserve,
            "attack": drift,
            "rates": {"encoder/**": 1e-3, "head/**": "freeze"},
            "batch_statistics": "adversarial",
            "compare_with_pretrained": True,
            "best": "last",
            "scored": False,
        },
        "fare": {**FROZEN, "start": "fare_encoder"},
    }


def band(edges: str) -> dict:
    """Returns the threat of a band, ``LOW-HIGH`` in cycles per pixel."""
    try:
        low, high = (float(edge) for edge in edges.split("-"))
    except ValueError:
        raise ValueError(
            f"band must be LOW-HIGH in cycles per pixel, for example 0.125-0.1875, got {edges!r}"
        ) from None
    return {**BAND, "low": low, "high": high}


def defences(edges: str, other: str) -> dict:
    """Returns Gen-AF, as here and as released, and the defences of this project, by name."""
    regularization = f"{LOSS}genetic_regularization"
    shallow = {
        "function": f"{ATTACK}DriftPGD",
        "epsilon": TRAINING,
        "step_size": TRAINING,
        "num_steps": 1,
        "layer": 1,
    }
    return {
        "gen_af_stage1": {
            "adv_ratio": 0.7,
            "losses": {"genetic_regularization": (regularization, 20.0)},
            "attack": PGD,
            "batch_statistics": "both",
        },
        "gen_af": {
            "start": "gen_af_stage1",
            "select": {**LAYERS, "top_k_fraction": 0.2},
            "batch_statistics": "frozen",
            "tolerance": 0.01,
        },
        # The released code's: adversarial images alone, its swapped regularization, 20 times
        # the sum over pairs of a batch of 256, a tenth of our encoder rate, its inner attack.
        "gen_af_released_stage1": {
            "losses": {
                **ON_ADVERSARIAL["losses"],
                "genetic_regularization": (regularization, 5120.0, {"compat": "released"}),
            },
            "attack": {**PGD, "epsilon": 0.03, "step_size": 0.007, "random_start": False},
            "rates": {"encoder/**": 1e-4, "head/**": 5e-3},
            "batch_statistics": "both",
            "scored": False,
        },
        "gen_af_released": {
            "start": "gen_af_released_stage1",
            "select": {**LAYERS, "top_k_fraction": 0.2},
            "batch_statistics": "frozen",
        },
        "shallow_stable": {
            "losses": {**CLEAN, "drift": (f"{LOSS}feature_drift", 1.0, {"layers": (1,)})},
            "attack": shallow,
            "compare_with_pretrained": True,
            "best": "last",
        },
        "universal": pool(),
        "universal_band": pool(threat=band(edges)),
        "universal_shallow": {
            **pool(),
            "losses": {
                **ON_ADVERSARIAL["losses"],
                "drift": (f"{LOSS}feature_drift", 1.0, {"layers": (1,)}),
            },
            "compare_with_pretrained": True,
        },
        "universal_trades": {
            **pool(clean_share=0.0),
            "losses": {**CLEAN, "trades_kl": (f"{LOSS}trades_kl", 3.0)},
            "batch_statistics": "both",
        },
        # A head that fits first, then one-step attacks; 0.5 and 0.7 were tried on training images
        # that the small comparison leaves out, and 0.6 was taken between them, untried.
        "warm_fgsm": warm(ONE_STEP),
        "warm_pgd": warm(PGD),  # ten steps at twice the time of one, half of Gen-AF's
        # ZePAD's idea: what is accurate and what is robust, and the more certain one decides.
        "other_encoder": {**FROZEN, "encoder": other, "scored": False},
        "ensemble": {"members": ("usual", "gen_af", "other_encoder")},
    }


def only(recipes: dict, names: str, without: str) -> dict:
    """Returns some recipes, with what they start from, in the order of all."""
    left_out = without.split("+") if without else []
    wanted = names.split("+") if names else [name for name in recipes if name not in left_out]
    unknown = sorted({*wanted, *left_out} - set(recipes))
    if unknown:
        raise ValueError(f"no method {unknown[0]!r}; there are {', '.join(recipes)}")
    needed, waiting = set(), [*wanted, *ALWAYS]
    while waiting:
        name = waiting.pop()
        if name in left_out:
            raise ValueError(
                f"without={without}: {name} is asked for, or another method is made from it; leave "
                "that one out too"
            )
        if name not in needed:
            needed.add(name)
            recipe = recipes[name]
            waiting += [*recipe.get("members", ()), *filter(None, [recipe.get("start")])]
    return {
        name: recipe if name in (*wanted, "usual") else {**recipe, "scored": False}
        for name, recipe in recipes.items()
        if name in needed
    }


def universal_attacks(small: bool) -> dict:
    """Returns the suite of downstream-agnostic attacks, by name."""
    generator = {"form": "released", **({"width": 32, "learning_rate": 1e-3} if small else {})}
    step = {"step_size": 2e-3} if small else {}
    return {
        "advencoder": {"function": f"{ATTACK}AdvEncoderPER", **generator},
        "universal_pgd": {"function": f"{ATTACK}UniversalPGD"},
        "l4a_base": {"function": f"{ATTACK}L4ABase", **step, "fit": {"batch_size": 16}},
        "ssp": {"function": f"{ATTACK}SSP", **step},
        "random_noise": {"function": f"{ATTACK}RandomNoise"},
    }


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; see the file's docstring for the arguments."""
    given = parse_arguments(arguments, ARGUMENTS)
    if given["scale"] not in ("research", "small"):
        raise ValueError(f"scale must be research or small, got {given['scale']!r}")
    small = given["scale"] == "small"
    config = ConfigDict()
    config.seed = 0
    config.stages = ("attack", "defend", "protocol", "compare")
    config.encoder = {"path": given["encoder"]}
    # image_size: height and width that images are brought to; None leaves them as they are.
    config.surrogate = {"source": given["surrogate"], "image_size": None}
    config.downstream = {
        "source": given["downstream"],
        "image_size": None,
        "validation": 0.1,
        "train_limit": given["train_limit"] or None,
        "test_limit": given["test_limit"] or None,
    }
    config.attack = {
        "methods": universal_attacks(small),
        "epsilon": given["epsilon"],
        "curve": (),
        "seeds": (0,),
        "num_steps": 200 if small else 4000,
        "batch_size": 64,
    }
    # What all recipes have that do not say otherwise themselves.
    config.common = {
        "epochs": given["epochs"],
        "batch_size": given["batch_size"],
        "rates": {"encoder/**": 1e-3, "head/**": 5e-3},
        "weight_decay": 8e-4,
        "decay": 0.96,
        "augment": "",
        "patience": None,
    }
    recipes = {**baselines(given["epochs"]), **defences(given["band"], given["other"])}
    config.methods = only(recipes, given["methods"], given["without"])
    config.defend = {
        "seeds": (0,) if small else (0, 1, 2),
        "batch_size": 250,
        "validation": PGD,  # what the best epoch is chosen by, the same for all
    }
    config.classifiers = {}  # the recipes' classifiers come by themselves
    config.protocol = {
        "seeds": (0,),
        "batch_size": 250,
        "adaptive": True,
        "checks": True,
        "per_image": {
            "methods": {"pgd": {"function": f"{ATTACK}PGD", "num_steps": 20}},
            "epsilons": (8 / 255,),
        },
        "autoattack": {
            "version": "standard",
            "threats": {"Linf": (8 / 255,)},
            "images": 100 if small else 1000,
            # What is left of 100 images is attacked in batches that are filled up.
            "batch_size": 20 if small else 100,
        },
    }
    config.compare = {
        "reference": "full",  # whose cost is 1
        "order": ("usual", "pgd_at", "mart", "trades", "gen_af"),  # the claim of the paper
        "memory": True,
        "rounds": 3,
        "steps_per_round": 3,
    }
    config.sweep = {
        "method": "universal",
        # Paths into the recipe, each with its values; points are all combinations.
        "grid": (
            ("attack.epsilon", (4 / 255, 8 / 255, 12 / 255)),
            ("attack.clean_share", (0.3, 0.7)),
        ),
        "usual": "usual",
        "max_clean_loss": 0.02,
        "max_cost": 2.0,
    }
    return config
