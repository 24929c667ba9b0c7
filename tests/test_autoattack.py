"""AutoAttack: which attacks, in which order, with which settings, for how many classes."""

import jax
import pytest

from robust_ssl import threats
from robust_ssl.attacks import autoattack
from robust_ssl.objectives import labelled

THREAT = threats.Linf(8 / 255)


def test_standard_is_the_published_ensemble():
    parts = autoattack.standard(THREAT, 10)
    assert list(parts) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [len(members) for members in parts.values()] == [1, 9, 9, 1]
    (cross_entropy,), (square,) = parts["apgd-ce"], parts["square"]
    assert (cross_entropy.num_steps, cross_entropy.restarts, cross_entropy.rho) == (100, 1, 0.75)
    assert cross_entropy.objective is labelled.cross_entropy and cross_entropy.eot == 1
    assert [member.rank for member in parts["apgd-t"]] == list(range(1, 10))
    assert {member.objective for member in parts["apgd-t"]} == {labelled.dlr_targeted}
    assert [member.rank for member in parts["fab-t"]] == list(range(1, 10))
    assert {member.num_steps for member in parts["apgd-t"] + parts["fab-t"]} == {100}
    assert square.num_queries == 5000 and square.p_init == 0.8


def test_the_members_of_a_part_share_one_structure():
    for members in autoattack.standard(THREAT, 10).values():
        assert len({jax.tree.structure(member) for member in members}) == 1


@pytest.mark.parametrize(("classes", "targets"), [(2, 1), (3, 2), (4, 3), (9, 8), (200, 9)])
def test_there_are_no_more_targets_than_wrong_classes(classes, targets):
    parts = autoattack.standard(THREAT, classes)
    name = "apgd-t" if classes >= 4 else "apgd-t-margin"
    assert len(parts[name]) == len(parts["fab-t"]) == targets
    expected = labelled.dlr_targeted if classes >= 4 else labelled.margin_targeted
    assert parts[name][0].objective is expected


def test_apgd_is_what_the_standard_ensemble_begins_with():
    whole, part = (make(THREAT, 10) for make in (autoattack.standard, autoattack.apgd))
    assert list(part.items()) == list(whole.items())[:2]


def test_rand_averages_over_twenty_draws():
    parts = autoattack.rand(THREAT, 10)
    assert list(parts) == ["apgd-ce", "apgd-dlr"]
    assert all(member.eot == 20 for (member,) in parts.values())
    assert parts["apgd-dlr"][0].objective is labelled.dlr
    (member,) = autoattack.rand(THREAT, 2)["apgd-margin"]
    assert member.objective is labelled.margin


@pytest.mark.parametrize("make", [autoattack.standard, autoattack.apgd, autoattack.rand])
def test_one_class_is_refused(make):
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        make(THREAT, 1)
