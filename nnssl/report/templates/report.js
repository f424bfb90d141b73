"use strict";

// Switch between the contours of the methods; number 0 is the reference, which is always shown.
for (const radio of document.querySelectorAll("input[name=shown]")) {
  radio.addEventListener("change", () => {
    for (const element of document.querySelectorAll("[data-mask]")) {
      const mask = element.getAttribute("data-mask");
      element.toggleAttribute("hidden", mask !== "0" && mask !== radio.value);
    }
  });
}
// Browsers keep the choice of a page that is loaded again.
const chosen = document.querySelector("input[name=shown]:checked");
if (chosen) chosen.dispatchEvent(new Event("change"));

// Sort by a column: numbers where cells have a value, else text. Empty values come last.
function key(row, column) {
  const cell = row.cells[column];
  if (!cell.hasAttribute("data-value")) return cell.textContent;
  const value = cell.getAttribute("data-value");
  return value === "" ? null : Number(value);
}

function compare(a, b) {
  return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const keyed = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
      const empty = keyed.filter(([value]) => value === null);
      const rows = keyed.filter(([value]) => value !== null).sort(([a], [b]) => direction * compare(a, b));
      table.tBodies[0].append(...rows.concat(empty).map(([, row]) => row));
    });
  });
}
