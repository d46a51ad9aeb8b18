// Text, elements, and saying something. Text from outside only ever becomes text.

export const $ = (id) => document.getElementById(id);
export const number = new Intl.NumberFormat("en");
export const plural = (count) => `${number.format(count)} ${count === 1 ? "picture" : "pictures"}`;

const TOAST_MS = 3500;
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;

/** Text in which what turns it round or cannot be seen stands as its number. */
export const readable = (text) => String(text).replace(HIDDEN, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** The service's words, which begin small and end without a stop. */
export const sentence = (words) => `${words.charAt(0).toUpperCase()}${readable(words.slice(1))}.`;

const first = (metadata, ...names) => names.map((name) => metadata[name]).find((value) => value != null && value !== "");

/** For reading: `Fruit__Pink-Lady` as words; a filter and the large view have a label as it is. */
export const labelOf = ({ key, metadata }) => {
  const named = first(metadata, "common_name", "label", "caption");
  return named == null ? readable(key.split("/").at(-1)) : readable(named).replaceAll(/_+/g, " ").trim() || readable(named);
};
export const licenceOf = ({ metadata }) => first(metadata, "license", "licence");
export const rightsOf = (hit) => [licenceOf(hit), hit.metadata.rights_holder].filter(Boolean).map(readable).join(" · ");

/** How well a hit fits, 0 to 100; null where the index is too small to tell. */
export const fitOf = (hit) => (hit.relevance == null ? null : Math.round(100 * hit.relevance));

export const cosineOf = (hit) => hit.score.toFixed(3).replace("-0.000", "0.000");

export function element(name, text = "", classes = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = classes;
  return made;
}

export function button(text, act) {
  const made = element("button", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "use"));
  svg.firstChild.setAttribute("href", `#${name}`);
  return svg;
}

/** A copy of what is in a <template>. */
export const copyOf = (id) => $(id).content.firstElementChild.cloneNode(true);

let fading = 0;
export function toast(text) {
  (document.querySelector("dialog[open]") ?? document.body).append($("toast")); // outside an open dialog it is not read out
  $("toast").textContent = text;
  clearTimeout(fading);
  fading = setTimeout(() => { $("toast").textContent = ""; }, TOAST_MS);
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text); // refused where the page is neither https nor local
    toast(`${what} copied`);
  } catch {
    prompt(`This browser lets no page copy here. The ${what.toLowerCase()}:`, text);
  }
}
