"""The zoo's gpt and the Llama of transformers are one function; what a run trains loads into the user's class."""

import json

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", reason="the hf extra (transformers) is not installed")

from layerwise import models  # noqa: E402
from layerwise.cli.main import main  # noqa: E402
from layerwise.runs.building import load_run  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def llama(vocabulary, **options):
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    return transformers.LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=64, use_cache=False, **sizes, **options
    )


NAMES = {
    "stem.embedding": "model.embed_tokens",
    "head.norm": "model.norm",
    "head.linear": "lm_head",
    "attn.norm": "input_layernorm",
    "attn.project": "self_attn.o_proj",
    "mlp.norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.expand": "mlp.up_proj",
    "mlp.project": "mlp.down_proj",
}


def renamed(state):
    """The weights of a gpt under the names of a Llama."""
    found = {}
    for name, weight in state.items():
        for own, theirs in NAMES.items():
            name = name.replace(own, theirs)
        head, _, rest = name.partition(".")
        if head.startswith("block"):
            name = f"model.layers.{int(head.removeprefix('block')) - 1}.{rest}"
        if "qkv" in name:
            for letter, part in zip("qkv", weight.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"self_attn.{letter}_proj")] = part
        else:
            found[name] = weight
    return found


def test_gpt_is_a_llama():
    torch.manual_seed(0)
    gpt = models.create("gpt", (1, 1, 16), 11, depth=2, width=12, heads=3)
    theirs = transformers.LlamaForCausalLM(llama(11, rms_norm_eps=1e-6)).eval()
    theirs.load_state_dict(renamed(gpt.state_dict()))
    x = torch.randint(11, (3, 16))
    torch.testing.assert_close(gpt(x), theirs(input_ids=x).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_a_run_trains_load_into_the_class_of_transformers(tied, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("the sea is wide and blue\n" * 60)
    config = llama(7, tie_word_embeddings=tied)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "llama")
    words = ["--data", f"text:{tmp_path / 'a.txt'}", "--model", f"hf:{tmp_path / 'llama'}", "--data.window", "8"]
    words += ["--rule", "local_ce", "--steps", "3", "--batch-size", "4", "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
    own = load_run(tmp_path / "run", "cpu").learner
    config.vocab_size = len(json.loads((tmp_path / "run" / "tokenizer.json").read_text())["characters"])
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(load_file(tmp_path / "out.safetensors"))
    x = torch.randint(config.vocab_size, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(own(x), theirs(input_ids=x).logits, atol=1e-6, rtol=1e-5)
