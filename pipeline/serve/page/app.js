// The page: its state is its address, and `render` brings what is shown in line with it.

import { active, closeMenus, menus } from "./filters.js";
import { FACETS, OPTIONS, PAGE, REACH, Trouble, fetchJson, fetchPage, optionsOf } from "./service.js";
import { showLarge, skeletons, tile } from "./tiles.js";
import { $, button, copy, element, number, plural, readable, sentence, toast } from "./words.js";

const SLOW_MS = 1000;
const STANDS_OUT = 0.5; // the relevance from which on a picture does (pipeline/search/relevance.py)
const KEPT = 8; // answers kept for going back
const LINKED_MAX = 192; // answers looked through for the picture that a link opens
const SOURCES_NAMED = 3;
const EXAMPLES = 4;
const EXAMPLE_CHARACTERS = 28;

const view = $("view");
const pictures = new Map(); // number in the address -> dropped file; a link cannot carry it
const kept = new Map(); // question -> its answer, for going back

let about = null;
let introduced = null; // settles when `about` is known, or that it cannot be
let shown = null; // the answer on the page
let current = 0; // the tile that Tab reaches
let running = null; // aborts the request in flight: nobody computes what nobody waits for

// ---- the address ----------------------------------------------------------------------------------------------------

const address = () => new URLSearchParams(location.search);

/** What is asked, without the picture that happens to be open; "" where nothing is. */
function question() {
  const asked = address();
  asked.delete("open");
  return ["q", "similar", "picture"].some((name) => asked.get(name)) ? asked.toString() : "";
}

const link = (changes) => {
  const params = address();
  for (const [name, value] of Object.entries(changes)) value == null || value === "" ? params.delete(name) : params.set(name, value);
  return `?${params}`;
};

function go(target, { replace = false, state = null } = {}) {
  history[replace ? "replaceState" : "pushState"](state, "", target === "?" ? location.pathname : target);
  return render();
}

const ask = (changes) => {
  const next = new URLSearchParams([...Object.entries(changes).filter(([, value]) => value), ...optionsOf(address())]);
  return go(`?${next}`);
};

// ---- answers --------------------------------------------------------------------------------------------------------

/** Bring what is shown in line with the address. */
async function render() {
  const asked = question();
  if (!shown || asked !== shown.question) {
    running?.abort();
    running = null;
    if (shown) shown.scroll = scrollY;
    shown = kept.get(asked) ?? { question: asked, hits: [], total: null, generation: null, facets: {}, scroll: 0 };
    kept.delete(asked);
    if (asked) kept.set(asked, shown);
    if (kept.size > KEPT) kept.delete(kept.keys().next().value);
    showAnswer();
    if (asked && shown.total === null) await more();
  }
  await showOpen();
}

function showAnswer() {
  const asked = address();
  const nothing = !shown.question;
  document.body.classList.toggle("start", nothing);
  $("start").hidden = !nothing;
  $("results").hidden = nothing;
  $("q").value = asked.get("q") ?? "";
  showAsked(asked);
  say("notice");
  say("end");
  $("results").removeAttribute("aria-busy");
  $("grid").replaceChildren(...shown.hits.map(tile));
  setCurrent(0);
  showSummary();
  showFilters();
  const title = asked.get("q") || (asked.has("similar") ? "More like this" : "Pictures like yours");
  $("title").textContent = nothing ? "What are you looking for?" : `Pictures: ${title}`;
  document.title = nothing ? "Nightjar" : `${title} - Nightjar`;
  scrollTo(0, shown.scroll);
  if (nothing) suggest();
  if (nothing && matchMedia("(hover: hover)").matches && !view.open) $("q").focus();
}

