from abc import ABC

import torch
from torch import nn


class Router(ABC, nn.Module):
    def __init__(self, config, pg_collection=None, is_mtp_layer=False, layer_number=None):
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        self.is_mtp_layer = is_mtp_layer
        self.mtp_layer_number = None
        self.weight = nn.Parameter(torch.zeros(4, 2))

    def set_layer_number(self, layer_number):
        self.layer_number = layer_number


class TopKRouter(Router):
    def __init__(self, config, pg_collection=None, is_mtp_layer=False, layer_number=None):
        super().__init__(config, pg_collection, is_mtp_layer, layer_number)
        self.router_replay = None
        # The first layers of some models route by token id; an MTP layer never does.
        hash_layers = getattr(config, "moe_n_hash_layers", 0)
        self.is_hash_layer = not is_mtp_layer and (layer_number or 0) <= hash_layers

    def _hash_routing(self, logits, input_ids):
        return logits, input_ids

    def routing(self, logits, padding_mask=None, input_ids=None, packed_seq_params=None):
        return torch.topk(logits, 2)

    def forward(self, input, padding_mask=None, input_ids=None, packed_seq_params=None):
        return self.routing(input @ self.weight.t(), padding_mask, input_ids, packed_seq_params)


class InferenceTopKRouter(TopKRouter):
    def __init__(self, config, pg_collection=None, is_mtp_layer=False, layer_number=None):
        super().__init__(config, pg_collection, is_mtp_layer, layer_number)
