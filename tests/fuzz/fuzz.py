"""Draw configurations and check them, in processes side by side: `python tests/fuzz/fuzz.py --minutes 8 --out r.json`.

This process draws; workers check. A case is sent to one worker at a time, so a crash or a hang has its case, and ends
that worker only. Every failure comes with the line that reproduces it. README.md says what a module of checks is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import selectors
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]
sys.path.append(str(HERE.parent.parent))  # behind what PYTHONPATH names

MODULES = {"ops": "op_checks", "others": "other_checks", "caches": "cache_checks", "models": "model_checks"}
"""Modules of checks by kind; another kind is the name of its module."""
CRASHES = 3
"""Workers that one family may end."""
STARTING = 120.0
"""Seconds that a worker may take to start, beside those of its first case."""
MOST_CRASHES = 300
"""Workers that a run may lose."""
SHOWN = 3
"""Failures of one family that are printed; the record has them all."""


def checks_of(kind: str) -> Any:
    """The module of a kind."""
    return importlib.import_module(MODULES.get(kind, kind))


def prepare_process(device: str) -> None:
    """One thread for a process; on the CPU the interpreter for the kernels, before Triton is imported."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("conftest")  # which mends the interpreter
    import torch

    torch.set_num_threads(1)


def pick_device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def release_memory() -> None:
    """Give cached memory of the device back."""
    import torch

    torch.cuda.empty_cache()


def check(request: dict[str, Any], device: str, tries: int = 4) -> list[str]:
    """Failures of one case; an exception is one."""
    try:
        failures = checks_of(request["kind"]).run_case(request["family"], request["case"], device)
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
        return failures
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" and tries > 1:  # others hold the memory, for a while
            release_memory()
            time.sleep(5)
            return check(request, device, tries - 1)
        frames = traceback.extract_tb(error.__traceback__)
        ours = [x for x in frames if "nsa_compile" in x.filename] or frames
        lines = str(error).strip().splitlines() or [""]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return [f"raised {type(error).__name__} at {place}: {lines[0][:300]}"]


def is_broken(device: str) -> bool:
    """Whether the device takes no more work in this process."""
    if device != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > 4 * 2**30:  # others want memory, too
            release_memory()
        return False
    except RuntimeError:
        return True


