"""An audit's decision: answers with the line of every mistake, risk in closed form, gates."""

import dataclasses
import datetime
import hashlib
import json
import pathlib
import subprocess
import sys

import audit_cases as cases
import numpy as np
import pytest

from robust_ssl.audit import (
    answers,
    checklists,
    decision,
    document,
    gates,
    lines,
    measures,
    policy,
    risk,
)
from robust_ssl.audit.answers import AMOUNTS, Triangle

POLICY, ITEMS = policy.read(), checklists.read()
SHIPPED = pathlib.Path(policy.__file__).with_name("policy.yaml")
GATES, IDS = {gate.id: gate.read_limit for gate in POLICY}, [item.id for item in ITEMS]
TODAY = datetime.date(2026, 11, 28)


def read(text):
    return answers.parse(cases.entry(text), GATES, IDS)


def decide(whole, stage="pilot", text="", limits=POLICY, date=TODAY):
    return decision.decide(whole, stage, limits, ITEMS, read(text), date)["decided"]


def outcomes(decided):
    return {gate["id"]: gate["outcome"] for gate in decided["gates"]}


@pytest.mark.parametrize("limits", ["shipped", "copied"])
def test_a_figure_that_earlier_versions_did_not_measure_asks_for_another_run(limits, tmp_path):
    whole = cases.sealed()
    measured = {**whole["measured"], "data": dict(whole["measured"]["data"])}
    del measured["data"]["test_distinct"]
    copy = tmp_path / "policy.yaml"
    copy.write_text("# ours\n" + SHIPPED.read_text(encoding="utf-8"), encoding="utf-8")
    own = POLICY if limits == "shipped" else policy.read(copy)
    with pytest.raises(gates.MissingFigureError) as raised:
        decide(document.sealed(measured), limits=own)
    said = str(raised.value)
    assert "/measured/data/test_distinct" in said and "earlier version" in said
    assert "audit run` again" in said and "line" not in said


# --- Answers ------------------------------------------------------------------------------------

WRONG = {
    "buisness: {}": r"line 1: unknown entry 'buisness'; did you mean business\?",
    cases.answers_text(loss_per_error="-5"): r"line 5: business.loss_per_error is -5; .*negative",
    cases.answers_text(loss_per_error="[5, 3, 9]"): r"line 5: .*\[1\] is 3, below low, 5",
    cases.answers_text(loss_per_error="[5, 9, 8]"): r"line 5: .*\[2\] is 8, below likely, 9",
    cases.answers_text(loss_per_error="[5, 9]"): "line 5: .*must be three numbers",
    cases.answers_text(loss_per_error="{low: 1, likely: 2}"): "line 5: .*lacks 'high'",
    cases.answers_text(loss_per_error="{low: 1, likely: 2, high: }"): "line 5: .*is empty",
    cases.answers_text(loss_per_error="{low: 1, likly: 2}"): "unknown entry 'likly'.*did you mean",
    cases.answers_text(loss_per_error="1,000"): "line 5: .*no number; write 1000",
    cases.answers_text(loss_per_error=".inf"): "line 5: .*no number",
    cases.answers_text(loss_per_error="nan"): "line 5: .*finite",
    cases.answers_text(attacked_share="2 %"): "line 4: .*write a share, 0.01 for 1 %",
    cases.answers_text(attacked_share="2"): "line 4: .*at most 1; a share of 2 % is written 0.02",
    cases.answers_text(one_off_cost=None): "line 1: business lacks 'one_off_cost'",
    cases.answers_text(currency="yen"): "line 2: .*three letters",
    cases.answers_text(currency=""): "line 2: business.currency is ''",
    "limits: {robust-acuracy: {limit: 1}}": "line 1: unknown entry 'robust-acuracy' .*did you mean",
    "limits: {attack-success: {limit: 0.1}}": "lacks 'reason'",
    "checklist:\n  fallback: {done: perhaps, by: K, date: 2026-01-01}": "line 2: .*true or false",
    "checklist:\n  fallback: {done: true, by: '', date: 2026-01-01}": "line 2: .*by is empty",
    "checklist:\n  fallbak: {done: true}": "line 2: unknown entry 'fallbak'.*did you mean fallback",
    "checklist:\n  fallback: {done: true, by: ' ', date: 2026-01-01}": "line 2: .*by is empty",
    "checklist:\n  fallback: {done: true, by: '--', date: 2026-01-01}": "line 2: .*by is empty",
    "waivers:\n- {gate: clean-loss, name: ' ', date: 2026-11-01, reason: r, until: 2027-01-01}": (
        "line 2: .*name is empty"
    ),
    "waivers:\n- {gate: clean-loss, name: K, date: 2026-W52-1, reason: r, until: 2027-01-01}": (
        "line 2: .*write a date as 2027-03-31"
    ),
    "waivers: {gate: x}": "line 1: waivers must be a list",
    "waivers:\n- {gate: clean-los, name: K}": r"line 2: .*'clean-los'; did you mean clean-loss\?",
    "waivers:\n- {gate: clean-loss, name: K, date: 1.2.2026, reason: r, until: 2027-01-01}": (
        "line 2: .*write a date as 2027-03-31"
    ),
    "waivers:\n- {gate: clean-loss, name: K, date: 2026-02-01, reason: r}": "lacks 'until'",
    "waivers:\n- {gate: clean-loss, name: K, date: 2026-02-01, reason: r, until: 2026-01-01}": (
        "line 2: .*before its date"
    ),
    "use: [1": "line 1: this is no YAML",
    "use: a\nuse: b": "line 2: use is there twice; the first is on line 1",
    "use: &a b\nowner: *a": "line 1: references",
    "use: {a: b}": "line 1: use must be one text",
    "- a": "must be entries with names",
    "\n".join("  " * n + f"a{n}:" for n in range(40)): "nested deeper",
}


