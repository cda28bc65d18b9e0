"""The independent implementation: transformers' CLIPModel holding the weights of one of our Vision Transformers."""

import torch
from transformers import CLIPConfig, CLIPModel


def as_transformers(model):
    """`model` as a transformers.CLIPModel in evaluation mode, its weights moved key by key."""
    ours = model.float().state_dict()
    block = model.visual.transformer.resblocks[0]
    vision = dict(
        hidden_size=ours["visual.proj"].shape[0],
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=model.visual.transformer.layers,
        num_attention_heads=block.attn.num_heads,
        image_size=model.visual.input_resolution,
        patch_size=model.visual.conv1.kernel_size[0],
    )
    text = dict(
        hidden_size=model.transformer.width,
        intermediate_size=model.transformer.width * 4,
        num_hidden_layers=model.transformer.layers,
        num_attention_heads=model.transformer.resblocks[0].attn.num_heads,
        max_position_embeddings=model.context_length,
        vocab_size=model.vocab_size,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    config = CLIPConfig(
        text_config=text | {"hidden_act": "quick_gelu"},
        vision_config=vision | {"hidden_act": "quick_gelu"},
        projection_dim=ours["visual.proj"].shape[1],
    )
    theirs = {
        "logit_scale": ours["logit_scale"],
        "text_projection.weight": ours["text_projection"].T,
        "visual_projection.weight": ours["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": ours["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": ours["positional_embedding"],
        "vision_model.embeddings.class_embedding": ours["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": ours["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": ours["visual.conv1.weight"],
    }
    parts = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for tower, name, layers in (
        ("", "text_model", model.transformer.layers),
        ("visual.", "vision_model", model.visual.transformer.layers),
    ):
        for i in range(layers):
            old, new = f"{tower}transformer.resblocks.{i}", f"{name}.encoder.layers.{i}"
            parts |= {
                f"{old}.attn.out_proj": f"{new}.self_attn.out_proj",
                f"{old}.ln_1": f"{new}.layer_norm1",
                f"{old}.ln_2": f"{new}.layer_norm2",
                f"{old}.mlp.c_fc": f"{new}.mlp.fc1",
                f"{old}.mlp.c_proj": f"{new}.mlp.fc2",
            }
            for kind in ("weight", "bias"):
                thirds = ours[f"{old}.attn.in_proj_{kind}"].chunk(3)
                for letter, third in zip("qkv", thirds, strict=True):
                    theirs[f"{new}.self_attn.{letter}_proj.{kind}"] = third
    for old, new in parts.items():
        theirs |= {f"{new}.{kind}": ours[f"{old}.{kind}"] for kind in ("weight", "bias")}
    with torch.device("meta"):
        peer = CLIPModel(config)
    peer.to_empty(device="cpu")
    for tower in (peer.text_model, peer.vision_model):
        embeddings = tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    peer.load_state_dict({key: value.clone().contiguous() for key, value in theirs.items()})
    return peer.eval()
