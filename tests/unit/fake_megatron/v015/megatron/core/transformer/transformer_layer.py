from megatron.core.transformer.spec_utils import build_module
from torch import nn


class TransformerLayer(nn.Module):
    def __init__(self, config, submodules, layer_number=1):
        super().__init__()
        self.layer_number = layer_number
        self.mlp = build_module(submodules, config=config)
        if hasattr(self.mlp, "set_layer_number"):
            self.mlp.set_layer_number(self.layer_number)

    def forward(self, x):
        return self.mlp(x)
