"""How figures look, whatever a matplotlibrc says: the same numbers give the same bytes."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import numpy as np

from robust_ssl import words

SETTINGS = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "path",  # outlines: a reader need not have the font
    "svg.hashsalt": "robust_ssl",  # else the names of clip paths are random
    "text.parse_math": False,  # a class called "$5 or $10" is no formula, and "$\\frac{$" no error
}
# A script that the font lacks is drawn as boxes; the CSV beside the figure has the words.
HARMLESS = (r"Glyph .* missing from", r"constrained_layout not applied")


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draws under `SETTINGS`, which matplotlib reads when axes are made and when they are saved.

    Every text that comes in is made one that can be drawn: `words.in_figure`.
    """

    @functools.wraps(draw)
    def draw_styled(*args, **kwargs):
        import matplotlib

        # Where a figure is written to, and under which name, is no text of it.
        place = [entry for entry in args[:1] if isinstance(entry, str | os.PathLike)]
        paths = {name: kwargs.pop(name) for name in ("directory", "name") if name in kwargs}
        args, kwargs = _drawable(args[len(place) :]), {**_drawable(kwargs), **paths}
        with warnings.catch_warnings(), matplotlib.rc_context():
            for message in HARMLESS:
                warnings.filterwarnings("ignore", message)
            # Else a matplotlibrc of the working directory could turn LaTeX on.
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(SETTINGS)
            return draw(*place, *args, **kwargs)

    return draw_styled


def _drawable(value: Any) -> Any:
    """Returns a value with every text in it as a figure takes it."""
    if isinstance(value, str):
        return words.in_figure(value)
    if isinstance(value, Mapping):
        return {_drawable(key): _drawable(entry) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_drawable, value))
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(map(_drawable, value))
    if isinstance(value, np.ndarray) and value.dtype.kind in "OSU":
        return _drawable(value.tolist())
    if isinstance(value, Iterator | KeysView | ValuesView):
        return [_drawable(entry) for entry in value]
    return value
