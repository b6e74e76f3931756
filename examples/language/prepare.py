"""Make what the language example needs and no download gives: text, a tokenizer, and two model
configurations.

    python examples/language/prepare.py OUT [--files 60] [--vocabulary 2048]

OUT/corpus/ gets Python sources of the interpreter's own library, OUT/tokenizer.json a byte-level
BPE trained on them, OUT/teacher and OUT/student the configurations of two tiny Llamas for
`hf-config:`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer

MODELS = {
    "teacher": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 384,
    },
    "student": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    },
}


def copy_corpus(folder: Path, files: int, largest: int = 60_000) -> list[Path]:
    """Copy the first `files` sources of the standard library of at most `largest` bytes, in order
    of their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    sources = [p for p in sorted(library.glob("*.py")) if 2_000 <= p.stat().st_size <= largest][
        :files
    ]
    return [Path(shutil.copyfile(source, folder / source.name)) for source in sources]


def prepare(out: Path, files: int = 60, vocabulary: int = 2048) -> None:
    """Write corpus, tokenizer and model configurations below `out`."""
    sources = copy_corpus(out / "corpus", files)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(source) for source in sources], vocab_size=vocabulary, show_progress=False)
    tokenizer.save(str(out / "tokenizer.json"))
    for name, sizes in MODELS.items():
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocabulary,
            "max_position_embeddings": 512,
            "num_key_value_heads": sizes["num_attention_heads"],
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            **sizes,
        }
        (out / name).mkdir(exist_ok=True)
        (out / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", type=int, default=60)
    parser.add_argument("--vocabulary", type=int, default=2048)
    given = parser.parse_args()
    prepare(given.out, given.files, given.vocabulary)
    print(
        f"{given.out}: {len(list((given.out / 'corpus').glob('*.py')))} files, tokenizer.json, "
        "teacher/, student/"
    )
