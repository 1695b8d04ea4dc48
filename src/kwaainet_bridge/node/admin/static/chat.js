// A conversation with a model through the node's own OpenAI endpoint. It is kept by the tab: over a reload, too.
import { askToken, authorization, by, count, follow, make, messages, put, showPhase } from "./page.js";

const KEPT = "kwaainet-bridge chat";
const SETTINGS = ["model", "mode", "temperature", "most"];

// What helps, by the code of an error; what else happens is told without.
const REMEDIES = {
  no_connection: "The page looks for the node by itself. Once it says live above, send again.",
  cut: "The node was stopped or lost its way here. Once it says live above, send again.",
  left: "Send again for a whole answer.",
  endpoint_off: "Put this into the node's configuration, and start the node again:",
  endpoint_not_there: "The page asks again by itself.",
  no_chat_template: "A base model knows no conversations, but goes on with a text.",
  swarm_unavailable: "The page Node tells under Networks which blocks nobody serves. Send again when they are back.",
  rate_limit_exceeded: "Wait a moment and send again. openai.at_once and openai.requests_per_minute say how many are taken.",
  context_length_exceeded: "Begin anew, or have fewer tokens at most.",
  model_not_found: "Choose another model above.",
};

class Told extends Error { // what went wrong with an answer
  constructor(message, code) { super(message); this.code = code; }
}

// --- what is known: turns of {asked, answer, wrong: {message, code} or null, note}

let turns = [];
let running = null; // stops the answer that comes now
let wanted = {}; // the settings as the tab has kept them

function keep() {
  const settings = Object.fromEntries(SETTINGS.map((id) => [id, by(id).value || wanted[id]]));
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ turns, settings }));
  } catch { // too long for the browser: it is here until the page is left
    sessionStorage.removeItem(KEPT);
  }
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");
  turns = kept.turns ?? [];
  wanted = kept.settings ?? {};
  for (const id of SETTINGS) if (wanted[id] && id !== "model") by(id).value = wanted[id];
  turns.forEach((turn) => by("talk").append(part(turn)));
}

// --- what is shown

// folders by their last part alone
const shortName = (id) => (id.startsWith("/") ? id.split("/").findLast(Boolean) : id);

const parts = new WeakMap(); // of each turn, where it is shown

function part(turn) {
  const answer = make("p", { name: "said answer" });
  const who = make("p", { name: "who" });
  const note = make("p", { name: "muted note" });
  const wrong = make("div");
  const whole = make("article", { name: "turn", kids: [
    make("p", { text: "You", name: "who" }), make("p", { text: turn.asked, name: "said asked" }), who, answer, note, wrong] });
  parts.set(turn, { whole, who, answer, note, wrong });
  show(turn);
  return whole;
}

function show(turn) {
  const { whole, who, answer, note, wrong } = parts.get(turn);
  const now = running?.turn === turn;
  who.textContent = shortName(turn.model ?? "");
  who.title = turn.model ?? "";
  if (answer.textContent !== turn.answer) answer.textContent = turn.answer;
  note.textContent = turn.note ?? "";
  whole.classList.toggle("running", now);
  whole.setAttribute("aria-busy", now);
  whole.classList.toggle("left-out", !now && turn.answer === "" && turn.wrong !== null);
  wrong.replaceChildren();
  wrong.className = turn.wrong ? "wrong" : "";
  if (turn.wrong) wrong.append(...told(turn.wrong), ...ways(turn));
}

function told({ message, code }) {
  const kids = [make("p", { text: message, name: "bad" })];
  if (REMEDIES[code]) kids.push(make("p", { kids: [make("b", { text: "What helps: " }), REMEDIES[code]] }));
  return kids;
}

// what can be done about the last turn
function ways(turn) {
  if (turn !== turns.at(-1)) return [];
  const again = (text, before = () => {}) => {
    const button = make("button", { text });
    button.type = "button";
    button.onclick = () => { before(); answerTo(turn); };
    return button;
  };
  if (turn.wrong.code === "no_chat_template") return [again("Go on with the text", () => { by("mode").value = "text"; })];
  return [again("Send again")];
}

const atEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
const toEnd = () => scrollTo(0, document.documentElement.scrollHeight);

function showRunning() {
  by("send").hidden = running !== null;
  by("stop").hidden = running === null;
  by("anew").disabled = running !== null;
}

// --- an answer

function body(turn) {
  const before = turns.slice(0, turns.indexOf(turn)).filter((one) => one.answer !== "");
  const asked = { model: by("model").value, temperature: Number(by("temperature").value), max_tokens: Number(by("most").value),
    stream: true, stream_options: { include_usage: true } };
  if (by("mode").value === "text") {
    return { ...asked, prompt: [...before.map((one) => one.asked + one.answer), turn.asked].join("\n") };
  }
  const said = before.flatMap((one) => [{ role: "user", content: one.asked }, { role: "assistant", content: one.answer }]);
  return { ...asked, messages: [...said, { role: "user", content: turn.asked }] };
}

