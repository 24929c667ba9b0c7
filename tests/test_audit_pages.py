"""The pages of an audit: nothing but what `audit.json` holds, the same in both languages."""

import base64
import dataclasses
import datetime
import hashlib
import html.parser
import json
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import audit_cases as cases
import pytest

from robust_ssl import settings
from robust_ssl.audit import answers, checklists, decision, document, junit, pages, policy, summary
from robust_ssl.audit.pages import catalog, drawing, numbers
from robust_ssl.evaluation.checks.table import CHECKS
from robust_ssl.experiment.audit_screening import screening_of

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = {  # of the guide, with their outcomes
    "pilot_yes_full_no": "failed",
    "not_worth_it": "failed",
    "not_believable": "not decidable",
}
POLICY, ITEMS = policy.read(), checklists.read()
FOLDER = pathlib.Path(pages.__file__).parent
TAIL = """
organization: <script>alert(1)</script> 株式会社
checklist:
  fallback: {done: true, by: 佐藤, date: 2026-11-02, note: =1+1}
waivers:
- {gate: no-leakage, name: 佐藤, date: 2026-11-01, reason: r & d, until: 2027-01-01}
- {gate: clean-loss, name: 鈴木, date: 2025-11-01, reason: r, until: 2026-01-01}
"""


def found(share):
    return {"share": share, "n": 100, "ci95": [share - 0.05, share + 0.05]}


def separated(auc, **facts):
    rates = {"at_1_percent": found(auc / 2), "at_5_percent": found(auc / 1.5)}
    return {"auc": auc, "auc_ci95": [auc - 0.05, auc + 0.05], **rates, **facts}


SCREENED = {  # as the stage `screen` leaves it
    "detectors": [
        {
            "detector": "squeeze",
            "verdict": "defeated",
            "attacks": [
                separated(0.9, attack="advencoder", epsilon=epsilon, threat="Linf", seed=0)
                for epsilon in (4 / 255, 8 / 255)
            ],
            "adaptive": [
                separated(
                    0.5, family="per_image", epsilon=4 / 255, threat="Linf", verdict="defeated"
                )
            ],
        }
    ]
}
SCREENING = screening_of(SCREENED, 8 / 255)


def decide(whole, stage, text, limits=POLICY):
    ids = {gate.id: gate.read_limit for gate in limits}, [item.id for item in ITEMS]
    read = answers.parse(cases.entry(text), *ids)
    return decision.decide(whole, stage, limits, ITEMS, read, datetime.date(2026, 11, 28))


def leaking():
    return cases.sealed(data={**cases.MEASURED["data"], "test_among_train": 3}, screening=SCREENING)


def bare():
    cost = {**cases.MEASURED["cost"], "factor": None, "extra_training_seconds": None}
    cost["secured"] = {"training_seconds": None, "seconds_per_image": None}
    points = [{**p, "cost_factor": None} for p in cases.MEASURED["trade_off"]]
    nothing = dict.fromkeys(("provenance", "layers", "bands", "inspection"))
    return cases.sealed(**nothing, cost=cost, trade_off=points, examples=[])


def failed_recipe():
    gone = {
        name: {**cases.MEASURED[name], "secured": None} for name in ("attacked", "models", "trust")
    }
    gone["clean"] = {**cases.MEASURED["clean"], "secured": None, "loss": None}
    return cases.sealed(**gone)


def own_policy(*, limit):
    """The shipped policy with another limit of accuracy under attack, and without money."""
    gates = [
        dataclasses.replace(gate, limits={"full": limit}) if gate.id == "robust-accuracy" else gate
        for gate in POLICY
        if gate.id != "worth-it"
    ]
    return policy.Policy(tuple(gates), "ours.yaml", "f" * 64)


