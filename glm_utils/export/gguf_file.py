"""Write a merged ChatGLM2 model as one GGUF file for llama.cpp, with a Modelfile for Ollama.

Implements `ExportFormat` of glm_utils/export/__init__.py. The layers' weights become F16, Q8_0 or Q4_0 (--qbits 0, 8,
4), embedding and output layer F16, norms and biases F32. The package gguf is an optional extra.
Source: the GGUF specification; llama.cpp's architecture "chatglm"; names and block formats from the package gguf.
"""

from __future__ import annotations  # the package gguf may be absent

import zlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from loguru import logger
from tqdm import tqdm
from transformers import PretrainedConfig

from glm_utils.cli import UserError
from glm_utils.export import chatglm
from glm_utils.export.gguf_tokenizer import (
    add_sampling,
    add_vocabulary,
    check_prompt_text,
    check_vocabulary,
    modelfile,
)
from glm_utils.merging.layer_streaming import empty_model
from glm_utils.merging.merge import MergeJob

try:
    import gguf
except ImportError:
    gguf = None  # type: ignore[assignment]  # mypy takes an optional module for one that is always there

LIBRARY_NAME = "gguf"
USAGE = """```bash
llama-cli -m model.gguf --jinja
ollama create my-chatglm2 -f Modelfile && ollama run my-chatglm2
```"""
WEIGHTS_NAME = "model.gguf"
LAYER_TYPES = {0: "F16", 8: "Q8_0", 4: "Q4_0"}  # --qbits -> type of the layers' weights
ROPE_BASE = 10000.0


class TensorInfo(NamedTuple):
    """How one tensor is stored in the file.

    Attributes:
        key: State-dict key.
        shape: Shape in the model.
        type: Storage type.
    """

    key: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of the tensor's data as bytes."""
        return gguf.quant_shape_to_byte_shape(self.shape, self.type)

    @property
    def num_bytes(self) -> int:
        """Size in the file, without padding."""
        return int(np.prod(self.byte_shape))


def check(job: MergeJob) -> int:
    """Check that llama.cpp supports the merged model and that the base is complete.

    Returns:
        Size of the directory, in bytes.

    Raises:
        UserError: The package gguf is missing, GGUF or llama.cpp does not support the model, its vocabulary or its
            number of columns, or the base is incomplete.
    """
    if gguf is None:
        raise UserError("--export_format gguf: gguf is not installed. Run pip install gguf -c constraints.txt")
    architecture_name(job)
    check_config(job)
    chatglm.check(job)
    check_prompt_text(job.base.tokenizer)  # loading it refuses a file that is not a sentencepiece model
    check_vocabulary(job.base.vocabulary_path)
    block_size, _ = gguf.GGML_QUANT_SIZES[layer_type(job)]
    for key, spec in job.reader.specs.items():
        if job.is_linear(key) and spec.shape[1] % block_size:
            raise UserError(
                f"{job.base.directory}: {key} has {spec.shape[1]} columns, not a multiple of the {block_size} weights "
                f"that {layer_type(job).name} stores as one block. Use --qbits 0"
            )
    return sum(tensor.num_bytes for tensor in tensor_infos(job).values()) + chatglm.OTHER_FILE_BYTES


def architecture_name(job: MergeJob) -> str:
    """Return llama.cpp's name of the base's architecture.

    Raises:
        UserError: llama.cpp has none for the base's family.
    """
    family = job.base.family
    if family.gguf_architecture is None:
        raise UserError(
            f"--export_format gguf: llama.cpp has no architecture for {family.title} (two rotary position "
            "channels, a bidirectional prompt). Use --export_format chatglm"
        )
    return family.gguf_architecture


def layer_type(job: MergeJob) -> gguf.GGMLQuantizationType:
    """Return the storage type of the layers' weights."""
    return gguf.GGMLQuantizationType[LAYER_TYPES[job.bits]]


def check_config(job: MergeJob) -> None:
    """Check that llama.cpp computes a model of the base's configuration.

    Raises:
        UserError: A setting that llama.cpp's architecture does not have.
    """
    config = job.base.model_config
    num_heads, head_dim = config.num_attention_heads, config.kv_channels
    reasons = []
    if num_heads * head_dim != config.hidden_size:
        reasons.append(f"hidden_size is {config.hidden_size}, not {num_heads} heads of {head_dim} channels")
    if config.add_bias_linear:
        reasons.append("add_bias_linear is set")
    if reasons:
        raise UserError(
            f"{job.base.config_path}: {' and '.join(reasons)}, which llama.cpp does not compute. Use --export_format "
            "chatglm"
        )


