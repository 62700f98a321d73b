// What the report does beyond standing there: tables that sort, curves that answer to the pointer, series that can be
// hidden, figures that can be saved. It asks nothing of the network, and the page can be read without it.
"use strict";

const make = (tag, properties, ...inside) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
};
const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, useGrouping: false });

// Tables: a button in every heading of a column. Rows without a value stay at the end.
for (const table of document.querySelectorAll("table.sorted")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const text = row.cells.length === heads.length ? row.cells[column].textContent.trim() : "";
    return Number.isNaN(parseFloat(text)) ? (text === "-" ? "" : text) : parseFloat(text);
  };
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.ariaSort === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : `${a}`.localeCompare(`${b}`));
      const rows = [...body.rows].sort((a, b) => {
        const [left, right] = [value(a, column), value(b, column)];
        if (left === "" || right === "") return (left === "") - (right === "");
        return down ? order(right, left) : order(left, right);
      });
      body.append(...rows);
    });
  });
}

// Figures: files made from the page itself, so that a page that was sent alone can save them too.
const save = (name, address) => make("a", { href: address, download: name }).click();
const standalone = (svg) => {
  const copy = svg.cloneNode(true);
  const [, , width, height] = copy.getAttribute("viewBox").split(" ");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.style.color = "#1f2328";
  return "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
};
const saveAsPng = (name, svg, scale = 3) => {
  const [, , width, height] = svg.getAttribute("viewBox").split(" ");
  const canvas = make("canvas", { width: scale * width, height: scale * height });
  const image = new Image();
  image.onload = () => {
    const context = canvas.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    save(name, canvas.toDataURL("image/png"));
  };
  image.src = standalone(svg);
};

for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg");
  const whole = svg.cloneNode(true); // as it was drawn, with its legend
  figure.querySelectorAll("a[download]").forEach((link) =>
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const name = link.getAttribute("href").split("/").pop();
      if (name.endsWith(".png")) saveAsPng(name, whole);
      else save(name, standalone(whole));
    }),
  );
  const pointer = figure.dataset.pointer ? JSON.parse(figure.dataset.pointer) : {};
  if (pointer.series) answerCurves(figure, svg, pointer);
  if (pointer.cells) answerCells(svg, pointer);
}

// What is under the pointer, in words beside it. `find` gives those and their place in the drawing, or nothing.
function follow(svg, find, left = () => {}) {
  const holder = svg.parentElement;
  const tip = make("div", { className: "tip", hidden: true });
  holder.append(tip);
  const hide = () => {
    tip.hidden = true;
    left();
  };
  const show = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const found = find(at);
    if (!found) return hide();
    const [name, ...lines] = found.words;
    tip.replaceChildren(make("strong", {}, name), ...lines.flatMap((line) => [make("br"), line]));
    tip.hidden = false;
    const corner = new DOMPoint(found.x, found.y).matrixTransform(svg.getScreenCTM());
    const box = holder.getBoundingClientRect();
    tip.style.left = `${Math.max(0, Math.min(corner.x - box.left + 10, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, corner.y - box.top - tip.offsetHeight - 10)}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
  return hide;
}

// Heat maps: the cell under the pointer.
function answerCells(svg, { rows, columns, cells, box: [left, top, width, height] }) {
  follow(svg, (at) => {
    const column = Math.floor(((at.x - left) / width) * columns.length);
    const row = Math.floor(((at.y - top) / height) * rows.length);
    const words = cells[row]?.[column];
    return words ? { words: [rows[row], `${columns[column]}: ${words}`], x: at.x, y: at.y } : null;
  });
}

// Curves: buttons in place of the drawn legend, and the point nearest to the pointer in words.
function answerCurves(figure, svg, { x, y, series, cut }) {
  const part = (name) => document.getElementById(`${figure.id}-${name}`);
  const [left, top, width] = svg.getAttribute("viewBox").split(" ");
  svg.setAttribute("viewBox", `${left} ${top} ${width} ${cut}`);
  part("legend").style.display = "none";
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  Object.entries({ r: 5, fill: "none", stroke: "currentColor", visibility: "hidden" }).forEach(([name, word]) =>
    ring.setAttribute(name, word),
  );
  svg.append(ring);

  const legend = make("div", { className: "legend", role: "group", ariaLabel: "Series; press one to hide or show it" });
  const drawn = series.map(({ name, points }, i) => {
    const line = part(`series-${i}`);
    const parts = [line];
    for (let j = 0, more; (more = part(`spread-${i}-${j}`)); j++) parts.push(more);
    const marks = [...line.querySelectorAll("use")];
    const sample = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    sample.setAttribute("aria-hidden", "true");
    const mark = line.querySelector("defs path").cloneNode();
    const reach = 1 + Math.max(...mark.getAttribute("d").match(/[\d.]+/g)); // marks are drawn around the origin
    sample.setAttribute("viewBox", `${-reach} ${-reach} ${2 * reach} ${2 * reach}`);
    mark.removeAttribute("id");
    mark.setAttribute("style", marks[0].getAttribute("style"));
    sample.append(mark);
    const button = make("button", { type: "button", ariaPressed: "true" }, sample, name);
    button.addEventListener("click", () => {
      const shown = button.ariaPressed !== "true";
      button.ariaPressed = `${shown}`;
      parts.forEach((element) => (element.style.display = shown ? "" : "none"));
      hide();
    });
    legend.append(button);
    return { name, points, button, places: marks.map((use) => [use.x.baseVal.value, use.y.baseVal.value]) };
  });
  svg.parentElement.after(legend);

  const find = (at) => {
    let best = null;
    for (const { name, points, button, places } of drawn) {
      if (button.ariaPressed !== "true") continue;
      places.forEach(([px, py], k) => {
        const away = Math.hypot(px - at.x, py - at.y);
        if (!best || away < best.away) best = { away, px, py, name, point: points[k] };
      });
    }
    if (!best) return null;
    const [place, mean, deviation] = best.point;
    const spread = deviation ? ` ± ${digits.format(deviation)}` : "";
    ring.setAttribute("cx", best.px);
    ring.setAttribute("cy", best.py);
    ring.setAttribute("visibility", "visible");
    const words = [best.name, `${y}: ${digits.format(mean)}${spread}`, `${x}: ${digits.format(place)}`];
    return { words, x: best.px, y: best.py };
  };
  const hide = follow(svg, find, () => ring.setAttribute("visibility", "hidden"));
}

addEventListener("beforeprint", () => document.querySelectorAll("details.fold").forEach((part) => (part.open = true)));