DECIDED = {
    "good": decide(cases.sealed(), "full", cases.answers_text()),
    "waived": decide(leaking(), "pilot", cases.answers_text(tail=TAIL)),
    "untrusted": decide(cases.untrusted(), "staged", cases.answers_text()),
    "poor": decide(cases.sealed(), "staged", cases.answers_text(one_off_cost="90000000")),
    "no money": decide(cases.sealed(provenance=cases.provenance((2,))), "pilot", ""),
    "bare": decide(bare(), "full", cases.answers_text()),
    "failed recipe": decide(failed_recipe(), "pilot", cases.answers_text()),
    "own policy": decide(cases.sealed(), "full", cases.answers_text(), own_policy(limit=0.2)),
}
each = pytest.mark.parametrize("name", DECIDED)


class Page(html.parser.HTMLParser):
    """The texts of a page outside of what says where a number comes from, and these numbers."""

    QUIET = ("style", "title", "code", "data")

    def __init__(self, text):
        super().__init__()
        self.inside, self.values, self.texts, self.ids, self.tags = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        quiet = attrs.get("class") == "tick" or "data-value" in attrs
        value = attrs.get("value" if tag == "data" else "data-value")
        self.values += [] if value is None else [float(json.loads(value))]
        if tag not in ("meta", "img", "br", "wbr"):
            self.inside.append((tag, quiet or tag in self.QUIET))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag

    def handle_data(self, data):
        if not any(quiet for _, quiet in self.inside):
            self.texts.append(data)


def leaves(value):
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        for entry in inner:
            yield from leaves(entry)
    else:
        yield value


@each
def test_every_number_is_in_the_document_and_the_same_in_both_languages(name):
    known = [leaf for leaf in leaves(DECIDED[name])]
    figures = {float(leaf) for leaf in known if isinstance(leaf, int | float)}
    found = {}
    for language in answers.LANGUAGES:
        page = Page(pages.html(DECIDED[name], language))
        assert len(page.values) > 30
        assert set(page.values) <= figures
        # What is no number of the document is a word of a catalogue, a policy or the company.
        words = " ".join([*catalog.messages(language).values(), *map(str, known)])
        outside = set(re.findall(r"\d[\d.,]*", " ".join(page.texts)))
        edges = {"1", "10", "100", "1,000", "0"}  # of axes
        assert {n.rstrip(".,") for n in outside} - edges <= set(
            re.findall(r"\d[\d.,]*\d|\d", words)
        )
        found[language] = sorted(page.values)
    assert found["en"] == found["ja"]


@each
@pytest.mark.parametrize("language", answers.LANGUAGES)
def test_a_page_is_self_contained(name, language):
    text = pages.html(DECIDED[name], language)
    page = Page(text)
    assert not page.inside, "every tag is closed"
    assert len(page.ids) == len(set(page.ids))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "form", "base"}
    for tag, attrs in page.tags:
        assert "style" not in attrs and not any(key.startswith("on") for key in attrs)
        if tag == "img":
            assert attrs["src"].startswith("data:image/png;base64,") and attrs["alt"]
        if tag == "a":
            assert attrs["href"] in pages.PAGES.values()
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    allowed = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    sha = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert allowed == f"default-src 'none'; style-src 'sha256-{sha}'; img-src data:"


@each
def test_the_same_document_gives_the_same_bytes(name, tmp_path):
    first = {path.name: path.read_bytes() for path in pages.write(tmp_path, DECIDED[name])}
    again = {path.name: path.read_bytes() for path in pages.write(tmp_path, DECIDED[name])}
    assert first == again
    assert set(first) == {"audit.json", "audit.html", "audit.ja.html", "checklist.csv", "junit.xml"}
    suite = ElementTree.fromstring(first["junit.xml"])
    counts = DECIDED[name]["decided"]["counts"]
    assert int(suite.get("failures")) == counts["failed"]
    assert int(suite.get("errors")) == counts["not_decidable"]


def test_a_checklist_that_somebody_filled_in_is_kept(tmp_path, caplog):
    file = tmp_path / "checklist.csv"
    for name in ("good", "waived", "good"):
        pages.write(tmp_path, DECIDED[name])
    assert not caplog.text and not list(tmp_path.glob("*.changed*"))
    ours = file.read_bytes()
    file.write_bytes(ours + b"my note")
    for _ in range(2):
        pages.write(tmp_path, DECIDED["good"])
        assert file.read_bytes() == ours
    assert (tmp_path / "checklist.csv.changed").read_bytes() == ours + b"my note"
    assert caplog.text.count("what was there is checklist.csv.changed") == 1


