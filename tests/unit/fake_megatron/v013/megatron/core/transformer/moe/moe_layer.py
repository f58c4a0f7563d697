from megatron.core.transformer.moe.router import TopKRouter
from torch import nn


class MoELayer(nn.Module):
    def __init__(self, config, submodules=None, layer_number=None, model_comm_pgs=None):
        super().__init__()
        self.router = TopKRouter(config=config, model_comm_pgs=model_comm_pgs)
        if layer_number is not None:
            self.set_layer_number(layer_number)

    def set_layer_number(self, layer_number):
        self.router.set_layer_number(layer_number)

    def forward(self, x):
        return self.router(x)
