"""The model card: one page on which a reviewer sees what a policy is, how it was judged, and what nobody knows about it."""

import html
import io
from dataclasses import dataclass
from typing import Any

from policies.policy import Policy
from policies.spaces import Choices
from policies.verdicts import GateReport, GateResult, Verdict
from trimtab.learning_curves import COLOURS, GREY, STYLE, Curve, picture_of

MAX_SHOWN_SETTINGS = 40
LEGEND = "one dot per strength with its interval; dashed: what is required at the filled ones; grey: the incumbent"


@dataclass(frozen=True)
class Facts:
    """What a card is made of. `settings` are the training's that are not defaults, `origin` says where the policy comes from."""

    name: str
    policy: Policy
    serving_mode: str
    environment: str
    origin: dict[str, Any]
    settings: dict[str, Any]
    report: GateReport
    override_gates: str | None
    curve: Curve | None


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class Picture:
    """An SVG drawing, and in words what it shows: all that the Markdown has of it."""

    svg: bytes
    caption: str


@dataclass(frozen=True)
class Section:
    title: str
    parts: list[str | Table | Picture]


def card_files(facts: Facts) -> dict[str, bytes]:
    """Return `card.md` and `card.html`, which need nothing else and run no script."""
    sections = sections_of(facts)
    title = f"{facts.name}: {'gates ' + str(facts.report.verdict)}"
    return {"card.md": to_markdown(title, sections).encode(), "card.html": to_html(title, sections).encode()}


def sections_of(facts: Facts) -> list[Section]:
    """Return the card's content, the same for both formats."""
    sections = [Section("What it is", [_identity(facts)]), Section("How it was trained", _training(facts))]
    sections.append(Section("How it was judged", _verdicts(facts)))
    for gate, describe in DESCRIBED.items():
        result = facts.report.result(gate)
        if result is not None and (parts := describe(result)):
            sections.append(Section(gate.replace("_", " ").capitalize(), parts))
    return [*sections, Section("Limits", ["\n".join(f"- {limit}" for limit in limits_of(facts))])]


def limits_of(facts: Facts) -> list[str]:
    """Return what the evidence does not say, as far as it can be seen from the evidence."""
    limits = [
        "All evidence comes from the training environment; nothing here says that it is like the world. Canary releases do.",
        "Every interval has the confidence that the loop file asks for, gate by gate: of many gates some may be wrong.",
    ]
    if facts.override_gates:
        limits.insert(0, f"The gates were overridden: {facts.override_gates!r}. This version can never be promoted.")
    robustness = facts.report.result("robustness")
    for row in robustness.numbers.get("disturbances", ()) if robustness else ():
        if not row["is_required"] and row["return_mean"] < robustness.numbers["required_return"]:
            lost = f"{row['return_mean']:.4g} of {robustness.numbers['clean_return']:.4g}"
            limits.append(f"{_disturbance(row)} leaves a return of {lost}; the gate only watches it.")
    regression = facts.report.result("regression")
    if regression is None:
        limits.append("No scenario is kept: gates.regression.scenarios is empty.")
    else:
        limits += [f"Scenario {name} is retired: {reason}" for name, reason in regression.numbers["retired"].items()]
    safety = facts.report.result("safety")
    if safety is not None and not safety.numbers.get("constraints"):
        limits.append("No constraint is checked: gates.safety.constraints is empty.")
    if facts.report.result("reward_hacking") is None:
        limits.append("The reward is taken for what is wanted: no gates.objective is named.")
    if facts.report.incumbent_version is None:
        limits.append("It was compared with no other version.")
    return limits


def _identity(facts: Facts) -> Table:
    policy, spaces = facts.policy, facts.policy.spaces
    action = f"{spaces.action.kind} {list(spaces.action.nvec)}" if isinstance(spaces.action, Choices) else "real numbers"
    network = policy.architecture.to_json()
    rows = [
        ("policy", facts.report.policy_sha256),
        ("environment", facts.environment),
        ("observation", f"{spaces.observation.to_json()['kind']}, {spaces.num_features} features"),
        ("action", action + (", masked" if spaces.has_mask else "")),
        ("network", ", ".join(f"{key} {value}" for key, value in network.items())),
        ("parameters", f"{sum(tensor.size for tensor in policy.tensors.values()):,}"),
        ("served", facts.serving_mode),
    ]
    return Table(("", ""), rows)


