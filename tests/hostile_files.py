"""Damaged and hostile files, as hypothesis strategies: mutations of bytes and of JSON values, from a whole original.

Used by test_hostile_files.py with few examples and by longer campaigns with many.
"""

import copy
import json
import struct

from hypothesis import strategies as st

# Values of a wrong type, of the wrong sign, at the end of a range, and much too large.
VALUES = [0, -1, 1, 2, 3, 10**5, 2**31, 2**33, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "4",
          "text", "\x1b[31m", "\ud800", "../..", "/etc/passwd", "\x00", None, True, False, [], {}, [None], [[[]]],
          {"a": {"b": []}}, ["a", 1], {"content": 3}, {"__type": "AddedToken"}]  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32")

values = st.one_of(
    st.sampled_from(VALUES),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)


def nested(depth: int) -> list:
    """Return lists in each other."""
    made: list = []
    for _ in range(depth):
        made = [made]
    return made


@st.composite
def damaged_json_objects(draw, original: dict, extra_keys: tuple[str, ...] = ()):
    """Draw an object with one to three changed, added or deleted values, at any depth.

    Args:
        draw: Given by hypothesis.
        original: A whole object; it stays as it is.
        extra_keys: Keys that the original lacks and a program may look for.
    """
    made = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        place = made
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            keys += list(extra_keys) if place is made else []
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place[key] if not isinstance(place, dict) or key in place else None
            if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
                place = inner
                continue
            if draw(st.integers(0, 4)) == 0 and inner is not None:
                del place[key]
            else:
                place[key] = nested(draw(st.integers(1, 600))) if draw(st.integers(0, 30)) == 0 else draw(values)
            break
    return made


@st.composite
def damaged_json_files(draw, original: dict, extra_keys: tuple[str, ...] = ()):
    """Draw the bytes of a JSON file: mostly a damaged object in UTF-8, at times another encoding or broken text."""
    data = json.dumps(draw(damaged_json_objects(original, extra_keys))).encode()
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return data.decode().encode(draw(st.sampled_from(ENCODINGS)))
    if kind == 1:
        return draw(damaged_bytes(data))
    return data


@st.composite
def damaged_bytes(draw, original: bytes):
    """Draw bytes that are truncated, overwritten, swapped, repeated or followed by noise."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["truncate", "overwrite", "insert", "delete", "flip", "zero", "append"]))
        if kind == "truncate":
            del data[place:]
        elif kind == "overwrite":
            noise = draw(st.binary(min_size=1, max_size=8))
            data[place : place + len(noise)] = noise
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del data[place : place + draw(st.integers(1, 64))]
        elif kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "zero":
            count = min(draw(st.integers(1, 64)), len(data) - place)
            data[place : place + count] = bytes(count)
        else:
            data += draw(st.binary(min_size=1, max_size=16))
    return bytes(data)


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    """Return the header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file; length is what it claims of its header, None: the truth."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@st.composite
def damaged_safetensors(draw, original: bytes):
    """Draw a safetensors file whose header lies, or whose bytes are damaged near the header."""
    header, data = split_safetensors(original)
    kind = draw(st.integers(0, 5))
    if kind == 0:
        head = len(original) - len(data)
        return draw(damaged_bytes(original[:head])) + data
    if kind == 1:
        return join_safetensors(json.dumps(header).encode(), data, draw(st.integers(0, 2**64 - 1)))
    if kind == 2:
        text = json.dumps(header)
        name = draw(st.sampled_from(sorted(header)))
        return join_safetensors(f'{text[:-1]},"{name}":{json.dumps(header[name])}}}'.encode(), data)
    if kind == 3:
        return join_safetensors(json.dumps(header).encode(), data[: draw(st.integers(0, len(data)))])
    name = draw(st.sampled_from(sorted(header)))
    if kind == 4 and name != "__metadata__":
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        dtypes = ["F64", "F8_E4M3", "F4", "BOOL", "U8", "I64", "F32", "f16", "XX"]
        sizes = st.lists(st.sampled_from([0, 1, 2, 256, -1, 2**31, 2**62, 2**64]), max_size=9)
        header[name][key] = draw(st.sampled_from(dtypes) if key == "dtype" else sizes)
        return join_safetensors(json.dumps(header).encode(), data)
    return join_safetensors(json.dumps(draw(damaged_json_objects(header, ("__metadata__",)))).encode(), data)


