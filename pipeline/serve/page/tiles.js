// The grid's tiles, and the same picture large.

import { optionsOf } from "./service.js";
import { $, copyOf, cosineOf, element, fitOf, labelOf, licenceOf, number, readable, rightsOf } from "./words.js";

const THUMB_AGAIN_MS = 1500;
const NARROW = 2.4; // times as long as wide: of these a square would show too little

const alikeLink = (hit) => `?${new URLSearchParams([["similar", hit.id], ...optionsOf(new URLSearchParams(location.search))])}`;
const openLink = (hit) => {
  const params = new URLSearchParams(location.search);
  params.set("open", hit.id);
  return `?${params}`;
};

export const skeletons = (count) => Array.from({ length: count }, () => {
  const one = copyOf("tile");
  one.className = "skeleton";
  one.setAttribute("aria-hidden", "true");
  one.querySelector("img").remove();
  one.querySelector(".alike").remove();
  one.querySelector(".caption").replaceChildren();
  return one;
});

export function tile(hit, at) {
  const one = copyOf("tile");
  const [open, alike, image] = [".open", ".alike", "img"].map((selector) => one.querySelector(selector));
  const label = labelOf(hit);
  one.dataset.id = hit.id;
  open.href = openLink(hit);
  alike.href = alikeLink(hit);
  alike.setAttribute("aria-label", `More like number ${at + 1}: ${label}`);
  open.tabIndex = alike.tabIndex = -1; // Tab reaches one tile, arrows the others
  image.alt = `${at + 1}: ${label}`;
  image.srcset = `thumb/${hit.id}?size=256 1x, thumb/${hit.id}?size=512 2x`;
  image.src = `thumb/${hit.id}?size=256`;
  image.addEventListener("load", () => {
    const ratio = image.naturalWidth / image.naturalHeight;
    image.classList.toggle("whole", ratio > NARROW || ratio < 1 / NARROW);
  });
  let tries = 0;
  image.addEventListener("error", () => {
    if (!tries++) return setTimeout(() => { image.srcset = image.srcset; }, THUMB_AGAIN_MS); // too many at once, perhaps
    open.classList.add("gone");
    return open.replaceChildren(`${label}: the picture cannot be shown`);
  });
  one.querySelector(".copies").textContent = copiesOf(hit) && `+${copiesOf(hit)}`;
  one.querySelector(".label").textContent = one.querySelector(".label").title = label;
  one.querySelector(".rights").textContent = one.querySelector(".rights").title = rightsOf(hit);
  const fit = fitOf(hit);
  showMeter(one.querySelector(".meter"), fit);
  one.querySelector(".score span").textContent = fit ?? cosineOf(hit);
  one.querySelector(".score").title = `${fit === null ? "" : `relevance ${fit} of 100, `}cosine ${cosineOf(hit)}`;
  return one;
}

function showMeter(meter, fit) {
  meter.hidden = fit === null;
  meter.firstElementChild.style.width = `${fit}%`;
}

/** Fill the large view with hit `at` of `total`. */
export function showLarge(hit, at, total) {
  const label = labelOf(hit);
  const image = $("view-picture");
  const now = () => image.dataset.id === String(hit.id);
  const trouble = (words) => {
    $("view-trouble").hidden = !words;
    $("view-trouble").replaceChildren(element("span", words));
  };
  trouble("");
  image.alt = label;
  image.dataset.id = hit.id;
  image.src = `thumb/${hit.id}?size=512`; // at once, and sharp when the large one is here
  const large = new Image();
  large.src = `picture/${hit.id}`;
  large.decode().then(
    () => { if (now()) image.src = large.src; },
    () => { if (now()) trouble("The picture cannot be shown in full: it may have moved since it was indexed."); },
  );
  const fit = fitOf(hit);
  $("view-label").replaceChildren(element("bdi", label));
  showMeter($("view-meter"), fit);
  const scores = [`cosine ${cosineOf(hit)}`, `number ${number.format(at + 1)} of ${number.format(total)}`];
  if (fit !== null) scores.unshift(`relevance ${fit} of 100`);
  $("view-scores").replaceChildren(...scores.map((words) => element("span", words)));
  $("view-facts").replaceChildren(...facts(hit).flatMap(([name, value]) => [element("dt", readable(name)), fact(value)]));
  $("view-alike").href = alikeLink(hit);
  const [back, on] = document.querySelectorAll(".step");
  back.disabled = at === 0;
  on.disabled = at + 1 >= total;
}

const copiesOf = ({ copies }) => (copies?.length ? `${number.format(copies.length)} alike` : "");

function facts(hit) {
  const { rights_holder, license, licence, license_url, ...others } = hit.metadata;
  const told = [["key", hit.key], ["licence", licenceOf(hit)], ["rights holder", rights_holder], ["licence text", license_url], ["mark", hit.mark], ["near-duplicates", copiesOf(hit)]];
  told.push(...Object.entries(others).map(([name, value]) => [name.replaceAll("_", " "), value]));
  return told.filter(([, value]) => value != null && value !== "");
}

function fact(value) {
  const place = element("dd");
  const text = readable(value);
  if (/^https?:\/\/\S+$/.test(text)) {
    const out = element("a", text);
    Object.assign(out, { href: text, rel: "noopener noreferrer", target: "_blank" });
    place.append(out);
  } else {
    const words = element("bdi");
    words.append(...text.split(/(?<=[/_])/).flatMap((part) => [part, document.createElement("wbr")])); // keys have no spaces
    place.append(words);
  }
  return place;
}
