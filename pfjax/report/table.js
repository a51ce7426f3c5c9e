"use strict";
// Tables that a click on a column's head sorts: falling first, then rising, then as given.

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const given = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const next = { descending: "ascending", ascending: null }[head.ariaSort] ?? null;
      const order = head.ariaSort ? next : "descending";
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      body.append(...(order ? sorted(given, column, order) : given));
    });
  });
}

function sorted(rows, column, order) {
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // unknown comes last
    const difference = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    return order === "ascending" ? difference : -difference;
  };
  return [...rows].sort((a, b) => compare(value(a), value(b)));
}
