"""Pictures of a record: time over T, speed-up over dense attention, share of each branch. Needs matplotlib."""

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nsa_compile.bench.report import Record, Row, speedups

PASSES = ("forward", "forward+backward")
COLORS = {
    "nsa": "#0b3c8c", "decode": "#0b3c8c", "compress": "#8c6bb1", "compressed": "#1f78b4", "choice": "#f0a30a",
    "selected, random": "#c8321e", "selected, rho 0.8": "#f08a7d", "window": "#2a9d5c", "gated_sum": "#7f7f7f",
}  # fmt: skip
OTHERS = {
    "SDPA flash": "#5e3c99", "SDPA cuDNN": "#e66101", "SDPA efficient": "#c51b7d", "SDPA math": "#666666",
    "flash-attn 4": "#1b9e77", "flash-attn 2": "#a6761d", "flex_attention": "#111111",
}  # fmt: skip
SHARES = ("compress", "compressed", "choice", "selected, random", "window", "gated_sum")
"""Parts of the whole: on random inputs its selection is like random blocks."""
STYLE: Any = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e3e3e3", "grid.linewidth": 0.8, "legend.frameon": False, "legend.fontsize": 9,
    "figure.constrained_layout.use": True, "savefig.dpi": 150, "figure.facecolor": "white",
}  # fmt: skip


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_record(record: Record, folder: Path) -> list[Path]:
    """Write the pictures of every type and number of heads into the folder; returns their paths.

    Raises ValueError without matplotlib.
    """
    if not can_plot():
        raise ValueError("plot: expected matplotlib, which pip install 'nsa-compile[bench]' brings, got none")
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        rows = [row for row in record["rows"] if row["status"] == "ok"]
        for dtype, heads in dict.fromkeys((row["dtype"], row["heads"]) for row in rows):
            mine = [row for row in rows if (row["dtype"], row["heads"]) == (dtype, heads)]
            first = mine[0]
            about = (
                f"{record['device']}, {record['date'][:10]}: {dtype}, batch {first['batch']}, {heads} heads in "
                f"{first['groups']} groups of {first['d_k']} + {first['d_v']} channels"
            )
            for name, draw in (("time", draw_times), ("speedup", draw_speedups), ("share", draw_shares)):
                figure = draw(mine)
                if figure is not None:
                    figure.suptitle(about, fontsize=9.5, color="#555555", x=0.01, ha="left")
                    written.append(folder / f"{name}-{dtype}-{heads}-heads.png")
                    figure.savefig(written[-1])
    return written


def new_figure(panels: int, width: float = 7.4, height: float = 3.7) -> tuple[Any, list[Any]]:
    """A figure of panels, two beside each other, and its axes."""
    from matplotlib.figure import Figure

    columns = min(2, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * lines + 0.3))
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for spare in axes[panels:]:
        spare.set_axis_off()
    return figure, list(axes[:panels])


