"""Small HTML tables for the report: one file, no network, sorted by a click on a heading."""

from __future__ import annotations

import html
import math
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.benchmark.scores import REPLICATE, summarise
from dbdiffusion.figures.scores import PANELS
from dbdiffusion.figures.style import METHOD_NAMES, method_order
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import atomic_path

_STYLE = """
body { font: 14px/1.4 system-ui, "Segoe UI", Arial, sans-serif; margin: 1.5em; color: #222; }
h1 { font-size: 1.2em; margin: 0 0 .3em; }
p { max-width: 60em; margin: .3em 0 .8em; color: #444; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .6em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th { position: sticky; top: 0; background: #f4f4f4; cursor: pointer; user-select: none; }
th:focus-visible { outline: 2px solid #0072B2; }
td.number, th.number { text-align: right; }
tbody tr:hover { background: #f0f6fa; }
td.up { color: #B04A00; font-weight: 600; }
td.down { color: #0072B2; font-weight: 600; }
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
  Array.from(body.rows).forEach(row => {
    const text = row.textContent.toLowerCase().replaceAll('−', '-');
    row.hidden = !words.every(w => text.includes(w));
  });
});
"""


NOTHING = 1e-12
"""Smaller numbers are rounding errors of zero."""


def decimals(values: pd.Series) -> int | None:
    """Decimals that show three digits of most of a column's values, at most 4; None where all are whole numbers."""
    known = values.dropna().astype(float).abs()
    known = known[known > NOTHING]
    if (known % 1 == 0).all():
        return None
    return int(np.clip(2 - np.floor(np.log10(known.quantile(0.1))), 1, 4))


def _number(value: float, places: int | None) -> str:
    """A number with a column's decimals, so that points stand below each other; what would round to 0 has an exponent."""
    if places is None:
        return f"{round(value):,}" if abs(value) < 1e9 else f"{value:.2e}"
    if abs(value) >= NOTHING and (abs(value) < 0.5 * 10.0**-places or abs(value) >= 1e6):
        return f"{value:.0e}" if abs(value) < 1 else f"{value:.2e}"
    return f"{value if abs(value) >= NOTHING else 0.0:,.{places}f}".replace("-", "−")


def _cell(value: object, numeric: bool, places: int | None) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA
    if missing:
        return f'<td{" class=number" if numeric else ""} data-value="">–</td>'
    if numeric:
        return f'<td class=number data-value="{float(value)!r}">{_number(float(value), places)}</td>'
    text = html.escape(str(value))
    return f'<td data-value="{text}"{f" class={text}" if text in ("up", "down") else ""}>{text}</td>'


def write_table_page(frame: pd.DataFrame, out_html: str | Path, *, title: str, note: str = "", top: int | None = None) -> None:
    """Write the first `top` rows of `frame` (all where None) as one self-contained HTML page.

    Numeric columns are right-aligned and sort as numbers; missing values are shown as a dash and sort last. `note` stands
    under the title. Text is escaped: names from data cannot break the page.
    """
    shown = frame if top is None else frame.head(top)
    numeric = [pd.api.types.is_numeric_dtype(t) and not pd.api.types.is_bool_dtype(t) for t in shown.dtypes]
    places = [decimals(shown.iloc[:, i]) if n else None for i, n in enumerate(numeric)]
    heads = "".join(
        f"<th scope=col tabindex=0{' class=number' if n else ''}>{html.escape(str(c))}</th>"
        for c, n in zip(shown.columns, numeric, strict=True)
    )
    rows = "\n".join(
        "<tr>" + "".join(_cell(v, n, p) for v, n, p in zip(row, numeric, places, strict=True)) + "</tr>"
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
    "q_direction": "q (direction)",
    "q_selection": "q (selection)",
    "q_t": "q (t)",
    "control_mean": "control mean",
    "k_eff": "K_eff",
    "confidence": "confidence",
    "reason": "reason",
}


def deciding_q(rows: pd.DataFrame, test: str) -> pd.Series:
    """q of the test that makes the call; of the t test where that one did not judge."""
    return rows[contracts.TESTS[test]].fillna(rows["q_t"])


def top_calls(de: pd.DataFrame, method: str, test: str, per_target: int) -> pd.DataFrame:
    """The rows of `method` with the best evidence for each target: called genes first, then by q and |lfc|.

    de: contract `de`; test: that makes the calls (config inference.calls). Targets of most calls come first, then those
    of the smallest q. A target on which the method abstains keeps one row, which names the reason. Of several seeds, rows are those of the
    first, and column `seeds` says in how many the gene is called, those called in most first.
    """
    rows = de[de["method"].astype(str) == method]
    if rows.empty:
        raise UserError(f"no rows of method {method!r}", where="table de", fix=f"methods are {sorted(de['method'].astype(str).unique())}")
    rows = rows.astype({"fold": str, "target": str, "gene": str, "call": str, "reason": str})
    rows = rows.assign(
        seeds=rows["call"].isin(["up", "down"]).groupby([rows["target"], rows["gene"]]).transform("sum"),
        _abstained=(rows["call"] == "no_call").groupby(rows["target"]).transform("all"),
        _q=deciding_q(rows, test),
        _size=-rows["lfc"].abs(),
    )
    columns = DE_COLUMNS | ({"seeds": "seeds"} if rows["seed"].nunique() > 1 else {})
    rows = rows[rows["seed"] == rows["seed"].min()]
    rows = rows.sort_values(["seeds", "_q", "_size", "gene"], ascending=[False, True, True, True], kind="stable", na_position="last")
    abstained = rows["_abstained"]
    kept = pd.concat([rows[~abstained].groupby("target").head(per_target), rows[abstained].groupby("target").head(1)])
    tested = rows["_q"].where(rows["call"] != "no_call").fillna(np.inf)
    called, best = (rows["seeds"] > 0).groupby(rows["target"]).sum(), tested.groupby(rows["target"]).min()
    order = sorted(called.index, key=lambda t: (-int(called[t]), float(best[t]), t))
    kept = kept.assign(_place=kept["target"].map({t: i for i, t in enumerate(order)})).sort_values("_place", kind="stable")
    return kept[list(columns)].rename(columns=columns).reset_index(drop=True)


