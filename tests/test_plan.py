"""Law 0: what a config gets wrong is refused by `plan`, by the entry's name, with near names.

Every entry of every config that ships is spoiled in every way that its kind can be.  The entries
come from the configs themselves, so a new entry is held to the law without a line here.
"""

import copy
import functools
import importlib
import json
import math
import re
import typing

import jax
import pytest
import tiny

from robust_ssl import data, experiment, load_encoder, models, recipes, settings, weights
from robust_ssl.build import near
from robust_ssl.cli import main

PLANNING = importlib.import_module("robust_ssl.experiment.plan")  # the function has its name
CONFIGS = {
    "quickstart": "quickstart.py",
    "gen_af": "gen_af.py",
    "score": "score.py",
    "pretrain": "pretrain.py",
    "analyze": "analyze.py",
    "compare": "compare.py:scale=small",
}
# The longest last: what others have too is spoiled there.
ALL = [*CONFIGS, "resizing", "all of quickstart", "all of compare"]
# The user gives names here: to recipes, losses, attacks, classifiers.  Any name is right.
NAMED_BY_THE_USER = re.compile(
    r"config\.(recipes|classifiers|suite\.attacks|screening\.detectors|scoring\.per_image\.attacks"
    r"|recipes\.[^.]+\.losses)\.[^.]+"
)
# Texts that are free, or are looked up where the data are read.
FREE_TEXTS = re.compile(
    r".*\.(source|data_dir|train_split|test_split)|config\.pretrain\.encoder\.name"
    r"|config\.classifiers\.[^.]+\.path|config\.compare\.claims\[0\]\.of"
)
# None says: no limit, no such part, or as the rest of the run.
# What has a name of its own is left out by None; others may then miss it.
NAMED = re.compile(r"config\.(recipes|classifiers)\.[^.]+|.*\.(attacks|losses|detectors)\.[^.]+")
NONE_MEANS = re.compile(
    r".*\.(image_size|resizing|train_limit|test_limit|data_dir|memory_limit|num_classes|start|encoder"
    r"|preprocess|select|adv_ratio|attack|augment|patience|best|tolerance|threat|layer"
    r"|loop_on_device|ramp|teacher|stairs|images|side|crop)|config\.(sweep|scoring\.autoattack\.images)|config\.pretrain\.encoder\.name"
    r"|.*\.fit\.(num_steps|batch_size)|.*\.step_size|config\.screening\.(adaptive|model|public)"
    r"|config\.screening\.adaptive\.epsilon"
)
# 0 is a number like others (seeds, places), or what leaves a part out.
ZERO_MEANS = re.compile(
    r".*\.(seed|seeds|target|layer|epochs|prune|l2_sp|weight_decay|weight|adv_ratio|tolerance"
    r"|clean_share|momentum|max_clean_loss|queue_size|low|epsilon|curve|budgets|edges|rates"
    r"|warmup_epochs|min_scale|freeze|layers|ema|noise|smoothing|margin|seen|ramp\.(start|end)|workers|fill|universal_steps)(\[\d+\])*(\..*)?"
)
# Counted from either end; how many layers an encoder has is known when a step is traced.
NEGATIVE_MEANS = re.compile(r".*\.(layer|layers\[\d+\])")
# A sweep tries what is out of range, names it and leaves it out; the other points go on.
TRIED = re.compile(r"config\.sweep\.grid\[\d+\]\[1\]\[\d+\]")
SHARES = re.compile(
    r".*\.(adv_ratio|tolerance|clean_share|momentum|max_clean_loss|prune|validation|reach|decay"
    r"|epsilon|curve|budgets|step_size|min_scale|final_momentum|ema|smoothing|margin|ramp\.start"
    r"|ramp\.end)(\[\d+\])?"
)


