"""The style sheet of the report: dark text on white, one accent colour, readable on a phone and on paper."""

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --quiet: #667085; --line: #e4e7ec; --track: #f0f2f5; --accent: #2f6db5; --light: #b7d0ec; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { margin: .25rem 0; }
.headline { font-size: 1.15rem; }
.quiet { color: var(--quiet); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th { text-align: left; font-weight: 600; font-size: .8125rem; color: var(--quiet); }
th, td { padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: middle; }
tfoot td { border-bottom: 0; border-top: 2px solid var(--line); }
td { font-variant-numeric: tabular-nums; }
.cell { display: flex; align-items: center; gap: .6rem; }
.bar { display: block; width: 9rem; flex: none; }
.track { fill: var(--track); } .fill { fill: var(--accent); } .light { fill: var(--light); }
.rate { fill: #7fb0e6; } .base { fill: #b5bcc8; }
.whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; } .tick { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 2; }
.yes { color: #17693a; } .no { color: #b42318; font-weight: 600; }
figure { margin: 1.25rem 0 0; }
figcaption { margin-bottom: .35rem; }
.strip { min-width: 40rem; }
.strip img { width: 100%; display: block; image-rendering: auto; border-radius: 3px; }
.labels { display: flex; color: var(--quiet); font-size: .8125rem; } .labels span { flex: 1; text-align: center; }
pre { background: var(--track); padding: .75rem 1rem; border-radius: 4px; overflow-x: auto; font-size: .875rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; font-size: .9375rem; }
dt { color: var(--quiet); } dd { margin: 0; }
@media (max-width: 40rem) { .bar { width: 4.5rem; } th, td { padding-right: .6rem; } table { font-size: .875rem; } }
@media print { figure, tr { break-inside: avoid; } }
"""
