"""What the architectures of `zoo_libraries.py` hold by hand: residual additions from the configuration, roles from names.

A count is the number of additions of a shortcut and a branch in one forward pass of the base model, as the paper or the model's source
has its blocks; a pair counts those with an identity and those with a projection as shortcut. Nothing here reads the trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

Count = int | tuple[int, int]
Formula = Callable[[Any], Count]


def per_layer(count: int) -> Formula:
    return lambda config: count * config.num_hidden_layers


def encoder_decoder(encoder: int = 2, decoder: int = 3) -> Formula:
    """Self-attention and feed-forward in the encoder; self-attention, cross-attention and feed-forward in the decoder."""
    return lambda config: encoder * _encoder_layers(config) + decoder * _decoder_layers(config)


def _encoder_layers(config: Any) -> int:
    config = getattr(config, "encoder", None) or getattr(config, "encoder_config", config)
    names = ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "num_layers", "num_hidden_layers")
    return int(next(value for name in names if (value := getattr(config, name, None)) is not None))


def _decoder_layers(config: Any) -> int:
    config = getattr(config, "decoder", None) or getattr(config, "decoder_config", config)
    names = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers", "num_layers", "num_hidden_layers")
    return int(next(value for name in names if (value := getattr(config, name, None)) is not None))


def two_towers(config: Any) -> int:
    """A transformer for text and one for images (or audio), two additions in each layer."""
    other = config.vision_config if hasattr(config, "vision_config") else config.audio_config
    return 2 * (config.text_config.num_hidden_layers + other.num_hidden_layers) + _pooling_head(other)


def _pooling_head(config: Any) -> int:
    """SigLIP's vision models end in attention of a learned query, and a feed-forward around which there is a shortcut."""
    return int(config.model_type == "siglip_vision_model" and getattr(config, "vision_use_head", True))


def text_alone(config: Any) -> int:
    """A language model with an image or audio encoder that is not called."""
    return 2 * config.get_text_config().num_hidden_layers


def stages(count: int) -> Formula:
    return lambda config: count * sum(config.depths)


def bottlenecks(config: Any) -> tuple[int, int]:
    """Each stage begins with a projection (the first too, where it changes the width)."""
    return sum(config.depths) - len(config.depths), len(config.depths)


TRANSFORMERS: dict[Formula, str] = {
    per_layer(2): """
        llama mistral ministral ministral3 mistral4 qwen2 qwen3 gemma gemma2 gemma3_text phi3 olmo olmo2 olmo3 starcoder2 stablelm granite
        smollm3 seed_oss arcee apertus bitnet exaone4 glm glm4 helium cwm ernie4_5 hunyuan_v1_dense hunyuan_v1_moe nemotron persimmon
        vaultgemma youtu nanochat diffllama minicpm3 internlm3 iquestcoder exaone hyperclovax mamba mamba2 falcon_mamba
        qwen2_vl_text qwen2_5_vl_text qwen3_vl_text
        mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_text olmoe phimoe gpt_oss dbrx deepseek_v2 deepseek_v3 deepseek_v32 granitemoe
        granitemoeshared minimax minimax_m2 glm4_moe glm4_moe_lite ernie4_5_moe dots1 flex_olmo jetmoe afmoe
        lfm2 lfm2_moe solar_open olmo_hybrid bailing_hybrid kimi_linear llama4_text recurrent_gemma qwen3_vl_moe_text exaone_moe
        axk1 laguna mellum mimo_v2_flash sarvam_moe sarvam_mla hy_v3 openai_privacy_filter longcat_flash2 jais2 lara_mini
        gpt2 gpt-sw3 gpt_neo gpt_bigcode opt bloom biogpt xglm ctrl openai-gpt imagegpt cpmant mpt gpt_neox_japanese
        bert roberta electra albert camembert xlm-roberta xlm-roberta-xl ernie distilbert deberta deberta-v2 data2vec-text layoutlm
        layoutlmv3 luke mpnet megatron-bert nystromformer rembert roformer roc_bert squeezebert splinter tapas visual_bert ibert
        convbert fnet esm bert-generation big_bird xmod markuplm roberta-prelayernorm modernbert nomic_bert eurobert xlm flaubert
        longformer ultrabert jina_embeddings_v3 modernbert-decoder bros vilt data2vec-vision beit
        vit deit dinov2 dinov2_with_registers dinov3_vit vit_mae vit_msn ijepa videomae vivit yolos audio-spectrogram-transformer pixio
        aimv2_vision_model clip_vision_model clip_text_model siglip_vision_model siglip2_vision_model chinese_clip_vision_model pixtral
        mlcd_vision_model internvl_vision glm4v_vision qwen3_vl_vision idefics3_vision smolvlm_vision
        rwkv xlnet patchtst tipsv2_vision_model
        decision_transformer mobilevitv3
        xlstm granitemoe_swa gte esmc aria_text qwen3_5_moe_text glm4v_text glm4v_moe_text voxtral_encoder qwen2_audio_encoder
        audioflamingo3_encoder dpr chameleon sam_hq_vision_model dpt""",
    per_layer(1): """
        gpt_neox gptj codegen phi cohere cohere2 cohere2_moe""",
    per_layer(3): "timesformer falcon_h1",
    # Mamba: the skip D x around the scan, and the block
    per_layer(4): "wav2vec2-conformer wav2vec2-bert lasr_encoder parakeet_encoder lilt",
    encoder_decoder(): """
        bart mbart pegasus blenderbot blenderbot-small m2m_100 marian plbart led bigbird_pegasus t5 mt5 umt5 longt5 switch_transformers
        prophetnet nllb-moe fsmt t5gemma whisper speech_to_text moonshine mvp time_series_transformer informer trocr dia
        florence_lang""",
    two_towers: "clip siglip siglip2 chinese_clip altclip metaclip_2 aimv2 clipseg owlvit owlv2 xclip_plain groupvit_plain tipsv2",
    text_alone: """
        llava llava_next llava_next_video llava_onevision vipllava video_llava mistral3 paligemma internvl qwen2_vl qwen2_5_vl qwen3_vl
        idefics2 idefics3 smolvlm gemma3 got_ocr2 aria qwen2_audio voxtral audioflamingo3 llama4 qwen3_5 janus fuyu ovis2
        glm4v glm46v lighton_ocr lfm2_vl fast_vlm deepseek_vl musicflamingo qwen3_vl_moe glm4v_moe qwen3_5_moe""",
    stages(1): "convnext convnextv2 dinov3_convnext",
    stages(2): "swin donut-swin maskformer-swin swinv2 poolformer focalnet segformer pvt pvt_v2 hiera_plain",
    bottlenecks: "resnet regnet",
}


