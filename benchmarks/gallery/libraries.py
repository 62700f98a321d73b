"""Networks of transformers, timm, torchvision, PyG and peft: small, with random weights.

Each is a function that takes a depth and imports its library itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from entry import (
    CLASSES,
    SAMPLES,
    VOCABULARY,
    Entry,
    classifier,
    ids,
    images,
    labels,
    language,
    logits_of,
    pixels,
    text,
)
from torch import Tensor, nn

from layerwise import LanguageModel

# transformers


def gpt2(depth: int) -> Entry:
    """Tied embedding, learned positions, dropout."""
    import transformers as t

    config = t.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=depth, n_head=2, use_cache=False)
    return language(t.GPT2LMHeadModel(config))


def _sizes(depth: int) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": depth}


def _decoder(depth: int) -> dict[str, Any]:
    return _sizes(depth) | {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "use_cache": False}


def llama(depth: int) -> Entry:
    """Rotary positions, grouped keys."""
    import transformers as t

    return language(t.LlamaForCausalLM(t.LlamaConfig(**_decoder(depth))))


def qwen3(depth: int) -> Entry:
    """Norms of queries and keys."""
    import transformers as t

    return language(t.Qwen3ForCausalLM(t.Qwen3Config(head_dim=16, **_decoder(depth))))


def mixtral(depth: int) -> Entry:
    """A mixture of experts with a router."""
    import transformers as t

    return language(t.MixtralForCausalLM(t.MixtralConfig(num_local_experts=4, **_decoder(depth))))


def mamba(depth: int) -> Entry:
    """A state-space model."""
    import transformers as t

    config = t.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=depth, state_size=4, use_cache=False
    )
    return language(t.MambaForCausalLM(config))


def bert(depth: int) -> Entry:
    """An encoder with token types, dropout, a pooler and a class per text."""
    import transformers as t

    config = t.BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **_sizes(depth))
    return Entry(t.BertForSequenceClassification(config), text() | {"labels": labels()}, output=logits_of)


def hf_vit(depth: int) -> Entry:
    """A vision transformer."""
    import transformers as t

    config = t.ViTConfig(image_size=16, patch_size=4, num_labels=CLASSES, **_sizes(depth))
    return Entry(t.ViTForImageClassification(config), {"pixel_values": images(), "labels": labels()}, output=logits_of)


def hf_resnet(depth: int) -> Entry:
    """Convolutions in stages."""
    import transformers as t

    config = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[depth // 2] * 2, num_labels=CLASSES, layer_type="basic"
    )
    batch = {"pixel_values": images(), "labels": labels()}
    return Entry(t.ResNetForImageClassification(config), batch, output=logits_of)


def t5(depth: int) -> Entry:
    """Encoder and decoder, cross-attention, relative positions."""
    import transformers as t

    config = t.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_ff=64,
        d_kv=16,
        num_layers=2,
        num_decoder_layers=depth,
        num_heads=2,
        use_cache=False,
        decoder_start_token_id=0,
    )
    batch = text() | {"decoder_input_ids": ids(tokens=7), "labels": ids(tokens=7)}
    task = LanguageModel(shift=False)
    return Entry(t.T5ForConditionalGeneration(config), batch, task=task, output=logits_of)


def whisper(depth: int) -> Entry:
    """Sound to text: convolutions, encoder, decoder."""
    import transformers as t

    heads = {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("attention_heads", 2), ("ffn_dim", 64))
    }
    config = t.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=depth,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **heads,
    )
    batch = {"input_features": torch.randn(SAMPLES, 8, 16), "decoder_input_ids": ids(tokens=7), "labels": ids(tokens=7)}
    task = LanguageModel(shift=False)
    return Entry(t.WhisperForConditionalGeneration(config), batch, task=task, output=logits_of)


def clip(depth: int) -> Entry:
    """Two towers for images and texts; the class of an image is its text among those of the batch."""
    import transformers as t

    sizes = _sizes(depth // 2)
    config = t.CLIPConfig(
        text_config=sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    batch = text() | {"pixel_values": images(), "labels": torch.arange(SAMPLES)}

    def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        given = {name: value for name, value in batch.items() if name != "labels"}
        return F.cross_entropy(model(**given).logits_per_image, batch["labels"])

    # What is between the towers learns from its own readout, because a cut follows it, too.
    cuts = ["vision_model.encoder.layers.*", "visual_projection", "text_model.encoder.layers.*"]
    return Entry(t.CLIPModel(config), batch, cuts, output=lambda out: out.logits_per_image, plain=plain)


# timm


def timm_vit(depth: int) -> Entry:
    """A vision transformer with dropped paths."""
    import timm

    return classifier(
        timm.models.VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=depth, num_heads=2, num_classes=CLASSES, drop_path_rate=0.1
        )
    )


def timm_convnext(depth: int) -> Entry:
    """Convolutions with norms over channels, in stages."""
    import timm

    return classifier(
        timm.models.ConvNeXt(
            depths=(depth // 4,) * 4, dims=(8, 12, 16, 24), patch_size=2, num_classes=CLASSES, drop_path_rate=0.1
        ),
        images(32),
    )


def timm_swin(depth: int) -> Entry:
    """Attention in shifted windows, maps with the channels last."""
    import timm

    return classifier(
        timm.models.SwinTransformer(
            img_size=16,
            patch_size=2,
            window_size=2,
            embed_dim=16,
            depths=(depth // 2,) * 2,
            num_heads=(2, 2),
            num_classes=CLASSES,
        )
    )


def timm_efficientnet(depth: int) -> Entry:
    """Inverted residuals with squeeze and excitation."""
    import timm
    from timm.models._efficientnet_builder import decode_arch_def

    stages = [[f"ir_r{depth // 2}_k3_s1_e3_c8_se0.25"], [f"ir_r{depth // 2}_k3_s2_e3_c16_se0.25"]]
    return classifier(
        timm.models.EfficientNet(
            decode_arch_def(stages), stem_size=8, num_features=32, num_classes=CLASSES, drop_path_rate=0.1
        )
    )


def timm_resnet(depth: int) -> Entry:
    """Residual blocks, with dropout before the classifier."""
    import timm
    from timm.models.resnet import BasicBlock

    return classifier(
        timm.models.ResNet(
            BasicBlock, (depth // 4,) * 4, channels=(8, 8, 16, 16), stem_width=8, num_classes=CLASSES, drop_rate=0.2
        )
    )


# torchvision


def torchvision_resnet(depth: int) -> Entry:
    """Residual blocks in four stages."""
    from torchvision.models.resnet import BasicBlock, ResNet

    return classifier(ResNet(BasicBlock, [depth // 4] * 4, num_classes=CLASSES))


def torchvision_densenet(depth: int) -> Entry:
    """Every layer gets the outputs of all earlier ones; cut after dense blocks and transitions."""
    from torchvision.models.densenet import DenseNet

    model = DenseNet(growth_rate=4, block_config=(2,) * (depth // 2), num_init_features=8, num_classes=CLASSES)
    return classifier(model, images(32), cuts=["features.*block*"])


def segmentation(depth: int) -> Entry:
    """A fully convolutional network, whose output is a dictionary with a map."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.resnet import BasicBlock, ResNet
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    backbone = IntermediateLayerGetter(ResNet(BasicBlock, [depth // 2, depth // 2, 1, 1]), {"layer2": "out"})
    return pixels(FCN(backbone, FCNHead(128, CLASSES)), images(32), output=lambda out: out["out"])


# torch-geometric and peft


class Convolved(nn.Module):
    """Graph convolutions of PyG."""

    def __init__(self, depth: int):
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.convs = nn.ModuleList(GCNConv(16, 16) for _ in range(depth))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits of the nodes."""
        for conv in self.convs:
            x = x + conv(x, edge_index).relu()
        return self.head(x)


def graph(depth: int) -> Entry:
    """PyG: `f(x, edge_index)`."""
    x, edges, y = torch.randn(64, 16), torch.randint(64, (2, 256)), torch.arange(64) % CLASSES
    return Entry(Convolved(depth), ((x, edges), y), plain=lambda m, b: F.cross_entropy(m(*b[0]), b[1]))


def lora(depth: int) -> Entry:
    """Llama with frozen weights and adapters of peft."""
    import peft

    entry = llama(depth)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    entry.model = peft.get_peft_model(entry.model, config)
    return entry