CONFIG_KEYS = ("num_hidden_layers", "head_dim", "id2label", "num_labels", "per_layer_config", "quantization_config",
               "rope_scaling", "_attn_implementation", "attn_implementation", "return_dict", "output_attentions",
               "dtype", "quantization_bit", "pre_seq_len", "to_dict", "__class__", "_heterogeneity_spec",
               "layer_types", "num_beams", "repetition_penalty", "eos_token_id", "problem_type",
               "attribute_map")  # fmt: skip
TOKENIZER_KEYS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "num_image_tokens",
                  "init_inputs", "vocab_file", "padding_side", "model_max_length", "chat_template", "sp_model_kwargs",
                  "model_specific_special_tokens", "bos_token", "pad_token", "image_token", "is_local")  # fmt: skip
GENERATION = {
    "_from_model_config": True, "eos_token_id": 2, "pad_token_id": 0, "do_sample": True, "temperature": 0.8,
    "top_p": 0.8, "top_k": 50, "max_new_tokens": 4, "num_beams": 1, "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3, "bad_words_ids": [[5], [6, 7]], "suppress_tokens": [9], "min_new_tokens": 1,
    "sequence_bias": [[[5], -1.0]], "exponential_decay_length_penalty": [2, 1.1], "forced_eos_token_id": 2,
    "typical_p": 0.9, "min_p": 0.01, "epsilon_cutoff": 0.001, "transformers_version": "4.27.1",
}  # fmt: skip
GENERATION_KEYS = ("num_return_sequences", "max_time", "penalty_alpha", "max_length", "compile_config",
                   "cache_config", "cache_implementation", "watermarking_config", "guidance_scale", "stop_strings",
                   "to_dict", "validate", "early_stopping", "continuous_batching_config",
                   "assistant_ensemble_weight")  # fmt: skip


def index_of(names: list[str]) -> dict:
    """Return a whole index of two shards."""
    shards = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(names)}
    return {"metadata": {"total_size": 123}, "weight_map": shards}


def file_kinds(model_dir, vocabulary_name: str) -> dict:
    """Return the kinds of files of a model directory: their name, and a strategy of what may stand in them.

    Args:
        model_dir: Directory of a whole model with model.safetensors.
        vocabulary_name: Name of its sentencepiece file.
    """
    config, tokenizer = (json.loads((model_dir / name).read_text("utf-8")) for name in
                         ("config.json", "tokenizer_config.json"))  # fmt: skip
    weights = (model_dir / "model.safetensors").read_bytes()
    names = [name for name in split_safetensors(weights)[0] if name != "__metadata__"]
    token = {"content": "<x>", "lstrip": False, "special": True}
    special = {"bos_token": "<sop>", "pad_token": token, "additional_special_tokens": ["a", token]}
    return {
        "config": ("config.json", damaged_json_files(config, CONFIG_KEYS)),
        "generation": ("generation_config.json", damaged_json_files(GENERATION, GENERATION_KEYS)),
        "tokenizer": ("tokenizer_config.json", damaged_json_files(
            {**tokenizer, "added_tokens_decoder": {"5": token}}, TOKENIZER_KEYS)),
        "special tokens": ("special_tokens_map.json", damaged_json_files(special, TOKENIZER_KEYS)),
        "added tokens": ("added_tokens.json", damaged_json_files({"<x>": 64790, "<y>": 64791})),
        "index": ("model.safetensors.index.json", damaged_json_files(index_of(names[:6]))),
        "safetensors": ("model.safetensors", damaged_safetensors(weights)),
        "vocabulary": (vocabulary_name, damaged_bytes((model_dir / vocabulary_name).read_bytes())),
    }  # fmt: skip
