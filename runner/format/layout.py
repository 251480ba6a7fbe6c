"""The files of a prepared directory, and the tensors of each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runner.format.coded import (
    CODED_DTYPE,
    CODING_KEY,
    CODING_VERSION,
    LARGEST_CODED,
    PLAIN,
    ROW_GROUP_ROWS,
    ROW_GROUPS_SUFFIX,
    row_group_count,
)
from runner.format.hyperparameters import Hyperparameters
from runner.format.quantised import (
    QUANTISED_FORMS,
    QUANTISED_KEY,
    QUANTISED_VERSION,
    Coding,
    coding_in,
    coding_of,
)
from runner.format.safetensors import Described, Shape, encode_header, tensor_nbytes
from runner.format.slices import Slice

MANIFEST = "manifest.json"
MANIFEST_BACKUP = "manifest.backup.json"
TOKENIZER = "tokenizer.json"
REQUIRED_COMPANIONS = ("config.json", TOKENIZER)
GENERATION_CONFIG = "generation_config.json"
# Readers of format versions 1 and 2 do not expect these.
LATER_COMPANIONS = (GENERATION_CONFIG, "chat_template.jinja")
COMPANIONS = (*REQUIRED_COMPANIONS, "tokenizer_config.json", "special_tokens_map.json", *LATER_COMPANIONS)
EMBEDDING = "embedding.safetensors"
FINAL_LAYERNORM = "final_layernorm.safetensors"
HEAD = "head.safetensors"
QUERY_KEY_VALUE = "self_attention.query_key_value.weight"
# A part's data starts on a page.
DATA_ALIGNMENT = 4096


@dataclass(frozen=True)
class PartSpec:
    """The file name of a part, and the shapes of its tensors in the order of a pass."""

    file: str
    tensors: dict[str, Shape]

    @property
    def matrices(self) -> dict[str, Shape]:
        """The tensors that all forms but the plain one code, and of which a slice has some rows."""
        return {name: shape for name, shape in self.tensors.items() if len(shape) == 2}

    def rows(self, model: Hyperparameters, own: Slice | None) -> dict[str, range]:
        """The rows of each matrix that are in a slice, by name; all of them without one."""
        found = {}
        for name, (count, _) in self.matrices.items():
            unit = 3 * model.head_dim if name == QUERY_KEY_VALUE else ROW_GROUP_ROWS
            found[name] = own.rows(count, unit) if own is not None else range(count)
        return found

    def sliced(self, model: Hyperparameters, own: Slice | None) -> PartSpec:
        """What a slice has of the part: fewer rows of each matrix, and the vectors."""
        rows = self.rows(model, own)
        shapes = {name: (len(rows[name]), shape[1]) for name, shape in self.matrices.items()}
        return PartSpec(self.file, {**self.tensors, **shapes})

    def nbytes(self, dtype: str) -> int:
        """Bytes of the tensors alone, uncoded."""
        return sum(tensor_nbytes(dtype, shape) for shape in self.tensors.values())

    def stored(self, dtype: str, coded: Mapping[str, int], form: str = PLAIN) -> tuple[Described, ...]:
        """The tensors in the file, in its order.

        `coded` has the bytes of each losslessly coded matrix; those of a quantised `form` follow from the shapes.
        """
        found: list[Described] = []
        for name, shape in self.tensors.items():
            if form in QUANTISED_FORMS and name in self.matrices:
                found += coding_of(form, name).stored(name, shape)
            elif name in coded:
                found.append((name + ROW_GROUPS_SUFFIX, "I64", (row_group_count(shape[0]) + 1,)))
                found.append((name, "U8", (coded[name],)))
            else:
                found.append((name, dtype, shape))
        return tuple(found)

    def decoded(self, form: str, dtype: str = CODED_DTYPE) -> tuple[Described, ...]:
        """The tensors that the coded ones decode to; none in a plain directory."""
        coded = {} if form == PLAIN else self.matrices
        return tuple((name, dtype, shape) for name, shape in coded.items())


def is_file_name(name: object) -> bool:
    """Whether `name` names a visible file right inside a directory, on every operating system."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > 240:
        return False
    # On Windows these are devices, in every directory.
    device = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", name)
    return device is None and re.fullmatch(r"(?!\.)[^/\\:*?\"<>|]+", name) is not None