def _training(facts: Facts) -> list[str | Table | Picture]:
    rows = [(key, value) for key, value in facts.origin.items()]
    rows += [(key, value) for key, value in list(facts.settings.items())[:MAX_SHOWN_SETTINGS]]
    parts: list[str | Table | Picture] = [Table(("", ""), rows)]
    if facts.curve is not None:
        svg = picture_of([facts.curve], ("steps",), "svg")
        greedy_N = facts.curve.greedy_N[facts.curve.greedy_N == facts.curve.greedy_N]
        best = f"; best greedy evaluation {greedy_N.max():.4g}" if len(greedy_N) else ""
        parts.append(Picture(svg, f"Return over {facts.curve.env_steps_N[-1]:,.0f} environment steps{best}"))
    return parts


def _verdicts(facts: Facts) -> list[str | Table | Picture]:
    report = facts.report
    against = f"against version {report.incumbent_version}" if report.incumbent_version else "against no other version"
    rows = [(result.gate, result.verdict, result.reason) for result in report.results]
    rows += [(gate, "missing", "did not run") for gate in report.missing]
    return [f"Verdict: {report.verdict}, {against}.", Table(("gate", "verdict", "reason"), rows)]


def _performance(result: GateResult) -> list[str | Table | Picture]:
    numbers = result.numbers
    quantiles = [(f"{float(q):.0%} of episodes are below", value) for q, value in numbers.get("return_quantiles", {}).items()]
    rows = [
        ("episodes", numbers.get("episodes")),
        ("mean", _interval(numbers, "return")),
        (f"mean of the worst {numbers.get('worst_share', 0):.0%}", numbers.get("worst_return_mean")),
        ("lowest", numbers.get("return_min")),
        *quantiles,
    ]
    if "bad_episodes" in numbers:
        rows.append((f"episodes below {numbers['min_worst_return']:g}, share", _interval(numbers, "bad_share")))
    if "difference_mean" in numbers:
        rows.append(("difference to the incumbent, same initial states", _interval(numbers, "difference")))
    return [Table(("return", ""), rows)]


def _safety(result: GateResult) -> list[str | Table | Picture]:
    parts: list[str | Table | Picture] = []
    for row in result.numbers.get("constraints", ()):
        of = f"{row['violations']:,} of {row['decisions']:,} decisions, in {row['episodes_with_violations']} episodes"
        parts.append(f"{row['function']}: violated by {of}.")
        if row["first_violations"]:
            shown = [(step["episode"], _short(step["observation"]), step["action"]) for step in row["first_violations"]]
            parts.append(Table(("episode", "observation", "action"), shown))
    for row in result.numbers.get("costs", ()):
        parts.append(f"{row['function']}: mean cost {_interval(row, 'cost')}, largest {row['largest_seen']:.4g}.")
    return parts


def _robustness(result: GateResult) -> list[str | Table | Picture]:
    rows = result.numbers.get("disturbances", [])
    table = Table(
        ("disturbance", "required", "return", "greedy action changes", "incumbent"),
        [
            (
                _disturbance(row),
                "yes" if row["is_required"] else "watched",
                _interval(row, "return"),
                f"{row['action_change']:.1%}",
                f"{row['incumbent_return_mean']:.4g}" if "incumbent_return_mean" in row else "",
            )
            for row in rows
        ],
    )
    parts: list[str | Table | Picture] = [table]
    if rows:
        parts.append(Picture(_robustness_svg(result.numbers), f"Return against strength: {LEGEND}"))
    if flip := result.numbers.get("smallest_flip"):
        nearest = ", ".join(f"{value:.3g} for the nearest {float(q):.0%}" for q, value in flip["quantiles"].items())
        text = f"Of {flip['states']} states that it met, {flip['share_that_flips']:.0%} have another greedy action"
        parts.append(f"{text} within {flip['largest']:g} spreads of each feature{': ' + nearest if nearest else ''}.")
    return parts


def _regression(result: GateResult) -> list[str | Table | Picture]:
    rows = [
        (row["name"], row["episodes"], _interval(row, "return"), row["min_return"]) for row in result.numbers.get("scenarios", ())
    ]
    return [Table(("scenario", "episodes", "return", "at least"), rows)] if rows else []


