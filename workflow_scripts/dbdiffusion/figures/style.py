"""One look for all figures: sizes, fonts, colours, labels, and how files are saved.

Figures are made without pyplot and without a display. The same inputs give the same bytes: no dates in the files, no
wall-clock limit in the placement of labels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dbdiffusion.runtime.files import atomic_path

logger = logging.getLogger(__name__)

COLUMN = 89.0
"""Width of one journal column, mm."""
PAGE = 183.0
"""Width of two journal columns, mm."""
DPI = 300

# Okabe and Ito's palette, told apart with every common colour vision deficiency.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY, LIGHT, DARK, OLIVE = "#8C8C8C", "#D4D4D4", "#4D4D4D", "#999933"

OBSERVED, PREDICTED, CONTROL, NEIGHBOUR = VERMILLION, BLUE, LIGHT, ORANGE
CALL_COLOURS = {"up": VERMILLION, "down": BLUE, "none": GREY, "no_call": LIGHT}
CALL_NAMES = {"up": "called up", "down": "called down", "none": "not called", "no_call": "abstained"}

OURS = {"stacked": VERMILLION, "dbdiffusion": BLUE}
"""The project's own predictors; every other method is a baseline or a peer."""
METHOD_NAMES = {
    "stacked": "stacked",
    "dbdiffusion": "dbDiffusion",
    "control": "control (no change)",
    "training_mean": "training mean",
    "neighbour_mean": "neighbour mean",
    "knn": "k nearest neighbours",
    "ridge": "ridge",
    "linear": "linear (G K P)",
    "additive": "additive",
    "permuted": "permuted embedding",
}

LFC = "ln(1 + CP10k)"
"""Unit of expression; changes are differences in it."""

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.0,
    "axes.titlesize": 7.0,
    "axes.labelsize": 7.0,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.4,
    "legend.borderaxespad": 0.2,
    "legend.labelspacing": 0.3,
    "legend.columnspacing": 1.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 4.0,
    "axes.labelpad": 2.5,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.0,
    "patch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.facecolor": "white",
    "path.simplify": True,
    "axes.unicode_minus": True,
}

RASTER_FROM = 3000
"""More points than this are drawn as an image inside the PDF, so that it opens quickly."""


class Sheet:
    """A figure being drawn: `fig` is matplotlib's figure, `label` queues point labels that are placed last."""

    def __init__(self, width: float, height: float) -> None:
        """A figure of width x height mm with constrained layout."""
        self.fig = Figure(figsize=(width / 25.4, height / 25.4), layout="constrained")
        self.canvas = FigureCanvasAgg(self.fig)
        self.fig.get_layout_engine().set(w_pad=3 / 72, h_pad=3 / 72, wspace=0.03, hspace=0.04)
        self._queue: list[tuple[Axes, list[Text], np.ndarray, np.ndarray, list[Text]]] = []

    def label(
        self,
        ax: Axes,
        x: np.ndarray,
        y: np.ndarray,
        names: Sequence[str],
        *,
        avoid: tuple[np.ndarray, np.ndarray] | None = None,
        around: Sequence[Text] = (),
        **text: object,
    ) -> None:
        """Name points of `ax`. The labels are moved apart, and joined to their points by a hair line, when the sheet is saved.

        x, y: (n,) data coordinates; names: n strings; avoid: (x, y) of the points that labels should not cover (the named ones
        where None); around: texts that they should not cover.
        """
        style = {"fontsize": 6.0, "color": DARK, **text}
        texts = [ax.text(float(a), float(b), str(t), clip_on=False, zorder=6, **style) for a, b, t in zip(x, y, names, strict=True)]
        over = avoid if avoid is not None else (x, y)
        if texts:
            # Labels must not take part in the layout: they move afterwards, inside the axes.
            for text_artist in texts:
                text_artist.set_in_layout(False)
                text_artist.set_path_effects(outline())
            self._queue.append((ax, texts, np.asarray(over[0], dtype=float), np.asarray(over[1], dtype=float), list(around)))

    def _place_labels(self) -> None:
        from adjustText import adjust_text

        for ax, texts, x, y, around in self._queue:
            named = np.array([text.get_position() for text in texts])
            fixed = [np.column_stack([x, y]), _halo(ax, named), *(_lattice(ax, text) for text in around)]
            adjust_text(
                texts,
                *np.concatenate(fixed).T,
                ax=ax,
                iter_lim=100,
                expand=(1.06, 1.2),
                force_text=(0.4, 0.5),
                force_static=(0.1, 0.15),
                min_arrow_len=3,
                arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.35, "shrinkA": 0, "shrinkB": 1},
            )

    def save(self, png: str | Path, pdf: str | Path) -> None:
        """Place the labels and write both files. Text that leaves the page is reported in the log."""
        # The layout is settled once, and kept: labels are placed in it, and it is not worked out again for every file.
        self.fig.draw_without_rendering()
        self.fig.set_layout_engine("none")
        self._place_labels()
        cut = cut_texts(self.fig)
        if cut:
            logger.warning("%s: text leaves the page: %s", png, cut[:5])
        for path, metadata in ((png, {"Software": None}), (pdf, {"CreationDate": None})):
            with atomic_path(path) as temporary:
                self.fig.savefig(temporary, metadata=metadata)