def block_file(index: int, n_layer: int) -> str:
    """`block_07.safetensors`: two digits, more if the model has more than 100 blocks."""
    return f"block_{index:0{max(2, len(str(n_layer - 1)))}d}.safetensors"


def block_tensors(hidden_size: int) -> dict[str, Shape]:
    """The 12 tensors of a block in the order in which a pass uses them."""
    E = hidden_size
    return {
        "input_layernorm.weight": (E,),
        "input_layernorm.bias": (E,),
        QUERY_KEY_VALUE: (3 * E, E),
        "self_attention.query_key_value.bias": (3 * E,),
        "self_attention.dense.weight": (E, E),
        "self_attention.dense.bias": (E,),
        "post_attention_layernorm.weight": (E,),
        "post_attention_layernorm.bias": (E,),
        "mlp.dense_h_to_4h.weight": (4 * E, E),
        "mlp.dense_h_to_4h.bias": (4 * E,),
        "mlp.dense_4h_to_h.weight": (E, 4 * E),
        "mlp.dense_4h_to_h.bias": (E,),
    }


def part_specs(model: Hyperparameters, own: Slice | None = None) -> tuple[PartSpec, ...]:
    """All parts of a model in the order of a pass: embedding, blocks, final LayerNorm, and a head that is not tied.

    Those of a slice have fewer rows.
    """
    return tuple(spec.sliced(model, own) for spec in _whole_parts(model))


def _whole_parts(model: Hyperparameters) -> tuple[PartSpec, ...]:
    E = model.hidden_size
    embedding = {
        "word_embeddings.weight": (model.vocab_size, E),
        "word_embeddings_layernorm.weight": (E,),
        "word_embeddings_layernorm.bias": (E,),
    }
    blocks = [PartSpec(block_file(i, model.n_layer), block_tensors(E)) for i in range(model.n_layer)]
    final = {"weight": (E,), "bias": (E,)}
    head = () if model.tie_word_embeddings else (PartSpec(HEAD, {"weight": (model.vocab_size, E)}),)
    return (PartSpec(EMBEDDING, embedding), *blocks, PartSpec(FINAL_LAYERNORM, final), *head)


def pass_nbytes(model: Hyperparameters) -> int:
    """Bytes, uncoded, of all tensors that a pass needs whole; of an embedding that is not the head it needs rows."""
    embedding, *others = (spec.nbytes(model.dtype) for spec in part_specs(model))
    if not model.tie_word_embeddings:
        embedding -= tensor_nbytes(model.dtype, (model.vocab_size, model.hidden_size))
    return embedding + sum(others)


def part_header(stored: Sequence[Described], decoded: Sequence[Described] = ()) -> bytes:
    """The first bytes of a part, up to its data: it holds `stored`, which decode to `decoded` if they are coded.

    The length does not depend on the sizes of coded tensors, so it is known before they are.
    """
    if not decoded:
        return encode_header(stored, alignment=DATA_ALIGNMENT)
    if codings := codings_of(stored, decoded):
        return _quantised_header(stored, decoded, codings)
    tensors = {name: {"dtype": dtype, "shape": list(shape)} for name, dtype, shape in decoded}
    form = {"version": CODING_VERSION, "tensors": tensors}
    metadata = {CODING_KEY: json.dumps(form, separators=(",", ":"))}
    largest = [(name, dtype, (LARGEST_CODED,) if name in tensors else shape) for name, dtype, shape in stored]
    room = len(encode_header(largest, metadata, alignment=DATA_ALIGNMENT))
    return encode_header(stored, metadata, room, DATA_ALIGNMENT)


def codings_of(stored: Sequence[Described], decoded: Sequence[Described]) -> dict[str, Coding]:
    """How each tensor that is stored in fewer bits is stored, by name."""
    shapes = {name: shape for name, _, shape in decoded}
    found = {each[0]: coding_in(each, shapes[each[0]]) for each in stored if each[0] in shapes}
    return {name: coding for name, coding in found.items() if coding is not None}


def _quantised_header(
    stored: Sequence[Described], decoded: Sequence[Described], codings: Mapping[str, Coding]
) -> bytes:
    tensors = {
        name: {"coding": codings[name].name, "dtype": dtype, "shape": list(shape)}
        for name, dtype, shape in decoded
    }
    form = {"version": QUANTISED_VERSION, "tensors": tensors}
    metadata = {QUANTISED_KEY: json.dumps(form, separators=(",", ":"))}
    return encode_header(stored, metadata, alignment=DATA_ALIGNMENT)
