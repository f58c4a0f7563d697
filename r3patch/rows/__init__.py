"""Rows: what a rollout sent, up to the rows of this rank. Knows no Megatron."""
