// Jobs: files of requests that the server works through, and their results.

import { byId, element, put } from "./dom.js";
import { ask, askJson, pause, ServerError } from "./server.js";
import { count } from "./units.js";

const INTERVAL = 3_000;
const MOST = 20;
const ENDPOINT = "/v1/completions";
const ENDED = ["completed", "failed", "cancelled", "expired"];

// Shows the jobs for as long as the page is open; nothing if the server has none to offer.
export async function watchJobs() {
  byId("job-file").addEventListener("change", () => act(add));
  for (;;) {
    if (!document.hidden) {
      try {
        await show();
      } catch (error) {
        if (error instanceof ServerError && [404, 405].includes(error.status)) return;
      }
    }
    await pause(INTERVAL);
  }
}

async function show() {
  const { data } = await askJson(`/v1/batches?limit=${MOST}`);
  byId("jobs").hidden = false;
  const list = byId("job-list");
  const rows = Object.fromEntries(Array.from(list.children, (row) => [row.dataset.id, row]));
  // A row that has not changed stays, and with it the focus.
  const shown = data.map((job) => {
    const known = rows[job.id];
    return known?.dataset.told === told(job) ? known : rowOf(job);
  });
  if (shown.length !== list.children.length || shown.some((row, place) => row !== list.children[place])) {
    const focused = list.contains(document.activeElement) ? document.activeElement.closest("li").dataset.id : null;
    list.replaceChildren(...shown);
    if (focused) shown.find((row) => row.dataset.id === focused)?.querySelector("button")?.focus();
  }
}

const told = (job) =>
  JSON.stringify([job.status, job.paused, job.request_counts, job.output_file_id, job.error_file_id]);

function rowOf(job) {
  const { total = 0, completed = 0, failed = 0 } = job.request_counts ?? {};
  const bar = element("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--share", total ? (completed + failed) / total : 0);
  const counts = `${count(completed)} of ${count(total)}${failed ? `, ${count(failed)} failed` : ""}`;
  const row = element(
    "li",
    { data: { id: job.id, told: told(job), state: job.status } },
    element("span", { class: "name", title: job.id }, `…${job.id.slice(-6)}`),
    element("span", { class: "figure" }, `${job.status.replaceAll("_", " ")}, ${counts}`),
    bar,
  );
  const why = job.paused ?? job.errors?.data?.[0]?.message;
  if (why) row.append(element("p", { class: "error" }, why));
  row.append(element("div", { class: "actions" }, ...buttonsOf(job)));
  return row;
}

function buttonsOf(job) {
  const name = `job ${job.id.slice(-6)}`;
  const found = [];
  if (!ENDED.includes(job.status) && job.status !== "cancelling") {
    found.push(button("Cancel", `Cancel ${name}`, () => ask(`/v1/batches/${job.id}/cancel`, { method: "POST" })));
  }
  if (job.output_file_id) {
    found.push(button("Results", `Results of ${name}`, () => download(job.output_file_id, "results")));
  }
  if (job.error_file_id) {
    found.push(button("Errors", `Errors of ${name}`, () => download(job.error_file_id, "errors")));
  }
  return found;
}

const button = (text, label, action) =>
  element("button", { type: "button", class: "small", "aria-label": label, onclick: () => act(action) }, text);

async function act(action) {
  put(byId("job-error"), "");
  try {
    await action();
    await show();
  } catch (error) {
    put(byId("job-error"), error.message);
  }
}

async function add() {
  const input = byId("job-file");
  const [file] = input.files;
  if (!file) return;
  const form = new FormData();
  form.append("purpose", "batch");
  form.append("file", file, file.name);
  input.value = "";
  const stored = await askJson("/v1/files", { method: "POST", body: form });
  await askJson("/v1/batches", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ input_file_id: stored.id, endpoint: await endpointOf(file), completion_window: "24h" }),
  });
}

// The lines of a file name the endpoint that they are for.
async function endpointOf(file) {
  const [line] = (await file.slice(0, 2 ** 20).text()).split("\n");
  try {
    return JSON.parse(line).url ?? ENDPOINT;
  } catch {
    return ENDPOINT;
  }
}

async function download(id, name) {
  const response = await ask(`/v1/files/${id}/content`);
  const address = URL.createObjectURL(await response.blob());
  element("a", { href: address, download: `${id}-${name}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
