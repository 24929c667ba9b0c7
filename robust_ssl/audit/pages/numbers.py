"""Numbers on a page: rounded for a reader, each with the value that ``audit.json`` holds.

``<data value="0.9778">97.8 %</data>`` is read by people and by programs, so a test can say of
every number where it comes from.
"""

from __future__ import annotations

import dataclasses
import decimal
import json
from collections.abc import Mapping
from typing import Any

_LARGE = {
    "en": ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")),
    "ja": ((1e12, "兆"), (1e8, "億"), (1e4, "万")),
}
_POINTS = {"en": " points", "ja": "ポイント"}
_CURRENCIES_JA = {"JPY": "円", "USD": "ドル", "EUR": "ユーロ"}
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Writes numbers for one language and one currency.

    Attributes:
      language: ``"en"`` or ``"ja"``.
      currency: Of every amount of money.
    """

    language: str
    currency: str = ""

    def _data(self, value: Any, shown: str) -> Any:
        from markupsafe import Markup

        return Markup('<data value="{}">{}</data>').format(json.dumps(value), shown)

    def percent(self, share: float) -> Any:
        """Returns a share in percent, a decimal place; what is small keeps two figures."""
        return self._data(share, percent(share))

    def points(self, share: float) -> Any:
        """Returns a difference of shares in percentage points, with its sign."""
        sign, word = MINUS if share < 0 else "", _POINTS[self.language]
        return self._data(share, f"{sign}{abs(100 * share):.1f}{word}")

    def interval(self, figure: Mapping[str, Any]) -> Any:
        """Returns a share with its 95 % interval."""
        from markupsafe import Markup

        low, high = (self._data(figure[end], f"{100 * figure[end]:.1f}") for end in ("low", "high"))
        return Markup('{} <span class="ci">({}{}{})</span>').format(
            self.percent(figure["value"]), low, DASH, high
        )

    def count(self, value: float) -> Any:
        """Returns a whole number with thousands set apart."""
        return self._data(value, f"{value:,.0f}")

    def factor(self, value: float) -> Any:
        """Returns a factor in two figures."""
        return self._data(value, plain(value))

    def budget(self, epsilon: float) -> Any:
        """Returns a budget in steps of an 8-bit pixel."""
        return self._data(epsilon, f"{plain(255 * epsilon)}/255")

    def seconds(self, value: float) -> Any:
        """Returns seconds in two figures."""
        return self._data(value, plain(value) if value < 100 else f"{value:,.0f}")

    def milliseconds(self, seconds: float) -> Any:
        """Returns seconds as milliseconds in two figures."""
        return self._data(seconds, plain(1000 * seconds))

    def money(self, value: float) -> Any:
        """Returns an amount of money in words: ``JPY 1.2 million``, ``120万円``."""
        return self._data(value, money(value, self.currency, self.language))

    def limit(self, value: Any, unit: str) -> Any:
        """Returns a limit as `of_unit` does, with all figures that somebody typed."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        sign = MINUS if value < 0 else ""
        words = {"share": " %", "points": _POINTS[self.language]}
        if unit in words:
            whole = round(abs(100 * value), 10)
            number = f"{whole:.1f}" if round(whole, 1) == whole else _digits(whole)
            return self._data(value, f"{sign}{number}{words[unit]}")
        if unit == "money":
            return self.money(value)
        return self._data(value, sign + _digits(abs(value)))

    def of_unit(self, value: Any, unit: str) -> Any:
        """Returns a number in a unit of the policy; a word or a truth is shown as it is."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        kinds = {"share": self.percent, "points": self.points, "money": self.money}
        return kinds.get(unit, self.count if float(value).is_integer() else self.factor)(value)


def plain(value: float) -> str:
    """Returns a number in two significant figures, never as a power of ten.

    Example:
      >>> plain(17.04), plain(0.000123), plain(123.0), plain(2.0)
      ('17', '0.00012', '120', '2')
    """
    rounded = decimal.Decimal(f"{value:.2g}")
    text = format(rounded, "f")
    return text.replace("-", MINUS)


def _digits(value: float) -> str:
    """Returns up to ten significant figures, thousands set apart, never a power of ten."""
    rounded = decimal.Decimal(f"{value:.10g}")
    text = format(rounded, ",f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    """Returns a share in percent.

    Example:
      >>> percent(0.97777), percent(1.0), percent(0.0011), percent(0.000056)
      ('97.8 %', '100 %', '0.11 %', '0.0056 %')
    """
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{plain(100 * share)} %" if 0 < share < 0.01 else f"{100 * share:.1f} %"


def money(value: float, currency: str, language: str) -> str:
    """Returns an amount as people say it.

    Example:
      >>> money(1.2e7, "JPY", "en"), money(1.2e7, "JPY", "ja"), money(950.0, "USD", "ja")
      ('JPY 12 million', '1,200万円', '950ドル')
    """
    sign = MINUS if value < 0 else ""
    size, unit = next((pair for pair in _LARGE[language] if abs(value) >= pair[0]), (1.0, ""))
    number = _digits(abs(value) / size)
    if language == "ja":
        return f"{sign}{number}{unit}{_CURRENCIES_JA.get(currency, ' ' + currency)}"
    return f"{sign}{currency} {number}{unit}"
