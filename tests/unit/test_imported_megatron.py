"""Which Megatron a message speaks of."""

from __future__ import annotations

from collections.abc import Callable


def test_a_message_names_the_megatron_that_is_imported(fresh: Callable[..., str]) -> None:
    """By its own version and folder; another distribution of the name may lie on the path."""
    fresh(
        """
        import megatron.core
        import megatron.core.transformer.moe.router
        import megatron.core.transformer.multi_token_prediction as mtp
        megatron.core.__version__ = "9.9.9"
        del mtp.MultiTokenPredictionLayer
        import r3patch
        detail = r3patch.status().targets[-1].detail
        assert f"(megatron-core 9.9.9 in {megatron.core.__path__[0]})" in detail, detail
        """
    )
