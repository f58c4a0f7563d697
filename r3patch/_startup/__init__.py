"""What runs before a user's program: for ``r3patch run``, and copied by ``r3patch auto on``.

The folder stands on the PYTHONPATH of what ``r3patch run`` starts, so it holds nothing else.
"""
