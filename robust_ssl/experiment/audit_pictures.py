"""What the page of an audit shows of images: pictures, layers, bands of frequency."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from robust_ssl.evaluation.analysis.spectra import energy_by_band
from robust_ssl.experiment import pages

EDGES = (0.0, 1 / 8, 1 / 4, 3 / 8, 0.71)
Look = Mapping[str, np.ndarray]  # as `pages.look` returns it


def examples(look: Look, count: int) -> list[dict[str, Any]]:
    """Returns images, the same under attack, and the change made visible, as PNG in base64.

    Those whose answer the attack changes come first.
    """
    answers = look["answers"]
    stays = answers[:, 0] == answers[:, 1]
    changed = _spread(np.flatnonzero(~stays), count)
    places = np.concatenate([changed, _spread(np.flatnonzero(stays), count - len(changed))])
    clean, attacked = look["clean"][places], look["attacked"][places]
    change = attacked - clean
    # By one factor for all, so that images can be compared; no change is plain gray.
    gain = 0.5 / max(float(np.abs(change).max()), 1e-9)
    visible = 0.5 + gain * change
    return [
        {
            "clean": _png(clean[n]),
            "attacked": _png(attacked[n]),
            "change": _png(visible[n]),
            "said_clean": str(before),
            "said_attacked": str(after),
        }
        for n, (before, after) in enumerate(answers[places].tolist())
    ]


def _spread(places: np.ndarray, count: int) -> np.ndarray:
    """Some of the places, far from each other: a folder's images come class by class."""
    return places[np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)]


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8))
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def layers(look: Look) -> list[dict[str, Any]]:
    """Returns how far each layer's output moves under attack, relative to its length."""
    return [
        {"layer": tap, "drift": measures["relative_drift"]}
        for tap, measures in pages.drift(look).items()
    ]


def bands(look: Look) -> list[dict[str, Any]] | None:
    """Returns which share of the change's energy lies in each band; None where nothing changed."""
    change = jnp.asarray(look["attacked"] - look["clean"])
    energy = np.asarray(energy_by_band(change, EDGES), float).sum(0)
    if not energy.sum() > 0:
        return None
    shares = energy / energy.sum()
    return [
        {"low": low, "high": high, "share": float(share)}
        for (low, high), share in zip(itertools.pairwise(EDGES), shares, strict=True)
    ]
