// What all pages of the node have in common. What comes from peers gets into them as text only: never as markup.
const SILENT = 6000; // ms without news, of which there should be some every second
const TOKEN = "kwaainet-bridge token";

export const by = (id) => document.getElementById(id);
export const put = (id, text) => { const e = by(id); if (e.textContent !== text) e.textContent = text; };
export const count = (n, what) => `${n.toLocaleString()} ${what}${n === 1 ? "" : "s"}`;

export function make(tag, { text, name, title, kids = [] } = {}) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (name) e.className = name;
  if (title) e.title = title;
  e.append(...kids);
  return e;
}

export function showPhase({ phase, ready, models, problems, paused }, page) {
  let text = phase.name;
  const loading = models.find((model) => model.loading)?.loading;
  if (phase.name === "loading" && loading) text += ` ${loading.blocks_done} of ${count(loading.blocks_total, "block")}`;
  put("phase", text);
  by("phase").className = `badge ${phase.name === "serving" ? "good" : "warn"}`;
  put("ready", ready ? "ready" : "not ready");
  by("ready").className = `badge ${ready ? "good" : "bad"}`;
  by("paused").hidden = !paused;
  put("paused", paused ? `Paused: ${paused}. No new work is taken; what runs goes on. kwaainet-bridge resume ends it, if it does not end by itself.` : "");
  document.title = `${problems.length ? "⚠ " : ""}${phase.name} – ${page}`;
}

// --- the token, kept by the tab

export function authorization() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { authorization: `Bearer ${token}` } : {};
}

let asking = null; // one form, however many requests were refused

export function askToken(key) {
  asking ??= new Promise((given) => {
    by("refused").hidden = sessionStorage.getItem(TOKEN) === null;
    sessionStorage.removeItem(TOKEN);
    put("token-key", key);
    by("ask").hidden = false;
    by("main").hidden = true;
    for (const id of ["link", "phase", "ready"]) put(id, "");
    by("token").focus();
    by("ask").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(TOKEN, by("token").value.trim());
      by("token").value = "";
      by("ask").hidden = true;
      asking = null;
      given();
    };
  });
  return asking;
}

// --- server-sent events: fetched, since EventSource can send neither a token nor a request's body

export async function* messages(body, alive = () => {}) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    alive();
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const message of whole) {
      let name = "message";
      const data = [];
      for (const line of message.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        else if (line.startsWith("data: ")) data.push(line.slice(6));
      }
      yield { name, data: data.join("\n") };
    }
  }
}

let lost = null; // since when nothing comes

function connected() {
  lost = null;
  if (asking) return;
  put("link", "live");
  by("link").className = "muted";
  by("main").hidden = false;
  by("main").classList.remove("stale");
}

function disconnected(why) {
  lost ??= new Date();
  put("link", `not connected since ${lost.toLocaleTimeString()}${why ? `: ${why}` : ""}`);
  by("link").className = "bad";
  by("main").classList.add("stale");
}

async function listen(path, receivers) {
  const stop = new AbortController();
  let alarm;
  const alive = () => { clearTimeout(alarm); alarm = setTimeout(() => stop.abort(), SILENT); };
  try {
    alive();
    const answer = await fetch(path, { cache: "no-store", signal: stop.signal, headers: authorization() });
    if (answer.status === 401) { clearTimeout(alarm); return await askToken("admin.token_file"); }
    if (!answer.ok) return disconnected((await answer.text()).slice(0, 200));
    for await (const { name, data } of messages(answer.body, alive)) {
      receivers[name]?.(JSON.parse(data));
      connected();
    }
    disconnected();
  } finally {
    clearTimeout(alarm);
    stop.abort();
  }
}

// Tell the receivers what the node tells, for as long as the page is open; `cut` when nothing comes any more.
export async function follow(path, receivers, cut) {
  let version = null;
  const known = { ...receivers, status(value) {
    if (version !== null && version !== value.version) location.reload(); // the page of that version
    version = value.version;
    receivers.status(value);
  } };
  for (;;) {
    const began = Date.now();
    try {
      await listen(path, known);
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof TypeError)) console.error(error);
      disconnected();
    }
    cut();
    // one that ends at once is not asked again at once
    if (lost) await new Promise((resolve) => setTimeout(resolve, Math.max(0, 1000 - (Date.now() - began))));
  }
}
