"""flash-attn as a back end, through stand-ins on the CPU: arguments, folded queries, refusals, thresholds."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import int32
from flash_standins import Calls, flash_attn_2, flash_attn_4
from poisons import BRANCHES, SMALL, SMALL_LAYOUTS, Setup, check_isolation
from torch.library import opcheck

import nsa_compile
from nsa_compile import NSAAttention, NSACache, compress_mean, compressed_attention, nsa_attention, window_attention
from nsa_compile.custom_ops import dispatch, flash
from nsa_compile.custom_ops.dispatch import Threshold, choose_attention

OPS = torch.ops.nsa_compile
MAKERS = {4: flash_attn_4, 2: flash_attn_2}


class StandIns:
    """Install stand-ins and a GPU for them; `calls` says what was called."""

    def __init__(self, monkeypatch) -> None:
        self.monkeypatch, self.calls = monkeypatch, Calls()

    def install(self, *versions: int, capability: tuple[int, int] = (10, 0), dtypes=(torch.float32,)) -> Calls:
        patch = self.monkeypatch
        for version in versions:
            patch.setitem(sys.modules, flash.MODULES[version], MAKERS[version](self.calls))
        patch.setattr(flash, "installed", lambda: {v: f"{v}.0" for v in versions})
        patch.setattr(flash, "import_error", lambda version: "")
        patch.setattr(flash, "capability_of", lambda device: capability)
        patch.setattr(flash, "DTYPES", (torch.bfloat16, torch.float16, *dtypes))  # exact comparisons
        return self.calls


@pytest.fixture
def standins(monkeypatch):
    return StandIns(monkeypatch)


def make(t: int, *, b: int = 2, g: int = 2, h: int = 3, d_k: int = 8, d_v: int = 8, dtype=torch.float32, seed: int = 0):
    """q, k, v that require gradients."""
    torch.manual_seed(seed)
    sizes = ((b, t, g * h, d_k), (b, t, g, d_k), (b, t, g, d_v))
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


def compare(function, tensors, *, lse: bool, impl: str = "flash", **tolerance) -> None:
    """Outputs and gradients of `function(*tensors, impl=impl)` are the reference's; `lse`: with one into the LSE."""
    (o, lse_got), (o_ref, lse_ref) = (function(*tensors, impl=x) for x in (impl, "reference"))
    close = {"rtol": 1e-4, "atol": 1e-5, **tolerance}
    torch.testing.assert_close(o, o_ref, **close)
    torch.testing.assert_close(lse_got, lse_ref, rtol=1e-4, atol=1e-4)
    grad_o = torch.randn_like(o)
    grad_lse = torch.where(torch.isfinite(lse_ref), torch.randn_like(lse_ref), 0.0)
    got, expected = (
        torch.autograd.grad((x, y) if lse else (x,), tensors, (grad_o, grad_lse) if lse else (grad_o,))
        for x, y in ((o, lse_got), (o_ref, lse_ref))
    )
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, **close)


