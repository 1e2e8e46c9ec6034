// Shows /openapi.json: every path with its body, its answers and their schemas.

const KEY_NAME = "trimtab-api-key"; // the dashboard's
const byId = (id) => document.getElementById(id);

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY_NAME, byId("key-input").value.trim());
  show();
});
show();

async function show() {
  const key = sessionStorage.getItem(KEY_NAME);
  if (!key || !/^[\x21-\x7e]+$/.test(key)) return askForKey(null);
  let response;
  try {
    response = await fetch("/openapi.json", { headers: { Authorization: `Bearer ${key}` } });
  } catch {
    return askForKey("The endpoint does not answer.");
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => null);
    return askForKey(problem?.error?.message ?? `HTTP ${response.status}`);
  }
  byId("key-form").hidden = true;
  draw(await response.json());
}

function askForKey(problem) {
  byId("content").replaceChildren();
  byId("key-form").hidden = false;
  byId("key-problem").hidden = !problem;
  byId("key-problem").textContent = problem ?? "";
}

function draw(api) {
  byId("title").textContent = api.info.title;
  const sections = Object.entries(api.paths).flatMap(([path, item]) =>
    Object.entries(item).filter(([method]) => method === "get" || method === "post")
      .map(([method, operation]) => section(path, method, operation)));
  const schemas = Object.entries(api.components.schemas).map(([name, schema]) =>
    element("section", { class: "card wide", id: `schema-${name}` }, element("h2", {}, name), code(schema)));
  byId("content").replaceChildren(...sections, ...schemas);
}

function section(path, method, operation) {
  const body = operation.requestBody?.content["application/json"].schema;
  const rows = Object.entries(operation.responses).map(([status, response]) =>
    element("tr", {}, element("td", {}, status), element("td", {}, response.description)));
  return element("section", { class: "card wide" },
    element("h2", {}, `${method.toUpperCase()} ${path}`),
    element("p", {}, [operation.summary, operation.description].filter(Boolean).join(". ")),
    ...(body ? [element("h3", {}, "Body"), code(body)] : []),
    element("h3", {}, "Answers"),
    element("table", {}, ...rows),
    code(operation.responses["200"].content["application/json"].schema));
}

function code(schema) {
  return element("pre", {}, JSON.stringify(schema, null, 1));
}

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
