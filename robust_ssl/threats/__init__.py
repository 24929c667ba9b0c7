"""What an attacker may do to an image: a ball around it, a patch in it, a band of frequencies.

A threat is a frozen value with three methods, ``sample``, ``project`` and ``steepest``, written for
one image ``[H, W, 3]``; `jax.vmap` makes a batch of it.  Its budget, the `epsilon` of a ball and
the `area` of a patch, is a pytree leaf: another budget needs no new compilation, and `jax.vmap`
over it gives a whole accuracy-against-budget curve.

How one perturbation for all images, a *delta*, meets an image is the threat's word too.  With the
three methods alone it is added.  A threat that wants something else brings the methods listed at
`robust_ssl.types.Threat`, as `Patch` and `Band` do.
"""

from robust_ssl.threats.balls import L2, Linf, check, check_epsilon, check_is_threat
from robust_ssl.threats.band import Band
from robust_ssl.threats.entries import check_saveable, from_entries, to_entries
from robust_ssl.threats.patch import Patch

__all__ = [
    "L2",
    "Band",
    "Linf",
    "Patch",
    "check",
    "check_epsilon",
    "check_is_threat",
    "check_saveable",
    "from_entries",
    "to_entries",
]
