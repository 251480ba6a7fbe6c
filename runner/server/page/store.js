// What survives a reload: it is kept in this tab, and nowhere else.

const PLACE = "bloomdesk.desk";

export function load() {
  try {
    return JSON.parse(sessionStorage.getItem(PLACE)) ?? {};
  } catch {
    return {};
  }
}

export function save(desk) {
  try {
    sessionStorage.setItem(PLACE, JSON.stringify(desk));
  } catch {
    // A browser may refuse; then a reload loses the text, and nothing else does.
  }
}
