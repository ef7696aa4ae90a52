"""The page's style sheet: light and dark, one column to three, and for paper."""

from __future__ import annotations

from .palette import DARK, LIGHT, SERIES


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


_SERIES = "".join(f".f{i}{{fill:var(--s{i})}}.l{i}{{stroke:var(--s{i})}}" for i in range(SERIES))

STYLE = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    f"@media print{{:root{{color-scheme:light;{_variables(LIGHT)}}}details,figure{{break-inside:avoid}}}}"
    f"{_SERIES}"
    """
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;margin:0 auto;
  max-width:1320px;padding:clamp(1rem,3vw,2rem);color:var(--ink);background:var(--page)}
h1{font-size:clamp(1.4rem,4vw,1.9rem);line-height:1.2;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .7rem}
h3{font-size:1rem;margin:0}
.lead{font-size:1.05rem;max-width:75ch;margin:.3rem 0 1.2rem}
.note{color:var(--soft);margin:.1rem 0 .6rem;font-size:.87rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.2rem,1fr));gap:.7rem;margin:0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.55rem .9rem .65rem}
dt{color:var(--soft);font-size:.84rem}
dd{margin:0;overflow-wrap:anywhere}
.tiles dd{font-size:1.4rem;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.25}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr));gap:1rem}
.grid>*,.wide{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.9rem 1rem;margin:0;
  min-width:0}
.wide{margin-top:1rem}
figure svg{display:block;width:100%;height:auto;font-size:13px}
svg text{fill:var(--ink)}
svg text.soft{fill:var(--soft)}
svg .grid{stroke:var(--line)}
svg .axis{stroke:var(--soft)}
svg .mark{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:5 4}
svg polyline,svg line[class^="l"]{fill:none;stroke-width:2.2}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.5rem 0 0;font-size:.87rem}
.legend svg{display:inline-block;height:14px;margin-right:.35rem;vertical-align:-2px}
details{margin-top:.6rem;font-size:.87rem}
summary{cursor:pointer;color:var(--soft)}
.scroll{overflow-x:auto}
figure .scroll{max-height:20rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th{color:var(--soft);font-weight:600;font-size:.84rem}
th,td{text-align:left;padding:.3rem .7rem .3rem 0;vertical-align:top;border-bottom:1px solid var(--line)}
td.n,th.n{white-space:nowrap;font-variant-numeric:tabular-nums;text-align:right}
td.text{overflow-wrap:anywhere;width:99%}
img{image-rendering:pixelated;width:48px;height:48px;object-fit:contain;display:block;border-radius:3px}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.6rem,1fr));gap:.9rem .6rem;padding:0;margin:0;
  list-style:none;font-size:.8rem}
.gallery b{display:block;font-weight:600}
.gallery img{width:64px;height:64px;margin-bottom:.25rem}
dl.settings{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem;margin:.5rem 0}
footer{color:var(--soft);font-size:.84rem;margin-top:2rem}
"""
)
