r"""The comparison that docs/results/protocol.md announces: eight recipes, one head, one schedule.

    robust-ssl run evidence:downstream=gtsrb32 --workdir=runs/evidence_gtsrb
    robust-ssl run evidence:downstream=cifar10 --workdir=runs/evidence_cifar10

    robust-ssl run evidence:stress=yes,recipes=ramp_fgsm,seeds=0 --workdir=runs/stress_gtsrb
    robust-ssl run evidence:factors=yes,round=2 --workdir=runs/factors_gtsrb

One command for a set makes its table, and goes on where it was stopped.  Recipes and seeds may come
later: ``seeds=0+1+2+3+4`` in the same workdir adds two.

All recipes have one head (``head``), rates that fall to zero along a cosine (``decay``) and as many
epochs.  Universal attacks are scored on all test images, attacks on single images and AutoAttack's
two on a thousand.  EmbedAttack on the public encoder is the attacker who perturbs each image and
sees no label.

The twin is the attacker who follows the published recipe with another seed: each seed attacks the
next one.  The half twin does so on half of the training images: each recipe costs half of a
training and a fit of the suite more, however many seeds there are.  Who attacks with labels fits
one perturbation on the classifier and its labelled training images: each model costs one fit more.

With ``stress=yes`` nothing is compared.  The recipes of ``recipes`` are attacked as hard as it
goes: PGD-50 with ten restarts at 8/255 and 12/255, in an L2 ball and in a patch; EmbedAttack on
their own encoder; one patch and one perturbation of 12/255 for all images, with labels and without.
Give it a workdir of its own.

With ``factors=yes`` the recipes are `ramp_fgsm` and what is one factor away from it: another
attack, head, ramp, rate or decay, an average of weights, a teacher.  Each is compared with it, and
attacked by the suites and a twin.

Arguments: ``downstream``, ``encoder``, ``surrogate``, ``head``, ``decay``, ``epochs``,
``train_limit`` (a tenth of it is for validation), ``test_limit`` (0 takes all), ``seeds``,
``recipes``, ``steps`` of fitting a universal attack, ``round``, whose tuned values are taken (1; 2;
3, which has values for `cifar10` and `tiny_imagenet20`; 4, which adds `ramp_from_start` and has
GTSRB too, with the second round's values; 6, for GTSRB with ``head=mlp``; 7, for the superclasses
that tools/cifar100_superclasses.py writes; 9, the fourth's with rates for the others), ``tune``, a
recipe whose tries ``robust-ssl sweep`` makes (all else is then as the round before has taken it),
``stress``, ``factors``, and ``seen``, how many test images the claims leave out: those that
``test_limit`` would take.

Time and figure: on two CPU cores five recipes with five seeds took some three hours on GTSRB
(docs/results/evidence.md).
"""

import pathlib

from ml_collections import ConfigDict

from robust_ssl.settings import load_beside, parse_arguments

common = load_beside(__file__, "common")
compare = load_beside(__file__, "compare")

