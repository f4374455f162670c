"""Many processes (gloo on a CPU, NCCL on GPUs) compute what one does; DTensors are sharded, gathered or refused."""

from __future__ import annotations

import random

import pytest
import torch
from cases import int32
from parallel_checks import (
    check_checkpoints,
    check_compiled,
    check_dtensors,
    check_everything,
    check_packed_dtensors,
    check_refused_dtensors,
    check_together,
    run,
)
from torch.distributed.tensor import Replicate, Shard

from nsa_compile.custom_ops.sharding import RULES, divides
from nsa_compile.ops.layout import compressed_slots
from nsa_compile.parallel import sequences_within

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


ROWS, TOKENS, HEADS, ALL = Shard(0), Shard(1), Shard(2), Replicate()
DTENSORS = {
    2: ((2,), {"rows": [ROWS], "heads": [HEADS], "same": [ALL], "tokens": [TOKENS], "channels": [Shard(3)]}),
    4: ((2, 2), {"rows-heads": [ROWS, HEADS], "rows": [ROWS, ROWS], "heads": [ALL, HEADS], "some": [TOKENS, HEADS]}),
}


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_compute_and_train_like_one(processes, tmp_path):
    """Starting them takes as long as most checks: once for all."""
    checks = [(check_everything, torch.float64), (check_dtensors, *DTENSORS[processes])]
    if processes == 2:
        checks += [(check_packed_dtensors,), (check_refused_dtensors,), (check_checkpoints,)]
    run(processes, tmp_path, "cpu", check_together, checks)


@pytest.mark.parametrize(("processes", "plans"), [(2, ("dp", "cp", "tp")), (4, ("cp-tp",))])
def test_compiled_blocks_are_one_graph(processes, plans, tmp_path):
    run(processes, tmp_path, "cpu", check_compiled, torch.float64, "aot_eager", *plans)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["reference", "kernels"])
def test_two_gpus_compute_and_train_like_one(dtype, tmp_path):
    run(2, tmp_path, "cuda", check_everything, dtype)


@pytest.mark.gpu
@two_gpus
def test_compiled_blocks_on_two_gpus(tmp_path):
    run(2, tmp_path, "cuda", check_compiled, torch.float32, "inductor", "dp", "cp", "tp")


@pytest.mark.parametrize(("l", "d"), [(4, 2), (6, 2), (4, 4), (3, 1)])
def test_blocks_of_the_parts_of_a_packed_row_are_those_of_the_row(l, d):
    draw = random.Random(l * 10 + d)
    t, chunk = 48, 12
    for _ in range(200):
        cu_seqlens = int32(0, *sorted(draw.choices(range(t + 1), k=draw.randrange(1, 8))))
        _, first, used = compressed_slots(t // d, cu_seqlens, l=l, d=d)
        found = []
        for start in range(0, t, chunk):
            part = sequences_within(cu_seqlens, start, start + chunk + l - 1, d)
            assert part[0] == 0
            assert part.diff().ge(0).all()
            _, begin, made = compressed_slots((chunk + l - 1) // d, part, l=l, d=d)
            assert made.sum() <= chunk // d
            found += (begin + start)[made].tolist()
        assert found == first[used].tolist()


def test_every_op_that_writes_nothing_has_a_rule():
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("nsa_compile::")
    }
    ops = {name: getattr(torch.ops.nsa_compile, name).default._schema for name in names}
    writing = {name for name, schema in ops.items() if schema.is_mutable}
    # caches; a sum over all tokens, which ranks share by hand; positions, which are plain tensors
    refused = {"cache_recall", "linear_cross_entropy", "rope_turns"}
    assert set(RULES) == names - writing - refused


@pytest.mark.parametrize(
    ("shape", "size", "smallest", "expected"),
    [
        ((2,), 4, 2, True), ((2,), 3, 3, False), ((2, 1), 2, 2, True), ((2, 2), 2, 2, True), ((2, 2), 12, 2, True),
        ((2, 2), 6, 6, False), ((2, 2), 4, 4, True), ((2, 3), 6, 6, True), ((2, 3), 4, 4, False),
    ],
)  # fmt: skip
def test_axes_are_sharded_evenly(shape, size, smallest, expected):
    class Mesh:
        pass

    mesh = Mesh()
    mesh.shape = shape
    assert divides(mesh, size, smallest) == expected
