"""What a run leaves: a record as JSON and CSV, tables, what got slower since another record, and thresholds."""

import csv
import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nsa_compile.bench.options import FIXED, Options
from nsa_compile.storage import check_folder, naming

Row = dict[str, Any]
Record = dict[str, Any]

RECORD_FILE = "bench.json"
FORMAT = 1
KEY = ("what", "impl", "pass", "tokens", "heads", "dtype", *FIXED)
"""What makes two rows of different records the same."""
PACKAGES = ("triton", "flash-attn-4", "flash-attn", "matplotlib")
NOISE = 0.05
"""Share of a median below which a difference is never called one."""


def make_record(options: dict[str, Any], rows: list[Row], version: str, commit: str | None = None) -> Record:
    """The rows with everything needed to read them later; `commit` for a copy of the sources without git."""
    device = torch.device(options["device"])
    cuda = device.type == "cuda"
    found, dirty = git_state()
    return {
        "format": FORMAT,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "device": device_name(device),
        "threads": None if cuda else torch.get_num_threads(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {
            "nsa_compile": version, "torch": torch.__version__, "python": platform.python_version(),
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if cuda else None,
            **{name: package_version(name) for name in PACKAGES},
        },
        "commit": commit or found,
        "dirty": None if commit else dirty,
        "options": options,
        "rows": rows,
    }  # fmt: skip


def package_version(name: str) -> str | None:
    """The version of an installed package, None if it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The GPU, or the processor as Linux names it or else as Python does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the checkout that tracks these sources, and whether tracked files differ; None where there is none."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]  # status would write the index
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def prepare_folder(folder: Path) -> None:
    """Make a folder to write to. Raises ValueError where it holds a record, OSError where it cannot be made."""
    check_folder("out", folder)
    if (folder / RECORD_FILE).exists():
        raise ValueError(f"out: expected a folder without a {RECORD_FILE}, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # before the hours that a run may take
        pass


def write_record(record: Record, folder: Path) -> tuple[Path, Path]:
    """Write bench.json and bench.csv into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = folder / RECORD_FILE, folder / "bench.csv"
    with naming(as_json):
        as_json.write_text(json.dumps(finite(record), indent=1) + "\n")
    names = list(dict.fromkeys(name for row in record["rows"] for name in row))
    with naming(as_csv), as_csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(record["rows"])
    return as_json, as_csv


def finite(value: Any) -> Any:
    """The same with None for infinities and NaN, which JSON has not."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(path: Path) -> Record:
    """A record that `write_record` left. Raises ValueError for any other file."""
    try:
        record = json.loads(path.read_text())
        of_another_format = record["format"] != FORMAT
        record["device"] + record["date"] + (record["commit"] or "")
        timed = [(row["ms"], row["iqr_ms"]) for row in record["rows"] if row["status"] == "ok"]
        whole = all(ms > 0 and iqr >= 0 for ms, iqr in timed) and all("ours" in row for row in record["rows"])
        hash(tuple(map(key, record["rows"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"compare: expected a {RECORD_FILE}, got {path}: {type(error).__name__}: {error}") from error
    if of_another_format or not whole:
        raise ValueError(f"compare: expected a {RECORD_FILE} of format {FORMAT}, whole, got {path}")
    return record


def check_comparable(old: Record, device: str, options: Options) -> None:
    """Raise ValueError unless the record is of the same device and has some of the sizes."""
    if old["device"] != device:
        raise ValueError(f"compare: expected a record of {device}, got one of {old['device']}")
    wanted = {"dtype": options.dtypes, "tokens": options.tokens, "heads": options.heads}
    rows = old["rows"]
    for name, values in (wanted | {name: (getattr(options, name),) for name in FIXED}).items():
        measured = {row[name] for row in rows}
        rows = [row for row in rows if row[name] in values]
        if not rows:
            expected, got = (", ".join(sorted(map(str, x))) for x in (values, measured))
            raise ValueError(f"compare: expected a record of {name} {expected}, got one of {got}")


def key(row: Row) -> tuple:
    """What a row measures."""
    return tuple(row[name] for name in KEY)


def noise(*rows: Row) -> float:
    """Share of the median that the times of these rows may differ by and mean nothing."""
    return max(NOISE, 3 * math.hypot(*(row["iqr_ms"] / row["ms"] for row in rows)))


def compare(old: Record, new: Record) -> list[Row]:
    """One row for each case of either record, with `change` "slower", "faster", "same", "broken", "new" or "missing".

    "slower" and "faster" are beyond `noise`; "broken" was right before and is not now.
    """
    before, after = ({key(row): row for row in record["rows"]} for record in (old, new))
    found = []
    for name in before | after:
        a, b = before.get(name), after.get(name)
        was, works = (x is not None and x["status"] == "ok" for x in (a, b))
        row = dict(zip(KEY, name, strict=True)) | {"ours": (a or b or {})["ours"]}
        row |= {"old_ms": a["ms"] if a and was else None, "new_ms": b["ms"] if b and works else None}
        if a is None or b is None:
            change = "new" if a is None else "missing"
        elif was and works:
            row["ratio"], row["noise"] = b["ms"] / a["ms"], noise(a, b)
            change = (
                "slower"
                if row["ratio"] > 1 + row["noise"]
                else "faster"
                if row["ratio"] * (1 + row["noise"]) < 1
                else "same"
            )
        elif was:
            change = "broken"
        else:
            change = "same" if not works else "new"
        found.append(row | {"change": change})
    return found


def say_comparison(console: Console, old: Record, changes: list[Row]) -> bool:
    """Print what changed; whether there was something to compare, and nothing of ours got slower or broke."""
    state = old["date"] if old["commit"] is None else f"{old['commit'][:12]}, {old['date']}"
    table = Table("case", "by", "pass", "T", "old ms", "new ms", "change", "noise", title=f"beside {state}")
    for row in changes:
        if row["change"] in ("slower", "faster", "broken"):
            times = ("" if row[x] is None else f"{row[x]:.4g}" for x in ("old_ms", "new_ms"))
            ratio = f"{100 * (row['ratio'] - 1):+.1f} %" if "ratio" in row else ""
            table.add_row(
                row["what"], row["impl"], short(row["pass"]), str(row["tokens"]), *times, f"{row['change']} {ratio}",
                f"{100 * row['noise']:.1f} %" if "noise" in row else "",
            )  # fmt: skip
    count = {name: sum(row["change"] == name for row in changes) for name in CHANGES}
    if table.row_count:
        console.print(table)
    console.print(
        f"beside {state}: " + ", ".join(f"{n} {name}" for name, n in count.items() if n or name == "slower"),
        soft_wrap=True,
    )
    for name in ("new", "missing"):
        listed = [" ".join(map(str, key(row)[:4])) for row in changes if row["change"] == name]
        if listed:
            console.print(f"{name}: {'; '.join(listed)}", soft_wrap=True)
    if all(row["change"] in ("new", "missing") for row in changes):
        console.print("no case is in both records", style="bold red")
        return False
    return not any(row["ours"] and row["change"] in ("slower", "broken") for row in changes)


CHANGES = ("slower", "broken", "faster", "same", "new", "missing")


def short(name: str) -> str:
    """A pass in few letters."""
    return {"forward": "fwd", "forward+backward": "fwd+bwd"}.get(name, name)


def sizes_of(rows: list[Row]) -> Iterator[tuple[tuple[str, int, int], list[Row]]]:
    """Rows by (dtype, heads, tokens)."""
    for size in dict.fromkeys((row["dtype"], row["heads"], row["tokens"]) for row in rows):
        yield size, [row for row in rows if (row["dtype"], row["heads"], row["tokens"]) == size]


def say_rows(console: Console, record: Record) -> bool:
    """A table for each size, and what the whole gains over dense attention; whether nothing was wrong or failed."""
    versions = record["versions"]
    console.print(f"{record['device']}, torch {versions['torch']}, triton {versions['triton']}", soft_wrap=True)
    for (dtype, heads, tokens), rows in sizes_of(record["rows"]):
        first = next((row for row in rows if row["status"] == "ok"), None)
        title = f"T {tokens:,}, {heads} heads in {rows[0]['groups']} groups, {dtype}"
        if first is not None:
            title += f"; ceilings {first['tflop_per_s']:,.4g} TFLOP/s, {first['gb_per_s']:,.4g} GB/s"
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=title,
        )
        table.add_column("case", overflow="fold")
        table.add_column("by", overflow="fold")
        for name in ("pass", "ms", "±", "floor", "reached", "MiB"):
            table.add_column(name, justify="left" if name == "pass" else "right", no_wrap=True)
        shown = None
        for row in rows:
            label = row["what"], row.get("runs") or row["impl"]
            cells = ["", "", short(row["pass"])] if label == shown else [*label, short(row["pass"])]
            shown = label
            if row["status"] == "ok":
                peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
                numbers = (f"{row[x]:.3g}" for x in ("ms", "iqr_ms", "floor_ms"))
                cells += [*numbers, f"{100 * row['fraction']:.1f} %", peak]
            table.add_row(*cells, style="" if row["ours"] else "dim")
        console.print(table)
        for line in gains(rows):
            console.print(line, soft_wrap=True)
    return say_failures(console, record["rows"])


def say_failures(console: Console, rows: list[Row]) -> bool:
    """Print what has no time and why; whether nothing was wrong or failed."""
    for row in rows:
        if row["status"] != "ok":
            size = f"T {row['tokens']}, {row['dtype']}"
            line = f"{row['status']}: {row['what']} {row['impl']} {short(row['pass'])}, {size}: {row['message']}"
            console.print(line, soft_wrap=True, style="bold red" if bad(row) else "dim")
    return not any(map(bad, rows))


def bad(row: Row) -> bool:
    """Whether a row says that something is broken: a wrong result, or one of ours that fails."""
    return row["status"] in ("wrong", "failed")


def speedups(rows: list[Row], what: str, dense: str) -> Iterator[tuple[Row, Row, float]]:
    """(our row, dense row, how many times as fast ours is) of the same pass and size."""
    ok = [row for row in rows if row["status"] == "ok"]
    for mine in ok:
        for other in ok:
            same = all(mine[x] == other[x] for x in KEY if x not in ("what", "impl"))
            if mine["what"] == what and other["what"] == dense and same:
                yield mine, other, other["ms"] / mine["ms"]


def gains(rows: list[Row]) -> Iterator[str]:
    """What the whole and a decode step gain over the fastest dense attention."""
    for what, dense in (("nsa", "dense"), ("decode", "dense decode")):
        best: dict[tuple, tuple[Row, Row, float]] = {}
        for mine, other, gain in speedups(rows, what, dense):
            name = mine["impl"], mine["pass"]
            if name not in best or gain < best[name][2]:
                best[name] = mine, other, gain
        for mine, other, gain in best.values():
            by = f"{gain:.3g} times as fast as {dense} by {other['impl']}"
            yield f"{what} by {mine['runs']}, {short(mine['pass'])}: {by}"


def lost(op: str, impl: str, tokens: int, rows: list[Row]) -> bool:
    """Whether an implementation was ten times as slow as another at some smaller T: it need not be timed again."""
    same = [row for row in rows if row["op"] == op and row["status"] == "ok" and row["tokens"] < tokens]
    mine = [row for row in same if row["impl"] == impl]
    alike = ("what", "tokens", "pass", "dtype", "heads")
    return any(10 * b["ms"] < a["ms"] for a in mine for b in same if all(a[x] == b[x] for x in alike))


def backward_alone(rows: list[Row]) -> list[Row]:
    """Rows of the backward alone: what forward and backward together take more than the forward."""
    forward = {key(row): row for row in rows if row["pass"] == "forward" and row["status"] == "ok"}
    found = []
    for row in rows:
        alone = forward.get(key(row | {"pass": "forward"}))
        if row["pass"] == "forward+backward" and row["status"] == "ok" and alone is not None:
            rest = {"ms": max(row["ms"] - alone["ms"], 1e-9), "iqr_ms": math.hypot(row["iqr_ms"], alone["iqr_ms"])}
            found.append(row | {"pass": "backward"} | rest)
    return found


def find_thresholds(rows: list[Row], name: str) -> dict[str, dict[str, int | None]]:
    """For every op and implementation the T from which on it is the fastest beyond noise in that pass, or None.

    Rows of one type and number of heads. For "forward+backward" the forward stands in for an op without gradient. An
    implementation that has no row at a T, having lost before, loses there.
    """
    found: dict[str, dict[str, int | None]] = {}
    for op in dict.fromkeys(row["op"] for row in rows if row["ours"]):
        mine = [row for row in rows if row["op"] == op and row["ours"]]
        at_hand = [r for r in mine if r["pass"] == name]
        if not at_hand and name == "forward+backward":
            at_hand = mine
        lengths = sorted({row["tokens"] for row in at_hand})
        winners = {t: winner([row for row in at_hand if row["tokens"] == t]) for t in lengths}
        found[op] = {
            impl: next((t for t in lengths if all(winners[x] == impl for x in lengths if x >= t)), None)
            for impl in dict.fromkeys(row["impl"] for row in at_hand)
        }
    return found


def winner(rows: list[Row]) -> str | None:
    """The implementation that is the fastest in every case of one op beyond noise; None if none is."""
    fastest = set()
    for what in dict.fromkeys(row["what"] for row in rows):
        ranked = sorted((r for r in rows if r["what"] == what and r["status"] == "ok"), key=lambda row: row["ms"])
        if not ranked or (len(ranked) > 1 and ranked[1]["ms"] <= ranked[0]["ms"] * (1 + noise(*ranked[:2]))):
            return None
        fastest.add(ranked[0]["impl"])
    return fastest.pop() if len(fastest) == 1 else None


def say_thresholds(console: Console, rows: list[Row], thresholds: dict[str, dict[str, int | None]], name: str) -> None:
    """A table of the times and of the T from which each implementation wins."""
    lengths = sorted({row["tokens"] for row in rows})
    table = Table("op", "by", "wins from", *(f"T {t}" for t in lengths), title=f"ms, {name} where there is one")
    for op, impls in thresholds.items():
        for impl, first in impls.items():
            cells = []
            for t in lengths:
                mine = [r for r in rows if (r["op"], r["impl"], r["tokens"]) == (op, impl, t)]
                mine = [r for r in mine if r["pass"] == name] or mine
                cells.append(", ".join(f"{r['ms']:.3g}" if r["status"] == "ok" else r["status"] for r in mine) or "-")
            table.add_row(op, impl, "never" if first is None else f"T {first}", *cells)
    console.print(table)


def write_thresholds(record: Record, thresholds: dict[str, dict[str, int | None]], name: str, folder: Path) -> Path:
    """Write thresholds.json: {"gpu": …, op: {implementation: T or null}} and what they were measured with.

    "directions" has the same for "forward" and, as far as measured, "backward" alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "thresholds.json"
    rows = record["rows"]
    directions = {"forward": find_thresholds(rows, "forward")}
    if name != "forward":
        directions["backward"] = find_thresholds(backward_alone(rows), "backward")
    about = {x: record[x] for x in ("device", "date", "versions", "commit", "dirty", "options")}
    path.write_text(
        json.dumps({"gpu": record["gpu"], **thresholds, "pass": name, "directions": directions, **about}, indent=1)
        + "\n"
    )
    return path
