// What narrows an answer: menus of values with counts, and the filters that are in force.

import { FACETS, OPTIONS, optionsOf } from "./service.js";
import { button, copyOf, element, icon, number, readable } from "./words.js";

const FIND_FROM = 10; // shorter lists need no box to find a value in

/** A button for each option in the address that takes it away; `change` hears of it. */
export const active = (asked, change) => optionsOf(asked).map(([name, value]) => {
  const one = element("li");
  const off = button("", () => change({ [name]: null }));
  const words = element("bdi", `${OPTIONS[name]}: ${name === "group" ? "as one" : readable(value)}`);
  off.setAttribute("aria-label", `Without the filter ${words.textContent}`);
  off.append(words, icon("cross"));
  one.append(off);
  return one;
});

/** A menu for each facet that still offers a choice, and one for what has to be written, of the filters there are. */
export const menus = (asked, facets, filters, change) => [
  ...Object.keys(FACETS).filter((name) => !asked.has(name) && facets[name]?.length > 1).map((name) => menu(name, facets[name], change)),
  written(asked, filters, change),
];

function written(asked, filters, change) {
  const one = copyOf("written");
  const form = one.querySelector("form");
  for (const input of form.querySelectorAll("input")) {
    const label = input.closest("label");
    if (input.type === "checkbox") {
      input.checked = asked.get(input.name) === input.value;
      continue;
    }
    label.hidden = input.disabled = !filters.includes(label.dataset.filter);
    input.value = asked.get(input.name) ?? "";
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    change({ group: null, ...Object.fromEntries([...new FormData(form)].map(([name, value]) => [name, value.trim()])) });
  });
  return one;
}

function menu(name, counts, change) {
  const one = copyOf("filter");
  const [summary, find, list, none] = ["summary", "input", "ul", "p"].map((selector) => one.querySelector(selector));
  summary.textContent = FACETS[name];
  find.hidden = counts.length < FIND_FROM;
  find.placeholder = `Find a ${FACETS[name].toLowerCase()}`;
  find.setAttribute("aria-label", find.placeholder);
  const fill = () => {
    const wanted = find.value.trim().toLowerCase();
    const fitting = counts.filter(([value]) => String(value).toLowerCase().includes(wanted));
    none.hidden = fitting.length > 0;
    none.textContent = "None of the most frequent ones. Enter asks for it all the same.";
    list.replaceChildren(...fitting.map(([value, count]) => {
      const item = element("li");
      const pick = button("", () => change({ [name]: value }));
      pick.append(element("bdi", readable(value)), element("span", number.format(count)));
      item.append(pick);
      return item;
    }));
    return fitting;
  };
  fill();
  find.addEventListener("input", fill);
  find.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && find.value.trim()) change({ [name]: fill()[0]?.[0] ?? find.value.trim() });
  });
  return one;
}

export function closeMenus(except = null) {
  for (const one of document.querySelectorAll("details[open]")) {
    if (one === except) continue;
    if (one.contains(document.activeElement)) one.querySelector("summary").focus();
    one.open = false;
  }
}