def test_what_a_company_writes_is_text():
    text = pages.html(DECIDED["waived"], "ja")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 株式会社" in text
    assert "&lt;b&gt;nut&lt;/b&gt;" in text and "r &amp; d" in text
    row = checklists.as_csv(DECIDED["waived"]["decided"]["checklist"], ["c"] * 8).decode()
    assert "'=1+1" in row


def test_names_that_cannot_be_seen_are_escaped(tmp_path):
    examples = [{**cases.MEASURED["examples"][0], "said_clean": "caf\udce9\u202eabc\x1b[2J"}]
    data = {**cases.MEASURED["data"], "name": "\udce9\u202e{x}"}
    layers = {"usual": [{"layer": "\u202eblock", "drift": 1.0}]}
    whole = decide(cases.sealed(examples=examples, data=data, layers=layers), "pilot", "")
    pages.write(tmp_path, whole)
    text = (tmp_path / "audit.ja.html").read_text(encoding="utf-8")
    assert "\u202e" not in text and "\x1b" not in text and r"caf\udce9\u202eabc" in text
    assert r"\udce9\u202e{x}" in text


def test_a_detector_that_is_defeated_is_shown_as_defeated():
    assert [row["adaptive"] for row in SCREENING["rows"]] == [False, True]
    for language in answers.LANGUAGES:
        text = pages.html(DECIDED["waived"], language)
        assert catalog.messages(language)["screening.defeated"] in text


def test_what_the_curve_leaves_out_is_said():
    others = catalog.messages("en")["budget.others"]
    assert others in pages.html(DECIDED["good"], "en")
    assert others not in pages.html(DECIDED["failed recipe"], "en")
    pair = cases.MEASURED["attacked"]
    alone = {**pair, "secured": {**pair["secured"], "adaptive": None}}
    decided = decide(cases.sealed(attacked=alone), "pilot", cases.answers_text())
    assert others not in pages.html(decided, "en")


def test_what_rests_on_the_usual_classifier_alone_is_marked_too():
    verdicts = {"usual": cases.verdict(False), "secured": cases.verdict()}
    text = pages.html(decide(cases.sealed(trust=verdicts), "staged", cases.answers_text()), "en")
    messages = catalog.messages("en")
    for key in ("risk.doubted", "four.money.doubted", "figures.doubted.usual"):
        assert messages[key] in text, key
    assert messages["figures.doubted"] not in text


@pytest.mark.parametrize("language", answers.LANGUAGES)
@pytest.mark.parametrize("doubted", [(), ("usual",), ("secured",), ("usual", "secured")])
def test_every_figure_under_attack_of_a_classifier_that_is_not_trusted_is_marked(language, doubted):
    verdicts = {role: cases.verdict(role not in doubted) for role in ("usual", "secured")}
    whole = cases.sealed(trust=verdicts, screening=SCREENING)
    messages = catalog.messages(language)
    page = html.unescape(pages.html(decide(whole, "staged", ""), language))
    marks = {"usual": messages["figures.doubted.usual"], "secured": messages["figures.doubted"]}
    shown = {  # by the sentence with a figure, of whom it is
        "image.rows": ("usual",),
        "budget.caption": ("usual", "secured"),
        "layers.caption": ("usual", "secured"),
        "screening.intro": ("secured",),
    }
    for key, roles in shown.items():
        caption = re.split("</(?:p|figcaption)>", page.partition(messages[key])[2])[0]
        for role, mark in marks.items():
            assert (mark in caption) == (role in doubted and role in roles), (key, role)
    assert sum(page.count(mark) for mark in marks.values()) == sum(
        role in doubted for roles in shown.values() for role in roles
    )


def test_a_figure_of_the_trade_off_that_is_not_trusted_is_marked():
    points = [{**point, "trusted": False} for point in cases.MEASURED["trade_off"]]
    svg = str(_figures().trade_off(points))
    assert svg.count("not believable") == len(points)
    assert "not believable" not in str(_figures().trade_off(cases.MEASURED["trade_off"]))


