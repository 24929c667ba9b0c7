"""Do the images that a figure was counted on allow it to be believed?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robust_ssl.evaluation.checks.result import Check, not_run, status_at_most


def leakage(shared: int, n: int, train: int, limit: float = 0.01) -> Check:
    """Measures the share of the test images that are among the training images.

    A few are a note: public sets have some.

    Args:
      shared: So many of the test images are.
      n: Number of test images.
      train: Number of training images that they were compared with.
      limit: The share from which on the figure is one of memory.

    Example:
      >>> [leakage(count, 1000, 5000).status for count in (0, 9, 10)]
      ['passed', 'note', 'failed']
    """
    share = shared / n
    status = "passed" if not shared else "note" if share < limit else "failed"
    meaning = (
        f"{shared:,} of {n:,} test images are among the {train:,} training images, pixel by "
        "pixel. What was learned by heart counts as right."
    )
    advice = "Take these images out of one of the splits, and train and score again."
    return Check("leakage", status, share, limit, meaning * bool(shared), advice * bool(shared))


def one_answer(
    correct: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str] = (),
    limit: float = 0.9,
    note: float = 0.99,
) -> Check:
    """Measures how near a model comes to giving all images one answer.

    That is the share of wrong answers among the images of all classes but the one that is
    recognized best, where that one is recognized nearly always; else 0.

    Args:
      correct: Right when nobody attacks, bool ``[n]``.
      labels: Integer ``[n]``.
      class_names: For the meaning; empty gives the number.
      limit: Largest share without a note.
      note: Largest share with one; above, the model gives one answer.

    Example:
      >>> labels = np.array([0] * 8 + [1] * 2)
      >>> one_answer(labels == 0, labels).status, one_answer(labels >= 0, labels).status
      ('failed', 'passed')
    """
    classes, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        return not_run("one_answer", "All test images are of one class.")[0]
    recalls = np.bincount(places, weights=correct) / counts
    # Of equals the largest class, which a model that has learned nothing says.
    best = int(np.lexsort((counts, recalls))[-1])
    others = places != best
    value = float(1 - correct[others].mean()) if recalls[best] >= limit else 0.0
    share = counts[best] / len(labels)
    name = repr(class_names[classes[best]]) if class_names else f"class {classes[best]}"
    return Check(
        "one_answer",
        status_at_most(value, limit, note),
        value,
        limit,
        meaning=f"The model gives (nearly) all images one answer, {name}. That is right for the "
        f"{100 * share:.1f} % that are of it, attacked or not.",
        advice="Balance the classes, train longer or with another learning rate, and look at the "
        "accuracy of each class.",
    )
