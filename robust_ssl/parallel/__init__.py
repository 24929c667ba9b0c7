"""Devices and processes: steps are written once, whatever there is of both.

`devices` spreads a step; `processes` is what several processes tell each other without a device.
"""

from robust_ssl.parallel.alone import reads_more
from robust_ssl.parallel.devices import (
    AXIS,
    KINDS,
    Parallel,
    Program,
    average,
    copied,
    gather,
    to_host,
)
from robust_ssl.parallel.processes import (
    LostProcessError,
    barrier,
    everywhere,
    exchange,
    first_process,
)
from robust_ssl.parallel.reading import prefetch

__all__ = [
    "AXIS",
    "KINDS",
    "LostProcessError",
    "Parallel",
    "Program",
    "average",
    "barrier",
    "copied",
    "everywhere",
    "exchange",
    "first_process",
    "gather",
    "prefetch",
    "reads_more",
    "to_host",
]
