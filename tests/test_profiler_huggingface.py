"""Profiles from a Hugging Face config.json, and what is said when the file is something else."""

import json
import sys
from typing import Any

import pytest
import torch

from profiler import SourceError, load_source, profile_source

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
SPEECH = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
SPARSE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
SIDES = [f"{side}_{what}" for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")]
BOTH_SIDES = {name: {"layers": 2, "attention_heads": 4, "ffn_dim": 64}[name.partition("_")[2]] for name in SIDES}

MODELS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "LlamaForCausalLM": ("llama", GROUPED, {"input_ids", "labels"}),
    "Qwen3ForCausalLM": ("qwen3", GROUPED, {"input_ids", "labels"}),
    "Gemma2ForCausalLM": ("gemma2", {**GROUPED, "sliding_window": 16}, {"input_ids", "labels"}),
    "Gemma3ForCausalLM": ("gemma3_text", {**GROUPED, "sliding_window": 16}, {"input_ids", "labels"}),
    "MixtralForCausalLM": ("mixtral", {**GROUPED, "num_local_experts": 4}, {"input_ids", "labels"}),
    "DeepseekV3ForCausalLM": ("deepseek_v3", {**TEXT, **LATENT, **SPARSE}, {"input_ids", "labels"}),
    "GPT2LMHeadModel": (
        "gpt2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 2},
        {"input_ids", "labels"},
    ),
    "MambaForCausalLM": ("mamba", {**TEXT, "state_size": 4, "expand": 2}, {"input_ids", "labels"}),
    "BertForMaskedLM": ("bert", TEXT, {"input_ids", "labels"}),
    "BertForSequenceClassification": ("bert", TEXT, {"input_ids", "labels"}),
    "BertForTokenClassification": ("bert", TEXT, {"input_ids", "labels"}),
    "BertForQuestionAnswering": ("bert", TEXT, {"input_ids", "start_positions", "end_positions"}),
    "BertForMultipleChoice": ("bert", TEXT, {"input_ids", "labels"}),
    "BertForPreTraining": ("bert", TEXT, {"input_ids", "labels", "next_sentence_label"}),
    "ModernBertForMaskedLM": ("modernbert", {**TEXT, "local_attention": 16}, {"input_ids", "labels"}),
    "T5ForConditionalGeneration": ("t5", T5, {"input_ids", "labels"}),
    "T5Model": ("t5", T5, {"input_ids", "decoder_input_ids"}),
    "BartForConditionalGeneration": ("bart", {**TEXT, "d_model": 32, **BOTH_SIDES}, {"input_ids", "labels"}),
    "ViTForImageClassification": ("vit", {**TEXT, "image_size": 32, "patch_size": 8}, {"pixel_values", "labels"}),
    "SwinForImageClassification": (
        "swin",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        {"pixel_values", "labels"},
    ),
    "ConvNextForImageClassification": (
        "convnext",
        {"image_size": 32, "hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "drop_path_rate": 0.1},
        {"pixel_values", "labels"},
    ),
    "ResNetForImageClassification": (
        "resnet",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]},
        {"pixel_values", "labels"},
    ),
    "SegformerForSemanticSegmentation": (
        "segformer",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16, "image_size": 64},
        {"pixel_values", "labels"},
    ),
    "CLIPModel": (
        "clip",
        {"text_config": TEXT, "vision_config": {**TEXT, "image_size": 32, "patch_size": 8}, "projection_dim": 16},
        {"input_ids", "pixel_values", "return_loss"},
    ),
    "Wav2Vec2ForCTC": ("wav2vec2", {**TEXT, **SPEECH}, {"input_values", "labels"}),
    "WhisperForConditionalGeneration": (
        "whisper",
        {
            **TEXT,
            **BOTH_SIDES,
            "d_model": 32,
            "num_mel_bins": 8,
            "max_source_positions": 32,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
        },
        {"input_features", "labels"},
    ),
    "BertModel": ("bert", TEXT, {"input_ids"}),
}


@pytest.fixture
def write(tmp_path):
    def config(**content: Any):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content))
        return path

    return config


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_alone_profiles(name, write):
    kind, sizes, keys = MODELS[name]
    speech = "Wav2Vec2" in name
    source = load_source(write(model_type=kind, architectures=[name], **sizes), 4000 if speech else 32)
    assert set(source.example_batch(2)) == keys
    assert all(p.is_meta for p in source.build_abstract().parameters() if p.nbytes > 1 << 20)
    profile = profile_source(source, 2, "amp")
    real = source.build()
    assert profile.parameter_elements == sum(p.numel() for p in real.parameters())
    assert profile.layers[0].type == name
    assert profile.forward_flops > 0
    assert not any("left out" in sentence for sentence in profile.assumptions)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BartForConditionalGeneration", "CLIPModel", "T5Model"])
def test_the_batch_and_the_loss_work_on_the_real_model_too(name, write):
    kind, sizes, _ = MODELS[name]
    source = load_source(write(model_type=kind, architectures=[name], **sizes), 16)
    loss = source.forward(source.build(), next(source.train_batches(2)))
    loss.backward()
    assert loss.isfinite()


def test_a_directory_that_holds_a_configuration_is_named_after_itself(write, tmp_path):
    write(model_type="llama", **GROUPED)
    source = load_source(tmp_path)
    assert source.name == tmp_path.name
    assert any("names no class: LlamaForCausalLM is taken" in s for s in source.assumptions)


