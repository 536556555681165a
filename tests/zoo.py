"""Tiny models of every family, with seeded weights large enough for attention to matter.

    model = make_model("vit")               # fresh, in eval mode
    inputs = make_inputs("vit", batch=2)    # {"pixel_values": [2, 3, 32, 32]}

Most have 64 patch tokens, three blocks of width 32 and, where there is a head, ten classes.
``FAMILIES`` and ``REFUSED`` are the tables that the tests and docs/support-matrix.md are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import reference_models
import torch
import transformers as hf
from packaging.requirements import Requirement
from torch import Generator, Tensor, nn

BLOCKS = 3
PATCHES = 64
CLASSES = 10
COUNTS = [5, 0, 9]
"""What the tables' tokens after each block are told for."""

_SHARED: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
}
_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 4}
_BLOCKS: dict[str, Any] = {**_SHARED, "intermediate_size": 64}
_WIDE: dict[str, Any] = {**_BLOCKS, **_IMAGE}
_LABELS: dict[str, Any] = {"num_labels": CLASSES}
_TEXT: dict[str, Any] = {**_BLOCKS, "vocab_size": 99, "max_position_embeddings": 32}
_VIDEO: dict[str, Any] = {**_BLOCKS, "image_size": 16, "num_frames": 4}
_VIDEO_SHAPE = (4, 3, 16, 16)

CLASS = "reads tokens [0]"
DISTILLED = "reads tokens [1]"
MEAN = "mean over tokens, weighted by size"
POOLED = "attention pooling, keys weighted by size"


def returned(tokens: int, start: int | None = None) -> str:
    """How the report tells of a sequence of tokens that leaves the model."""
    short = tokens - sum(COUNTS) if start is None else start
    return f"returned unmerged from {short} to {tokens} tokens"


# ---- inputs ----------------------------------------------------------------------------------

Inputs = Callable[[int, Generator], dict[str, Any]]


def images(batch: int, generator: Generator) -> dict[str, Any]:
    """``pixel_values`` as most take them."""
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def spectrograms(batch: int, generator: Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, 64, 64, generator=generator)}


def features(batch: int, generator: Generator) -> dict[str, Any]:
    return {"input_features": torch.randn(batch, 16, 64, generator=generator)}


def waves(batch: int, generator: Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, 1000, generator=generator)}


def videos(batch: int, generator: Generator) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, *_VIDEO_SHAPE, generator=generator)}


def videos_to_classify(batch: int, generator: Generator) -> dict[str, Any]:
    return {"pixel_values_videos": torch.randn(batch, *_VIDEO_SHAPE, generator=generator)}


def videos_to_encode(batch: int, generator: Generator) -> dict[str, Any]:
    video = torch.randn(batch, *_VIDEO_SHAPE, generator=generator)
    return {"pixel_values_videos": video, "skip_predictor": True}


def images_and_noise(batch: int, generator: Generator) -> dict[str, Any]:
    noise = torch.rand(batch, PATCHES, generator=generator)
    return {**images(batch, generator), "noise": noise}


def images_and_condition(batch: int, generator: Generator) -> dict[str, Any]:
    condition = torch.randn(batch, 16, generator=generator)
    return {**images(batch, generator), "conditional_embeddings": condition}


def words(batch: int, generator: Generator) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 90, (batch, 24), generator=generator)}


def padded_words(batch: int, generator: Generator) -> dict[str, Any]:
    length = torch.tensor([17, 24, 20])[torch.arange(batch) % 3]
    mask = (torch.arange(24) < length[:, None]).long()
    return {**words(batch, generator), "attention_mask": mask}


def words_and_images(batch: int, generator: Generator) -> dict[str, Any]:
    return {**words(batch, generator), **images(batch, generator)}


# ---- what a family is ------------------------------------------------------------------------


class Stream(NamedTuple):
    """One merged residual stream, exactly, with ``r=COUNTS``."""

    tokens: int
    protected: tuple[int, ...]
    after: tuple[int, ...]
    readout: tuple[str, ...]


