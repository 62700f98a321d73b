"""The networks of the gallery, with two depths each."""

from collections.abc import Callable
from dataclasses import dataclass

import libraries as lib
import own
from entry import Entry


@dataclass(frozen=True)
class Network:
    """A row of the gallery."""

    library: str
    """The package that it comes from."""
    title: str
    make: Callable[[int], Entry]
    """Maps a depth to the network."""
    depths: tuple[int, int] = (4, 12)
    equal: bool = True
    """Whether its blocks are equal, so that the memory of a local rule may not grow."""


ENTRIES = {
    "gpt2": Network("transformers", "GPT-2, tied", lib.gpt2),
    "llama": Network("transformers", "Llama", lib.llama),
    "qwen3": Network("transformers", "Qwen3", lib.qwen3),
    "mixtral": Network("transformers", "Mixtral", lib.mixtral),
    "mamba": Network("transformers", "Mamba", lib.mamba),
    "bert": Network("transformers", "BERT", lib.bert),
    "hf_vit": Network("transformers", "ViT", lib.hf_vit),
    "hf_resnet": Network("transformers", "ResNet", lib.hf_resnet, equal=False),
    "t5": Network("transformers", "T5", lib.t5),
    "whisper": Network("transformers", "Whisper", lib.whisper),
    "clip": Network("transformers", "CLIP", lib.clip),
    "timm_vit": Network("timm", "ViT, dropped paths", lib.timm_vit),
    "timm_convnext": Network("timm", "ConvNeXt", lib.timm_convnext, equal=False),
    "timm_swin": Network("timm", "Swin", lib.timm_swin, equal=False),
    "timm_efficientnet": Network("timm", "EfficientNet", lib.timm_efficientnet, equal=False),
    "timm_resnet": Network("timm", "ResNet, dropout", lib.timm_resnet, equal=False),
    "torchvision_resnet": Network("torchvision", "ResNet", lib.torchvision_resnet, (8, 16), equal=False),
    "torchvision_densenet": Network("torchvision", "DenseNet", lib.torchvision_densenet, (4, 8), equal=False),
    "segmentation": Network("torchvision", "FCN, a dictionary of maps", lib.segmentation, equal=False),
    "graph": Network("torch-geometric", "GCN, `f(x, edge_index)`", lib.graph),
    "lora": Network("peft", "Llama with LoRA", lib.lora),
    "encoder": Network("torch", "`nn.TransformerEncoder`, mask", own.encoder),
    "lstm": Network("torch", "LSTM stack", own.lstm),
    "experts": Network("torch", "mixture of experts", own.experts),
    "unet": Network("torch", "U-Net, per pixel", own.unet, (8, 24), equal=False),
    "towers": Network("torch", "two towers, contrastive", own.towers),
    "autoencoder": Network("torch", "autoencoder", own.autoencoder),
}