def _plain(result: GateResult) -> list[str | Table | Picture]:
    return [Table(("", ""), [(key, value) for key, value in result.numbers.items() if not isinstance(value, (dict, list))])]


DESCRIBED = {
    "performance": _performance,
    "safety": _safety,
    "robustness": _robustness,
    "regression": _regression,
    "reward_hacking": _plain,
    "budget": _plain,
}


def _robustness_svg(numbers: dict[str, Any]) -> bytes:
    """Draw one panel per kind of disturbance."""
    import matplotlib
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["kind"] for row in numbers["disturbances"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.3 * len(kinds), 2.6), layout="constrained")
        for panel, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds):
            rows = [row for row in numbers["disturbances"] if row["kind"] == kind]
            strengths = [0.0] + [row["strength"] for row in rows]
            if "incumbent_return_mean" in rows[0]:
                theirs = [row["incumbent_return_mean"] for row in rows]
                panel.plot(strengths[1:], theirs, color=GREY, alpha=0.6, marker=".", gid=f"{kind}:incumbent")
            panel.plot(strengths, [numbers["clean_return"]] + [row["return_mean"] for row in rows], color=COLOURS[0])
            for row in rows:
                down, up = row["return_mean"] - row["return_low"], row["return_high"] - row["return_mean"]
                panel.errorbar(
                    row["strength"], row["return_mean"], [[down], [up]], fmt="o", color=COLOURS[0],
                    markerfacecolor=COLOURS[0] if row["is_required"] else "white",
                )  # fmt: skip
            if any(row["is_required"] for row in rows):
                panel.axhline(numbers["required_return"], color=COLOURS[1], linestyle="--", linewidth=1)
            panel.set_title(kind.replace("_", " "), fontsize=10)
            panel.set_xlabel("strength", fontsize=9)
        figure.axes[0].set_ylabel("return")
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def _disturbance(row: dict[str, Any]) -> str:
    return f"{row['kind'].replace('_', ' ')} {row['strength']:g}"


def _interval(numbers: dict[str, Any], name: str) -> str:
    if f"{name}_mean" not in numbers:
        return ""
    return f"{numbers[f'{name}_mean']:.4g} [{numbers[f'{name}_low']:.4g}, {numbers[f'{name}_high']:.4g}]"


def _short(observation: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in observation[:8]) + (", …" if len(observation) > 8 else "")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- the two formats ---


def to_markdown(title: str, sections: list[Section]) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                rows = [part.header, tuple("---" for _ in part.header), *part.rows]
                lines += [
                    "| " + " | ".join(_text(cell).replace("|", r"\|").replace("\n", " ") for cell in row) + " |" for row in rows
                ]
            else:
                lines.append(part.caption + " (drawn in card.html)" if isinstance(part, Picture) else part)
            lines.append("")
    return "\n".join(lines)


CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .5rem 0 1rem; } td, th { text-align: left; padding: .25rem .8rem .25rem 0;
vertical-align: top; border-bottom: 1px solid #e6e6e6; overflow-wrap: break-word; } h2 { margin-top: 2rem; }
.pass { color: #00694c; } .fail { color: #b33900; } .inconclusive, .missing { color: #8a6100; }
svg { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: 13px; }
"""


def to_html(title: str, sections: list[Section]) -> str:
    body = "".join(f"<h2>{html.escape(s.title)}</h2>" + "".join(_html(part) for part in s.parts) for s in sections)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n'


def _html(part: str | Table | Picture) -> str:
    if isinstance(part, Picture):
        svg = part.svg.decode()
        return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{html.escape(part.caption)}</figcaption></figure>"
    if isinstance(part, Table):
        head = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in part.header) + "</tr>" if any(part.header) else ""
        return f"<table>{head}{''.join('<tr>' + ''.join(map(_cell, row)) + '</tr>' for row in part.rows)}</table>"
    if part.startswith("- "):
        return "<ul>" + "".join(f"<li>{html.escape(line[2:])}</li>" for line in part.split("\n")) + "</ul>"
    return f"<p>{html.escape(part)}</p>"


def _cell(value: Any) -> str:
    text = html.escape(_text(value))
    verdicts = {*map(str, Verdict), "missing"}
    return f'<td class="{text}">{text}</td>' if text in verdicts else f"<td>{text}</td>"
