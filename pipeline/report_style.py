"""Style and script of the report page: constants, with nothing of a run in them."""

STYLE = """
:root { --ink: #1c2024; --soft: #5b6570; --line: #d9dee3; --paper: #fff; --wash: #f4f6f8; --good: #0b6b3a;
  --bad: #b3261e; --accent: #0067a5; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
main, header { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 28px; }
h1 { margin: 0 0 4px; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 10px; padding-bottom: 4px; font-size: 21px; border-bottom: 2px solid var(--line); }
h3 { margin: 24px 0 8px; font-size: 16px; overflow-wrap: anywhere; }
p { max-width: 80ch; margin: 6px 0; }
small, .soft { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 14px; }
a { color: var(--accent); }
code, pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
pre { margin: 8px 0; padding: 12px; overflow: auto; background: var(--wash); border-radius: 6px; }
.headline { margin: 10px 0; padding: 12px 16px; max-width: none; background: var(--wash); border-radius: 6px;
  border-left: 5px solid var(--line); font-size: 16px; overflow-wrap: anywhere; }
.headline span { white-space: nowrap; }
.headline.better { border-color: var(--good); }
.headline.worse { border-color: var(--bad); }
.lacking { margin-top: 14px; padding: 10px 16px; background: #fff6dd; border-left: 5px solid #d9a400;
  border-radius: 6px; overflow-wrap: anywhere; }
.alarm { margin-top: 14px; padding: 10px 16px; background: #fde8e6; border-left: 5px solid var(--bad);
  border-radius: 6px; overflow-wrap: anywhere; }
.alarm ul { margin: 4px 0; padding-left: 20px; }
td.primary::after { content: " \\2605"; color: var(--accent); }
.lacking ul { margin: 4px 0; padding-left: 20px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { color: var(--soft); border-bottom: 2px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
.facts { width: 100%; }
.facts th { width: 11em; color: var(--soft); font-weight: 400; }
.facts thead td { width: 11em; min-width: 0; }
.facts thead th { width: auto; }
.facts tbody td { overflow-wrap: anywhere; min-width: 10em; }
.results td { white-space: nowrap; vertical-align: middle; }
.results.grouped tr.first td { border-top: 2px solid var(--line); }
.results tr.overall { background: var(--wash); font-weight: 600; }
.results th.run { text-align: center; color: var(--ink); }
@media (min-width: 900px) {
  .results td:nth-child(1), .results td:nth-child(2) { position: sticky; left: 0; background: var(--paper); }
  .results td:nth-child(1) { min-width: 185px; max-width: 185px; overflow: hidden; text-overflow: ellipsis; }
  .results td:nth-child(2) { left: 185px; }
  .results tr.overall td { background: var(--wash); }
}
.results.side { font-size: 13px; }
.results.side td, .results.side th { padding-right: 8px; }
.results.side td:nth-child(1) { min-width: 150px; max-width: 150px; }
.results.side td:nth-child(2) { left: 150px; }
.results .from { border-left: 1px solid var(--line); padding-left: 8px; }
th button { padding: 0; color: inherit; background: none; border: 0; font: inherit; cursor: pointer; }
th button:hover { color: var(--accent); text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.better { color: var(--good); }
.worse { color: var(--bad); }
.headline.better, .headline.worse { color: var(--ink); }
.bar { display: block; width: 120px; height: 14px; color: var(--soft); }
.bar.better { color: var(--good); }
.bar.worse { color: var(--bad); }
.bar .zero { stroke: #aab3bb; }
.bar .span { stroke: currentColor; stroke-width: 3; }
.bar circle { fill: currentColor; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); gap: 20px 24px; }
.chart { margin: 0; min-width: 0; }
.chart figcaption { overflow-wrap: anywhere; line-height: 1.35; }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { fill: var(--soft); font-size: 12px; }
.chart path { fill: none; }
.chart .grid { stroke: var(--line); }
.chart .axis { stroke: #8a949e; }
.chart .line { stroke-width: 2; }
.chart .raw { stroke-width: 1; opacity: .3; }
.chart circle { opacity: 0; }
.chart circle:hover { opacity: 1; }
.chart .note { margin: 2px 0; color: var(--soft); font-size: 13px; line-height: 1.35; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0; padding: 0; list-style: none; font-size: 13px; }
.legend li { overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 14px; height: 4px; margin-right: 5px; vertical-align: middle; }
.switch { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; align-items: center; gap: 6px;
  padding: 8px 0; background: var(--paper); }
.switch button { padding: 3px 12px; color: var(--ink); background: var(--paper); border: 1px solid #aab3bb;
  border-radius: 14px; font: inherit; cursor: pointer; }
.switch button[aria-pressed=true] { color: #fff; background: var(--accent); border-color: var(--accent); }
.tasks { columns: 2 480px; column-gap: 32px; }
.tasks > section { break-inside: avoid; }
.tasks h3 { margin-top: 0; padding-top: 16px; }
.cells { display: grid; gap: 4px; max-width: 560px; }
.cells > * { min-width: 0; }
.cells .head { color: var(--soft); font-size: 13px; }
.cells .prompt { grid-column: 1 / -1; margin-top: 6px; overflow: hidden; font-size: 13px; text-overflow: ellipsis;
  white-space: nowrap; }
.cells img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated;
  background: repeating-conic-gradient(#b8b8b8 0 25%, #ebebeb 0 50%) 0 0 / 16px 16px; }
[data-background=black] .cells img { background: #000; }
[data-background=white] .cells img { background: #fff; }
[data-background=magenta] .cells img { background: #f0f; }
.flat { max-width: 100%; height: auto; }
.time { display: block; min-width: 2px; height: 12px; background: var(--accent); border-radius: 2px; }
td.wide { width: 34%; min-width: 120px; }
summary { margin: 8px 0; cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
footer { margin: 48px 0 28px; color: var(--soft); font-size: 13px; }
@media print { .switch, nav { display: none; } .chart, .cells { break-inside: avoid; } }
"""

