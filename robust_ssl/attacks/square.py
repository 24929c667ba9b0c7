"""Square attack: random search with squares, which asks for logits and never for a gradient.

A defence that only hides its gradients keeps its accuracy under gradient attacks and loses it
here.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from robust_ssl import struct, threats
from robust_ssl.attacks.apgd import draw, misclassified
from robust_ssl.attacks.fab import labelled_logits
from robust_ssl.threats.patch import square_mask
from robust_ssl.types import Model

# The share of pixels in a square is halved after each of these queries (of 10 000).
_HALVINGS = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])


@struct.dataclass
class SquareState:
    """How far the search for one image has come."""

    best: jax.Array  # the image with the smallest margin so far, [H, W, 3]
    margin: jax.Array  # its true logit minus the best wrong one
    fooled: jax.Array  # bool: the model misclassifies it
    asked: jax.Array  # proposals tried so far, int32


def side_lengths(
    num_queries: int, pixels: tuple[int, int], p_init: float, smallest: int, rescale_schedule=True
) -> np.ndarray:
    """Returns the side of the square at every query, int ``[num_queries]``.

    It is at least `smallest` (from 3 on, the L2 form, sides are odd) and at most the shorter side
    of the image.  The other arguments are attributes of `Square`.

    Example:
      >>> side_lengths(10, (32, 32), 0.8, 1).tolist()
      [29, 7, 5, 4, 4, 3, 3, 2, 2, 1]

    References:
      Andriushchenko et al., ECCV 2020, Section 4 ("the size of the square").
    """
    sides = []
    for query in range(num_queries):
        place = int(query / num_queries * 10_000) if rescale_schedule else query
        halvings = int(np.sum(place > _HALVINGS))
        share = p_init / 2**halvings
        side = max(round(math.sqrt(share * pixels[0] * pixels[1])), smallest)
        side += smallest >= 3 and side % 2 == 0
        sides.append(min(side, *pixels))
    return np.array(sides)


def _bump(height: int, width: int) -> np.ndarray:
    """Returns nested squares of weight 1/k^2 around the middle, of Euclidean length one."""
    rows = np.abs(np.arange(height) - height // 2).reshape(-1, 1)
    columns = np.abs(np.arange(width) - width // 2).reshape(1, -1)
    rings = max(height, width) // 2 + 1
    # A pixel at ring k lies in the squares k, k + 1, ...; the smallest weights are added first.
    weights = np.cumsum(1.0 / np.arange(rings, 0, -1) ** 2)[::-1]
    bump = weights[np.maximum(rows, columns)]
    return bump / max(np.linalg.norm(bump), 1e-12)


def window(side: int) -> np.ndarray:
    """Returns the pattern of the L2 form, ``[side, side]``: a bump above, its negative below.

    Its Euclidean length is one.

    Example:
      >>> window(2).round(3).tolist()
      [[0.139, 0.693], [-0.139, -0.693]]

    References:
      Andriushchenko et al., ECCV 2020, Algorithm 3 and Equation 2.
    """
    upper, lower = _bump(side // 2, side), _bump(side - side // 2, side)
    pattern = np.concatenate([upper, -lower])
    return pattern / np.linalg.norm(pattern)


def _unit(change: jax.Array) -> jax.Array:
    return change / (jnp.sqrt(jnp.sum(change**2)) + 1e-12)


def _signs(draws: jax.Array) -> jax.Array:
    """Turns uniform draws into fair coins, -1 or 1."""
    return jnp.where(draws < 0.5, -1.0, 1.0)


def _corner(draws: jax.Array, pixels: tuple[int, int], side: jax.Array) -> jax.Array:
    """Returns the first row and column of a square, int ``[2]``."""
    # As in the published code the last possible place is never drawn.
    return jnp.floor(draws * (jnp.array(pixels) - side)).astype(jnp.int32)


@struct.dataclass
class Square:
    """Random search over square changes of one color (Linf) or bumps of moved energy (L2).

    A proposal is kept if it lowers the margin of the true class; an image's search ends as soon
    as it is misclassified.  Under `jax.vmap` all images are asked until the last one is done:
    `start` and `search` let a caller run a share of the queries, drop the images that are
    fooled, and go on with the others, with the same outcome.  A randomized model
    (`robust_ssl.attacks.apgd.draw`) is drawn anew for every query.

    Attributes:
      threat: `threats.Linf` or `threats.L2`.
      num_queries: Proposals of each try, at least 1.
      p_init: Share of the pixels in the first squares, in (0, 1].
      restarts: Tries, at least 1; an image fooled in one is not tried again.
      rescale_schedule: Whether the published schedule of 10 000 queries is stretched to
        `num_queries` (AutoAttack takes the beginning of it).

    Raises:
      ValueError: If a field is out of range; when called, if there is no label, the model has no
        logits, or there is one class.
      TypeError: When called with another threat.

    Example:
      >>> Square(threats.Linf(8 / 255), num_queries=1000).queries
      1002

    References:
      Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via
      random search", ECCV 2020, Algorithms 1 to 3; p_init from Croce and Hein, ICML 2020
      (AutoAttack), Section 5.
    """

    threat: Any
    num_queries: int = struct.field(pytree_node=False, default=5000)
    p_init: float = struct.field(pytree_node=False, default=0.8)
    restarts: int = struct.field(pytree_node=False, default=1)
    rescale_schedule: bool = struct.field(pytree_node=False, default=True)

    def __post_init__(self):
        """Checks the static fields."""
        if self.num_queries < 1 or self.restarts < 1:
            raise ValueError(
                f"num_queries and restarts must be at least 1, got num_queries="
                f"{self.num_queries} and restarts={self.restarts}"
            )
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init is a share of the pixels, in (0, 1], got {self.p_init}")

    @property
    def gradient_evaluations(self) -> int:
        """Input gradients per image: none."""
        return 0

    @property
    def queries(self) -> int:
        """Forward passes per image at most: proposals, starts and looks at the image itself."""
        return self.restarts * (self.num_queries + 2)

    def __call__(
        self, key: jax.Array, model: Model, image: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Returns the image with the smallest margin found, ``[H, W, 3]`` in [0, 1].

        An image that is misclassified already comes back as it is.
        """

        def attempt(restart, best):
            restart_key = jax.random.fold_in(key, restart)
            fresh = self.start(restart_key, model, image, label)
            fresh = fresh.replace(fooled=fresh.fooled | best.fooled)  # nothing left to ask
            state = self.search(restart_key, model, image, label, fresh, self.num_queries)
            wins = ~best.fooled & (state.fooled | (state.margin < best.margin))
            return jax.tree.map(lambda new, old: jnp.where(wins, new, old), state, best)

        nothing = SquareState(image, jnp.full((), jnp.inf), jnp.array(False), jnp.zeros((), int))
        if self.restarts == 1:
            return attempt(0, nothing).best
        return lax.fori_loop(0, self.restarts, attempt, nothing).best

    def start(self, key: jax.Array, model: Model, image: jax.Array, label) -> SquareState:
        """Returns the state at the first image: stripes (Linf) or a grid of bumps (L2).

        An image that is misclassified already stays, and is done.
        """
        clean_key = jax.random.fold_in(self._draws(key), self.num_queries)
        first_key = jax.random.fold_in(self._draws(key), self.num_queries + 1)
        key = jax.random.fold_in(key, self.num_queries)  # `search` takes 0 ... num_queries - 1
        clean = self._look(draw(model, clean_key), image, label)
        if isinstance(self.threat, threats.Linf):
            stripes = _signs(jax.random.uniform(key, (1, *image.shape[1:])))
            first = self.threat.project(image + self.threat.epsilon * stripes, image)
        elif isinstance(self.threat, threats.L2):
            change = self.threat.epsilon * _unit(_grid(key, image.shape))
            first = jnp.clip(image + change, 0.0, 1.0)
        else:
            kind = type(self.threat).__name__
            raise TypeError(f"Square knows the threats Linf and L2, got {kind}")
        state = self._look(draw(model, first_key), first, label)
        return jax.tree.map(lambda new, old: jnp.where(clean.fooled, old, new), state, clean)

    def search(
        self, key: jax.Array, model: Model, image: jax.Array, label, state: SquareState, until
    ) -> SquareState:
        """Goes on until the image is fooled or `until` proposals were tried in all.

        The key is the one given to `start`: proposal ``i`` draws from ``fold_in(key, i)``.  The
        state comes from `start` or an earlier call; `until`, at most `num_queries`, may be traced.
        """
        smallest = 3 if isinstance(self.threat, threats.L2) else 1
        pixels = image.shape[:2]
        sides = side_lengths(self.num_queries, pixels, self.p_init, smallest, self.rescale_schedule)
        distinct, which = np.unique(sides, return_inverse=True)
        propose = self._propose_l2(distinct, pixels) if smallest == 3 else self._propose_linf
        schedule, distinct = jnp.asarray(which), jnp.asarray(distinct)

        def ask(state):
            draws = jax.random.uniform(jax.random.fold_in(key, state.asked), (8,))
            index = schedule[state.asked]
            candidate = propose(draws, image, state.best, distinct[index], index)
            sampled = draw(model, jax.random.fold_in(self._draws(key), state.asked))
            seen = self._look(sampled, candidate, label)
            wins = seen.fooled | (seen.margin < state.margin)
            better = jax.tree.map(lambda new, old: jnp.where(wins, new, old), seen, state)
            return better.replace(asked=state.asked + 1)

        return lax.while_loop(lambda s: ~s.fooled & (s.asked < until), ask, state)

    def _draws(self, key: jax.Array) -> jax.Array:
        """The key of a randomized model's draws, which no proposal has."""
        return jax.random.fold_in(key, self.num_queries + 1)

    def _look(self, model: Model, candidate: jax.Array, label) -> SquareState:
        logits = labelled_logits(model, candidate, label, "Square")
        true = jnp.arange(logits.shape[-1]) == label
        right = jnp.sum(jnp.where(true, logits, 0.0))
        margin = right - jnp.max(jnp.where(true, -jnp.inf, logits))
        return SquareState(candidate, margin, misclassified(logits, label), jnp.zeros((), int))

    def _propose_linf(self, draws, image, best, side, index):
        """Moves one square by twice the budget, up or down in each channel, and cuts."""
        pixels = image.shape[:2]
        square = square_mask(pixels, side, _corner(draws[:2], pixels, side))
        change = 2 * self.threat.epsilon * _signs(draws[2:5]).reshape(1, 1, 3)
        return self.threat.project(best + jnp.where(square, change, 0.0), image)

    def _propose_l2(self, distinct: np.ndarray, pixels: tuple[int, int]):
        """Returns the proposal that moves the change of one square into a bump in another."""
        patterns = jnp.asarray(_placeable(distinct, pixels))

        def propose(draws, image, best, side, index):
            change, epsilon = best - image, self.threat.epsilon
            corner = _corner(draws[:2], pixels, side)
            into = square_mask(pixels, side, corner)
            out_of = square_mask(pixels, side, _corner(draws[2:4], pixels, side))
            # Sliding the view instead of the pattern puts its corner where the square begins.
            begin = (2 * index + (draws[4] < 0.5), pixels[0] - corner[0], pixels[1] - corner[1])
            bump = lax.dynamic_slice(patterns, begin, (1, *pixels)).reshape(*pixels, 1)
            old = jnp.where(into, change, 0.0)
            new = bump * _signs(draws[5:8]).reshape(1, 1, 3) + old / (_by_channel(old) + 1e-12)
            # Each channel gets what both squares held, and its share of what is still unused.
            unused = jnp.maximum(epsilon**2 - jnp.sum(change**2), 0.0)
            held = _by_channel(jnp.where(into | out_of, change, 0.0))
            new = new / (_by_channel(new) + 1e-12) * jnp.sqrt(unused / 3 + held**2)
            change = jnp.where(into, new, jnp.where(out_of, 0.0, change))
            return jnp.clip(image + epsilon * _unit(change), 0.0, 1.0)

        return propose