def with_scans(config: Any) -> int:
    """Two in each layer, and the skip D x around the scan in those of Mamba."""
    kinds = getattr(config, "layers_block_type", None) or config.layer_types
    attending = ("attention", "full_attention", "sliding_attention")
    return 2 * config.num_hidden_layers + sum(kind not in attending for kind in kinds[: config.num_hidden_layers])


def with_backbone(config: Any) -> tuple[int, int]:
    """ResNet-50 (ResNet-18) without its head, then an encoder and a decoder whose queries are parameters.

    To those the first layer adds no more than its feed-forward.
    """
    identity, projection = (5, 3) if "resnet18" in str(config.backbone_config) else (12, 4)
    return identity + 2 * config.encoder_layers + 3 * config.decoder_layers - 2, projection


SPECIAL: dict[str, Formula] = {
    # the pooled values and the convolution that knows positions, then layers of two
    **dict.fromkeys(("sew", "sew-d"), lambda c: 2 * c.num_hidden_layers + 1),
    "mimi": lambda c: 2 * c.num_residual_layers * len(c.upsampling_ratios) + 4 * c.num_hidden_layers,
    # in encoder and decoder: an LSTM with a shortcut, and residual blocks whose shortcut is a convolution
    "encodec": lambda c: (2, 2 * c.num_residual_layers * len(c.upsampling_ratios)),
    "dac": lambda c: 6 * len(c.downsampling_ratios),  # three units in each block of encoder and decoder
    "mobilevit": lambda c: 2 + 2 * (2 + 4 + 3),  # two inverted residuals of equal width, layers of two
    "mobilevitv2": lambda c: 1 + 2 * sum(c.n_attn_blocks),
    # a convolutional block adds once, the last of a stage four times: locally, in its attention, around it, around its linear part
    "swiftformer": lambda c: sum(c.depths) - len(c.depths) + 4 * len(c.depths),
    "swin2sr": lambda c: 2 * sum(c.depths) + len(c.depths) + 1,  # layers of two, around each stage, around all
    "efficientnet": lambda c: sum(math.ceil(c.depth_coefficient * repeats) - 1 for repeats in c.num_block_repeats),
    "glpn": lambda c: 2 * sum(c.depths),
    "mobilenet_v1": lambda c: 0,
    "vjepa2": lambda c: 2 * (c.num_hidden_layers + c.pred_num_hidden_layers),
    "hgnet_v2": lambda c: sum(c.stage_num_blocks) - len(c.stage_num_blocks),
    "patchtsmixer": lambda c: 2 * c.num_layers,
    "sam2_vision_model": lambda c: (2 * sum(c.backbone_config.blocks_per_stage) - 3, 3),  # three blocks change the width
    "clap": lambda c: 2 * sum(c.audio_config.depths) + 2 * c.text_config.num_hidden_layers,
    "git": lambda c: 2 * (c.num_hidden_layers + c.vision_config.num_hidden_layers),
    "timesfm": lambda c: (2 * c.num_hidden_layers, 1),  # what becomes of the patches at first has a linear shortcut
    **dict.fromkeys(("deformable_detr", "conditional_detr"), with_backbone),
    **dict.fromkeys(("jamba", "bamba", "granitemoehybrid"), with_scans),
    # the positional convolution, then layers of two; data2vec has five of those convolutions in a row, none with a shortcut of its own
    **dict.fromkeys(("wav2vec2", "hubert", "unispeech", "unispeech-sat", "wavlm", "data2vec-audio"), lambda c: 2 * c.num_hidden_layers + 1),
    "siglip_vision_model": lambda c: 2 * c.num_hidden_layers + _pooling_head(c),
    "siglip2_vision_model": lambda c: 2 * c.num_hidden_layers + 1,
    "siglip2": lambda c: 2 * (c.text_config.num_hidden_layers + c.vision_config.num_hidden_layers) + 1,
    # tokens and global tokens in the encoder, two each; the global ones begin as constants
    "pegasus_x": lambda c: 4 * c.encoder_layers - 1 + 3 * c.decoder_layers,
    "segformer": lambda c: 2 * sum(c.depths),
    "pvt": lambda c: 2 * sum(c.depths),
    "pvt_v2": lambda c: 2 * sum(c.depths),
    "cvt": lambda c: 2 * sum(c.depth),
    "falcon": lambda c: (1 if c.parallel_attn or c.new_decoder_architecture else 2) * c.num_hidden_layers,
    "bit": lambda c: (sum(c.depths) - len(c.depths), len(c.depths)),
    "xlnet": lambda c: 2 * c.n_layer,
    "mobilenet_v2": lambda c: 10,  # repeats 1, 2, 3, 4, 3, 3, 1, all but the first of a stage
    "levit": lambda c: 2 * sum(c.depths) + 2,  # of each down-sampling its feed-forward
    "canine": lambda c: 2 * (c.num_hidden_layers + 2),  # a local layer before, one after
    # one cross-attention layer before, whose first addition is to the latents: a parameter, no stream (as in the class blocks of CaiT)
    "perceiver": lambda c: 2 * (c.num_blocks * c.num_self_attends_per_block + 1) - 1,
    "mobilebert": lambda c: (2 + c.num_feedforward_networks) * c.num_hidden_layers,  # attention, stacked and last feed-forward, bottleneck
    "blip": lambda c: 2 * c.vision_config.num_hidden_layers + 2 * c.text_config.num_hidden_layers,
    "cohere2_vision": lambda c: c.text_config.num_hidden_layers,  # attention and feed-forward in parallel
    "zamba": lambda c: 2 * c.num_hidden_layers,
    "bert-generation": lambda c: 2 * c.num_hidden_layers,
    "sam_vision_model": lambda c: 2 * c.num_hidden_layers,
    "vitdet": lambda c: 2 * c.num_hidden_layers,
    "hiera": lambda c: 2 * sum(c.depths),
    # the first decoder layer starts from zeros
    **dict.fromkeys(("detr", "table-transformer"), with_backbone),
    "speecht5": lambda c: 2 * c.encoder_layers + 3 * c.decoder_layers,
}
OF_OTHERS: dict[str, Count] = {
    "diffusers.UNet2DModel": (7, 5),  # 6 residual blocks in the levels + 2 in the middle; 4 attentions; the concatenations widen
    "diffusers.UNet2DConditionModel": (19, 5),
    "diffusers.AutoencoderKL": (10, 2),  # 2 + 4 residual blocks, 2 + 1 in each middle; one widens, one narrows
    "diffusers.AutoencoderTiny": 6,
    "diffusers.DiTTransformer2DModel": 4,
    "diffusers.PixArtTransformer2DModel": 6,
    "diffusers.SanaTransformer2DModel": 6,
    "diffusers.WanTransformer3DModel": 6,
    "diffusers.SD3Transformer2DModel": 6,  # two streams of two each; the last layer adds to the image alone
    "diffusers.FluxTransformer2DModel": 10,  # two streams of two in each double block, one in each single block
    "diffusers.PriorTransformer": 4,
    "diffusers.Transformer2DModel": 7,  # three in each layer and one around all
    "monai.UNet/plain": 0,
    "monai.AttentionUnet": 0,
    "monai.BasicUNet": 0,
    "monai.BasicUNetPlusPlus": 0,
    "monai.UNet": (2, 3),  # a unit in each level and at the bottom, identity where width and size stay; in the decoder's last units too
    "monai.DynUNet": (0, 3),
    "monai.ViT": 4,
    "monai.ViTAutoEnc": 4,
    "monai.UNETR": (27, 5),  # 12 layers of two; 3 blocks that only change resolution; 5 that change width
    "monai.DenseNet121": 0,
    "monai.SEResNet50": (12, 4),
    "monai.ResNet": (5, 3),
    "monai.EfficientNetBN": 9,
    "monai.FlexibleUNet": 9,
    "monai.FullyConnectedNet": 0,
    "monai.HighResNet": 9,
    "torchaudio.Conformer": 8,
    "torchaudio.DeepSpeech": 0,
    "torchaudio.Wav2Letter": 0,
    "torchaudio.Emformer": 4,
    "torchaudio.wav2vec2_model": 5,  # two per layer and the positional convolution
    "torchaudio.hubert_pretrain_model": 5,
    "torchvision.r3d_18": (5, 3),
    "torchvision.mc3_18": (5, 3),
    "torchvision.r2plus1d_18": (5, 3),
    "torchvision.s3d": 0,
    "torchvision.swin3d_t": 24,
    "torchvision.fasterrcnn_resnet50_fpn": (12, 4),
    "torchvision.retinanet_resnet50_fpn_v2": (12, 4),
    "torchvision.fcos_resnet50_fpn": (12, 4),
    "torchvision.maskrcnn_resnet50_fpn": (12, 4),
    "torchvision.keypointrcnn_resnet50_fpn": (12, 4),
    "torchvision.ssd300_vgg16": 0,
}
"""Counts of the networks that are not of transformers, at the sizes in `zoo_libraries.py`."""