def lines_of(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """Rows by (case, implementation), each by T."""
    rows = list(rows)
    for name in dict.fromkeys((row["what"], row["impl"]) for row in rows):
        yield name, sorted((r for r in rows if (r["what"], r["impl"]) == name), key=lambda row: row["tokens"])


def token_axis(axis: Any, rows: list[Row]) -> None:
    """T, doubling per step, labelled where there are points."""
    lengths = sorted({row["tokens"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in lengths])
    axis.minorticks_off()
    axis.margins(x=0.08)
    if len(lengths) == 1:
        axis.set_xlim(lengths[0] / 2, lengths[0] * 2)
    axis.set_xlabel("T (tokens)")


def ratio_axis(axis: Any, low: float | None = None, high: float | None = None) -> None:
    """A logarithmic y with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylim(low, high)


def legend(axis: Any) -> None:
    """Beside the axes, where it covers nothing, in the order in which the lines end."""
    handles, labels = axis.get_legend_handles_labels()
    ends = sorted(range(len(handles)), key=lambda i: -float(handles[i].get_ydata()[-1]))
    axis.legend([handles[i] for i in ends], [labels[i] for i in ends], loc="center left", bbox_to_anchor=(1.01, 0.5))


def draw_lines(axis: Any, rows: list[Row], value: Callable[[Row], float], spread: bool) -> None:
    """A line for each case and implementation, ours strong, with the interquartile range around it."""
    for (what, impl), points in lines_of(rows):
        x, y = [row["tokens"] for row in points], [value(row) for row in points]
        ours = points[0]["ours"]
        whole = what in ("nsa", "decode")
        color = COLORS.get(what, "#333333") if ours else OTHERS[impl]
        label = what if ours and impl == "auto" else f"{what}, {impl}"
        dashes = "-" if ours and impl == "auto" else "-." if ours else "--"
        axis.plot(x, y, dashes, color=color, label=label, marker="o", markersize=4, linewidth=2.6 if whole else 1.6)
        if spread:
            low, high = ([row[quartile] for row in points] for quartile in ("q1_ms", "q3_ms"))
            axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def draw_times(rows: list[Row]) -> Any:
    """Time over T: the whole beside dense attention, its branches, a decode step."""
    panels = []
    for title, kinds in (("Whole attention", ("nsa", "dense")), ("Branches", tuple(set(COLORS) - {"nsa", "decode"}))):
        for name in PASSES:
            chosen = [row for row in rows if row["what"] in kinds and row["pass"] == name]
            panels.append((f"{title}, {name.replace('+', ' + ')}", chosen))
    decode = [row for row in rows if row["what"] in ("decode", "dense decode")]
    panels = [panel for panel in [*panels, ("One layer's attention of a decode step", decode)] if panel[1]]
    if not panels:
        return None
    figure, axes = new_figure(len(panels))
    for axis, (title, chosen) in zip(axes, panels, strict=True):
        draw_lines(axis, chosen, lambda row: row["ms"], spread=True)
        axis.set_title(title)
        ratio_axis(axis)
        axis.set_ylabel("ms per layer" if "decode" in title else "ms")
        token_axis(axis, chosen)
        if "decode" in title:
            axis.set_xlabel("tokens in the cache")
        legend(axis)
    return figure


def shown_impl(rows: list[Row], what: str) -> str | None:
    """The implementation of ours that a picture is of: "auto", else the first that was asked for; None if none ran."""
    timed = [row["impl"] for row in rows if row["what"] == what]
    return "auto" if "auto" in timed else next(iter(timed), None)


def by(impl: str | None) -> str:
    """An implementation in a title, where it is not the usual one."""
    return "" if impl in ("auto", None) else f" by {impl}"


def draw_speedups(rows: list[Row]) -> Any:
    """How many times as fast as each dense attention the whole is, and a decode step."""
    panels = []
    for what, dense, title in (("nsa", "dense", "Whole attention"), ("decode", "dense decode", "A decode step")):
        impl = shown_impl(rows, what)
        title += by(impl)
        for name in PASSES:
            gained = [
                other | {"gain": gain}
                for mine, other, gain in speedups(rows, what, dense)
                if mine["impl"] == impl and mine["pass"] == name
            ]
            if gained:
                panels.append((title if what == "decode" else f"{title}, {name.replace('+', ' + ')}", gained))
    if not panels:
        return None
    figure, axes = new_figure(len(panels))
    for axis, (title, gained) in zip(axes, panels, strict=True):
        for (_, impl), points in lines_of(gained):
            x, y = [row["tokens"] for row in points], [row["gain"] for row in points]
            axis.plot(x, y, color=OTHERS[impl], label=f"over {impl}", marker="o", markersize=5, linewidth=2.2)
        for at in {row["tokens"] for row in gained}:
            least = min(row["gain"] for row in gained if row["tokens"] == at)
            axis.annotate(
                f"{least:.3g}×", (at, least), (0, -14), textcoords="offset points", ha="center", fontsize=9,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )  # fmt: skip
        axis.axhline(1.0, color="#333333", linewidth=1.0)
        axis.set_title(title)
        axis.set_ylabel("times as fast as dense")
        ratio_axis(axis, min(row["gain"] for row in gained) / 1.7, 1.4 * max(1.0, *(row["gain"] for row in gained)))
        token_axis(axis, gained)
        legend(axis)
    return figure


def draw_shares(rows: list[Row]) -> Any:
    """What each branch takes, timed alone, as a share of the whole."""
    panels, impl = [], shown_impl(rows, "nsa")
    for name in PASSES:
        bars = []
        for whole in sorted((r for r in rows if (r["what"], r["impl"]) == ("nsa", impl)), key=lambda r: r["tokens"]):
            parts = {
                row["what"]: row["ms"] / whole["ms"] for row in rows
                if row["impl"] == impl and row["tokens"] == whole["tokens"] and row["what"] in SHARES
                and row["pass"] == (name if row["what"] != "choice" else "forward")
            }  # fmt: skip
            if whole["pass"] == name and parts:
                bars.append((whole, parts))
        if bars:
            panels.append((name, bars))
    if not panels:
        return None
    figure, axes = new_figure(len(panels), height=1.5 + 0.55 * max(len(bars) for _, bars in panels))
    for axis, (name, bars) in zip(axes, panels, strict=True):
        labels = [f"T {whole['tokens']:,}\n{whole['ms']:.3g} ms" for whole, _ in bars]
        left = [0.0] * len(bars)
        for what in SHARES:
            width = [100 * parts.get(what, 0.0) for _, parts in bars]
            axis.barh(labels, width, left=left, color=COLORS[what], label=what, height=0.62, edgecolor="white")
            for y, (a, b) in enumerate(zip(left, width, strict=True)):
                if b >= 6:
                    axis.text(a + b / 2, y, f"{b:.0f}", ha="center", va="center", color="white", fontsize=8.5)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axis.axvline(100, color="#333333", linewidth=1.0)
        axis.invert_yaxis()
        axis.set_title(f"Branches{by(impl)} timed alone, {name.replace('+', ' + ')}")
        axis.set_xlabel("% of nsa_attention's time")
        axis.grid(False, axis="y")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SHARES), handlelength=1.2)
    return figure
