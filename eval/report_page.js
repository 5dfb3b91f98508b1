"use strict";
// Sorting by a column's value. Without this script the page has everything but the sorting.
document.documentElement.classList.add("sortable");
for (const table of document.querySelectorAll(".box table")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  const body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column];
    return column === 0 ? cell.textContent : "v" in cell.dataset ? Number(cell.dataset.v) : null;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const best = column === 0 || head.dataset.better === "lower" ? "ascending" : "descending";
      const other = best === "ascending" ? "descending" : "ascending";
      const order = now === best ? other : best;
      const sign = order === "ascending" ? 1 : -1;
      const rows = Array.from(body.rows).map((row) => [value(row, column), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null); // what has no value stays last
        return sign * (column === 0 ? a.localeCompare(b) : a - b);
      });
      body.append(...rows.map(([, row]) => row));
      heads.forEach((one) => one.setAttribute("aria-sort", one === head ? order : "none"));
    });
  });
}
