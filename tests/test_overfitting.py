"""The alarm of single-step training: rings for the one illness, and not for others or noise."""

import pytest

from robust_ssl.finetuning.overfitting import overfitting_epoch, overfitting_warning


def found(one_step, multi_step, images=1000, **options):
    return overfitting_epoch(list(zip(one_step, multi_step, strict=True)), images=images, **options)


@pytest.mark.parametrize(
    ("one_step", "multi_step", "expected"),
    [
        ([0.5, 0.6, 0.6, 0.7], [0.30, 0.36, 0.40, 0.41], None),
        ([0.5, 0.6, 0.9, 0.95], [0.30, 0.40, 0.01, 0.0], 3),  # the first, not the worst
        ([0.5, 0.6, 0.1, 0.1], [0.30, 0.40, 0.01, 0.0], None),  # both fall: it has diverged
        ([0.5, 0.6, 0.6, 0.6], [0.40, 0.33, 0.27, 0.22], None),  # falls, but not to half
        ([0.5, 0.6, 0.6, 0.6], [0.40, 0.30, 0.20, 0.10], 4),  # slowly, against its best
        ([0.9], [0.0], None),  # nothing to fall from
        ([], [], None),
        ([0.9, 0.9], [0.0, 0.0], None),
    ],
)
def test_it_rings_when_only_the_stronger_attack_wins(one_step, multi_step, expected):
    assert found(one_step, multi_step) == expected


def test_few_images_ring_only_for_what_they_can_tell():
    one_step, multi_step = [0.6, 0.6], [0.40, 0.15]
    assert found(one_step, multi_step, images=5000) == 2
    assert found(one_step, multi_step, images=50) is None
    assert found(one_step, multi_step, images=50, margin=0.0) == 2
    # A dip of the one-step accuracy within its noise is no fall; a larger one is.
    assert found([0.60, 0.58], [0.4, 0.0]) == 2
    assert found([0.60, 0.50], [0.4, 0.0]) is None


def test_the_margin_is_in_standard_errors():
    # 0.1 is below half of 0.4 by 0.1, which has to be more than two of
    # sqrt((0.1 * 0.9 + 0.4 * 0.6 / 4) / images): 60 images.
    assert found([0.5, 0.5], [0.4, 0.1], images=59) is None
    assert found([0.5, 0.5], [0.4, 0.1], images=61) == 2
    assert found([0.5, 0.5], [0.4, 0.1], images=59, margin=1.9) == 2


def test_what_follows_does_not_change_the_answer():
    one_step, multi_step = [0.5, 0.6, 0.9, 0.5, 0.9], [0.30, 0.40, 0.01, 0.41, 0.0]
    answers = [found(one_step[:n], multi_step[:n]) for n in range(1, 6)]
    assert answers == [None, None, 3, 3, 3]


def test_the_warning_names_both_epochs_and_what_to_do():
    text = overfitting_warning([(0.5, 0.4), (0.6, 0.3), (0.9, 0.01)], 3)
    for part in ("at epoch 3", "from 40.0% (epoch 1) to 1.0%", "50.0% to 90.0%", "smaller step"):
        assert part in text
    with pytest.raises(ValueError, match=r"in \[2, 1\]"):
        overfitting_warning([(0.5, 0.4)], 1)


@pytest.mark.parametrize(
    ("one_step", "multi_step", "options", "message"),
    [
        ([0.5, 1.5], [0.5, 0.5], {}, "epoch 2: accuracies"),
        ([0.5], [float("nan")], {}, "epoch 1: accuracies"),
        ([], [], {"images": 0}, "images must be at least 1"),
        ([], [], {"margin": -1.0}, "margin at least 0"),
    ],
)
def test_nonsense_is_refused(one_step, multi_step, options, message):
    with pytest.raises(ValueError, match=message):
        found(one_step, multi_step, **options)
