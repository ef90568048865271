{
document.documentElement.classList.add("js");
// A link to a part that is folded away opens it.
const openTarget = () => {
  const target = location.hash.length > 1 ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
  for (let fold = target?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  target?.scrollIntoView();
};
addEventListener("hashchange", openTarget);
openTarget();
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const body = heading.closest("table").tBodies[0];
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const key = (row) => row.cells[heading.cellIndex].dataset.v ?? row.cells[heading.cellIndex].textContent.trim();
    const sign = ascending ? 1 : -1;
    const rows = [...body.rows].sort((one, two) => {
      const a = key(one), b = key(two);
      if (a === "" || b === "") return (a === "") - (b === "");
      const difference = Number(a) - Number(b);
      return sign * (Number.isNaN(difference) ? a.localeCompare(b) : difference);
    });
    body.append(...rows);
  });
}
const dataOf = document.getElementById("head-data");
const headMaps = dataOf ? JSON.parse(dataOf.textContent) : [];
const short = (value) => value === null ? "" : Number(value.toPrecision(2)).toString();
document.querySelectorAll(".headmap").forEach((box, number) => {
  const data = headMaps[number];
  const cells = [...box.querySelectorAll("td")];
  const told = box.querySelector(".told");
  const tell = (cell) => {
    const at = cells.indexOf(cell), layer = Math.floor(at / data.heads), head = at % data.heads;
    const each = data.iterations.map((values) => values[at] === null ? "stays" : values[at] + " %");
    const parts = [`Layer ${layer}, head ${head}: ` + (cell.dataset.gone === "" ? "stays" : `pruned at ${cell.dataset.gone} %`)];
    if (each.length > 1) parts[0] += ` (by iteration: ${each.join(", ")})`;
    if (data.refused) parts.push(`refused in ${data.refused[at]} and overridden in ${data.overridden[at]} of ${each.length} iterations`);
    for (const view of data.views) if (view.values[at] !== null) parts.push(`${view.name} ${view.values[at]}`);
    told.textContent = parts.join("; ") + ".";
    for (const other of cells) { other.tabIndex = -1; other.classList.remove("at"); }
    cell.tabIndex = 0;
    cell.classList.add("at");
  };
  cells.forEach((cell, at) => {
    cell.tabIndex = at ? -1 : 0;
    cell.addEventListener("mouseenter", () => tell(cell));
    cell.addEventListener("focus", () => tell(cell));
    cell.addEventListener("keydown", (event) => {
      const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -data.heads, ArrowDown: data.heads, Home: -at, End: cells.length - 1 - at}[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const next = cells[at + step];
      if (!next) return;
      next.focus();
      tell(next); // A window without the focus sends no focus event.
    });
  });
  const before = cells.map((cell) => [cell.className, cell.textContent]);
  box.querySelector("select").addEventListener("change", (event) => {
    const view = data.views[event.target.selectedIndex - 1];
    const known = view ? view.values.filter((value) => value !== null) : [];
    const low = Math.min(...known), span = Math.max(...known) - low || 1;
    cells.forEach((cell, at) => {
      const value = view ? view.values[at] : null;
      cell.className = !view ? before[at][0] : value === null ? "" : "s" + Math.round(9 * (value - low) / span);
      cell.textContent = view ? short(value) : before[at][1];
    });
  });
});
}
