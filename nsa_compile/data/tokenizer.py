"""Text to token ids: bytes as they are, or a file of the package `tokenizers`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEPARATOR = 0
"""The byte that ends a document; text has no such byte."""
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|end|>", "</s>", "<eos>", "[EOS]", "[SEP]")
"""Names under which a tokenizer file is looked through for a token that ends a document, in this order."""
PIECE = 2**20
"""Characters that a tokenizer file encodes at once: the library takes about a hundred bytes for each of them."""


class ByteTokenizer:
    """Every byte is a token; a zero byte ends a document."""

    unit = "byte"
    vocab_size = 256
    end_token = SEPARATOR
    digest = "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        """The text's bytes, uint8 [n]."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens."""
        return bytes(tokens)


class FileTokenizer:
    """A `tokenizer.json` as the package `tokenizers` writes it.

    Special tokens that a document spells out are text like any other, and nothing is added, cut or padded. Texts of
    more than 2^20 characters are encoded in pieces that end with a line, so that memory stays bounded.

    Args:
        path: the file.
        end_token: the token after each document; by default the first of `END_TOKENS` that the file knows.

    Raises: ImportError without the package; OSError or ValueError for a file that cannot be read, or has no such token.
    """

    unit = "token"

    def __init__(self, path: str | Path, end_token: str | None = None) -> None:
        tokenizers = _import_tokenizers()
        content = Path(path).read_bytes()
        try:
            self.model: Any = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises Exception itself
            raise ValueError(f"tokenizer: expected a file of the package tokenizers, got {path}: {error}") from error
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True
        names = END_TOKENS if end_token is None else (end_token,)
        end = next((i for name in names if (i := self.model.token_to_id(name)) is not None), None)
        if end is None:
            raise ValueError(f"end_token: expected a token of {path}, got none named {' or '.join(map(repr, names))}")
        self.content = content
        self.end_token: int = end
        self.vocab_size: int = max(self.model.get_vocab(with_added_tokens=True).values()) + 1
        self.digest = f"{hashlib.sha256(content).hexdigest()} {end}"

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of UTF-8 text, uint32 [n]."""
        pieces = [self.model.encode(piece, add_special_tokens=False).ids for piece in _pieces(text.decode())]
        return np.concatenate([np.asarray(ids, np.uint32) for ids in pieces]) if pieces else np.empty(0, np.uint32)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens, special ones spelled out."""
        return self.model.decode([int(token) for token in tokens], skip_special_tokens=False).encode()

    def end_name(self) -> str:
        """The name of the token that ends a document."""
        return self.model.id_to_token(self.end_token)


Tokenizer = ByteTokenizer | FileTokenizer


def load_tokenizer(path: str | Path | None, *, end_token: str | None = None) -> Tokenizer:
    """Bytes for None, else a `FileTokenizer`; raises what that raises, and ValueError for an `end_token` of bytes."""
    if path is not None:
        return FileTokenizer(path, end_token)
    if end_token is not None:
        raise ValueError(f"end_token: expected None without a tokenizer file (a zero byte ends it), got {end_token!r}")
    return ByteTokenizer()


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "tokenizer: expected the package tokenizers for a tokenizer file; pip install 'nsa-compile[train]'"
        ) from error
    return tokenizers


def _pieces(text: str) -> list[str]:
    """The text in pieces of about `PIECE` characters, each but the last ending with a line, where there are lines."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        line = text.rfind("\n", start, start + PIECE) + 1
        stop = line or start + PIECE
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]] if start < len(text) else pieces