def wide(text):
    """As a Japanese keyboard types it."""
    return "".join(chr(ord(letter) + 0xFEE0) for letter in text)


DECIMAL = "no number; write a decimal point and set no thousands apart"
ZERO = "a zero begins a number only before a decimal point"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        *((typed, DECIMAL) for typed in ("0,001", "12,5", "1.000,50", "1234,567", "1,00", "0 001")),
        *((typed, DECIMAL) for typed in ("-0,5", wide("0,001"), wide("0.9"), "1,0000")),
        *((typed, ZERO) for typed in ("0001", "09", "-09", "00.5", "0_001", wide("0001"))),
        ("1,000,000", "no number; write 1000000$"),
        ("12 500.75", "no number; write 12500.75$"),
        ("12,500", "no number; write 12500, or 12.500 if that is meant$"),
        (wide("1,000"), "no number; write 1000, or"),
    ],
)
def test_no_hint_makes_another_number_of_what_was_typed(typed, message):
    # A comma that is left out makes a share of attacks a thousand times as large.
    for text in (
        cases.answers_text(attacked_share=f"'{typed}'"),
        f"limits: {{robust-accuracy: {{limit: '{typed}', reason: r}}}}",
    ):
        with pytest.raises(lines.EntryError, match=f"line [14]: .* is '{typed}'.*{message}"):
            read(text)


@pytest.mark.parametrize("typed", ["0", "0.001", "-0.5", "0e3", "10", "1_000", wide("12")])
def test_a_number_that_means_one_thing_is_read(typed):
    assert lines.parse(f"a: '{typed}'", "f").get("a").number() == float(typed)


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_named_with_its_line(text):
    with pytest.raises(lines.EntryError, match=WRONG[text]) as error:
        read(text)
    assert str(error.value).startswith("answers.yaml, line ")


def test_what_is_left_empty_is_missing_and_nothing_else_is():
    empty = read(cases.answers_text(currency="", **dict.fromkeys(AMOUNTS, "")))
    assert empty.missing == tuple(AMOUNTS)
    one = read(cases.answers_text(one_off_cost="", loss_per_error="{low: , likely: , high: }"))
    assert one.missing == ("loss_per_error", "one_off_cost")
    assert decide(cases.sealed(), text=cases.answers_text(one_off_cost=""))["risk"] is None


@pytest.mark.parametrize("language", answers.LANGUAGES)
def test_the_template_can_be_read_as_it_is(language):
    template = answers.template(language)
    read_ = answers.parse(lines.parse(template, "answers.yaml"), GATES, IDS)
    assert read_.missing == tuple(AMOUNTS) and not read_.waivers and not read_.ticks
    assert all(name in template for name in (*AMOUNTS, *IDS))


def test_japanese_texts_and_marks_of_byte_order_are_read():
    text = "﻿use: ねじの検査\norganization: 株式会社テスト".encode()
    assert answers.parse(lines.parse(text, "回答.yaml"), {}, []).use == "ねじの検査"
    with pytest.raises(lines.EntryError, match="not UTF-8"):
        lines.parse("use: 検査".encode("shift-jis"), "回答.yaml")


# --- Risk ---------------------------------------------------------------------------------------

CERTAIN = {
    **{"decisions_per_year": 1e6, "attacked_share": 1e-3, "loss_per_error": 2000.0},
    **{"loss_per_clean_error": 10.0, "one_off_cost": 2e5, "compute_price_per_hour": 500.0},
    **{"retrainings_per_year": 4.0, "inference_price_per_1000": 2.0},
}
# So many images that the shares are known exactly.
RATES = risk.Rates((0.5, 10**12), (0.1, 10**12), (0.9, 10**12), (0.9, 10**12), 2.0, 1.5)


def triangles(**changed):
    return {n: Triangle(v, v, v) for n, v in CERTAIN.items()} | changed


