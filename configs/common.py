"""What the configs share: the shipped encoder, the data sets' entries, the suite of attacks."""

ATTACKS = "robust_ssl.attacks:"
RECIPES = "robust_ssl.recipes:"
ENCODER = "simclr-cifar10-r18w24"  # its card: robust_ssl/zoo/simclr-cifar10-r18w24/README.md
SURROGATE = "photo_crops"  # comes with the package; a data set's name is taken as well


def recipes(*names: str, **options: dict) -> dict:
    """Returns recipes of the package by name, some with options."""
    return {
        name: {"function": f"{RECIPES}{name}", **options[name]}
        if name in options
        else f"{RECIPES}{name}"
        for name in names
    }


def falling(decay: str) -> dict:
    """Returns the entry by which all recipes' rates fall: a factor an epoch, or ``cosine``."""
    if not decay:
        return {}
    return {"decay": decay if decay == "cosine" else float(decay)}


def surrogate(source: str) -> dict:
    """Returns the attacker's data: the package's photo crops, or the named set."""
    if source == SURROGATE:
        # Near the 7,000 images of the published runs; they take some five seconds to cut.
        return {"function": "robust_ssl.data:photo_crops", "n": 5000}
    return {"source": source}


def downstream(source: str, train_limit: int = 0, test_limit: int = 0) -> dict:
    """Returns the defender's data; a limit of 0 takes all images."""
    limits = {"train_limit": train_limit, "test_limit": test_limit}
    return {"source": source, **{name: limit for name, limit in limits.items() if limit}}


def advencoder(**options) -> dict:
    """Returns AdvEncoder as its code is."""
    return {"function": f"{ATTACKS}AdvEncoderPER", "form": "released", **options}


def suite(width: int = 32) -> dict:
    """Returns the three attacks of the main job, for some hundred steps; noise is the measure."""
    return {
        "advencoder": advencoder(width=width, learning_rate=1e-3),
        "universal_pgd": f"{ATTACKS}UniversalPGD",
        "random_noise": f"{ATTACKS}RandomNoise",
    }
