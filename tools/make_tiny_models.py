"""Build models/chatglm-tiny and models/chatglm2-tiny: train the tokenizers, then pretrain the models.

python -m tools.make_tiny_models --stage tokenizer
python -m tools.make_tiny_models --stage pretrain --family chatglm2-6b

The sentencepiece files in models/ were trained on an earlier version of tiny_corpus.py. After --stage tokenizer, which
replaces them, the models have to be pretrained anew, too.
"""

import argparse
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as sp_pb2
from torch.utils.data import DataLoader, Dataset

from glm_utils.checkpoint import load_classes
from glm_utils.family import FAMILIES, PROJECT_DIR
from tools.tiny_corpus import dialogue, document, plain_text

SEED, NUM_TOKENIZER_LINES = 20231124, 40_000
MODEL_DIRS = {"chatglm-6b": PROJECT_DIR / "models/chatglm-tiny", "chatglm2-6b": PROJECT_DIR / "models/chatglm2-tiny"}
NUM_PIECES = 2000  # ordinary pieces of ChatGLM's file (control pieces follow), all pieces of ChatGLM2's
Piece = sp_pb2.ModelProto.SentencePiece

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
}
CONFIGS = {
    "chatglm-6b": {
        "vocab_size": 2368,
        "hidden_size": 256,
        "num_layers": 4,
        "num_attention_heads": 4,
        "inner_hidden_size": 640,
        "layernorm_epsilon": 1e-5,
        "max_sequence_length": 2048,
        "position_encoding_2d": True,
        "bos_token_id": 2004,
        "eos_token_id": 2005,
        "mask_token_id": 2000,
        "gmask_token_id": 2001,
        "pad_token_id": 3,
    },
    "chatglm2-6b": {
        "padded_vocab_size": 2048,
        "hidden_size": 256,
        "num_layers": 4,
        "num_attention_heads": 4,
        "kv_channels": 64,
        "ffn_hidden_size": 512,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": True,
        "fp32_residual_connection": False,
        "layernorm_epsilon": 1e-5,
        "original_rope": True,
        "seq_length": 2048,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}
TOKENIZER_CONFIGS = {
    "chatglm-6b": {
        "bos_token": "<sop>",
        "eos_token": "<eop>",
        "end_token": "</s>",
        "gmask_token": "[gMASK]",
        "mask_token": "[MASK]",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "num_image_tokens": 0,
    },
    "chatglm2-6b": {},
}


def train_sentencepiece(**settings) -> sp_pb2.ModelProto:
    """Train a sentencepiece model on the corpus and return it."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=plain_text(NUM_TOKENIZER_LINES, SEED),
        model_writer=buffer,
        byte_fallback=True,
        character_coverage=1.0,
        max_sentencepiece_length=8,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return sp_pb2.ModelProto.FromString(buffer.getvalue())


def make_chatglm_tokenizer() -> bytes:
    """Build ice_text.model: ordinary pieces, then control pieces, blanks and bytes, in the published order."""
    trained = train_sentencepiece(
        model_type="unigram", vocab_size=NUM_PIECES + 254, hard_vocab_limit=False, normalization_rule_name="nmt_nfkc"
    )
    ordinary = [piece for piece in trained.pieces if piece.type == Piece.NORMAL and piece.piece != "▁"]
    mark = next((piece for piece in trained.pieces if piece.piece == "▁"), Piece(piece="▁", score=-10.0))
    symbols = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
    controls = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    head = [
        Piece(piece="<unk>", type=Piece.UNKNOWN),
        *(Piece(piece=name, type=Piece.CONTROL) for name in ("<s>", "</s>", "<pad>")),
        Piece(piece="<n>", type=Piece.USER_DEFINED),
        mark,
    ]
    ordinary = ordinary[: NUM_PIECES - len(head)]
    num_unused = NUM_PIECES - len(head) - len(ordinary)
    filler = [Piece(piece=f"<unused_piece_{n}>", type=Piece.UNUSED) for n in range(num_unused)]
    tail = [
        *(Piece(piece=name, type=Piece.CONTROL) for name in controls),
        *(Piece(piece=name, type=Piece.USER_DEFINED) for name in symbols),
        *(Piece(piece=f"<0x{byte:02X}>", type=Piece.BYTE) for byte in range(256)),
    ]
    del trained.pieces[:]
    trained.pieces.extend([*head, *ordinary, *filler, *tail])
    trained.trainer_spec.pad_id = 3
    trained.trainer_spec.pad_piece = "<pad>"
    trained.trainer_spec.vocab_size = len(trained.pieces)
    return trained.SerializeToString()


def make_chatglm2_tokenizer() -> bytes:
    """Build tokenizer.model: BPE with byte fallback, over text that is not normalized."""
    return train_sentencepiece(
        model_type="bpe",
        vocab_size=NUM_PIECES,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    ).SerializeToString()


def write_tokenizers() -> None:
    """Write configuration and tokenizer files of both models."""
    for family, model_dir in MODEL_DIRS.items():
        model_dir.mkdir(parents=True, exist_ok=True)
        name, make = {
            "chatglm-6b": ("ice_text.model", make_chatglm_tokenizer),
            "chatglm2-6b": ("tokenizer.model", make_chatglm2_tokenizer),
        }[family]
        (model_dir / name).write_bytes(make())
        tokenizer_config = {
            "name_or_path": model_dir.name,
            "tokenizer_class": "ChatGLMTokenizer",
            "do_lower_case": False,
            "remove_space": False,
            "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
            **TOKENIZER_CONFIGS[family],
        }
        config = {
            "architectures": ["ChatGLMModel"],
            "auto_map": AUTO_MAP,
            "model_type": "chatglm",
            **CONFIGS[family],
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_cache": True,
        }
        for filename, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
            (model_dir / filename).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")


class Batches(Dataset):
    """Right-padded batches of ids and labels, (B, T); the seed and its number determine a batch.

    Args:
        tokenizer: The model's tokenizer.
        num_batches: How many there are.
        batch_size: Examples per batch.
    """

    def __init__(self, tokenizer, num_batches: int, batch_size: int):
        self.tokenizer, self.num_batches, self.batch_size = tokenizer, num_batches, batch_size

    def __len__(self) -> int:
        """Return the number of batches."""
        return self.num_batches

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a batch."""
        rng = random.Random(f"{SEED} {index}")
        examples = [self.encode_example(rng) for _ in range(self.batch_size)]
        width, pad = -(-max(len(ids) for ids, _ in examples) // 16) * 16, self.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in examples])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
        return ids, labels

    def encode_example(self, rng: random.Random) -> tuple[list[int], list[int]]:
        """Draw an example: ids, and labels for a full document or for the last answer of a conversation."""
        tokenizer = self.tokenizer
        if rng.random() < 0.35:
            ids = tokenizer.build_inputs_with_special_tokens([])
            body = [*tokenizer.encode_text(document(rng)), tokenizer.eos_token_id]
            return ids + body, [-100] * len(ids) + body
        *history, (question, answer) = dialogue(rng)
        prompt, body = tokenizer.encode_prompt(question, history), tokenizer.encode_answer(answer)
        return prompt + body, [-100] * len(prompt) + body


def pretrain(
    family: str, out: Path, steps: int, batch_size: int, learning_rate: float, device: str, num_workers: int
) -> None:
    """Pretrain one tiny model from random weights and write it in fp16 under the published keys.

    Args:
        family: Name of the family.
        out: The model's directory; configuration and tokenizer files are copied there.
        steps: Optimizer steps.
        batch_size: Examples per step.
        learning_rate: Peak of the cosine schedule with warmup.
        device: cpu or cuda.
        num_workers: Processes that draw and encode batches ahead of time; the batches are the same for any number.
    """
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    for path in MODEL_DIRS[family].iterdir():
        if path.suffix in (".json", ".model", ".md") and path.parent.resolve() != out.resolve():
            shutil.copy(path, out)
    classes = load_classes(next(record for record in FAMILIES if record.name == family))
    tokenizer = classes.tokenizer.from_pretrained(str(out))
    config = classes.config.from_pretrained(str(out))
    config.dtype = torch.float32
    model = classes.model(config).float().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    batches = DataLoader(Batches(tokenizer, steps, batch_size), batch_size=None, num_workers=num_workers)
    for step, (ids, labels) in enumerate(batches):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(ids.to(device), labels=labels.to(device), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    state = {key: value.half().cpu().contiguous() for key, value in model.state_dict().items()}
    if not all(torch.isfinite(value).all() for value in state.values()):
        sys.exit("a weight does not fit into fp16: lower --learning_rate")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Parse the arguments and run a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("tokenizer", "pretrain"), required=True)
    parser.add_argument("--family", choices=tuple(MODEL_DIRS), default="chatglm2-6b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_workers", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 1)))
    args = parser.parse_args()
    if args.stage == "tokenizer":
        write_tokenizers()
    else:
        out = args.out or MODEL_DIRS[args.family]
        pretrain(args.family, out, args.steps, args.batch_size, args.learning_rate, args.device, args.num_workers)


if __name__ == "__main__":
    main()