def test_certain_amounts_give_the_closed_form():
    found = risk.assess(triangles(), RATES)
    gain = 1e6 * 1e-3 * 0.9 * 0.4 * 2000
    cost = 2e5 + 5 * 2 * 500 + 1000 * 2 * 0.5
    for quantile in risk.QUANTILES:
        assert found["gain"][quantile] == pytest.approx(gain, rel=0.05)
        assert found["net"][quantile] == risk.round_to_two(gain - cost)
    assert found["probability_worth_it"] == 1.0 and found["worth_it"]
    assert found["break_even_share"] == risk.round_to_two(cost / (1e6 * 0.9 * 0.4 * 2000))
    months = 12 * (2e5 + 1000) / (gain - (4 * 1000 + 1000))
    assert found["payback_months"] == risk.round_to_two(months)


def test_draws_of_a_triangle_have_its_mean_and_stay_inside():
    triangle = Triangle(1.0, 2.0, 9.0)
    found = risk.draws(triangle, np.random.default_rng(0))
    assert found.min() >= 1 and found.max() <= 9
    deviation = np.sqrt((1 + 4 + 81 - 2 - 9 - 18) / 18)
    assert abs(found.mean() - triangle.mean) < 4 * deviation / np.sqrt(len(found))


def test_draws_of_a_share_have_the_posteriors_mean():
    found = risk.share_draws(0.25, 100, np.random.default_rng(0))
    assert found.mean() == pytest.approx(25.5 / 101, abs=0.002)


def test_the_same_answers_give_the_same_figures():
    amounts = triangles(loss_per_error=Triangle(1.0, 10.0, 4000.0))
    assert risk.assess(amounts, RATES) == risk.assess(amounts, RATES)
    assert risk.assess(amounts, RATES)["net"] != risk.assess(amounts, RATES, seed=1)["net"]


def test_at_a_turning_point_the_net_is_zero():
    amounts = triangles(attacked_share=Triangle(1e-4, 1e-3, 2e-3))
    likely = risk.at_likely(amounts, RATES)
    for name in AMOUNTS:
        root = risk._root(likely, name, RATES)
        if root is not None:
            net = risk.yearly({**likely, name: root}, RATES)["net"]
            assert net == pytest.approx(0, abs=1e-6 * 7e5), name
    first = risk.turning_points(amounts, RATES)[0]
    assert (first["amount"], first["direction"], first["within"]) == (
        "attacked_share",
        "below",
        True,
    )
    bars = risk.tornado(amounts, RATES)
    assert bars[0]["amount"] == "attacked_share" and bars[1]["at_low"] == bars[1]["at_high"]


@pytest.mark.parametrize(("share", "shown"), [(0.4962, 0.49), (0.99625, 0.99), (1.0, 1.0)])
def test_a_probability_is_rounded_downwards(share, shown, monkeypatch):
    # The net of so many draws is above 0: a gate at 0.5 must not open for less than half.
    count = round(share * risk.DRAWS)
    figures = {name: np.zeros(risk.DRAWS) for name in ("loss_before", "loss_after", "gain")}
    figures |= {name: np.zeros(risk.DRAWS) for name in ("investment", "running")}
    figures["net"] = np.where(np.arange(risk.DRAWS) < count, 1.0, -1.0)
    plain = risk.yearly

    def yearly(values, rates):
        many = any(np.ndim(value) for value in values.values())
        return figures if many else plain(values, rates)

    monkeypatch.setattr(risk, "yearly", yearly)
    assert risk.assess(triangles(), RATES)["probability_worth_it"] == shown


def test_where_nothing_is_at_stake_nothing_pays_and_nothing_turns():
    nothing = dict.fromkeys(AMOUNTS, Triangle(0.0, 0.0, 0.0))
    found = risk.assess(nothing, RATES)
    assert not found["worth_it"] and found["probability_worth_it"] == 0
    assert found["break_even_share"] is None and found["payback_months"] is None
    assert found["turns"] == []


def test_a_defense_that_helps_nothing_never_pays():
    same = risk.Rates((0.5, 99), (0.5, 99), (0.9, 99), (0.9, 99), 1.0)
    found = risk.assess(triangles(), same)
    assert found["break_even_share"] is None and found["payback_months"] is None
    assert not found["worth_it"] and found["net_likely"] < 0
    better = risk.Rates((0.5, 99), (0.5, 99), (0.5, 99), (0.9, 99), 1.0)
    # More right decisions are more that an attacker can turn.
    assert risk.assess(triangles(), better)["pays"] == "below"
    better = dataclasses.replace(better, success_after=(0.1, 99))
    found = risk.assess(triangles(), better)
    assert (found["pays"], found["break_even_share"]) == ("always", 0.0)