/** The next page of the answer that is shown; false where there was none to add. */
async function more() {
  const answer = shown;
  if (running || answer.stale || answer.ended || answer.hits.length >= REACH) return false;
  const abort = running = new AbortController();
  const slow = setTimeout(() => { $("status").textContent = "Still searching. This takes longer than usual."; }, SLOW_MS);
  $("results").setAttribute("aria-busy", "true");
  if (!answer.hits.length) $("status").textContent = "Searching";
  say("end");
  $("grid").append(...skeletons(answer.hits.length ? 6 : PAGE / 2));
  let added = false;
  try {
    await introduced;
    const asked = new URLSearchParams(answer.question);
    const facets = (about?.facets ?? []).filter((name) => name in FACETS);
    const busy = (seconds) => { $("status").textContent = `The service is busy; trying again in ${seconds} s.`; };
    const page = await fetchPage(asked, pictures.get(asked.get("picture")), facets, answer.hits.length, { signal: abort.signal, busy });
    if (answer.hits.length && page.generation !== answer.generation) {
      answer.stale = true; // pages of two generations do not fit together: some pictures twice, others never
    } else {
      Object.assign(answer, { total: page.total, note: page.note, generation: page.generation, took_ms: answer.took_ms ?? page.took_ms });
      if (page.facets) answer.facets = page.facets;
      answer.hits.push(...page.hits);
      answer.ended = page.hits.length < PAGE || answer.hits.length === page.total; // a threshold ends it before its total
      added = page.hits.length > 0;
    }
  } catch (error) {
    if (abort.signal.aborted) return false;
    answer.trouble = error;
  } finally {
    clearTimeout(slow);
    if (running === abort) running = null;
  }
  for (const one of document.querySelectorAll(".skeleton")) one.remove();
  $("results").removeAttribute("aria-busy");
  $("grid").append(...answer.hits.slice($("grid").children.length).map((hit, at) => tile(hit, at + $("grid").children.length)));
  setCurrent(current);
  showSummary();
  showFilters();
  seen.unobserve($("end")); // tells again whether the end can be seen
  seen.observe($("end"));
  return added;
}

/** Words and buttons in one of the two places for them. */
function say(place, words = "", actions = [], bad = false) {
  $(place).classList.toggle("bad", bad);
  $(place).replaceChildren(...words ? [element("p", words), ...actions] : []);
}

function signIn() {
  const login = element("a", "Sign in", "button");
  Object.assign(login, { href: "login", target: "_self" });
  return login;
}

function again() {
  kept.delete(shown.question);
  shown = null;
  scrollTo(0, 0);
  return render();
}

function showSummary() {
  const { hits, total, trouble, stale, ended } = shown;
  $("share").hidden = !hits.length || address().has("picture");
  if (trouble) {
    delete shown.trouble;
    const retry = () => button("Try again", () => { say("notice"); say("end"); more(); });
    const actions = trouble.signedOut ? [signIn()] : trouble.lasting ? [] : [retry()];
    $("status").textContent = hits.length ? plural(total) : "";
    const words = trouble instanceof Trouble ? trouble.message : `This page failed: ${trouble.message}.`;
    return say(hits.length ? "end" : "notice", words, actions, true);
  }
  if (total === null) return undefined;
  $("status").replaceChildren(element("b", plural(hits.length && total)), hits.length > 1 ? `, most fitting first · ${Math.max(1, Math.round(shown.took_ms))} ms` : "");
  const narrowed = optionsOf(address()).length > 0;
  if (!hits.length) {
    const clear = button("Search without filters", () => go(link(Object.fromEntries(Object.keys(OPTIONS).map((name) => [name, null])))));
    const why = shown.note ? sentence(shown.note) : narrowed ? "No picture passes these filters." : "There is no picture to show.";
    say("notice", why, narrowed ? [clear] : []);
  } else if (stale) {
    say("notice", "The index was updated while you looked.", [button("Show the new answers", again)]);
  } else if (hits[0].relevance != null && hits[0].relevance < STANDS_OUT) {
    say("notice", "No picture stands out: many fit about as well, or none does. These come closest.");
  }
  const told = hits.reduce((count, { copies }) => count + 1 + (copies?.length ?? 0), 0);
  if (ended && (told === total || !hits.length)) say("end", told > PAGE ? `That was all: ${plural(total)}.` : "");
  else if (ended && address().has("threshold")) say("end", "No other picture has this cosine.");
  else if (ended || hits.length >= REACH) say("end", `These were the ${number.format(hits.length)} that fit best. Ask more precisely to see others.`);
  return undefined;
}

