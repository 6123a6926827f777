"""Small HTML tables for the report: one file, no network, sorted by a click on a heading."""

from __future__ import annotations

import html
import math
from pathlib import Path

import pandas as pd

from dbdiffusion.benchmark.scores import summarise
from dbdiffusion.figures.style import METHOD_NAMES
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import atomic_path

_STYLE = """
body { font: 14px/1.4 system-ui, "Segoe UI", Arial, sans-serif; margin: 1.5em; color: #222; }
h1 { font-size: 1.2em; margin: 0 0 .3em; }
p { max-width: 60em; margin: .3em 0 .8em; color: #444; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th { position: sticky; top: 0; background: #f4f4f4; cursor: pointer; user-select: none; }
th:focus-visible { outline: 2px solid #0072B2; }
td.number, th.number { text-align: right; }
tbody tr:hover { background: #f0f6fa; }
th[aria-sort=ascending]::after { content: " \\25B2"; }
th[aria-sort=descending]::after { content: " \\25BC"; }
input { font: inherit; padding: .2em .5em; margin-bottom: .6em; width: 18em; }
"""

_SCRIPT = """
const table = document.querySelector('table'), body = table.tBodies[0];
function sortBy(head) {
  const column = head.cellIndex, down = head.getAttribute('aria-sort') === 'ascending';
  table.querySelectorAll('th').forEach(h => h.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const key = row => row.cells[column].dataset.value;
  const number = head.classList.contains('number');
  const rows = Array.from(body.rows).sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === '' || y === '') return (x === '') - (y === '');
    const order = number ? Number(x) - Number(y) : x.localeCompare(y);
    return down ? -order : order;
  });
  rows.forEach(row => body.appendChild(row));
}
table.querySelectorAll('th').forEach(head => {
  head.addEventListener('click', () => sortBy(head));
  head.addEventListener('keydown', event => { if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); sortBy(head); } });
});
const box = document.querySelector('input');
box.addEventListener('input', () => {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  Array.from(body.rows).forEach(row => { const text = row.textContent.toLowerCase(); row.hidden = !words.every(w => text.includes(w)); });
});
"""


def _number(value: float) -> str:
    """A number with three significant digits; very small and very large ones with an exponent."""
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _cell(value: object, numeric: bool) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA
    if missing:
        return f'<td{" class=number" if numeric else ""} data-value="">–</td>'
    if numeric:
        return f'<td class=number data-value="{float(value)!r}">{_number(float(value))}</td>'
    text = html.escape(str(value))
    return f'<td data-value="{text}">{text}</td>'