def test_where_the_secured_classifier_falls_more_it_pays_below_a_share_of_attacks():
    # Better on clean images, easier to attack: the net falls with the share of attacks.
    worse = risk.Rates((0.1, 10**12), (0.5, 10**12), (0.8, 10**12), (0.9, 10**12), 0.0)
    amounts = triangles(loss_per_clean_error=Triangle(100.0, 100.0, 100.0))
    likely = risk.at_likely(amounts, worse)
    pays, share = risk.break_even(likely, worse)
    nets = [
        risk.yearly({**likely, "attacked_share": share * times}, worse)["net"]
        for times in (0.9, 1.0, 1.1)
    ]
    assert pays == "below" and nets[0] > 0 > nets[2] and nets[1] == pytest.approx(0, abs=1)
    found = risk.assess(amounts, worse)
    assert (found["pays"], found["break_even_share"]) == ("below", risk.round_to_two(share))
    nothing = {**likely, "one_off_cost": 0.0, "loss_per_clean_error": 0.0}
    assert risk.break_even(nothing, worse) == ("never", None)  # 0 without attacks, then below
    helped = risk.Rates((0.5, 99), (0.1, 99), (0.9, 99), (0.9, 99), 0.0)
    pays, share = risk.break_even({**nothing, **helped.measured}, helped)
    assert (pays, str(share)) == ("from", "0.0")


# --- Gates --------------------------------------------------------------------------------------


def test_a_good_encoder_passes_every_stage():
    answered = cases.answers_text()
    for stage in answers.STAGES:
        decided = decide(cases.sealed(), stage, answered)
        assert decided["outcome"] == "passed", (stage, outcomes(decided))
        assert set(outcomes(decided).values()) == {"passed"}
        assert set(outcomes(decided)) == {g.id for g in POLICY if stage in g.limits}


def test_limits_go_by_the_unsafe_end_of_the_interval():
    at = {"usual": cases.attacked(0.4, 0.5), "secured": cases.attacked(0.51, 0.3)}
    assert outcomes(decide(cases.sealed(attacked=at)))["robust-accuracy"] == "failed"
    at["secured"] = cases.attacked(0.525, 0.3)
    assert outcomes(decide(cases.sealed(attacked=at)))["robust-accuracy"] == "passed"


def test_an_evaluation_that_is_not_trusted_is_never_green():
    for stage in answers.STAGES:
        found = outcomes(decide(cases.untrusted(), stage, cases.answers_text()))
        robust = {"robust-accuracy", "attack-success", "single-image-attack", "worth-it"}
        assert {o for n, o in found.items() if n in robust} == {"not decidable"}
        assert {o for n, o in found.items() if n not in robust} == {"passed"}
    assert decide(cases.untrusted())["outcome"] == "not decidable"
    assert gates.EXIT_CODES[decide(cases.untrusted())["outcome"]] == 3


def test_nobody_can_answer_for_a_figure_that_is_not_trusted():
    waiver = "{gate: robust-accuracy, name: K, date: 2026-11-01, reason: r, until: 2027-01-01}"
    decided = decide(cases.untrusted(), text=f"waivers:\n- {waiver}")
    assert outcomes(decided)["robust-accuracy"] == "not decidable"
    assert [one["gate"] for one in decided["expired"]] == ["robust-accuracy"]  # it did nothing


def test_every_figure_but_named_sections_needs_trust():
    whole = cases.untrusted()
    for section in whole["measured"]:
        needs = bool(gates.untrusted(whole, f"/measured/{section}/secured"))
        assert needs == (section not in gates._NEED_NO_TRUST), section


def test_what_was_not_measured_is_not_decidable():
    decided = decide(cases.sealed(provenance=None))
    assert outcomes(decided)["no-provenance-failure"] == "not decidable"
    assert decided["outcome"] == "not decidable"
    absent = cases.provenance()
    absent["checks"][1]["outcome"] = "absent"
    full = decide(cases.sealed(provenance=absent), "full", cases.answers_text())
    assert outcomes(full)["hashes-locked"] == "not decidable"


def test_one_gate_that_fails_decides():
    decided = decide(cases.sealed(provenance=cases.provenance(failed=(2,)), screening=None))
    assert decided["outcome"] == "failed" and gates.EXIT_CODES[decided["outcome"]] == 1


@pytest.mark.parametrize(
    ("date", "outcome"),
    [
        ("2026-10-31", "failed"),
        ("2026-11-01", "waived"),
        ("2027-01-01", "waived"),
        ("2027-01-02", "failed"),
    ],
)
def test_a_waiver_counts_on_its_days_only(date, outcome):
    waiver = "gate: no-leakage, name: 佐藤, date: 2026-11-01, reason: r, until: 2027-01-01"
    text = f"waivers:\n- {{{waiver}}}"
    data = {**cases.MEASURED["data"], "test_among_train": 3}
    decided = decide(cases.sealed(data=data), text=text, date=datetime.date.fromisoformat(date))
    assert outcomes(decided)["no-leakage"] == outcome
    assert decided["outcome"] == ("passed" if outcome == "waived" else "failed")
    assert len(decided["expired"]) == (outcome == "failed")