def _halo(ax: Axes, points: np.ndarray, radius: float = 1.8) -> np.ndarray:
    """Points (4 n, 2) in data coordinates around points (n, 2), `radius` typographic points away: a marker's outline as an obstacle."""
    angle = (np.arange(4) + 0.5) * np.pi / 2
    ring = radius * ax.figure.dpi / 72 * np.column_stack([np.cos(angle), np.sin(angle)])
    return ax.transData.inverted().transform((ax.transData.transform(points)[:, None] + ring).reshape(-1, 2))


def _lattice(ax: Axes, text: Text, step: float = 12.0) -> np.ndarray:
    """Points (n, 2) in data coordinates that fill the box of a text: obstacles for labels."""
    frame = text.get_bbox_patch()
    box = frame.get_window_extent() if frame is not None else text.get_window_extent()
    x, y = (np.linspace(a, b, max(2, int((b - a) / step) + 1)) for a, b in ((box.x0, box.x1), (box.y0, box.y1)))
    return ax.transData.inverted().transform(np.column_stack([g.ravel() for g in np.meshgrid(x, y)]))


def cut_texts(fig: Figure, tolerance: float = 1.0) -> list[str]:
    """Visible texts that reach out of the page by more than `tolerance` pixels."""
    width, height = fig.bbox.width, fig.bbox.height
    found = []
    for text in fig.findobj(Text):
        clipped = text.get_clip_on() and text.get_clip_box() is not None
        if not text.get_visible() or not text.get_text().strip() or clipped:
            continue
        box = text.get_window_extent()
        if box.x0 < -tolerance or box.y0 < -tolerance or box.x1 > width + tolerance or box.y1 > height + tolerance:
            found.append(text.get_text())
    # Tick labels outside the axes' limits exist as texts but are not drawn.
    drawn = {t.get_text() for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for t in _hidden_ticks(axis)}
    return [t for t in found if t not in drawn]


def _hidden_ticks(axis: mpl.axis.Axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() + axis.get_minor_ticks() if not low <= tick.get_loc() <= high]


@contextmanager
def sheet(width: float, height: float, *, png: str | Path, pdf: str | Path) -> Iterator[Sheet]:
    """A sheet of width x height mm in the common style; written to `png` and `pdf` when the block ends."""
    with mpl.rc_context({**mpl.rcParamsDefault, **STYLE, "backend": "agg"}):
        page = Sheet(width, height)
        yield page
        page.save(png, pdf)


def outline() -> list[AbstractPathEffect]:
    """A white outline that keeps text readable over points."""
    return [withStroke(linewidth=1.2, foreground="white")]


def panel_letter(ax: Axes, letter: str) -> None:
    """A bold panel letter at the top left, beside the first line of the axes' title."""
    above = ax.get_title(loc="left").count("\n") * 1.2 * mpl.rcParams["axes.titlesize"]
    ax.annotate(
        letter,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(-3, 4 + above),
        textcoords="offset points",
        ha="right",
        va="baseline",
        fontsize=8.5,
        fontweight="bold",
    )


def letter_panels(axes: Sequence[Axes]) -> None:
    """Letters a, b, c, ... when there are several panels."""
    if len(axes) > 1:
        for i, ax in enumerate(axes):
            panel_letter(ax, "abcdefghijklmnopqrstuvwxyz"[i % 26])


def empty(ax: Axes, text: str) -> None:
    """Axes without data: say why, and take the frame away."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=DARK, fontsize=7, wrap=True)


def bare_map(ax: Axes, name: str = "UMAP") -> None:
    """Map axes: no ticks and no common scale (the coordinates have no unit), short axis names."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.margins(x=0.09, y=0.07)  # Room for the names of outermost points.
    ax.set_xlabel(f"{name} 1")
    ax.set_ylabel(f"{name} 2")


def method_name(method: str) -> str:
    """The method as it is written in figures."""
    return METHOD_NAMES.get(method, method.replace("_", " "))


