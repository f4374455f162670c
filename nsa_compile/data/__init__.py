"""Text to token shards, packing, sampling order: files in, batches by (seed, step) out."""

from nsa_compile.data.batches import Batch, PackedBatches, prefetch
from nsa_compile.data.build import BuildProgress, build_shards
from nsa_compile.data.shards import Corpus, TokenShards, open_shards, unigram_entropy
from nsa_compile.data.sources import find_text
from nsa_compile.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "BuildProgress",
    "ByteTokenizer",
    "Corpus",
    "FileTokenizer",
    "PackedBatches",
    "TokenShards",
    "Tokenizer",
    "build_shards",
    "find_text",
    "load_tokenizer",
    "open_shards",
    "prefetch",
    "unigram_entropy",
]