def stream(tokens: int, protected: tuple[int, ...], *readout: str, blocks: int = BLOCKS) -> Stream:
    """A stream from which ``COUNTS`` are taken, block after block."""
    after = [tokens - sum(COUNTS[: i + 1]) for i in range(blocks)]
    return Stream(tokens, protected, tuple(after), readout)


class Family(NamedTuple):
    """How to make a model and its inputs, and what it must read as, whichever door it takes.

    Args:
        title: its name in the documentation.
        sides: which tensors of one row a token are carried through the merges beside them.
        unmerged: why tokens are unmerged before a reader; a pattern for each reason.
        refused: why some of its attentions are left alone; a pattern for each reason.
        output: the field of the output that stands for it.
        pooled: a query of the model's own attends to the tokens at the end.
        rotary: positions are told by rotating keys, so no two tokens are alike.
        needs: versions without which the table does not hold, as a requirement.
    """

    title: str
    kind: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    streams: tuple[Stream, ...]
    output: str = "logits"
    sides: tuple[str, ...] = ()
    unmerged: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    rotary: bool = False
    pooled: bool = False
    needs: str = "transformers"


class Refused(NamedTuple):
    """A model that is left alone: the reason (a pattern) and the file that it points to."""

    title: str
    kind: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    reason: str
    file: str


# ---- models ----------------------------------------------------------------------------------


def _vit(**changes: Any) -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**(_WIDE | _LABELS | changes)))


def _vit_eager() -> nn.Module:
    return _vit(attn_implementation="eager")


def _deit() -> nn.Module:
    return hf.DeiTForImageClassification(hf.DeiTConfig(**_WIDE, **_LABELS))


def _deit_distilled() -> nn.Module:
    return hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**_WIDE, **_LABELS))


def _dinov2() -> nn.Module:
    config = hf.Dinov2Config(**_SHARED, **_IMAGE, **_LABELS, mlp_ratio=2, layerscale_value=0.7)
    return hf.Dinov2ForImageClassification(config)


def _dinov2_registers() -> nn.Module:
    config = hf.Dinov2WithRegistersConfig(
        **_SHARED, **_IMAGE, **_LABELS, mlp_ratio=2, layerscale_value=0.7, num_register_tokens=4
    )
    return hf.Dinov2WithRegistersForImageClassification(config)


def _dinov3() -> nn.Module:
    return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**_WIDE, num_register_tokens=2))


def _clip_vision() -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**_WIDE, projection_dim=24))


def _clip_vision_projection() -> nn.Module:
    return hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**_WIDE, projection_dim=24))


def _vit_msn() -> nn.Module:
    return hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**_WIDE, **_LABELS))


def _ijepa() -> nn.Module:
    return hf.IJepaForImageClassification(hf.IJepaConfig(**_WIDE, **_LABELS))


def _ast() -> nn.Module:
    config = hf.ASTConfig(
        **_BLOCKS,
        **_LABELS,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=64,
        num_mel_bins=64,
    )
    return hf.ASTForAudioClassification(config)


def _siglip_vision() -> nn.Module:
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**_WIDE))


def _siglip_classifier() -> nn.Module:
    config = hf.SiglipConfig(vision_config=_WIDE, text_config=_TEXT, **_LABELS)
    return hf.SiglipForImageClassification(config)


def _beit(**changes: Any) -> nn.Module:
    config = hf.BeitConfig(**_WIDE, **_LABELS, use_mean_pooling=True, **changes)
    return hf.BeitForImageClassification(config)


def _beit_bias_per_layer() -> nn.Module:
    return _beit(use_relative_position_bias=True)


def _beit_bias_shared() -> nn.Module:
    return _beit(use_shared_relative_position_bias=True)


def _data2vec() -> nn.Module:
    config = hf.Data2VecVisionConfig(**_WIDE, **_LABELS, use_relative_position_bias=True)
    return hf.Data2VecVisionForImageClassification(config)


def _mae() -> nn.Module:
    return hf.ViTMAEModel(hf.ViTMAEConfig(**_WIDE, mask_ratio=0.0))


def _videomae() -> nn.Module:
    config = hf.VideoMAEConfig(**_VIDEO, **_LABELS, patch_size=4, tubelet_size=2)
    return hf.VideoMAEForVideoClassification(config)


def _vivit() -> nn.Module:
    config = hf.VivitConfig(**_VIDEO, **_LABELS, tubelet_size=[2, 4, 4])
    return hf.VivitForVideoClassification(config)


def _vjepa2_config(**changes: Any) -> Any:
    return hf.VJEPA2Config(
        hidden_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        mlp_ratio=2,
        patch_size=4,
        crop_size=16,
        frames_per_clip=4,
        tubelet_size=2,
        pred_hidden_size=48,
        pred_num_attention_heads=4,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=1,
        **changes,
    )


def _vjepa2() -> nn.Module:
    return hf.VJEPA2Model(_vjepa2_config())


def _vjepa2_classifier() -> nn.Module:
    config = _vjepa2_config(num_pooler_layers=1, **_LABELS)
    return hf.VJEPA2ForVideoClassification(config)


def _yolos(**changes: Any) -> nn.Module:
    sizes = {"image_size": [32, 32], "patch_size": 4, "num_detection_tokens": 5}
    return hf.YolosForObjectDetection(hf.YolosConfig(**_BLOCKS, **sizes, **changes))


def _yolos_without_mid_positions() -> nn.Module:
    return _yolos(use_mid_position_embeddings=False)


def _owlvit() -> nn.Module:
    return hf.OwlViTVisionModel(hf.OwlViTVisionConfig(**_WIDE))


def _owlv2() -> nn.Module:
    return hf.Owlv2VisionModel(hf.Owlv2VisionConfig(**_WIDE))


def _clipseg() -> nn.Module:
    config = hf.CLIPSegConfig(
        vision_config=_WIDE,
        text_config={**_TEXT, "eos_token_id": 2},
        projection_dim=16,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=32,
        conditional_layer=0,
    )
    return hf.CLIPSegForImageSegmentation(config)


def _dpt() -> nn.Module:
    config = hf.DPTConfig(
        **(_WIDE | {"num_hidden_layers": 4}),
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        is_hybrid=False,
        backbone_config=None,
    )
    return hf.DPTForDepthEstimation(config)


def _depth_anything() -> nn.Module:
    backbone = hf.Dinov2Config(
        **(_SHARED | {"num_hidden_layers": 4}),
        **_IMAGE,
        mlp_ratio=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = hf.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=4,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    return hf.DepthAnythingForDepthEstimation(config)


def _masked_images() -> nn.Module:
    return hf.ViTForMaskedImageModeling(hf.ViTConfig(**_WIDE, encoder_stride=4))


def _clip() -> nn.Module:
    text = {**_TEXT, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(vision_config=_WIDE, text_config=text, projection_dim=16))


def _siglip() -> nn.Module:
    return hf.SiglipModel(hf.SiglipConfig(vision_config=_WIDE, text_config=_TEXT))


def _blip_vision() -> nn.Module:
    return hf.BlipVisionModel(hf.BlipVisionConfig(**_WIDE, initializer_range=0.02))


class Llava(nn.Module):
    """LLaVA's use of its vision tower: patches of the last hidden state but one, projected."""

    def __init__(self) -> None:
        super().__init__()
        blocks = {"num_hidden_layers": BLOCKS + 1}  # nobody reads what the last one does
        self.tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(**(_WIDE | blocks)))
        self.linear1, self.linear2 = nn.Linear(32, 48), nn.Linear(48, 48)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states
        patches = hidden[-2][:, 1:]
        return {"tokens": self.linear2(nn.functional.gelu(self.linear1(patches)))}


def _bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**_TEXT))


def _whisper() -> nn.Module:
    config = hf.WhisperConfig(
        d_model=32,
        encoder_layers=BLOCKS,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=4,
        num_mel_bins=16,
        max_source_positions=32,
        vocab_size=99,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperModel(config).get_encoder()


def _wav2vec2() -> nn.Module:
    config = hf.Wav2Vec2Config(
        **_BLOCKS,
        conv_dim=[16, 16],
        conv_stride=[5, 4],
        conv_kernel=[5, 4],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
    )
    return hf.Wav2Vec2Model(config)


# ---- models that are left alone --------------------------------------------------------------

_STAGES: dict[str, Any] = {"depths": [2, 2], "num_heads": [2, 2], "window_size": 4}


def _swin() -> nn.Module:
    return hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, **_STAGES))


