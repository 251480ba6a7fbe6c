"""Every token that ends a text does so as in transformers' generate(), whichever file names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import runner
from runner.errors import BloomdeskError
from runner.format.manifest import load_manifest
from tests.support.oracle import (
    IDS,
    NEW_TOKENS,
    assert_runs_as,
    expected_of,
    plain_source,
    transformers_model,
    use_own_arithmetic,
    write_source,
)
from toolkit.commands.convert import convert
from toolkit.commands.export import export
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify

NEVER = 299
GENERATION_CONFIG, TEMPLATE = "generation_config.json", "chat_template.jinja"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[int]]:
    """A source, its tensors, and the tokens that follow if nothing ends them."""
    source = tmp_path_factory.mktemp("plain") / "source"
    state = plain_source(source, hidden_size=144, vocab_size=1200)
    with pytest.MonkeyPatch.context() as patch:
        use_own_arithmetic(patch)
        _, tokens = expected_of(transformers_model(source))
    distinct = list(dict.fromkeys(tokens))
    assert len(distinct) > 3 and len(tokens) == NEW_TOKENS and NEVER not in tokens
    return source, state, distinct


@pytest.fixture(autouse=True)
def own_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_arithmetic(monkeypatch)


# By the place among the text's different tokens of those that are said to end it; NEVER ends none.
CASES: dict[str, tuple[Any, Any]] = {
    "one": (3, "absent"),
    "one of several": ([NEVER, 2, 3], "absent"),
    "several in the generation config": (NEVER, [3, NEVER]),
    "the generation config decides": (1, 3),
    "the generation config has another": (1, NEVER),
    "the generation config says none": (1, None),
    "the generation config is silent": (1, {}),
    "a list of one": ([3], [2]),
    "none": (None, "absent"),
}


def as_ids(value: Any, tokens: list[int]) -> Any:
    if isinstance(value, list):
        return [as_ids(each, tokens) for each in value]
    return tokens[value] if isinstance(value, int) and value < len(tokens) else value


def source_of(plain: tuple, directory: Path, config: Any, generation: Any) -> Path:
    source = write_source(directory, plain[0], plain[1], {"eos_token_id": as_ids(config, plain[2])})
    if generation != "absent":
        fields = {} if generation == {} else {"eos_token_id": as_ids(generation, plain[2])}
        (source / GENERATION_CONFIG).write_text(json.dumps({"_from_model_config": True, **fields}))
    return source


@pytest.mark.parametrize("case", CASES)
def test_a_text_ends_as_in_generate(plain, tmp_path: Path, case: str) -> None:
    source = source_of(plain, tmp_path / "source", *CASES[case])
    convert(source, tmp_path / "bloom")
    expected = expected_of(transformers_model(source))
    assert_runs_as(tmp_path / "bloom", expected)
    # In a batch, and with a draft that proposes beyond the end.
    model = runner.load(tmp_path / "bloom")
    generated = list(model.generate_all([IDS, IDS], max_new_tokens=NEW_TOKENS, draft=tmp_path / "bloom"))
    assert [each.ids for each in generated] == [expected[1]] * 2


def test_the_files_are_carried_over_and_exported(plain, tmp_path: Path) -> None:
    source, bloom = source_of(plain, tmp_path / "source", 1, [2, 3]), tmp_path / "bloom"
    (source / TEMPLATE).write_text("{% for message in messages %}{{ message.content }}{% endfor %}\u00fc")
    convert(source, bloom)
    assert load_manifest(bloom).format_version == 3
    export(bloom, tmp_path / "exported")
    for name in (GENERATION_CONFIG, TEMPLATE):
        assert (tmp_path / "exported" / name).read_bytes() == (source / name).read_bytes()
    assert torch.equal(
        *(expected_of(transformers_model(each))[0] for each in (source, tmp_path / "exported"))
    )
    (bloom / GENERATION_CONFIG).write_text("{}")
    assert {damage.file for damage in verify(bloom).damage} == {GENERATION_CONFIG}
    repair(bloom, source)
    assert verify(bloom).sound


def test_a_directory_of_an_earlier_version_learns_of_them(plain, tmp_path: Path) -> None:
    source, bloom = source_of(plain, tmp_path / "source", 1, [2, 3]), tmp_path / "bloom"
    (source / GENERATION_CONFIG).rename(tmp_path / GENERATION_CONFIG)
    convert(source, bloom)
    assert load_manifest(bloom).format_version == 1
    (tmp_path / GENERATION_CONFIG).rename(source / GENERATION_CONFIG)
    before = (bloom / "manifest.json").read_bytes()
    (bloom / "config.json").write_text("{}")
    repair(bloom, source)
    # A repair adds nothing.
    assert (bloom / "manifest.json").read_bytes() == before
    done = convert(source, bloom)
    assert not done.written and load_manifest(bloom).model.eos_token_ids == {plain[2][2], plain[2][3]}
    assert verify(bloom).sound
    assert_runs_as(bloom, expected_of(transformers_model(source)))


@pytest.mark.parametrize("ends", [[], "2", 1200, [2, 1200], -1, 2.5, True])
def test_impossible_ends_are_refused(plain, tmp_path: Path, ends: Any) -> None:
    source = write_source(tmp_path / "source", plain[0], plain[1])
    (source / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(BloomdeskError, match=r"generation_config\.json: the model's eos_token_id must"):
        convert(source, tmp_path / "bloom")


@pytest.mark.parametrize(
    ("name", "data"), [(GENERATION_CONFIG, b"{"), (GENERATION_CONFIG, b"[]"), (TEMPLATE, b"\xff")]
)
def test_a_damaged_file_is_refused(plain, tmp_path: Path, name: str, data: bytes) -> None:
    source = write_source(tmp_path / "source", plain[0], plain[1])
    (source / name).write_bytes(data)
    with pytest.raises(BloomdeskError, match=f"{name}.* not "):
        convert(source, tmp_path / "bloom")
