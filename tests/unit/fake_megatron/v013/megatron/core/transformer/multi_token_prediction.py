from megatron.core.transformer.spec_utils import build_module
from torch import nn


class MultiTokenPredictionLayer(nn.Module):
    def __init__(self, config, submodules, layer_number=1, vp_stage=None, model_comm_pgs=None):
        super().__init__()
        self.transformer_layer = build_module(submodules, config=config)

    def forward(self, x):
        return self.transformer_layer(x)


class MultiTokenPredictionBlock(nn.Module):
    def __init__(self, config, spec, vp_stage=None, model_comm_pgs=None):
        super().__init__()
        self.layers = nn.ModuleList(
            build_module(layer, config=config, layer_number=depth)
            for depth, layer in enumerate(spec.submodules, start=1)
        )

    def forward(self, x):
        return [layer(x) for layer in self.layers]