def _sam() -> nn.Module:
    config = hf.SamVisionConfig(
        **_SHARED, **_IMAGE, output_channels=16, mlp_dim=64, window_size=4, global_attn_indexes=[1]
    )
    return hf.SamVisionModel(config)


def _vitdet() -> nn.Module:
    config = hf.VitDetConfig(**_SHARED, **_IMAGE, window_block_indices=[0], window_size=4)
    return hf.VitDetModel(config)


def _hiera() -> nn.Module:
    config = hf.HieraConfig(
        image_size=[32, 32],
        embed_dim=16,
        depths=[1, 1],
        num_heads=[1, 2],
        num_query_pool=1,
        patch_stride=[4, 4],
        masked_unit_size=[4, 4],
    )
    return hf.HieraModel(config)


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, use_cache=False)
    return hf.GPT2Model(config)


def _t5_decoder() -> nn.Module:
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99)
    config.use_cache = False
    return hf.T5Model(config).get_decoder()


# ---- the tables ------------------------------------------------------------------------------

_GRID = "aten.reshape splits the axis"
_ONE = "aten.select takes some of the mergeable tokens by position"
_MIXED = "it combines tokens from before a merge with tokens from after it"
_OTHERS = "these blocks read tokens of another stream"
_BY_IDS = "looked up by ids"
_MASKED = "may be causal|causal attention"
_DETECTION = (0, 65, 66, 67, 68, 69)

