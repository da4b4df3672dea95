"""How a page looks: colours and shapes of the models, fonts, light and dark."""

SERIES = 8  # colours and shapes before they come again
SHAPES = {  # matplotlib's name of a marker: the same shape in a box of 12 by 12
    "o": '<circle cx="6" cy="6" r="4.6"/>',
    "s": '<rect x="1.8" y="1.8" width="8.4" height="8.4"/>',
    "D": '<path d="M6 .6 11.4 6 6 11.4 .6 6Z"/>',
    "^": '<path d="M6 1 11 10.4H1Z"/>',
    "v": '<path d="M6 11 11 1.6H1Z"/>',
    "P": '<path d="M4 1h4v3h3v4H8v3H4V8H1V4h3Z"/>',
    "X": '<path d="M3 1 6 4l3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3-3-3Z"/>',
    "*": '<path d="m6 .5 1.5 3.6 4 .4-3 2.6.9 3.9L6 9l-3.4 2 .9-3.9-3-2.6 4-.4Z"/>',
}
_LIGHT = {
    "surface": "#ffffff",
    "page": "#f6f6f4",
    "ink": "#1a1a18",
    "muted": "#62625c",
    "grid": "#dededa",
    "series": "#2a78d6 #e0602c #149a6c #b07d00 #d14b82 #3f7d1f #5a48c4 #c93a3a",
}
_DARK = {
    "surface": "#1d1d1b",
    "page": "#141413",
    "ink": "#f0efea",
    "muted": "#a5a49c",
    "grid": "#3a3a36",
    "series": "#6aa9f4 #f28b5f #3cc996 #e2b23c #f08bb5 #8cc56a #a79bf5 #f27d7c",
}


def swatch(index: int) -> str:
    """The mark of a model, as the plots draw it."""
    shape = list(SHAPES.values())[index % SERIES]
    return f'<svg class="swatch" viewBox="0 0 12 12" fill="var(--series-{index % SERIES})">{shape}</svg>'


def _variables(theme: dict[str, str]) -> str:
    series = {f"series-{i}": color for i, color in enumerate(theme["series"].split())}
    plain = {name: value for name, value in theme.items() if name != "series"}
    return "".join(f"--{name}:{value};" for name, value in (plain | series).items())


CSS = (
    f"""
:root {{ {_variables(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; letter-spacing: -.01em; }
.subtitle { margin: 6px 0 28px; color: var(--muted); }
.table { overflow-x: auto; background: var(--surface); border: 1px solid var(--grid); border-radius: 10px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; text-align: right; white-space: nowrap; vertical-align: top; }
th { color: var(--muted); font-weight: 500; font-size: 12.5px; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tbody tr { border-top: 1px solid var(--grid); }
td small { display: block; color: var(--muted); font-size: 11.5px; }
.swatch { width: 12px; height: 12px; margin-right: 9px; vertical-align: -1px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 8px; font-size: 12.5px; color: var(--muted); }
.legend .swatch { width: 10px; height: 10px; margin-right: 6px; }
.figures { display: grid; gap: 20px; margin-top: 20px;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
figure { margin: 0; padding: 16px 18px 12px; background: var(--surface);
  border: 1px solid var(--grid); border-radius: 10px; }
figcaption { margin-bottom: 6px; }
figcaption b { display: block; font-weight: 600; }
figcaption span { color: var(--muted); font-size: 13px; }
figure > svg { display: block; width: 100%; height: auto; }
footer { margin-top: 24px; color: var(--muted); font-size: 13px; max-width: 80ch; }
footer p { margin: 0 0 8px; }
"""
)
