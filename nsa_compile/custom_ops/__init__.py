"""The branches as torch.library ops: one graph node each, forward and backward."""
