// What the engine does, as the server tells it.

import { ask, eventsOf, pause } from "./server.js";

const LATEST = 10;

// Calls `onState` with each state of the server, and with null and the reason if it can't be reached. Never returns.
export async function watchProgress(onState) {
  for (let failures = 0; ; failures += 1) {
    const abort = new AbortController();
    try {
      const response = await ask("/progress", {
        headers: { accept: "text/event-stream" },
        signal: abort.signal,
      });
      for await (const data of eventsOf(response, abort)) {
        failures = 0;
        onState(JSON.parse(data));
      }
    } catch (error) {
      onState(null, error.message);
    }
    await pause(1000 * Math.min(LATEST, 2 ** Math.min(failures, 8)));
  }
}
