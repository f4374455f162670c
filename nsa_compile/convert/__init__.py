"""Dense models of transformers turned into Native Sparse Attention."""