def packed_ends(t: int):
    """Sequences of several lengths, one of them empty, that leave a few tokens of no sequence."""
    return int32(0, t // 4, t // 4, t // 4 + 3, t - 2)


VERSIONS = pytest.mark.parametrize("version", [4, 2])


@VERSIONS
@pytest.mark.parametrize(
    "packed, t, w",
    [
        *((False, *x) for x in ((1, 1), (1, 5), (37, 1), (37, 8), (37, 37), (37, 100), (64, 16))),
        *((True, *x) for x in ((37, 1), (37, 8), (37, 100), (64, 16))),
    ],
)
def test_window_equals_the_reference(standins, version, packed, t, w):
    calls = standins.install(version)
    cu_seqlens = packed_ends(t) if packed else None
    compare(
        lambda q, k, v, impl: window_attention(q, k, v, w=w, cu_seqlens=cu_seqlens, impl=impl),
        make(t, b=1 if packed else 2),
        lse=version == 4,
    )
    kind = {4: ["fwd", "bwd"], 2: ["varlen_forward", "varlen_backward"] if packed else ["forward", "backward"]}[version]
    assert [name for name, _ in calls] == [f"_flash_attn_{x}" for x in kind]
    assert calls[0][1]["left"] == (w - 1 if w < t else {4: None, 2: -1}[version])


@VERSIONS
@pytest.mark.parametrize("l, d", [(1, 1), (4, 2), (8, 8), (6, 3), (32, 16)])
@pytest.mark.parametrize("packed, t", [(False, 1), (False, 5), (False, 37), (False, 70), (True, 37), (True, 70)])
def test_compression_equals_the_reference(standins, version, packed, l, d, t):
    standins.install(version)
    cu_seqlens = packed_ends(t) if packed else None
    q, k, v = make(t, b=1 if packed else 2)
    k_cmp, v_cmp = (compress_mean(x.detach(), l=l, d=d, cu_seqlens=cu_seqlens).requires_grad_() for x in (k, v))
    compare(
        lambda q, k, v, impl: compressed_attention(q, k, v, l=l, d=d, cu_seqlens=cu_seqlens, impl=impl),
        (q, k_cmp, v_cmp),
        lse=version == 4,
    )


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("t, l, d", list(itertools.product((20, 37, 41), (4, 8), (2, 4))))
def test_runs_put_every_query_with_those_that_see_the_same_blocks(t, l, d, packed):
    cu_seqlens = packed_ends(t) if packed else None
    x = torch.arange(t * 4.0).view(1, t, 4, 1) + 1
    k_cmp = compress_mean(torch.randn(1, t, 2, 8), l=l, d=d, cu_seqlens=cu_seqlens)
    runs = flash.Runs.of(x, k_cmp, l=l, d=d, cu_seqlens=cu_seqlens)
    folded = runs.fold(x)
    assert folded.shape == (1, k_cmp.shape[1], 4 * d, 1) and folded.is_contiguous()
    ends = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    seen = torch.zeros(t, dtype=torch.bool)
    slot = 0
    for start, end in itertools.pairwise(ends):
        for block in range(nsa_compile.num_cmp(end - start, l, d)):
            tokens = [i for i in range(start, end) if nsa_compile.num_cmp(i - start + 1, l, d) == block + 1]
            for n in range(4):
                g, h = divmod(n, 2)
                got = folded[0, slot].view(2, d, 2)[g, :, h]
                assert got.tolist() == [x[0, i, n, 0].item() for i in tokens] + [0.0] * (d - len(tokens))
            seen[tokens] = True
            slot += 1
    torch.testing.assert_close(runs.unfold(folded, -1.0), torch.where(seen[:, None, None], x, -1.0))


@VERSIONS
def test_nan_after_the_last_sequence_stays_there(standins, version):
    standins.install(version)
    q, k, v = (x.detach() for x in make(40, b=1))
    for x in (q, k, v):
        x[:, 38:] = torch.nan
    cu_seqlens, grad = packed_ends(40), torch.randn(1, 40, 6, 8)
    grad[:, 38:] = torch.nan
    k_cmp, v_cmp = (compress_mean(x, l=4, d=2, cu_seqlens=cu_seqlens) for x in (k, v))
    used = sum(nsa_compile.num_cmp(n, 4, 2) for n in cu_seqlens.diff().tolist())
    for x in (k_cmp, v_cmp):
        x[:, used:] = torch.nan
    for function, tensors in (
        (lambda *x: window_attention(*x, w=8, cu_seqlens=cu_seqlens, impl="flash"), (q, k, v)),
        (lambda *x: compressed_attention(*x, l=4, d=2, cu_seqlens=cu_seqlens, impl="flash"), (q, k_cmp, v_cmp)),
    ):
        leaves = [x.requires_grad_() for x in tensors]
        o, lse = function(*leaves)
        assert not o[:, 38:].any() and torch.isneginf(lse[:, 38:]).all()
        grads = torch.autograd.grad(o, leaves, grad)
        assert all(x.isfinite().all() for x in (o, *grads)) and not grads[0][:, 38:].any()


@VERSIONS
@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("name", ["window_attention", "compressed_attention"])
def test_nan_and_infinity_stay_where_they_may_be(standins, name, layout, version):
    standins.install(version)
    branch, shape = BRANCHES[name], replace(SMALL, g=2, d_v=8)
    if version == 2:  # which has no gradient through the LSE
        call = branch.call
        branch = branch._replace(outputs={"o": "query"}, call=lambda *x, **how: call(*x, **how)[:1])
    check_isolation(branch, Setup("flash", torch.float32, shape, {}), SMALL_LAYOUTS[layout])


@VERSIONS
def test_bf16_and_strange_strides(standins, version):
    standins.install(version, dtypes=())
    _, k, v = make(33, dtype=torch.bfloat16)
    q = torch.randn(2, 6, 8, 33, dtype=torch.bfloat16).permute(0, 3, 1, 2).requires_grad_()
    k = torch.randn(2 * 33 * 2 * 8 + 1, dtype=torch.bfloat16)[1:].view(2, 33, 2, 8).requires_grad_()
    o, lse = window_attention(q, k, v, w=8, impl="flash")
    assert o.is_contiguous() and lse.is_contiguous() and o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    compare(lambda *x, impl: window_attention(*x, w=8, impl=impl), (q, k, v), lse=False, rtol=3e-2, atol=3e-2)
    q.grad, broadcast = None, torch.ones((), dtype=torch.bfloat16).expand(o.shape)
    for grad, x in zip(torch.autograd.grad(o, (q, k, v), broadcast), (q, k, v), strict=True):
        assert grad.is_contiguous() and grad.shape == x.shape and grad.isfinite().all()


def test_indices_that_point_outside_are_made_safe():
    got = flash.safe_ends(int32(3, -2, 9, 5, 70), 20)
    assert got.tolist() == [3, 3, 9, 9, 20] and got.dtype == torch.int32


@VERSIONS
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_opcheck(standins, version, packed):
    standins.install(version)
    t = 29
    cu_seqlens = packed_ends(t) if packed else None
    q, k, v = make(t, b=1 if packed else 2)
    k_cmp, v_cmp = (compress_mean(x.detach(), l=4, d=2, cu_seqlens=cu_seqlens).requires_grad_() for x in (k, v))
    opcheck(OPS.window_attention, (q, k, v, 8, None, cu_seqlens, 0.5, "flash"), test_utils=UTILS[version])
    args = (q, k_cmp, v_cmp, 4, 2, None, cu_seqlens, 0.5, "flash")
    opcheck(OPS.compressed_attention, args, test_utils=UTILS[version])
    for op, forward in (
        (OPS.window_attention_backward, (q, k, v, 8, None, cu_seqlens, 0.5, "flash")),
        (OPS.compressed_attention_backward, args),
    ):
        forward = [x.detach() if isinstance(x, torch.Tensor) else x for x in forward]
        o, lse = getattr(OPS, op.__name__.removesuffix("_backward"))(*forward)
        for grad_lse in (None, torch.randn(lse.shape))[: 2 if version == 4 else 1]:
            opcheck(op, (torch.randn(o.shape), grad_lse, o, lse, *forward))


UTILS = {
    4: ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    2: ("test_schema", "test_autograd_registration", "test_faketensor"),  # the last one passes a gradient to the LSE
}


@VERSIONS
def test_a_training_step_compiles_to_whole_graphs(standins, version):
    calls = standins.install(version)
    q, k, v = make(41)
    gates = torch.rand(2, 41, 6, 3)
    sizes = {"l": 4, "d": 2, "l_sel": 8, "n_sel": 4, "w": 8}

    def loss(q, k, v, impl="flash"):
        k_cmp, v_cmp = (compress_mean(x, l=4, d=2) for x in (k, v))
        return nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, **sizes, impl=impl).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    expected = torch.autograd.grad(loss(q, k, v, "reference"), (q, k, v))
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4


