r"""The comparison that docs/results/protocol.md announces: eight recipes, one head, one schedule.

    robust-ssl run evidence:downstream=gtsrb32 --workdir=runs/evidence_gtsrb
    robust-ssl run evidence:downstream=cifar10 --workdir=runs/evidence_cifar10

One command for a set makes its table, and goes on where it was stopped.  Recipes and seeds may come
later: ``seeds=0+1+2+3+4`` in the same workdir adds two.

All recipes have one head (``head``), rates that fall to zero along a cosine (``decay``) and as many
epochs.  Universal attacks are scored on all test images, attacks on single images and AutoAttack's
two on a thousand.  EmbedAttack on the public encoder is the attacker who perturbs each image and
sees no label.  The twin is the one who follows the published recipe with a seed of his own.
Arguments: ``downstream``, ``encoder``, ``surrogate``, ``head``, ``decay``,
``epochs``, ``train_limit`` (a tenth of it is for validation), ``test_limit`` (0 takes all),
``seeds``, ``recipes``, ``steps`` of fitting a universal attack, ``tune``, a recipe whose four tries
``robust-ssl sweep`` makes, and ``seen``, how many test images the claims leave out: those that
``test_limit`` would take.

Time and figure: nobody has run it yet.  On two CPU cores a recipe takes some minutes to make and
some to score, so a set with three seeds takes some hours.
"""

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
    "tune": "",
    "seen": 0,
}
IMAGES = 1000  # of attacks that take gradients for every image
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
# Four tries for each recipe that can be tuned, the published or default value among them.
TRIES = {
    GEN_AF: ("start.losses.genetic_regularization.weight", (0.0, 20.0, 80.0, 320.0)),
    "roli": ("rates.encoder/**", (3e-4, 1e-3, 2e-3, 4e-3)),
    "trades": ("losses.trades_kl.weight", (1.0, 3.0, 6.0, 12.0)),
    "ramp_fgsm": ("ramp.end", (0.5, 0.6, 0.8, 1.0)),
    "ramp_pgd": ("ramp.end", (0.5, 0.6, 0.8, 1.0)),
}


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; see the file's docstring for the arguments."""
    given = parse_arguments(arguments, ARGUMENTS)
    if given["tune"] not in ("", *TRIES):
        raise ValueError(f"tune must be one of {', '.join(TRIES)}, got {given['tune']!r}")
    own = ("seeds", "steps", "tune", "seen")
    text = ",".join(f"{name}={value}" for name, value in given.items() if name not in own)
    config = compare.get_config(f"{text},scale=small")
    config.training.seeds = tuple(int(seed) for seed in given["seeds"].split("+"))
    config.suite.num_steps = given["steps"]
    config.scoring.twin = len(config.training.seeds) > 1
    config.scoring.per_image = {
        "attacks": {
            "pgd": {"function": f"{common.ATTACKS}PGD", "num_steps": 20},
            "embed": {"function": f"{common.ATTACKS}EmbedAttack", "num_steps": 20},
        },
        # White-box figures are given at 8/255, what is crafted without labels at the suite's.
        "budgets": (8 / 255, config.suite.epsilon),
        "images": IMAGES,
    }
    config.scoring.autoattack.update(version="apgd", images=IMAGES, batch_size=100)
    made = {*config.recipes}
    claims = [claim for claim in CLAIMS if compare.names_in(claim) <= made]
    seen = {"seen": given["seen"]} if given["seen"] else {}
    config.compare.claims = tuple({**c, **seen} if "more" in c else dict(c) for c in claims)
    if given["tune"]:
        config.sweep = {"recipe": given["tune"], "grid": (TRIES[given["tune"]],)}
    return config
