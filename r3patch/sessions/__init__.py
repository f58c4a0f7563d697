"""Sessions: the time of a ``with`` block in which routers record or replay."""
