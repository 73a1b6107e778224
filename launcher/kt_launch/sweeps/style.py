"""The report page's style sheet: light and dark, desktop and phone. Colours keep 4.5:1 against their background."""

LIGHT = ("#0b63c4", "#b93a09", "#0d7257", "#8436a0", "#855800", "#475569", "#b3154f", "#0c6a80")
DARK = ("#79b8ff", "#ff9f70", "#56d4ad", "#d8a3f2", "#e7bd55", "#aebccf", "#ff94c4", "#68d3ea")


def _series(colours: tuple[str, ...]) -> str:
    return "".join(f"--s{number}:{colour};" for number, colour in enumerate(colours))


def _classes() -> str:
    return "".join(
        f".m.s{number}{{fill:var(--s{number})}}.line.s{number}{{stroke:var(--s{number})}}"
        f"rect.f{number}{{fill:var(--s{number})}}i.f{number}{{background:var(--s{number})}}"
        for number in range(len(LIGHT))
    )


STYLE = f"""
:root{{--ink:#16202c;--soft:#556170;--line:#dde3ea;--page:#f6f8fa;--card:#fff;--bad:#a61b1b;--badline:#e7b4b4;{_series(LIGHT)}}}
@media(prefers-color-scheme:dark){{:root{{--ink:#e8edf3;--soft:#9fb0c2;--line:#2c3a49;--page:#10171f;--card:#18222d;
--bad:#ff9d9d;--badline:#6b3434;{_series(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}}
main{{max-width:1180px;margin:0 auto;padding:32px 24px 48px}}
h1{{font-size:1.7rem;line-height:1.2;margin:0 0 8px;overflow-wrap:anywhere}}
h2{{font-size:1.1rem;margin:0 0 12px}}
section{{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px;margin-top:20px}}
.facts{{margin:0;color:var(--soft);display:flex;flex-wrap:wrap;gap:2px 18px}}
.note{{color:var(--soft);font-size:.875rem;margin:14px 0 0;max-width:75ch}}
.failed{{border-color:var(--badline)}}.failed h2{{color:var(--bad)}}
.failed ul{{margin:0;padding-left:1.2em}}.failed li{{overflow-wrap:anywhere}}.failed li+li{{margin-top:8px}}
table{{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}}
th,td{{text-align:right;padding:8px 10px;border-bottom:1px solid var(--line);vertical-align:top}}
thead th{{color:var(--soft);font-weight:600;font-size:.8rem;vertical-align:bottom}}
th:first-child,th:nth-child(2),td:nth-child(2),th:last-child,td:last-child{{text-align:left}}
tbody th{{font-weight:600;overflow-wrap:anywhere;min-width:25ch}}
tbody td:not(:last-child){{white-space:nowrap}}
td:last-child{{overflow-wrap:anywhere;max-width:26ch}}td:nth-child(2){{overflow-wrap:anywhere}}
tbody tr:last-child>*{{border-bottom:0}}
.bad td:last-child{{color:var(--bad)}}
.legend{{list-style:none;margin:0 0 10px;padding:0;display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.9rem}}
.legend li{{display:flex;align-items:center;gap:7px;overflow-wrap:anywhere}}
.legend.small{{font-size:.8rem;margin:8px 0 0;color:var(--soft)}}
.legend i{{width:12px;height:12px;border-radius:2px;flex:none}}
.key{{width:16px;height:16px;flex:none}}
.grid{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:28px 32px}}
figure{{margin:0;min-width:0}}
figcaption{{font-weight:600;margin-bottom:6px}}
.plot{{display:block;width:100%;max-width:520px;height:auto}}
.plot text{{fill:var(--soft);font-size:11.5px;font-family:inherit;font-variant-numeric:tabular-nums}}
.plot .name{{fill:var(--ink);font-size:12px}}
.middle{{text-anchor:middle}}.end{{text-anchor:end}}
.grid line,.plot .grid{{stroke:var(--line);stroke-width:1}}
.plot .axis{{stroke:var(--soft);stroke-width:1}}
.line{{fill:none;stroke-width:2;stroke-linejoin:round}}
.halo{{paint-order:stroke;stroke:var(--card);stroke-width:3px}}
.m{{stroke:var(--card);stroke-width:1.2}}
.none{{color:var(--soft)}}
details summary{{cursor:pointer;font-weight:600}}
details li{{margin-top:10px}}
code{{font:.85em/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}}
{_classes()}
@media(max-width:760px){{
main{{padding:20px 14px 36px}}section{{padding:16px}}h1{{font-size:1.4rem}}
table,tbody,tr{{display:block}}thead{{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}}
tbody tr{{padding:12px 0;border-bottom:1px solid var(--line)}}tbody tr:first-child{{padding-top:0}}
tbody tr:last-child{{border-bottom:0;padding-bottom:0}}
tbody td:not(:last-child){{white-space:normal}}
tbody th{{display:block;min-width:0;border:0;padding:0 0 4px;font-size:1rem;text-align:left}}
tbody td{{display:flex;justify-content:space-between;gap:16px;border:0;padding:3px 0;max-width:none!important;
text-align:right!important}}
tbody td::before{{content:attr(data-name);color:var(--soft);flex:none}}
}}
@media print{{body{{background:#fff}}section{{break-inside:avoid}}}}
"""
