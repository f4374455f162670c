"""Static caches, and prefill and decode steps over them."""