SCRIPT = """
(function () {
  var root = document.documentElement, names = ["checker", "black", "white", "magenta"];
  var buttons = document.querySelectorAll(".switch button");
  function show(name) {
    root.dataset.background = name;
    buttons.forEach(function (b) { b.setAttribute("aria-pressed", String(b.dataset.set === name)); });
  }
  buttons.forEach(function (b) { b.addEventListener("click", function () { show(b.dataset.set); }); });
  var wanted = (location.hash.match(/background=([a-z]+)/) || [])[1];
  show(names.indexOf(wanted) < 0 ? names[0] : wanted);

  document.querySelectorAll("table.results").forEach(function (table) {
    var body = table.tBodies[0], original = Array.from(body.rows);
    function key(row, column) {
      var cell = row.cells[column];
      if (!cell) return null;
      if (cell.dataset.v === undefined) return cell.textContent;
      return cell.dataset.v === "" ? null : Number(cell.dataset.v);
    }
    table.querySelectorAll("th[data-column]").forEach(function (head) {
      head.querySelector("button").addEventListener("click", function () {
        var before = head.getAttribute("aria-sort"), column = Number(head.dataset.column);
        table.querySelectorAll("th[aria-sort]").forEach(function (th) { th.removeAttribute("aria-sort"); });
        var sign = before === "ascending" ? -1 : 1, rows = original.slice();
        table.classList.toggle("grouped", before === "descending");
        if (before !== "descending") {
          head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
          rows.sort(function (a, b) {
            var x = key(a, column), y = key(b, column);
            if (x === y) return 0;
            if (x === null) return 1;
            if (y === null) return -1;
            return (x < y ? -1 : 1) * sign;
          });
        }
        rows.forEach(function (row) { body.appendChild(row); });
      });
    });
  });
})();
"""