def test_a_limit_of_the_companys_own_takes_the_policys_place():
    text = "limits: {robust-accuracy: {limit: 0.95, reason: 命にかかわる}}"
    decided = decide(cases.sealed(), text=text)
    [gate] = [g for g in decided["gates"] if g["id"] == "robust-accuracy"]
    assert (gate["outcome"], gate["limit"], gate["own_reason"]) == ("failed", 0.95, "命にかかわる")


@pytest.mark.parametrize(
    ("gate", "limit", "message"),
    [
        ("robust-accuracy", "high", "limit is 'high', no number"),
        ("robust-accuracy", "90 %", "limit is '90 %', no number"),
        ("robust-accuracy", "", "limit is empty"),
        # Each of these is above all that can be measured: the gate would be open for good.
        ("attack-success", "20", "must be at most 1; a share of 20 % is written 0.2"),
        ("clean-loss", "3", "three points are written 0.03"),
        ("no-leakage", "-1", "must not be negative"),
        ("attack-success", "1", "which every figure keeps; to let it open, write a waiver"),
        ("robust-accuracy", "0", "which every figure keeps"),
        ("enough-images", "0", "which every figure keeps"),
        # And these are beyond all of it: no interval of counted images ends there.
        ("robust-accuracy", "1", "which no figure can reach"),
        ("clean-accuracy", "1.0", "which no figure can reach"),
        ("attack-success", "0", "which no figure can reach"),
        ("enough-images", "0.5", "a count is a whole number"),
        ("no-leakage", "0.5", "a count is a whole number"),
    ],
)
def test_a_limit_that_means_nothing_is_refused_before_anything_is_measured(gate, limit, message):
    with pytest.raises(lines.EntryError, match=f"line 1: .*{message}"):
        read(f"limits: {{{gate}: {{limit: '{limit}', reason: r}}}}")
    shipped = {one.id: one for one in POLICY}[gate]
    options = f"unit: {shipped.unit}, measure: {shipped.measure}, comparison: {shipped.comparison}"
    text = f"gates: [{{id: a, {options}, title: t, reason: r, limit: {{pilot: '{limit}'}}}}]"
    with pytest.raises(lines.EntryError):
        policy.parse(lines.parse(text, "policy.yaml"))


def test_a_limit_that_just_can_be_reached_is_taken():
    # Draws have no interval: all 20,000 may pay.
    for gate, limit in (("worth-it", 1), ("no-leakage", 0), ("robust-accuracy", 0.999)):
        text = f"limits: {{{gate}: {{limit: {limit}, reason: r}}}}"
        assert read(text).limits[gate].value == limit
    plain = GATE % ("/measured/clean/usual/value", "at_least", 1)
    assert policy.parse(lines.parse(plain, "policy.yaml"))


OF_ROWS = "/measured/rows/0/success/high"
UNIT_GATE = "gates: [{id: a, measure: %s, comparison: %s, limit: %s, title: t, reason: r%s}]"


@pytest.mark.parametrize("unit", [None, *measures.UNITS])
@pytest.mark.parametrize(
    ("pointer", "comparison", "limit", "message"),
    [
        ("/measured/attacked/secured/success", "at_most", 10, "a share of 10 % is written 0.1"),
        ("/measured/attacked/secured/success", "at_most", 1, "which every figure keeps"),
        ("/measured/attacked/usual/per_image/value", "at_most", 30, "is written 0.3"),
        ("/measured/clean/secured", "at_most", 20, "a share of 20 % is written 0.2"),
        ("/measured/clean/secured", "at_least", 20, "a share of 20 % is written 0.2"),
        ("/measured/clean/secured/low", "at_least", 1, "which no figure can reach"),
        ("/measured/clean/secured", "at_least", -1, "which every figure keeps"),
        ("/measured/clean/loss", "at_most", 5, "three points are written 0.03"),
        ("/measured/clean/loss/high", "at_most", 1, "which every figure keeps"),
        ("/measured/clean/loss", "at_least", -1, "which every figure keeps"),
        ("/measured/data/test", "at_least", 1, "which every figure keeps"),
        ("/measured/data/test", "at_least", 0.5, "a count is a whole number"),
        ("/measured/data/test_among_train", "at_most", 0.5, "a count is a whole number"),
        ("/measured/provenance/failed", "at_most", 10, "which every figure keeps"),
        ("/measured/bands/0/share", "at_most", 70, "must be at most 1"),
        ("/measured/trade_off/1/robust", "at_least", 0, "which every figure keeps"),
        ("/measured/screening/rows/0/auc", "at_most", 1, "which every figure keeps"),
        ("/decided/risk/probability_worth_it", "at_least", 50, "must be at most 1"),
        (OF_ROWS, "at_most", 0, "which no figure can reach"),
    ],
)
def test_what_a_figure_can_be_does_not_depend_on_the_unit(
    pointer, comparison, limit, message, unit
):
    typed = f", unit: {unit}" if unit else ""
    text = UNIT_GATE % (pointer, comparison, limit, typed)
    with pytest.raises(lines.EntryError, match=f"line 1: .*{message}"):
        policy.parse(lines.parse(text, "policy.yaml"))


