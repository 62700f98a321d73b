"""LoRA adapters of peft on a small Llama: the backbone stays as it is, and each block trains its own adapters."""

import copy

import peft
import torch
import transformers

import layerwise


def main(steps: int = 80) -> float:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=16, use_cache=False, **sizes)
    torch.manual_seed(0)
    backbone = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(
        backbone, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    )
    before = copy.deepcopy(model.state_dict())
    batch = {"input_ids": (torch.arange(24) + torch.arange(8)[:, None]) % 16}
    learner = layerwise.Learner(
        model,
        "sll",  # its projections are fixed: no readout that is larger than the adapters
        cuts="auto",
        task=layerwise.LanguageModel(),
        optimizer={"*.lora_B.*": {"lr": 8e-2}, "*": {"lr": 2e-2}},  # LoRA+: a larger rate for B
        example=batch,
    )
    for _ in range(steps):
        metrics = learner.step(batch, batch["input_ids"])
    after = model.state_dict()
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    print(f"loss {metrics.loss:.2f}; {len(moved)} of {len(before)} tensors have moved")
    print("all of them are adapters:", all("lora_" in name for name in moved))
    return float(metrics.loss)


if __name__ == "__main__":
    main()
