"""What transformers' generation does not do with Native Sparse Attention."""

from typing import Any, NoReturn

import torch
from transformers import GenerationMixin


class NsaGeneration:
    """Ahead of the library's classes: `generate` as it is within `torch.compile`, no continuous batching."""

    # not a thing to trace: it makes caches, looks at tokens, and compiles its steps itself
    generate: Any = torch.compiler.disable(
        GenerationMixin.generate,
        reason="generate runs as it is and compiles its steps itself; compile the model instead",
    )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it pages keys and values for attention to all of them. Raises ValueError."""
        raise ValueError(
            f"generate_batch: expected a model of dense attention, whose cache can be paged, got {type(self).__name__}"
            ": use generate with a padded batch, or for rows that come and go the DecodeGraph of an NSALanguageModel"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching
