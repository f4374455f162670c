"""The command `nsa-compile bench`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import nsa_compile
from nsa_compile.bench import options as bench_options
from nsa_compile.bench.cases import check_impls
from nsa_compile.bench.measure import BOTH, FORWARD, run_bench
from nsa_compile.bench.plots import can_plot, plot_record
from nsa_compile.bench.report import (
    check_comparable,
    compare,
    device_name,
    find_thresholds,
    lost,
    make_record,
    prepare_folder,
    read_record,
    say_comparison,
    say_failures,
    say_rows,
    say_thresholds,
    write_record,
    write_thresholds,
)
from nsa_compile.options import find_device, free_folder
from nsa_compile.terminal import one_thread, progress_bar


def size_option(name: str, help: str) -> Any:
    """An option whose default depends on the device."""
    return typer.Option(name, help=help, show_default="by device")


def bench_command(
    what: Annotated[
        list[str] | None,
        typer.Option(help=f"What to time, several: {', '.join(bench_options.WHAT)}.", show_default="all"),
    ] = None,
    tokens: Annotated[
        list[int] | None, size_option("--tokens", "Tokens per row, of decode the context; several.")
    ] = None,
    heads: Annotated[list[int] | None, size_option("--heads", "Query heads; several.")] = None,
    groups: Annotated[int | None, size_option("--groups", "Key/value heads.")] = None,
    d_k: Annotated[int | None, size_option("--d-k", "Channels of a query and key head.")] = None,
    d_v: Annotated[int | None, size_option("--d-v", "Channels of a value head.")] = None,
    l: Annotated[int | None, size_option("--l", "Length of a compression block.")] = None,
    d: Annotated[int | None, size_option("--d", "Stride of the compression blocks.")] = None,
    l_sel: Annotated[int | None, size_option("--l-sel", "Length of a selection block.")] = None,
    n_sel: Annotated[int | None, size_option("--n-sel", "Blocks selected per query.")] = None,
    w: Annotated[int | None, size_option("--w", "Length of the sliding window.")] = None,
    dtype: Annotated[
        list[str] | None, size_option("--dtype", f"Type of the tensors, several: {', '.join(bench_options.DTYPES)}.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    backward: Annotated[bool, typer.Option(help="Time forward + backward too.")] = True,
    device: Annotated[str | None, typer.Option(help="Device.", show_default="cuda if there, else cpu")] = None,
    repeats: Annotated[int | None, size_option("--repeats", "Timed calls of each case.")] = None,
    impl: Annotated[
        list[str] | None,
        typer.Option(
            help="Implementation of our ops; several.", show_default="auto, and on CUDA flash where an op has it"
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        size_option("--beside", f"Alternatives to time, several: {', '.join(bench_options.BESIDE)}, or none."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for JSON, CSV and pictures.", show_default="nsa-bench, or nsa-bench-2, ..."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--compare", help="bench.json of another run: exit code 1 if anything got slower.")
    ] = None,
    threshold: Annotated[
        bool, typer.Option("--threshold", help="Instead find from which T on each implementation of each op wins.")
    ] = False,
    plot: Annotated[
        bool | None, typer.Option("--plot/--no-plot", help="Draw pictures.", show_default="if matplotlib is there")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Commit to record, for sources without git.")] = None,
) -> None:
    """Time branches, whole attention and decode beside the alternatives, in turns; say floors and fractions reached.

    Every result is compared with the reference before it is timed; a wrong one is not timed, and the exit code is 1.
    The floor of a row is what its products take at the rate of a large matrix product, or its bytes, read and written
    once, at that of a large copy or sum, all measured in the same rounds. MiB are those that a call needs besides its
    inputs. On a CPU one thread works, at small sizes; what stays in its caches may be faster than such a floor.
    """
    console = Console(markup=False, highlight=False)
    target = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = impl
    if threshold:
        if len(heads or ()) > 1 or len(dtype or ()) > 1:
            raise ValueError("threshold: expected one number of heads and one type, got several")
        for name, given in (("--plot", plot), ("--beside", beside not in (None, ["none"]))):
            if given:
                raise ValueError(f"threshold: expected it without {name}, got both")
        what, beside = what or [x for x in bench_options.WHAT if x not in ("nsa", "decode")], ["none"]
        tokens, impl = tokens or bench_options.doublings(target.type), impl or ["triton", "flash", "reference"]
    options = bench_options.Options.on(
        str(target), what=what, tokens=tokens, heads=heads, groups=groups, d_k=d_k, d_v=d_v, l=l, d=d, l_sel=l_sel,
        n_sel=n_sel, w=w, dtypes=dtype, batch=batch, backward=backward, repeats=repeats, impls=impl,
        beside=[] if beside == ["none"] else beside,
    )  # fmt: skip
    left_out = check_impls(options) if asked else []
    if plot and not can_plot():
        raise ValueError("plot: expected matplotlib, which pip install 'nsa-compile[bench]' brings, got none")
    old = None if against is None else read_record(against)
    if old is not None:
        check_comparable(old, device_name(target), options)
    folder = out or free_folder("nsa-bench")
    prepare_folder(folder)
    for line in left_out:
        console.print(f"left out: {line}", soft_wrap=True)
    with one_thread() if target.type == "cpu" else nullcontext(), progress_bar(console, "bench") as progress:
        if threshold:
            rows = run_bench(options, progress, lambda case, t, rows: not lost(case.op, case.impl, t, rows))
        else:
            rows = run_bench(options, progress)
        record = make_record(options.as_dict(), rows, nsa_compile.__version__, commit)
    if threshold:
        name = BOTH if backward else FORWARD
        thresholds = find_thresholds(rows, name)
        say_thresholds(console, rows, thresholds, name)
        fine = say_failures(console, rows)
        files = [write_thresholds(record, thresholds, name, folder), *write_record(record, folder)]
    else:
        fine = say_rows(console, record)
        files = [
            *write_record(record, folder),
            *(plot_record(record, folder) if plot or (plot is None and can_plot()) else ()),
        ]
    console.print(f"written: {', '.join(map(str, files))}", soft_wrap=True)
    if not any(row["ours"] and row["status"] == "ok" for row in rows):
        console.print("nothing of ours could be timed", style="bold red")
        fine = False
    if plot is None and not can_plot():
        console.print("no pictures: pip install 'nsa-compile[bench]' brings matplotlib")
    if old is not None:
        fine = say_comparison(console, old, compare(old, record)) and fine
    if not fine:
        raise typer.Exit(1)
