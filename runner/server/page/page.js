// The page: what its buttons and keys do, and what it shows of the run and of the server.

import { byId, put } from "./dom.js";
import { watchJobs } from "./jobs.js";
import { PassView } from "./pass_view.js";
import { watchProgress } from "./progress.js";
import { showQueue } from "./queue_view.js";
import { Run } from "./run.js";
import * as settings from "./settings.js";
import { load, save } from "./store.js";
import { TextView } from "./text_view.js";
import { count } from "./units.js";

const REASONS = { length: "Its length is reached.", stop: "The model ended it here." };
const STATUSES = { ready: "ready", loading: "loading", failed: "failed", stopping: "stopping" };

const kept = load();
const text = new TextView();
const pass = new PassView();
const run = new Run(onChange, kept.run);
let server = null;
let spoken = "";

settings.restore(kept.fields);
byId("settings").open = matchMedia("(min-width: 60rem)").matches;
onChange();
act(() => run.resume());
watchProgress(onState);
watchJobs();

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("stop").addEventListener("click", () => stop());
byId("go-on").addEventListener("click", () => act(() => run.goOn(settings.read())));
byId("copy").addEventListener("click", () => copy());
addEventListener("input", () => keep());
addEventListener("pagehide", () => keep());
addEventListener("keydown", (event) => {
  if (byId("key-dialog").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  else if (event.key === "Escape" && !event.defaultPrevented) stop();
});

function generate() {
  if (!run.isRunning) act(() => run.generate(byId("prompt").value, settings.read()));
}

function stop() {
  if (!run.isRunning) return;
  run.stop();
  byId("go-on").focus();
}

// Does it, and says what went wrong where it belongs.
async function act(action) {
  settings.clearErrors();
  byId("alert").hidden = true;
  try {
    await action();
  } catch (error) {
    if (settings.showError(error.param, error.message)) return;
    put(byId("alert"), error.message);
    byId("alert").hidden = false;
  }
}

async function copy() {
  await navigator.clipboard.writeText(run.given + run.text);
  speak("Copied.");
}

function onChange() {
  const { pieces } = run;
  text.show(run.given, pieces, run.isRunning);
  byId("generate").disabled = run.isRunning;
  byId("stop").disabled = !run.isRunning;
  byId("go-on").disabled = run.isRunning || !run.given || run.state === "idle";
  byId("copy").hidden = !(pieces.length && navigator.clipboard);
  put(byId("run-status"), statusOfRun());
  pass.tokens(run);
  speak(announcement());
  keep();
}

function onState(state, why) {
  server = state;
  pass.show(state, run);
  showQueue(state, run);
  const status = byId("status");
  status.dataset.status = state?.status ?? "none";
  put(byId("trouble"), troubleOf(state, why));
  put(status, state ? (state.pass ? "running" : STATUSES[state.status]) : "not reached");
  if (state) {
    put(byId("model"), state.model);
    document.title = titleOf(state);
  }
  put(byId("run-status"), statusOfRun());
}

function troubleOf(state, why) {
  if (!state) return `The server is not reached: ${why}. The page goes on trying.`;
  return state.status === "failed" ? state.message : "";
}

function titleOf(state) {
  if (!run.isRunning || !state.pass) return `${state.model} · bloomdesk`;
  return `${run.tokens}/${run.most} · block ${state.pass.block}/${state.blocks} · bloomdesk`;
}

function statusOfRun() {
  const seed = run.seed === null || run.seed === undefined ? "" : ` Seed ${run.seed}.`;
  if (run.note) return run.note + seed;
  if (run.isRunning) return (waitingFor() || "The next token is on its way.") + seed;
  return run.state === "done" ? `${count(run.tokens)} tokens. ${REASONS[run.reason] ?? ""}${seed}` : "";
}

// Why a request that runs gets nothing yet.
function waitingFor() {
  if (!server) return "The server is not reached at the moment.";
  if (server.status !== "ready") return server.message ?? "";
  const waiting = server.requests.filter((each) => !each.active);
  const place = waiting.findIndex((each) => each.id !== null && each.id === run.id);
  if (place >= 0) return `Waiting for a pass: number ${place + 1} of ${server.waiting}.`;
  return run.tokens || !server.pass ? "" : "The model is reading the prompt.";
}

// Read aloud: not every token, but how it goes.
function announcement() {
  if (run.isRunning) return run.note || (run.tokens ? "The text grows." : "Generating.");
  return run.state === "idle" ? "" : statusOfRun();
}

function speak(words) {
  if (words !== spoken) put(byId("spoken"), words);
  spoken = words;
}

function keep() {
  save({ fields: settings.written(), run });
}
