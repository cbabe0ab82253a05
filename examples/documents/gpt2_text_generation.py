"""GPT-2 on this package's attention: a prompt continued with beams, by transformers' own classes.

The checkpoint is made here, by a few minutes of training on docstrings, when the folder does not hold one yet: nothing
is downloaded. Another GPT-2 checkpoint on disk serves as well.
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fused_attention.integrations.transformers import register
from fused_attention.models.gemini.data import text
from fused_attention.models.gemini.tokenization import train_tokenizer
from fused_attention.models.gemini.training import Recipe, Trainer

register()  # makes attn_implementation="fused_attention" known


def make_checkpoint(folder: Path, steps: int) -> None:
    """Train a GPT-2 of about a million parameters and save it with its tokenizer."""
    torch.manual_seed(0)
    sentences = text.sentences("train")
    tokenizer = train_tokenizer(sentences, vocab_size=1024)
    tokenizer.padding_side = "right"
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 128}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), **sizes, **ids, attn_implementation="fused_attention")

    def batches(step: int, rank: int) -> dict[str, torch.Tensor]:
        rows = torch.randint(len(sentences), (16,), generator=torch.Generator().manual_seed(1000 * rank + step))
        chosen = [sentences[int(row)] + "<eos>" for row in rows]
        batch = tokenizer(chosen, padding=True, truncation=True, max_length=64, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    recipe = Recipe(steps=steps, learning_rate=2e-3, warmup=max(1, steps // 20))
    trainer = Trainer(
        GPT2LMHeadModel(config),
        recipe,
        batches,
        lambda model, batch: {"loss": model(**batch).loss},
        folder / "training",
    )
    trainer.run()
    trainer.plain_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=Path("runs/gpt2"))
    p.add_argument("--steps", type=int, default=400, help="of training, where there is no checkpoint")
    args = p.parse_args()
    if not (args.model / "config.json").exists():
        make_checkpoint(args.model, args.steps)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = GPT2LMHeadModel.from_pretrained(args.model, attn_implementation="fused_attention")

    input_text = "Once upon a time"
    input_ids = tokenizer.encode(input_text, return_tensors="pt")
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_length=100,
        num_beams=5,
        no_repeat_ngram_size=2,
        early_stopping=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