RECIPES = ("full", "gen_af", "gen_af_unguarded", "roli", "trades", "ramp_fgsm", "ramp_pgd")
ARGUMENTS = {
    "downstream": "gtsrb32",
    "encoder": common.ENCODER,
    "surrogate": "cifar100_small",
    "head": "linear",
    "decay": "cosine",
    "epochs": 5,
    "train_limit": 3000,
    "test_limit": 0,
    "seeds": "0+1+2",
    "recipes": "+".join(RECIPES),  # and the baseline, which is always there
    "steps": 200,
    "round": 1,
    "tune": "",
    "seen": 0,
    "stress": "",
    "factors": "",
}
IMAGES = 1000  # of attacks that take gradients for every image
STRESSED = 200  # of those that take five hundred
PATCH = {
    "epsilon": 0.03,
    "threat": "robust_ssl.threats:Patch",
}  # AdvEncoder-PAT's share of the area
L2 = {"epsilon": 0.5, "threat": "robust_ssl.threats:L2"}
WITH_LABELS = {
    "function": f"{common.ATTACKS}UniversalPGD",
    "objective": "robust_ssl.objectives:cross_entropy",
}
GEN_AF = "gen_af_unguarded"
# What docs/results/protocol.md announces, tested together, and the cost.
CLAIMS = (
    {"more": "ramp_fgsm", "than": GEN_AF, "by": "clean"},
    {"more": "ramp_fgsm", "than": GEN_AF, "by": "robust_public"},
    {"more": "ramp_fgsm", "than": GEN_AF, "by": "robust_hardened"},
    {"more": "ramp_fgsm", "than": "roli", "by": "clean"},
    {"more": "ramp_fgsm", "than": "roli", "by": "robust_worst", "margin": 0.02},
    {"more": "ramp_pgd", "than": GEN_AF, "by": "autoattack", "margin": 0.02},
    {"reach": 0.9, "of": GEN_AF, "over": "baseline", "within": 1.5},
)
BY_PUBLIC_SUITE = {**CLAIMS[-1], "by": "robust_public"}
SECOND_CLAIMS = (
    *CLAIMS[:3],
    {"more": "ramp_fgsm", "than": GEN_AF, "by": "robust_twin"},
    *CLAIMS[3:5],
    CLAIMS[-1],
)
THIRD_CLAIMS = (*SECOND_CLAIMS[:4], CLAIMS[-1])
FOURTH_CLAIMS = (*({**claim, "more": "ramp_from_start"} for claim in THIRD_CLAIMS[:4]), CLAIMS[-1])
ANNOUNCED = {
    **{1: CLAIMS, 2: SECOND_CLAIMS, 3: THIRD_CLAIMS},
    **dict.fromkeys((4, 6, 7), FOURTH_CLAIMS),
    9: ({"better_than": GEN_AF},),
}
# As many tries for each recipe that can be tuned, by round.  In the first the published or default
# value is among them; in the second all are tried at the same rates of the encoder; in the third at
# the same rates with two values each of what is the recipe's own, on every set by itself.
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
EACH_SET = (5e-4, 1e-3, 2e-3, 4e-3)
_WEIGHT = "start.losses.genetic_regularization.weight"
_RATE = "rates.encoder/**"
_END = "ramp.end"
_RATES_ALONE = {
    GEN_AF: ((f"start.{_RATE}", EACH_SET),),
    "ramp_from_start": ((_RATE, EACH_SET),),
}
TRIES = {
    1: {
        GEN_AF: ((_WEIGHT, (0.0, 20.0, 80.0, 320.0)),),
        "roli": ((_RATE, (3e-4, 1e-3, 2e-3, 4e-3)),),
        "trades": (("losses.trades_kl.weight", (1.0, 3.0, 6.0, 12.0)),),
        "ramp_fgsm": ((_END, (0.5, 0.6, 0.8, 1.0)),),
        "ramp_pgd": ((_END, (0.5, 0.6, 0.8, 1.0)),),
    },
    2: {
        GEN_AF: ((f"start.{_RATE}", RATES),),
        **dict.fromkeys(("roli", "trades", "ramp_fgsm", "ramp_pgd"), ((_RATE, RATES),)),
    },
    3: {
        GEN_AF: ((_WEIGHT, (0.0, 20.0)), (f"start.{_RATE}", EACH_SET)),
        "ramp_fgsm": ((_END, (0.6, 1.0)), (_RATE, EACH_SET)),
    },
    4: {},  # what the third has taken, and one factor of those that were tried on GTSRB
    6: _RATES_ALONE,  # the fifth had the fourth's; here with Gen-AF's own head
    7: _RATES_ALONE,  # a set that nothing was chosen on
    9: dict.fromkeys(("roli", "trades", "ramp_pgd"), ((_RATE, EACH_SET),)),
}


def _at_rate(encoder: float) -> dict:
    """Returns the entry that gives the encoder this rate, and the head its own."""
    return {"rates": {"encoder/**": encoder, "head/**": 5e-3}}