def _by_channel(change: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(change**2, axis=(0, 1), keepdims=True))


def _placeable(distinct: np.ndarray, pixels: tuple[int, int]) -> np.ndarray:
    """Returns every pattern and its transpose behind a margin as large as the image.

    float32 ``[2 * sides, 2 * H, 2 * W]``: a view of H x W that begins at ``(H - row, W - column)``
    shows the pattern at ``(row, column)``.
    """
    patterns = np.zeros((2 * len(distinct), 2 * pixels[0], 2 * pixels[1]), np.float32)
    for index, side in enumerate(distinct):
        rows, columns = (slice(size, size + side) for size in pixels)
        patterns[2 * index, rows, columns] = window(side)
        patterns[2 * index + 1, rows, columns] = window(side).T
    return patterns


def _grid(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Returns the L2 start: about 5 x 5 bumps side by side, each turned and signed at random."""
    side = max(shape[0] // 5, 1)
    first = max((shape[0] - 5 * side) // 2, 0)
    rows, columns = shape[0] // side, shape[1] // side
    draws = jax.random.uniform(key, (rows, 1, columns, 1, 1 + shape[2]))
    turned, signs = draws[..., :1] < 0.5, _signs(draws[..., 1:])
    pattern = jnp.asarray(window(side), jnp.float32)
    upright, lying = (p.reshape(1, side, 1, side, 1) for p in (pattern, pattern.T))
    bumps = jnp.where(turned, lying, upright) * signs
    bumps = bumps.reshape(rows * side, columns * side, shape[2])
    grid = jnp.pad(bumps, ((first, shape[0]), (first, shape[1]), (0, 0)))
    return grid[: shape[0], : shape[1]]
