"""`nsa-compile profile`: traces of training, prefill and decode, and their summaries."""
