// What is the policy doing right now? Asks GET /v1/status each second and draws the answer; it decides and changes nothing.
// Every text from the server enters the page as a text node, never as HTML.

const POLL_INTERVAL_MS = 1000; // the monitor refreshes once a second
const REQUEST_TIMEOUT_MS = 5000;
const STALE_AFTER_S = 3; // two missed polls: one slow answer is not a lost connection
const KEY_NAME = "trimtab-api-key";
const KEY_PLACE = "The key is in the file secrets/api_key in the storage root.";
const MAX_NAMED_ACTIONS = 4;
const NUM_COLOURS = 6;
const DASHES = [[], [7, 3], [2, 3], [10, 3, 2, 3]]; // a version is told by dash and shape as well as by colour
const SHAPES = ["M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M0-6.5 6.5 0 0 6.5-6.5 0z", "M-4.5-4.5h9v9h-9z", "M0-6 6 5H-6z"];
const STATE_SIGNS = {
  running: ["▸", "info"],
  paused: ["Ⅱ", "warn"],
  promoted: ["✓", "good"],
  rolled_back: ["↶", "bad"],
  aborted: ["■", "warn"],
};
const VERDICT_SIGNS = { pass: ["✓", "good"], fail: ["✕", "bad"], inconclusive: ["?", "warn"] };

const page = {
  key: sessionStorage.getItem(KEY_NAME),
  updatedAt: null,
  problem: null,
  status: null,
  drawn: new Map(),
  charts: new Map(),
};
const byId = (id) => document.getElementById(id);

function start() {
  byId("key-form").addEventListener("submit", submitKey);
  byId("forget-key").addEventListener("click", () => askForKey(null));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
  setInterval(showFreshness, 500);
  if (page.key) pollFor(page.key);
  else askForKey(null);
}

// --- the key and the polling ---

function submitKey(event) {
  event.preventDefault();
  const key = byId("key-input").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) return askForKey("This cannot be a key: it holds spaces or characters outside ASCII.");
  sessionStorage.setItem(KEY_NAME, key);
  page.key = key;
  byId("key-problem").hidden = true;
  pollFor(key);
}

function askForKey(problem) {
  sessionStorage.removeItem(KEY_NAME);
  Object.assign(page, { key: null, updatedAt: null, problem: null, status: null });
  byId("content").hidden = byId("forget-key").hidden = true;
  byId("key-form").hidden = false;
  setText(byId("policy"), "Dashboard");
  document.title = "Trimtab";
  redraw("summary", null, () => []); // nothing of what the last key could see stays on the page
  setText(byId("announcement"), "");
  byId("key-problem").hidden = !problem;
  byId("key-problem").textContent = problem ? `${problem} ${KEY_PLACE}` : "";
  byId("key-input").value = "";
  byId("key-input").focus();
  showFreshness();
}

async function pollFor(key) {
  while (page.key === key) {
    const begun = performance.now();
    const answer = await fetchStatus(key);
    if (page.key !== key) return; // the key was changed while this request was on its way
    if (answer.unauthorized) return askForKey("The server refused this key (401).");
    if (answer.status) showStatus(answer.status);
    page.problem = answer.problem ?? null;
    showFreshness();
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, POLL_INTERVAL_MS - (performance.now() - begun))));
  }
}

async function fetchStatus(key) {
  try {
    const response = await fetch("/v1/status", {
      headers: { Authorization: `Bearer ${key}` },
      cache: "no-store",
      signal: AbortSignal.timeout(REQUEST_TIMEOUT_MS),
    });
    if (response.status === 401) return { unauthorized: true };
    if (!response.ok) return { problem: `The server answered ${response.status}` };
    return { status: await response.json() };
  } catch (error) {
    return { problem: error instanceof SyntaxError ? "The server's answer is not JSON" : "Connection lost" };
  }
}

function showStatus(status) {
  Object.assign(page, { status, updatedAt: Date.now() });
  byId("key-form").hidden = true;
  byId("content").hidden = byId("forget-key").hidden = false; // before drawing: a chart needs the width of its place
  drawHeader(status);
  const arms = sortedArms(status);
  redraw("arms", arms, armsTable);
  drawKnown("outcome", status.arms && arms.map(({ version, arm, outcome }) => ({ version, arm, outcome })), outcomePlot);
  drawKnown("release", status.release, releasePanel);
  drawKnown("history", status.releases && closedReleases(status), historyTimeline);
  drawKnown("versions", status.versions && [status.versions, status.champion, armNames(status)], versionsTable);
  drawKnown("replicas", status.replicas && [status.replicas, status.plan?.number ?? null, status.responses ?? {}], replicasTable);
  redraw("monitor", [status.monitor, status.feedback ?? {}, status.time_s], monitorPanel);
  drawCharts(status.series);
}

// A replica that cannot reach the monitor answers with the plan and itself alone: what it left out is unknown, not empty.
function drawKnown(id, data, build) {
  if (data === undefined) redraw(id, "unknown", () => [empty("Not known while the monitor is away.")]);
  else redraw(id, data, build);
}

function showFreshness() {
  const ageS = page.updatedAt === null ? null : Math.max(0, Math.round((Date.now() - page.updatedAt) / 1000));
  const stale = page.problem !== null || (ageS ?? 0) > STALE_AFTER_S;
  document.body.classList.toggle("stale", stale);
  setText(byId("freshness"), freshnessText(ageS, stale));
  redraw(
    "notices",
    [stale && (page.problem ?? "No answer"), page.status?.monitor === null, page.status?.reason, integrityErrors(), page.status?.switched_off ?? []],
    noticeList,
  );
}

function freshnessText(ageS, stale) {
  if (page.key === null) return "";
  if (ageS === null) return page.problem ? "no update yet" : "connecting …";
  return stale ? `last update ${ageS} s ago` : "live";
}

function noticeList([problem, monitorMissing, reason, integrity, switchedOff]) {
  const notices = switchedOff.map(({ arm, reason, since_s }) =>
    notice("bad", `The ${arm} is switched off since ${clock(since_s)}: ${reason}. Enable it with trimtab arms enable ${arm}.`),
  );
  if (problem)
    notices.push(
      notice("bad", `${problem}. ${page.status ? "The values below are the last ones received. " : ""}Trying again each second.`),
    );
  if (monitorMissing) {
    notices.push(
      notice(
        "warn",
        `The monitor is missing${reason ? ` (${reason})` : ""}. Decisions are not held up by it; counts, latency and rewards are absent until it is back.`,
      ),
    );
  } else if (reason) notices.push(notice("warn", reason));
  if (integrity.length)
    notices.push(
      notice("bad", `The log has ${integrity.length} integrity error${integrity.length > 1 ? "s" : ""}: see Monitor.`),
    );
  return notices;
}

const integrityErrors = () => page.status?.monitor?.integrity_errors ?? [];

// --- header ---

function drawHeader(status) {
  const release = openRelease(status);
  setText(byId("policy"), status.policy ?? "unnamed policy");
  document.title = [status.policy, release ? `release ${release.state}` : `v${status.champion ?? "–"}`, "Trimtab"]
    .filter(Boolean)
    .join(" · ");
  const total = (read) => sumOrNull((status.arms ?? []).map(read));
  redraw(
    "summary",
    [
      ["Champion", isNumber(status.champion) ? `v${status.champion}` : "none"],
      ["Release", releaseSummary(status)],
      ["Decisions / s", number(total((arm) => arm.decisions_per_s))],
      ["Errors", integer(total((arm) => arm.errors))],
      ...(status.shadows?.length ? [["Shadows", status.shadows.map(shadowText).join(" · ")]] : []),
    ],
    (items) => items.flatMap(([term, value]) => [element("div", {}, element("dt", {}, term), element("dd", {}, value))]),
  );
  setText(byId("announcement"), announcement(status));
}

function shadowText({ version, is_asked, decisions, failures, agreement }) {
  const agrees = isNumber(agreement) ? `, agrees ${percent(agreement)}` : "";
  return `v${version}${is_asked ? "" : " (not asked)"}: ${integer(decisions)}${agrees}${failures ? `, ✕ ${integer(failures)}` : ""}`;
}

function releaseSummary(status) {
  const release = openRelease(status);
  if (status.release === undefined) return "not known";
  return release
    ? `${STATE_SIGNS[release.state][0]} ${words(release.state)}: v${release.candidate} at ${percent(release.canary_weight)}`
    : "none in progress";
}

function announcement(status) {
  if (status.release === undefined) return "The state of the release is not known while the monitor is away.";
  const release = status.release ?? (status.releases ?? []).at(-1);
  if (!release) return `No release yet. Champion is version ${status.champion ?? "none"}.`;
  if (!isOpen(release))
    return `Release ${release.number} is ${words(release.state)}. Champion is version ${status.champion ?? "none"}.`;
  return `Release ${release.number} is ${words(release.state)}: version ${release.candidate}, ${stepText(release)}, ${percent(release.canary_weight)} of units.`;
}

const isOpen = (release) => release?.state === "running" || release?.state === "paused";
const openRelease = (status) => (isOpen(status.release) ? status.release : null);
const stepText = (release) => `step ${(release.step ?? 0) + 1} of ${release.weights?.length ?? "–"}`;

// --- arms ---

function sortedArms(status) {
  const rank = { champion: 0, canary: 1, holdout: 2 };
  const arms = status.arms ?? (status.plan?.arms ?? []).map(({ name, version, weight }) => ({ arm: name, version, weight }));
  return [...arms].sort((a, b) => (rank[a.arm] ?? 3) - (rank[b.arm] ?? 3) || b.version - a.version);
}

const armNames = (status) => Object.fromEntries((status.arms ?? []).map((arm) => [arm.version, arm.arm]));

function armsTable(arms) {
  if (!arms.length) return [empty("No version has answered yet.")];
  return [
    table("Arms", arms, [
      ["Version", (arm) => versionTag(arm.version, arm.arm ?? "no traffic")],
      ["Traffic", (arm) => weightBar(arm)],
      ["Decisions", (arm) => integer(arm.decisions), true],
      ["per second", (arm) => number(arm.decisions_per_s), true],
      ["Errors", (arm) => errorsText(arm), true],
      ["p50 ms", (arm) => number(arm.latency_ms?.p50), true],
      ["p95 ms", (arm) => number(arm.latency_ms?.p95), true],
      ["p99 ms", (arm) => number(arm.latency_ms?.p99), true],
      ["Action mix", (arm) => actionMix(arm.actions)],
    ]),
  ];
}

function errorsText(arm) {
  if (!isNumber(arm.errors)) return "–";
  const text = `${integer(arm.errors)} (${percent(arm.error_rate)})`;
  return arm.errors ? element("span", { class: "bad-text" }, `✕ ${text}`) : text;
}

function weightBar(arm) {
  const fill = element("span", { class: `fill series-${colourOf(arm.version)}` });
  fill.style.width = `${100 * Math.min(1, Math.max(0, arm.weight ?? 0))}%`;
  return element(
    "span",
    { class: "measure" },
    element("span", { class: "bar", "aria-hidden": "true" }, fill),
    element("span", { class: "amount" }, percent(arm.weight)),
  );
}

function actionMix(actions) {
  const entries = Object.entries(actions ?? {}).sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  const total = entries.reduce((sum, [, count]) => sum + (count ?? 0), 0);
  if (!total) return "–";
  const bar = element("span", { class: "bar mix", "aria-hidden": "true" });
  for (const [, count] of entries) {
    const part = element("span", { class: "part" });
    part.style.flexGrow = count ?? 0;
    bar.append(part);
  }
  const named = entries.slice(0, MAX_NAMED_ACTIONS).map(([action, count]) => `${action}: ${percent(count / total)}`);
  if (entries.length > MAX_NAMED_ACTIONS) named.push(`${entries.length - MAX_NAMED_ACTIONS} more`);
  return element("span", { class: "measure stacked" }, bar, element("span", { class: "amount" }, named.join(" · ")));
}

// --- reward: one row per version on a common axis ---

function outcomePlot(arms) {
  const rows = arms.filter((arm) => isNumber(arm.outcome?.mean));
  if (!rows.length) return [empty("No finished episode yet: the reward shows here once clients post feedback.")];
  const axis = commonAxis(rows.flatMap(({ outcome }) => [outcome.low, outcome.mean, outcome.high]).filter(isNumber));
  const list = element("ul", { class: "intervals" }, ...rows.map((row) => intervalRow(row, axis)));
  const ticks = element(
    "div",
    { class: "axis", "aria-hidden": "true" },
    ...axis.ticks.map((tick) => placed(element("span", {}, number(tick)), axis.place(tick))),
  );
  return [list, ticks, element("p", { class: "hint" }, "The mark is the mean, the line its confidence interval.")];
}

function commonAxis(values) {
  const low = Math.min(...values),
    high = Math.max(...values);
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  const from = low - pad,
    to = high + pad;
  return { ticks: niceTicks(from, to), place: (value) => `${(100 * (value - from)) / (to - from)}%` };
}

function niceTicks(from, to) {
  const raw = (to - from) / 4,
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
  const ticks = [];
  for (let index = Math.ceil(from / step); index * step <= to; index += 1) ticks.push(index * step);
  return ticks;
}

function intervalRow({ version, arm, outcome }, axis) {
  const bounded = isNumber(outcome.low) && isNumber(outcome.high);
  const drawing = svg("svg", { class: `interval series-${colourOf(version)}`, "aria-hidden": "true" });
  for (const tick of axis.ticks)
    drawing.append(svg("line", { class: "grid", x1: axis.place(tick), x2: axis.place(tick), y1: 0, y2: "100%" }));
  if (bounded) {
    drawing.append(
      svg("line", { class: "range", x1: axis.place(outcome.low), x2: axis.place(outcome.high), y1: "50%", y2: "50%" }),
    );
    for (const end of [outcome.low, outcome.high])
      drawing.append(svg("line", { class: "cap", x1: axis.place(end), x2: axis.place(end), y1: "30%", y2: "70%" }));
  }
  const mark = svg("svg", { x: axis.place(outcome.mean), y: "50%", class: "mark" });
  mark.append(svg("path", { d: shapeOf(version) }));
  drawing.append(mark);
  const mixed = outcome.mixed ? ` · ${integer(outcome.mixed)} mixed` : "";
  return element(
    "li",
    {},
    versionTag(version, arm),
    element(
      "span",
      { class: "numbers" },
      element("strong", {}, number(outcome.mean)),
      element("span", {}, bounded ? `${number(outcome.low)} to ${number(outcome.high)}` : "no interval yet"),
      element(
        "span",
        { class: "dim", title: "Mixed episodes were answered by more than one version." },
        `${integer(outcome.episodes)} episodes${mixed}`,
      ),
    ),
    drawing,
  );
}

// --- release ---

function releasePanel(release) {
  if (!isOpen(release))
    return [empty("No release in progress. Start one with "), element("code", {}, "trimtab release start --version N")];
  const facts = definitions([
    ["State", sign(STATE_SIGNS, release.state)],
    ["Candidate", versionTag(release.candidate, `against v${release.incumbent ?? "–"}`)],
    ["Canary weight", `${percent(release.canary_weight)} of units, ${stepText(release)}`],
    ["Verdict", sign(VERDICT_SIGNS, release.verdict)],
    ["Reason", release.reason || "–"],
    ["Started", clock(release.started_at)],
  ]);
  const override = release.override_gates
    ? [notice("warn", `Gates overridden: “${release.override_gates}”. This version can be a canary, never the champion.`)]
    : [];
  return [
    stepper(release),
    facts,
    ...override,
    ...evidenceTable(release),
    element("h3", {}, "What happened"),
    timeline(release.history),
  ];
}

function stepper(release) {
  const steps = (release.weights ?? []).map((weight, index) => {
    const where = index < release.step ? "done" : index === release.step ? "current" : "ahead";
    const item = element("li", { class: where }, element("strong", {}, percent(weight)), element("span", {}, where));
    if (where === "current") item.setAttribute("aria-current", "step");
    return item;
  });
  return element("ol", { class: "stepper", "aria-label": "Steps of the release" }, ...steps);
}

function evidenceTable({ evidence, candidate, incumbent }) {
  const [left, right] = [flatten(evidence?.candidate), flatten(evidence?.incumbent)];
  const names = [...new Set([...Object.keys(left), ...Object.keys(right)])];
  if (!names.length) return [];
  return [
    element("h3", {}, "Evidence"),
    table("Evidence of the release", names, [
      ["Measure", (name) => words(name)],
      [`v${candidate} candidate`, (name) => scalar(left[name]), true],
      [`v${incumbent ?? "–"} incumbent`, (name) => scalar(right[name]), true],
    ]),
  ];
}

function flatten(value, prefix = "") {
  return Object.entries(value ?? {}).reduce((flat, [name, inner]) => {
    const nested = inner !== null && typeof inner === "object" && !Array.isArray(inner);
    return { ...flat, ...(nested ? flatten(inner, `${prefix}${name} `) : { [prefix + name]: inner }) };
  }, {});
}

function closedReleases(status) {
  const byNumber = new Map(
    [...(status.releases ?? []), status.release]
      .filter((release) => release && !isOpen(release))
      .map((release) => [release.number, release]),
  );
  return [...byNumber.values()].sort((a, b) => b.number - a.number).map(({ evidence, ...release }) => release);
}

function historyTimeline(releases) {
  if (!releases.length) return [empty("No release has ended yet.")];
  const unfolded = new Set([...byId("history").querySelectorAll("details[open]")].map((details) => details.dataset.release));
  return releases.map((release, index) => {
    const details = element(
      "details",
      { "data-release": release.number },
      element(
        "summary",
        {},
        element("span", {}, `Release ${release.number}: v${release.candidate} against v${release.incumbent ?? "–"}`),
        sign(STATE_SIGNS, release.state),
        element("span", { class: "dim" }, clock(release.started_at)),
      ),
      ...(release.override_gates ? [element("p", { class: "hint" }, `Gates overridden: “${release.override_gates}”`)] : []),
      timeline(release.history),
    );
    details.open = index === 0 || unfolded.has(String(release.number));
    return details;
  });
}

function timeline(history) {
  if (!history?.length) return empty("Nothing yet.");
  return element(
    "ol",
    { class: "timeline" },
    ...history.map((entry) =>
      element(
        "li",
        { class: `action-${entry.action}` },
        element("span", { class: "dim" }, clock(entry.time_s)),
        element("strong", {}, `${words(entry.action)} · step ${(entry.step ?? 0) + 1}`),
        element("span", { class: "why" }, entry.reason || "no reason given"),
      ),
    ),
  );
}

// --- versions, replicas, monitor ---

function versionsTable([versions, champion, arms]) {
  if (!versions.length) return [empty("Nothing is registered yet.")];
  return [
    table("Versions", [...versions].reverse(), [
      ["Version", (entry) => versionTag(entry.version, entry.version === champion ? "champion" : arms[entry.version])],
      ["Gates", (entry) => sign(VERDICT_SIGNS, entry.gate_verdict)],
      ["Override", (entry) => entry.override_gates ?? "–"],
      ["Registered", (entry) => element("span", { class: "nowrap" }, clock(entry.registered_at))],
      ["Digest", (entry) => element("code", { class: "nowrap", title: entry.digest ?? "" }, (entry.digest ?? "–").slice(0, 8))],
    ]),
  ];
}

