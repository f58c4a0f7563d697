"""Observe: what sessions did, written down and read again."""
