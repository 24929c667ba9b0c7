r"""All recipes but those of large encoders by one protocol: one table, one trade-off picture.

    robust-ssl run compare:downstream=cifar10 --workdir=runs/compare
    robust-ssl sweep compare:downstream=cifar10 --workdir=runs/sweep

Arguments: ``encoder``, ``surrogate`` and ``downstream`` as in ``gen_af.py``; ``epochs``,
``train_limit`` and ``test_limit`` (0 takes all); ``epsilon`` of the suite; ``batch_size``;
``scale``: ``research`` has the published numbers
of steps, ``small`` is for a CPU; ``recipes``: a part of them, as
``recipes=baseline+trades+universal`` (what they start from comes with them); ``without``: all but
these, for example
``without=twins`` for an encoder without batch norm; ``head``: one for all recipes, ``linear`` or
``mlp``, in place of each one's own; ``decay=cosine``: rates that fall to zero, for all recipes;
``other``: the ensemble's second encoder, which
must take images of the same size; ``band``: where `universal_band` has its perturbations, in
cycles per pixel: the worst band of the page that the config ``analyze`` leaves for your encoder.

Time and figure: on two CPU cores at ``scale=small``, five epochs of 2,700 CIFAR-10 images and 1,000
test images, all recipes take half an hour to make, each some two minutes to score, all together
some five minutes to time; docs/results/defenses-cifar10.md has the figures.
"""

from ml_collections import ConfigDict

from robust_ssl import recipes
from robust_ssl.settings import load_beside, parse_arguments

common = load_beside(__file__, "common")

ARGUMENTS = {
    "encoder": common.ENCODER,
    "downstream": "cifar10",
    "surrogate": common.SURROGATE,
    "epsilon": 10 / 255,
    "epochs": 50,
    "batch_size": 128,
    "train_limit": 0,
    "test_limit": 0,
    "scale": "research",
    "head": "",
    "decay": "",
    "recipes": "",
    "without": "",
    "other": "byol-cifar10-r18w16",
    # Where single frequencies hurt most and AdvEncoder has half of its energy
    # (docs/results/analysis-gtsrb.md).
    "band": "0.125-0.1875",
}

NAMES = (
    *("linear_probe", "baseline", "full", "lp_ft", "l2_sp", "pruned", "jpeg", "quantized"),
    *("smoothed", "pgd_at", "trades", "mart", "fgsm_rs", "free_at", "alf", "aff", "roli", "twins"),
    *("rift", "fare_encoder", "fare", "gen_af_stage1", "gen_af", "gen_af_released_stage1"),
    *("gen_af_unguarded", "gen_af_released", "shallow_stable", "universal", "universal_band"),
    *(
        "universal_shallow",
        "universal_trades",
        "warm_fgsm",
        "warm_pgd",
        "other_encoder",
        "ensemble",
    ),
    *("ramp_fgsm", "ramp_from_start", "ramp_pgd", "ramp_pgd2"),
    *("ramp_nfgsm", "ramp_ema", "ramp_teacher"),
)
ALWAYS = ("baseline", "full")  # what accuracy (scored) and cost (made) are held against
# What the paper says, and what this project set itself; `report.judge` holds figures to it.
CLAIMS = (
    {
        "order": ("baseline", "pgd_at", "mart", "trades", "gen_af"),
        "of": "Zhou et al. (IEEE S&P 2024)",
    },
    {"reach": 0.9, "of": "gen_af", "over": "baseline", "within": 1.5},
    {"better_than": "gen_af"},
)


def names_in(claim: dict) -> set[str]:
    """Returns the recipes that a claim speaks of."""
    if "order" in claim:
        return {*claim["order"]}
    entries = ("of", "over", "better_than", "more", "than")
    return {claim[entry] for entry in entries if entry in claim}


def band(edges: str) -> dict:
    """Returns the options of a band, ``LOW-HIGH`` in cycles per pixel."""
    try:
        low, high = (float(edge) for edge in edges.split("-"))
    except ValueError:
        raise ValueError(
            f"band must be LOW-HIGH in cycles per pixel, for example 0.125-0.1875, got {edges!r}"
        ) from None
    return {"low": low, "high": high}


