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
