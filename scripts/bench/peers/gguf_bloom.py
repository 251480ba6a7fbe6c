"""A prepared directory as a GGUF file in bfloat16 for llama.cpp, written tensor by tensor.

Its names and metadata are those that llama.cpp's own converter writes for a BLOOM. The vocabulary is left out: ids go
in and come out. Matrices stay bfloat16; vectors are float32, as llama.cpp wants them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

from runner.format.hyperparameters import Hyperparameters
from runner.format.layout import EMBEDDING, FINAL_LAYERNORM, block_file
from runner.format.manifest import load_manifest

OUTSIDE = {
    EMBEDDING: {"word_embeddings": "token_embd", "word_embeddings_layernorm": "token_embd_norm"},
    FINAL_LAYERNORM: {"": "output_norm"},
}
IN_A_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


def write_gguf(directory: Path, out: Path) -> None:
    """Write `out` beside itself first, then in place; needs the memory of one tensor."""
    model = load_manifest(directory).model
    unfinished = out.with_name(f"{out.name}.incomplete")
    writer = gguf.GGUFWriter(unfinished, "bloom")
    writer.add_context_length(2048)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(4 * model.hidden_size)
    writer.add_block_count(model.n_layer)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head)
    writer.add_layer_norm_eps(model.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("none")
    for name, tensor in tensors(directory, model):
        data = as_written(tensor, name, model, only_shape=True)
        kind = gguf.GGMLQuantizationType.BF16 if data.dtype == np.uint8 else None
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors(directory, model):
        writer.write_tensor_data(as_written(tensor, name, model))
    writer.close()
    unfinished.replace(out)


def quantise(plain: Path, out: Path, kind: str) -> None:
    """Write what llama.cpp's own quantizer makes of a GGUF file, `kind` of bits. Raises RuntimeError if it does not."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(out).encode(), options):
        raise RuntimeError(f"llama.cpp does not make {kind}")


def tensors(directory: Path, model: Hyperparameters) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by its GGUF name, in the order of a pass."""
    blocks = {
        block_file(i, model.n_layer): {name: f"blk.{i}.{new}" for name, new in IN_A_BLOCK.items()}
        for i in range(model.n_layer)
    }
    for file, names in {
        EMBEDDING: OUTSIDE[EMBEDDING],
        **blocks,
        FINAL_LAYERNORM: OUTSIDE[FINAL_LAYERNORM],
    }.items():
        with safe_open(directory / file, framework="pt") as part:
            for key in part.keys():  # noqa: SIM118 - not a dict
                module, _, kind = key.rpartition(".")
                yield f"{names[module]}.{kind}", part.get_tensor(key)


def as_written(
    tensor: torch.Tensor, name: str, model: Hyperparameters, *, only_shape: bool = False
) -> np.ndarray:
    """A tensor's data: matrices as the bytes of bfloat16, vectors as float32.

    BLOOM's rows of query_key_value are [head, 3, head_dim]; llama.cpp has [3, head, head_dim].
    """
    if ".attn_qkv." in name and not only_shape:
        tensor = tensor.unflatten(0, (model.n_head, 3, model.head_dim)).transpose(0, 1).flatten(0, 2)
    if tensor.dim() == 1:
        return tensor.float().numpy()
    return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
