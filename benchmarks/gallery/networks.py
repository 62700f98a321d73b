"""Networks that nobody here wrote, and a few that the libraries do not have: small, with random weights.

Each is a function that gets a depth and returns an `Entry`. What a library needs is imported in the function.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import LanguageModel, Loss, Regression, Segmentation

CLASSES, VOCABULARY, SAMPLES, TOKENS = 5, 64, 8, 16


@dataclass
class Entry:
    """A network with a batch, and how it is trained."""

    model: nn.Module
    batch: Any
    """What `step` gets: a mapping with `labels`, or a tuple of the input and the labels."""
    cuts: str | list[str] = "auto"
    task: Any = None
    output: Callable[[Any], Tensor] | None = None
    plain: Callable[[Any, Any], Tensor] = field(default=lambda model, batch: model(**batch).loss)
    """The loss of an ordinary loop: from model and batch."""


def logits_of(out: Any) -> Tensor:
    """The logits in a library's output."""
    return out.logits


def ids(samples: int = SAMPLES, tokens: int = TOKENS) -> Tensor:
    """Random tokens."""
    return torch.randint(3, VOCABULARY, (samples, tokens))


def images(size: int = 16) -> Tensor:
    """Random images."""
    return torch.randn(SAMPLES, 3, size, size)


def labels() -> Tensor:
    """A class per sample."""
    return torch.arange(SAMPLES) % CLASSES


def text() -> dict[str, Tensor]:
    """Tokens, a mask with padding, labels with -100 there."""
    tokens, mask = ids(), torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    mask[0, -3:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def language(model: nn.Module, **batch: Tensor) -> Entry:
    """A model of `transformers` for the next token."""
    return Entry(model, text() | batch, task=LanguageModel(), output=logits_of)


def classifier(model: nn.Module, x: Tensor | None = None, **options: Any) -> Entry:
    """A model of one tensor with a class per sample."""
    batch = (images() if x is None else x, labels())
    return Entry(model, batch, plain=lambda model, b: F.cross_entropy(model(b[0]), b[1]), **options)


# transformers


def gpt2(depth: int) -> Entry:
    """Tied embedding, learned positions, dropout."""
    import transformers as t

    config = t.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=depth, n_head=2, use_cache=False)
    return language(t.GPT2LMHeadModel(config))


def _decoder(depth: int) -> dict[str, Any]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": depth}
    return sizes | {"num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False}


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

    config = t.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=CLASSES,
    )
    return Entry(t.BertForSequenceClassification(config), text() | {"labels": labels()}, output=logits_of)