def chosen(names: str, without: str, options: dict) -> dict[str, bool]:
    """Returns the recipes that are wanted, in order, and whether each is scored."""
    left_out = without.split("+") if without else []
    wanted = names.split("+") if names else [name for name in NAMES if name not in left_out]
    unknown = sorted({*wanted, *left_out} - {*NAMES})
    if unknown:
        raise ValueError(f"no recipe {unknown[0]!r}; there are {', '.join(NAMES)}")
    needed = [*wanted, *ALWAYS]
    for name in needed:  # grows by what each is made from
        if name in left_out:
            raise ValueError(
                f"without={without}: {name} is asked for, or another recipe is made from it; leave "
                "that one out too"
            )
        recipe = getattr(recipes, name)(**options.get(name, {}))
        made_from = [*recipe.get("members", ())]
        made_from += [recipe[entry] for entry in ("start", "teacher") if recipe.get(entry)]
        needed += [other for other in made_from if other not in needed]
    return {name: name in (*wanted, "baseline") for name in NAMES if name in needed}


def begins(name: str, options: dict) -> bool:
    """Returns whether a recipe has a head of its own: it starts from no other one."""
    recipe = getattr(recipes, name)(**options.get(name, {}))
    return not recipe.get("start") and not recipe.get("members")


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; see the file's docstring for the arguments."""
    given = parse_arguments(arguments, ARGUMENTS)
    if given["scale"] not in ("research", "small"):
        raise ValueError(f"scale must be research or small, got {given['scale']!r}")
    small = given["scale"] == "small"
    config = ConfigDict()
    config.seed = 0
    config.stages = ("attack", "train", "score", "compare")
    config.encoder = {"path": given["encoder"]}
    config.surrogate = common.surrogate(given["surrogate"])
    config.downstream = common.downstream(
        given["downstream"], given["train_limit"], given["test_limit"]
    )
    config.suite = {
        "attacks": universal_attacks(small),
        "epsilon": given["epsilon"],
        "num_steps": 200 if small else 4000,
    }
    config.common = {"epochs": given["epochs"], "batch_size": given["batch_size"]}
    config.common.update(common.falling(given["decay"]))
    config.training = {"seeds": (0,) if small else (0, 1, 2)}
    options = {
        "free_at": {"epochs": given["epochs"]},
        "universal_band": band(given["band"]),
        "other_encoder": {"encoder": given["other"]},
    }
    names = chosen(given["recipes"], given["without"], options)
    for name in [n for n in names if given["head"] and begins(n, options)]:
        options[name] = {**options.get(name, {}), "head": given["head"]}
    for name, scored in names.items():
        if not scored:
            options.setdefault(name, {})["scored"] = False
    config.recipes = common.recipes(*names, **{n: o for n, o in options.items() if n in names})
    config.scoring = {
        "autoattack": {
            "budgets": (8 / 255,),
            "images": 100 if small else 1000,
            # What is left of 100 images is attacked in batches that are filled up.
            "batch_size": 20 if small else 100,
        },
    }
    config.compare = {"reference": "full", "baseline": "baseline"}
    # A part of the recipes has the claims that it can decide.
    config.compare.claims = tuple(claim for claim in CLAIMS if names_in(claim) <= {*config.recipes})
    if "universal" in names:
        config.sweep = {
            "recipe": "universal",
            # Paths into the recipe, each with its values; points are all combinations.
            "grid": (
                ("attack.epsilon", (4 / 255, 8 / 255, 12 / 255)),
                ("attack.clean_share", (0.3, 0.7)),
            ),
        }
    return config


def universal_attacks(small: bool) -> dict:
    """Returns the suite of downstream-agnostic attacks, by name."""
    attacks = common.ATTACKS
    step = {"step_size": 2e-3} if small else {}
    generator = {"width": 32, "learning_rate": 1e-3} if small else {}
    return {
        "advencoder": common.advencoder(**generator),
        "universal_pgd": f"{attacks}UniversalPGD",
        "l4a_base": {"function": f"{attacks}L4ABase", **step, "fit": {"batch_size": 16}},
        "ssp": {"function": f"{attacks}SSP", **step},
        "random_noise": f"{attacks}RandomNoise",
    }
