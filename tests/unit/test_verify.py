"""A model's routers: found, labelled afterwards, and verified against what can contradict."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Fresh = Callable[..., str]


def test_a_borrowed_decoder_layer_stays_main(fresh: Fresh) -> None:
    """An MTP layer that holds a layer of the decoder does not relabel it, and verify agrees."""
    fresh(
        """
        import r3patch, probe
        from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
        decoder = probe.build(mtp_num_layers=0)

        class Borrows(MultiTokenPredictionLayer):
            def __init__(self, config, submodules, layer_number, **kwargs):
                super().__init__(config, submodules, layer_number)
                self.shared = decoder.decoder[-1]

        model = probe.build(layer=Borrows)
        assert r3patch.scope_of(decoder.decoder[-1].mlp.router) == "main"
        for order in ([decoder, model], [model, decoder]):
            infos = r3patch.verify(order)
            assert [i.scope for i in infos].count("main") == 4
            assert [i.name for i in infos if i.module is decoder.decoder[-1].mlp.router] == [
                f"chunk{order.index(decoder)}.decoder.1.mlp.router"]
        """
    )


def test_a_layer_that_mtp_shares_is_named_by_its_decoder(fresh: Fresh) -> None:
    """Also where the MTP block stands before the decoder among the modules of one chunk."""
    fresh(
        """
        import r3patch, probe
        model = probe.build()
        model.mtp.layers[0].shared = model.decoder[-1]
        model._modules = dict(reversed(model._modules.items()))
        found = [i for i in r3patch.verify(model) if i.module is model.decoder[-1].mlp.router]
        assert [(i.scope, i.name) for i in found] == [("main", "decoder.1.mlp.router")]
        """
    )


def test_a_decoder_layer_copied_in_an_mtp_constructor_is_a_conflict(fresh: Fresh) -> None:
    """A copy runs no constructor and keeps 'main': verify raises, label(model) corrects it."""
    fresh(
        """
        import copy, r3patch, probe
        from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
        layer = probe.build(mtp_num_layers=0).decoder[-1]

        class Copies(MultiTokenPredictionLayer):
            def __init__(self, config, submodules, layer_number, **kwargs):
                super().__init__(config, submodules, layer_number)
                self.mtp_model_layer = copy.deepcopy(layer)

        model = probe.build(layer=Copies)
        try:
            r3patch.verify(model)
        except r3patch.ScopeConflictError as error:
            assert "labelled 'main', but part of an MTP module or flagged " in str(error)
            assert "mtp.layers.0.mtp_model_layer.mlp.router, mtp.layers.1." in str(error)
            assert "call r3patch.label(model)" in str(error)
        else:
            raise AssertionError("verify passed")
        assert [i.scope for i in r3patch.label(model)] == ["main", "main", "mtp", "mtp"]
        r3patch.verify(model)
        """
    )


HEAD = """
        import r3patch, probe
        from torch import nn
        from types import SimpleNamespace as Config
        from megatron.core.transformer.moe.moe_layer import MoELayer

        class Model(nn.Module):
            def __init__(self, head=None, numbers=(1, 2), **flags):
                super().__init__()
                config = Config(num_layers=2)
                self.decoder = nn.ModuleList(MoELayer(config, layer_number=n) for n in numbers)
                self.head = (head or self.build)(config, **flags)

            def build(self, config, **flags):
                return MoELayer(config, layer_number=1, **flags)

        def error_of(function, *args):
            try:
                function(*args)
            except r3patch.R3PatchError as error:
                return type(error).__name__ + ": " + str(error)
            raise AssertionError("passed")
"""


def test_a_custom_head_built_inside_building(fresh: Fresh) -> None:
    """building('mtp') labels a head without Megatron's MTP classes; verify accepts it."""
    fresh(
        HEAD
        + """
        def head(config):
            with r3patch.building("mtp"):
                return MoELayer(config, layer_number=1)
        model = Model(head)
        assert [i.scope for i in r3patch.verify(model)] == ["main", "main", "mtp"]
        assert [i.scope for i in r3patch.label(model)] == ["main", "main", "mtp"]  # kept
        """
    )


def test_a_custom_head_labelled_afterwards(fresh: Fresh) -> None:
    """Unmarked, its layer number betrays it; label(head, scope='mtp') settles it."""
    fresh(
        HEAD
        + """
        model = Model()
        text = error_of(r3patch.verify, model)
        assert "ScopeConflictError: 2 main routers of one model share a layer number" in text
        assert "decoder.0.router (layer 1), head.router (layer 1)" in text
        assert "r3patch.label(head, scope='mtp')" in text
        assert [i.scope for i in r3patch.label(model.head, scope="mtp")] == ["mtp"]
        assert [i.scope for i in r3patch.verify(model)] == ["main", "main", "mtp"]
        """
    )


