r"""May we use this encoder: usual against secured fine-tuning, and the pages of a decision.

    robust-ssl run audit --workdir=runs/audit
    robust-ssl audit run --data=parts/ --answers=answers.yaml --stage=pilot --workdir=runs/parts

The second command is the same with words for what a company gives, and an exit code that says what
was decided (docs/audit.md).  Arguments: ``encoder`` (a shipped name, a directory or a file),
``data`` (a data set or a folder; without it the handwritten digits that the package has),
``surrogate`` (the attacker's images) and ``classifier`` (one that was made elsewhere, in place of
`gen_af`).

Time and figure: on two CPU cores the digits take four and a half minutes, compiling included.  An
attacker turns about a third of the usual classifier's right answers, and one in fifty of the
secured one's.
"""

from ml_collections import ConfigDict

from robust_ssl.settings import load_beside, parse_arguments

common = load_beside(__file__, "common")

ARGUMENTS = {
    "encoder": common.ENCODER,
    "data": "",
    "surrogate": common.SURROGATE,
    "classifier": "",
}
PHOTOS, DIGITS = 10 / 255, 24 / 255  # budgets; digits are nearly black and white
EPOCHS = {"baseline": 6, "gen_af_stage1": 4, "gen_af": 2}


def get_config(arguments: str = "") -> ConfigDict:
    """Returns the config; see the file's docstring for the arguments."""
    given = parse_arguments(arguments, ARGUMENTS)
    epsilon = PHOTOS if given["data"] else DIGITS
    config = ConfigDict()
    config.seed = 0
    config.stages = ("attack", "train", "score", "compare", "audit")
    config.encoder = {"path": given["encoder"]}
    config.surrogate = common.surrogate(given["surrogate"])
    config.downstream = {"function": "robust_ssl.data:digits"}
    if given["data"]:
        config.downstream = common.downstream(given["data"])
    if given["surrogate"] == common.SURROGATE:
        config.surrogate = {"function": "robust_ssl.data:photo_crops", "n": 2000}
    config.suite = {
        "attacks": common.suite(width=16),
        "epsilon": epsilon,
        "curve": (epsilon / 4, epsilon / 2, epsilon * 3 / 4),
        "num_steps": 60,
    }
    inner = {"epsilon": epsilon, "step_size": epsilon / 2, "num_steps": 3}
    config.common = {"batch_size": 64}
    config.training = {"validation": {"function": f"{common.ATTACKS}PGD", **inner}}
    options = {name: {"epochs": epochs} for name, epochs in EPOCHS.items()}
    options["gen_af_stage1"].update(scored=False, **inner)
    options["gen_af"]["num_steps"] = 3
    names = ("baseline",) if given["classifier"] else ("baseline", "gen_af_stage1", "gen_af")
    config.recipes = common.recipes(*names, **{name: options[name] for name in names})
    if given["classifier"]:
        config.classifiers = {"secured": {"path": given["classifier"]}}
    config.compare = {"reference": "baseline", "memory": False}
    config.audit = {
        "usual": "baseline",
        "secured": "secured" if given["classifier"] else "gen_af",
        "stage": "pilot",
        "answers": None,
        "policy": None,
        "lock": None,
    }
    return config
