"""Seven tiny diffusers pipelines of the real classes, from config alone: offline, deterministic, .2
s each.

Everything is in eval mode (models built from config start in train mode, and T5's dropout would
make calls differ). Tokenizers have hand-written vocabularies: training one is not deterministic
between processes.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = [
    *("a", "red", "green", "blue", "yellow", "circle", "square", "triangle"),
    *("left", "right", "of", "above"),
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH = 16


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges that spell each word of `WORDS` from left to right;
    letters for everything else.
    """
    vocabulary = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for piece in pieces[1:]:
            if (left, piece) not in merges:
                merges.append((left, piece))
            left += piece
            if left not in vocabulary:
                vocabulary.append(left)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={v: i for i, v in enumerate(vocabulary)}, merges=merges, model_max_length=LENGTH
    )


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram vocabulary: whole words of `WORDS`, letters for everything else."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in WORDS), *LETTERS]
    scores = [
        (piece, 0.0 if i < 3 else -1.0 - len(pieces[3:]) * (len(piece) == 1))
        for i, piece in enumerate(pieces)
    ]
    return T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=LENGTH)


def clip(tokenizer: CLIPTokenizer, projected: bool = False) -> Any:
    """A 2-layer CLIP text encoder of width 32.
    Pooling finds the end of the text by the tokenizer's id.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(tokenizer: T5TokenizerFast, width: int = 32, multilingual: bool = False) -> Any:
    """A 2-layer T5 (or UMT5) encoder."""
    kinds = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    return kinds[1](
        kinds[0](
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def vae(**options: Any) -> AutoencoderKL:
    """An image autoencoder that halves 32 x 32 to 16 x 16, with 4 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **options,
    )


def flow_vae() -> AutoencoderKL:
    """SD3's and Flux's: without quantisation convolutions;
    without a shift factor their decoding raises.
    """
    return vae(
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5
    )


def unet(**options: Any) -> UNet2DConditionModel:
    """Two levels on 16 x 16 latents."""
    shape = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**shape, **options})


def ddim(**options: Any) -> DDIMScheduler:
    """Stable Diffusion's schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **options,
    )


def sd15() -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        unet=unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
        ),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, projected=True),
        tokenizer_2=tokenizer,
        unet=unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=1,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        scheduler=ddim(),
    )


def sd3() -> StableDiffusion3Pipeline:
    tokenizer, t5_words = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(),
        text_encoder=clip(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, projected=True),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(t5_words, width=64),
        tokenizer_3=t5_words,
    )


def flux() -> FluxPipeline:
    tokenizer, t5_words = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15
        ),
        vae=flow_vae(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(t5_words),
        tokenizer_2=t5_words,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
    )


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def wan(**options: Any) -> WanPipeline:
    tokenizer = t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer, multilingual=True),
        vae=AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=wan_transformer(),
        **options,
    )


def ltx() -> LTXPipeline:
    tokenizer = t5_tokenizer()
    autoencoder = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    autoencoder.use_framewise_encoding = autoencoder.use_framewise_decoding = False
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            shift_terminal=0.1,
        ),
        vae=autoencoder,
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=32,
        ),
    )


def cogvideox() -> CogVideoXPipeline:
    tokenizer = t5_tokenizer()
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=AutoencoderKLCogVideoX(
            in_channels=3,
            out_channels=3,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=LENGTH,
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    )


BUILD: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "wan": wan,
    "ltx": ltx,
    "cogvideox": cogvideox,
}
"""Family -> a function that builds its pipeline."""

TOKENS = {"max_sequence_length": LENGTH}
CALL: dict[str, dict[str, Any]] = {
    "sd15": {"height": 32, "width": 32},
    "sdxl": {"height": 32, "width": 32},
    "sd3": {"height": 32, "width": 32, **TOKENS},
    "flux": {"height": 32, "width": 32, "guidance_scale": 3.5, **TOKENS},
    "wan": {"height": 32, "width": 32, "num_frames": 5, **TOKENS},
    "ltx": {"height": 32, "width": 32, "num_frames": 9, **TOKENS},
    "cogvideox": {"height": 16, "width": 16, "num_frames": 8, **TOKENS},
}
"""Family -> the settings' ``call``."""

GUIDANCE = {
    "sd15": 5.0,
    "sdxl": 5.0,
    "sd3": 4.5,
    "flux": 1.0,
    "wan": 4.0,
    "ltx": 3.0,
    "cogvideox": 6.0,
}
"""Family -> classifier-free guidance scale; 1 where the family has none of its own."""


def build(family: str, seed: int = 0) -> Any:
    """The family's pipeline with weights drawn from ``seed``, in eval mode, silent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = BUILD[family]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
