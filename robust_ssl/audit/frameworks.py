"""Which part of which framework an audit helps to show; it never shows that one is complied with.

``at_hand`` says whether the framework's text lay beside this list when it was written.  None did:
the parts are named by their public titles and have to be looked up before they are relied on.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a framework.

    Attributes:
      framework: Its name, the same in both languages.
      part: Which part, in each language.
      helps: The section of the page that helps to show it: a key of the catalogues.
      at_hand: Whether the text itself was at hand.
    """

    framework: str
    part: dict[str, str]
    helps: str
    at_hand: bool = False


PARTS = (
    Part(
        "NIST AI 100-2 E2025",
        {
            "en": "Evasion attacks on predictive AI; supply chain and model poisoning",
            "ja": "予測AIに対する回避攻撃、サプライチェーンとモデルの汚染",
        },
        "section.attack",
    ),
    Part(
        "MITRE ATLAS",
        {
            "en": "Craft Adversarial Data; AI Supply Chain Compromise; Evade AI Model",
            "ja": "敵対的データの作成、AIサプライチェーンの侵害、AIモデルの回避",
        },
        "section.attack",
    ),
    Part(
        "OWASP Machine Learning Security Top 10",
        {
            "en": "ML01 Input Manipulation; ML06 AI Supply Chain; ML07 Transfer Learning",
            "ja": "ML01 入力の改ざん、ML06 AIサプライチェーン、ML07 転移学習への攻撃",
        },
        "section.provenance",
    ),
    Part(
        "ISO/IEC 42001 Annex A",
        {
            "en": "Verification and validation of AI systems; third-party components",
            "ja": "AIシステムの検証と妥当性確認、第三者から得た構成要素",
        },
        "section.gates",
    ),
    Part(
        "EU AI Act, Article 15",
        {
            "en": "Accuracy, robustness and cybersecurity of high-risk systems",
            "ja": "高リスクAIシステムの正確性、頑健性、サイバーセキュリティ",
        },
        "section.trust",
    ),
    Part(
        "AI事業者ガイドライン",
        {
            "en": "Security; safety; accountability (guidelines for businesses in Japan)",
            "ja": "セキュリティ確保、安全性、アカウンタビリティ",
        },
        "section.checklist",
    ),
    Part(
        "AIST 機械学習品質マネジメントガイドライン",
        {
            "en": "Internal qualities C-1, C-2 and E-1, and the chapter on security",
            "ja": "内部品質 C-1、C-2、E-1 と、セキュリティの章",
        },
        "section.trust",
    ),
)


def as_json() -> list[dict[str, Any]]:
    """Returns the parts as ``audit.json`` keeps them."""
    return [dataclasses.asdict(part) for part in PARTS]
