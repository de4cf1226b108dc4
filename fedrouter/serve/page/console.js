"use strict";
// The console of `fedrouter serve`: no framework, no build step, no request to another host.
// Prompts and names are untrusted: they are inserted as text, never as HTML.

const API = new URL("..", location.href);
const TABS = ["ask", "map", "traffic", "bundles"];
const QUIET_MS = 60;       // pause after the last key press before a decision is requested
const REFRESH_MS = 2500;
const FEW = 30;            // decisions listed before "Show all"
const $ = (id) => document.getElementById(id);

let key = "";              // in memory only
let world = null;          // response of GET …/clusters
let talk = [];          // the conversation: {role, content}
let latest = null;         // the decision on display
let running = null;        // AbortController of the turn that is being answered
let timer, pending, allShown = false;

// --- building blocks ---

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const many = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
const byServed = (decision) => world.bundle.sha256.startsWith(decision.bundle);  // not by the second bundle
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const colour = (name) => `k${Math.max(0, world.clusters.findIndex((one) => one.name === name)) % 8}`;
const width = (node, share) => { node.style.width = `${Math.min(100, 100 * share)}%`; return node; };

function table(heads, rows, stack = true) {
  const cells = (row) => row.map((cell, i) => {
    const [head, kind] = heads[i];
    return el("td", { class: kind || "", ...(i ? { "data-head": head } : {}) }, cell);
  });
  return el("div", { class: "scroll" }, el("table", { class: stack ? "stack" : "" },
    el("thead", {}, el("tr", {}, ...heads.map(([head, kind]) => el("th", { class: kind || "", scope: "col" }, head)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells(row))))));
}

// --- requests to the server ---

const DEAD = /EngineCore|EngineDead/;  // vLLM's words for an engine that ended; they point to its log

class Refused extends Error {
  constructor(status, message) {
    super(DEAD.test(message) ? "The server stopped while it answered." : message);
    this.status = status;
  }
}

const UNSENDABLE = /[^\x20-\x7e\x80-\xff]/;

async function ask(path, payload, { signal, method } = {}) {
  let retry = !payload?.stream;  // a kept-alive connection may just have closed; never send a stream request twice
  for (;;) {
    const used = key;
    if (UNSENDABLE.test(used)) {  // fetch would throw: no header can carry it
      await newKey(used);
      continue;
    }
    const headers = { "content-type": "application/json", ...(used ? { authorization: `Bearer ${used}` } : {}) };
    let answer;
    try {
      answer = await fetch(new URL(path, API), {
        method: method || (payload === undefined ? "GET" : "POST"),
        headers, signal, cache: "no-store",
        body: payload === undefined ? undefined : JSON.stringify(payload),
      });
    } catch (error) {
      if (!(error instanceof TypeError) || !retry) throw error;
      retry = false;
      continue;
    }
    if (answer.ok) return answer;
    if (answer.status === 401) {
      await newKey(used);
      continue;
    }
    const body = await answer.json().catch(() => ({}));
    const error = body.error && body.error.message ? body.error.message : body.error || answer.statusText;
    throw new Refused(answer.status, String(error));
  }
}

const json = async (...request) => (await ask(...request)).json();

let keyPrompt = null;  // resolves when the user has entered a key

