"""Does a reviewer see on the card what the evidence says, and what it does not say?"""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from policies.verdicts import GateReport, GateResult, Verdict
from tests.bundles import make_policy
from training.evaluation import Evaluation
from training.gates.config import RobustnessConfig
from training.gates.robustness import judge_robustness
from trimtab.card import Facts, card_files, limits_of
from trimtab.learning_curves import Curve


def _rows(mean: float) -> Evaluation:
    return Evaluation(np.array([mean, mean + 1]), np.ones(2, np.int64), action_change_E=np.full(2, 0.25))


@pytest.fixture
def facts() -> Facts:
    config = RobustnessConfig(strengths={"noise": (0.1,)}, watched={"delay": (1.0, 2.0)})
    measured = {("noise", 0.1): _rows(95.0), ("delay", 1.0): _rows(90.0), ("delay", 2.0): _rows(7.0)}
    safety = {
        "constraints": [
            {
                "function": "mine:<b>safe</b>",
                "decisions": 2000,
                "violations": 3,
                "episodes_with_violations": 2,
                "first_violations": [{"episode": 4, "observation": [0.123456, -1.0], "action": 1}],
            }
        ]
    }
    clean_E = np.full(20, 100.0)
    results = (
        GateResult("performance", Verdict.PASS, "return | 100", {"return_mean": 100.0, "return_low": 99.0, "return_high": 101.0}),
        GateResult("safety", Verdict.PASS, "rate is small", safety),
        judge_robustness(clean_E, measured, measured, config=config, confidence=0.95),
    )
    policy = make_policy()
    report = GateReport(policy.sha256(), "c", 0.0, 7, results)
    steps_N = np.arange(1.0, 4.0)
    curve = Curve(
        "run-1", 50.0, 1000 * steps_N, steps_N, 10 * steps_N, 9 * steps_N, 11 * steps_N, np.array([np.nan, np.nan, 42.0])
    )
    return Facts("pilot", policy, "sample", '{"id":"Sky-v0"}', {"run": "run-1", "seed": 3}, {"lr": 0.001}, report, None, curve)


def test_both_formats_say_what_was_found(facts: Facts) -> None:
    files = card_files(facts)
    markdown, page = files["card.md"].decode(), files["card.html"].decode()
    for text in (markdown, page):
        assert facts.report.policy_sha256 in text and "run-1" in text and "100 [99, 101]" in text
        assert "3 of 2,000 decisions, in 2 episodes" in text and "0.123, -1" in text and "against version 7" in text
        assert "best greedy evaluation 42" in text and "25.0%" in text
        assert "did not run" in text  # edge_cases and budget are required, and are not there
    assert r"return \| 100" in markdown and "return | 100" in page
    assert "mine:<b>safe" not in page and "mine:&lt;b&gt;safe" in page  # what others wrote is text, not markup
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert card_files(facts) == files  # the same facts are the same bytes: a bundle's digest depends on them


def test_the_drawings_show_the_numbers(facts: Facts) -> None:
    page = card_files(facts)["card.html"].decode()
    drawings = [ElementTree.fromstring(part[: part.index("</svg>") + 6]) for part in page.split("<figure>")[1:]]
    assert len(drawings) == 2  # the learning curve, and what disturbances do
    texts = [{element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")} for drawing in drawings]
    assert "environment steps" in texts[0] and {"noise", "delay"} <= texts[1]


def test_limits_follow_from_the_evidence(facts: Facts) -> None:
    limits = "\n".join(limits_of(facts))
    assert "delay 2 leaves a return of 7.5 of 100; the gate only watches it" in limits
    assert "delay 1 " not in limits and "noise" not in limits  # these keep what is required
    assert "No scenario is kept" in limits and "The reward is taken for what is wanted" in limits
    assert "compared with no other version" not in limits and "overridden" not in limits
    alone = replace(facts, report=replace(facts.report, incumbent_version=None), override_gates="a drill")
    limits = "\n".join(limits_of(alone))
    assert "compared with no other version" in limits and "The gates were overridden: 'a drill'" in limits