def write_table_page(frame: pd.DataFrame, out_html: str | Path, *, title: str, note: str = "", top: int | None = None) -> None:
    """Write the first `top` rows of `frame` (all where None) as one self-contained HTML page.

    Numeric columns are right-aligned and sort as numbers; missing values are shown as a dash and sort last. `note` stands
    under the title. Text is escaped: names from data cannot break the page.
    """
    shown = frame if top is None else frame.head(top)
    numeric = [pd.api.types.is_numeric_dtype(t) and not pd.api.types.is_bool_dtype(t) for t in shown.dtypes]
    heads = "".join(
        f"<th scope=col tabindex=0{' class=number' if n else ''}>{html.escape(str(c))}</th>"
        for c, n in zip(shown.columns, numeric, strict=True)
    )
    rows = "\n".join(
        "<tr>" + "".join(_cell(v, n) for v, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    count = f"{len(shown):,} of {len(frame):,} rows. " if len(shown) < len(frame) else f"{len(frame):,} rows. "
    page = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(note)} {count}Click a heading to sort.</p>
<input type="search" placeholder="filter rows" aria-label="filter rows">
<table><thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody></table>
<script>{_SCRIPT}</script>
</body></html>
"""
    with atomic_path(out_html) as temporary:
        temporary.write_text(page, encoding="utf-8")


DE_COLUMNS = {
    "target": "target",
    "gene": "gene",
    "call": "call",
    "lfc": "lfc",
    "ci_low": "low",
    "ci_high": "high",
    "q_selection": "q (selection)",
    "q_t": "q (t)",
    "control_mean": "control mean",
    "k_eff": "K_eff",
    "confidence": "confidence",
    "reason": "reason",
}


def top_calls(de: pd.DataFrame, method: str, per_target: int) -> pd.DataFrame:
    """The rows of `method` with the best evidence for each target: called genes first, then by q and |lfc|.

    de: contract `de`. A target on which the method abstains keeps one row, which names the reason.
    """
    rows = de[de["method"].astype(str) == method]
    if rows.empty:
        raise UserError(f"no rows of method {method!r}", where="table de", fix=f"methods are {sorted(de['method'].astype(str).unique())}")
    rows = rows.astype({"fold": str, "target": str, "gene": str, "call": str, "reason": str})
    rows = rows.assign(
        _called=~rows["call"].isin(["up", "down"]),
        _q=rows["q_selection"].fillna(rows["q_t"]),
        _size=-rows["lfc"].abs(),
    ).sort_values(["target", "seed", "fold", "_called", "_q", "_size", "gene"], kind="stable", na_position="last")
    abstained = (rows["call"] == "no_call").groupby(rows["target"]).transform("all")
    kept = pd.concat([rows[~abstained].groupby("target").head(per_target), rows[abstained].groupby("target").head(1)])
    kept = kept.sort_values("target", kind="stable")
    return kept[list(DE_COLUMNS)].rename(columns=DE_COLUMNS).reset_index(drop=True)


SCORE_COLUMNS = {
    "metric": "metric",
    "genes": "genes",
    "method": "method",
    "debiased": "debiased",
    "n": "targets",
    "mean": "mean",
    "low": "low",
    "high": "high",
    "ceiling": "replicate ceiling",
    "difference": "minus training mean",
    "difference_low": "low (difference)",
    "difference_high": "high (difference)",
}


def score_summary(scores: pd.DataFrame) -> pd.DataFrame:
    """`summarise` of contract `scores` with the page's headings: one row per metric, gene selection, method and debiasing."""
    out = summarise(scores)
    out["method"] = out["method"].map(lambda m: METHOD_NAMES.get(m, m))
    out["debiased"] = out["debiased"].map({True: "yes", False: "no"})
    out = out.sort_values(["metric", "genes"], kind="stable")
    return out[list(SCORE_COLUMNS)].rename(columns=SCORE_COLUMNS).reset_index(drop=True)


def write_de_page(
    *, de: str | Path, out_html: str | Path, method: str = "dbdiffusion", per_target: int = 30, q: float = 0.1, most: int = 6000
) -> None:
    """The report's table of calls: the `per_target` best genes of each target (contract `de`), fewer if the page would pass `most` rows."""
    table = contracts.DE.read(de)
    per_target = max(1, min(per_target, most // max(1, table["target"].nunique())))
    note = (
        f"Differential expression of each target against control, predicted by {METHOD_NAMES.get(method, method)}; the {per_target} genes "
        f"with the best evidence per target. lfc: change of mean ln(1 + CP10k), with its interval; calls at a nominal FDR of {q:g}; "
        "the full table is tables/de.parquet."
    )
    write_table_page(top_calls(table, method, per_target), out_html, title="Calls per target", note=note)


def write_score_page(*, scores: str | Path, out_html: str | Path) -> None:
    """The report's table of mean scores (contract `scores`) with 95 % bootstrap intervals over targets."""
    note = (
        "Mean over held-out targets against their half-B cells with its 95 % bootstrap interval over targets. replicate ceiling: half A "
        "as a predictor of half B; minus training mean: paired difference to predicting the training mean; genes: all, "
        "or those of largest effect in half A."
    )
    write_table_page(score_summary(contracts.SCORES.read(scores)), out_html, title="Scores", note=note)
