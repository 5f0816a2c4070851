"""The installed transformers' Llama of the same shape as a model of this project."""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_bipe.config.schema import ModelConfig

PEER = "transformers, LlamaForCausalLM"


def make_peer(model: ModelConfig, longest_tokens: int) -> nn.Module:
    """With SDPA and new weights; it computes its own loss from `labels`."""
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=longest_tokens,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)