function replicasTable([replicas, plan, responses]) {
  if (!replicas.length) return [empty("No replica has reported yet.")];
  return [
    table("Replicas", replicas, [
      ["Replica", (replica) => element("code", {}, replica.replica)],
      [
        "Plan",
        (replica) => (replica.plan === plan ? integer(replica.plan) : `${integer(replica.plan)}, behind ${integer(plan)}`),
        true,
      ],
      ["Versions", (replica) => (replica.versions ?? []).map((version) => `v${version}`).join(", ") || "–"],
      ["Queue", (replica) => integer(replica.queue_depth), true],
      ["Answers", (replica) => responseText(replica.responses)],
      ["Trouble", troubleText],
      ["Seen", (replica) => `${number(replica.age_s)} s ago`, true],
    ]),
    element("p", { class: "hint" }, `All replicas since they started: ${responseText(responses)}`),
  ];
}

function responseText(responses) {
  return (
    Object.entries(responses ?? {})
      .map(([code, count]) => `${code}: ${integer(count)}`)
      .join(" · ") || "–"
  );
}

function troubleText(replica) {
  const ofVersions = (found, what) =>
    Object.entries(found ?? {}).map(([version, why]) => `v${version} ${what}: ${scalar(why)}`);
  const lines = [
    ...ofVersions(replica.load_failures, "not loaded"),
    ...ofVersions(replica.breakers, "not asked"),
    ...["registry_error", "keys_error"].filter((name) => replica[name]).map((name) => `${name}: ${scalar(replica[name])}`),
    ...(replica.log?.state === "failing" ? [`log: ${scalar(replica.log.last_error)}`] : []),
  ];
  return lines.length ? element("span", { class: "bad-text" }, `✕ ${lines.join("; ")}`) : "none";
}

function monitorPanel([monitor, feedback, timeS]) {
  const lines = monitor
    ? [
        ["Started", clock(monitor.started_at)],
        ["Rebuilt from the log", `${integer(monitor.rebuilt_decisions)} decisions`],
        ["Last refresh", `${number(monitor.refresh_age_s)} s ago`],
        ["Integrity errors", integrityList(monitor.integrity_errors)],
        ...Object.entries(monitor.counts ?? {}).map(([name, count]) => [sentence(name), integer(count)]),
      ]
    : [["Monitor", element("span", { class: "warn-text" }, "! missing")]];
  const counts = ["joined", "duplicate", "unknown", "late", "waiting"].map((name) => [
    `Feedback ${name}`,
    integer(feedback[name]),
  ]);
  return [definitions([...lines, ...counts, ["Status made", clock(timeS)]])];
}

function integrityList(errors) {
  if (!errors?.length) return "none";
  return element("ul", { class: "bad-text plain" }, ...errors.map((error) => element("li", {}, `✕ ${scalar(error)}`)));
}

// --- charts ---

function drawCharts(series) {
  const versions = Object.entries(series?.versions ?? {}).map(([version, columns]) => ({ version: Number(version), columns }));
  const lines = (column, name, width) =>
    versions
      .filter(({ columns }) => columns[column]?.some(isNumber))
      .map(({ version, columns }) => ({ version, label: `v${version}${name}`, width, values: columns[column] }));
  const fromZero = (_, __, max) => [0, max > 0 ? max * 1.1 : 1];
  const around = (_, min, max) => (isNumber(min) && isNumber(max) ? uPlot.rangeNum(min, max, 0.15, true) : [0, 1]);
  const timeS = series?.time_s ?? [];
  drawChart("rate-chart", timeS, lines("decisions_per_s", "", 2), { range: fromZero });
  drawChart("latency-chart", timeS, [...lines("latency_p99_ms", " p99", 2.5), ...lines("latency_p50_ms", " p50", 1)], {
    range: fromZero,
  });
  drawChart("reward-chart", timeS, lines("outcome_mean", "", 2), { range: around, spanGaps: true }); // episodes end rarely
}

