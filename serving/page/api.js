/** The server's API: the key, errors in the server's words, streams of events. */

const STORED_AS = "meshlm-api-key";

/** Says "change" when another key is set. */
export const keyChanges = new EventTarget();

export const apiKey = () => sessionStorage.getItem(STORED_AS) ?? "";

export function setApiKey(key) {
  if (key === apiKey()) return;
  sessionStorage.setItem(STORED_AS, key);
  keyChanges.dispatchEvent(new Event("change"));
}

/** What the server refused, in its own words. status: of HTTP, null where there was no answer. */
export class ApiError extends Error {
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

/** A response that is fine; body: sent as JSON. Throws ApiError, or AbortError where `signal` says so. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached");
  }
  if (!response.ok) throw new ApiError(await complaint(response), response.status);
  return response;
}

async function complaint(response) {
  const plainly = `The server answered ${response.status} ${response.statusText}`.trim();
  try {
    return (await response.json()).error.message || plainly;
  } catch {
    return plainly;
  }
}

/** The data of each server-sent event of a response's body, however its bytes are cut into chunks. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/); // a CR at the end may be half of CR LF
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line !== "" || data.length === 0) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
