"""Triton kernels and their launchers, imported only where they run."""
