"""The layer, the block and the language model against plain compositions of what they are made of."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import oracle
import pytest
import torch
from cases import draw, int32
from models import CHOICES, LAYER, MODEL, choice_id, draw_ids, make_layer, make_model
from torch import Tensor, nn
from torch.nn.functional import conv1d, scaled_dot_product_attention, silu

from nsa_compile import (
    LlamaBlockNSA,
    NSAAttention,
    NSACache,
    NSAConfig,
    NSALanguageModel,
    apply_rope,
    gate_statistics,
)

T = 41  # past the window of 7 and the 4 * 6 tokens of a full selection
BRANCHES = ("cmp", "slc", "win")
EACH_CHOICE = pytest.mark.parametrize("choice", CHOICES, ids=choice_id)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- the plain composition -------------------------------------------------------------------------------------------


def compress(phi: nn.Module, x: Tensor, config: NSAConfig) -> Tensor:
    """φ block by block: the mean, and for "mlp" the convolution of block and positions through the MLP besides."""
    weights, out = dict(phi.named_parameters()), []
    for start in range(0, x.shape[1] - config.l + 1, config.d):
        block = x[:, start : start + config.l].permute(0, 2, 3, 1).flatten(0, 1)  # [b * g, channels, l]
        token = block.mean(-1)
        if weights:
            features = conv1d(block + weights["position"].T, weights["conv.weight"]).squeeze(-1)
            token = token + silu(features @ weights["fc1.weight"].T) @ weights["fc2.weight"].T
        out.append(token.unflatten(0, (x.shape[0], -1)))
    return torch.stack(out, 1) if out else x[:, :0]


def mix(gate: nn.Module, x: Tensor, q: Tensor, config: NSAConfig) -> Tensor:
    """Gates [b, t, n_heads, 3]."""
    weight = dict(gate.named_parameters())
    h = config.n_heads // config.n_kv_groups
    features = q.unflatten(2, (-1, h)).mean(3) if config.gate == "softmax" else x
    hidden = silu(features @ weight["fc1.weight"].T + weight["fc1.bias"])
    logits = hidden @ weight["fc2.weight"].T + weight["fc2.bias"]
    if config.gate == "sigmoid":
        return torch.sigmoid(logits).unflatten(-1, (config.n_heads, 3))
    return torch.softmax(logits / config.gate_temperature, -1).repeat_interleave(h, dim=2)


def compose(layer: NSAAttention, x: Tensor, branch: str | None = None) -> Tensor:
    """What the layer computes for whole sequences x [b, t, dim], by the loops of the oracle."""
    c, weight = layer.config, dict(layer.named_parameters())

    def project(name: str, heads: int) -> Tensor:
        return (x @ weight[f"{name}.weight"].T).unflatten(-1, (heads, -1))

    names = ("", "", "") if c.tie_kv else ("_cmp", "_sel", "_win")
    k_cmp, k_slc, k_win = (project(f"W_K{name}", c.n_kv_groups) for name in names)
    v_cmp, v_slc, v_win = (project(f"W_V{name}", c.n_kv_groups) for name in names)
    q = project("W_Q", c.n_heads)
    gates = mix(layer.gate, x, q, c)
    if branch is not None:
        gates = torch.tensor([float(name == branch) for name in BRANCHES]).expand_as(gates)
    k_cmp, v_cmp = compress(layer.phi_k, k_cmp, c), compress(layer.phi_v, v_cmp, c)
    last = torch.tensor([i * c.d + c.l - 1 for i in range(k_cmp.shape[1])])
    k_cmp = oracle.apply_rope(k_cmp, last, theta=c.rope_theta)
    q, k_slc, k_win = (oracle.apply_rope(y, torch.arange(x.shape[1]), theta=c.rope_theta) for y in (q, k_slc, k_win))
    sizes = {"l": c.l, "d": c.d, "l_sel": c.l_sel}
    blocks = oracle.select_blocks(
        q, k_cmp, **sizes, n_sel=c.n_sel, init_blocks=c.init_blocks, local_blocks=c.local_blocks
    ).block_indices
    o = oracle.nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, blocks, **sizes, w=c.w)
    return o.flatten(2) @ weight["out.weight"].T


@EACH_CHOICE
@torch.no_grad()
def test_layer_equals_the_plain_composition(choice):
    layer, x = make_layer(**choice), draw(1, T, LAYER["dim"], seed=1)
    close(layer(x), compose(layer, x))


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 50.0},
        {"gate_temperature": 0.3},
        {"init_blocks": 0, "local_blocks": 1},
        {"init_blocks": 2, "local_blocks": 2},
        {"l": 3, "d": 1, "l_sel": 5, "w": 1},
        {"n_heads": 3, "n_kv_groups": 3},
        {"n_heads": 5, "n_kv_groups": 1, "d_k": 2, "d_v": 7},
    ],
    ids=str,
)
def test_layer_of_other_sizes_equals_the_plain_composition(changes):
    layer, x = make_layer(phi="mlp", **changes), draw(1, T, LAYER["dim"], seed=2)
    close(layer(x), compose(layer, x))


@torch.no_grad()
@pytest.mark.parametrize("t", [1, 2, 3, 4, 5, 6])
def test_short_sequences_equal_the_plain_composition(t):
    layer, x = make_layer(phi="mlp"), draw(2, t, LAYER["dim"], seed=3)
    close(layer(x), compose(layer, x))


@pytest.mark.parametrize("branch", BRANCHES)
@EACH_CHOICE
@torch.no_grad()
def test_branch_argument_lets_one_branch_alone_through(choice, branch):
    layer, x = make_layer(**choice), draw(1, T, LAYER["dim"], seed=4)
    close(layer(x, branch=branch), compose(layer, x, branch))


# --- parameters ------------------------------------------------------------------------------------------------------

PROJECTIONS = ["W_Q", "W_K_sel", "W_V_sel", "W_K_win", "W_V_win", "W_K_cmp", "W_V_cmp", "out"]
GATE = ["gate.fc1.weight", "gate.fc1.bias", "gate.fc2.weight", "gate.fc2.bias"]
PHI = ["position", "conv.weight", "fc1.weight", "fc2.weight"]
BLOCK = ["norm_attn.weight", "norm_mlp.weight", "mlp.up.weight", "mlp.down.weight"]


def test_parameter_count_and_shapes():
    layer = NSAAttention(dim=128, n_heads=8, n_kv_groups=2, d_k=32, d_v=32, gate_hidden=16)
    expected = {f"{name}.weight": (64, 128) for name in PROJECTIONS}
    expected |= {"W_Q.weight": (256, 128), "out.weight": (128, 256)}
    expected |= {"gate.fc1.weight": (16, 32), "gate.fc1.bias": (16,), "gate.fc2.weight": (3, 16), "gate.fc2.bias": (3,)}
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected
    assert sum(p.numel() for p in layer.parameters()) == 115_267


@pytest.mark.parametrize("d_k, hidden", [(2, 1), (6, 3), (192, 96)], ids=str)
def test_gate_is_half_as_wide_as_a_key_unless_told(d_k, hidden):
    assert NSAAttention(**LAYER | {"d_k": d_k}).gate.fc1.weight.shape == (hidden, d_k)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [f"{name}.weight" for name in PROJECTIONS] + GATE),
        ({"gate": "sigmoid"}, [f"{name}.weight" for name in PROJECTIONS] + GATE),
        ({"tie_kv": True}, ["W_Q.weight", "W_K.weight", "W_V.weight", "out.weight", *GATE]),
        (
            {"phi": "mlp"},
            [f"{name}.weight" for name in PROJECTIONS] + GATE + [f"phi_{x}.{name}" for x in "kv" for name in PHI],
        ),
    ],
    ids=["separate", "sigmoid", "tied", "mlp"],
)
def test_names_of_the_layers_weights_are_stable(changes, expected):
    assert sorted(NSAAttention(**LAYER | changes).state_dict()) == sorted(expected)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_names_of_the_models_weights_are_stable(attention):
    inner = [f"{name}.weight" for name in PROJECTIONS] + GATE
    if attention == "dense":
        inner = ["W_Q.weight", "W_K.weight", "W_V.weight", "out.weight"]
    block = [f"attn.{name}" for name in inner] + BLOCK
    expected = ["embed.weight", "norm.weight", "head.weight", *(f"layers.{i}.{name}" for i in (0, 1) for name in block)]
    assert sorted(make_model(attention=attention).state_dict()) == sorted(expected)


@EACH_CHOICE
@pytest.mark.parametrize("t", [LAYER["l"] + LAYER["d"], T])
def test_every_weight_gets_a_gradient(choice, t):
    """From l + d tokens on, where a query sees two compressed tokens: over one alone a softmax is constant."""
    layer = make_layer(**choice)
    y = layer(draw(2, t, LAYER["dim"], seed=5))
    (y * draw(*y.shape, seed=6)).sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert (weight.grad.flatten(1) if weight.ndim > 1 else weight.grad[:, None]).abs().sum(1).gt(0).all(), name


@pytest.mark.parametrize("tie_kv", [False, True], ids=["separate", "tied"])
def test_every_projection_gets_a_gradient_at_the_start(tie_kv):
    torch.manual_seed(0)
    layer = NSAAttention(**LAYER, tie_kv=tie_kv, phi="mlp")
    layer(torch.randn(1, T, LAYER["dim"])).square().sum().backward()
    for name, weight in layer.named_parameters():
        if name.startswith(("W_", "out")) or name.endswith("fc2.weight"):
            assert weight.grad.abs().sum(1).gt(0).all(), name


# --- how it starts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.1], ids=str)
def test_softmax_gates_start_at_one_third(dtype, temperature):
    layer = NSAAttention(**LAYER, gate_temperature=temperature).to(dtype)
    x = draw(2, T, LAYER["dim"], seed=7, dtype=dtype)
    gates = layer.gate(x, layer.W_Q(x).unflatten(-1, (LAYER["n_heads"], -1)))
    assert gates.shape == (2, T, LAYER["n_heads"], 3)
    assert gates.eq(torch.tensor(1 / 3, dtype=dtype)).all()  # equal in the last bit: their spread is 0


def test_sigmoid_gates_start_at_one_half():
    layer = NSAAttention(**LAYER, gate="sigmoid")
    x = draw(2, T, LAYER["dim"], seed=7, dtype=torch.float32)
    assert layer.gate(x, layer.W_Q(x).unflatten(-1, (LAYER["n_heads"], -1))).eq(0.5).all()


@pytest.mark.parametrize("where", [{}, {"cu_seqlens": int32(0, 3, 20, T)}], ids=["plain", "packed"])
def test_learnable_compressors_start_as_the_mean(where):
    torch.manual_seed(0)
    learnable, mean = (NSAAttention(**LAYER, phi=phi).double() for phi in ("mlp", "avg"))
    x = draw(1, T, 2, LAYER["d_k"], seed=8)
    assert learnable.phi_k(x, **where).equal(mean.phi_k(x, **where))
    missing = learnable.load_state_dict(mean.state_dict(), strict=False)
    assert missing.missing_keys and not missing.unexpected_keys
    x = draw(1, T, LAYER["dim"], seed=8)
    assert learnable(x, **where).equal(mean(x, **where))


@pytest.mark.parametrize("sizes", [(4, 2), (6, 2), (3, 3), (4, 1), (1, 1)], ids=str)
@torch.no_grad()
def test_learnable_compressor_is_mean_and_mlp_of_a_convolution(sizes):
    l, d = sizes
    layer = make_layer(phi="mlp", l=l, d=d)
    x = draw(2, T, 2, LAYER["d_v"], seed=9)
    out = layer.phi_v(x)
    assert out.shape == (2, (T - l) // d + 1, 2, LAYER["d_v"])
    close(out, compress(layer.phi_v, x, layer.config))
    assert (out - x.unfold(1, l, d).mean(-1)).abs().min() > 1e-6  # the learned part takes part everywhere


@pytest.mark.parametrize("sizes", [(4, 2), (6, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("bounds", [(0, 3, 3, 20, 38), (0, T), (0, 1, 2, 12, T)], ids=str)
@torch.no_grad()
def test_packed_learnable_compressor_starts_anew_in_each_sequence(sizes, bounds):
    l, d = sizes
    layer, x = make_layer(phi="mlp", l=l, d=d), draw(1, T, 2, LAYER["d_k"], seed=10)
    pieces = [compress(layer.phi_k, x[:, lo:hi], layer.config) for lo, hi in pairwise(bounds)]
    expected = torch.cat(pieces, 1)
    out = layer.phi_k(x, int32(*bounds))
    assert out.shape[1] == T // d
    close(out[:, : expected.shape[1]], expected)
    assert out[:, expected.shape[1] :].eq(0).all()


# --- RoPE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, 1000, 100_000], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_rotated_scores_depend_on_differences_of_positions_only(shift, dtype, tolerance):
    """In fp32 too: angles of fp32 would be off by 0.004 radians at 100000."""
    q, k = draw(1, 9, 2, 8, seed=11, dtype=dtype), draw(1, 9, 2, 8, seed=12, dtype=dtype)
    positions = torch.arange(9)

    def scores(by: int) -> Tensor:
        return torch.einsum("btnk,bsnk->bnts", apply_rope(q, positions + by), apply_rope(k, positions + by))

    close(scores(shift), scores(0), tolerance)
    turned = torch.einsum("btnk,bsnk->bnts", apply_rope(q, positions + 1), apply_rope(k, positions))
    assert (turned - scores(0)).abs().max() > 0.1


@pytest.mark.parametrize("branch", ["slc", "win"])
@pytest.mark.parametrize("tie_kv", [False, True], ids=["separate", "tied"])
@torch.no_grad()
def test_shifting_every_position_changes_nothing(branch, tie_kv):
    """Both branches see the last tokens alone here, so a past of 100000 tokens is but a shift of positions."""
    sizes = {"l": 50, "d": 50, "l_sel": 50, "n_sel": 2, "init_blocks": 0, "local_blocks": 2, "tie_kv": tie_kv}
    layer, x, shift = make_layer(**sizes), draw(1, 130, LAYER["dim"], seed=13), 100_000
    cache = NSACache.for_model(layer, 1, shift + 130)
    cache.positions.fill_(shift)
    shifted, plain = layer(x, cache, branch=branch), layer(x, branch=branch)
    sees_own_tokens_only = {"slc": 50, "win": LAYER["w"] - 1}[branch]
    close(shifted[:, sees_own_tokens_only:], plain[:, sees_own_tokens_only:], 1e-7)
    cache.reset()
    close(layer(x, cache, branch=branch), plain)


@torch.no_grad()
def test_heads_turn_alike():
    """Heads that hold the same weights give the same output: a turn of the flattened vector would tell them apart."""
    layer, x = make_layer(), draw(1, T, LAYER["dim"], seed=14)
    n, g = LAYER["n_heads"], LAYER["n_kv_groups"]
    for name in PROJECTIONS[:-1]:
        weight, heads = layer.get_submodule(name).weight, n if name == "W_Q" else g
        weight.copy_(weight.unflatten(0, (heads, -1))[:1].expand(heads, -1, -1).flatten(0, 1))
    outputs: list[Tensor] = []
    layer.out.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    layer(x)
    heads = outputs[0].unflatten(-1, (n, -1))
    close(heads, heads[:, :, :1].expand_as(heads))
    assert heads.std() > 0.1


# --- causality, packing, padding -------------------------------------------------------------------------------------


@EACH_CHOICE
@pytest.mark.parametrize("t", [2, 7, 24, 33, 39])
@torch.no_grad()
def test_later_tokens_change_no_earlier_output(choice, t):
    layer, x = make_layer(**choice), draw(2, T, LAYER["dim"], seed=15)
    other = torch.cat((x[:, : t + 1], draw(2, T - t - 1, LAYER["dim"], seed=16)), 1)
    before, after = layer(x), layer(other)
    assert before[:, : t + 1].equal(after[:, : t + 1])
    assert (before[:, t + 1 :] - after[:, t + 1 :]).abs().amax(-1).min() > 1e-3


@EACH_CHOICE
@pytest.mark.parametrize("bounds", [(0, 3, 3, 33, 38), (0, T), (0, 1, T)], ids=str)
@torch.no_grad()
def test_packed_sequences_equal_sequences_alone(choice, bounds):
    layer, x = make_layer(**choice), draw(1, T, LAYER["dim"], seed=17)
    x[:, bounds[-1] :] = float("nan")
    packed = layer(x, cu_seqlens=int32(*bounds))
    for lo, hi in pairwise(bounds):
        if hi > lo:
            close(packed[:, lo:hi], layer(x[:, lo:hi]))
    assert packed[:, bounds[-1] :].eq(0).all()


@EACH_CHOICE
def test_padded_rows_equal_rows_alone_and_padding_leaks_nothing(choice):
    layer, lengths = make_layer(**choice), [T, 0, 1, 30]
    x = draw(4, T, LAYER["dim"], seed=18)
    for row, length in enumerate(lengths):
        x[row, length:] = float("nan")
    x.requires_grad_()
    y = layer(x, lengths=int32(*lengths))
    weight = draw(*y.shape, seed=19)
    (y * weight).sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    grad_x, x.grad = x.grad, None
    layer.zero_grad()
    for row, length in enumerate(lengths):
        assert y[row, length:].eq(0).all()
        assert grad_x[row, length:].eq(0).all()
        if length:
            alone = x[row : row + 1, :length].detach().requires_grad_()
            y_alone = layer(alone)
            close(y[row : row + 1, :length], y_alone)
            (y_alone * weight[row : row + 1, :length]).sum().backward()
            close(grad_x[row : row + 1, :length], alone.grad)
    for name, parameter in layer.named_parameters():
        close(grads[name], parameter.grad)


# --- gate statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["plain", "packed", "lengths"])
def test_statistics_of_gates_at_the_start(where):
    model = NSALanguageModel(NSAConfig(**MODEL))
    arguments = {
        "plain": (draw_ids(2, T), {}),
        "packed": (draw_ids(1, T), {"cu_seqlens": int32(0, 3, 30)}),
        "lengths": (draw_ids(2, T), {"lengths": int32(T, 5)}),
    }
    ids, layout = arguments[where]
    statistics = model.gate_statistics(ids, **layout)
    assert len(statistics) == MODEL["n_layers"]
    for layer in statistics:
        close(layer.mean, torch.full((3,), 1 / 3), 1e-6)
        close(layer.std, torch.zeros(3), 1e-6)
        close(layer.share, torch.full((3,), 1 / 3), 1e-6)
        close(layer.entropy, torch.tensor(math.log(3)), 1e-6)
        assert layer.collapse == 0


def test_saturated_gates_collapse():
    model = NSALanguageModel(NSAConfig(**MODEL))
    model.layers[1].attn.gate.fc2.bias.data.copy_(torch.tensor([0.0, 30.0, 0.0]))
    first, second = model.gate_statistics(draw_ids(2, T))
    assert first.collapse == 0 and second.collapse == 1
    close(second.share, torch.tensor([0.0, 1.0, 0.0]), 1e-6)
    close(second.entropy, torch.tensor(0.0), 1e-6)


def test_statistics_of_gates_by_hand():
    gates = torch.tensor([[0.95, 0.03, 0.02], [0.5, 0.25, 0.25], [0.2, 0.2, 0.4], [9, 9, math.nan]]).view(1, 4, 1, 3)
    statistics = gate_statistics(gates, torch.tensor([[True, True, True, False]]))
    shares = torch.tensor([[0.95, 0.03, 0.02], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])
    close(statistics.mean, gates[0, :3, 0].mean(0), 1e-6)
    close(statistics.std, gates[0, :3, 0].std(0, correction=0), 1e-6)
    close(statistics.share, shares.mean(0), 1e-6)
    close(statistics.entropy, -(shares * shares.log()).sum(-1).mean(), 1e-6)
    close(statistics.collapse, torch.tensor(1 / 3), 1e-6)


def test_statistics_leave_out_padding():
    model, ids = make_model(), draw_ids(2, T)
    other = torch.cat((ids[:, :30], draw_ids(2, T - 30, seed=1)), 1)
    lengths = int32(30, 12)
    for one, two in zip(
        model.gate_statistics(ids, None, lengths), model.gate_statistics(other, None, lengths), strict=True
    ):
        for a, b in zip(one, two, strict=True):
            close(a, b)
    assert model.gate_statistics(ids)[0].mean.sub(model.gate_statistics(other)[0].mean).abs().max() > 1e-6


# --- block and model -------------------------------------------------------------------------------------------------


def normalize(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["plain", "small"])
@torch.no_grad()
def test_block_is_attention_and_mlp_with_norms_and_residuals(scale):
    """Small inputs show the epsilon of the norms."""
    block = make_model().layers[0]
    assert isinstance(block, LlamaBlockNSA) and isinstance(block.attn, NSAAttention)
    x = draw(2, T, LAYER["dim"], seed=20) * scale
    weight = block.state_dict()
    middle = x + block.attn(normalize(x, weight["norm_attn.weight"]))
    hidden = silu(normalize(middle, weight["norm_mlp.weight"]) @ weight["mlp.up.weight"].T)
    close(block(x), middle + hidden @ weight["mlp.down.weight"].T)


def test_block_takes_the_sizes_of_the_layer():
    sizes = (LAYER[name] for name in ("dim", "n_heads", "n_kv_groups", "d_k", "d_v", "l", "d", "l_sel", "n_sel", "w"))
    block = LlamaBlockNSA(*sizes, phi="mlp")
    assert block.attn.config == NSAAttention(**LAYER, phi="mlp").config
    assert block.mlp.up.weight.shape == (4 * LAYER["dim"], LAYER["dim"])
    assert block.mlp.up.bias is None and block.mlp.down.bias is None
    assert sorted(name for name in block.state_dict() if not name.startswith("attn.")) == sorted(BLOCK)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
@torch.no_grad()
def test_model_is_embedding_blocks_norm_and_head(attention):
    model, ids = make_model(attention=attention), draw_ids(2, T)
    x = model.embed.weight[ids]
    for layer in model.layers:
        x = layer(x)
    expected = normalize(x, model.norm.weight) @ model.head.weight.T
    close(model(ids), expected)
    close(model(ids, last_only=True), expected[:, -1:])
    lengths = int32(9, T)
    close(model(ids, lengths=lengths, last_only=True)[:, 0], model(ids, lengths=lengths)[[0, 1], [8, T - 1]])


@torch.no_grad()
def test_branch_argument_reaches_every_layer():
    model, ids = make_model(), draw_ids(1, T)
    x = model.embed(ids)
    for layer in model.layers:
        x = layer(x, branch="win")
    close(model(ids, branch="win"), model.head(model.norm(x)))


def manual_loss(model: NSALanguageModel, sequences: list[Tensor]) -> Tensor:
    """Mean over all next tokens of all sequences of -log p."""
    losses = []
    for ids in sequences:
        if len(ids) > 1:
            p = model(ids[None])[0].exp()
            p = p / p.sum(-1, keepdim=True)
            losses += [-p[i, token].log() for i, token in enumerate(ids[1:].tolist())]
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
@torch.no_grad()
def test_loss_is_the_mean_cross_entropy_of_next_tokens(attention):
    model, ids = make_model(attention=attention), draw_ids(3, T)
    close(model.loss(ids), manual_loss(model, list(ids)))
    lengths = [T, 1, 17]
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    close(model.loss(ids, lengths=int32(*lengths)), manual_loss(model, rows))
    bounds = [0, 1, 1, 14, 15, 38]
    pieces = [ids[0, lo:hi] for lo, hi in pairwise(bounds)]
    close(model.loss(ids[:1], cu_seqlens=int32(*bounds)), manual_loss(model, pieces))


def test_loss_without_a_target_is_refused():
    model, ids = make_model(), draw_ids(2, T)
    with pytest.raises(ValueError, match="ids: expected a sequence of at least 2 tokens"):
        model.loss(ids, lengths=int32(1, 0))


@pytest.mark.parametrize("changes", [{}, {"n_kv_groups": 6}, {"n_kv_groups": 1}], ids=["gqa", "mha", "mqa"])
@torch.no_grad()
def test_dense_attention_is_full_attention(changes):
    attn = make_model(attention="dense", **changes).layers[0].attn
    x, n, g = draw(2, T, LAYER["dim"], seed=21), LAYER["n_heads"], attn.config.n_kv_groups

    def attend(x: Tensor) -> Tensor:
        q, k, v = (
            (x @ weight.T).unflatten(-1, (heads, -1))
            for weight, heads in ((attn.W_Q.weight, n), (attn.W_K.weight, g), (attn.W_V.weight, g))
        )
        q, k = (oracle.apply_rope(y, torch.arange(x.shape[1])) for y in (q, k))
        k, v = (y.repeat_interleave(n // g, dim=2) for y in (k, v))
        o = scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
        return o.transpose(1, 2).flatten(2) @ attn.out.weight.T

    close(attn(x), attend(x))
    bounds = [0, 3, 3, 33, 38]
    packed = attn(x[:1], cu_seqlens=int32(*bounds))
    for lo, hi in pairwise(bounds):
        if hi > lo:
            close(packed[:, lo:hi], attend(x[:1, lo:hi]))
    assert packed[:, 38:].eq(0).all()
    x[1, 30:] = float("nan")
    padded = attn(x, lengths=int32(T, 30))
    close(padded[1:, :30], attend(x[1:, :30]))
    assert padded[1, 30:].eq(0).all()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True}, {"phi": "mlp", "gate": "sigmoid", "tie_kv": True}, {"attention": "dense"}],
    ids=["plain", "tied-embeddings", "mlp-sigmoid-tied", "dense"],
)
def test_saved_model_comes_back(tmp_path, changes):
    model, ids = make_model(torch.float32, **changes), draw_ids(2, T)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = NSALanguageModel.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded(ids).equal(model(ids))
    assert (loaded.head.weight is loaded.embed.weight) == bool(changes.get("tie_embeddings"))
    half = NSALanguageModel.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (half.head.weight is half.embed.weight) == bool(changes.get("tie_embeddings"))


def test_config_is_saved_with_its_format_version(tmp_path):
    model = make_model(torch.float32)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == dataclasses.asdict(model.config)
    assert saved["format_version"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 2}, "format_version: expected 1, got 2"),
        ({"colour": "red"}, "config: expected .* got colour"),
        ({"vocab_size": 30}, "folder: expected weights that fit .*config.json"),
        ({"n_layers": 3}, "folder: expected weights that fit .*config.json"),
        ({"n_layers": 1}, "folder: expected weights that fit .*config.json"),
        ({"phi": "mlp"}, "folder: expected weights that fit .*config.json"),
        ({"n_heads": 5}, "n_heads: expected a multiple of n_kv_groups = 2, got 5"),
    ],
    ids=["version", "unknown-name", "shape", "missing-weights", "extra-weights", "other-weights", "value"],
)
def test_saved_model_that_does_not_fit_is_refused(tmp_path, changes, message):
    make_model(torch.float32).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        NSALanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_folder_without_a_model_is_refused(tmp_path, name):
    make_model(torch.float32).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"folder: expected one with {name} .* got {tmp_path}"):
        NSALanguageModel.from_pretrained(tmp_path)