RESIZING = {
    "mode": "shorter", "side": 40, "crop": 32, "interpolation": "bicubic", "offset": "down",
    "fill": [0, 0, 0], "sized": "keep",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classifier that was made elsewhere."""
    folder = tmp_path_factory.mktemp("classifiers") / "secured"
    classifier = models.classifier(jax.random.key(0), load_encoder("byol-cifar10-r18w16"), 4)
    weights.save_classifier(classifier, folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(saved):
    """Configs by name as plain JSON; the completed ones are what a plan says of itself."""
    files = dict(CONFIGS, score=f"score.py:scale=small,classifier={saved}")
    plain = {
        name: settings.to_json(settings.load_config(f"{tiny.CONFIGS}/{file}"))
        for name, file in files.items()
    }
    # No config that ships resizes in its own way.
    plain["resizing"] = {
        "stages": ["pretrain"],
        "pretrain": {
            "encoder": plain["pretrain"]["pretrain"]["encoder"],
            "method": "robust_ssl.pretraining:SimCLR",
            "epochs": 1,
            "data": {"source": "./photos", "image_size": 32, "resizing": RESIZING},
        },
    }
    completed = {f"all of {n}": experiment.plan(plain[n]).text for n in ("quickstart", "compare")}
    return plain | json.loads(json.dumps(completed))


@pytest.fixture(autouse=True)
def nothing_is_read_or_written(monkeypatch, tmp_path):
    """Encoders and annotations are read once for all tests; data never; nothing is left behind."""
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("data were read"))
    monkeypatch.setattr(PLANNING, "_shape", _shape_once)
    monkeypatch.setattr(typing, "get_type_hints", _hints_once)
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


_hints_once = functools.cache(typing.get_type_hints)
_shape_of = PLANNING._shape
_shapes = {}


def _shape_once(source):
    name = json.dumps(source.text, sort_keys=True)
    if name not in _shapes:
        _shapes[name] = _shape_of(source)
    return _shapes[name]


# --- Every place of a config --------------------------------------------------------------------


def places(node, path=()):
    """Yields the path of every entry, and of every item of a list."""
    inner = node.items() if isinstance(node, dict) else enumerate(node)
    for part, value in inner:
        yield (*path, part), value
        if isinstance(value, dict | list):
            yield from places(value, (*path, part))


def name_of(path):
    """The name that an error gives an entry: ``config.suite.curve[0]``."""
    return "config" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)


def spoiled(text, path, value):
    """A copy with another value at a place."""
    text = copy.deepcopy(text)
    at(text, path[:-1])[path[-1]] = value
    return text


def renamed(text, path, key):
    """A copy in which an entry has another key."""
    text = copy.deepcopy(text)
    node = at(text, path[:-1])
    pairs = [(key if name == path[-1] else name, value) for name, value in node.items()]
    node.clear()
    node.update(pairs)
    return text


def at(text, path):
    return functools.reduce(lambda node, part: node[part], path, text)


def misspelt(word):
    """A letter less, a letter more, another letter."""
    middle = len(word) // 2
    letter = "z" if word[middle : middle + 1] == "q" else "q"
    return (
        word[:middle] + word[middle + 1 :],
        word[:middle] + letter + word[middle:],
        word[:middle] + letter + word[middle + 1 :],
    )


@pytest.fixture(scope="module")
def distinct(texts):
    """Places by config, each once: of entries that recipes or configs have alike, the first."""
    known, entries = set(), {config: [] for config in ALL}
    for config in ALL:
        for path, value in places(texts[config]):
            where = name_of(path)
            like = re.sub(r"^config\.recipes\.[^.]+\.", "config.recipes.*.", where)
            token = (like, json.dumps(value, sort_keys=True))
            if token not in known:
                known.add(token)
                entries[config].append((path, where, value))
    return entries


def by_turns(config, number, ways):
    """The ways to spoil an entry; of the longest config one or two of them, others each time."""
    if "compare" not in config:
        return ways
    return [way for place, way in enumerate(ways) if (place + number) % 3 == 0]


def answer(text):
    """What `plan` says of a text; None where it accepts it."""
    try:
        experiment.plan(text)
    except experiment.UsageError as error:
        return str(error)
    except Exception as error:
        return f"RAISED {type(error).__name__}: {error}"
    return None


def names_entry(said, text, path):
    """Whether an answer names an entry; of a recipe that a function makes, the entry it became."""
    where = name_of(path)
    if where in said:
        return True
    made = path[0] == "recipes" and isinstance(at(text, path[:2]), dict | str)
    by_function = made and "function" in at(text, path[:2])
    names = [str(part) for part in path if isinstance(part, str)]
    return bool(by_function and name_of(path[:2]) in said and names[-1] in said)


def refusals(text, changes):
    """Returns the changes that are not refused as they should be, each with what was said."""
    wrong = []
    for path, changed, words, what in changes:
        said = answer(changed)
        if said is None or said.startswith("RAISED") or not all(w in said for w in words):
            wrong.append(f"{name_of(path)}: {what}: {said}")
        elif not words and not names_entry(said, text, path):
            wrong.append(f"{name_of(path)}: {what}: not named: {said}")
    return wrong


@pytest.mark.parametrize("config", ALL)
def test_the_text_of_a_plan_is_a_config_of_the_same_plan(config, texts):
    planned = experiment.plan(texts[config])
    again = experiment.plan(json.loads(json.dumps(planned.text)))
    assert again.text == planned.text


@pytest.mark.parametrize("config", ALL)
def test_a_misspelt_key_is_refused(config, texts, distinct):
    text = texts[config]

    def changes():
        for number, (path, where, _) in enumerate(distinct[config]):
            key = path[-1]
            if isinstance(key, int) or NAMED_BY_THE_USER.fullmatch(where):
                continue
            for wrong in by_turns(config, number, misspelt(key)):
                hint = [key.removesuffix("/**")] if near(wrong, [key]).startswith("; did") else []
                yield path, renamed(text, path, wrong), [wrong, *hint], f"called {wrong!r}"

    assert refusals(text, changes()) == []


def of_other_kinds(value):
    """Values that no entry may have where it has this one."""
    if isinstance(value, bool):
        return ["yes", 2, 0.5, {"a": 1}, [value], None]
    if isinstance(value, int | float):
        return ["some", {"a": 1}, [value], None, True]
    if isinstance(value, str):
        return [3, 0.5, {"a": 1}, [value], True, None]
    if isinstance(value, list):
        return [3, "some", {"a": 1}, True, None]
    if isinstance(value, dict):
        return [3, ["some"], "some", True, None]
    return [{"nonsense": 1}, ["some"]]


def is_valid_otherwise(where, value, other):
    """Whether an entry has other kinds of values, or what is tried is right by chance."""
    last = where.rpartition(".")[2]
    if other is None:
        return (NONE_MEANS.fullmatch(where) or NAMED.fullmatch(where)) is not None
    if re.fullmatch(r"layer|layers(\[\d+\])?", last) and isinstance(other, str | int):
        return not isinstance(other, bool)  # a layer has a place, and also a name
    if last == "decay" and value == "cosine":
        return other == 0.5
    if FREE_TEXTS.fullmatch(where):
        return isinstance(other, str)
    data_or_encoder = last in ("surrogate", "downstream", "data", "encoder")
    if data_or_encoder and other == "some":  # a data set's name; of an encoder it is checked
        return last != "encoder"
    if "config.rates" in where or re.fullmatch(r".*\.rates\.[^.]+", where):
        return isinstance(other, float | int) and not isinstance(other, bool)
    return False


@pytest.mark.parametrize("config", ALL)
def test_another_kind_of_value_is_refused(config, texts, distinct):
    text = texts[config]

    def changes():
        for number, (path, where, value) in enumerate(distinct[config]):
            for other in by_turns(config, number, of_other_kinds(value)):
                if not is_valid_otherwise(where, value, other):
                    yield path, spoiled(text, path, other), [], f"is {other!r}"

    assert refusals(text, changes()) == []


def out_of_range(where, value):
    """Numbers that an entry cannot be."""
    yield from (math.nan, math.inf, -math.inf)
    if TRIED.fullmatch(where):
        return
    if not NEGATIVE_MEANS.fullmatch(where):
        yield -1 if isinstance(value, int) else -0.5
    if not ZERO_MEANS.fullmatch(where):
        yield 0 if isinstance(value, int) else 0.0
    if SHARES.fullmatch(where):
        yield 1.5
    if isinstance(value, int):
        yield 2.5


@pytest.mark.parametrize("config", ALL)
def test_a_number_out_of_range_is_refused(config, texts, distinct):
    text = texts[config]

    def changes():
        for path, where, value in distinct[config]:
            if isinstance(value, int | float) and not isinstance(value, bool):
                for number in out_of_range(where, value):
                    yield path, spoiled(text, path, number), [], f"is {number}"

    assert refusals(text, changes()) == []


@pytest.mark.parametrize("config", ALL)
def test_a_misspelt_word_is_refused_with_near_ones(config, texts, distinct):
    text = texts[config]

    def changes():
        for number, (path, where, value) in enumerate(distinct[config]):
            if not isinstance(value, str) or FREE_TEXTS.fullmatch(where):
                continue
            module, colon, word = value.rpartition(":")
            # A letter less of one recipe's name is another's.
            misspellings = [wrong for wrong in misspelt(word) if wrong not in recipes.__all__]
            wrong_words = [module + colon + wrong for wrong in misspellings]
            for wrong in by_turns(config, number, wrong_words):
                hint = [word] if near(wrong, [word]).startswith("; did") else []
                yield path, spoiled(text, path, wrong), [wrong, *hint], f"is {wrong!r}"
            if colon:
                wrong = f"{misspelt(module)[number % 3]}:{word}"
                yield path, spoiled(text, path, wrong), [wrong, module], f"is {wrong!r}"

    assert refusals(text, changes()) == []


# --- What is wrong between entries --------------------------------------------------------------

PGD = {"function": "robust_ssl.attacks:PGD", "epsilon": 8 / 255}
CLAIM = {"more": "gen_af", "than": "baseline", "by": "clean"}
CASES = {
    # Entries of an earlier version, and misspelt ones, by the names they have now.
    "an epoch": ({"recipes.baseline.epoch": 3}, ["'epoch' in config.recipes.baseline", "'epochs'"]),
    "a best epoch": ({"recipes.baseline.best": "nonsense"}, ["config.recipes.baseline.best"]),
    "epsilons": ({"suite.epsilons": [0.1]}, ["'epsilons' in config.suite", "'epsilon'"]),
    "a topk": (
        {"recipes.gen_af.select": {"topk": 3}},
        ["'topk' in config.recipes.gen_af.select", "layers"],
    ),
    "a section": ({"trainin": {}}, ["'trainin' in config", "'training'"]),
    "a section of before": ({"finetuen": {}}, ["'finetuen' in config", "known: stages"]),
    "an objective of the suite": (
        {
            "suite.attacks.universal_pgd": {
                "function": "robust_ssl.attacks:UniversalPGD",
                "objective": "robust_ssl.objectives:feature_l3",
            }
        },
        ["config.suite.attacks.universal_pgd.objective", "feature_l2"],
    ),
    "an objective that is no function": (
        {"recipes.gen_af_stage1.attack": {**PGD, "objective": "cross_entropy"}},
        ["config.recipes.gen_af_stage1.attack.objective", '"module:function"'],
    ),
    "an objective of scoring": (
        {
            "scoring.per_image": {
                "attacks": {
                    "pgd": {
                        "function": "robust_ssl.attacks:PGD",
                        "objective": "robust_ssl.objectives:cros_entropy",
                    }
                }
            }
        },
        ["config.scoring.per_image.attacks.pgd.objective", "cross_entropy"],
    ),
    "an objective of training": (
        {"recipes.gen_af_stage1.attack": {**PGD, "objective": "robust_ssl.objectives:kl_diverg"}},
        ["config.recipes.gen_af_stage1.attack.objective", "kl_divergence"],
    ),
    # Names.
    "one name to a disk": ({"recipes.Gen_AF": {}}, ["config.recipes.Gen_AF", "one name to a disk"]),
    "a stage's name": ({"recipes.score": {}}, ["config.recipes.score", "stage's name"]),
    "a seed's name": ({"recipes.mine-seed1": {}}, ["config.recipes.mine-seed1", "-seed1"]),
    "a name that is a path": ({"recipes": {"a/b": {}}}, ["config.recipes: 'a/b'"]),
    # What recipes are made from.
    "a start that is not there": (
        {"recipes.mine": {"start": "baselin"}},
        ["config.recipes.mine.start", "'baselin'", "'baseline'"],
    ),
    "a member that is not there": (
        {"recipes.mine": {"members": ["baselin", "gen_af"]}},
        ["config.recipes.mine.members", "'baselin'", "'baseline'"],
    ),
    "a circle": (
        {"recipes.a": {"start": "b"}, "recipes.b": {"start": "a"}},
        ["config.recipes: recipes start from each other: a <- b <- a"],
    ),
    "a start from an ensemble": (
        {
            "recipes.both": {"members": ["baseline", "gen_af"]},
            "recipes.mine": {"start": "both"},
        },
        ["config.recipes.mine.start", "'both' is an ensemble"],
    ),
    "an ensemble of one": (
        {"recipes.mine": {"members": ["baseline"]}},
        ["config.recipes.mine", "at least two recipes"],
    ),
    "a head of its own after a start": (
        {"recipes.mine": {"start": "baseline", "head": "linear"}},
        ["config.recipes.mine has both 'start' and 'head'"],
    ),
    "rates of chosen layers": (
        {"recipes.gen_af.rates": {"**": 1e-3}},
        ["config.recipes.gen_af has both 'select' and 'rates'"],
    ),
    "a training of an ensemble": (
        {"recipes.mine": {"members": ["baseline", "gen_af"], "epochs": 3}},
        ["config.recipes.mine has both 'members' and 'epochs'"],
    ),
    # What excludes each other.
    "best without an attack": (
        {"recipes.baseline.best": "robust"},
        ["config.recipes.baseline", "needs an attack"],
    ),
    "images that were seen of a part": (
        {"downstream.test_limit": 300, "compare.claims": [{**CLAIM, "seen": 100}]},
        ["config.compare.claims[0]", "seen=100", "leave test_limit out"],
    ),
    "patience without a judge": (
        {"recipes.baseline.best": "last", "recipes.baseline.patience": 2},
        ["config.recipes.baseline", "patience=2"],
    ),
    "statistics of no attack": (
        {"recipes.baseline.batch_statistics": "adversarial"},
        ["config.recipes.baseline", "needs an attack"],
    ),
    "no losses": ({"recipes.baseline.losses": {}}, ["config.recipes.baseline", "losses is empty"]),
    "more layers than there are": (
        {"recipes.gen_af.select": {"layers": 1000}},
        ["config.recipes.gen_af.select", "1000"],
    ),
    "a path and a function": (
        {"encoder": {"path": "simclr-cifar10-r18w24", "function": "tiny:encoder"}},
        ["config.encoder has a path and also a function"],
    ),
    "a layer without a rate": (
        {"recipes.baseline.rates": {"encoder/**": "freeze"}},
        ["config.recipes.baseline.rates", "no label covers head/"],
    ),
    "an attack without a budget": (
        {"recipes.gen_af_stage1.attack": {"function": "robust_ssl.attacks:PGD"}},
        ['config.recipes.gen_af_stage1.attack needs an "epsilon"'],
    ),
    "a validation that fits a pool": (
        {
            "training.validation": {
                "function": "robust_ssl.finetuning:UniversalPool",
                "epsilon": 0.1,
            }
        },
        ["config.training", "single images with num_steps"],
    ),
    "a threat that cannot be saved": (
        {
            "suite.attacks.universal_pgd": {
                "function": "robust_ssl.attacks:UniversalPGD",
                "threat": "test_plan:unsaveable",
            }
        },
        ["config.suite.attacks.universal_pgd", "cannot be saved"],
    ),
    "no pixel units": (
        {
            "suite.attacks.universal_pgd": {
                "function": "robust_ssl.attacks:UniversalPGD",
                "threat": "robust_ssl.threats:Patch",
            }
        },
        ["config.suite.attacks.universal_pgd", "give the attack an epsilon of its own"],
    ),
    "AutoAttack in a band": (
        {
            "scoring.autoattack": {
                "budgets": [
                    {
                        "epsilon": 0.1,
                        "threat": {
                            "function": "robust_ssl.threats:Band",
                            "threat": "robust_ssl.threats:Linf",
                            "high": 0.2,
                        },
                    }
                ]
            }
        },
        ["config.scoring.autoattack", "AutoAttack is for Linf and L2"],
    ),
    "a budget of AutoAttack twice": (
        {"scoring.autoattack": {"budgets": [0.1, 0.1]}},
        ["config.scoring.autoattack", "none twice"],
    ),
    "a curve of an attack with labels": (
        {
            "scoring.labelled": {
                "attacks": {"universal": "robust_ssl.attacks:UniversalPGD"},
                "curve": [0.1],
            }
        },
        ["config.scoring: labelled.attacks.universal has a curve", "leave the curve out"],
    ),
    "two budgets of one name": (
        {"suite.curve": [0.0941]},
        ["config.suite.attacks.advencoder", "eps24", "leave one"],
    ),
    "only noise": (
        {"suite.attacks": {"random_noise": "robust_ssl.attacks:RandomNoise"}},
        ["config.suite.attacks has only noise"],
    ),
    "two batch sizes": (
        {"recipes.gen_af_stage1.batch_size": 16},
        ["one batch size", "gen_af_stage1 16"],
    ),
    "a reference without training": (
        {"recipes.still": {"epochs": 0}, "compare.reference": "still"},
        ["config.compare.reference is 'still'", "nothing is trained"],
    ),
    "no adaptive suite": ({"scoring.adaptive": False}, ["config.scoring.adaptive must be true"]),
    "a seed twice": ({"training.seeds": [1, 1]}, ["config.training", "none twice"]),
    "no stage": ({"stages": []}, ["config.stages is empty"]),
    "a stage without its section": ({"suite": None}, ["'attack' needs config.suite"]),
    "a warm-up to the end": (
        {
            "pretrain": {
                "data": "cifar10",
                "encoder": "robust_ssl.models:resnet18",
                "method": "robust_ssl.pretraining:SimCLR",
                "epochs": 2,
                "warmup_epochs": 2,
            }
        },
        ["config.pretrain", "warmup_epochs=2"],
    ),
}


class Unsaveable:
    """A threat whose fields nobody knows."""

    def __init__(self, epsilon):
        self.epsilon = epsilon

    def sample(self, key, image):
        return image

    def project(self, candidate, image):
        return image

    def steepest(self, gradient):
        return gradient


def unsaveable(epsilon):
    return Unsaveable(epsilon)


def with_entries(text, changes):
    """A copy with other entries at dotted places; a recipe by its bare name becomes a mapping."""
    text = copy.deepcopy(text)
    for name, value in changes.items():
        *parents, last = name.split(".")
        node = text
        for part in parents:
            if isinstance(node.setdefault(part, {}), str):
                node[part] = {"function": node[part]}
            node = node[part]
        node[last] = value
    return text


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_is_refused(case, texts):
    changes, words = CASES[case]
    said = answer(with_entries(texts["quickstart"], changes))
    assert said is not None and not said.startswith("RAISED")
    for word in words:
        assert word in said, said


def test_a_recipe_and_a_classifier_of_one_name_are_refused(texts, saved):
    said = answer(with_entries(texts["quickstart"], {"classifiers.Baseline": saved}))
    assert "config.classifiers.Baseline and config.recipes.baseline are one name" in said


@pytest.mark.parametrize("override", ["--config.recipes.baseline.epoch=3", "--config.seed=2.5"])
def test_describe_refuses_what_a_run_refuses(override, capsys):
    arguments = ["describe", f"--config={tiny.CONFIGS}/quickstart.py", override]
    assert main.main(arguments) == main.USAGE
    printed = capsys.readouterr()
    assert "robust-ssl: error: " in printed.err and "config." in printed.err and not printed.out


def test_a_plan_compiles_nothing(texts, compiled_programs):
    experiment.plan(texts["compare"])
    compiled_programs.clear()
    experiment.plan(texts["compare"])
    assert not compiled_programs
