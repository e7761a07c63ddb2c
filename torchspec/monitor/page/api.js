// What the page asks the server. The token stays in this tab: it is taken out of the address at once.

const TIMEOUT = 8000;
const KEY = "torchspec-token";

if (location.hash.startsWith("#token=")) {
  setToken(decodeURIComponent(location.hash.slice("#token=".length)));
  history.replaceState(null, "", location.pathname + location.search);
}

export function setToken(token) {
  sessionStorage.setItem(KEY, token);
}

export const token = () => sessionStorage.getItem(KEY) ?? "";

/** GET as JSON. Throws where the server is away or refuses; `locked` says that it is for want of the token. */
export async function get(path, parameters = {}) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined);
  const query = new URLSearchParams(given).toString();
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  const signal = AbortSignal.timeout(TIMEOUT);
  const response = await fetch(query ? `${path}?${query}` : path, { headers, signal });
  if (!response.ok) throw Object.assign(new Error(await reason(response)), { locked: response.status === 401 });
  return response.json();
}

/** POST as JSON with the token, to the run of this number; gives the server's message, throws its error. */
export async function post(path, run, body) {
  const headers = { "Content-Type": "application/json", Authorization: `Bearer ${token()}` };
  const response = await fetch(`${path}?run=${run}`, { method: "POST", headers, body: JSON.stringify(body) });
  if (!response.ok) throw new Error(await reason(response));
  return (await response.json()).message;
}

async function reason(response) {
  const body = await response.json().catch(() => ({}));
  return body.error ?? `the server answered ${response.status}`;
}