async function request(path, options = {}) {
  for (;;) {
    let answer;
    try {
      answer = await fetch(path, { ...options, cache: "no-store", headers: { ...authorization(), ...options.headers } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Told("The node cannot be reached.", "no_connection");
    }
    if (answer.ok) return answer;
    if (answer.status !== 401) throw await refusal(answer);
    await askToken("openai.token_file");
  }
}

async function refusal(answer) {
  const text = await answer.text();
  try {
    const { message, code } = JSON.parse(text).error;
    return new Told(message, code);
  } catch {
    return new Told(`The node answered ${answer.status}: ${text.slice(0, 200)}`);
  }
}

// Reads the events of an answer into the turn; returns how it ended.
async function read(turn, events) {
  const end = { reason: null, tokens: null };
  let whole = false;
  for await (const { data } of messages(events)) {
    if (data === "[DONE]") { whole = true; continue; }
    const { error, choices, usage } = JSON.parse(data);
    if (error) throw new Told(error.message, error.code);
    if (usage) end.tokens = usage.completion_tokens;
    for (const { delta, text, finish_reason } of choices) {
      const follows = atEnd();
      const piece = delta ? delta.content ?? "" : text;
      turn.answer += piece;
      parts.get(turn).answer.append(piece);
      end.reason = finish_reason ?? end.reason;
      if (follows) toEnd();
    }
  }
  if (!whole) throw new Told("The answer broke off.", "cut");
  return end;
}

async function answerTo(turn) {
  if (running) return;
  const stop = new AbortController();
  const asked = body(turn), began = performance.now(), before = turn.answer;
  const path = asked.messages ? "/v1/chat/completions" : "/v1/completions";
  Object.assign(turn, { model: asked.model, answer: "", wrong: null, note: "" });
  running = { turn, stop };
  turns.forEach(show);
  showRunning();
  toEnd();
  try {
    const headers = { "content-type": "application/json" };
    const answer = await request(path, { method: "POST", body: JSON.stringify(asked), signal: stop.signal, headers });
    let end;
    try {
      end = await read(turn, answer.body);
    } catch (error) { // the connection's, which has no words of its own
      throw error instanceof TypeError ? new Told("The answer broke off.", "cut") : error;
    }
    const seconds = (performance.now() - began) / 1000;
    const most = end.reason === "length" ? "; ended at the most tokens" : "";
    turn.note = `${count(end.tokens, "token")}, ${(end.tokens / seconds).toFixed(1)} tokens/s${most}`;
  } catch (error) {
    if (stop.signal.aborted) turn.note = "stopped";
    else if (error instanceof Told) turn.wrong = { message: error.message, code: error.code };
    else throw error;
  } finally {
    const follows = atEnd();
    running = null;
    turn.answer ||= before; // what there was is worth more than nothing
    turns.forEach(show);
    showRunning();
    if (follows) toEnd();
    keep();
  }
}

// --- models: asked for again until they are known, and anew after the node was gone

let known = false, fresh = false, off = false, finding = false;

async function findModels() {
  if (fresh || off || finding) return;
  finding = true;
  try {
    const { data } = await (await request("/v1/models")).json();
    const chosen = by("model").value || wanted.model;
    const names = data.map(({ id }) => shortName(id));
    by("model").replaceChildren(...data.map(({ id }, n) => {
      const text = names.indexOf(names[n]) === names.lastIndexOf(names[n]) ? names[n] : id;
      return Object.assign(make("option", { text, title: id }), { value: id });
    }));
    if (data.some(({ id }) => id === chosen)) by("model").value = chosen;
    known = fresh = true;
    by("none").hidden = true;
  } catch (error) {
    if (!(error instanceof Told)) throw error;
    off = error.code === "endpoint_off";
    if (off) known = false;
    const example = off ? [make("pre", { text: "openai:\n  listen: 127.0.0.1:8000" })] : [];
    by("none").replaceChildren(...told(error), ...example);
    by("none").hidden = false;
  } finally {
    finding = false;
    by("send").disabled = !known;
  }
}

// --- the keyboard and the rest

by("compose").onsubmit = (event) => {
  event.preventDefault();
  if (running || !known) return;
  const turn = { asked: by("message").value, answer: "", wrong: null };
  turns.push(turn);
  by("message").value = "";
  by("talk").append(part(turn));
  by("message").focus();
  answerTo(turn);
};
by("message").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  by("compose").requestSubmit();
};
document.onkeydown = (event) => { if (event.key === "Escape") running?.stop.abort(); };
by("stop").onclick = () => { running?.stop.abort(); by("message").focus(); };
by("anew").onclick = () => {
  turns = [];
  by("talk").replaceChildren();
  keep();
  by("message").focus();
};
addEventListener("pagehide", () => {
  if (running) running.turn.wrong = { message: "The page was left while the answer came.", code: "left" };
  keep();
});

restore();
showRunning();
by("send").disabled = true;
follow("/api/events?only=status", { status(value) { showPhase(value, "chat"); findModels(); } }, () => { fresh = off = false; });