function showFilters() {
  const asked = address();
  const change = (options) => go(link({ ...options, open: null }));
  $("active").replaceChildren(...active(asked, change));
  if (shown.total === null) return $("filters").replaceChildren(); // until counts are here
  if ($("filters").dataset.of === shown.question && $("filters").hasChildNodes()) return undefined; // one may be open
  $("filters").dataset.of = shown.question;
  return $("filters").replaceChildren(...menus(asked, shown.facets, about?.filters ?? [], change));
}

// ---- one picture, large ---------------------------------------------------------------------------------------------

/** Open or close the large view as the address says; a link may open one that is not loaded yet. */
async function showOpen() {
  const id = address().get("open");
  if (!id || !shown.question) return view.open && view.close();
  const find = () => shown.hits.findIndex((hit) => String(hit.id) === id);
  while (find() < 0 && shown.hits.length < LINKED_MAX && await more());
  const at = find();
  if (at >= 0 && address().get("open") === id) {
    setCurrent(at);
    view.dataset.at = at;
    showLarge(shown.hits[at], at, shown.ended ? shown.hits.length : shown.total);
    return view.open || view.showModal();
  }
  if (at < 0 && shown.hits.length) toast("The picture of this link is not among the first answers any more.");
  return view.open && view.close();
}

const openAt = () => shown.hits.findIndex((hit) => String(hit.id) === address().get("open"));

async function step(by) {
  const at = openAt() + by;
  if (at < 0 || at >= shown.hits.length && !await more()) return;
  go(link({ open: shown.hits[at].id }), { replace: true, state: history.state });
}

view.addEventListener("close", () => {
  $("grid").children[view.dataset.at]?.querySelector(".open").focus(); // not on the one it was opened from
  if (!address().has("open")) return;
  if (history.state?.opened) history.back();
  else go(link({ open: null }), { replace: true });
});
view.addEventListener("click", (event) => { if (event.target === view || event.target.closest(".close")) view.close(); });
for (const one of view.querySelectorAll(".step")) one.addEventListener("click", () => step(Number(one.dataset.step)));
$("view-key").addEventListener("click", () => copy(shown.hits[openAt()].key, "Key"));
$("view-share").addEventListener("click", () => copy(location.href, "Link"));
$("share").addEventListener("click", () => copy(location.href, "Link"));

// ---- a picture as the question --------------------------------------------------------------------------------------

function askPicture(file) {
  if (!file) return toast("That was no picture file. Save the picture first, then drop the file.");
  if (file.type && !file.type.startsWith("image/")) return toast(`${readable(file.name)} is no picture but ${file.type}.`);
  const name = String(pictures.size + 1);
  pictures.set(name, file);
  return ask({ picture: name });
}

/** The picture that is part of the question, small, in the box. */
async function showAsked(asked) {
  const [canvas, image, words] = ["canvas", "img", "span"].map((name) => $("asked").querySelector(name));
  const file = pictures.get(asked.get("picture"));
  $("asked").hidden = !asked.has("similar") && !file;
  $("q").placeholder = $("asked").hidden ? "Describe a picture" : "";
  image.hidden = !asked.has("similar");
  canvas.hidden = true;
  if (asked.has("similar")) {
    image.src = `thumb/${encodeURIComponent(asked.get("similar"))}?size=256`;
    words.textContent = "like this one";
  } else if (file) {
    words.textContent = readable(file.name);
    const bitmap = await createImageBitmap(file).catch(() => null); // HEIC and others no browser knows: the name has to do
    if (!bitmap) return;
    const edge = Math.min(bitmap.width, bitmap.height);
    canvas.getContext("2d").drawImage(bitmap, (bitmap.width - edge) / 2, (bitmap.height - edge) / 2, edge, edge, 0, 0, canvas.width, canvas.height);
    canvas.hidden = false;
  }
}

$("asked").querySelector("img").addEventListener("error", (event) => { event.target.hidden = true; }); // it has left the index
$("asked").querySelector("button").addEventListener("click", () => {
  go(link({ similar: null, picture: null, open: null }));
  $("q").focus();
});
$("file").addEventListener("change", (event) => {
  if (event.target.files.length) askPicture(event.target.files[0]);
  event.target.value = "";
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) { event.preventDefault(); askPicture(file); }
});
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => { if (carriesFiles(event)) { event.preventDefault(); $("drop").hidden = false; } });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!carriesFiles(event)) return;
  event.preventDefault();
  askPicture(event.dataTransfer.files[0]);
});

