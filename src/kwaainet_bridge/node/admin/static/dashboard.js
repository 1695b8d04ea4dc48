import { by, count, follow, make, put, showPhase } from "./page.js";

const KEPT = 120; // seconds of the charts

const clock = (unix) => new Date(unix * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "medium" });
const short = (peer) => "…" + peer.slice(-6);

function age(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

function pairs(id, rows) {
  const list = by(id);
  list.replaceChildren(...rows.flatMap(([key, value]) => [make("dt", { text: key }), make("dd", { text: value })]));
}

// --- what is known

let status = null;
let coverage = {};
let before = null; // sums at the last status, from which rates are made
const rates = [], delays = [];

function sums(status) {
  const all = { at: status.uptime_seconds, tokens: 0, steps: 0, read: 0, engine: 0, reply: 0 };
  for (const network of Object.values(status.networks)) {
    const served = network.served;
    all.tokens += served.step_tokens + served.pass_tokens;
    all.steps += served.timed_steps;
    for (const part of ["read", "engine", "reply"]) all[part] += served.step_seconds[part];
  }
  return all;
}

const remember = (list, value) => { list.push(value); if (list.length > KEPT) list.shift(); };

function measure() {
  const now = sums(status);
  // a node that began anew counts anew
  const usable = before && now.at > before.at && now.tokens >= before.tokens && now.steps >= before.steps;
  if (usable) {
    remember(rates, (now.tokens - before.tokens) / (now.at - before.at));
    const steps = now.steps - before.steps;
    const parts = ["read", "engine", "reply"].map((part) => [part, ((now[part] - before[part]) / steps) * 1000]);
    remember(delays, steps ? parts.reduce((sum, [, ms]) => sum + ms, 0) : null);
    if (steps) put("parts", parts.map(([part, ms]) => `${part} ${ms.toFixed(1)} ms`).join(" · "));
  }
  before = now;
}

function draw(id, values) {
  const chart = by(id), width = KEPT, height = 40;
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const most = Math.max(1e-9, ...values.filter((v) => v !== null));
  const lines = [[]];
  values.forEach((value, i) => {
    if (value === null) return lines.push([]);
    const x = width - values.length + i + 1;
    lines.at(-1).push(`${x},${(height - 1 - (value / most) * (height - 4)).toFixed(2)}`);
  });
  chart.replaceChildren(...lines.filter((line) => line.length).map((line) => {
    const e = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    const [x, y] = line.at(-1).split(",");
    e.setAttribute("points", line.length > 1 ? line.join(" ") : `${x - 0.5},${y} ${x},${y}`);
    return e;
  }));
}

// --- the parts of the page

function showStatus() {
  const { networks, models, host } = status;
  showPhase(status, "kwaainet-bridge");
  showProblems(status.problems);
  pairs("facts", [
    ["peer", status.peer_id ?? "starting"],
    ...(models.length ? models.map((model) => ["blocks", blocksText(model)]) : [["blocks", "none are served"]]),
    ["others can dial it", `${status.reachability.verdict}: ${status.reachability.evidence}`],
    ["addresses", status.addresses.join(" ") || "none"],
    ["running for", age(status.uptime_seconds)],
    ...(host ? [["connections", `${host.connections.inbound} in, ${host.connections.outbound} out, ${host.connections.relayed} by relays; at most ${host.connections.limit}`]] : []),
    ["event loop", `99 % of the time late by less than ${(status.event_loop.lag_p99_seconds * 1000).toFixed(1)} ms`],
    ["version", status.version],
  ]);
  put("rate", rates.length ? rates.at(-1).toFixed(1) : "–");
  const delay = delays.findLast((ms) => ms !== null);
  put("delay", delay === undefined ? "–" : delay.toFixed(1));
  draw("rate-line", rates);
  draw("delay-line", delays);
  const served = Object.values(networks).map((network) => network.served);
  const sum = (key) => served.reduce((total, one) => total + one[key], 0);
  put("totals", `${count(sum("steps"), "step")} with ${count(sum("step_tokens"), "token")}, ${sum("passes").toLocaleString()} passes with ${count(sum("pass_tokens"), "token")}, ${sum("refused").toLocaleString()} refused`);
  pairs("sessions", Object.entries(networks).map(([name, network]) => [name, `${network.sessions} open`]));
  const caches = models.filter((model) => model.cache).map(cachePart);
  by("caches").replaceChildren(...(caches.length ? caches : [make("p", { text: "no blocks are served", name: "muted" })]));
}

function blocksText({ name, phase, blocks, loading }) {
  if (blocks) return `${blocks.first}:${blocks.end} of ${blocks.of} of ${name}${phase.name === "serving" ? "" : `, ${phase.name}`}`;
  return `${name}: ${phase.name}${loading ? `, ${loading.blocks_done} of ${count(loading.blocks_total, "block")}` : ""}`;
}

function cachePart({ name, cache }) {
  const used = cache.tokens_total - cache.tokens_left;
  const bar = make("progress", { title: `Share of the KV cache of ${name} in use` });
  bar.value = used / Math.max(1, cache.tokens_total);
  const of = status.models.length > 1 ? `${name}: ` : "";
  return make("div", { kids: [bar, make("p", { text: `${of}${used.toLocaleString()} of ${count(cache.tokens_total, "token")} in use`, name: "muted" })] });
}

// what this node serves in a network, with what the blocks are called there
function ownIn(network) {
  return status.models.filter((model) => model.networks[network]?.prefix).map((model) => ({ ...model.networks[network], blocks: model.blocks }));
}

let problemsShown = null;
function showProblems(problems) {
  // built anew only if something is new: whoever reads or copies is not disturbed every second
  const key = JSON.stringify(problems);
  if (key === problemsShown) return;
  problemsShown = key;
  by("problems").classList.toggle("some", problems.length > 0);
  by("problem-list").replaceChildren(...(problems.length
    ? problems.map(({ name, model, reason, remedy }) => make("div", { name: "problem", kids: [
        make("p", { kids: [make("b", { text: model && status.models.length > 1 ? `${name} of ${model}` : name, name: "bad" })] }), make("p", { text: reason }),
        make("p", { kids: [make("b", { text: "What helps: " }), remedy] })] }))
    : [make("p", { text: "Nothing that is known.", name: "good" })]));
}

let networksShown = null;
function showNetworks() {
  const known = Object.entries(status.networks);
  const told = (name) => ownIn(name).map(({ prefix, blocks, announced: a }) => [prefix, blocks, a && [a.state, a.by_others, a.records]]);
  const key = JSON.stringify([coverage, known.map(([name, n]) => [name, n.bootstrap, told(name)])]);
  if (key === networksShown) return;
  networksShown = key;
  const open = new Set([...document.querySelectorAll("#networks details[open]")].map((e) => e.dataset.model));
  by("networks").replaceChildren(...known.map(([name, network]) => networkPart(name, network, coverage[name], open)));
  if (!known.length) by("networks").append(make("p", { text: "None is joined yet.", name: "muted" }));
}

function networkPart(name, network, survey, open) {
  const { total, reached } = network.bootstrap;
  const part = make("section", { kids: [make("h3", { text: name })] });
  part.append(make("p", { text: `${reached.length} of ${count(total, "bootstrap peer")} in touch`, name: total && !reached.length ? "bad" : "muted" }));
  const mine = ownIn(name);
  for (const { prefix, announced: told } of mine) {
    const of = mine.length > 1 ? `${prefix} ` : "";
    if (told) part.append(make("p", { text: `${of}announced as ${told.state}: ${told.by_others} of ${count(told.records, "record")} kept by others`, name: "muted" }));
  }
  const models = survey ? [...survey.models] : [];
  for (const { prefix, blocks } of mine) {
    if (!blocks || models.some((model) => model.prefix === prefix)) continue;
    const { of } = blocks;
    models.unshift({ prefix, num_blocks: of, blocks_per_cell: Math.ceil(of / 96), servers_per_cell: null, gaps: [], error: "", servers: [], servers_total: 0 });
  }
  part.append(make("p", { name: "muted", text: survey ? `coverage read ${clock(survey.at)}` : "coverage is not read yet" }));
  if (survey?.error) part.append(make("p", { text: survey.error, name: "bad" }));
  for (const model of models) part.append(modelPart(name, mine.find(({ prefix }) => prefix === model.prefix)?.blocks, model, open));
  if (survey && !models.length && !survey.error) part.append(make("p", { text: "No model is registered.", name: "muted" }));
  return part;
}

function modelPart(name, own, model, open) {
  const part = make("div", { name: "model" });
  const missing = model.gaps.map(([first, end]) => `${first}:${end}`).join(", ");
  part.append(make("p", { kids: [make("b", { text: model.prefix }), ` ${count(model.num_blocks, "block")}, ${count(model.servers_total, "server")}`] }));
  if (model.error) part.append(make("p", { text: model.error, name: "bad" }));
  const size = model.blocks_per_cell, cells = Math.ceil(model.num_blocks / size);
  const seen = model.servers_per_cell;
  if (seen && !model.error) {
    part.append(make("div", { name: "cells", title: "servers of each block", kids: seen.map((n, i) => make("i", {
      name: n === 0 ? "" : n === 1 ? "one" : "more",
      title: `${i * size}:${Math.min(model.num_blocks, (i + 1) * size)}: ${count(n, "server")}` })) }));
  }
  if (own) {
    part.append(make("div", { name: "cells own", title: "this node's blocks", kids: Array.from({ length: cells }, (_, i) =>
      make("i", { name: i * size < own.end && (i + 1) * size > own.first ? "mine" : "" })) }));
  }
  const key = make("p", { name: "muted key" });
  if (seen && !model.error) key.append(make("i", { name: "none" }), "nobody", make("i", { name: "one" }), "one server", make("i", { name: "more" }), "more");
  if (own) key.append(make("i", { name: "mine" }), `this node, ${own.first}:${own.end}`);
  part.append(key);
  if (missing && !model.error) part.append(make("p", { text: `Nobody serves ${missing}.`, name: "bad" }));
  if (model.servers.length) {
    const rows = model.servers.map((s) => make("tr", { name: s.own ? "self" : "", kids: [
      make("td", { text: s.own ? "this node" : short(s.peer), title: s.peer }), make("td", { text: s.name }),
      make("td", { text: `${s.first}:${s.end}` }),
      make("td", { text: s.state, name: s.state === "online" ? "good" : "warn" }),
      make("td", { text: s.using_relay ? "by a relay" : "directly" }),
      make("td", { text: s.throughput === null ? "" : `${s.throughput.toFixed(1)} tokens/s` }),
      make("td", { text: s.left_out || s.version, title: s.left_out || s.version, name: s.left_out ? "bad" : "" })] }));
    const more = model.servers_total - model.servers.length;
    const details = make("details", { kids: [make("summary", { text: "its servers" }), make("div", { name: "scroll", kids: [make("table", { kids: [make("tbody", { kids: rows })] })] })] });
    if (more > 0) details.append(make("p", { text: `and ${count(more, "more server")}`, name: "muted" }));
    details.dataset.model = `${name} ${model.prefix}`;
    details.open = open.has(details.dataset.model);
    part.append(details);
  }
  return part;
}

function showPeers({ total, peers }) {
  put("peer-count", peers.length < total ? `${peers.length} of ${total} connections` : count(total, "connection"));
  by("peers").replaceChildren(...peers.map((p) => make("tr", { kids: [
    make("td", { text: short(p.peer), title: p.peer, name: "code" }),
    make("td", { text: [p.network ?? "unknown", p.bootstrap ? "bootstrap" : ""].filter(Boolean).join(", ") }),
    make("td", { text: p.relay ? `by the relay ${short(p.relay)}` : p.inbound ? "it dialled this node" : "dialled directly", name: p.relay ? "warn" : "good" }),
    make("td", { text: p.address || "–" }), make("td", { text: p.agent, title: p.agent }), make("td", { text: clock(p.since) })] })));
}

function showEvents(events) {
  const bad = new Set(["degraded"]), good = new Set(["recovered"]);
  by("events").replaceChildren(...events.toReversed().map((e) => make("li", { kids: [
    make("time", { text: clock(e.at) }),
    make("b", { text: `${e.kind} `, name: bad.has(e.kind) ? "bad" : good.has(e.kind) ? "good" : "" }), e.text] })));
}

const receivers = {
  status(value) {
    status = value;
    measure();
    showStatus();
    showNetworks();
  },
  events: showEvents,
  peers: showPeers,
  coverage(value) { coverage = value; if (status) showNetworks(); },
};

follow("/api/events", receivers, () => { before = null; });
