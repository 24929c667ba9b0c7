"""The section `screening` of a config: which detectors, of which model, on how many images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from robust_ssl.build import Count, Function, Natural, Positive, Share, near
from robust_ssl.experiment.suites import check_names
from robust_ssl.screening import FUSED

_PLACE = "robust_ssl.screening:fit_"
DETECTORS = ("template", "squeeze", "neighbors", "spectrum", "disagreement")


@dataclasses.dataclass(frozen=True)
class AdaptiveAttacks:
    """Attacks that know the detectors, within `threats.Linf`.

    Attributes:
      epsilon: Their budget, pixel units; None is the suite's.
      images: Test images that are attacked one by one.
      num_steps: Of that attack.
      weights: See `screening.Adaptive`, as the next.
      cutoffs: ...
      universal_steps: Steps of one perturbation for all images; 0 leaves it out.
      universal_batch: Images of each.
    """

    epsilon: Share | None = None
    images: Count = 128
    num_steps: Count = 40
    weights: tuple[Positive, ...] = (1.0,)
    cutoffs: tuple[Positive, ...] = (1.0, 0.25)
    universal_steps: Natural = 200
    universal_batch: Count = 64

    def __post_init__(self):
        for name in ("weights", "cutoffs"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one number above 0")


@dataclasses.dataclass(frozen=True)
class Screening:
    """How detectors are fitted and tried.

    Attributes:
      detectors: By name; each is a function ``fit(key, model, images, known)``.
      model: The screened classifier's name; None is the last of the scored ones.
      public: The classifier that `Disagreement` asks; None is ``compare.baseline``'s.
      images: Training images that detectors are fitted on.
      calibration: Validation images by which thresholds are chosen.
      test: Test images, and as many of the surrogate set.
      batch_size: Images at a time.
      adaptive: Attacks that know the detectors; None leaves all verdicts at "not tried".
    """

    detectors: Mapping[str, Function] = dataclasses.field(
        default_factory=lambda: {n: Function.read(f"{_PLACE}{n}", n) for n in DETECTORS}
    )
    model: str | None = None
    public: str | None = None
    images: Count = 512
    calibration: Count = 512
    test: Count = 512
    batch_size: Count = 128
    adaptive: AdaptiveAttacks | None = AdaptiveAttacks()

    def __post_init__(self):
        check_names(self.detectors, "detectors")
        if not self.detectors or FUSED in self.detectors:
            raise ValueError(
                f"detectors: name at least one, and none {FUSED!r}, which is their fusion; got "
                f"{list(self.detectors)}"
            )


def check_models(screening: Screening, names: Iterable[str]) -> None:
    """Raises ValueError for a model that is neither a recipe nor a classifier of the run."""
    known = list(names)
    for entry in ("model", "public"):
        name = getattr(screening, entry)
        if name is not None and name not in known:
            raise ValueError(
                f"config.screening.{entry} is {name!r}, which is neither in config.recipes nor in "
                f"config.classifiers{near(name, known)}"
            )
