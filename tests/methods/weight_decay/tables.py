"""Roles of real models, written by hand from those models' sources: (names, role, how many)."""

from __future__ import annotations

from pl_normkit.methods.weight_decay import Role

R = Role
Table = list[tuple[str, Role, int]]


def resnet(blocks: int, convs: int, shortcuts: int, prefix: str = "") -> Table:
    """torchvision's and timm's post-activation ResNet: `convs` norms per block, the last one ends the branch."""
    inner = "".join(str(i) for i in range(1, convs))
    return [
        (rf"{prefix}conv1\.weight", R.WEIGHT, 1),
        (rf"{prefix}bn1\.weight", R.GAMMA_TRUNK, 1),
        (rf"{prefix}bn1\.bias", R.BETA, 1),
        (rf"{prefix}layer\d\.\d+\.conv\d\.weight", R.WEIGHT, blocks * convs),
        (rf"{prefix}layer\d\.\d+\.bn[{inner}]\.weight", R.GAMMA_BRANCH, blocks * (convs - 1)),
        (rf"{prefix}layer\d\.\d+\.bn{convs}\.weight", R.GAMMA_LAST, blocks),
        (rf"{prefix}layer\d\.\d+\.bn\d\.bias", R.BETA, blocks * convs),
        (rf"{prefix}layer\d\.0\.downsample\.0\.weight", R.WEIGHT, shortcuts),
        (rf"{prefix}layer\d\.0\.downsample\.1\.weight", R.GAMMA_SHORTCUT, shortcuts),
        (rf"{prefix}layer\d\.0\.downsample\.1\.bias", R.BETA, shortcuts),
    ]


def head(name: str) -> Table:
    return [(rf"{name}\.weight", R.WEIGHT, 1), (rf"{name}\.bias", R.BIAS, 1)]


def trunk_norm(name: str, count: int = 1) -> Table:
    return [(rf"{name}\.weight", R.GAMMA_TRUNK, count), (rf"{name}\.bias", R.BETA, count)]


def branch_norm(name: str, count: int) -> Table:
    return [(rf"{name}\.weight", R.GAMMA_BRANCH, count), (rf"{name}\.bias", R.BETA, count)]


def layers(names: str, count: int) -> Table:
    return [(rf"{names}\.weight", R.WEIGHT, count), (rf"{names}\.bias", R.BIAS, count)]


RESNET34_ENCODER = resnet(16, 2, 3, r"encoder\.")
VIT_TIMM: Table = [
    ("cls_token", R.TOKEN, 1),
    *layers(r"patch_embed\.proj", 1),
    *branch_norm(r"blocks\.\d+\.norm[12]", 24),
    *layers(r"blocks\.\d+\.(attn\.proj|mlp\.fc[12])", 36),
]
PRE_NORM_VIT: Table = [("pos_embed", R.POSITION, 1), *VIT_TIMM, *layers(r"blocks\.\d+\.attn\.qkv", 12), *trunk_norm("norm"), *head("head")]
SPLIT_QKV: Table = [(r"blocks\.\d+\.attn\.qkv\.weight", R.WEIGHT, 12), (r"blocks\.\d+\.attn\.[qv]_bias", R.BIAS, 24)]