@pytest.mark.parametrize(
    ("pointer", "comparison", "limit", "unit"),
    [
        ("/measured/clean/secured", "at_least", 0.9, "share"),
        ("/measured/clean/loss", "at_most", -0.01, "points"),
        ("/measured/data/test", "at_least", 2, "count"),
        ("/measured/provenance/absent", "at_most", 9, "count"),
        ("/decided/risk/net/p10", "at_least", 0, "money"),
        ("/measured/cost/factor", "at_most", 30, "factor"),
        ("/measured/provenance/checks/2/outcome", "is", "pass", "factor"),
    ],
)
def test_a_gate_without_a_unit_has_that_of_its_figure(pointer, comparison, limit, unit):
    text = UNIT_GATE % (pointer, comparison, limit, "")
    [gate] = policy.parse(lines.parse(text, "policy.yaml"))
    assert (gate.unit, gate.limit_at("full")) == (unit, limit)


def test_of_every_figure_with_an_interval_it_is_known_what_it_can_be():
    pointers = [("/measured", cases.MEASURED)]
    estimates = []
    while pointers:
        pointer, value = pointers.pop()
        if isinstance(value, dict) and {"low", "high", "n"} <= value.keys():
            estimates.append(pointer)
        elif isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            pointers += [(f"{pointer}/{name}", entry) for name, entry in inner]
    assert len(estimates) > 30
    for pointer in estimates:
        loss = pointer == "/measured/clean/loss"
        assert measures.measure_at(pointer).unit == ("points" if loss else "share"), pointer
        assert measures.is_estimated(pointer, "low") != loss
    for gate in POLICY:
        assert gate.unit in ("word", measures.measure_at(gate.measure).unit), gate.id


@pytest.mark.parametrize("word", ["fail", "passd", "absent"])
def test_another_word_than_the_policys_is_no_limit(word):
    with pytest.raises(lines.EntryError, match=f"is '{word}'; this gate asks for 'pass'.*waiver"):
        read(f"limits: {{safe-format: {{limit: {word}, reason: r}}}}")
    assert read("limits: {safe-format: {limit: pass, reason: r}}").limits["safe-format"]


@pytest.mark.parametrize(
    ("figure", "limit", "held"),
    [(True, "true", True), (False, "true", False), (360, "360.0", True), (360, "many", False)],
)
def test_words_truths_and_numbers_are_what_they_are(figure, limit, held):
    assert gates.holds(figure, "is", limit, "x") is held


def test_a_difference_that_is_just_its_limit_holds():
    assert 0.9 - 0.88 > 0.02 and gates.holds(0.9 - 0.88, "at_most", 0.02, "x")
    assert 0.3 - 0.2 < 0.1 and gates.holds(0.3 - 0.2, "at_least", 0.1, "x")


def test_yes_and_no_are_truths_as_the_page_writes_them():
    gate = GATE % ("/measured/trust/secured/trusted", "is", "yes")
    decided = decide(cases.sealed(), limits=policy.parse(lines.parse(gate, "policy.yaml")))
    assert outcomes(decided) == {"a": "passed"}


def test_a_limit_that_is_looser_than_the_policys_is_said():
    text = "limits: {robust-accuracy: {limit: %s, reason: r}}"
    [policys] = [gate.limit_at("pilot") for gate in POLICY if gate.id == "robust-accuracy"]
    for limit, loosened in ((0.1, policys), (0.99, None), (policys, None)):
        decided = decide(cases.sealed(), text=text % limit)
        [gate] = [g for g in decided["gates"] if g["id"] == "robust-accuracy"]
        assert gate["policy_limit"] == loosened


def own_policy(*changed, without=()):
    """The shipped policy with other limits or measures, and without some of its gates."""
    kept = [gate for gate in POLICY if gate.id not in {*without, *(one.id for one in changed)}]
    return policy.Policy((*kept, *changed), "own.yaml", "f" * 64)


def shipped_gate(name, limit=None, **changed):
    [gate] = [gate for gate in POLICY if gate.id == name]
    limits = gate.limits if limit is None else dict.fromkeys(answers.STAGES, limit)
    return dataclasses.replace(gate, limits=limits, **changed)


ROBUST, SAFE = "robust-accuracy", "safe-format"


