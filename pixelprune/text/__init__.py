"""Conversations as text and token ids: a tokenizer and its chat template called many times, stage by stage."""
