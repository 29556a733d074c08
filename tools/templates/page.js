"use strict";
// Tables sort by a click on a title, and keep the rows that hold every word of the search.
const UNITS = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30,
  TiB: 2 ** 40, ns: 1e-9, "µs": 1e-6, ms: 1e-3 };
const amount = (cell) => {
  const found = cell.textContent.match(/^([-+]?[\d.]+(?:e[-+]?\d+)?)(?: ([kMGTµnm]i?[sB]?))?/);
  return found ? Number(found[1]) * (UNITS[found[2]] ?? 1) : null;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    title.querySelector("button").addEventListener("click", () => {
      const down = title.getAttribute("aria-sort") === "ascending";
      titles.forEach((other) => other.setAttribute("aria-sort", "none"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = title.classList.contains("t");
      const body = table.tBodies[0];
      [...body.rows]
        .sort((a, b) => {
          const [one, other] = [a.cells[column], b.cells[column]];
          const [x, y] = text ? [null, null] : [amount(one), amount(other)];
          // A cell without a number stays below, whichever way the column is sorted.
          if (!text && (x === null) !== (y === null)) return x === null ? 1 : -1;
          const order = x === null
            ? one.textContent.localeCompare(other.textContent, undefined, { numeric: true })
            : x - y;
          return down ? -order : order;
        })
        .forEach((row) => body.append(row));
    });
  });
}
for (const field of document.querySelectorAll("input[type=search]")) {
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of field.parentElement.querySelectorAll("tbody tr")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}

// The legend of a chart switches its lines, and the point nearest to the pointer says its values.
// With the keyboard: the chart takes the focus, and the arrow keys go from point to point.
const SVG = "http://www.w3.org/2000/svg";
for (const figure of document.querySelectorAll("figure.plot")) {
  const [svg, said] = [figure.querySelector(".scroll svg"), figure.querySelector(".value")];
  const [keys, key] = [[...figure.querySelectorAll("button.key")], svg.id];
  const { panels, lines } = JSON.parse(figure.querySelector("script").textContent);
  const ring = svg.appendChild(document.createElementNS(SVG, "circle"));
  ring.setAttribute("class", "ring");
  ring.setAttribute("r", 8);
  let at = -1;
  const on = (i) => keys[i].getAttribute("aria-pressed") === "true";
  const points = () =>
    lines.flatMap((line, i) => (on(i) ? line.map((point) => [i, ...point]) : []));
  const show = (point) => {
    ring.classList.toggle("seen", Boolean(point));
    if (!point) return;
    const [line, x, y, panel, where, value] = point;
    ring.setAttribute("cx", x);
    ring.setAttribute("cy", y);
    said.textContent = `${keys[line].textContent.trim()} · ${panels[panel]}, ${where}: ${value}`;
  };
  const turn = (i, pressed) => {
    keys[i].setAttribute("aria-pressed", pressed);
    for (const part of svg.querySelectorAll(`[id^="${key}-l${i}-"]`))
      part.classList.toggle("off", !pressed);
    at = -1;
    show(null);
  };
  keys.forEach((button, i) => button.addEventListener("click", () => turn(i, !on(i))));
  figure.querySelector("button.all").addEventListener("click", () => {
    const every = keys.every((_, i) => on(i));
    keys.forEach((_, i) => turn(i, !every));
  });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const far = ([, px, py]) => Math.hypot(px - x, py - y);
    const near = points().reduce((a, b) => (a && far(a) <= far(b) ? a : b), null);
    show(near && far(near) < 30 ? near : null);
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const shown = points();
    if (!step || !shown.length) return;
    event.preventDefault();
    at = (at + step + shown.length) % shown.length;
    show(shown[at]);
  });
  svg.addEventListener("focus", () => show(points()[(at = Math.max(at, 0))]));
  svg.addEventListener("blur", () => show(null));
  figure.classList.add("live");
}