@pytest.mark.parametrize(
    ("limits", "beyond"),
    [
        (own_policy(), {}),
        (own_policy(shipped_gate(ROBUST, 0.9)), {}),
        (own_policy(shipped_gate(ROBUST, 0.2)), {ROBUST: 0.2}),
        (own_policy(shipped_gate("attack-success", 0.9)), {"attack-success": 0.9}),
        (own_policy(shipped_gate(SAFE, "absent")), {SAFE: "absent"}),
        (own_policy(without=(ROBUST, "worth-it")), {ROBUST: None, "worth-it": None}),
        # An id can be anything: what counts is what is compared.
        (own_policy(dataclasses.replace(shipped_gate(ROBUST), id="a"), without=(ROBUST,)), {}),
        (own_policy(shipped_gate(ROBUST, measure="/measured/clean/usual")), {ROBUST: None}),
        (own_policy(shipped_gate(ROBUST, 0.2), shipped_gate(ROBUST, 0.9, id="b")), {}),
    ],
)
def test_what_the_shipped_policy_asks_beyond_an_own_one_is_recorded(limits, beyond):
    decided = decide(cases.sealed(), "full", limits=limits)
    said = decided["policy"]
    assert (said["origin"], said["file"], said["sha256"]) == ("own", "own.yaml", "f" * 64)
    assert {gate["id"]: gate["own_limit"] for gate in said["shipped_beyond"]} == beyond
    shipped = {gate.id: gate.limits["full"] for gate in POLICY}
    for gate in said["shipped_beyond"]:
        assert gate["limit"] == shipped[gate["id"]]


def test_only_gates_of_the_stage_and_limits_of_the_policy_are_held_against_the_shipped_one():
    without = own_policy(without=("hashes-locked", "single-image-attack"))
    assert decide(cases.sealed(), "pilot", limits=without)["policy"]["shipped_beyond"] == []
    text = "limits: {robust-accuracy: {limit: %s, reason: r}}"
    limits = own_policy(shipped_gate(ROBUST, 0.2))
    # The company's own limit is the stricter one: nothing is looser.
    decided = decide(cases.sealed(), "full", text % 0.88, limits)
    assert decided["policy"]["shipped_beyond"] == []
    # A limit that is looser than its policy's is named as that, and only once.
    decided = decide(cases.sealed(), "full", text % 0.1, own_policy())
    assert decided["policy"]["shipped_beyond"] == []
    assert [g["id"] for g in decided["gates"] if g["policy_limit"] is not None] == [ROBUST]


def test_a_copy_of_the_shipped_policy_is_the_shipped_one_until_it_is_changed(tmp_path):
    shipped = document.pathlib.Path(policy.__file__).with_name("policy.yaml").read_bytes()
    copy = tmp_path / "copy.yaml"
    for content, origin in ((shipped, "shipped"), (shipped + b"# ours\n", "own")):
        copy.write_bytes(content)
        said = decide(cases.sealed(), limits=policy.read(copy))["policy"]
        digest = hashlib.sha256(content).hexdigest()
        assert said == {
            "origin": origin,
            "file": "copy.yaml",
            "sha256": digest,
            "shipped_beyond": [],
        }


def test_a_limit_of_the_companys_own_stands_where_the_policy_has_none_yet():
    gate = "single-image-attack"
    assert gate not in outcomes(decide(cases.sealed(), "pilot"))
    decided = decide(
        cases.sealed(), "pilot", f"limits: {{{gate}: {{limit: 0.99, reason: it is public}}}}"
    )
    assert outcomes(decided)[gate] == "failed"


