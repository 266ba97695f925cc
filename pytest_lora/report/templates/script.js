"use strict";
for (const button of document.querySelectorAll("[data-fold]")) {
  button.addEventListener("click", () => {
    for (const rule of document.querySelectorAll("details.rule")) rule.open = button.dataset.fold === "open";
  });
}

function reveal() {
  // The browser itself knows how to read the address.
  const target = document.querySelector("details:target");
  if (target) target.open = true;
}
addEventListener("hashchange", reveal);
reveal();

let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details.rule:not([open])")];
  for (const rule of unfolded) rule.open = true;
});
addEventListener("afterprint", () => {
  for (const rule of unfolded) rule.open = false;
});

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[Math.min(column, row.cells.length - 1)];
        return cell.dataset.v ?? cell.textContent.trim();
      };
      const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
      const numeric = rows.every(([text]) => text === "" || !isNaN(text));
      rows.sort(([a], [b]) => (numeric ? Number(a || -1) - Number(b || -1) : a.localeCompare(b, "en", { numeric: true })));
      if (down) rows.reverse();
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

function unpacked(runs) {
  return runs.flatMap(([value, count]) => Array(count).fill(value));
}

for (const map of document.querySelectorAll(".map")) {
  const data = JSON.parse(map.querySelector("script").textContent);
  const planes = {};
  for (const name of ["states", "ranks", "scalings", "gradients", "updates"]) planes[name] = unpacked(data[name]);
  const readout = map.querySelector(".readout");
  for (const scroll of map.querySelectorAll(".scroll[data-stack]")) {
    const stack = scroll.dataset.stack;
    const rows = data.rows.map((row, index) => [row, index]).filter(([row]) => row.split(".").slice(0, -1).join(".") === stack);
    const modules = [...scroll.querySelectorAll(".module:not(.axis)")].map((one) => data.columns.indexOf(one.textContent));
    const cells = [...scroll.querySelectorAll(".grid i")];
    let at = -1;
    const show = (next) => {
      if (next < 0 || next >= cells.length) return;
      if (at >= 0) cells[at].classList.remove("at");
      at = next;
      cells[at].classList.add("at");
      const [row, index] = rows[at % rows.length];
      const column = modules[Math.floor(at / rows.length)];
      const place = index * data.columns.length + column;
      const words = [row ? `${row}.${data.columns[column]}` : data.columns[column], data.words[planes.states[place]] ?? "no such module"];
      for (const [name, plane] of [["rank", "ranks"], ["scaling", "scalings"], ["gradient", "gradients"], ["update", "updates"]]) {
        const value = planes[plane][place];
        if (value !== undefined && value !== null) words.push(`${name} ${value}`);
      }
      readout.textContent = words.join(" · ");
    };
    const leave = () => {
      if (at >= 0) cells[at].classList.remove("at");
      at = -1;
      readout.textContent = "";
    };
    scroll.addEventListener("pointermove", (event) => {
      const next = cells.indexOf(event.target);
      if (next >= 0 && next !== at) show(next);
    });
    scroll.addEventListener("pointerleave", leave);
    scroll.addEventListener("blur", leave);
    scroll.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: rows.length, ArrowUp: -rows.length }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      show(at < 0 ? 0 : at + step);
    });
  }
}
