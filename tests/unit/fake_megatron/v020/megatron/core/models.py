import functools

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn


class GPTModel(nn.Module):
    """A decoder of MoE layers and an MTP block, built from one shared layer spec."""

    def __init__(self, config, mlp=None, layer=MultiTokenPredictionLayer):
        super().__init__()
        self.config = config
        mlp = mlp or functools.partial(MoELayer)
        spec = ModuleSpec(TransformerLayer, mlp)
        self.decoder = nn.ModuleList(
            TransformerLayer(config, mlp, layer_number=number)
            for number in range(1, config.num_layers + 1)
        )
        depths = [ModuleSpec(layer, spec)] * config.mtp_num_layers
        self.mtp = MultiTokenPredictionBlock(config, ModuleSpec(None, depths))

    def forward(self, x):
        return [layer(x) for layer in self.decoder], self.mtp(x)