def work(device: str) -> None:
    """A worker: requests as lines of JSON from stdin, lists of failures to what was stdout; prints go to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    prepare_process(device)
    for line in sys.stdin:
        start = time.monotonic()
        failures = check(json.loads(line), device)
        broken = is_broken(device)
        if broken and not failures:
            failures = ["left the device broken"]
        answer = {"failures": failures, "seconds": round(time.monotonic() - start, 3), "broken": broken}
        answers.write(json.dumps(answer) + "\n")
        if broken:
            os._exit(0)


def command_of(request: dict[str, Any]) -> str:
    """The line that checks one case again."""
    return f"python tests/fuzz/fuzz.py --case {shlex.quote(json.dumps(request))}"


@dataclass
class Family:
    """Cases that one worker checks one after another."""

    kind: str
    seed: str
    size: str
    cases: int
    values: dict[str, Any] = field(init=False)
    drawn: int = 0
    crashes: int = 0
    failures: int = 0

    def __post_init__(self) -> None:
        self.values = checks_of(self.kind).draw_family(random.Random(self.seed), self.size)

    def next_request(self) -> dict[str, Any] | None:
        """The next case, None if there is none or too many have ended their worker."""
        if self.drawn >= self.cases or self.crashes >= CRASHES:
            return None
        rng = random.Random(f"{self.seed}/{self.drawn}")
        self.drawn += 1
        return {"kind": self.kind, "family": self.values, "case": checks_of(self.kind).draw_case(self.values, rng)}


def families(kinds: list[str], seed: str, size: str, cases: int | None) -> Iterator[Family]:
    """Families without end, of each kind in turn."""
    number = 0
    while True:
        for kind in kinds:
            count = cases or getattr(checks_of(kind), "CASES", 20)
            yield Family(kind, f"{seed}/{kind}/{number}", size, count)
        number += 1


class Worker:
    """A process of `work`, and the case it is at."""

    def __init__(self, device: str, environment: dict[str, str], folder: Path, number: int) -> None:
        self.log = folder / f"worker-{number}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--work", "--device", device],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
            )  # fmt: skip
        self.family: Family | None = None
        self.request: dict[str, Any] | None = None
        self.deadline = 0.0
        self.buffer = b""

    def send(self, request: dict[str, Any], seconds: float) -> bool:
        """Start a case; False if the process is gone."""
        start = STARTING if self.request is None else 0.0
        self.request, self.deadline = request, time.monotonic() + seconds + start
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            return True
        except BrokenPipeError:
            return False

    def receive(self) -> dict[str, Any] | None:
        """The answer, as far as it is there; {} if the process ended."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 2**20)
        if not chunk:
            return {}
        self.buffer += chunk
        if not self.buffer.endswith(b"\n"):
            return None
        line, self.buffer = self.buffer, b""
        return json.loads(line)

    def last_words(self) -> str:
        """The end of what it wrote."""
        lines = self.log.read_bytes().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-500:]

    def kill(self) -> None:
        """End the process, which may hang."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass
class Run:
    """A run's settings and what came of it."""

    options: argparse.Namespace
    device: str
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    crashes: int = 0
    hangs: int = 0
    slowest: list[tuple[float, str]] = field(default_factory=list)
    started: int = 0

    def __post_init__(self) -> None:
        o = self.options
        self.begin = time.monotonic()
        self.source = families(o.kinds.split(","), o.seed, o.size, o.family_cases)
        self.sent = 0
        self.environment = dict(os.environ)
        if o.cache:
            self.environment["TRITON_CACHE_DIR"] = str(Path(o.cache).resolve())
        else:
            self.environment["TRITON_CACHE_DIR"] = str(self.folder / "triton")

    def start_worker(self) -> Worker:
        self.started += 1
        return Worker(self.device, self.environment, self.folder, self.started)

    def is_over(self) -> bool:
        """Whether no more cases are to be started."""
        o = self.options
        late = time.monotonic() - self.begin > o.minutes * 60
        failing = bool(o.stop and len(self.failures) >= o.stop) or self.crashes >= MOST_CRASHES
        return late or self.sent >= o.cases or failing

    def feed(self, worker: Worker) -> bool:
        """Send the worker its family's next case, or the first of a new family; False if the run is over."""
        if self.is_over():
            return False
        request = worker.family.next_request() if worker.family else None
        if request is None:
            worker.family = next(self.source)
            self.families[worker.family.kind] += 1
            request = worker.family.next_request()
            assert request is not None
        self.sent += 1
        worker.send(request, self.options.timeout)
        return True

    def note(self, worker: Worker, messages: list[str], seconds: float) -> None:
        """Record the outcome of a worker's case."""
        request, family = worker.request, worker.family
        assert request is not None and family is not None
        self.counts[family.kind] += 1
        self.slowest = sorted([*self.slowest, (seconds, command_of(request))], reverse=True)[:5]
        if not messages:
            return
        self.failures.append({**request, "messages": messages, "command": command_of(request)})
        family.failures += 1
        if family.failures <= SHOWN:
            print("\n".join([f"FAILED {family.kind}:", *(f"  {x}" for x in messages[:6]), f"  {command_of(request)}"]))
            sys.stdout.flush()

    def replace(self, worker: Worker, what: str) -> Worker | None:
        """Another worker for one whose process crashed or hangs, at the same family; None if the run is over."""
        assert worker.family is not None
        worker.family.crashes += 1
        worker.kill()
        self.note(worker, [f"{what}, exit code {worker.process.returncode}: {worker.last_words()}"], 0.0)
        return self.successor(worker)

    def successor(self, worker: Worker) -> Worker | None:
        if self.is_over():
            return None
        new = self.start_worker()
        new.family = worker.family
        self.feed(new)
        return new

    def go(self) -> None:
        """Check cases until there were enough or time is up."""
        with selectors.DefaultSelector() as selector:

            def add(worker: Worker | None) -> None:
                if worker is not None:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]

            def remove(worker: Worker) -> Worker:
                selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
                return worker

            for _ in range(self.options.workers):
                worker = self.start_worker()
                if self.feed(worker):
                    add(worker)
                else:
                    worker.kill()
            while selector.get_map():
                for key, _ in selector.select(timeout=1.0):
                    worker = key.data
                    answer = worker.receive()
                    if answer is None:
                        continue
                    if not answer:
                        self.crashes += 1
                        remove(worker).process.wait()
                        add(self.replace(worker, "crashed"))
                        continue
                    self.note(worker, answer["failures"], answer["seconds"])
                    if answer["broken"]:
                        self.crashes += 1
                        worker.family.crashes += 1
                        remove(worker).kill()
                        add(self.successor(worker))
                    elif not self.feed(worker):
                        remove(worker).kill()
                for key in list(selector.get_map().values()):
                    if time.monotonic() > key.data.deadline:
                        self.hangs += 1
                        add(self.replace(remove(key.data), f"hung for {self.options.timeout:.0f} s"))

    def record(self) -> dict[str, Any]:
        """What the run was and found."""
        import torch

        o = self.options
        return {
            "command": "python tests/fuzz/fuzz.py " + shlex.join(sys.argv[1:]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": o.seed,
            "size": o.size,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else platform.processor() or "cpu",
            "versions": versions(),
            "workers": o.workers,
            "seconds": round(time.monotonic() - self.begin, 1),
            "cases": sum(self.counts.values()),
            "cases_per_kind": dict(self.counts),
            "families_per_kind": dict(self.families),
            "failed_cases": len(self.failures),
            "crashes": self.crashes,
            "hangs": self.hangs,
            "failures": self.failures,
            "slowest": [{"seconds": seconds, "command": command} for seconds, command in self.slowest],
        }


def versions() -> dict[str, str]:
    """Of the package (its commit, where git knows it), of Python, torch and Triton."""
    import torch

    import nsa_compile

    found = {"nsa_compile": nsa_compile.__version__, "python": platform.python_version(), "torch": torch.__version__}
    source = Path(nsa_compile.__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True)
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.import_module("triton").__version__
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check drawn configurations against the dense fp64 oracle.")
    parser.add_argument("--kinds", default="ops", help="of checks, by commas: ops, others, caches, models or modules")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no case is started")
    parser.add_argument("--cases", type=int, default=10**9, help="after which no case is started")
    parser.add_argument("--family-cases", type=int, help="cases of a family, default what its module says")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seed", default=None, help="any text, default the day in UTC")
    parser.add_argument("--device", help="cuda or cpu, default cuda where it is")
    parser.add_argument("--size", help="gpu, cpu or interpreter: what to draw for, default by the device")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a case hangs")
    parser.add_argument("--stop", type=int, default=0, help="failed cases after which no case is started; 0: never")
    parser.add_argument("--cache", help="folder of compiled kernels to keep, default one of this run")
    parser.add_argument("--out", help="file for the record, JSON")
    parser.add_argument("--case", help="one case as JSON: check it here, in this process")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.seed = options.seed or datetime.now(UTC).strftime("%Y-%m-%d")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if a case failed."""
    options = parse(arguments)
    if options.work:
        work(options.device)
        return 0
    device = pick_device(options.device)
    if options.case:
        prepare_process(device)
        failures = check(json.loads(options.case), device)
        print("\n".join(failures) or "passed")
        return int(bool(failures))
    options.size = options.size or ("gpu" if device == "cuda" else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options, device, Path(folder))
        print(f"seed {options.seed}, {options.workers} workers on {device}", flush=True)
        run.go()
        record = run.record()
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{record['cases']} cases of {sum(run.families.values())} families in {record['seconds']:.0f} s: "
        f"{len(run.failures)} failed, {run.crashes} crashes, {run.hangs} hangs; seed {options.seed}"
    )
    return int(bool(run.failures))


if __name__ == "__main__":
    sys.exit(main())