def calls_in_words(de: pd.DataFrame, method: str, test: str, q: float) -> str:
    """How many genes `method` calls at q by a test; where none, how small its q gets and how many are within twice the q."""
    rows = de[de["method"].astype(str) == method].astype({"target": str, "gene": str, "call": str})

    def counted(kept: pd.Series) -> tuple[int, int]:
        """Genes of targets, and targets, each once however many seeds there are."""
        pairs = rows.loc[kept, ["target", "gene"]].drop_duplicates()
        return len(pairs), pairs["target"].nunique()

    called = rows["call"].isin(["up", "down"])
    if called.any():
        genes, targets = counted(called)
        return f"{genes:,} calls in {targets:,} of {rows['target'].nunique():,} targets."
    found = deciding_q(rows, test).where(rows["call"] == "none")
    if found.isna().all():
        return "No target could be tested."
    text = f"No gene is called: the smallest q is {found.min():.1%}."
    return text if 2 * q >= 1 else f"{text} {counted(found <= 2 * q)[0]:,} have a q of at most {2 * q:g}."


SCORE_COLUMNS = {
    "metric": "metric",
    "genes": "genes",
    "method": "method",
    "debiased": "debiased",
    "n": "targets",
    "mean": "mean",
    "low": "low",
    "high": "high",
    "ceiling": "replicate",
    "difference": "difference",
    "difference_low": "difference low",
    "difference_high": "difference high",
}


def score_summary(scores: pd.DataFrame) -> pd.DataFrame:
    """`summarise` of contract `scores` with the page's headings: one row per metric, gene selection, method and debiasing.

    Metrics of the figure come first; within one, all genes before the largest, and methods in the order of the figure.
    """
    out = summarise(scores)
    metrics = list(dict.fromkeys([*(metric for metric, _ in PANELS), *sorted(out["metric"])]))
    methods = [*method_order([m for m in out["method"] if m != REPLICATE]), REPLICATE]
    places = {
        "_metric": out["metric"].map(metrics.index),
        "_genes": out["genes"].map(lambda g: int(g) if g.isdigit() else -1),
        "_method": out["method"].map(methods.index),
    }
    out = out.assign(**places).sort_values([*places, "debiased"], ascending=[True, True, True, False], kind="stable")
    out["method"] = out["method"].map(lambda m: METHOD_NAMES.get(m, m))
    out["debiased"] = out["debiased"].map({True: "yes", False: "no"})
    return out[list(SCORE_COLUMNS)].rename(columns=SCORE_COLUMNS).reset_index(drop=True)


def write_de_page(
    *,
    de: str | Path,
    out_html: str | Path,
    method: str = "dbdiffusion",
    test: str = "direction",
    per_target: int = 30,
    q: float = 0.1,
    most: int = 6000,
) -> None:
    """The report's table of calls by a test: the `per_target` best genes of each target (contract `de`), fewer if the page would pass
    `most` rows."""
    table = contracts.DE.read(de)
    per_target = max(1, min(per_target, most // max(1, table["target"].nunique())))
    note = (
        f"Differential expression of each target against control, predicted by {METHOD_NAMES.get(method, method)}; the {per_target} genes "
        f"with the best evidence per target. lfc: change of mean ln(1 + CP10k), with its interval; calls by the test {test} "
        f"at a nominal FDR of {q:g}; the full table is tables/de.parquet. {calls_in_words(table, method, test, q)}"
    )
    if (seeds := table["seed"].nunique()) > 1:
        note += f" Of {seeds} seeds the first one is shown; seeds: in how many of them the gene is called."
    write_table_page(top_calls(table, method, test, per_target), out_html, title="Calls per target", note=note)


def write_score_page(*, scores: str | Path, out_html: str | Path) -> None:
    """The report's table of mean scores (contract `scores`) with 95 % bootstrap intervals over targets."""
    note = (
        "Mean over held-out targets against their half-B cells with its 95 % bootstrap interval (low, high) over targets. "
        "replicate: half A as a predictor of half B, on the same targets; difference: paired difference to predicting the "
        "training mean, with its interval; genes: all, or those of largest effect in half A."
    )
    write_table_page(score_summary(contracts.SCORES.read(scores)), out_html, title="Scores", note=note)
