// The service as the page sees it: JSON, or Trouble in words.

const RETRIES_MAX = 2; // of a busy service, which says when to come back
const RETRY_S_MAX = 10;

export const PAGE = 24; // answers of one request
export const REACH = 10_000; // the service answers no further down
export const FACETS = { label: "Label", taxon: "Taxon", licence: "Licence" };
export const OPTIONS = {
  ...FACETS, key: "Key", date_from: "From", date_to: "Until", box: "Place", threshold: "Cosine at least", mmr: "Variety",
  group: "Near-duplicates",
};

/** What narrows an answer, of all that an address says. */
export const optionsOf = (asked) => [...asked].filter(([name]) => name in OPTIONS);

/** `lasting`: the same question would fail again. */
export class Trouble extends Error {
  constructor(words, { signedOut = false, lasting = false } = {}) {
    super(words);
    Object.assign(this, { signedOut, lasting });
  }
}

const wait = (seconds, signal) => new Promise((done, stop) => {
  setTimeout(done, 1000 * seconds);
  signal.addEventListener("abort", () => stop(signal.reason));
});

/** `busy` hears that the service is, and for how many seconds; without it nothing is tried again. */
export async function fetchJson(path, { signal, body, busy, retries = RETRIES_MAX } = {}) {
  let response;
  try {
    response = await fetch(path, { signal, body, method: body ? "POST" : "GET", headers: { Accept: "application/json" } });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Trouble("The service cannot be reached. Is it running, and are you online?");
  }
  if ([429, 503].includes(response.status) && retries && busy) {
    const seconds = Math.min(Number(response.headers.get("Retry-After")) || 1, RETRY_S_MAX);
    busy(seconds);
    await wait(seconds, signal);
    return fetchJson(path, { signal, body, busy, retries: retries - 1 });
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  if (response.status === 401) throw new Trouble("You are signed out.", { signedOut: true });
  const lasting = response.status >= 400 && response.status < 500 && response.status !== 429;
  throw new Trouble(answer.error ?? `The service answered ${response.status} ${response.statusText} without a reason.`, { lasting });
}

/** One page of the answer to what the address asks; facets come with the first one. */
export function fetchPage(asked, picture, facets, offset, waiting) {
  const params = new URLSearchParams([["k", PAGE], ["offset", offset], ...optionsOf(asked)]);
  if (!offset && facets.length) params.set("facets", facets.join(","));
  if (asked.has("similar")) return fetchJson(`api/similar/${encodeURIComponent(asked.get("similar"))}?${params}`, waiting);
  if (asked.has("q")) params.set("q", asked.get("q"));
  if (!asked.has("picture")) return fetchJson(`api/search?${params}`, waiting);
  if (!picture) throw new Trouble("A link cannot carry a picture, and this page no longer has the one it asked with. Drop it here again.", { lasting: true });
  const body = new FormData();
  body.set("picture", picture);
  return fetchJson(`api/search?${params}`, { ...waiting, body });
}
