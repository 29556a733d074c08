// Tables sort by a click on a title, and keep the rows that hold every word of the search.
for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    title.querySelector("button").addEventListener("click", () => {
      const down = title.getAttribute("aria-sort") === "ascending";
      titles.forEach((other) => other.setAttribute("aria-sort", "none"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[column];
        return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent;
      };
      const body = table.tBodies[0];
      [...body.rows]
        .sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          const both = typeof x === "number" && typeof y === "number";
          // A cell without a number stays below, whichever way the column is sorted.
          if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
          const order = both ? x - y : x.localeCompare(y, undefined, { numeric: true });
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