def test_a_batch_that_memory_has_no_room_for_is_a_sentence(write):
    source = load_source(write(model_type="llama", **GROUPED))
    with pytest.raises(
        SourceError, match=r"a batch of 1000000000000 samples for LlamaForCausalLM can not be made here"
    ):
        source.example_batch(10**12)


def test_lengths_are_the_configurations_up_to_a_limit_and_those_asked_for(write):
    long = {**GROUPED, "max_position_embeddings": 1 << 17}
    assert load_source(write(model_type="llama", **long)).example_batch(1)["input_ids"].shape == (1, 2048)
    asked = load_source(write(model_type="llama", **GROUPED), 100)
    assert asked.example_batch(1)["labels"].shape == (1, 100)
    assert asked.assumptions[-1] == "sequences of 100 tokens are longer than the configuration's 64"
    encoder = load_source(write(model_type="bert", **{**TEXT, "max_position_embeddings": 4096}))
    assert encoder.example_batch(1)["input_ids"].shape == (1, 512)
    assert "sequences have 512 tokens; --seq changes that" in encoder.assumptions


def test_special_tokens_are_not_drawn(write):
    source = load_source(write(model_type="llama", **{**GROUPED, "vocab_size": 8}))
    tokens = source.example_batch(64)["input_ids"]
    assert set(tokens[:, :-1].unique().tolist()) == {3, 4, 5, 6, 7}
    assert set(tokens[:, -1].tolist()) == {2}


def test_a_model_without_a_loss_is_trained_on_the_mean_of_its_output_and_says_so(write):
    profile = profile_source(load_source(write(model_type="bert", architectures=["BertModel"], **TEXT)), 2)
    assert "BertModel gives no loss: the mean of its first output is trained" in profile.assumptions


def test_what_needs_further_packages_or_code_of_its_own_is_left_out_and_said(write):
    source = load_source(
        write(
            model_type="llama",
            architectures=["MyLlama"],
            auto_map={"AutoModel": "modeling_mine.MyLlama"},
            quantization_config={"quant_method": "fp8"},
            attn_implementation="flash_attention_2",
            **GROUPED,
        )
    )
    said = " | ".join(source.assumptions)
    for part in (
        "code of its own, which is not run",
        "quantization is left out",
        "not flash_attention_2",
        "no MyLlama",
    ):
        assert part in said
    assert not source.build().config.use_cache


def test_a_model_of_tens_of_billions_of_parameters_is_built_without_memory(write):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    model = load_source(write(model_type="llama", **sizes, **heads)).build_abstract()
    assert sum(p.numel() for p in model.parameters()) > 70e9
    assert all(t.is_meta or t.nbytes < 1 << 20 for t in model.state_dict().values())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"}, "is a diffusers configuration"),
        ({"peft_type": "LORA", "r": 8}, r"is an adapter's configuration \(PEFT\)"),
        ({"tokenizer_class": "LlamaTokenizer"}, "is a tokenizer's configuration"),
        ({"zero_optimization": {"stage": 3}}, "is a DeepSpeed configuration"),
        ({"_from_model_config": True, "transformers_version": "4"}, "such as generation_config.json"),
        ({"a": 1}, "is some other JSON file: a transformers config.json with a model_type"),
        (
            {"model_type": "no_such_model"},
            "does not have its model_type 'no_such_model'; correct it, or if it is newer",
        ),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}, "is not run; if you trust it, write a model file"),
        ({"architectures": ["Nothing"]}, r"does not have its architectures \['Nothing'\]"),
        ({"model_type": "llama", "hidden_size": "wide"}, "is no configuration that transformers"),
        ({"model_type": "llama", **GROUPED, "rope_parameters": {"rope_type": "odd"}}, "odd"),
    ],
)
def test_other_json_is_refused_with_what_it_is(content, sentence, write):
    with pytest.raises(SourceError, match=sentence):
        load_source(write(**content)).build_abstract()


def test_broken_json_and_lists_are_refused(tmp_path):
    path = tmp_path / "config.json"
    for text, sentence in (("{'model_type'", "is not JSON: Expecting property name"), ("[1]", "some other JSON file")):
        path.write_text(text)
        with pytest.raises(SourceError, match=sentence):
            load_source(path)


def test_an_input_that_no_configuration_tells_is_refused_in_a_sentence(write):
    source = load_source(write(model_type="pix2struct", architectures=["Pix2StructForConditionalGeneration"]))
    with pytest.raises(SourceError, match="whose input is flattened_patches: write a model file"):
        source.example_batch(1)


def test_a_forward_that_fails_names_the_batch(write):
    source = load_source(write(model_type="xmod", architectures=["XmodForMaskedLM"], **TEXT))
    with pytest.raises(SourceError, match=r"Input language unknown.*the batch .* is input_ids \[2, 64\], labels"):
        profile_source(source, 2)


def test_without_transformers_the_sentence_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SourceError, match="not installed: pip install transformers"):
        load_source(write(model_type="llama"))


def test_labels_fit_the_kind_of_classification(write):
    def labels(**content: Any) -> torch.Tensor:
        return load_source(
            write(model_type="bert", architectures=["BertForSequenceClassification"], **TEXT, **content)
        ).example_batch(4)["labels"]

    assert labels().dtype == torch.int64
    assert labels(num_labels=1).dtype == torch.float32
    assert labels(num_labels=3, problem_type="multi_label_classification").shape == (4, 3)
