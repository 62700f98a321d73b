"""`layerwise.hf.Trainer` instead of `transformers.Trainer`: a small Llama learns to count, and resumes training."""

import tempfile

import torch
import transformers

import layerwise.hf

transformers.utils.logging.disable_progress_bar()


class Counting(torch.utils.data.Dataset):
    """Sequences that count up from anywhere, modulo 16."""

    def __len__(self):
        return 256

    def __getitem__(self, i):
        tokens = (torch.arange(24) + i) % 16
        return {"input_ids": tokens, "labels": tokens}


def main(steps: int = 40) -> float:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=16, use_cache=False, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_steps=steps // 2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        torch.manual_seed(0)
        trainer = layerwise.hf.Trainer(
            transformers.LlamaForCausalLM(config),
            args,
            rule="local_ce",
            train_dataset=Counting(),
            eval_dataset=Counting(),
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        print(f"evaluation loss {loss:.2f} after {trainer.state.global_step} steps")

        again = layerwise.hf.Trainer(transformers.LlamaForCausalLM(config), args, train_dataset=Counting())
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-{steps // 2}")
        pairs = zip(trainer.model.parameters(), again.model.parameters(), strict=True)
        print("the same bits after resuming:", all(torch.equal(a, b) for a, b in pairs))
    return loss


if __name__ == "__main__":
    main()