@VERSIONS
def test_a_layer_trains_with_flash_and_decodes_beside_it(standins, version):
    calls = standins.install(version)
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_heads": 4, "n_kv_groups": 2, "d_k": 8, "d_v": 8, "l": 4, "d": 2, "l_sel": 8, "n_sel": 4}
    layer = NSAAttention(**sizes, w=8, impl="flash")
    x = torch.randn(2, 30, 32)
    whole = layer(x)
    whole.square().sum().backward()
    assert len(calls) == 4 and all(p.grad is not None for p in layer.parameters())
    with torch.no_grad():
        cache = NSACache.for_model(layer, 2, 64)
        parts = [layer(part, cache=cache) for part in x.split([21, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole.detach(), rtol=1e-4, atol=1e-4)
    assert len(calls) == 4


def refusal(function) -> str:
    with pytest.raises(
        ValueError, match=r"impl: expected 'auto', 'reference' or 'triton' for .*, got 'flash': "
    ) as error:
        function()
    return str(error.value)


def test_refusals_say_why(standins):
    q, k, v = make(16)
    q_start = int32(0, 0)
    assert "runs on NVIDIA GPUs" in refusal(lambda: window_attention(q, k, v, w=4, impl="flash"))
    standins.install()
    assert "neither flash-attn-4 nor flash-attn is installed" in refusal(
        lambda: window_attention(q, k, v, w=4, impl="flash")
    )
    standins.install(4, dtypes=())
    assert "takes bfloat16 and float16, not torch.float32" in refusal(
        lambda: window_attention(q, k, v, w=4, impl="flash")
    )
    standins.install(4, 2)
    for function in (
        lambda: window_attention(q, k, v, w=4, q_start=q_start, impl="flash"),
        lambda: compressed_attention(q, k, v, l=1, d=1, q_start=q_start, impl="flash"),
    ):
        assert "takes no q_start" in refusal(function)
    assert "compressed_attention and window_attention only" in refusal(lambda: compress_mean(k, l=4, d=2, impl="flash"))
    odd = make(16, d_k=12)
    text = refusal(lambda: window_attention(*odd, w=4, impl="flash"))
    assert (
        "flash-attn 4 takes multiples of 8 up to 128 channels or (192, 128) or (256, 256) on this GPU, not (d_k" in text
    )
    assert "flash-attn 2 takes multiples of 8" in text


def test_a_launch_has_limits(standins):
    standins.install(4)
    q, v = torch.empty(1, 1, 5000, 8), torch.empty(1, 1, 1, 8)
    assert flash.pick_version(q, v, q_start=None).version == 4
    assert "up to 65535 rows and heads, not 1 and 80000" in flash.pick_version(q, v, q_start=None, fold=16).why_not


def pick(d_k: int, d_v: int, *, g: int = 1, lse: bool = False, **options) -> flash.Pick:
    q, v = (torch.empty(1, 1, heads, x, dtype=torch.bfloat16) for heads, x in ((2, d_k), (g, d_v)))
    return flash.pick_version(q, v, q_start=None, grad_lse=torch.empty(1, 1, 2) if lse else None, **options)


def test_the_table_of_versions(standins):
    standins.install(4, capability=(8, 0))
    assert "no forward and backward for compute capability 8.0" in pick(128, 128).why_not
    standins.install(4, capability=(9, 0))
    assert pick(192, 128).version == 4 and pick(192, 128, g=2, backward=True).version == 4
    assert "has gradients on this GPU for d_k = d_v only" in pick(192, 128, backward=True).why_not
    assert pick(256, 256, backward=True, lse=True).version == 4
    assert pick(72, 72).version == pick(96, 96, backward=True).version == 4
    assert "for d_k in multiples of 32 only, not 72" in pick(72, 72, backward=True).why_not
    standins.install(4, capability=(10, 0))
    assert pick(192, 128, backward=True, lse=True).version == 4
    assert "up to 128 channels or (192, 128) or (256, 256)" in pick(192, 192).why_not
    assert pick(256, 256, backward=True).version == 4
    assert "no gradient through the LSE of 256 channels" in pick(256, 256, backward=True, lse=True).why_not
    standins.install(2, capability=(8, 6))
    assert pick(256, 256, backward=True).version == 2
    assert "takes d_k = d_v only" in pick(192, 128).why_not
    assert "passes no gradient through the LSE" in pick(128, 128, backward=True, lse=True).why_not
    standins.install(4, 2, capability=(12, 0))
    assert pick(128, 128, backward=True).version == 4 and pick(256, 256, backward=True).version == 2


def test_gradients_are_deterministic_where_asked_for(standins):
    calls = standins.install(4, capability=(12, 0))
    q, k, v = make(16)
    o, _ = window_attention(q, k, v, w=4, impl="flash")
    torch.use_deterministic_algorithms(True)
    try:
        assert "no deterministic gradients on this GPU" in refusal(o.sum().backward)
        standins.install(4)
        o.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls[-1] == ("_flash_attn_bwd", {"deterministic": True, "dlse": False})


def test_a_gradient_of_the_lse_is_exact_or_refused(standins):
    q, k, v = make(16)
    standins.install(4)
    compare(lambda *x, impl: window_attention(*x, w=4, impl=impl), (q, k, v), lse=True)
    grads = torch.autograd.grad(window_attention(q, k, v, w=4, impl="flash")[1].sum(), (q, k, v))
    expected = torch.autograd.grad(window_attention(q, k, v, w=4, impl="reference")[1].sum(), (q, k, v))
    for a, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    standins.install(2)
    _, lse = window_attention(q, k, v, w=4, impl="flash")
    assert "flash-attn 2 passes no gradient through the LSE" in refusal(lambda: lse.sum().backward())


@pytest.fixture
def on_gpu(standins, monkeypatch):
    """ "auto" takes Triton on this CPU, and thresholds are for it."""

    def prepare(*entries: Threshold) -> None:
        monkeypatch.setattr(dispatch, "thresholds", lambda: entries)

    monkeypatch.setattr(dispatch, "gpu_name", lambda device: "GPU")
    monkeypatch.setattr(
        dispatch, "resolve_impl", lambda op, impl, *_: dispatch.Choice("triton" if impl == "auto" else impl, "fastest")
    )
    standins.install(4, 2)
    return prepare


def test_auto_takes_flash_from_the_threshold_on(on_gpu, standins):
    entry = Threshold("window_attention", "forward", "GPU", 4, 8, 8, 20, "profiles/x.json")
    on_gpu(entry)

    def choose(t, op="window_attention", q_start=None, cu_seqlens=None, d_v=8, **options):
        q, _, v = make(t, d_v=d_v)
        return choose_attention(op, "auto", q, v, q_start=q_start, cu_seqlens=cu_seqlens, **options)

    assert [choose(t).impl for t in (19, 20, 21)] == ["triton", "flash", "flash"]
    assert choose(20) == ("flash", "faster from 20 tokens on", 4)
    for other in (
        choose(20, op="compressed_attention"),
        choose(20, backward=True),
        choose(20, d_v=16),
        choose(20, q_start=int32(0, 0)),
        choose(20, cu_seqlens=int32(0, 20)),
    ):
        assert other.impl == "triton"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(20).impl == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    for wrong in (entry._replace(gpu="other"), entry._replace(tokens=None)):
        on_gpu(wrong)
        assert choose(20).impl == "triton"
    on_gpu(entry._replace(direction="backward", version=2))
    standins.install(2)
    assert choose(20, backward=True).impl == "flash"
    assert choose(20, backward=True, grad_lse=torch.zeros(2, 20, 6)).impl == "triton"
    standins.install(4)
    assert choose(20, backward=True).impl == "triton"  # measured with the other version


def test_info_says_what_auto_does(on_gpu):
    cuda = torch.device("cuda")
    entry = Threshold("window_attention", "forward", "GPU", 4, 128, 128, 4096, "profiles/x.json")
    on_gpu(entry, entry._replace(direction="backward", tokens=None))
    assert dispatch.explain_thresholds("window_attention", cuda) == (
        "flash-attn 4 from T = 4096 on for the forward with (128, 128) channels (profiles/x.json); "
        "flash-attn 4 never for the backward with (128, 128) channels (profiles/x.json)"
    )
    assert dispatch.explain_thresholds("compressed_attention", cuda) == "flash-attn not: no threshold measured on GPU"
    assert dispatch.explain_thresholds("gated_sum", cuda) == ""
    assert dispatch.explain_thresholds("window_attention", torch.device("cpu")) == ""


def test_committed_thresholds_are_well_formed():
    entries = json.loads((Path(dispatch.__file__).parent / "thresholds.json").read_text())
    assert [Threshold(**entry)._asdict() for entry in entries] == entries
    keys = [tuple(entry[x] for x in Threshold._fields[:6]) for entry in entries]
    assert len(set(keys)) == len(keys)
    for entry in entries:
        assert entry["op"] in dispatch.FLASH_OPS and entry["direction"] in ("forward", "backward")
        assert entry["version"] in flash.PACKAGES and (entry["tokens"] is None or entry["source"])
        if entry["source"]:
            found = json.loads((Path(dispatch.__file__).parents[2] / entry["source"]).read_text())
            assert entry["tokens"] == found["directions"][entry["direction"]][entry["op"]]["flash"]
            assert (entry["gpu"], entry["d_k"], entry["d_v"]) == (
                found["gpu"], found["options"]["d_k"], found["options"]["d_v"],
            )  # fmt: skip
            assert found["versions"][flash.PACKAGES[entry["version"]]] is not None


def test_versions_that_are_missing_or_broken_are_told_apart(standins, monkeypatch):
    assert list(flash.installed()) == [version for version in (4, 2) if version in flash.installed()]
    import_error = flash.import_error.__wrapped__
    standins.install(4)
    monkeypatch.setattr(flash, "import_error", import_error)
    assert pick(64, 64).version == 4
    monkeypatch.setitem(sys.modules, flash.MODULES[4], None)
    assert "flash-attn-4 does not import: ModuleNotFoundError" in pick(64, 64).why_not


def test_readme_has_the_table():
    readme = (Path(dispatch.__file__).parents[2] / "README.md").read_text()
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in readme.splitlines() if line.startswith("| 4 (")]
    rows += [
        [x.strip() for x in line.strip("|").split("|")] for line in readme.splitlines() if line.startswith("| 2 (")
    ]
    assert len(rows) == len(flash.SUPPORT)
    for row, support in zip(rows, flash.SUPPORT, strict=True):
        version, capability, widths, lse, deterministic, measured = row
        assert version.startswith(f"{support.version} (") and f"{support.majors[0]}.x" in capability
        assert f"up to {support.width}" in widths and all(str(pair) in widths for pair in support.pairs)
        assert ("d_k = d_v" in widths) == (support.equal != "no")
        assert (f"multiples of {support.gradient_step}" in widths) == (support.gradient_step > 8)
        assert lse.startswith("yes" if support.lse_gradient else "no")
        assert (deterministic, measured) == tuple("yes" if x else "no" for x in support[-2:])