function drawChart(id, timeS, lines, look) {
  if (!timeS.length || !lines.length) {
    forgetChart(id);
    return redraw(id, "empty", () => [empty("Nothing measured yet.")]);
  }
  const signature = JSON.stringify(lines.map(({ label }) => label));
  if (page.charts.get(id)?.signature !== signature) buildChart(id, signature, lines, look);
  const chart = page.charts.get(id);
  chart.plot.setData([timeS, ...lines.map(({ values }) => values)]);
  fillLegend(chart);
}

function buildChart(id, signature, lines, { range, spanGaps = false }) {
  forgetChart(id);
  page.drawn.delete(id);
  const host = element("div", { class: "plot", role: "img" }),
    legend = element("ul", { class: "legend" });
  byId(id).replaceChildren(host, legend);
  const axis = {
    stroke: colour("--dim"),
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { stroke: colour("--line"), width: 1 },
    font: "12px system-ui, sans-serif",
  };
  const chart = { signature, lines, host, legend, lastIndex: null };
  chart.plot = new uPlot(
    {
      width: host.clientWidth,
      height: 180,
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { y: { range } },
      axes: [
        { ...axis, space: 80, size: 30, values: (_, ticks) => ticks.map((tick) => clock(tick)) },
        { ...axis, size: 48, values: (_, ticks) => ticks.map(number) },
      ],
      series: [
        {},
        ...lines.map((line) => ({
          label: line.label,
          width: line.width,
          stroke: colour(`--series-${colourOf(line.version)}`),
          dash: dashOf(line.version),
          spanGaps,
          points: { show: true, size: 5, fill: colour(`--series-${colourOf(line.version)}`), filter: isolatedIndexes },
        })),
      ],
      hooks: { setCursor: [() => chart.plot && fillLegend(chart)] },
    },
    [[], ...lines.map(() => [])],
    host,
  );
  chart.resize = new ResizeObserver(() => chart.plot.setSize({ width: host.clientWidth, height: 180 }));
  chart.resize.observe(host);
  page.charts.set(id, chart);
}

// A value between two gaps has no line to be on: without a point it would be invisible.
function isolatedIndexes(plot, series) {
  return plot.data[series].flatMap((value, index, values) =>
    isNumber(value) && !isNumber(values[index - 1]) && !isNumber(values[index + 1]) ? [index] : [],
  );
}

function forgetChart(id) {
  const chart = page.charts.get(id);
  if (!chart) return;
  chart.resize.disconnect();
  chart.plot.destroy();
  page.charts.delete(id);
}

function redrawCharts() {
  [...page.charts.keys()].forEach(forgetChart);
  if (page.status) drawCharts(page.status.series);
}

function fillLegend({ plot, lines, host, legend }) {
  const hovered = plot.cursor.idx;
  const values = lines.map((_, index) =>
    isNumber(hovered) ? plot.data[index + 1][hovered] : plot.data[index + 1].findLast(isNumber),
  );
  legend.replaceChildren(
    ...lines.map((line, index) =>
      element("li", {}, lineSample(line), `${line.label} `, element("strong", {}, number(values[index]))),
    ),
  );
  if (!isNumber(hovered))
    host.setAttribute(
      "aria-label",
      `Chart over time. Latest: ${lines.map((line, index) => `${line.label} ${number(values[index])}`).join(", ")}`,
    );
}

function lineSample({ version, width }) {
  const sample = svg("svg", { class: `sample series-${colourOf(version)}`, "aria-hidden": "true" });
  sample.append(
    svg("line", {
      x1: 0,
      x2: "100%",
      y1: "50%",
      y2: "50%",
      "stroke-width": width,
      "stroke-dasharray": dashOf(version).join(" "),
    }),
  );
  return sample;
}