GATE = "gates:\n- {id: a, measure: %s, comparison: %s, limit: %s, title: t, reason: r}"


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (
            ("/measured/claen/usual", "at_least", 1),
            "gate a: there is no figure /measured/claen",
        ),
        (("/measured/rows/99/accuracy", "at_least", 0.9), "no figure /measured/rows/99"),
        (("/measured/encoder/name", "at_least", 1), "at_least is for numbers.*'an-encoder'"),
        (("/clean", "at_least", 1), "policy.yaml, line 2: .*begins with /measured/"),
        (("/measured/clean/usual", "atleast", 1), "comparison is 'atleast'; did you mean at_least"),
        (("/measured/clean/usual", "at_least", "high"), "limit is 'high', no number"),
        (("/measured/clean/usual", "at_least", "{pilto: 1}"), "unknown entry 'pilto'.*pilot"),
        (("/measured/clean/usual", "at_least", "{full: 0.9}"), "no gate has a limit for the stage"),
        (("/measured/clean", "is", "good"), "there is no single figure there"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(gate, message):
    with pytest.raises(ValueError, match=message):
        limits = policy.parse(lines.parse(GATE % gate, "policy.yaml"))
        decide(cases.sealed(), limits=limits)


def test_the_shipped_policy_has_a_reason_for_every_limit_in_both_languages():
    for gate in POLICY:
        for texts in (gate.title, gate.reason):
            assert all(texts[language] for language in answers.LANGUAGES)
            assert texts["en"] != texts["ja"] and not texts["ja"].isascii()
    for item in ITEMS:
        assert item.text["en"].isascii() and not item.text["ja"].isascii()


def test_evidence_ticks_an_item_and_no_word_does_against_it():
    said = "checklist:\n" + "\n".join(
        f"  {name}: {{done: true, by: 佐藤, date: 2026-11-02}}"
        for name in ("fallback", "data-split")
    )
    data = {**cases.MEASURED["data"], "test_among_train": 3}
    decided = decide(cases.sealed(data=data), text=said)
    states = {item["id"]: item["state"] for item in decided["checklist"]}
    assert states["fallback"] == "person" and states["data-split"] == "not done"
    assert states["usual-compared"] == "evidence" and states["license-read"] == "not done"
    assert "logs-kept" not in states
    early = datetime.date(2026, 11, 1)  # before it was said
    states = {
        i["id"]: i["state"] for i in decide(cases.sealed(), text=said, date=early)["checklist"]
    }
    assert states["fallback"] == "not done"


def test_a_spreadsheet_opens_the_checklist():
    decided = decide(cases.sealed(), "full")
    content = checklists.as_csv(decided["checklist"], ["列"] * 8)
    assert content.startswith(b"\xef\xbb\xbf") and content.count(b"\r\n") == 1 + len(IDS)
    assert "人が分類器の判断を取り消せる" in content.decode("utf-8-sig")


# --- The document -------------------------------------------------------------------------------


def edited(change):
    whole = cases.untrusted()
    change(whole["measured"])
    return whole


def test_an_edited_verdict_is_refused():
    def trust(measured):
        measured["trust"]["secured"]["trusted"] = True

    with pytest.raises(document.AuditFileError, match=r"trust\.secured: trusted, but"):
        document.check(edited(trust))

    def mend(measured):
        measured["trust"]["secured"] = cases.verdict()

    with pytest.raises(document.AuditFileError, match="does not agree with its seal"):
        document.check(edited(mend))
    whole = edited(mend)
    whole["seal"] = document.digest(whole["measured"])
    document.check(whole)  # a seal can be made by anybody: the stage's own manifest is asked


def test_a_word_or_an_interval_that_contradicts_itself_is_refused():
    def word(measured):
        measured["trust"]["secured"]["checks"][3]["status"] = "passed"
        measured["trust"]["secured"]["trusted"] = True

    def interval(measured):
        measured["attacked"]["secured"]["accuracy"]["low"] = 0.95

    for change, message in (
        (word, "do not agree"),
        (interval, r"\[0.95, 0.92\] does not hold 0.9"),
    ):
        whole = edited(change)
        whole["seal"] = document.digest(whole["measured"])
        with pytest.raises(document.AuditFileError, match=message):
            document.check(whole)


def test_a_policy_without_a_gate_is_refused():
    with pytest.raises(lines.EntryError, match="has no gate"):
        policy.parse(lines.parse("gates: []", "policy.yaml"))
    assert gates.overall([]) == "not decidable"


def test_what_the_stage_left_is_asked_too(tmp_path):
    whole = cases.sealed()
    document.write(tmp_path / "audit.json", whole)
    (tmp_path / "audit").mkdir()
    manifest = tmp_path / "audit" / "manifest.json"
    manifest.write_text(json.dumps({"results": whole["measured"]}))
    assert document.read_workdir(tmp_path) == whole
    manifest.write_text(json.dumps({"results": cases.untrusted()["measured"]}))
    with pytest.raises(document.AuditFileError, match="is not what the stage `audit` measured"):
        document.read_workdir(tmp_path)


def test_an_edited_results_file_is_refused(tmp_path):
    made = {**cases.MEASURED["made"], "results_sha256": "0" * 64}
    document.write(tmp_path / "audit.json", cases.sealed(made=made))
    document.read_workdir(tmp_path)  # it may have been carried elsewhere
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(document.AuditFileError, match="somebody has edited it"):
        document.read_workdir(tmp_path)
    with pytest.raises(document.AuditFileError, match=r"there is no audit\.json in"):
        document.read_workdir(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "is not of type 'object'"),
        ('{"schema": 2}', "schema: 2; .*newer"),
        ('{"schema": 1}', "'seal' is a required property"),
        ('{"schema": 1, "seal": NaN}', "seal: nan is not a finite"),
    ],
)
def test_a_file_that_is_no_audit_is_refused(tmp_path, text, message):
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(document.AuditFileError, match=message) as caught:
        document.read(tmp_path / "audit.json")
    assert "newer" in message or "run `robust-ssl audit run` again" in str(caught.value)


def test_a_decision_needs_no_jax():
    program = """
import sys
import audit_cases as cases
from robust_ssl.audit import checklists, decision, policy, answers, pages
decided = decision.decide(cases.sealed(), "full", policy.read(), checklists.read(),
                          answers.parse(cases.entry(cases.answers_text()), {}, []))
assert "NIST" in pages.html(decided, "ja")
assert "jax" not in sys.modules and "matplotlib" not in sys.modules
"""
    path = [*sys.path, "tests"]
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{program}"]
    subprocess.run(command, check=True, cwd=document.pathlib.Path(__file__).parents[1])