def _figures():
    return drawing.Figures(catalog.Catalog.read("en"), numbers.Numbers("en"))


def test_what_one_answer_reaches_stands_beside_the_accuracy():
    share = {"value": 0.95, "low": 0.93, "high": 0.97, "n": 1000}
    data = {**cases.MEASURED["data"], "largest_class": share}
    text = pages.html(decide(cases.sealed(data=data), "pilot", cases.answers_text()), "en")
    assert re.search(r">95.0 %</data> by always saying the most frequent class", text)


def test_a_limit_is_shown_as_it_was_typed():
    shown = numbers.Numbers("en", "JPY").limit
    plain = lambda value, unit: re.sub("<[^>]*>", "", str(shown(value, unit)))  # noqa: E731
    minus = numbers.MINUS
    assert plain(0.95707, "share") == "95.707 %" and plain(0.9, "share") == "90.0 %"
    assert (
        plain(-0.0111, "points") == f"{minus}1.11 points" and plain(0.03, "points") == "3.0 points"
    )
    assert plain(1234.5, "count") == "1,234.5" and plain(1000.0, "count") == "1,000"
    text = "limits: {robust-accuracy: {limit: 0.1234, reason: r}}"
    page = pages.html(decide(cases.sealed(), "pilot", text), "en")
    assert "Looser than the policy" in page and "12.34 %" in page


def _risk_of(text, **sections):
    decided = decide(cases.sealed(**sections), "staged", text)
    pages_ = {language: pages.html(decided, language) for language in answers.LANGUAGES}
    return decided["decided"]["risk"], {n: re.sub("<[^>]*>", "", x) for n, x in pages_.items()}


def test_where_securing_pays_only_without_many_attacks_the_page_says_below_which_share():
    attacked = {"usual": cases.attacked(0.85, 0.1), "secured": cases.attacked(0.5, 0.5)}
    clean = {**cases.MEASURED["clean"], "usual": cases.share(0.8)}
    amounts = {"loss_per_clean_error": "100", "one_off_cost": "20000", "loss_per_error": "2000"}
    text = cases.answers_text(**amounts, attacked_share="[0.01, 0.1, 0.2]")
    found, shown = _risk_of(text, attacked=attacked, clean=clean)
    assert found["pays"] == "below" and not found["worth_it"]
    share = numbers.percent(found["break_even_share"])
    assert f"It pays only while fewer than {share} of decisions are attacked." in shown["en"]
    assert f"攻撃される割合が {share} 未満の場合に限り" in shown["ja"]
    for language, page in shown.items():
        for key in ("risk.break_even.always", "risk.break_even.never"):
            assert catalog.messages(language)[key] not in page


def test_a_share_of_attacks_where_the_answer_turns_keeps_two_figures():
    # At 0.1 % it does not pay, so that it pays from 0.1 % on would be no answer.
    text = cases.answers_text(one_off_cost="1100000", attacked_share="[0.0005, 0.001, 0.003]")
    found, shown = _risk_of(text)
    assert 0.001 < found["break_even_share"] < 0.002 and not found["worth_it"]
    share = numbers.percent(found["break_even_share"])
    assert len(share.removesuffix(" %").removeprefix("0.")) == 2
    assert f"It pays from {share} of attacked decisions on." in shown["en"]
    assert numbers.percent(0.0011) == "0.11 %" and numbers.percent(0.011) == "1.1 %"


def test_a_number_of_trainings_that_is_no_whole_one_is_shown_as_it_is():
    text = cases.answers_text(
        retrainings_per_year="[0, 1, 4]", compute_price_per_hour="200000", one_off_cost="500000"
    )
    found, shown = _risk_of(text)
    [turn] = [one for one in found["turns"] if one["amount"] == "retrainings_per_year"]
    assert turn["within"] and not turn["value"].is_integer()
    assert f"number of trainings a year is {turn['direction']} {turn['value']:g}" in shown["en"]