def write(job: MergeJob, directory: Path) -> dict[str, int]:
    """Write the GGUF file and the Modelfile; returns the CRC-32 of each tensor's bytes by GGUF name."""
    config = job.base.model_config
    writer = gguf.GGUFWriter(directory / WEIGHTS_NAME, architecture_name(job))
    add_hyperparameters(writer, job, config)
    add_vocabulary(writer, job.base.vocabulary_path, job.base.tokenizer, config.vocab_size)
    add_sampling(writer)
    checksums = write_tensors(writer, job)
    text = modelfile(WEIGHTS_NAME, config.seq_length, job.base.tokenizer.prompt_text)
    (directory / "Modelfile").write_text(text, encoding="utf-8", newline="")
    return checksums


def verify(job: MergeJob, directory: Path, reference: dict[str, int]) -> None:
    """Read the file back and compare every tensor with what was written, bit for bit.

    Raises:
        UserError: A tensor is missing, unexpected, of another shape or type, or its bytes differ.
    """
    path, expected = directory / WEIGHTS_NAME, tensor_infos(job)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in expected.items():
        stored = found.pop(name, None)
        if stored is None or (tuple(stored.shape[::-1]), stored.tensor_type) != (tensor.shape, tensor.type):
            raise UserError(f"the written file differs: {name} is {stored}, expected {tensor}")
        data = np.fromfile(path, np.uint8, stored.n_bytes, offset=stored.data_offset)  # a mapping stays resident
        if zlib.crc32(data.data) != reference[name]:
            raise UserError(f"the written file differs: the bytes of {name} are not those that were written")
    if found:
        raise UserError(f"the written file differs: it also holds {sorted(found)[:5]}")
    logger.info(f"read back: all {len(expected)} tensors of {WEIGHTS_NAME} are as written, bit for bit")


def tensor_infos(job: MergeJob) -> dict[str, TensorInfo]:
    """Return the tensors of the file by GGUF name, in the order of the model's parameters."""
    config = job.base.model_config
    model = empty_model(lambda: job.base.classes.model(config))
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture_name(job))
    gguf_paths = gguf.get_tensor_name_map(architecture, config.num_layers)
    infos = {}
    for key, parameter in model.named_parameters():  # rope frequencies are buffers: llama.cpp computes them
        storage = layer_type(job) if job.is_linear(key) else gguf.GGMLQuantizationType.F16
        if parameter.dim() == 1:
            storage = gguf.GGMLQuantizationType.F32
        path, _, kind = key.removeprefix("transformer.").rpartition(".")
        infos[f"{gguf_paths[path]}.{kind}"] = TensorInfo(key, tuple(parameter.shape), storage)
    return infos


def add_hyperparameters(writer: gguf.GGUFWriter, job: MergeJob, config: PretrainedConfig) -> None:
    """Write name, file type, sizes and rotary settings."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{Path(job.adapter.base_name).name} with a merged LoRA adapter")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{LAYER_TYPES[job.bits]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.kv_channels)
    writer.add_value_length(config.kv_channels)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_rope_dimension_count(config.kv_channels // 2)  # the first half of each head
    writer.add_rope_freq_base(ROPE_BASE)


def write_tensors(writer: gguf.GGUFWriter, job: MergeJob) -> dict[str, int]:
    """Merge, quantize and write the tensors one at a time, then close the file.

    Returns:
        CRC-32 of each tensor's bytes by GGUF name.
    """
    infos, checksums = tensor_infos(job), {}
    fp16_job = replace(job, bits=0)  # merges only: the package gguf quantizes, in llama.cpp's block formats
    for name, info in infos.items():
        writer.add_tensor_info(name, info.byte_shape, np.dtype(np.uint8), info.num_bytes, info.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, info in tqdm(infos.items(), desc="merge", unit="tensor", mininterval=0.5):
            merged = fp16_job.merge_tensor(info.key)[info.key].to("cpu", torch.float16).numpy()
            data = gguf.quantize(merged, info.type).view(np.uint8)
            writer.write_tensor_data(data)
            checksums[name] = zlib.crc32(data.data)
    finally:
        writer.close()
    return checksums
