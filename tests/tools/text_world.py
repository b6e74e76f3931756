"""Tokenizer files of a few words, and tiny models of text, for the tests of what belongs to which."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = "the cat sat on a mat and saw the dog run far away from it all day long".split()


def tokenizer_file(path: Path, words: list[str]) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(["?", *dict.fromkeys(words)])}, unk_token="?"
        )
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(path))
    return path


def llama(folder: Path, vocabulary: int = 24, positions: int = 64) -> Path:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
