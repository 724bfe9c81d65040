"use strict";
// Sorting: a click on a heading orders the variants by that column; what has no value stays last.
for (const table of document.querySelectorAll("table.variants")) {
  const headings = [...table.querySelectorAll("th[data-column]")];
  for (const heading of headings) {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (body) => {
        const value = body.rows[0].cells[Number(heading.dataset.column)].dataset.sort;
        return value === undefined || value === "" ? NaN : Number(value);
      };
      const bodies = [...table.tBodies].map((body) => [key(body), body]);
      bodies.sort(([a], [b]) => {
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
        return down ? b - a : a - b;
      });
      table.append(...bodies.map(([, body]) => body));
    });
  }
}
// One picture at a time, by concurrency; without this script all of them are shown.
const choice = document.querySelector(".choice");
if (choice) {
  const show = () => {
    const chosen = choice.querySelector("input:checked").value;
    for (const figure of document.querySelectorAll("figure.tradeoff")) {
      figure.hidden = figure.dataset.concurrency !== chosen;
    }
  };
  choice.hidden = false;
  choice.addEventListener("change", show);
  show();
}
// A narrow screen shows the right part of the picture first: that is where the points are.
for (const view of document.querySelectorAll(".tradeoff .scroll")) view.scrollLeft = view.scrollWidth;
// Exact values beside the mark that is pointed at or has the focus.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true");
document.body.append(tip);
const reveal = (event) => {
  const mark = event.target.closest?.(".mark");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.getAttribute("aria-label");
  const box = mark.getBoundingClientRect();
  const left = Math.min(box.right + 10, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  tip.style.top = `${(above > 4 ? above : box.bottom + 8) + scrollY}px`;
};
for (const type of ["pointerover", "focusin"]) document.addEventListener(type, reveal);
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
// A table as a CSV file: numbers as the ledger has them, in a column of their own their errors.
const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
const said = (cell) => {
  const copy = cell.cloneNode(true);
  for (const part of copy.querySelectorAll(".detail, .permalink, svg")) part.remove();
  const text = copy.textContent.trim();
  return text === "–" ? "" : text;
};
const csv = (table) => {
  const heads = [];
  for (const row of table.tHead.rows) {
    let at = 0;
    for (const cell of row.cells) {
      for (let end = at + cell.colSpan; at < end; at++) heads[at] = `${heads[at] ?? ""} ${said(cell)}`.trim();
    }
  }
  const bodies = [...table.tBodies].flatMap((body) => [...body.rows]);
  const rows = bodies.filter((row) => row.cells.length === heads.length);
  const erring = heads.map((_, at) => rows.some((row) => row.cells[at].dataset.error !== undefined));
  const wide = (values, errors) => values.flatMap((value, at) => (erring[at] ? [value, errors[at]] : [value]));
  const lines = [wide(heads, heads.map((head) => `${head}, standard error`))];
  for (const row of rows) {
    const cells = [...row.cells];
    lines.push(wide(cells.map((c) => c.dataset.sort ?? said(c)), cells.map((c) => c.dataset.error ?? "")));
  }
  return lines.map((line) => line.map(quoted).join(",") + "\r\n").join("");
};
for (const region of document.querySelectorAll(".scroll")) {
  const table = region.querySelector("table");
  if (!table || table.className === "picks") continue;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "csv";
  button.textContent = "CSV";
  button.setAttribute("aria-label", `Download as CSV: ${region.getAttribute("aria-label")}`);
  button.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(table)], { type: "text/csv" }));
    link.download = `${region.getAttribute("aria-label").toLowerCase().replace(/[^a-z0-9]+/g, "-")}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  region.after(button);
}
// A link to a row that is folded away unfolds it.
const unfold = () => {
  const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const folded = row?.closest("details:not([open])");
  if (!folded) return;
  folded.open = true;
  row.scrollIntoView({ block: "center" });
};
addEventListener("hashchange", unfold);
unfold();
// While the run goes on, the page keeps up with it, for as long as the reader wants that.
const reload = document.getElementById("reload");
if (reload) setInterval(() => { if (reload.checked) location.reload(); }, 10000);