def hf_vit(depth: int) -> Entry:
    """A vision transformer."""
    import transformers as t

    config = t.ViTConfig(
        hidden_size=32,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=CLASSES,
    )
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

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": depth // 2}
    config = t.CLIPConfig(
        text_config=sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    batch = text() | {"pixel_values": images(), "labels": torch.arange(SAMPLES)}

    def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        given = {name: value for name, value in batch.items() if name != "labels"}
        return F.cross_entropy(model(**given).logits_per_image, batch["labels"])

    return Entry(t.CLIPModel(config), batch, output=lambda out: out.logits_per_image, plain=plain)


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


def torchvision_here() -> None:
    """Make a torchvision for CUDA importable beside a torch for the CPU.

    Its compiled operators cannot be loaded there, and importing it fails at their names, which are given here. None of
    the networks runs one.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or torch.version.cuda is not None:
        return
    if "+cu" in (Path(found.origin).parent / "version.py").read_text() and not hasattr(torchvision_here, "library"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision_here.__dict__["library"] = library  # whose end would be that of the names


def torchvision_resnet(depth: int) -> Entry:
    """Residual blocks in four stages."""
    from torchvision.models.resnet import BasicBlock, ResNet

    return classifier(ResNet(BasicBlock, [depth // 4] * 4, num_classes=CLASSES))


def torchvision_densenet(depth: int) -> Entry:
    """Every layer gets the outputs of all before it; cut behind dense blocks and transitions."""
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


def pixels(model: nn.Module, x: Tensor, output: Callable[[Any], Tensor] | None = None, **options: Any) -> Entry:
    """A model of images with a class per pixel: which of `CLASSES` ranges its brightness lies in."""
    bounds = torch.linspace(-0.6, 0.6, CLASSES - 1)
    y = torch.bucketize(F.avg_pool2d(x.mean(1, keepdim=True), 3, 1, 1)[:, 0], bounds / 2)
    y[0, :2] = -100

    def plain(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return F.cross_entropy(out if output is None else output(out), batch[1])

    return Entry(model, (x, y), task=Segmentation(), output=output, plain=plain, **options)


# Of our own


class Residual(nn.Module):
    """Two convolutions beside a skip."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, width)

    def forward(self, h: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same."""
        return h + self.two(self.one(self.norm(h)).relu())


class UNet(nn.Module):
    """Down and up again, with a skip from every level to its counterpart."""

    def __init__(self, blocks: int):
        super().__init__()
        widths = (8, 16)
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 1)
        self.down, self.up = (
            nn.ModuleList(nn.Sequential(*(Residual(w) for _ in range(blocks))) for w in widths) for _ in "du"
        )
        self.smaller = nn.Conv2d(8, 16, 2, stride=2)
        self.larger = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.joined = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, K, H, W)`."""
        fine = self.down[0](self.stem(x))
        h = self.up[1](self.down[1](self.smaller(fine)))
        return self.head(self.up[0](self.joined(torch.cat([fine, self.larger(h)], 1))))


def unet(depth: int) -> Entry:
    """A class per pixel."""
    return pixels(UNet(depth // 4), images(), cuts=["down.*.*", "up.*.*"])


class Feedforward(nn.Module):
    """A layer beside a skip."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """`(..., C)` to the same."""
        return h + self.down(self.up(self.norm(h)).relu())


class Autoencoder(nn.Module):
    """Layers, a bottleneck, layers."""

    def __init__(self, depth: int):
        super().__init__()
        self.inside, self.outside = nn.Linear(64, 32), nn.Linear(32, 64)
        self.encoder = nn.ModuleList(Feedforward(32) for _ in range(depth // 2))
        self.decoder = nn.ModuleList(Feedforward(32) for _ in range(depth // 2))
        self.narrow, self.wide = nn.Linear(32, 8), nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        """The input again."""
        h = self.inside(x)
        for layer in self.encoder:
            h = layer(h)
        h = self.wide(self.narrow(h))
        for layer in self.decoder:
            h = layer(h)
        return self.outside(h)


def autoencoder(depth: int) -> Entry:
    """Regression on the input itself."""
    x = torch.randn(32, 4) @ torch.randn(4, 64)
    return Entry(Autoencoder(depth), (x, x), task=Regression(), plain=lambda m, b: F.mse_loss(m(b[0]), b[1]))


class Pair(nn.Module):
    """A layer of each of two towers, over two views `(B, 2, C)`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Feedforward(32), Feedforward(32)

    def forward(self, h: Tensor) -> Tensor:
        """The two views again."""
        return torch.stack([self.one(h[:, 0]), self.two(h[:, 1])], 1)


class Towers(nn.Module):
    """Two towers side by side."""

    def __init__(self, depth: int):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(24, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.layers = nn.ModuleList(Pair() for _ in range(depth))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Embeddings `(B, 2, D)`."""
        h = torch.stack([self.left(left), self.right(right)], 1)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def contrast(z: Tensor, y: Tensor) -> Tensor:
    """InfoNCE of the two views `(B, 2, D)`: each finds its other one in the batch, whose number y is."""
    z = F.normalize(z, dim=-1)
    return F.cross_entropy(z[:, 0] @ z[:, 1].T / 0.2, y)


def towers(depth: int) -> Entry:
    """A contrastive loss of one's own, at the head and at every block."""
    source = torch.randn(32, 8)
    views = {"left": source @ torch.randn(8, 24), "right": source @ torch.randn(8, 16)}
    task = Loss(contrast, positions="token")
    y = torch.arange(32)

    def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return contrast(model(batch["left"], batch["right"]), batch["labels"])

    return Entry(Towers(depth), views | {"labels": y}, task=task, plain=plain)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` under a padding mask."""

    def __init__(self, depth: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, CLASSES)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the texts."""
        h = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask[..., None].float()
        return self.head((h * mask).sum(1) / mask.sum(1))


def encoder(depth: int) -> Entry:
    """`nn.TransformerEncoder` with mask and dropout."""

    def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    return Entry(Encoder(depth), text() | {"labels": labels()}, plain=plain)


class Recurrent(nn.Module):
    """LSTMs over one another; each returns its outputs and its states."""

    def __init__(self, depth: int):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.layers = nn.ModuleList(nn.LSTM(32, 32, batch_first=True) for _ in range(depth))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next tokens."""
        h = self.embedding(input_ids)
        for layer in self.layers:
            h = layer(h)[0]
        return self.head(h)


def lstm(depth: int) -> Entry:
    """A stack of LSTMs for the next token."""

    def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        following = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), following.flatten())

    tokens = ids()
    batch = {"input_ids": tokens, "labels": tokens}
    return Entry(Recurrent(depth), batch, task=LanguageModel(), plain=plain)


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


class Experts(nn.Module):
    """The best of four experts per sample, in a loop with branches that depend on the data."""

    def __init__(self, width: int):
        super().__init__()
        self.gate, self.norm = nn.Linear(width, 4), nn.LayerNorm(width)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The samples, and the load of the experts."""
        weights = self.gate(x).softmax(-1)
        chosen, out = weights.argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            if mine.any():
                out[mine] = expert(x[mine]) * weights[mine, i : i + 1]
        return self.norm(x + out), weights.mean(0)


class Mixture(nn.Module):
    """Layers of experts, and classes."""

    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(Experts(16) for _ in range(depth))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits, and the last load."""
        load = torch.zeros(4)
        for layer in self.layers:
            x, load = layer(x)
        return {"load": load, "logits": self.head(x)}


def experts(depth: int) -> Entry:
    """A mixture of experts by hand."""
    x = torch.randn(32, 16)
    y = torch.arange(32) % CLASSES
    return Entry(Mixture(depth), (x, y), plain=lambda m, b: F.cross_entropy(m(b[0])["logits"], b[1]))


def lora(depth: int) -> Entry:
    """Llama with frozen weights and adapters of peft."""
    import peft

    entry = llama(depth)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    entry.model = peft.get_peft_model(entry.model, config)
    return entry


ENTRIES: dict[str, SimpleNamespace] = {}


def _add(library: str, make: Callable[[int], Entry], title: str, depths: tuple[int, int], equal: bool) -> None:
    name = make.__name__
    ENTRIES[name] = SimpleNamespace(library=library, make=make, title=title, depths=depths, equal=equal)


for _make, _title, _depths, _equal in (
    (gpt2, "GPT-2", (4, 12), True),
    (llama, "Llama", (4, 12), True),
    (qwen3, "Qwen3", (4, 12), True),
    (mixtral, "Mixtral", (4, 12), True),
    (mamba, "Mamba", (4, 12), True),
    (bert, "BERT", (4, 12), True),
    (hf_vit, "ViT", (4, 12), True),
    (hf_resnet, "ResNet", (4, 12), False),
    (t5, "T5", (4, 12), True),
    (whisper, "Whisper", (4, 12), True),
    (clip, "CLIP", (4, 12), True),
):
    _add("transformers", _make, _title, _depths, _equal)
for _make, _title, _depths, _equal in (
    (timm_vit, "ViT", (4, 12), True),
    (timm_convnext, "ConvNeXt", (4, 12), False),
    (timm_swin, "Swin", (4, 12), False),
    (timm_efficientnet, "EfficientNet", (4, 12), False),
    (timm_resnet, "ResNet, dropout", (4, 12), False),
):
    _add("timm", _make, _title, _depths, _equal)
_add("torchvision", torchvision_resnet, "ResNet", (4, 12), False)
_add("torchvision", torchvision_densenet, "DenseNet", (4, 8), False)
_add("torchvision", segmentation, "FCN, dictionary of maps", (4, 12), False)
_add("torch", unet, "U-Net, per pixel", (4, 12), False)
_add("torch", encoder, "`nn.TransformerEncoder`, mask", (4, 12), True)
_add("torch", lstm, "LSTM stack", (4, 12), True)
_add("torch-geometric", graph, "GCN, `f(x, edge_index)`", (4, 12), True)
_add("torch", experts, "mixture of experts", (4, 12), True)
_add("torch", towers, "two towers, contrastive", (4, 12), True)
_add("torch", autoencoder, "autoencoder", (4, 12), True)
_add("peft", lora, "Llama with LoRA", (4, 12), True)
