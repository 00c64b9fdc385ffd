"""Speed and memory of the fused losses against the best dense formulations."""
