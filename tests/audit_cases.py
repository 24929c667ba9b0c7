"""What an audit may have measured, as small documents, and answers that go with it."""

import base64
import copy

from robust_ssl.audit import document, lines
from robust_ssl.audit.answers import AMOUNTS

# The smallest PNG: one gray pixel.
PNG = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
        "0000000a49444154789c6368000000820081777c0a8f0000000049454e44ae426082"
    )
).decode()
NAMES = (
    *("finite_logits", "deterministic", "gives_logits", "gradient_not_zero"),
    *("converged", "beats_noise", "enough_images"),
)


def share(value, n=2000, half=0.02):
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}


def attacked(accuracy, success):
    return {
        "accuracy": share(accuracy),
        "success": share(success),
        "public": share(accuracy),
        "adaptive": share(accuracy),
        "per_image": share(accuracy / 2),
    }


def verdict(trusted=True):
    status = "passed" if trusted else "failed"
    checks = [
        {"name": name, "title": name, "number": n, "status": "passed", "value": 0.0, "limit": 0.1}
        for n, name in enumerate(NAMES, 1)
    ]
    checks[3]["status"] = status
    word = "believable" if trusted else "not believable"
    return {"verdict": word, "trusted": trusted, "images": 32, "checks": checks}


def provenance(failed=()):
    outcomes = ["fail" if n in failed else "pass" for n in range(1, 11)]
    checks = [
        {"number": n, "name": f"check{n}", "outcome": o, "said": "as it should be", "evidence": {}}
        for n, o in enumerate(outcomes, 1)
    ]
    return {"checks": checks, "passed": 10 - len(failed), "failed": len(failed), "absent": 0}


def _rows():
    return [
        {
            "role": role,
            "attack": attack,
            "family": family,
            "threat": "Linf",
            "crafted_against": against,
            "epsilon": epsilon,
            "accuracy": share(accuracy / divided),
            "success": share(0.95 - accuracy / divided),
        }
        for role, accuracy in (("usual", 0.4), ("secured", 0.9))
        for attack, family, against, epsilon, divided in (
            ("advencoder", "universal", "public", 8 / 255, 1),
            ("worst", "universal", "public", 8 / 255, 1),
            ("pgd", "per_image", "hardened", 2 / 255, 2),
        )
    ]


def _curve(accuracy):
    points = ((0.0, 0.95), (4 / 255, (0.95 + accuracy) / 2), (8 / 255, accuracy))
    return [{"epsilon": epsilon, "accuracy": share(value)} for epsilon, value in points]


TRADE_OFF = (("baseline", 0.95, 0.4, 1.0), ("gen_af", 0.94, 0.9, 10.0))
MEASURED = {
    "date": "2026-11-28",
    "encoder": {"name": "an-encoder", "fingerprint": "0123456789abcdef"},
    "data": {
        **{"name": "parts", "train": 1500, "validation": 200, "test": 2000, "classes": 3},
        **{"test_among_train": 0, "test_distinct": 2000},
        **{"surrogate": "photo_crops", "surrogate_images": 5000},
        "largest_class": share(0.4),
    },
    "epsilon": 8 / 255,
    "models": {
        "usual": {"name": "baseline-seed0", "recipe": "baseline"},
        "secured": {"name": "gen_af-seed0", "recipe": "gen_af"},
    },
    "clean": {
        "usual": share(0.95),
        "secured": share(0.94),
        "loss": {"value": 0.01, "low": 0.002, "high": 0.018, "n": 2000},
    },
    "attacked": {"usual": attacked(0.4, 0.58), "secured": attacked(0.9, 0.04)},
    "rows": _rows(),
    "curve": {"usual": _curve(0.4), "secured": _curve(0.9)},
    "trade_off": [
        {
            "recipe": recipe,
            "clean": clean,
            "robust": robust,
            "cost_factor": cost,
            "trusted": True,
            "chosen": recipe == "gen_af",
        }
        for recipe, clean, robust, cost in TRADE_OFF
    ],
    "layers": {
        role: [{"layer": f"block{n}", "drift": n * size} for n in (1, 2, 3)]
        for role, size in (("usual", 0.2), ("secured", 0.03))
    },
    "bands": [
        {"low": 0.0, "high": 0.25, "share": 0.7},
        {"low": 0.25, "high": 0.71, "share": 0.3},
    ],
    "cost": {
        "usual": {"training_seconds": 360.0, "seconds_per_image": 0.001},
        "secured": {"training_seconds": 3960.0, "seconds_per_image": 0.001},
        "factor": 10.0,
        "extra_training_seconds": 3600.0,
        "inference_ratio": 1.0,
        "same_network": True,
    },
    "trust": {"usual": verdict(), "secured": verdict()},
    "examples": [
        {
            **dict.fromkeys(("clean", "attacked", "change"), PNG),
            "said_clean": "ねじ",
            "said_attacked": "<b>nut</b>",
        }
    ],
    "provenance": provenance(),
    "screening": None,
    "inspection": {"model": "recipes/gen_af-seed0", "baseline": "baseline"},
    "made": {
        "results_sha256": None,
        "versions": {"robust-ssl": "0.2.0", "jax": "0.10"},
        "devices": {"platform": "cpu", "count": 2},
        "seed": 0,
        "command": "robust-ssl audit run --workdir=runs/audit",
    },
}


def measured(**sections):
    """What was measured, with some sections replaced."""
    return {**copy.deepcopy(MEASURED), **sections}


def sealed(**sections):
    return document.sealed(measured(**sections))


def untrusted():
    return sealed(trust={"usual": verdict(), "secured": verdict(False)})


AMOUNT = {
    "decisions_per_year": "{low: 900000, likely: 1000000, high: 1200000}",
    "attacked_share": "[0.0001, 0.001, 0.002]",
    "loss_per_error": "{low: 1000, likely: 2000, high: 5000}",
    "loss_per_clean_error": "10",
    "one_off_cost": "{low: 100000, likely: 200000, high: 400000}",
    "compute_price_per_hour": "500",
    "retrainings_per_year": "4",
    "inference_price_per_1000": "2",
}
assert set(AMOUNT) == set(AMOUNTS)


def answers_text(currency="JPY", tail="", **amounts):
    entries = {**AMOUNT, **amounts}
    rows = [f"  {name}: {value}" for name, value in entries.items() if value is not None]
    return "\n".join(["business:", f"  currency: {currency}", *rows, tail])


def entry(text):
    return lines.parse(text, "answers.yaml")
