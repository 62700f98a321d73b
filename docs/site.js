// Tables that scroll can be reached with the keyboard, and the table of the rules can be filtered. No network.
"use strict";

const make = (tag, properties, ...inside) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
};

const reach = () => {
  for (const place of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset math[display=block]")) {
    if (place.scrollWidth > place.clientWidth) place.setAttribute("tabindex", "0");
    else place.removeAttribute("tabindex");
  }
};
addEventListener("load", reach);
addEventListener("resize", reach);

// A list of choices for each column whose heading the place names; what a cell holds is cut at its commas.
const place = document.getElementById("filter");
if (place) {
  const table = [...document.querySelectorAll("article table")].find(
    (found) => place.compareDocumentPosition(found) & Node.DOCUMENT_POSITION_FOLLOWING,
  );
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const rows = [...table.tBodies[0].rows];
  const words = (row, column) => row.cells[column].textContent.split(",").map((word) => word.trim());
  const asked = new URLSearchParams(location.search);
  const count = make("output", {});
  const choices = place.dataset.columns.split("; ").map((name) => {
    const column = heads.indexOf(name);
    const found = [...new Set(rows.flatMap((row) => words(row, column)))].sort();
    const select = make("select", {}, make("option", { value: "" }, "any"), ...found.map((word) => make("option", {}, word)));
    if (found.includes(asked.get(name))) select.value = asked.get(name);
    place.append(make("label", {}, `${name} `, select));
    return { name, column, select };
  });
  place.append(count);
  const show = () => {
    for (const row of rows) {
      row.hidden = choices.some(({ column, select }) => select.value && !words(row, column).includes(select.value));
    }
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
    reach();
  };
  place.addEventListener("change", () => {
    const chosen = choices.filter(({ select }) => select.value).map(({ name, select }) => [name, select.value]);
    const address = new URL(location.href);
    address.search = new URLSearchParams(chosen);
    history.replaceState(null, "", address); // a choice can be sent as a link
    show();
  });
  show();
}
