from megatron.core.transformer.moe.router import TopKRouter
from torch import nn


class MoELayer(nn.Module):
    def __init__(
        self, config, submodules=None, layer_number=None, pg_collection=None, is_mtp_layer=False
    ):
        super().__init__()
        self.router = (submodules or TopKRouter)(
            config=config,
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            layer_number=layer_number,
        )
        if layer_number is not None:
            self.set_layer_number(layer_number)

    def set_layer_number(self, layer_number):
        self.router.set_layer_number(layer_number)

    def forward(self, x):
        return self.router(x)
