"""How long a run takes is reckoned from its plan."""

import tiny

from robust_ssl import experiment
from robust_ssl.experiment import forecast
from robust_ssl.parallel import Parallel
from robust_ssl.progress import Progress


def _context(tmp_path, *stages, **recipes):
    config = tiny.config(*stages)
    if recipes:
        config.recipes = recipes
    return experiment.Context(
        experiment.plan(config), tmp_path, Parallel.create(num_devices=1), Progress("quiet")
    )


def test_gradients_of_training_are_counted_by_hand(tmp_path):
    context = _context(tmp_path, "train", baseline="robust_ssl.recipes:baseline")
    # 48 images, one gradient each; 16 for validation, a third each; 2 epochs.
    assert forecast.image_gradients(context) == 2 * (48 + 16 / 3)


def test_every_stage_adds_its_part(tmp_path):
    totals = [
        forecast.image_gradients(_context(tmp_path, *stages))
        for stages in (("attack",), ("attack", "train"), ("attack", "train", "score"))
    ]
    # AdvEncoder and universal PGD, 2 steps of 16 images for each of 4 budgets.
    assert totals[0] == 2 * 4 * 2 * 16
    assert totals == sorted(totals) and totals[0] < totals[1] < totals[2]


def test_the_line_says_about_how_long(tmp_path, monkeypatch):
    context = _context(tmp_path, "train")
    monkeypatch.setattr(forecast, "_flops_per_second", lambda: 1e5)
    slow = forecast.line(context)
    assert slow.startswith("about ") and "1 cpu device," in slow
    monkeypatch.setattr(forecast, "_flops_per_second", lambda: 1e15)
    assert forecast.line(context).startswith("about 0 s") != slow.startswith("about 0 s")
