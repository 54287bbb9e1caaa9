"""What stands around the content of a report's HTML page: style (dark and light, for paper too) and a script that sorts
tables. TITLE and CONTENT are put in by `page`."""

FRAME = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>TITLE</title>
<link rel="icon" href="data:,">
<style>
:root { --ink: #1b1f24; --paper: #ffffff; --soft: #f3f5f7; --line: #d5dae0; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #15181c; --soft: #1f242a; --line: #3a424c; --mark: #7cc4f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.2rem 4rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; padding-top: 1rem; border-top: 1px solid var(--line); }
code { background: var(--soft); padding: 0 .25em; border-radius: 3px; }
img { display: block; max-width: 100%; margin: .5rem 0; background: #ffffff; border: 1px solid var(--line);
  border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort=ascending] button::after { content: " \2191"; color: var(--mark); }
th[aria-sort=descending] button::after { content: " \2193"; color: var(--mark); }
tbody tr:hover { background: var(--soft); }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; color: #000000; background: #ffffff; }
  h2, img, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
}
</style>
</head>
<body>
CONTENT
<script>
// Tables sort by any column: numbers as numbers, by what a cell starts with; without a script they are plain tables.
const value = (row, column) => row.cells[column]?.textContent.trim() ?? "";
const number = (text) => (/^[+-]?[\d.]+/.test(text) ? parseFloat(text) : NaN);
for (const table of document.querySelectorAll("table")) {
  const frame = document.createElement("div");
  frame.className = "scroll";
  table.replaceWith(frame);
  frame.append(table);
  const body = table.tBodies[0];
  if (!body) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const rows = [...body.rows];
    const told = rows.map((row) => value(row, column)).filter((text) => text && text !== "-");
    const numeric = told.length > 0 && told.every((text) => !Number.isNaN(number(text)));
    if (numeric) [head, ...rows.map((row) => row.cells[column])].forEach((cell) => cell?.classList.add("number"));
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending" || (numeric && !head.hasAttribute("aria-sort"));
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => (numeric ? number(value(row, column)) : value(row, column));
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (numeric && (Number.isNaN(x) || Number.isNaN(y))) return Number.isNaN(x) - Number.isNaN(y); // last
        return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
</script>
</body>
</html>
"""