# The best of them, by accuracy on validation images; docs/results/protocol.md has all tries.
_GROWS_TO_THE_END = {"ramp": {"start": 0.4, "end": 1.0}}
_VARIANTS = ("ramp_pgd2", "ramp_nfgsm", "ramp_ema", "ramp_teacher")  # one factor from `ramp_fgsm`
_FIRST = {
    "gen_af_stage1": {"weight": 0.0},
    "roli": _at_rate(4e-3),
    "trades": {"weight": 1.0},
    **dict.fromkeys(("ramp_fgsm", "ramp_pgd", *_VARIANTS), _GROWS_TO_THE_END),
}
_SECOND = {
    "gen_af_stage1": _at_rate(8e-3),
    **dict.fromkeys(("ramp_fgsm", *_VARIANTS), _at_rate(4e-3)),
}
FACTORS = {  # what `factors` changes of `ramp_fgsm` besides, each alone
    "no_ramp": {"ramp": None},
    "ramp_from_start": {"ramp": {"start": 0.0, "end": 1.0}},
    "ramp_ends_early": {"ramp": {"start": 0.4, "end": 0.6}},
    "low_rate": _at_rate(1e-3),
    "constant_rates": {"decay": 1.0},
    "mlp_head": {"head": "mlp"},
}
TAKEN = {  # by round
    0: {},
    1: _FIRST,
    2: {name: {**entries, **_SECOND.get(name, {})} for name, entries in _FIRST.items()},
}
THIRD = {  # by set
    "cifar10": {"gen_af_stage1": _at_rate(2e-3), "ramp_fgsm": _at_rate(1e-3)},
    "tiny_imagenet20": {
        "gen_af_stage1": {"weight": 20.0, **_at_rate(1e-3)},
        "ramp_fgsm": {"ramp": {"start": 0.4, "end": 0.6}, **_at_rate(2e-3)},
    },
}
SIXTH = {"gen_af_stage1": _at_rate(2e-3), "ramp_fgsm": _at_rate(4e-3)}  # with the published head
SUPERCLASSES = "cifar100_superclasses"  # of the seventh
SEVENTH = {"gen_af_stage1": _at_rate(4e-3), "ramp_fgsm": _at_rate(4e-3)}
FOURTH = {**THIRD, "gtsrb32": {}}  # the second round has tuned on that set already
NINTH = {
    "gtsrb32": dict.fromkeys(("trades", "ramp_pgd"), _at_rate(4e-3)),
    "cifar10": {
        **THIRD["cifar10"],
        **dict.fromkeys(("roli", "trades"), _at_rate(2e-3)),
        "ramp_pgd": _at_rate(1e-3),
    },
    "tiny_imagenet20": {
        **THIRD["tiny_imagenet20"],
        **{"trades": _at_rate(2e-3), "ramp_pgd": _at_rate(1e-3)},
    },
}
BY_SET = {  # by round
    3: THIRD,
    4: FOURTH,
    6: {"gtsrb32": SIXTH},
    7: {SUPERCLASSES: SEVENTH},
    9: NINTH,
}


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; see the file's docstring for the arguments."""
    given = parse_arguments(arguments, ARGUMENTS)
    if given["round"] not in TRIES:
        raise ValueError(
            f"round must be one of {', '.join(map(str, TRIES))}, got {given['round']!r}"
        )
    tries = TRIES[given["round"]]
    if given["tune"] not in ("", *tries):
        raise ValueError(f"tune must be one of {', '.join(tries)}, got {given['tune']!r}")
    for name in ("stress", "factors"):
        if given[name] not in ("", "yes"):
            raise ValueError(f"{name} must be yes or left out, got {given[name]!r}")
    if given["factors"]:
        given["recipes"] = "+".join(("ramp_fgsm", *_VARIANTS))
    if given["round"] == 6 and (given["head"], given["downstream"]) != ("mlp", "gtsrb32"):
        raise ValueError("round 6 has values for head=mlp on gtsrb32 alone")
    if given["round"] == 7 and pathlib.PurePath(given["downstream"]).name != SUPERCLASSES:
        raise ValueError(f"round 7 has values for a folder {SUPERCLASSES} alone")
    own = ("seeds", "steps", "round", "tune", "seen", "stress", "factors")
    text = ",".join(f"{name}={value}" for name, value in given.items() if name not in own)
    config = compare.get_config(f"{text},scale=small")
    config.common.best = "highest"  # as it was announced; the ramps take their last epoch
    config.training.seeds = tuple(int(seed) for seed in given["seeds"].split("+"))
    config.suite.num_steps = given["steps"]
    config.scoring.twin = len(config.training.seeds) > 1
    config.scoring.half_twin = True
    config.scoring.labelled = {
        "attacks": {"universal_ce": WITH_LABELS},
        **{"epsilon": config.suite.epsilon, "num_steps": given["steps"]},
    }
    config.scoring.per_image = {
        "attacks": {
            # White-box figures are given at 8/255, what is crafted without labels at the suite's.
            "pgd": {"function": f"{common.ATTACKS}PGD", "num_steps": 20, "budgets": (8 / 255,)},
            "embed": {
                "function": f"{common.ATTACKS}EmbedAttack",
                "num_steps": 20,
                "budgets": (config.suite.epsilon,),
            },
        },
        "images": IMAGES,
    }
    config.scoring.autoattack.update(version="apgd", images=IMAGES, batch_size=100)
    # Who tunes has what the round before has taken; that of a set or head is the second.
    before = min(given["round"] - 1, 2)
    taken = _taken(before if given["tune"] else given["round"], given["downstream"])
    for name in [name for name in taken if name in config.recipes]:
        entry = config.recipes[name]
        entry = {"function": entry} if isinstance(entry, str) else entry.to_dict()
        del config.recipes[name]  # a text cannot become a mapping in its place
        config.recipes[name] = {**entry, **taken[name]}
    if given["round"] in (4, 6, 7, 9) and "ramp_fgsm" in config.recipes:
        ramp = {**config.recipes.ramp_fgsm.ramp.to_dict(), "start": 0.0}
        config.recipes.ramp_from_start = {**config.recipes.ramp_fgsm.to_dict(), "ramp": ramp}
    made = {*config.recipes}
    # A sweep judges no claim, and goes on in a workdir that began with these.
    announced = ANNOUNCED[given["round"]]
    announced += () if given["tune"] else (BY_PUBLIC_SUITE,)
    seen = {"seen": given["seen"]} if given["seen"] else {}
    claims = [{**claim, **seen} for claim in announced if compare.names_in(claim) <= made]
    config.compare.claims = tuple(claims)
    if given["tune"]:
        config.sweep = {"recipe": given["tune"], "grid": tries[given["tune"]]}
    if given["stress"]:
        _stress(config, given["recipes"].split("+"))
    if given["factors"]:
        _factors(config)
    return config


