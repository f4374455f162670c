"""Plant errors in copies of the package and see that the fuzzer catches each: `python tests/fuzz/mutants.py --on cpu`.

planted.txt lists them. A copy with one of them is checked by the fuzzer's own cases, one after another, until one
fails that passes on the package as it is; crashes and hangs are failures. Where that does not happen in time the error
was missed; where the error only breaks the code it proves nothing. Both make the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]
PACKAGE = HERE.parent.parent / "nsa_compile"
LIST = HERE / "planted.txt"
SIZES = ("cpu", "interpreter", "gpu")
NO_ERROR = re.compile(
    r"raised (CompilationError|\w*CompileTime\w*|UnsupportedLanguageConstruct|SyntaxError|IndentationError|NameError|"
    r"UnboundLocalError|ImportError|ModuleNotFoundError|AttributeError|TypeError)|"
    r"raised InterpreterError [^:]*:\d+: \W*(Name|Attribute|Type|UnboundLocal)Error|"
    r"(Syntax|Indentation|Name|Import|ModuleNotFound|Attribute)Error: "
)
"""What failures of code that cannot run look like."""


class Mutant(NamedTuple):
    """An error to plant, as in planted.txt."""

    name: str
    file: str
    kinds: str
    size: str
    needs: str
    """A condition on families: on their values, and `of_hopper`, `of_hopper_dq`, `of_hopper_dk`; empty for none."""
    old: str
    new: str


class Outcome(NamedTuple):
    """What became of an error."""

    name: str
    size: str
    verdict: str
    """caught, missed or broken."""
    cases: int
    seconds: float
    message: str
    command: str


def read_mutants(path: Path = LIST) -> list[Mutant]:
    """The errors of a list."""
    mutants: list[Mutant] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("- ") and mutants:
            mutants[-1] = mutants[-1]._replace(old=f"{mutants[-1].old}{line[2:]}\n")
        elif line.startswith("+ ") and mutants:
            mutants[-1] = mutants[-1]._replace(new=f"{mutants[-1].new}{line[2:]}\n")
        elif line and not line.startswith("#"):
            fields = [field.strip() for field in line.split("|")]
            if len(fields) not in (4, 5):
                raise ValueError(
                    f"{path.name}: expected name | file | kinds | size | needs in line {number}, got {line!r}"
                )
            mutants.append(Mutant(*fields[:4], fields[4] if len(fields) == 5 else "", "", ""))
    return [x._replace(old=x.old.removesuffix("\n"), new=x.new.removesuffix("\n")) for x in mutants]


def plant(mutant: Mutant, folder: Path) -> None:
    """Make a copy of the package with the error in a folder."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / PACKAGE.name / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: expected its text once in {mutant.file}, got {text.count(mutant.old)} times")
    path.write_text(text.replace(mutant.old, mutant.new))


def fits(family: dict[str, Any], needs: str) -> bool:
    """Whether a family of `ops` meets the condition, so that its cases run what an error changed."""
    if not needs:
        return True
    f = family
    two_bytes = f["impl"] == "auto" and f["dtype"] in ("bf16", "fp16")
    of_hopper = two_bytes and f["d_k"] <= 256 and f["d_v"] <= 128
    names = {
        "of_hopper": of_hopper,
        "of_hopper_dq": of_hopper and max(f["d_k"], f["d_v"]) > 64 and f["d_k"] <= 128,
        "of_hopper_dk": of_hopper and f["d_k"] <= 128 and f["h"] in (1, 2, 4, 8, 16, 32, 64),
    }
    return bool(eval(needs, {"__builtins__": {}}, {**f, **names}))


class Requests:
    """Cases of some kinds for one size: the same for every error, drawn when one first asks for them."""

    def __init__(self, kinds: str, size: str, needs: str, seed: str, cases: int) -> None:
        import fuzz

        self.needs = needs
        self.drawn: list[dict[str, Any]] = []
        self.families = fuzz.families(kinds.split(","), f"{seed}/{size}", size, cases)
        self.more = self.draw()
        self.lock = threading.Lock()

    def draw(self) -> Iterator[dict[str, Any]]:
        for family in self.families:
            if not fits(family.values, self.needs):
                continue
            while (request := family.next_request()) is not None:
                yield request

    def __getitem__(self, number: int) -> dict[str, Any]:
        with self.lock:
            while len(self.drawn) <= number:
                self.drawn.append(next(self.more))
        return self.drawn[number]


