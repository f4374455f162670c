"""Checkpoints of a run by torch.distributed.checkpoint: written beside the training, whole or not at all.

A run's folder has `step-NNNNNN` folders: `config.json` of the model, `run.json` with what else a resumed run must know,
and the weights and the optimizer's state as shards of each process. Weights are named and whole in it, so that another
number of processes, or another parallel plan, can load them.
"""

import errno
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nsa_compile.launch import SaidElsewhere
from nsa_compile.model import NSALanguageModel
from nsa_compile.storage import distributed_checkpoint, flush, naming

RUN_FILE = "run.json"
GRACE = 10.0
"""Seconds that a failing process waits for a checkpoint that others may never finish."""


def find_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint `step-NNNNNN` in a run's folder; None if there is none."""
    return max(checkpoints_in(Path(folder)), key=step_of, default=None)


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints of a run: what a crash left half-written has another name."""
    return [path for path in folder.glob("step-[0-9]*") if path.name[5:].isdecimal() and (path / RUN_FILE).is_file()]


def step_of(checkpoint: Path) -> int:
    """Updates done before a checkpoint."""
    return int(checkpoint.name[5:])


class Checkpoints:
    """Saves the state of a run in a thread of its own, one checkpoint at a time, and keeps the last few.

    `save` copies the state to the CPU and returns; the files are written to `.step-NNNNNN.part`, flushed to disk, and
    the folder renamed when all processes have written theirs. Older checkpoints go after that. What goes wrong comes
    out of the next `save` or `wait`, as OSError naming the path.

    Args:
        out: the run's folder, the same for all processes.
        keep: checkpoints to keep.
        group: of all processes, on the CPU and used for nothing else; None for a single process.
        saved: step of the checkpoint that the run goes on from.
    """

    def __init__(
        self, out: Path, *, keep: int = 1, group: dist.ProcessGroup | None = None, saved: int | None = None
    ) -> None:
        self.out, self.keep, self.group = out, keep, group
        # all processes must decide alike what to write: not by a folder that the first one may yet have to rename
        self.saved = self._writing = saved
        self.first = group is None or dist.get_rank() == 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def clean(self) -> None:
        """Remove what a crash left half-written."""
        if self.first:
            for path in self.out.glob(".step-*.part"):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, model: NSALanguageModel, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> Path:
        """Start to write a checkpoint, unless the last is of this step; `facts` go to run.json. Returns its path."""
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        self.wait()
        final, temporary = self.out / f"step-{step:06d}", self.out / f".step-{step:06d}.part"
        if step == self.saved:
            return final
        if self.first:
            with naming(temporary):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True, exist_ok=True)  # others may have made it by now
                model.config.save(temporary / "config.json")
                (temporary / RUN_FILE).write_text(json.dumps({"step": step, **facts}, indent=1) + "\n")
        staged = BlockingAsyncStager().stage(state_of(model, optimizer))
        self._thread = threading.Thread(
            target=self._write, args=(staged, temporary, final), name="checkpoint", daemon=True
        )
        self._writing = step
        self._thread.start()
        return final

    def wait(self) -> None:
        """Wait until the checkpoint at hand is written. Raises OSError, naming the path, if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self.saved = self._writing

    def give_up(self) -> None:
        """Let the checkpoint at hand end, for a run that fails anyway: others may not be there to finish theirs."""
        if self._thread is not None:
            self._thread.join(None if self.group is None else GRACE)

    def _write(self, state: dict[str, Any], temporary: Path, final: Path) -> None:
        try:
            with naming(temporary), distributed_checkpoint() as dcp:
                writer = dcp.FileSystemWriter(temporary, sync_files=True)
                dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
                if not self.first:
                    return
                for path in (temporary / "config.json", temporary / RUN_FILE, temporary):
                    flush(path)
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                flush(self.out)
            for older in sorted(checkpoints_in(self.out), key=step_of)[: -self.keep]:
                if older != final:
                    shutil.rmtree(older, ignore_errors=True)
        except BaseException as error:
            if self.first:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, RuntimeError):  # torch's, around errors of files
                error = OSError(errno.EIO, f"{str(error).splitlines()[0]}: is the disk full?", str(temporary))
            self._error = error


def state_of(model: NSALanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state by the weights' names, whatever they are spread over."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def load_state(
    checkpoint: Path,
    model: NSALanguageModel,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Load weights and optimizer state of a checkpoint, in whatever layout it was saved.

    Raises: ValueError naming a checkpoint that cannot be read.
    """
    from torch.distributed.checkpoint.state_dict import set_state_dict

    from nsa_compile.sharded import load_sharded

    state = state_of(model, optimizer)
    try:
        load_sharded(state, checkpoint, group)
    except SaidElsewhere:
        raise
    except Exception as error:
        raise ValueError(f"resume: expected a checkpoint that can be read, got {checkpoint}: {error}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def read_facts(checkpoint: Path, *names: str) -> dict[str, Any]:
    """What `save` was given beside the state, and the step. Raises ValueError for a checkpoint without `names`."""
    try:
        facts = json.loads((checkpoint / RUN_FILE).read_text())
        if "config" in names and not isinstance(facts["config"], dict):
            raise TypeError(f"config: {facts['config']!r:.80}")
        return facts | {name: facts[name] for name in names}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"resume: expected a checkpoint with {RUN_FILE}, got {checkpoint}: {error!r}") from error