def test_what_the_usual_fine_tuning_is_depends_on_whether_it_trains_the_encoder():
    for trains, key in ((True, "words.usual.meaning.trained"), (False, "words.usual.meaning")):
        models = {**cases.MEASURED["models"]}
        models["usual"] = {**models["usual"], "trains_encoder": trains}
        decided = decide(cases.sealed(models=models), "pilot", "")
        for language in answers.LANGUAGES:
            page, messages = pages.html(decided, language), catalog.messages(language)
            assert messages[key] in page
            other = {"words.usual.meaning.trained", "words.usual.meaning"} - {key}
            assert not any(messages[one] in page for one in other)


def test_the_scanners_warning_is_shown_as_an_opinion():
    checks = cases.provenance()
    checks["checks"][8].update(name="scanner", outcome="fail", said="warns of uuid.UUID")
    checks["passed"] = 9
    decided = decide(cases.sealed(provenance=checks), "pilot", "")
    assert decided["decided"]["outcome"] == "passed"
    for language in answers.LANGUAGES:
        page = pages.html(decided, language)
        assert catalog.messages(language)["provenance.opinion"] in page
        assert "warns of uuid.UUID" in page and '<td class="failed">' not in page
        assert catalog.messages(language)["provenance.opinion"] not in pages.html(
            DECIDED["good"], language
        )


def test_a_page_names_an_own_policy_and_what_the_shipped_one_asks_beyond_it():
    titles = {gate.id: gate.title for gate in POLICY}
    for language in answers.LANGUAGES:
        messages = catalog.messages(language)
        shown = re.sub("<[^>]*>", "", pages.html(DECIDED["own policy"], language))
        assert messages["policy.own"].format(file="ours.yaml") in shown
        assert messages["policy.own.keeps"] not in shown and "f" * 64 in shown
        left_out, looser = messages["gate.left_out"], messages["gate.below_shipped"]
        colon = messages["colon"]
        assert f"{left_out} {titles['worth-it'][language]}{colon}" in shown
        assert f"{looser} {titles['robust-accuracy'][language]}{colon}20.0 %" in shown
        limit = messages["comparison.at_least"].format(limit="85.0 %")
        assert messages["in_shipped"] + limit in shown
        shipped = re.sub("<[^>]*>", "", pages.html(DECIDED["good"], language))
        assert messages["policy.shipped"] in shipped
        for text in ("ours.yaml", left_out, looser):
            assert text not in shipped
    stricter = policy.Policy(tuple(POLICY), "ours.yaml", "f" * 64)
    page = pages.html(decide(cases.sealed(), "full", cases.answers_text(), stricter), "en")
    assert catalog.messages("en")["policy.own.keeps"] in page


def test_a_shipped_gate_that_is_left_out_or_looser_is_a_skipped_test_of_a_build_server():
    suite = ElementTree.fromstring(junit.xml(DECIDED["own policy"]["decided"]).encode())
    assert (suite.get("skipped"), suite.get("failures")) == ("2", "0")
    assert int(suite.get("tests")) == len(suite.findall("testcase"))
    said = {
        case.get("name"): case.find("skipped").get("message")
        for case in suite.findall("testcase")
        if case.find("skipped") is not None
    }
    assert said == {
        "robust-accuracy": "looser, 0.2; in the shipped policy at_least 0.85",
        "worth-it": "left out; in the shipped policy at_least 0.8",
    }
    values = [one.get("value") for one in suite.find("properties")]
    assert values == ["ours.yaml", "f" * 64]
    shipped = ElementTree.fromstring(junit.xml(DECIDED["good"]["decided"]).encode())
    assert shipped.get("skipped") == "0" and shipped.find("properties") is None