class Checker:
    """A worker of the fuzzer over one copy of the package, replaced where it ends."""

    def __init__(self, device: str, package: Path, folder: Path, cache: Path, timeout: float) -> None:
        self.device, self.folder, self.timeout, self.worker, self.started = device, folder, timeout, None, 0
        path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
        self.environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}

    def check(self, request: dict[str, Any]) -> list[str]:
        """Failures of a case."""
        import fuzz

        if self.worker is None:
            self.started += 1
            self.worker = fuzz.Worker(self.device, self.environment, self.folder, self.started)
        worker = self.worker
        answer = {} if not worker.send(request, self.timeout) else None
        while answer is None:
            left = worker.deadline - time.monotonic()
            if left <= 0:
                self.close()
                return [f"hung for {self.timeout:.0f} s"]
            if select.select([worker.process.stdout], [], [], min(left, 1.0))[0]:
                answer = worker.receive()
        if not answer:
            worker.process.wait()
            words = f"crashed, exit code {worker.process.returncode}: {worker.last_words()}"
            self.close()
            return [words]
        if answer["broken"]:
            self.close()
        return answer["failures"]

    def close(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker = None


class Bench:
    """Where errors are planted and checked: one run's settings, its folder and the package as it is."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.cache = Path(options.cache).resolve() if options.cache else folder / "triton"
        self.requests: dict[tuple[str, str, str], Requests] = {}
        self.passed: dict[str, bool] = {}
        self.clean: list[Checker] = []
        self.lock = threading.Lock()

    def requests_of(self, mutant: Mutant) -> Requests:
        with self.lock:
            key = mutant.kinds, mutant.size, mutant.needs
            if key not in self.requests:
                o = self.options
                self.requests[key] = Requests(*key, o.seed, o.family_cases)
            return self.requests[key]

    def checker(self, package: Path, size: str) -> Checker:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        device = "cuda" if size == "gpu" else "cpu"
        return Checker(device, package, folder, self.cache, self.options.timeout)

    @contextmanager
    def clean_checker(self, size: str) -> Iterator[Checker]:
        """One over the package as it is, kept for the next that asks."""
        device = "cuda" if size == "gpu" else "cpu"
        with self.lock:
            idle = next((x for x in self.clean if x.device == device), None)
            if idle is not None:
                self.clean.remove(idle)
        checker = idle or self.checker(PACKAGE.parent, size)
        try:
            yield checker
        finally:
            with self.lock:
                self.clean.append(checker)

    def passes(self, request: dict[str, Any], size: str) -> bool:
        """Whether a case passes on the package as it is."""
        key = json.dumps(request, sort_keys=True)
        if key not in self.passed:
            with self.clean_checker(size) as checker:
                self.passed[key] = not checker.check(request)
        return self.passed[key]

    def run(self, mutant: Mutant) -> Outcome:
        """Check a copy with the error until a case fails, or time is up."""
        import fuzz

        begin, folder = time.monotonic(), Path(tempfile.mkdtemp(dir=self.folder))
        plant(mutant, folder)
        requests, number = self.requests_of(mutant), 0

        def outcome(verdict: str, message: str = "", command: str = "") -> Outcome:
            return Outcome(mutant.name, mutant.size, verdict, number, time.monotonic() - begin, message, command)

        try:
            with closing(self.checker(folder, mutant.size)) as checker:
                while time.monotonic() - begin < self.options.minutes * 60:
                    request = requests[number]
                    number += 1
                    failures = checker.check(request)
                    if not failures:
                        continue
                    broken = next((x for x in failures if NO_ERROR.search(x)), None)
                    if broken:
                        return outcome("broken", broken, fuzz.command_of(request))
                    if self.passes(request, mutant.size):
                        return outcome("caught", failures[0], fuzz.command_of(request))
            return outcome("missed")
        finally:
            shutil.rmtree(folder)

    def close(self) -> None:
        for checker in self.clean:
            checker.close()


def in_order(outcomes: list[Outcome]) -> str:
    """A table, those that were not caught last."""
    rows = sorted(outcomes, key=lambda x: (x.verdict != "caught", x.verdict, x.name))
    width = max(len(x.name) for x in rows)
    lines = (
        f"{x.name:{width}} {x.size:11} {x.verdict:7} {x.cases:4} cases {x.seconds:4.0f} s  {x.message}" for x in rows
    )
    return "\n".join(line[:200] for line in lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="See that the fuzzer catches planted errors.")
    parser.add_argument("names", nargs="*", help="of errors, or parts of them; default all")
    parser.add_argument("--on", choices=("cpu", "gpu", "all"), default="all", help="errors that show there")
    parser.add_argument("--minutes", type=float, default=4.0, help="for one error")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="errors side by side")
    parser.add_argument("--family-cases", type=int, default=4, help="cases of a family")
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds after which a case hangs")
    parser.add_argument("--seed", default="mutants", help="any text")
    parser.add_argument("--cache", help="folder of compiled kernels to keep, default one of this run")
    parser.add_argument("--out", help="file for the outcomes, JSON")
    parser.add_argument("--list", action="store_true", help="print the names")
    return parser.parse_args(arguments)


def pick(options: argparse.Namespace) -> list[Mutant]:
    """The errors that were asked for."""
    shows: dict[str, Callable[[Mutant], bool]] = {
        "cpu": lambda x: x.size != "gpu", "gpu": lambda x: x.size == "gpu", "all": lambda x: True,
    }  # fmt: skip
    named = [x for x in read_mutants() if not options.names or any(part in f"^{x.name}$" for part in options.names)]
    return [x for x in named if shows[options.on](x)]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 unless every error was caught."""
    options = parse(arguments)
    mutants = pick(options)
    if options.list or not mutants:
        print("\n".join(x.name for x in mutants) or "no such error")
        return 0 if mutants else 1
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, closing(Bench(options, Path(folder))) as bench:

        def run(mutant: Mutant) -> Outcome:
            try:
                found = bench.run(mutant)
            except Exception as error:  # of planting or drawing: the others go on
                found = Outcome(mutant.name, mutant.size, "broken", 0, 0.0, f"{type(error).__name__}: {error}", "")
            print(f"{found.name}: {found.verdict} after {found.cases} cases, {found.seconds:.0f} s", flush=True)
            return found

        with ThreadPoolExecutor(options.workers) as pool:
            outcomes = list(pool.map(run, mutants))
    print("\n" + in_order(outcomes))
    if options.out:
        Path(options.out).write_text(json.dumps([x._asdict() for x in outcomes], indent=1) + "\n")
    caught = sum(x.verdict == "caught" for x in outcomes)
    print(f"{caught} of {len(outcomes)} caught in {time.monotonic() - begin:.0f} s; seed {options.seed}")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
