"""Serving in vLLM with the pruning a checkpoint was trained with; a plugin on vLLM's public extension points."""
