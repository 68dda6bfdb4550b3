"""LoRA: two thin matrices beside each linear layer are trained, the model itself is not (arXiv 2106.09685).

A frozen weight needs no gradient and no moments, 12 of the 16 bytes that AdamW takes for it. The layers are
peft's; before anything leaves the run, the thin matrices are added to the weights that they change, so that a
saved model is an ordinary one.
"""

LAYERS = ["query", "key", "value", "dense"]  # every linear layer of BERT, RoBERTa and XLM-RoBERTa


def add_lora(encoder, rank):
    """Freeze the backbone and put matrices of this rank beside its linear layers, on its device."""
    import peft  # only here: it takes seconds to import

    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=LAYERS), encoder.backbone)
    encoder.to(encoder.device)


def lora_layers(backbone):
    """[(parent module, attribute, LoRA layer)]."""
    return [
        (parent, name, child)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if hasattr(child, "lora_A")
    ]


def without_lora(backbone):
    """The backbone's state dict under its own names, each weight with what its matrices add to it."""
    layers = lora_layers(backbone)
    state = {name: w for name, w in backbone.state_dict().items() if ".lora_" not in name}
    state = {name.replace(".base_layer", ""): w for name, w in state.items()}
    if layers:
        names = {module: name for name, module in backbone.named_modules()}
        for _, _, layer in layers:
            name = f"{names[layer]}.weight"
            state[name] = state[name] + layer.get_delta_weight("default").detach()
    return state


def merge_lora(encoder):
    """Undo `add_lora`: the weights hold what was learned, and are trainable again."""
    layers = lora_layers(encoder.backbone)
    for parent, name, layer in layers:
        layer.merge()
        setattr(parent, name, layer.base_layer)
    if layers:
        encoder.backbone.requires_grad_(True)