def expected_adds(library: str, name: str, model: nn.Module) -> Count | None:
    """The additions that the architecture has, None where they were not counted by hand."""
    if library != "transformers":
        return OF_OTHERS.get(f"{library}.{name}")
    formula = _formula(name)
    return None if formula is None else formula(model.config)


def is_counted(library: str, name: str) -> bool:
    return f"{library}.{name}" in OF_OTHERS or (library == "transformers" and _formula(name) is not None)


def _formula(name: str) -> Formula | None:
    return SPECIAL.get(name) or next((formula for formula, names in TRANSFORMERS.items() if name in names.split()), None)


def _gamma(*more: str) -> tuple[str, ...]:
    return ("gamma_last", "gamma_shortcut", "gamma_branch", "gamma_trunk", *more)


ROLES: list[tuple[str, tuple[str, ...]]] = [
    (r"self_attn\.relative_pos_embeddings\.weight$", ("weight",)),  # ProphetNet's is a linear layer that gives scores
    (r"embed_positions\.pe_k\.weight$", ("relative_position",)),  # SpeechT5 multiplies it with queries
    (r"bottleneck\.input\.LayerNorm\.weight$", ("gain", "layer_scale")),  # MobileBERT's norm is none: it scales and shifts
    (r"relative_position_bias_table$|relative_attention_bias\.weight$|rel_pos_[hwd]$|rel_embeddings\.weight$", ("relative_position",)),
    (r"(layer_?scale\w*(\.lambda1|\.gamma)?|lambda_?1|lambda_?2|gamma_[12])$", ("layer_scale",)),
    (r"(cls|class|register|mask|distillation|dist|bos|pad)_?tokens?$|class_embedding$|query_tokens$|latents$", ("token",)),
    (r"codebook\.weight$", ("embedding",)),
    (r"query_position_embeddings\.weight$", ("token",)),
    (r"(position|pos)_?embed(ding)?s?$|positional_embedding$", ("position",)),
    (r"(position_embeddings?|embed_positions|wpe|pos_embed(ding)?s?)\.weight$", ("position", "embedding")),
    (r"(word_embeddings|embed_tokens|wte|token_type_embeddings|tok_embeddings|shared)\.weight$", ("embedding",)),
    (r"(sinks)$", ("relative_position", "token", "bias")),
    (
        r"(layer_?norm\w*|rms_?norm|\w*norm_\w+|LayerNorm|_norm|\bnorm\d*|\bln_\w+|normalization|bn\d?|batch_?norm\w*)\.weight$",
        _gamma("gain"),
    ),
    (r"(layer_?norm\w*|LayerNorm|\w*norm_\w+|_norm|\bnorm\d*|\bln_\w+|normalization|bn\d?|batch_?norm\w*)\.bias$", ("beta", "bias")),
    (r"experts\.(gate_up_proj|down_proj|up_proj|gate_proj)$", ("weight",)),
    (r"(proj|fc\d?|dense|query|key|value|qkv|out|lin\d?|[qkvo]|wi|wo|w[123])\.weight$", ("weight",)),
    (r"(proj|fc\d?|dense|query|key|value|qkv|out|lin\d?)\.bias$", ("bias",)),
]
"""Patterns of names, the first that matches counts; where both a table of positions and its lookup are right, both are named."""