def method_colour(method: str, *, others: str = GREY) -> str:
    """Ours in colour, baselines and peers in grey."""
    return OURS.get(method, others)


def method_order(methods: Sequence[str]) -> list[str]:
    """Ours first, then the baselines in the order of METHOD_NAMES, then anything else by name."""
    known = list(METHOD_NAMES)
    return sorted({str(m) for m in methods}, key=lambda m: (known.index(m) if m in known else len(known), m))


ERROR_LOOKS = {
    "t": (BLUE, "o"),
    "conformal": (GREEN, "s"),
    "direction": (OLIVE, ">"),
    "selection": (PURPLE, "D"),
    "cells_only": (ORANGE, "^"),
    "conservative": (VERMILLION, "v"),
    "ppi_z": (DARK, "X"),
    "selection_target": (SKY, "P"),
    "prediction_error": (BLACK, "h"),
    "replicate": (BLACK, "_"),
}
"""Colour and marker of each error model and test, the same in all figures."""
ERROR_NAMES = {
    "t": "t",
    "conformal": "conformal",
    "direction": "direction",
    "selection": "conformal selection",
    "cells_only": "cells only (published)",
    "conservative": "conservative (published)",
    "ppi_z": "z (as in ppi_py)",
    "selection_target": "conformal selection per target",
    "prediction_error": "t, error of the prediction",
    "replicate": "replicate (half A on half B)",
}

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")


def group_style(groups: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each group: seven colours, and another marker after every seventh group."""
    colours = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, DARK)
    return {g: (colours[i % len(colours)], MARKERS[(i // len(colours)) % len(MARKERS)]) for i, g in enumerate(groups)}


def error_looks(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colours and markers of error models, tests and predictors, in the order in which legends list them."""
    order = [*ERROR_LOOKS, *METHOD_NAMES]
    names = sorted({str(m) for m in methods}, key=lambda m: (order.index(m) if m in order else len(order), m))
    others = [n for n in names if n not in ERROR_LOOKS]
    looks = group_style(others) if len(others) == len(names) else {n: (SKY, MARKERS[6 + i % 4]) for i, n in enumerate(others)}
    looks |= {n: (OURS[n], looks[n][1]) for n in others if n in OURS and len(others) == len(names)}
    return {n: ERROR_LOOKS.get(n) or looks[n] for n in names}


def error_name(method: str) -> str:
    """An error model's, a test's or a predictor's name as it is written in figures."""
    return ERROR_NAMES.get(method, method_name(method))


def log_ticks(axis: mpl.axis.Axis) -> None:
    """Plain numbers (1k for 1000) at 1, 2 and 5 times powers of ten on a log axis, at powers of ten alone where it spans many."""
    low, high = axis.get_view_interval()
    wide = high > 0 and low > 0 and np.log10(high / low) > 2.2
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}" if value < 1000 else f"{value / 1000:.10g}k"))
    axis.set_minor_formatter(NullFormatter())


def natural_order(names: Sequence[str]) -> list[str]:
    """Unique names, numbers in numeric order ('2' before '10')."""
    return sorted({str(n) for n in names}, key=lambda n: (0, int(n), "") if n.isdigit() else (1, 0, n))


def short(name: str, width: int = 18) -> str:
    """A long name, cut with an ellipsis."""
    return name if len(name) <= width else name[: width - 1] + "…"


def as_many_as_fit(fig: Figure, start: str, names: Sequence[str], width: float, fontsize: float) -> str:
    """`start` and as many of the names, parted by commas, as `width` mm hold; the first one is cut where it is too long by itself.

    An ellipsis says that names were left out.
    """

    def fits(text: str) -> bool:
        artist = fig.text(0, 0, text, fontsize=fontsize)
        reach = artist.get_window_extent().width
        artist.remove()
        return reach <= width / 25.4 * fig.dpi

    for n in range(len(names), 0, -1):
        text = start + ", ".join(names[:n]) + ("" if n == len(names) else ", …")
        if fits(text):
            return text
    first = names[0] if names else ""
    return next((t for t in (start + short(first, n) for n in range(len(first) - (len(names) > 1), 1, -1)) if fits(t)), start)


def count(n: int, noun: str, plural: str | None = None) -> str:
    """'1 gene', '1,200 genes'."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def grid(n: int, columns: int) -> tuple[int, int]:
    """Rows and columns that hold n panels, at most `columns` wide."""
    columns = max(1, min(n, columns))
    return -(-max(n, 1) // columns), columns


def spread(n: int, cap: int) -> np.ndarray:
    """At most `cap` of n positions, evenly spaced, the first and the last among them."""
    return np.arange(n) if n <= cap else np.unique(np.linspace(0, n - 1, cap).round().astype(int))