@pytest.mark.parametrize(
    ("text", "unmeasured", "lacks"),
    [
        (cases.answers_text(), True, ()),
        (cases.answers_text(one_off_cost=""), True, ("one_off_cost",)),
        (cases.answers_text(one_off_cost=""), False, ("one_off_cost",)),
    ],
)
def test_why_money_is_not_computed_is_what_is_missing(tmp_path, text, unmeasured, lacks):
    whole = decide(failed_recipe() if unmeasured else cases.sealed(), "pilot", text)
    assert whole["decided"]["risk"] is None
    pages.write(tmp_path, whole)
    [line] = [line for line in summary.lines(tmp_path) if "money:" in line]
    why = [f"answers.yaml lacks {', '.join(lacks)}"] if lacks else []
    why += ["the secured classifier was not measured"] if unmeasured else []
    assert line == f"  money: not computed; {'; '.join(why)}"
    for language, name in pages.PAGES.items():
        page, messages = (tmp_path / name).read_text(encoding="utf-8"), catalog.messages(language)
        for key in ("risk.not_measured", "four.money.not_measured"):
            assert (messages[key] in page) == unmeasured, key
        for key in ("risk.missing", "four.money.fill"):
            assert (messages[key] in page) == bool(lacks), key
        assert all(f"<code>{name}</code>" in page for name in lacks)


def test_amber_is_what_is_not_decidable():
    for language in answers.LANGUAGES:
        text = pages.html(DECIDED["untrusted"], language)
        assert '<section class="verdict undecided">' in text and "verdict passed" not in text
        assert catalog.messages(language)["risk.doubted"] in text


def test_no_message_is_missing():
    english, japanese = (catalog.messages(language) for language in answers.LANGUAGES)
    assert list(english) == list(japanese)
    for key, text in english.items():
        holes = re.findall(r"{(\w+)}", text), re.findall(r"{(\w+)}", japanese[key])
        assert sorted(holes[0]) == sorted(holes[1]), key
        same_in_both = text == japanese[key] or not re.search("[A-Za-z]{3}", text)
        assert same_in_both or not japanese[key].isascii() or key == "other_language", key
    assert {f"check.{name}" for name in CHECKS} == {k for k in english if k.startswith("check.")}
    for name in answers.AMOUNTS:
        assert f"amount.{name}" in english


def test_templates_hold_no_words():
    for file in FOLDER.glob("*.j2"):
        text = file.read_text(encoding="utf-8")
        text = re.sub(r"<code>.*?</code>|{[{%#].*?[}%#]}|<[^>]*>|&\w+;", " ", text)
        assert not re.search(r"[A-Za-z]{2}|[^\x00-\x7f\u2013\u2192\u00b7]", text), file.name


def test_money_is_said_as_people_say_it():
    minus = numbers.MINUS
    assert numbers.money(-1.2e9, "JPY", "ja") == f"{minus}12億円"
    assert numbers.money(-1.2e9, "JPY", "en") == f"{minus}JPY 1.2 billion"
    assert numbers.money(3400.0, "CHF", "ja") == "3,400 CHF"
    assert numbers.money(0.0, "EUR", "en") == "EUR 0"
    assert numbers.money(1.4e29, "JPY", "en") == "JPY 140,000,000,000,000,000 trillion"
    assert numbers.money(9.2e-6, "EUR", "en") == "EUR 0.0000092"
    assert numbers.plain(-0.000012) == f"{minus}0.000012"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_the_guide_is_what_its_command_makes(name):
    folder = ROOT / "docs/audit/examples" / name
    whole = document.read(folder / "audit.json")
    rules = decision.rules(None, folder / "answers.yaml")
    date = datetime.date.fromisoformat(whole["decided"]["date"])
    again = decision.decide(whole, whole["decided"]["stage"], *rules, date)
    assert again["decided"]["outcome"] == EXAMPLES[name]
    for language, page in pages.PAGES.items():
        text = (folder / page).read_text(encoding="utf-8")
        assert pages.html(again, language) == text, "run the commands of its README"
    failed = [g["id"] for g in again["decided"]["gates"] if g["outcome"] == "failed"]
    if name == "pilot_yes_full_no":
        assert decision.decide(whole, "pilot", *rules, date)["decided"]["outcome"] == "passed"
    assert name != "not_worth_it" or failed == ["worth-it"]


def test_without_jinja2_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr(pages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(settings.SettingsError, match=r"pip install 'robust-ssl\[audit\]'"):
        pages.check_installed()