TABLES: dict[str, Table] = {
    "tv:resnet18": [*resnet(8, 2, 3), *head("fc")],
    "tv:wide_resnet50_2": [*resnet(16, 3, 4), *head("fc")],
    # no residual addition anywhere: dense layers concatenate
    "tv:densenet121": [
        (r"features\.conv0\.weight", R.WEIGHT, 1),
        *trunk_norm(r"features\.norm[05]", 2),
        *trunk_norm(r"features\.denseblock\d\.denselayer\d+\.norm[12]", 116),
        (r"features\.denseblock\d\.denselayer\d+\.conv[12]\.weight", R.WEIGHT, 116),
        *trunk_norm(r"features\.transition\d\.norm", 3),
        (r"features\.transition\d\.conv\.weight", R.WEIGHT, 3),
        *head("classifier"),
    ],
    # MBConv adds its input only with stride 1 and equal widths: 9 of 16 blocks; block.2 (block.1 in features.1) is the SE gate
    "tv:efficientnet_b0": [
        (r"features\.[08]\.0\.weight", R.WEIGHT, 2),
        *trunk_norm(r"features\.[08]\.1", 2),
        (r"features\.1\.0\.block\.[02]\.0\.weight", R.WEIGHT, 2),
        *layers(r"features\.1\.0\.block\.1\.fc[12]", 2),
        *trunk_norm(r"features\.1\.0\.block\.[02]\.1", 2),
        (r"features\.[2-7]\.\d\.block\.[013]\.0\.weight", R.WEIGHT, 45),
        *layers(r"features\.[2-7]\.\d\.block\.2\.fc[12]", 30),
        *trunk_norm(r"features\.[2-7]\.0\.block\.[013]\.1", 18),
        *branch_norm(r"features\.[2-6]\.[1-3]\.block\.[01]\.1", 18),
        (r"features\.[2-6]\.[1-3]\.block\.3\.1\.weight", R.GAMMA_LAST, 9),
        (r"features\.[2-6]\.[1-3]\.block\.3\.1\.bias", R.BETA, 9),
        *head(r"classifier\.1"),
    ],
    "tv:vit_b_16": [
        ("class_token", R.TOKEN, 1),
        (r"encoder\.pos_embedding", R.POSITION, 1),
        *layers("conv_proj", 1),
        *branch_norm(r"encoder\.layers\.\w+\.ln_[12]", 24),
        (r"encoder\.layers\.\w+\.self_attention\.in_proj_weight", R.WEIGHT, 12),
        (r"encoder\.layers\.\w+\.self_attention\.in_proj_bias", R.BIAS, 12),
        *layers(r"encoder\.layers\.\w+\.(self_attention\.out_proj|mlp\.[03])", 36),
        *trunk_norm(r"encoder\.ln"),
        *head(r"heads\.head"),
    ],
    "tv:swin_t": [
        *layers(r"features\.0\.0", 1),
        *trunk_norm(r"features\.0\.2"),
        *branch_norm(r"features\.[1357]\.\d\.norm[12]", 24),
        (r"features\.[1357]\.\d\.attn\.relative_position_bias_table", R.RELATIVE_POSITION, 12),
        *layers(r"features\.[1357]\.\d\.(attn\.(qkv|proj)|mlp\.[03])", 48),
        *trunk_norm(r"features\.[246]\.norm", 3),
        (r"features\.[246]\.reduction\.weight", R.WEIGHT, 3),
        *trunk_norm("norm"),
        *head("head"),
    ],
    # deep stem of three convolutions; the shortcut is pool, conv, norm
    "timm:resnet50d": [
        *[(name, role, count) for name, role, count in resnet(16, 3, 4) if not name.startswith("conv1") and "downsample" not in name],
        (r"conv1\.[036]\.weight", R.WEIGHT, 3),
        *trunk_norm(r"conv1\.[14]", 2),
        (r"layer\d\.0\.downsample\.1\.weight", R.WEIGHT, 4),
        (r"layer\d\.0\.downsample\.2\.weight", R.GAMMA_SHORTCUT, 4),
        (r"layer\d\.0\.downsample\.2\.bias", R.BETA, 4),
        *head("fc"),
    ],
    # pre-activation: in the first block of a stage the projection shortcut reads norm1 too, so it stands on the trunk
    "timm:resnetv2_50": [
        (r"stem\.conv\.weight", R.WEIGHT, 1),
        *trunk_norm(r"stages\.\d\.blocks\.0\.norm1", 4),
        *branch_norm(r"stages\.\d\.blocks\.[1-9]\.norm1", 12),
        *branch_norm(r"stages\.\d\.blocks\.\d\.norm[23]", 32),
        (r"stages\.\d\.blocks\.\d\.conv[123]\.weight", R.WEIGHT, 48),
        (r"stages\.\d\.blocks\.0\.downsample\.conv\.weight", R.WEIGHT, 4),
        *trunk_norm("norm"),
        *head(r"head\.fc"),
    ],
    "timm:convnext_tiny": [
        *layers(r"stem\.0", 1),
        *trunk_norm(r"stem\.1"),
        (r"stages\.\d\.blocks\.\d\.gamma", R.LAYER_SCALE, 18),
        *layers(r"stages\.\d\.blocks\.\d\.(conv_dw|mlp\.fc[12])", 54),
        *branch_norm(r"stages\.\d\.blocks\.\d\.norm", 18),
        *trunk_norm(r"stages\.[123]\.downsample\.0", 3),
        *layers(r"stages\.[123]\.downsample\.1", 3),
        *trunk_norm(r"head\.norm"),
        *head(r"head\.fc"),
    ],
    "timm:regnety_032": [
        (r"stem\.conv\.weight", R.WEIGHT, 1),
        *trunk_norm(r"stem\.bn"),
        (r"s\d\.b\d+\.conv[123]\.conv\.weight", R.WEIGHT, 63),
        *layers(r"s\d\.b\d+\.se\.fc[12]", 42),
        *branch_norm(r"s\d\.b\d+\.conv[12]\.bn", 42),
        (r"s\d\.b\d+\.conv3\.bn\.weight", R.GAMMA_LAST, 21),
        (r"s\d\.b\d+\.conv3\.bn\.bias", R.BETA, 21),
        (r"s\d\.b1\.downsample\.conv\.weight", R.WEIGHT, 4),
        (r"s\d\.b1\.downsample\.bn\.weight", R.GAMMA_SHORTCUT, 4),
        (r"s\d\.b1\.downsample\.bn\.bias", R.BETA, 4),
        *head(r"head\.fc"),
    ],
    "timm:vit_base_patch16_224": PRE_NORM_VIT,
    "timm:deit3_small_patch16_224": [*PRE_NORM_VIT, (r"blocks\.\d+\.ls[12]\.gamma", R.LAYER_SCALE, 24)],
    "timm:beit_base_patch16_224": [
        *VIT_TIMM,
        *SPLIT_QKV,
        (r"blocks\.\d+\.gamma_[12]", R.LAYER_SCALE, 24),
        (r"blocks\.\d+\.attn\.relative_position_bias_table", R.RELATIVE_POSITION, 12),
        *trunk_norm("fc_norm"),
        *head("head"),
    ],
    "timm:eva02_tiny_patch14_224": [("pos_embed", R.POSITION, 1), *VIT_TIMM, *SPLIT_QKV, *trunk_norm("fc_norm")],
    # pre-activation MBConv (its norms all stand before a convolution), then window and grid attention, pre-norm
    "timm:maxvit_nano_rw_256": [
        (r"stem\.conv[12]\.weight", R.WEIGHT, 2),
        *trunk_norm(r"stem\.norm1"),
        *branch_norm(r"stages\.\d\.blocks\.\d\.conv\.(pre_norm|norm[12])", 21),
        (r"stages\.\d\.blocks\.\d\.conv\.(conv1_1x1|conv2_kxk|conv3_1x1)\.weight", R.WEIGHT, 21),
        (r"stages\.\d\.blocks\.0\.conv\.shortcut\.expand\.weight", R.WEIGHT, 3),
        *layers(r"stages\.\d\.blocks\.\d\.conv\.se\.fc[12]", 14),
        *branch_norm(r"stages\.\d\.blocks\.\d\.attn_(block|grid)\.norm[12]", 28),
        *layers(r"stages\.\d\.blocks\.\d\.attn_(block|grid)\.(attn\.qkv|attn\.proj|mlp\.fc[12])", 56),
        (r"stages\.\d\.blocks\.\d\.attn_(block|grid)\.attn\.rel_pos\.relative_position_bias_table", R.RELATIVE_POSITION, 14),
        *trunk_norm("norm"),
        *head(r"head\.fc"),
    ],
    "smp:Unet": [
        *RESNET34_ENCODER,
        (r"decoder\.blocks\.\d\.conv[12]\.0\.weight", R.WEIGHT, 10),
        *trunk_norm(r"decoder\.blocks\.\d\.conv[12]\.1", 10),
        *head(r"segmentation_head\.0"),
    ],
    "smp:DeepLabV3Plus": [
        *RESNET34_ENCODER,
        (r"decoder\.aspp\.0\.convs\.0\.0\.weight", R.WEIGHT, 1),
        (r"decoder\.aspp\.0\.convs\.[123]\.0\.[01]\.weight", R.WEIGHT, 6),
        (r"decoder\.aspp\.0\.convs\.4\.1\.weight", R.WEIGHT, 1),
        *trunk_norm(r"decoder\.aspp\.0\.convs\.[0123]\.1", 4),
        *trunk_norm(r"decoder\.aspp\.0\.convs\.4\.2", 1),
        (r"decoder\.aspp\.0\.project\.0\.weight", R.WEIGHT, 1),
        *trunk_norm(r"decoder\.aspp\.0\.project\.1"),
        (r"decoder\.aspp\.1\.[01]\.weight", R.WEIGHT, 2),
        *trunk_norm(r"decoder\.aspp\.2"),
        (r"decoder\.block1\.0\.weight", R.WEIGHT, 1),
        (r"decoder\.block2\.0\.[01]\.weight", R.WEIGHT, 2),
        *trunk_norm(r"decoder\.block[12]\.1", 2),
        *head(r"segmentation_head\.0"),
    ],
    "smp:UPerNet": [
        *RESNET34_ENCODER,
        *trunk_norm(r"decoder\.feature_norms\.\d", 4),
        (r"decoder\.psp\.blocks\.\d\.1\.0\.weight", R.WEIGHT, 4),
        *trunk_norm(r"decoder\.psp\.blocks\.\d\.1\.1", 4),
        (r"decoder\.(psp\.out_conv|fusion_block)\.0\.weight", R.WEIGHT, 2),
        *trunk_norm(r"decoder\.(psp\.out_conv|fusion_block)\.1", 2),
        (r"decoder\.(fpn_lateral_blocks\.\d\.conv_norm_relu|fpn_conv_blocks\.\d)\.0\.weight", R.WEIGHT, 6),
        *trunk_norm(r"decoder\.(fpn_lateral_blocks\.\d\.conv_norm_relu|fpn_conv_blocks\.\d)\.1", 6),
        *head(r"segmentation_head\.0"),
    ],
    "smp:Segformer": [
        *RESNET34_ENCODER,
        *layers(r"decoder\.mlp_stage\.\d\.linear", 5),
        (r"decoder\.fuse_stage\.0\.weight", R.WEIGHT, 1),
        *trunk_norm(r"decoder\.fuse_stage\.1"),
        *head(r"segmentation_head\.0"),
    ],
    # post-norm: every norm reads a residual sum. Token types are two rows looked up at 16 positions: no positional table
    "hf:bert": [
        (r"bert\.embeddings\.(word|token_type)_embeddings\.weight", R.EMBEDDING, 2),
        (r"bert\.embeddings\.position_embeddings\.weight", R.POSITION, 1),
        *trunk_norm(r"bert\.embeddings\.LayerNorm"),
        *trunk_norm(r"bert\.encoder\.layer\.\d\.(attention\.)?output\.LayerNorm", 4),
        *layers(r"bert\.encoder\.layer\.\d\.(attention\.(self\.(query|key|value)|output\.dense)|(intermediate|output)\.dense)", 12),
        *layers(r"bert\.pooler\.dense", 1),
        *head("classifier"),
    ],
    # the output layer is tied to wte
    "hf:gpt2": [
        (r"transformer\.wte\.weight", R.EMBEDDING, 1),
        (r"transformer\.wpe\.weight", R.POSITION, 1),
        *branch_norm(r"transformer\.h\.\d\.ln_[12]", 4),
        *layers(r"transformer\.h\.\d\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)", 8),
        *trunk_norm(r"transformer\.ln_f"),
    ],
    # RMS norms written out as arithmetic, without shift
    "hf:llama": [
        (r"model\.embed_tokens\.weight", R.EMBEDDING, 1),
        (r"model\.layers\.\d\.(input|post_attention)_layernorm\.weight", R.GAMMA_BRANCH, 4),
        (r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight", R.WEIGHT, 14),
        (r"model\.norm\.weight", R.GAMMA_TRUNK, 1),
        (r"lm_head\.weight", R.WEIGHT, 1),
    ],
    # experts are kept in one tensor for a grouped product
    "hf:mixtral": [
        (r"model\.embed_tokens\.weight", R.EMBEDDING, 1),
        (r"model\.layers\.\d\.(input|post_attention)_layernorm\.weight", R.GAMMA_BRANCH, 4),
        (r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.gate)\.weight", R.WEIGHT, 10),
        (r"model\.layers\.\d\.mlp\.experts\.(gate_up|down)_proj", R.WEIGHT, 4),
        (r"model\.norm\.weight", R.GAMMA_TRUNK, 1),
        (r"lm_head\.weight", R.WEIGHT, 1),
    ],
    # the same with a shift for each expert, looked up by the router's choice, and a logit per head that joins the scores
    "hf:gpt_oss": [
        (r"model\.embed_tokens\.weight", R.EMBEDDING, 1),
        (r"model\.layers\.\d\.(input|post_attention)_layernorm\.weight", R.GAMMA_BRANCH, 4),
        *layers(r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.router)", 10),
        (r"model\.layers\.\d\.self_attn\.sinks", R.TOKEN, 2),
        (r"model\.layers\.\d\.mlp\.experts\.(gate_up|down)_proj", R.WEIGHT, 4),
        (r"model\.layers\.\d\.mlp\.experts\.(gate_up|down)_proj_bias", R.BIAS, 4),
        (r"model\.norm\.weight", R.GAMMA_TRUNK, 1),
        (r"lm_head\.weight", R.WEIGHT, 1),
    ],
    # the table of distances is normalized, projected, multiplied with queries and keys, and gathered
    "hf:deberta": [
        (r"embeddings\.word_embeddings\.weight", R.EMBEDDING, 1),
        (r"embeddings\.position_embeddings\.weight", R.POSITION, 1),
        (r"encoder\.rel_embeddings\.weight", R.RELATIVE_POSITION, 1),
        *trunk_norm(r"(embeddings|encoder)\.LayerNorm", 2),
        *trunk_norm(r"encoder\.layer\.\d\.(attention\.)?output\.LayerNorm", 4),
        *layers(r"encoder\.layer\.\d\.attention\.(self\.(query|key|value)_proj|output\.dense)", 8),
        *layers(r"encoder\.layer\.\d\.(intermediate|output)\.dense", 4),
    ],
    "hf:t5_masked": [
        (r"shared\.weight", R.EMBEDDING, 1),
        (r".*relative_attention_bias\.weight", R.RELATIVE_POSITION, 1),
        (r"encoder\.block\.\d\.layer\.\d\.layer_norm\.weight", R.GAMMA_BRANCH, 4),
        (r"encoder\.block\.\d\.layer\.0\.SelfAttention\.[qkvo]\.weight", R.WEIGHT, 8),
        (r"encoder\.block\.\d\.layer\.1\.DenseReluDense\.w[io]\.weight", R.WEIGHT, 4),
        (r"encoder\.final_layer_norm\.weight", R.GAMMA_TRUNK, 1),
    ],
    # pooled by a learned probe
    "hf:siglip": [
        *layers(r"embeddings\.patch_embedding", 1),
        (r"embeddings\.position_embedding\.weight", R.POSITION, 1),
        *branch_norm(r"encoder\.layers\.\d\.layer_norm\d", 4),
        *layers(r"encoder\.layers\.\d\.(self_attn\.(q|k|v|out)_proj|mlp\.fc\d)", 12),
        *trunk_norm("post_layernorm"),
        (r"head\.probe", R.TOKEN, 1),
        (r"head\.attention\.in_proj_weight", R.WEIGHT, 1),
        (r"head\.attention\.in_proj_bias", R.BIAS, 1),
        *layers(r"head\.(attention\.out_proj|mlp\.fc\d)", 3),
        *branch_norm(r"head\.layernorm", 1),
    ],
    "hf:perceiver": [
        (r"embeddings\.latents", R.TOKEN, 1),
        *trunk_norm(r"encoder\.cross_attention\.attention\.self\.layernorm\d", 2),
        *branch_norm(r"encoder\.cross_attention\.layernorm", 1),
        *branch_norm(r"encoder\.self_attends\.\d\.(attention\.self\.)?layernorm1?", 4),
        *layers(r"encoder\.(cross_attention|self_attends\.\d)\.(attention\.(self\.(query|key|value)|output\.dense)|mlp\.dense\d)", 18),
    ],
    "hf:vit": [
        (r"vit\.embeddings\.cls_token", R.TOKEN, 1),
        (r"vit\.embeddings\.position_embeddings", R.POSITION, 1),
        *layers(r"vit\.embeddings\.patch_embeddings\.projection", 1),
        *branch_norm(r"vit\.layers\.\d\.layernorm_(before|after)", 4),
        *layers(r"vit\.layers\.\d\.(attention\.[qkvo]_proj|mlp\.fc[12])", 12),
        *trunk_norm(r"vit\.layernorm"),
        *head("classifier"),
    ],
}