FAMILIES: dict[str, Family] = {
    "vit": Family("ViT", "image", _vit, images, (stream(65, (0,), CLASS),)),
    "deit": Family("DeiT", "image", _deit, images, (stream(66, (0, 1), CLASS),)),
    "deit_distilled": Family(
        "DeiT, distilled", "image", _deit_distilled, images, (stream(66, (0, 1), CLASS, DISTILLED),)
    ),
    "dinov2": Family("DINOv2", "image", _dinov2, images, (stream(65, (0,), CLASS, MEAN),)),
    "dinov2_registers": Family(
        "DINOv2 with registers",
        "image",
        _dinov2_registers,
        images,
        (stream(69, (0, 1, 2, 3, 4), CLASS, MEAN),),
    ),
    "clip_vision": Family(
        "CLIP vision",
        "image",
        _clip_vision,
        images,
        (stream(65, (0,), CLASS, returned(65)),),
        "pooler_output",
    ),
    "clip_vision_projection": Family(
        "CLIP vision with projection",
        "image",
        _clip_vision_projection,
        images,
        (stream(65, (0,), CLASS, returned(65)),),
        "image_embeds",
    ),
    "vit_msn": Family("ViT-MSN", "image", _vit_msn, images, (stream(65, (0,), CLASS),)),
    "ijepa": Family("I-JEPA", "image", _ijepa, images, (stream(64, (), MEAN),)),
    "ast": Family("AST", "audio", _ast, spectrograms, (stream(66, (0, 1), CLASS, DISTILLED),)),
    "vit_eager": Family(
        "ViT, eager attention", "image", _vit_eager, images, (stream(65, (0,), CLASS),)
    ),
    "siglip_vision": Family(
        "SigLIP vision",
        "image",
        _siglip_vision,
        images,
        (stream(64, (), POOLED, returned(64)),),
        "pooler_output",
        pooled=True,
    ),
    "siglip_classifier": Family(
        "SigLIP classifier", "image", _siglip_classifier, images, (stream(64, (), MEAN),)
    ),
    "dinov3": Family(
        "DINOv3 ViT",
        "image",
        _dinov3,
        images,
        (stream(67, (0, 1, 2), CLASS, returned(67)),),
        "pooler_output",
        sides=("rotary tables",),
        rotary=True,
    ),
    "beit": Family(
        "BEiT, a position bias in each layer",
        "image",
        _beit_bias_per_layer,
        images,
        (stream(65, (0,), MEAN),),
        sides=("position bias",),
    ),
    "beit_shared": Family(
        "BEiT, one position bias for all layers",
        "image",
        _beit_bias_shared,
        images,
        (stream(65, (0,), MEAN),),
        sides=("position bias",),
    ),
    "data2vec_vision": Family(
        "Data2Vec-Vision",
        "image",
        _data2vec,
        images,
        (stream(65, (0,), MEAN),),
        sides=("position bias",),
    ),
    "vit_mae": Family(
        "ViT-MAE encoder, mask ratio 0",
        "image",
        _mae,
        images_and_noise,
        (stream(65, (0,), returned(65)),),
        "last_hidden_state",
    ),
    "videomae": Family("VideoMAE", "video", _videomae, videos, (stream(32, (), MEAN),)),
    "vivit": Family("ViViT", "video", _vivit, videos, (stream(33, (0,), CLASS),)),
    "vjepa2": Family(
        "V-JEPA 2 encoder",
        "video",
        _vjepa2,
        videos_to_encode,
        (stream(32, (), returned(32)),),
        "last_hidden_state",
        sides=("rotary tables",),
        unmerged=("aten.gather is not known to keep tokens apart",),
        rotary=True,
    ),
    "vjepa2_classifier": Family(
        "V-JEPA 2 classifier",
        "video",
        _vjepa2_classifier,
        videos_to_classify,
        (stream(32, (), POOLED, blocks=4),),
        sides=("rotary tables",),
        unmerged=("aten.gather is not known to keep tokens apart",),
        rotary=True,
        pooled=True,
    ),
    "yolos": Family(
        "YOLOS",
        "image",
        _yolos,
        images,
        (stream(70, _DETECTION, "reads tokens [65, 66, 67, 68, 69]", returned(70)),),
        sides=("position embeddings of later layers",),
    ),
    "yolos_plain": Family(
        "YOLOS without mid position embeddings",
        "image",
        _yolos_without_mid_positions,
        images,
        (stream(70, _DETECTION, "reads tokens [65, 66, 67, 68, 69]", returned(70)),),
    ),
    "owlvit": Family(
        "OWL-ViT vision",
        "image",
        _owlvit,
        images,
        (stream(65, (0,), CLASS, returned(65)),),
        "last_hidden_state",
    ),
    "owlv2": Family(
        "OWLv2 vision",
        "image",
        _owlv2,
        images,
        (stream(65, (0,), CLASS, returned(65)),),
        "last_hidden_state",
    ),
    "clipseg": Family(
        "CLIPSeg",
        "image",
        _clipseg,
        images_and_condition,
        (stream(65, (0,), CLASS, returned(65), returned(65, 60)),),
        unmerged=(_MIXED,),
        refused=(_OTHERS,),
        needs="transformers>=5.4",  # before, it returned fewer hidden states
    ),
    "dpt": Family(
        "DPT",
        "image",
        _dpt,
        images,
        (stream(65, (0,), CLASS, blocks=4),),
        "predicted_depth",
        unmerged=(_GRID,),
    ),
    "depth_anything": Family(
        "Depth Anything",
        "image",
        _depth_anything,
        images,
        (stream(65, (0,), blocks=4),),
        "predicted_depth",
        unmerged=(_GRID,),
    ),
    "masked_images": Family(
        "ViT for masked image modeling",
        "image",
        _masked_images,
        images,
        (stream(65, (0,)),),
        "reconstruction",
        unmerged=(_GRID,),
    ),
    "clip": Family(
        "CLIP, both towers",
        "image and text",
        _clip,
        words_and_images,
        (stream(65, (0,), CLASS, returned(65)),),
        "logits_per_image",
        refused=(_MASKED,),
    ),
    "siglip": Family(
        "SigLIP, both towers",
        "image and text",
        _siglip,
        words_and_images,
        (stream(64, (), POOLED, returned(64)),),
        "logits_per_image",
        refused=(_BY_IDS,),
        pooled=True,
    ),
    "blip_vision": Family(
        "BLIP vision",
        "image",
        _blip_vision,
        images,
        (stream(65, (0,), CLASS, returned(65)),),
        "pooler_output",
    ),
    "llava": Family(
        "LLaVA's vision tower and projector",
        "image",
        Llava,
        images,
        (stream(65, (0,), returned(64, 50)),),
        "tokens",
    ),
    "bert": Family(
        "BERT",
        "text",
        _bert,
        words,
        (stream(24, (), returned(24)),),
        "last_hidden_state",
        unmerged=(_ONE,),
    ),
    "bert_padded": Family(
        "BERT, padded batch",
        "text",
        _bert,
        padded_words,
        (stream(24, (), returned(24)),),
        "last_hidden_state",
        sides=("padding mask",),
        unmerged=(_ONE,),
    ),
    "whisper": Family(
        "Whisper encoder",
        "audio",
        _whisper,
        features,
        (stream(32, (), returned(32)),),
        "last_hidden_state",
    ),
    "wav2vec2": Family(
        "wav2vec 2.0",
        "audio",
        _wav2vec2,
        waves,
        (stream(50, (), returned(50)),),
        "last_hidden_state",
        needs="torch>=2.13",  # Dynamo of 2.11 breaks the graph within transformers
    ),
}
"""By name; every one of them must merge without a line of code of its own."""

