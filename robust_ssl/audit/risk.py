r"""What securing is worth in a year: losses before and after, costs, and where the answer turns.

An attacked decision that would have been right becomes wrong with the attack's success rate; a
decision that is wrong anyway costs what a clean error costs.  With :math:`N` decisions a year of
which a share :math:`a` is attacked, clean accuracy :math:`c`, success rate :math:`s`, and losses
:math:`L` of an error that an attacker causes and :math:`C` of any other:

.. math:: \mathrm{loss} = N\,(a\,c\,s\,L + (1 - c)\,C)

Amounts are drawn from their triangles, rates from what the counted images allow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_ssl.audit.answers import AMOUNTS, Triangle

DRAWS = 20_000
SEED = 0
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
RATES = ("success_before", "success_after", "clean_before", "clean_after")
SECONDS_PER_HOUR = 3600
Values = Mapping[str, Any]  # by name, numbers or arrays of draws


@dataclasses.dataclass(frozen=True)
class Rates:
    """What was measured of the usual and the secured classifier, each ``(share, images)``.

    Attributes:
      success_before: Attack success rate on the usual classifier, among images it gets right.
      success_after: The same on the secured one.
      clean_before: Clean accuracy of the usual classifier.
      clean_after: That of the secured one.
      extra_training_hours: Training the secured one takes so much longer, each time; may be 0.
      inference_ratio: Time of its inference over that of the usual one.
    """

    success_before: tuple[float, int]
    success_after: tuple[float, int]
    clean_before: tuple[float, int]
    clean_after: tuple[float, int]
    extra_training_hours: float
    inference_ratio: float = 1.0

    @property
    def measured(self) -> dict[str, float]:
        """The shares as they were measured."""
        return {name: getattr(self, name)[0] for name in RATES}


def draws(triangle: Triangle, generator: np.random.Generator, n: int = DRAWS) -> np.ndarray:
    """Draws amounts ``[n]`` from a triangle; a certain one is that number."""
    if triangle.low == triangle.high:
        return np.full(n, triangle.low)
    return generator.triangular(triangle.low, triangle.likely, triangle.high, n)


def share_draws(
    share: float, images: int, generator: np.random.Generator, n: int = DRAWS
) -> np.ndarray:
    """Draws shares ``[n]`` that a count of images is compatible with (Jeffreys' posterior)."""
    right = share * images
    return generator.beta(right + 0.5, images - right + 0.5, n)


def yearly(values: Values, rates: Rates) -> dict[str, Any]:
    """Computes a year from amounts and shares, numbers or draws alike.

    Args:
      values: By name, the amounts of `answers.AMOUNTS` and the shares of `RATES`.
      rates: For what securing costs in hours and in inference.

    Returns:
      ``loss_before`` and ``loss_after``, their difference ``gain``, ``investment`` (once: one
      training and the one-off cost), ``running`` (each year: training again, slower inference),
      ``cost`` (the two together), and ``net``, the first year's gain less its cost.

    Example:
      >>> values = {"decisions_per_year": 1000, "attacked_share": 0.1, "loss_per_error": 50,
      ...           "loss_per_clean_error": 10, "one_off_cost": 100, "retrainings_per_year": 2,
      ...           "compute_price_per_hour": 3, "inference_price_per_1000": 0,
      ...           "success_before": 0.5, "success_after": 0.1, "clean_before": 1.0,
      ...           "clean_after": 1.0}
      >>> year = yearly(values, Rates((0.5, 9), (0.1, 9), (1, 9), (1, 9), extra_training_hours=4))
      >>> [round(year[name]) for name in ("loss_before", "loss_after", "investment", "net")]
      [2500, 500, 112, 1864]
    """
    decisions = values["decisions_per_year"]
    loss = {
        when: decisions
        * (
            values["attacked_share"]
            * values[f"clean_{when}"]
            * values[f"success_{when}"]
            * values["loss_per_error"]
            + (1 - values[f"clean_{when}"]) * values["loss_per_clean_error"]
        )
        for when in ("before", "after")
    }
    training = rates.extra_training_hours * values["compute_price_per_hour"]
    slower = rates.inference_ratio - 1
    inference = decisions / 1000 * values["inference_price_per_1000"] * slower
    investment = values["one_off_cost"] + training
    running = values["retrainings_per_year"] * training + inference
    gain, cost = loss["before"] - loss["after"], investment + running
    return {
        "loss_before": loss["before"],
        "loss_after": loss["after"],
        "gain": gain,
        "investment": investment,
        "running": running,
        "cost": cost,
        "net": gain - cost,
    }


def assess(amounts: Mapping[str, Triangle], rates: Rates, seed: int = SEED) -> dict[str, Any]:
    """Computes what the risk section of ``audit.json`` says, in two significant figures.

    Args:
      amounts: All of `answers.AMOUNTS`.
      rates: What was measured.
      seed: Of the draws.

    Returns:
      Quantiles of each figure of `yearly`, break-even, pay-back, tornado, turning points.
    """
    generator = np.random.default_rng(seed)
    values = {name: draws(amounts[name], generator) for name in AMOUNTS}
    values |= {name: share_draws(*getattr(rates, name), generator) for name in RATES}
    year = yearly(values, rates)
    likely = at_likely(amounts, rates)
    net = yearly(likely, rates)["net"]
    pays, share = break_even(likely, rates)
    quantiles = {
        name: {q: round_to_two(float(np.quantile(figure, p))) for q, p in QUANTILES.items()}
        for name, figure in year.items()
    }
    return {
        "draws": DRAWS,
        "seed": seed,
        **quantiles,
        "net_likely": round_to_two(net),
        "worth_it": net > 0,
        # Downwards: a gate is held against it.
        "probability_worth_it": int(np.sum(year["net"] > 0)) * 100 // DRAWS / 100,
        "pays": pays,
        "break_even_share": _rounded(share),
        "payback_months": _rounded(payback_months(yearly(likely, rates))),
        "tornado": tornado(amounts, rates),
        "turns": turning_points(amounts, rates),
    }


def at_likely(amounts: Mapping[str, Triangle], rates: Rates) -> dict[str, float]:
    """Returns every amount at its likely value and every share as measured."""
    return {**{name: amounts[name].likely for name in AMOUNTS}, **rates.measured}


def break_even(values: Values, rates: Rates) -> tuple[str, float | None]:
    """Returns at which shares of attacked decisions securing pays for itself in a year.

    Returns:
      ``"from"`` or ``"below"`` and the share where the answer turns; ``"always"`` and 0 where it
      pays at every share; ``"never"`` and None where it pays at none.

    Example:
      >>> values = {**dict.fromkeys(AMOUNTS, 0.0), "decisions_per_year": 100, "one_off_cost": 10,
      ...           "loss_per_error": 1.0}
      >>> rates = Rates((0.5, 9), (0.3, 9), (1.0, 9), (1.0, 9), extra_training_hours=0)
      >>> break_even({**values, **rates.measured}, rates)
      ('from', 0.5)
    """
    unattacked, attacked = (
        yearly({**values, "attacked_share": share}, rates)["net"] for share in (0.0, 1.0)
    )
    if unattacked > 0 and attacked > 0:
        return "always", 0.0
    if unattacked <= 0 and attacked <= 0:
        return "never", None
    # The net falls with the share where the secured classifier is the easier one to attack.
    word = "from" if attacked > unattacked else "below"
    return word, abs(unattacked) / (abs(unattacked) + abs(attacked))


def payback_months(year: Values) -> float | None:
    """Returns after how many months the gain has paid the investment; None where it never does.

    Example:
      >>> payback_months({"gain": 340.0, "running": 100.0, "investment": 60.0})
      3.0
    """
    saved = year["gain"] - year["running"]
    if year["investment"] <= 0 and saved > 0:
        return 0.0
    return 12 * year["investment"] / saved if saved > 0 else None


def tornado(amounts: Mapping[str, Triangle], rates: Rates) -> list[dict[str, Any]]:
    """Returns the net at each amount's ends with all others likely, what matters most first."""
    likely = at_likely(amounts, rates)
    bars = []
    for name, triangle in amounts.items():
        ends = [
            yearly({**likely, name: end}, rates)["net"] for end in (triangle.low, triangle.high)
        ]
        bars.append({"amount": name, "at_low": ends[0], "at_high": ends[1]})
    bars.sort(key=lambda bar: -abs(bar["at_high"] - bar["at_low"]))
    return [{n: v if n == "amount" else round_to_two(v) for n, v in bar.items()} for bar in bars]


def turning_points(amounts: Mapping[str, Triangle], rates: Rates) -> list[dict[str, Any]]:
    """Returns at which value of each amount the answer turns, all others likely.

    Amounts whose turning point lies within what the company said come first; one that cannot turn
    the answer, at any value that it may have, is left out.
    """
    likely = at_likely(amounts, rates)
    points = []
    for name, triangle in amounts.items():
        value = _root(likely, name, rates)
        if value is None or not 0 < value <= AMOUNTS[name]:
            continue  # below 0 nothing can be
        points.append(
            {
                "amount": name,
                "value": round_to_two(value),
                "direction": "above" if value > triangle.likely else "below",
                "within": triangle.low <= value <= triangle.high,
            }
        )
    return sorted(points, key=lambda point: not point["within"])


def _root(values: Values, name: str, rates: Rates) -> float | None:
    """Returns where the net is 0 along one amount, in which it is linear."""
    at_zero = yearly({**values, name: 0.0}, rates)["net"]
    slope = yearly({**values, name: 1.0}, rates)["net"] - at_zero
    # Below rounding the net does not depend on the amount at all.
    if abs(slope) <= 1e-12 * max(1.0, abs(at_zero)):
        return None
    return -at_zero / slope


def round_to_two(value: float) -> float:
    """Rounds to two significant figures: more would claim what nobody knows.

    Example:
      >>> round_to_two(1234567.0), round_to_two(0.01234), round_to_two(0.0)
      (1200000.0, 0.012, 0.0)
    """
    if value == 0 or not math.isfinite(value):
        return value
    return float(f"{value:.1e}")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round_to_two(value)
