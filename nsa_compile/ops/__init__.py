"""Pure functions in torch and einops: the specification one can read, and the judge of every kernel."""