def _taken(round: int, downstream: str) -> dict[str, dict]:
    """Returns what a round has taken for this set, by recipe."""
    if round < 3:
        return TAKEN[round]
    downstream = pathlib.PurePath(downstream).name
    by_set = BY_SET[round]
    if downstream not in by_set:
        sets = ", ".join(by_set)
        raise ValueError(f"round {round} has values for {sets}, and none for {downstream!r}")
    return {
        name: {**entries, **by_set[downstream].get(name, {})} for name, entries in TAKEN[2].items()
    }


def _factors(config: ConfigDict) -> None:
    """Adds what is one factor away from `ramp_fgsm`, and says what is compared."""
    taken = config.recipes.ramp_fgsm.to_dict()
    for name, entries in FACTORS.items():
        config.recipes[name] = {**taken, **entries}
    config.compare.claims = ({"better_than": "ramp_fgsm"},)
    config.scoring.half_twin = False
    del config.scoring.labelled
    config.scoring.per_image.attacks = {}
    config.scoring.autoattack.budgets = ()


def _stress(config: ConfigDict, recipes: list[str]) -> None:
    """Turns the comparison into an attempt to break these recipes."""
    config.stages = ("attack", "train", "score")
    config.compare.claims = ()
    if "baseline" not in recipes:
        config.recipes.baseline = {"function": f"{common.RECIPES}baseline", "scored": False}
    config.suite.epsilon = 12 / 255
    patch = {"function": f"{common.ATTACKS}AdvEncoderPAT", "width": 32, **PATCH}
    config.suite.attacks = {
        "universal_pgd": f"{common.ATTACKS}UniversalPGD",
        "patch": patch,
        # The checks want a patch at both kinds of place.
        "patch_random": {**patch, "threat": {"function": PATCH["threat"], "location": "random"}},
    }
    config.scoring.update(twin=False, half_twin=False)
    config.scoring.labelled.epsilon = config.suite.epsilon
    # A pixel of a patch has all of [0, 1] to go.
    config.scoring.labelled.attacks.patch_ce = {**WITH_LABELS, **PATCH, "step_size": 0.02}
    config.scoring.autoattack.budgets = ()
    config.scoring.per_image = {
        "attacks": {
            "pgd_restarts": {
                "function": f"{common.ATTACKS}PGD",
                **{"num_steps": 50, "restarts": 10},
                "budgets": (8 / 255, 12 / 255, L2, PATCH),
            },
            "embed": {
                "function": f"{common.ATTACKS}EmbedAttack",
                "num_steps": 50,
                "budgets": (10 / 255, 12 / 255),
            },
        },
        "images": STRESSED,
    }
