"""The one pipeline gives what the two before it gave, but for rounding, on the tiny models.

The numbers in ``golden/`` were written by commit fd5d2b4, in which Gen-AF had stages of its own and
recipes had another pipeline.  Random keys come from the names of stages; so those are called here
what they were called then.  They agree bit for bit on the processor that they were written on;
another one adds in another order, and is 1e-7 away.
"""

import json
import pathlib
import zlib

import pytest
import tiny
import tiny_recipes
from tiny_recipes import FROZEN, PGD_AT, SMOOTH, UNIVERSAL, go, manifest

from robust_ssl import report
from robust_ssl.data import batches

# The numbers are of these settings of the compiler.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_programs")]

GOLDEN = pathlib.Path(__file__).parent / "golden"
GEN_AF = {
    "recipes/baseline-seed0": "usual",
    "recipes/gen_af_stage1-seed0": "stage1",
    "recipes/gen_af-seed0": "stage2",
    "recipes/gen_af-seed0-layers": "sensitivity",
    "score": "evaluate",
}
RIFT = {
    "start": "pgd_at",
    "select": {"images": 16, "num_steps": 1, "layers": 1, "rate": 1e-2},
    "batch_statistics": "frozen",
    "tolerance": 0.01,
}
RECIPES = {
    "baseline": FROZEN,
    "full": {},
    "pgd_at": PGD_AT,
    "universal": UNIVERSAL,
    "smoothed": SMOOTH,
    "rift": RIFT,
    "ensemble": {"members": ("baseline", "pgd_at")},
}


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture
def renamed():
    """Stages have the keys of what they were called, and weights the bits."""
    tiny._variables.cache_clear()  # another test's may be of an optimized program
    names, crc32 = {}, zlib.crc32

    def as_before(data, *start):
        name = data.decode(errors="ignore") if len(data) < 80 else ""
        if name in names:
            data = names[name].encode()
        elif "recipes" in names and name.startswith("recipes/"):
            name = name.replace("recipes/baseline-", "methods/usual-")
            data = name.replace("recipes/", "methods/").encode()
        return crc32(data, *start)

    # Orders are kept by a stage's name: neither those of other tests nor ours are for the other.
    forget = batches._epoch_order.cache_clear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zlib, "crc32", as_before)
        forget()
        yield names
        forget()


def entries_of(results, models):
    """Entries by what they say was attacked how, with what came out."""
    where = ("attack", "seed", "family", "threat", "crafted_against", "epsilon")
    what = ("n", "clean_accuracy", "robust_accuracy", "attack_success_rate", "fooling_rate")
    return {
        (models.get(entry["model"], entry["model"]), *(entry[name] for name in where)): [
            entry[name] for name in (*what, "gradient_evaluations")
        ]
        for entry in results
    }


def near(value):
    """`value`, in which every float stands for those that rounding cannot tell from it."""
    if isinstance(value, dict):
        return {name: near(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [near(entry) for entry in value]
    return pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value


def metrics(workdir, stage):
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_training(workdir, stage, before):
    kept = manifest(workdir, stage)
    assert metrics(workdir, stage) == near(before["metrics"]), stage
    for name, value in before["results"].items():
        if name == "curve":  # of the guard, which measures no more mixtures than it needs since
            value = [point for point in value if near(point) in kept["results"][name]]
            assert value, stage
        assert kept["results"][name] == near(value), (stage, name)


def test_gen_af_is_what_its_own_stages_gave(renamed, tmp_path):
    renamed.update(GEN_AF)
    go(tiny.config(), tmp_path)
    before = golden("gen_af")
    for stage in ("baseline", "gen_af_stage1", "gen_af"):
        directory = f"recipes/{stage}-seed0"
        assert_same_training(tmp_path, directory, before["stages"][GEN_AF[directory]])
    layers = manifest(tmp_path, "recipes/gen_af-seed0-layers")["results"]
    assert layers == near(before["stages"]["sensitivity"]["results"])
    names = {f"{name}-seed0": GEN_AF[f"recipes/{name}-seed0"] for name in GEN_AF_MODELS}
    ours = entries_of(report.results.read(tmp_path / "results.json")["results"], names)
    theirs = entries_of(before["results"], {})
    assert theirs.keys() <= ours.keys()
    assert {key: ours[key] for key in theirs} == near(theirs)


GEN_AF_MODELS = ("baseline", "gen_af_stage1", "gen_af")


def test_a_comparison_is_what_it_was(renamed, tmp_path):
    renamed.update({"recipes": "methods", "score": "evaluate"})
    config = tiny_recipes.config(RECIPES, "attack", "train", "score", "compare")
    with config.unlocked():
        config.common.best = "highest"  # the rule of then
    results = go(config, tmp_path)
    before = golden("compare")
    for name in RECIPES:
        was = "usual" if name == "baseline" else name
        if RECIPES[name].get("epochs") != 0 and "members" not in RECIPES[name]:
            theirs = before["stages"][f"{was}-seed0"]
            assert_same_training(tmp_path, f"recipes/{name}-seed0", theirs)
    ours = report.results.read(tmp_path / "results.json")["results"]
    entries = entries_of(ours, {"baseline-seed0": "usual-seed0"})
    assert entries == near(entries_of(before["results"], {}))
    rows = {row["recipe"]: row for row in results["compare"]["rows"]}
    for row in before["rows"]:
        name = "baseline" if row["method"] == "usual" else row["method"]
        for share, value in row.items():
            if share not in ("method", "verdict"):
                assert rows[name][share] == near(value), (name, share)