// --- pieces ---

function redraw(id, data, build) {
  const drawing = JSON.stringify(data ?? null);
  if (page.drawn.get(id) === drawing) return;
  page.drawn.set(id, drawing);
  byId(id).replaceChildren(...build(data));
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text; // an unchanged live region must not be announced again
}

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function placed(node, left) {
  node.style.left = left;
  return node;
}

// The roles keep the table a table for screen readers where narrow pages lay its rows out as blocks.
function table(caption, rows, columns) {
  const heads = columns.map(([label, , numeric]) =>
    element("th", { scope: "col", role: "columnheader", class: numeric ? "numeric" : "" }, label),
  );
  const body = rows.map((row) =>
    element(
      "tr",
      { role: "row" },
      ...columns.map(([label, cell, numeric], index) =>
        element(
          index ? "td" : "th",
          {
            role: index ? "cell" : "rowheader",
            "data-label": label,
            class: numeric ? "numeric" : "",
            ...(index ? {} : { scope: "row" }),
          },
          cell(row),
        ),
      ),
    ),
  );
  return element(
    "table",
    { role: "table", class: columns.length > 4 ? "foldable" : "" },
    element("caption", { class: "visually-hidden" }, caption),
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads)),
    element("tbody", { role: "rowgroup" }, ...body),
  );
}

function definitions(pairs) {
  return element(
    "dl",
    { class: "facts" },
    ...pairs.flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]),
  );
}

function versionTag(version, role) {
  const shape = svg("svg", { class: `shape series-${colourOf(version)}`, viewBox: "-8 -8 16 16", "aria-hidden": "true" });
  shape.append(svg("path", { d: shapeOf(version) }));
  return element(
    "span",
    { class: "version" },
    shape,
    element("strong", {}, `v${version ?? "–"}`),
    ...(role ? [element("span", { class: "dim" }, role)] : []),
  );
}

function sign(signs, value) {
  const [mark, tone] = signs[value] ?? ["–", "none"];
  return element("span", { class: `badge ${tone}` }, value ? `${mark} ${words(value)}` : "–");
}

const notice = (tone, text) => element("p", { class: `notice ${tone}` }, text);
const empty = (text) => element("span", { class: "empty" }, text);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (version) => ((version ?? 1) - 1) % NUM_COLOURS;
const dashOf = (version) => DASHES[((version ?? 1) - 1) % DASHES.length];
const shapeOf = (version) => SHAPES[((version ?? 1) - 1) % SHAPES.length];

// --- words and numbers; null is "–", never 0 ---

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const sentence = (name) => words(name).replace(/^./, (first) => first.toUpperCase());
const words = (name) => String(name).replaceAll("_", " ");
const integer = (value) => (isNumber(value) ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : "–");
const percent = (value) => (isNumber(value) ? `${(100 * value).toLocaleString("en", { maximumSignificantDigits: 3 })} %` : "–");
const scalar = (value) =>
  isNumber(value)
    ? number(value)
    : value === null || value === undefined
      ? "–"
      : Array.isArray(value)
        ? value.map(scalar).join(" to ")
        : typeof value === "object"
          ? JSON.stringify(value)
          : String(value);
const sumOrNull = (values) => (values.some(isNumber) ? values.filter(isNumber).reduce((sum, value) => sum + value, 0) : null);

function number(value) {
  if (!isNumber(value)) return "–";
  if (Number.isInteger(value)) return integer(value);
  return value.toLocaleString("en", Math.abs(value) >= 100 ? { maximumFractionDigits: 1 } : { maximumSignificantDigits: 3 });
}

function clock(timeS) {
  if (!isNumber(timeS)) return "–";
  const moment = new Date(timeS * 1000),
    sameDay = moment.toDateString() === new Date().toDateString();
  return sameDay
    ? moment.toLocaleTimeString("en-GB")
    : moment.toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
}

start(); // last: the constants above exist only from here on
