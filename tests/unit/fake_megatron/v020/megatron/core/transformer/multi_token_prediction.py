from megatron.core.transformer.spec_utils import build_module
from torch import nn


class MultiTokenPredictionLayer(nn.Module):
    def __init__(
        self, config, submodules, layer_number=1, vp_stage=None, pg_collection=None, name=None
    ):
        super().__init__()
        self.mtp_model_layer = build_module(
            submodules,
            config=config,
            layer_number=layer_number,
            is_mtp_layer=True,
        )
        for module in self.modules():
            if hasattr(module, "mtp_layer_number"):
                module.mtp_layer_number = layer_number

    def forward(self, x):
        return self.mtp_model_layer(x)


class MultiTokenPredictionBlock(nn.Module):
    def __init__(self, config, spec, vp_stage=None, pg_collection=None, name=None):
        super().__init__()
        self.layers = nn.ModuleList(
            build_module(layer, config=config, layer_number=depth)
            for depth, layer in enumerate(spec.submodules, start=1)
        )

    def forward(self, x):
        return [layer(x) for layer in self.layers]
