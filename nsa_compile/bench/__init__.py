"""Timings of every branch and the whole beside the alternatives: what `nsa-compile bench` runs."""