function newKey(used) {
  if (used !== key) return Promise.resolve();  // another request has asked for it meanwhile
  keyPrompt ||= new Promise((resolve) => {
    const dialog = $("ask-key");
    $("key-why").textContent = used ? "The server does not know this key." : "This server needs an API key.";
    $("key-why").className = used ? "failed" : "";
    $("key").value = "";
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener("close", () => {
      key = $("key").value.trim();
      $("key").value = "";
      keyPrompt = null;
      const active = document.activeElement;  // may still be in the closed dialog
      if (active === document.body || dialog.contains(active)) $("prompt").focus();
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return keyPrompt;
}

function showProblem(error) {
  if (error && error.name === "AbortError") return;
  const lost = error instanceof TypeError;  // fetch throws it if there is no server
  $("problem").textContent = error ? (lost ? "The server does not answer." : error.message) : "";
  $("problem").hidden = !error;
}

// --- Ask ---

function verdict(decision) {
  if (!decision.cluster) return "no text to route by";
  const ratio = decision.distance / decision.radius;
  const how = ratio <= 1 ? "within" : ratio <= 1.25 ? "just beyond" : "far";
  return `${how} (${fixed(ratio)} × radius)`;
}

function bars(decision) {
  const radius = decision.radii;
  const rows = Object.entries(decision.distances);
  const most = 1.06 * Math.max(...rows.map(([name, distance]) => Math.max(distance, radius[name])), 1e-9);
  return el("div", { class: "bars" }, ...rows.map(([name, distance], i) => {
    const tick = el("div", { class: "tick" });
    tick.style.left = `${(100 * radius[name]) / most}%`;
    const text = `${name}: distance ${fixed(distance)}, radius ${fixed(radius[name])}`;
    return el("div", { class: `bar${i ? "" : ` chosen${decision.fallback ? " beyond" : ""}`}` },
      el("span", {}, name), el("span", { class: "of" }, `${fixed(distance)} of ${fixed(radius[name])}`),
      el("div", { class: "track", role: "img", "aria-label": text }, width(el("div", { class: "fill" }), distance / most), tick));
  }));
}

function showDecision(decision, why = "Nothing is typed yet.") {
  latest = decision;
  $("where").removeAttribute("aria-busy");
  const turns = [...document.querySelectorAll("#turns > li:not(.undone) .said")];
  turns.forEach((turn, i) => turn.classList.toggle("decides", Boolean(decision) && decision.turns > 1 && i === decision.turn));
  if (!decision) {
    const names = world ? world.clusters.map((one) => one.name).join(", ") : "";
    $("where").replaceChildren(el("p", { class: "empty" }, `${names ? `Task clusters: ${names}. ` : ""}${why}`));
    return;
  }
  const nobody = decision.model === "reject";
  const near = decision.cluster ? ` of ${decision.cluster}` : "";
  const outcome = decision.fallback ? `; ${nobody ? "rejected" : "falls back"}` : "";
  const second = world?.second?.sha256.startsWith(decision.bundle) && world.second.name;
  const other = world && !byServed(decision) ? ` by bundle ${second || decision.bundle}` : "";
  const which = decision.turns > 1 ? `Turn ${decision.turn + 1} of ${decision.turns} decides. ` : "";
  $("where").replaceChildren(
    el("div", { class: "verdict" },
      el("span", { class: "name" }, nobody ? "nobody" : decision.model),
      el("span", { class: "how" }, `${verdict(decision)}${near}${outcome}`)),
    ...(decision.cluster ? [bars(decision)] : []),
    el("p", { class: "key" }, `${which}Decided in ${fixed(decision.routing_ms, 1)} ms${other}. `,
      decision.cluster ? "Bar: distance to the task cluster; mark: its radius." : ""));
}

async function lookAhead() {
  clearTimeout(timer);
  pending?.abort();
  const draft = $("prompt").value;
  if (!draft.trim()) return showDecision(talk.length ? latest : null);
  pending = new AbortController();
  try {
    const messages = [...talk, { role: "user", content: draft }];
    showDecision(await json("v1/fedrouter/route", { messages }, { signal: pending.signal }));
    showProblem(null);
  } catch (error) {
    if (error.name !== "AbortError") showDecision(null, "This text has no decision.");
    showProblem(error);
  }
}

function answerCard(model) {
  const card = {
    name: el("span", { class: "name" }, model),
    text: el("div", { class: "text running" }),
    why: el("div", { class: "why" }),
    judge: el("div", { class: "judge", hidden: true }),
  };
  card.node = el("div", { class: "answer" }, card.name, card.text, card.why, card.judge);
  return card;
}

function explain(card, headers) {
  const of = (name) => headers.get(`x-fedrouter-${name}`);
  if (!of("id")) return;
  card.name.textContent = decodeURIComponent(of("adapter"));
  const parts = [of("cluster") ? `nearest ${decodeURIComponent(of("cluster"))}` : "no text"];
  if (of("fallback") === "true") parts.push("fallback");
  if (Number.isFinite(Number(of("margin"))) && of("cluster")) parts.push(`margin ${fixed(Number(of("margin")))}`);
  parts.push(`routed in ${fixed(Number(of("routing-ms")), 1)} ms`);
  card.why.textContent = parts.join(" · ");
  const judges = ["good", "bad"].map((outcome) => el("button", {
    type: "button", class: "plain small", "aria-pressed": "false",
    onclick: async () => {
      try {
        await ask("v1/fedrouter/feedback", { id: of("id"), outcome });
        judges.forEach((one) => one.setAttribute("aria-pressed", String(one.textContent.toLowerCase() === outcome)));
      } catch (error) { showProblem(error); }
    },
  }, outcome === "good" ? "Good" : "Bad"));
  card.judge.replaceChildren(...judges);
}

async function* pieces(answer) {
  // Server-sent events: "data: {…}" lines, the last one "data: [DONE]".
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(500, "The answer broke off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// Returns the answer's text; null if there is none to go on with: it failed, or was stopped before its first word.
async function stream(card, model, messages, signal) {
  const began = performance.now();
  let text = "";
  try {
    const max_tokens = $("tokens").valueAsNumber;
    const answer = await ask("v1/chat/completions", { model, messages, stream: true, max_tokens }, { signal });
    explain(card, answer.headers);
    for await (const piece of pieces(answer)) {
      if (piece.error) throw new Refused(500, piece.error.message || "the stream ended with an error");
      text += piece.choices?.[0]?.delta?.content || "";
      card.text.textContent = text;
    }
    card.judge.hidden = !card.judge.childElementCount;
    card.why.append(`${card.why.textContent ? " · " : ""}${Math.round(performance.now() - began)} ms`);
    if (!text) card.text.append(el("span", { class: "quiet" }, "(empty response)"));
    return text;
  } catch (error) {
    if (error.name === "AbortError") {
      card.text.append(el("span", { class: "quiet" }, " (stopped)"));
      return text || null;
    }
    const lost = error instanceof TypeError;
    card.text.append(el("p", { class: "failed" }, lost ? "The connection was lost." : error.message));
    return null;
  } finally { card.text.classList.remove("running"); }
}

function nowRunning(turn) {
  const focused = document.activeElement === $("send");
  running = turn;
  $("send").disabled = $("send").hidden = Boolean(turn);
  $("stop").hidden = !turn;
  if (turn && focused) $("stop").focus();
}

async function send() {
  const prompt = $("prompt").value;
  if (!prompt.trim() || running || !$("composer").reportValidity()) return;
  const turn = new AbortController();
  nowRunning(turn);
  const before = talk;
  const messages = [...before, { role: "user", content: prompt }];
  const beside = $("beside").value;
  const routed = answerCard("fedrouter");
  const other = beside ? answerCard(beside) : null;
  if (other && before.length) other.why.textContent = "goes on from the routed answers above";
  const item = el("li", {}, el("div", { class: "said" }, prompt),
    el("div", { class: "answers" }, routed.node, other && other.node));
  document.querySelectorAll("#turns > .undone").forEach((one) => one.remove());
  $("turns").append(item);
  lookAhead();
  $("prompt").value = "";
  $("anew").hidden = false;
  talk = messages;
  const [text] = await Promise.all([
    stream(routed, "fedrouter", messages, turn.signal), other && stream(other, beside, messages, turn.signal)]);
  if (running !== turn) return;  // started over meanwhile
  nowRunning(null);
  if (text === null) {  // as if it had not been sent; what was typed meanwhile follows it
    item.classList.add("undone");
    talk = before;
    $("prompt").value = [prompt, $("prompt").value].filter((one) => one.trim()).join("\n");
    lookAhead();
  } else talk = [...messages, { role: "assistant", content: text }];
  $("prompt").focus();
}

function startOver() {
  running?.abort();
  nowRunning(null);
  talk = [];
  latest = null;
  $("turns").replaceChildren();
  $("anew").hidden = true;
  lookAhead();
  $("prompt").focus();
}

async function listModels() {
  const { data } = await json("v1/models");
  const chosen = $("beside").value;
  const names = data.map((one) => one.id).filter((id) => id !== "fedrouter");
  $("beside").replaceChildren(el("option", { value: "" }, "nothing"), ...names.map((id) => el("option", { value: id }, id)));
  $("beside").value = names.includes(chosen) ? chosen : "";
}

// --- Map ---

async function showMap() {
  const { decisions } = await json("v1/fedrouter/decisions?limit=100");
  const past = decisions.filter((one) => one.at && byServed(one));
  const others = decisions.filter((one) => !byServed(one)).length;
  const nowhere = decisions.length - past.length - others;
  const rings = world.clusters.flatMap((one) => one.at.map(([x, y]) => ({ ...one, x, y: -y })));
  const now = latest && byServed(latest) && latest.at;
  const points = [...past.map((one) => one.at), ...(now ? [now] : [])].map(([x, y]) => [x, -y, 0]);
  const all = [...rings.map((one) => [one.x, one.y, one.radius]), ...points];
  const [left, right] = [Math.min(...all.map(([x, , r]) => x - r)), Math.max(...all.map(([x, , r]) => x + r))];
  const [top, bottom] = [Math.min(...all.map(([, y, r]) => y - r)), Math.max(...all.map(([, y, r]) => y + r))];
  const size = [$("picture").clientWidth, Math.round(Math.min(0.8 * $("picture").clientWidth, 560))];
  const edge = 28;
  const scale = Math.min((size[0] - 2 * edge) / (right - left || 1), (size[1] - 2 * edge) / (bottom - top || 1));
  const at = (x, y) => ({
    cx: size[0] / 2 + (x - (left + right) / 2) * scale, cy: size[1] / 2 + (y - (top + bottom) / 2) * scale,
  });
  const hint = (text) => draw("title", {}, text);
  const picture = draw("svg", { viewBox: `0 0 ${size[0]} ${size[1]}`, role: "img", "aria-label":
    `${many(world.clusters.length, "task cluster")}, ${many(past.length, "decision")}${now ? ", and the prompt" : ""}` });
  for (const one of rings) {
    picture.append(draw("circle", { ...at(one.x, one.y), r: one.radius * scale, class: `ring ${colour(one.name)}` },
      hint(`${one.name}: radius ${fixed(one.radius)}`)));
  }
  for (const one of past) {
    const kind = one.fallback ? "past far" : `past ${colour(one.cluster)}`;
    picture.append(draw("circle", { ...at(one.at[0], -one.at[1]), r: 4, class: kind },
      hint(`${one.adapter}, ${new Date(one.time * 1000).toLocaleTimeString()}`)));
  }
  const named = new Set();
  const labels = [];
  const label = (x, y, text, kind) => {  // within the picture, and beside the labels that it would cover
    const half = 4 * text.length;  // of its width, about
    x = Math.max(half, Math.min(size[0] - half, x));
    const step = y < size[1] / 2 ? 4 : -4;
    while (labels.some(([at, other, reach]) => Math.abs(at - x) < reach + half && Math.abs(other - y) < 17)) y += step;
    labels.push([x, y, half]);
    picture.append(draw("text", { x, y, class: `middle ${kind}` }, text));
  };
  for (const one of rings) {
    const { cx, cy } = at(one.x, one.y);
    picture.append(draw("circle", { cx, cy, r: 5, class: `centre ${colour(one.name)}` }));
    if (named.has(one.name)) continue;  // a task cluster may have several centroids
    named.add(one.name);
    const room = one.radius * scale;
    label(cx, room > 30 ? cy - room + 20 : cy - room - 8, one.name, colour(one.name));
  }
  if (now) {
    const { cx, cy } = at(now[0], -now[1]);
    picture.append(draw("circle", { cx, cy, r: 7, class: "now" }, hint("the prompt")));
    label(cx + 37 < size[0] - 24 ? cx + 37 : cx - 37, cy + 5, "prompt", "");
  }
  $("picture").replaceChildren(picture);
  const hollow = past.some((one) => one.fallback) ? "; fallbacks are hollow" : "";
  const legend = [
    past.length ? `Faint points: the latest ${past.length === 1 ? "decision" : many(past.length, "decision")}${hollow}.` : decisions.length ? "" : "No decisions yet.",
    others ? `Not shown: ${many(others, "decision")} of other bundles, because each bundle has a map of its own.` : "",
    nowhere ? `Not shown: ${many(nowhere, "decision")} without a vector (no text, or overload).` : "",
    now ? "" : latest?.cluster ? "The prompt is not shown: another bundle decided." : "Type a prompt under Ask to see it here.",
    "Rings: radii. The map has two dimensions only, so distances look too short; the bars under Ask show them.",
  ];
  const count = (counts) => Object.entries(counts).map(([name, number]) => `${name} ${number}`).join(", ");
  const heads = [["task cluster"], ["radius", "num"], ...(world.operator ? [["rows", "num"], ["tasks"], ["clients"]] : [])];
  const rows = world.clusters.map((one) => [
    el("span", { class: colour(one.name) }, el("span", { class: "swatch" }), one.name), fixed(one.radius),
    ...(world.operator ? [String(one.num_examples), count(one.task_counts) || "no labels", one.clients.join(", ")] : [])]);
  $("legend").replaceChildren(el("p", { class: "key" },
    legend.filter(Boolean).join(" ")),
    el("h2", {}, "Task clusters"), table(heads, rows));
}

// --- Traffic ---

function quantile(buckets, share) {
  // From cumulative Prometheus buckets, interpolated linearly as in Grafana.
  const total = buckets.length ? buckets[buckets.length - 1][1] : 0;
  if (!total) return null;
  let [low, before] = [0, 0];
  for (const [high, count] of buckets) {
    if (count >= share * total) return Number.isFinite(high) ? low + ((high - low) * (share * total - before)) / (count - before || 1) : low;
    [low, before] = [high, count];
  }
  return low;
}

async function showTraffic() {
  const [{ decisions }, numbers] = await Promise.all([
    json("v1/fedrouter/decisions?limit=200"), world.operator ? json("v1/fedrouter/numbers") : null]);
  const counts = new Map();  // adapter → outcome → requests
  const count = (adapter, outcome, number) => {
    const outcomes = counts.get(adapter) || {};
    outcomes[outcome] = (outcomes[outcome] || 0) + number;
    counts.set(adapter, outcomes);
  };
  let figures;
  if (numbers) {
    const of = (name) => numbers.samples.filter((one) => one.name === `fedrouter_${name}`);
    const sum = (name, where = () => true) => of(name).filter(where).reduce((total, one) => total + one.value, 0);
    of("requests_total").forEach((one) => count(one.labels.adapter, one.labels.outcome, one.value));
    const buckets = of("routing_seconds_bucket").map((one) => [one.labels.le === "+Inf" ? Infinity : Number(one.labels.le), one.value]);
    buckets.sort(([a], [b]) => a - b);
    const prompts = sum("distance_ratio_count") + sum("fallbacks_total", (one) => one.labels.reason !== "radius");
    const [p50, p95] = [quantile(buckets, 0.5), quantile(buckets, 0.95)].map((s) => (s === null ? "–" : `${fixed(1000 * s, 1)} ms`));
    const good = sum("feedback_total", (one) => one.labels.outcome === "good");
    const bad = sum("feedback_total", (one) => one.labels.outcome === "bad");
    figures = [["requests", sum("requests_total")], ["fell back", prompts ? percent(sum("fallbacks_total") / prompts) : "–"],
      ["routing, median", p50], ["routing, 95 %", p95], ["waiting to be routed", sum("queue_depth")], ["good · bad", `${good} · ${bad}`]];
    const differ = of("shadow_decisions_total").filter((one) => one.value);
    if (world.second) {
      const all = differ.reduce((total, one) => total + one.value, 0);
      const same = sum("shadow_decisions_total", (one) => one.labels.difference === "same");
      figures.push([`${world.second.name} agrees`, all ? percent(same / all) : "–"]);
    }
    const lost = sum("decision_log_lost_total");
    if (lost) figures.push(["lost log lines", lost]);
  } else {
    decisions.forEach((one) => count(one.adapter, one.outcome || "running", 1));
    const back = decisions.filter((one) => one.fallback).length;
    figures = [["your latest decisions", decisions.length], ["fell back", decisions.length ? percent(back / decisions.length) : "–"]];
  }
  $("figures").replaceChildren(...figures.map(([name, value]) => el("div", { class: "figure" }, el("b", {}, String(value)), el("span", {}, name))));
  const total = (own) => Object.values(own).reduce((a, b) => a + b, 0);
  const sorted = [...counts].filter(([, own]) => total(own)).sort(([, a], [, b]) => total(b) - total(a));
  const all = sorted.reduce((sum, [, own]) => sum + total(own), 0);
  const outcomes = ["ok", "refused", "failed", "gone", "running"].filter((name) => sorted.some(([, own]) => own[name]));
  const rows = sorted.map(([adapter, own]) => [el("span", { class: "name" }, adapter || "(refused before routing)"),
    el("div", { class: "track" }, width(el("div", { class: "fill" }), total(own) / all)),
    ...outcomes.map((name) => (own[name] ? String(own[name]) : ""))]);
  $("adapters").replaceChildren(rows.length
    ? table([["adapter"], ["share", "share"], ...outcomes.map((name) => [name, "num"])], rows)
    : el("p", { class: "empty" }, "No routed request yet."));
  showDecisions(decisions);
}

function showDecisions(decisions) {
  const adapters = [...new Set(decisions.map((one) => one.adapter))].sort();
  const chosen = $("by-adapter").value;
  if (document.activeElement !== $("by-adapter")) {
    $("by-adapter").replaceChildren(el("option", { value: "" }, "all"), ...adapters.map((name) => el("option", { value: name }, name)));
    $("by-adapter").value = adapters.includes(chosen) ? chosen : "";
  }
  const [adapter, outcome, back] = [$("by-adapter").value, $("by-outcome").value, $("by-fallback").checked];
  const found = decisions.filter((one) => (!adapter || one.adapter === adapter) && (!outcome || one.outcome === outcome) && (!back || one.fallback));
  const rows = found.slice(0, allShown ? undefined : FEW).map((one) => [
    el("span", { class: "name" }, one.adapter),
    new Date(one.time * 1000).toLocaleTimeString(),
    one.distance === null ? "–" : fixed(one.distance / one.radius),
    fixed(one.margin),
    fixed(one.routing_ms, 1),
    el("span", {}, ...[[one.outcome && one.outcome !== "ok" ? one.outcome : "", true], [one.reason, false], [one.feedback, one.feedback === "bad"],
      [one.other && one.other.difference !== "same" ? `second: ${one.other.difference}` : "", false]]
      .filter(([text]) => text).flatMap(([text, warn]) => [el("span", { class: `tag${warn ? " warn" : ""}` }, text.replace("_", " ")), " "])),
    el("code", { class: "quiet", title: one.id }, one.id.slice(0, 8)),
  ]);
  const heads = [["adapter"], ["time"], ["÷ radius", "num"], ["margin", "num"], ["ms", "num"], [""], ["id"]];
  const more = found.length > rows.length
    ? el("button", { type: "button", class: "plain small", onclick: () => { allShown = true; showDecisions(decisions); } }, `Show all ${found.length}`) : "";
  $("decisions").replaceChildren(...rows.length ? [table(heads, rows), more]
    : [el("p", { class: "empty" }, decisions.length ? "No decision matches." : "None yet. Ask something, or send a request to model “fedrouter”.")]);
}

// --- Bundles ---

async function showBundle() {
  const facts = [["bundle", el("b", {}, world.bundle.name)], ["SHA-256", el("code", {}, world.bundle.sha256)], ["base", world.base.model],
    ["fallback", world.fallback], ["generalist", world.generalist ? el("code", {}, world.generalist) : "none"]];
  if (world.operator) {
    const { kind, model, dim } = world.embedder;
    facts.push(["embedder", `${model} (${kind}, ${dim} dimensions)`], ["rank", String(world.rank)], ["probes", String(world.num_probes)]);
    if (world.second) {
      const { name, sha256, share } = world.second;
      facts.push(["second", el("span", {}, el("b", {}, name), share ? ` answers ${percent(share)} of the requests ` : " routes every request, answers none ", el("code", { class: "quiet" }, sha256.slice(0, 12)))]);
    }
    facts.push(["written with", Object.entries(world.versions).map(([name, version]) => `${name} ${version}`).join(", ") || "unknown"]);
  }
  const heads = [["task cluster"], ["adapter"], ["radius", "num"], ...(world.operator ? [["rows", "num"], ["clients"]] : [])];
  const rows = world.clusters.map((one) => [one.name, el("span", { class: "name" }, one.adapter), fixed(one.radius),
    ...(world.operator ? [String(one.num_examples), one.clients.join(", ")] : [])]);
  $("bundle").replaceChildren(el("dl", { class: "card" }, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    el("h2", {}, "Task clusters"), table(heads, rows));
}

async function showReload() {
  if (!world.operator) return $("reload").replaceChildren();
  const { bundles } = await json("v1/fedrouter/bundles");
  const result = el("div", { class: "result", "aria-live": "polite" });
  const choice = el("select", { id: "which", "aria-label": "Bundle" }, ...bundles.map((name) => el("option", { value: name }, name)));
  choice.value = bundles.find((name) => name !== world.bundle.name) || bundles[0] || "";
  const check = el("button", { type: "button", class: "plain" }, "Check");
  const go = el("button", { type: "button", disabled: true }, "Reload");
  const list = (changes) => ["loaded", "kept", "unloaded"].filter((change) => changes[change].length)
    .map((change) => el("p", {}, el("span", { class: "quiet" }, `${change === "loaded" ? "new" : change}: `), el("span", { class: "name" }, changes[change].join(", "))));
  const run = async (checkOnly, progress) => {
    check.disabled = go.disabled = choice.disabled = true;
    result.replaceChildren(el("p", { class: "quiet" }, progress));
    try {
      const changes = await json("v1/fedrouter/reload", { bundle: choice.value, ...(checkOnly ? { check: true } : {}) });
      result.replaceChildren(el("p", {}, checkOnly ? `${changes.bundle} is valid${changes.probes ? `, ${changes.probes === 1 ? "its probe holds" : `its ${changes.probes} probes hold`}` : ""}. After a reload:` : `${changes.bundle} is served.`), ...list(changes));
      go.disabled = !checkOnly;
      if (!checkOnly) { world = await json("v1/fedrouter/clusters"); showServed(); await showBundle(); await listModels(); }
    } catch (error) {
      result.replaceChildren(el("p", { class: "failed" }, error.message));
    }
    check.disabled = choice.disabled = false;
  };
  check.addEventListener("click", () => run(true, "Validating, running its probes …"));
  go.addEventListener("click", () => run(false, "Loading, then switching …"));
  choice.addEventListener("change", () => { go.disabled = true; result.replaceChildren(); });
  $("reload").replaceChildren(el("h2", {}, "Serve another bundle"), bundles.length
    ? el("div", { class: "card" }, el("div", { class: "row" }, choice, check, go), result)
    : el("p", { class: "empty" }, "There is no other bundle here, or this server cannot reload."));
}

// --- the whole page ---

function showServed() {
  $("served").textContent = `${world.bundle.name} · ${world.bundle.sha256.slice(0, 8)}`;
}

const SHOW = {
  ask: async () => { if (!latest) showDecision(null); await models; },
  map: showMap,
  traffic: showTraffic,
  bundles: async () => { await showBundle(); await showReload(); },
};
let refreshing, models;

const tabOfAddress = () => (TABS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "ask");

async function open(tab, change = "pushState") {
  clearTimeout(refreshing);
  for (const one of TABS) {
    const chosen = one === tab;
    $(one).hidden = !chosen;
    $(`tab-${one}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${one}`).tabIndex = chosen ? 0 : -1;
  }
  if (location.hash !== `#${tab}`) window.history[change](null, "", `#${tab}`);
  await refresh(tab);
}

async function refresh(tab) {
  try {
    models = tab === "ask" ? listModels() : null;  // concurrent with the requests below
    models?.catch(() => {});  // the error is shown where models is awaited
    if (!world || tab !== "ask") { world = await json("v1/fedrouter/clusters"); showServed(); }
    await SHOW[tab]();
    showProblem(null);
  } catch (error) { showProblem(error); }
  const live = tab === "map" || tab === "traffic";
  if (live && !$(tab).hidden) {
    clearTimeout(refreshing);
    refreshing = setTimeout(() => (document.hidden ? refresh.later = tab : refresh(tab)), REFRESH_MS);
  }
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && refresh.later) { const tab = refresh.later; refresh.later = null; if (!$(tab).hidden) refresh(tab); }
});
for (const tab of TABS) {
  $(`tab-${tab}`).addEventListener("click", () => open(tab));
  $(`tab-${tab}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = TABS[(TABS.indexOf(tab) + step + TABS.length) % TABS.length];
    $(`tab-${next}`).focus();
    open(next);
  });
}
$("prompt").addEventListener("input", () => {
  $("where").setAttribute("aria-busy", "true");  // the decision on display is of another text
  clearTimeout(timer);
  timer = setTimeout(lookAhead, QUIET_MS);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("stop").addEventListener("click", () => running?.abort());
$("anew").addEventListener("click", startOver);
for (const id of ["by-adapter", "by-outcome", "by-fallback"]) $(id).addEventListener("change", () => refresh("traffic"));
window.addEventListener("popstate", () => open(tabOfAddress(), "replaceState"));  // Back, or an address typed
open(tabOfAddress(), "replaceState");