// ---- keys and clicks ------------------------------------------------------------------------------------------------

function setCurrent(at) {
  const links = (one) => one?.querySelectorAll("a[href]") ?? [];
  const tiles = $("grid").children;
  for (const one of links(tiles[current])) one.tabIndex = -1;
  current = Math.max(0, Math.min(at, shown.hits.length - 1));
  for (const one of links(tiles[current])) one.tabIndex = 0;
}

function move(key) {
  const tiles = [...$("grid").children].slice(0, shown.hits.length);
  const columns = tiles.filter((one) => one.offsetTop === tiles[0].offsetTop).length;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -current, End: tiles.length - 1 - current }[key];
  if (current + by < 0) return $("q").focus();
  if (current + by < tiles.length || key === "ArrowDown") setCurrent(current + by);
  return tiles[current].querySelector(".open").focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input");
  if (view.open) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); step(by); }
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    $("q").focus();
    $("q").select();
  } else if (event.key === "Escape") {
    closeMenus();
  } else if (/^(Arrow|Home$|End$)/.test(event.key) && event.target.closest("#grid")) {
    event.preventDefault();
    move(event.key);
  } else if (event.key === "ArrowDown" && event.target === $("q") && shown?.hits.length) {
    event.preventDefault();
    $("grid").children[current].querySelector(".open").focus();
  }
});

// Links work without this, in new tabs too; a plain click changes the address in place.
document.addEventListener("click", (event) => {
  closeMenus(event.target.closest("details"));
  const target = event.target.closest("a[href]");
  if (!target || target.target || target.origin !== location.origin || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const opened = target.classList.contains("open");
  go(target.search || "?", { state: opened ? { opened } : null });
});
$("grid").addEventListener("focusin", (event) => setCurrent([...$("grid").children].indexOf(event.target.closest("li"))));

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("q").value.trim();
  const asked = address();
  if (!text && !asked.has("picture")) return;
  if (asked.get("q") === text && shown.question) again();
  else ask({ q: text, picture: asked.get("picture") });
});

// ---- start ----------------------------------------------------------------------------------------------------------

const seen = new IntersectionObserver((entries) => {
  if (entries.at(-1).isIntersecting && shown?.hits.length && !$("end").hasChildNodes()) more();
}, { rootMargin: "900px" });

/** What this collection is. */
async function introduce() {
  try {
    about = await fetchJson("api/about");
  } catch (error) {
    const retry = error.signedOut ? signIn() : button("Try again", () => { introduced = introduce(); });
    $("about").replaceChildren(`${error.message} `, retry);
    return;
  }
  const names = about.sources.map(({ name }) => readable(name));
  const facts = [element("b", plural(about.rows))];
  if (about.published) facts.push(`, indexed ${new Date(about.published).toLocaleDateString("en-GB", { dateStyle: "long" })}`);
  const origin = names.length > SOURCES_NAMED ? `${names.length} sources` : names.join(", ");
  $("about").replaceChildren(...facts, element("small", `${origin} · model ${readable(about.model)}`));
}

/** Examples made of the labels that are there. */
async function suggest() {
  await introduced;
  if ($("examples").hasChildNodes() || !about?.facets.includes("label")) return;
  const { facets } = await fetchJson("api/search?q=a+picture&k=1&facets=label").catch(() => ({}));
  const labels = (facets?.label ?? []).map(([label]) => readable(label).replaceAll(/[-_]+/g, " ").trim());
  const short = labels.filter((label) => label && label.length <= EXAMPLE_CHARACTERS);
  const asks = short.slice(0, EXAMPLES);
  if (short.length > EXAMPLES) asks.push(`"${short[0]}" - "${short[EXAMPLES]}"`);
  $("examples").replaceChildren(...asks.map((words) => {
    const one = element("li");
    const example = element("a", "", "button");
    example.append(element("bdi", words));
    example.href = `?${new URLSearchParams({ q: words })}`;
    one.append(example);
    return one;
  }));
}

history.scrollRestoration = "manual"; // the page puts back pictures first, then the position
addEventListener("popstate", render);
introduced = introduce();
render();
seen.observe($("end"));