def test_megatrons_own_flag_is_heard_when_true(fresh: Fresh) -> None:
    """A True is_mtp_layer contradicts 'main', and label(model) follows it; False says nothing."""
    fresh(
        HEAD
        + """
        model = Model(numbers=(1,), is_mtp_layer=True)
        text = error_of(r3patch.verify, model)
        assert text.startswith("ScopeConflictError: labelled 'main', but part of an MTP module or ")
        assert ": head.router." in text
        assert [i.scope for i in r3patch.label(model)] == ["main", "mtp"]
        r3patch.verify(model)
        """
    )


@pytest.mark.parametrize("numbers", ["(1, 3)", "(0, 1)", "(None, 1)"])
def test_a_main_router_with_a_number_outside_the_model(fresh: Fresh, numbers: str) -> None:
    """The layer number of a main router is one of 1..num_layers."""
    fresh(
        HEAD
        + f"""
        text = error_of(r3patch.verify, Model(lambda config: None, numbers={numbers}))
        assert text.startswith(
            "ScopeConflictError: main routers with a layer number outside 1..2 (num_layers"), text
        """
    )


def test_the_same_number_in_two_chunks_is_no_conflict(fresh: Fresh) -> None:
    """Layer numbers must differ within a chunk; a list may hold two models."""
    fresh(
        HEAD
        + """
        model, other = (Model(lambda config: None) for _ in "ab")
        infos = r3patch.verify([model, other])
        assert [i.name for i in infos] == [
            f"chunk{c}.decoder.{i}.router" for c in (0, 1) for i in (0, 1)]
        assert len(r3patch.routers([model, model])) == 2
        """
    )


def test_models_built_before_the_import(fresh: Fresh) -> None:
    """verify names the unlabelled routers; label(model) labels them from their ancestors."""
    fresh(
        """
        import probe
        from torch import nn
        model = probe.build(num_layers=9)
        import r3patch
        try:
            r3patch.verify(model)
        except r3patch.UnlabelledRouterError as error:
            assert str(error).startswith(
                "11 of 11 routers have no scope label: decoder.0.mlp.router, ")
            assert "and 3 more" in str(error) and "call r3patch.label(model)" in str(error)
        else:
            raise AssertionError("verify passed")

        class Wrapper(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

        wrapped = Wrapper(Wrapper(model))
        assert [i.scope for i in r3patch.label([wrapped])] == ["main"] * 9 + ["mtp"] * 2
        assert r3patch.verify(wrapped)[0].name == "module.module.decoder.0.mlp.router"
        assert [i.scope for i in r3patch.routers(wrapped, "mtp")] == ["mtp"] * 2
        """
    )


def test_a_router_that_bypasses_the_constructor(fresh: Fresh) -> None:
    """A class that does not call TopKRouter.__init__ has no label, and verify names its router."""
    fresh(
        """
        import r3patch
        from torch import nn
        from megatron.core.transformer.moe.router import TopKRouter

        class Bypasses(TopKRouter):
            def __init__(self):
                nn.Module.__init__(self)

        try:
            r3patch.verify(nn.ModuleDict({"odd": Bypasses(), "good": TopKRouter(None)}))
        except r3patch.UnlabelledRouterError as error:
            assert "1 of 2 routers have no scope label: odd." in str(error)
            assert "or by a class that bypasses TopKRouter.__init__" in str(error)
        else:
            raise AssertionError("verify passed")
        """
    )


def test_routers_of_a_scope_refuse_unlabelled_ones(fresh: Fresh) -> None:
    """Asking for main routers never leaves out one that might be."""
    said = fresh(
        """
        import probe
        model = probe.build()
        import r3patch
        assert [i.scope for i in r3patch.routers(model)] == [None] * 4
        for scope in ("main", "all"):
            try:
                r3patch.routers(model, scope)
            except (r3patch.UnlabelledRouterError, ValueError) as error:
                print(type(error).__name__)
        """
    )
    assert said == "UnlabelledRouterError\nValueError\n"


def test_what_is_no_model_is_refused(fresh: Fresh) -> None:
    """A state dict, or anything else that is no module, is a TypeError."""
    fresh(
        """
        import r3patch, torch
        for bad in ({}, [torch.nn.Linear(1, 1), None]):
            try:
                r3patch.routers(bad)
            except TypeError as error:
                assert "expected a torch module or a list of them" in str(error)
            else:
                raise AssertionError("passed")
        assert r3patch.routers(torch.nn.Linear(1, 1)) == r3patch.verify([]) == []
        """
    )
