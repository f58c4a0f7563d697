from torch import nn


class TransformerLayer(nn.Module):
    def __init__(self, config, submodules, layer_number=1, is_mtp_layer=False):
        super().__init__()
        self.layer_number = layer_number
        try:
            self.mlp = submodules(
                config=config, layer_number=layer_number, is_mtp_layer=is_mtp_layer
            )
        except TypeError:  # a builder of an older kind
            self.mlp = submodules(config)
        if hasattr(self.mlp, "set_layer_number"):
            self.mlp.set_layer_number(self.layer_number)

    def forward(self, x):
        return self.mlp(x)
