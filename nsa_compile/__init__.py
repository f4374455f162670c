"""Native Sparse Attention (arXiv 2502.11089) for people who write torch.compile(model)."""

import importlib.metadata

from nsa_compile.config import NSAConfig
from nsa_compile.convert.model import convert, load_converted
from nsa_compile.custom_ops.block_choice import select_blocks
from nsa_compile.custom_ops.compression import compress_mean, compressed_attention
from nsa_compile.custom_ops.gating import gated_sum
from nsa_compile.custom_ops.nsa import nsa_attention
from nsa_compile.custom_ops.rope import apply_rope
from nsa_compile.custom_ops.selection import selected_attention
from nsa_compile.custom_ops.window import window_attention
from nsa_compile.generate import Generation, generate
from nsa_compile.graphs.cache import NSACache
from nsa_compile.graphs.decode import DecodeGraph, RowUpdate
from nsa_compile.graphs.prefill import PrefillGraph
from nsa_compile.graphs.program import export_program
from nsa_compile.model import LlamaBlockNSA, NSALanguageModel
from nsa_compile.module import GateMLP, NSAAttention, set_impl
from nsa_compile.ops.gating import GateStatistics, gate_statistics
from nsa_compile.ops.layout import num_cmp
from nsa_compile.ops.sampling import sample
from nsa_compile.ops.selection import RangeStatistics, TokenReads, range_statistics, selection_ranges, token_reads
from nsa_compile.parallel import ParallelLanguageModel, clip_grad_norm, make_mesh, parallelize

try:
    __version__ = importlib.metadata.version("nsa-compile")
except importlib.metadata.PackageNotFoundError:  # run from its source, nothing is installed
    __version__ = "0+unknown"

__all__ = [
    "DecodeGraph",
    "GateMLP",
    "GateStatistics",
    "Generation",
    "LlamaBlockNSA",
    "NSAAttention",
    "NSACache",
    "NSAConfig",
    "NSALanguageModel",
    "ParallelLanguageModel",
    "PrefillGraph",
    "RangeStatistics",
    "RowUpdate",
    "TokenReads",
    "apply_rope",
    "clip_grad_norm",
    "compress_mean",
    "compressed_attention",
    "convert",
    "export_program",
    "gate_statistics",
    "gated_sum",
    "generate",
    "load_converted",
    "make_mesh",
    "nsa_attention",
    "num_cmp",
    "parallelize",
    "range_statistics",
    "sample",
    "select_blocks",
    "selected_attention",
    "selection_ranges",
    "set_impl",
    "token_reads",
    "window_attention",
]
