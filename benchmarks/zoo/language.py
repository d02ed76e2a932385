"""Language models: decoders, mixtures of experts, encoders, encoder-decoders, state spaces."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.zoo.configuration import Architecture, Batch, padded_text, text, tokens


def build(
    model: Callable[[Any], nn.Module], config: Callable[..., Any], checkpointed: bool = False, **sizes: Any
) -> Any:
    """The model of a configuration, its blocks recomputed in backward if asked."""
    made: Any = model(config(**sizes))
    if checkpointed:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def _decoder(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


def _classified(batch: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    padded = padded_text(batch, length, vocabulary)
    return {**padded, "labels": torch.randint(0, 2, (batch,))}


def _pairs(batch: int, source: int, target: int, vocabulary: int) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(batch, source, vocabulary), "labels": tokens(batch, target, vocabulary)}


def _text(batch: int, length: int, vocabulary: int) -> Batch:
    return partial(text, batch, length, vocabulary)


LLAMA = Architecture("llama")
MISTRAL = Architecture("mistral", held_out=True)
GEMMA2 = Architecture("gemma2", held_out=True)
QWEN3 = Architecture("qwen3")
GPT2 = Architecture("gpt2")
OPT = Architecture("opt")
NEOX = Architecture("gpt-neox")
PHI = Architecture("phi", held_out=True)
MIXTRAL = Architecture("mixtral")
QWEN3_MOE = Architecture("qwen3-moe", held_out=True)
BERT = Architecture("bert")
MODERNBERT = Architecture("modernbert")
DEBERTA = Architecture("deberta", held_out=True)
T5 = Architecture("t5")
BART = Architecture("bart", held_out=True)
MAMBA = Architecture("mamba")
MAMBA2 = Architecture("mamba2", held_out=True)

_LLAMA_SMALL = partial(build, LlamaForCausalLM, LlamaConfig, use_cache=False, **_decoder(1024, 2816, 12, 16, 4, 32000))
_LLAMA_WIDE = partial(
    build, LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True, **_decoder(2048, 8192, 6, 32, 8, 128256)
)
_MISTRAL = partial(
    build, MistralForCausalLM, MistralConfig, sliding_window=512, **_decoder(1536, 5376, 8, 12, 4, 32768)
)
_GEMMA2 = partial(
    build,
    Gemma2ForCausalLM,
    Gemma2Config,
    head_dim=256,
    sliding_window=512,
    query_pre_attn_scalar=256,
    attn_implementation="eager",  # what its authors recommend: the others leave the soft cap out
    use_cache=False,
    **_decoder(1024, 4096, 8, 8, 4, 64000),
)
_QWEN3 = partial(
    build,
    Qwen3ForCausalLM,
    Qwen3Config,
    head_dim=128,
    tie_word_embeddings=True,
    **_decoder(1024, 3072, 8, 16, 8, 151936),
)
_GPT2 = partial(build, GPT2LMHeadModel, GPT2Config)
_OPT = partial(
    build,
    OPTForCausalLM,
    OPTConfig,
    hidden_size=1024,
    ffn_dim=4096,
    num_hidden_layers=12,
    num_attention_heads=16,
    word_embed_proj_dim=1024,
    use_cache=False,
)
_NEOX = partial(
    build,
    GPTNeoXForCausalLM,
    GPTNeoXConfig,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=12,
    num_attention_heads=8,
    vocab_size=50304,
    use_cache=False,
)
_PHI = partial(
    build,
    PhiForCausalLM,
    PhiConfig,
    partial_rotary_factor=0.5,
    resid_pdrop=0.1,
    use_cache=False,
    **_decoder(1280, 5120, 10, 20, 20, 51200),
)
_MIXTRAL = partial(
    build,
    MixtralForCausalLM,
    MixtralConfig,
    num_local_experts=8,
    use_cache=False,
    **_decoder(1024, 2048, 4, 16, 4, 32000),
)
_QWEN3_MOE = partial(
    build,
    Qwen3MoeForCausalLM,
    Qwen3MoeConfig,
    moe_intermediate_size=384,
    num_experts=32,
    num_experts_per_tok=8,
    use_cache=False,
    **_decoder(768, 2048, 6, 12, 4, 100000),
)
_DEBERTA = partial(
    build,
    DebertaV2ForMaskedLM,
    DebertaV2Config,
    vocab_size=128100,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=6,
    num_attention_heads=12,
    relative_attention=True,
    position_buckets=256,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type=["p2c", "c2p"],
)
_T5 = partial(
    build,
    T5ForConditionalGeneration,
    T5Config,
    d_model=768,
    d_ff=2048,
    d_kv=64,
    num_layers=8,
    num_heads=12,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    decoder_start_token_id=0,
)
_MAMBA = partial(
    build, MambaForCausalLM, MambaConfig, hidden_size=768, num_hidden_layers=3, vocab_size=50280, use_cache=False
)
_MAMBA2 = partial(
    build,
    Mamba2ForCausalLM,
    Mamba2Config,
    hidden_size=768,
    num_heads=24,
    head_dim=64,
    state_size=64,
    n_groups=1,
    num_hidden_layers=6,
    vocab_size=50288,
    chunk_size=128,
    use_cache=False,
)

LANGUAGE = (
    *LLAMA.runs("small", _LLAMA_SMALL, _text(4, 1024, 32000), "fp32/adamw amp/adamw/clip amp-fp16/adamw"),
    *LLAMA.runs("wide", _LLAMA_WIDE, _text(2, 1024, 128256), "bf16/adamw bf16/adamw-fused/clip"),
    *LLAMA.runs("recomputed", partial(_LLAMA_WIDE, checkpointed=True), _text(4, 1536, 128256), "bf16/adafactor"),
    *MISTRAL.runs("2k", _MISTRAL, _text(2, 2048, 32768), "bf16/adamw amp/adamw/clip fp32/sgd-momentum"),
    *GEMMA2.runs("1k", _GEMMA2, _text(2, 1024, 64000), "bf16/adamw fp32/adamw-forloop amp/adafactor"),
    *QWEN3.runs("tied", _QWEN3, _text(3, 1000, 151936), "bf16/adamw amp/adamw"),
    *QWEN3.runs("recomputed", partial(_QWEN3, checkpointed=True), _text(4, 1000, 151936), "bf16/adamw-forloop/clip"),
    *GPT2.runs("124m", _GPT2, _text(6, 1024, 50257), "fp32/adamw/clip amp/adamw amp-fp16/adamw-fused"),
    *GPT2.runs("recomputed", partial(_GPT2, checkpointed=True), _text(8, 777, 50257), "amp/adamw fp32/sgd"),
    *OPT.runs("350m", _OPT, _text(4, 768, 50272), "amp-fp16/adamw/clip bf16/sgd"),
    *NEOX.runs("untied", _NEOX, _text(4, 1024, 50304), "fp32/adamw-fused amp/adamw"),
    *PHI.runs("small", _PHI, _text(4, 900, 51200), "fp32/adamw bf16/adamw/clip"),
    *MIXTRAL.runs("8x2", _MIXTRAL, _text(4, 1024, 32000), "bf16/adamw amp/adamw/clip"),
    *MIXTRAL.runs("balanced", partial(_MIXTRAL, output_router_logits=True), _text(2, 1024, 32000), "fp32/adamw-fused"),
    *QWEN3_MOE.runs("32x8", _QWEN3_MOE, _text(2, 1024, 100000), "bf16/adamw amp/adamw/clip"),
    *BERT.runs("mlm", partial(build, BertForMaskedLM, BertConfig), _text(16, 384, 30522), "fp32/adamw amp/adamw-fused"),
    *BERT.runs(
        "padded",
        partial(build, BertForSequenceClassification, BertConfig, checkpointed=True),
        partial(_classified, 48, 384, 30522),
        "fp32/adamw/clip",
    ),
    *BERT.runs(
        "classifier",
        partial(build, BertForSequenceClassification, BertConfig),
        partial(_classified, 32, 256, 30522),
        "bf16/sgd-momentum amp/adamw",
    ),
    *MODERNBERT.runs(
        "base",
        partial(build, ModernBertForMaskedLM, ModernBertConfig),
        _text(8, 512, 50368),
        "amp/adamw bf16/adamw/clip",
    ),
    *DEBERTA.runs("6", _DEBERTA, _text(8, 384, 128100), "fp32/adamw amp/adamw/clip"),
    *T5.runs("base", _T5, partial(_pairs, 8, 512, 114, 32128), "fp32/adafactor bf16/adamw amp/adamw"),
    *BART.runs(
        "base",
        partial(build, BartForConditionalGeneration, BartConfig, encoder_layers=6, decoder_layers=6, d_model=768),
        partial(_pairs, 8, 512, 128, 50265),
        "fp32/adamw/clip amp-fp16/adamw",
    ),
    *MAMBA.runs("3", _MAMBA, _text(16, 128, 50280), "fp32/adamw bf16/adamw"),
    *MAMBA2.runs("130m", _MAMBA2, _text(2, 512, 50288), "fp32/adamw amp/adamw"),
)