CORE = list(FAMILIES)[:10]
"""Those that tests which cost more than a glance go through."""

WINDOWS = "windowed or hierarchical"

REFUSED: dict[str, Refused] = {
    "swin": Refused("Swin", "image", _swin, images, WINDOWS, "modeling_swin.py"),
    "sam": Refused("SAM vision", "image", _sam, images, WINDOWS, "modeling_sam.py"),
    "vitdet": Refused("ViTDet", "image", _vitdet, images, WINDOWS, "modeling_vitdet.py"),
    "hiera": Refused("Hiera", "image", _hiera, images, WINDOWS, "modeling_hiera.py"),
    "gpt2": Refused("GPT-2", "text", _gpt2, words, "may be causal", "modeling_gpt2.py"),
    "t5_decoder": Refused(
        "T5 decoder", "text", _t5_decoder, words, "may be causal", "modeling_t5.py"
    ),
}
"""Left alone, each with a reason and the line of the model that it points to."""


REFERENCES: dict[str, Callable[..., reference_models.Result]] = {
    "vit": reference_models.vit_forward,
    "deit_distilled": reference_models.deit_forward,
    "ijepa": reference_models.ijepa_forward,
    "dinov2_registers": reference_models.dinov2_with_registers_forward,
}
"""Plain eager ToMe of whole models: ``REFERENCES[name](model, pixel_values, r, prop_attn)``."""


def installed(needs: str) -> bool:
    """Is there a version that meets a requirement?"""
    requirement = Requirement(needs)
    return requirement.specifier.contains(version(requirement.name), prereleases=True)


def make_model(name: str, seed: int = 0) -> Any:
    """A fresh model of a family, in eval mode, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return scaled_up((FAMILIES.get(name) or REFUSED[name]).make())


def make_vit(**changes: Any) -> Any:
    """A ViT with some fields of its config changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return scaled_up(_vit(**changes))


def make_inputs(name: str, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Random inputs, by the names the model gives them."""
    generator = torch.Generator().manual_seed(seed)
    return (FAMILIES.get(name) or REFUSED[name]).inputs(batch, generator)


def output_of(name: str, outputs: Any) -> Tensor:
    """The tensor that stands for what the model computes: its logits or its embedding."""
    value: Tensor = outputs[FAMILIES[name].output]
    return value


def scaled_up(model: Any, factor: float = 6.0) -> Any:
    """Larger weights, in eval mode: a freshly initialised ViT hardly attends at all."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude of the second."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape, f"shapes {list(ours.shape)} and {list(theirs.shape)}"
    return float((ours - theirs).abs().max() / theirs.abs().max())
