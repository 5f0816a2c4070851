"""Tokenizers: special tokens in raw text, the text of single tokens, and files that are missing or damaged."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_bipe.data.token_strings import byte_characters, parse_byte_token
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import DataError
from tests.helpers.errors import raises
from tests.helpers.paths import LLAMA

TEXTS = (
    "plain words, and more words.\n\tindented  twice .\r\n",
    "  leading and trailing  ",
    "\u4e2d\u6587 \u0627\u0644 e\u0301 \U0001f469\u200d\U0001f680\ufeff\x00",
    "",
)
WITH_SPECIALS = ("<s>", "a<s>b", "a <s> b", "<s>hello</s>", "x\n<s>\ny", "end</s>", "<unk><s><s> \u2581<s>")

needs_llama = pytest.mark.skipif(not LLAMA.is_dir(), reason="../shared/llama_tokenizer is not there")


@pytest.fixture(scope="session")
def piece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a SentencePiece-type tokenizer as tokenizer.json with given pieces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merged = ["\u2581.", "wo", "rd", "word", "\u2581word", "\u2581\u2581", ".."]
    pieces += [*merged, "\u2581", *"abcdefghijklmnopqrstuvwxyz.,<>/", "\ufffd"]
    merges = [
        ("\u2581", "."),
        ("w", "o"),
        ("r", "d"),
        ("wo", "rd"),
        ("\u2581", "word"),
        ("\u2581", "\u2581"),
        (".", "."),
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(backend, tmp_path_factory.mktemp("pieces"), bos_token="<s>", eos_token={"content": "</s>"})


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a byte-level BPE tokenizer like GPT-2's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(["some words . and \u4e2d\u6587 words .\n\n  and more words .\n"] * 20, trainer)
    backend.add_tokens(["   three spaces"])
    return save(backend, tmp_path_factory.mktemp("bytes"), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a SentencePiece model."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["plain words and more words . indented twice ."] * 9),
        model_writer=written,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    file.write_bytes(written.getvalue())
    return file


def save(backend: tokenizers.Tokenizer, folder: Path, **config: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_load_tokenizer_reads_names_ids_and_fingerprint(piece_folder: Path) -> None:
    tokenizer = load_tokenizer(piece_folder)
    content = (piece_folder / "tokenizer.json").read_bytes()
    assert tokenizer.name == piece_folder.name
    assert tokenizer.fingerprint == hashlib.sha256(content).hexdigest()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.vocab_size == max(json.loads(content)["model"]["vocab"].values()) + 1
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]


def test_encode_batch_special_strings_are_plain_text(piece_folder: Path) -> None:
    ids = load_tokenizer(piece_folder).encode_batch(WITH_SPECIALS)
    assert all(tokens.dtype == np.int32 for tokens in ids)
    assert not any(np.isin(tokens, (0, 1, 2)).any() for tokens in ids)
    tokenizer = load_tokenizer(piece_folder)
    assert [tokenizer.decode(tokens.tolist()) for tokens in ids[:-1]] == list(WITH_SPECIALS[:-1])


def test_encode_batch_special_in_text_finds_tokens_that_only_the_settings_call_special(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[S]": 0, "[": 1, "S": 2, "]": 3}, unk_token="S"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "[S]"}')
    for special, expected in ((False, [1, 2, 3]), (True, [0])):
        loaded = load_tokenizer(tmp_path, special)
        assert loaded.encode_batch(["[S]"])[0].tolist() == expected
        assert tokenizers.Tokenizer.from_str(loaded.to_json().decode()).encode("[S]").ids == expected


def test_encode_batch_special_in_text_makes_special_tokens(piece_folder: Path) -> None:
    ids = load_tokenizer(piece_folder, special_in_text=True).encode_batch(WITH_SPECIALS)
    assert all(np.isin(tokens, (0, 1, 2)).any() for tokens in ids)


@pytest.mark.parametrize("folder", ["piece_folder", "byte_level_folder"])
def test_encode_batch_other_text_equals_the_stock_path(folder: str, request: pytest.FixtureRequest) -> None:
    position = request.getfixturevalue(folder)
    stock = tokenizers.Tokenizer.from_file(str(position / "tokenizer.json"))
    for text, tokens in zip(TEXTS, load_tokenizer(position).encode_batch(TEXTS), strict=True):
        assert tokens.tolist() == stock.encode(text, add_special_tokens=False).ids


def test_encode_batch_truncation_and_padding_in_the_file_are_ignored(piece_folder: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(piece_folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    ids = load_tokenizer(save(backend, tmp_path, bos_token="<s>")).encode_batch([TEXTS[0]])
    assert ids[0].tolist() == load_tokenizer(piece_folder).encode_batch([TEXTS[0]])[0].tolist()


def test_text_of_pieces_is_what_they_add_inside_a_sequence(piece_folder: Path) -> None:
    tokenizer = load_tokenizer(piece_folder)
    vocabulary = json.loads((piece_folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    assert tokenizer.text_of(13) == "\n"
    assert tokenizer.text_of(vocabulary["\u2581."]) == " ."
    assert [tokenizer.text_of(i) for i in (0, 1, 2, 3 + 0x80, 3 + 0xFF, tokenizer.vocab_size)] == [None] * 6
    assert_decodes_as_expected(tokenizer)


def test_text_of_byte_level_tokens_is_what_they_add_inside_a_sequence(byte_level_folder: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder)
    vocabulary = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json")).get_vocab()
    assert tokenizer.text_of(vocabulary["\u010a"]) == "\n"
    assert tokenizer.text_of(vocabulary["\u0120."]) == " ."
    assert tokenizer.text_of(vocabulary["   three spaces"]) == "   three spaces"
    assert tokenizer.text_of(tokenizer.bos_id) is None
    assert sum(tokenizer.text_of(i) is None for i in range(tokenizer.vocab_size)) >= 128  # single bytes of characters
    assert_decodes_as_expected(tokenizer)


def test_text_of_model_pieces_is_what_they_add_inside_a_sequence(model_file: Path) -> None:
    tokenizer = load_tokenizer(model_file)
    assert [tokenizer.text_of(i) for i in (0, 1, 2, 13, 3 + 0x80, -1, 300)] == [
        None,
        None,
        None,
        "\n",
        None,
        None,
        None,
    ]
    assert " ." in {tokenizer.text_of(i) for i in range(tokenizer.vocab_size)}
    assert_decodes_as_expected(tokenizer)


def assert_decodes_as_expected(tokenizer: object) -> None:
    """Compare `text_of` with the library's own decoder for every token."""
    anchor = tokenizer.encode_batch(["words"])[0].tolist()
    start = tokenizer.decode(anchor)
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.text_of(token_id)
        decoded = tokenizer.decode([*anchor, token_id])
        assert decoded == start + text if text is not None else decoded == start or "\ufffd" in decoded


def test_text_of_unknown_kind_of_vocabulary_is_an_error(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"[BOS]": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = load_tokenizer(save(backend, tmp_path))
    assert tokenizer.encode_batch(["a"])[0].tolist() == [1]
    with raises(DataError, "WordPiece", location="tokenizer.json", remedy="fixed:N"):
        tokenizer.text_of(1)


def test_byte_names_and_byte_characters_cover_every_byte_once() -> None:
    assert [parse_byte_token(f"<0x{byte:02X}>") for byte in range(256)] == list(range(256))
    assert [parse_byte_token(token) for token in ("<0x0>", "<0xZZ>", "0x0A", "<s>")] == [None] * 4
    assert sorted(byte_characters().values()) == list(range(256))
    assert byte_characters().keys() == set(pre_tokenizers.ByteLevel.alphabet())


def test_sentencepiece_model_alone_treats_special_strings_as_text(model_file: Path) -> None:
    tokenizer = load_tokenizer(model_file)
    backend = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ids = tokenizer.encode_batch([*TEXTS, *WITH_SPECIALS])
    assert [tokens.tolist() for tokens in ids] == backend.encode([*TEXTS, *WITH_SPECIALS])
    assert not any(np.isin(tokens, (1, 2)).any() for tokens in ids)
    assert tokenizer.special_ids == {"bos": 1, "eos": 2, "unk": 0}
    assert tokenizer.decode([1, *ids[0].tolist(), 2]) == TEXTS[0]
    with raises(DataError, "tokenizer.json", location=model_file):
        load_tokenizer(model_file, special_in_text=True)


@pytest.mark.parametrize("kind", ["folder", "file", "oddly named file", "model file next to a tokenizer.json"])
def test_copy_to_gives_a_folder_that_loads_as_the_same_tokenizer(
    piece_folder: Path, model_file: Path, tmp_path: Path, kind: str
) -> None:
    position = {"folder": piece_folder, "file": piece_folder / "tokenizer.json"}.get(kind, tmp_path / "mine.json")
    if kind == "oddly named file":
        position.write_bytes((piece_folder / "tokenizer.json").read_bytes())
    elif kind.startswith("model"):
        position = tmp_path / "tokenizer.model"
        position.write_bytes(model_file.read_bytes())
        (tmp_path / "tokenizer.json").write_bytes((piece_folder / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(position)
    tokenizer.copy_to(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.fingerprint, copy.special_ids) == (tokenizer.fingerprint, tokenizer.special_ids)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b'{"version": "1.0", "mod', b"\xff\xfe", b"{}", b"[]", b"null"])
def test_load_tokenizer_damaged_definition_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with raises(DataError, location=tmp_path / name):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"bos_token": {"text": 1}}'])
def test_load_tokenizer_damaged_settings_are_named(piece_folder: Path, tmp_path: Path, content: bytes) -> None:
    load_tokenizer(piece_folder).copy_to(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with raises(DataError, location=tmp_path / "tokenizer_config.json"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_folder_without_definition_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with raises(DataError, "tokenizer.json", "tokenizer.model", location=tmp_path, remedy="tools/train_tokenizer.py"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_no_path_and_no_hub_name_is_an_error(tmp_path: Path) -> None:
    with raises(DataError, location=tmp_path / "gone", remedy="Check the path"):
        load_tokenizer(tmp_path / "gone")  # an absolute path is not a Hub name: no network access


def test_load_tokenizer_mistyped_path_is_not_a_hub_name(
    piece_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = tmp_path / "snapshots" / "c0ffee"
    shutil.copytree(piece_folder, commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(commit))
    with caplog.at_level("INFO"):
        assert load_tokenizer("org/name").name == "org/name"
    assert "org/name is not a path" in caplog.text and "c0ffee" in caplog.text
    for name in ("./c0ffee", "../gone", "~/gone"):
        with raises(DataError, location=name):
            load_tokenizer(name)
    with raises(DataError, "'snapshots'", location="snapshots/c0fee", remedy="snapshots/c0ffee"):
        load_tokenizer("snapshots/c0fee")


def test_load_tokenizer_vocabulary_of_tiktoken_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIHRoZQ== 2\n")
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with raises(DataError, "tiktoken", location=tmp_path / "tokenizer.model", remedy="tokenizer.json"):
            load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_load_tokenizer_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with raises(DataError, "LFS", location=tmp_path / name, remedy="git lfs pull"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_without_bos_is_an_error(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    with raises(DataError, location=tmp_path / "tokenizer.json", remedy="bos_token"):
        load_tokenizer(save(backend, tmp_path, bos_token="<absent>"))


def test_load_tokenizer_settings_name_the_bos(byte_level_folder: Path, tmp_path: Path) -> None:
    load_tokenizer(byte_level_folder).copy_to(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "Z", "eos_token": null}')
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (vocabulary["Z"], None, None)


def test_load_tokenizer_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, megatron_bipe.data.tokenizer; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_llama
def test_llama_real_text_equals_the_stock_path_and_sentencepiece() -> None:
    ours = load_tokenizer(LLAMA)
    stock = tokenizers.Tokenizer.from_file(str(LLAMA / "tokenizer.json"))
    model = load_tokenizer(LLAMA / "tokenizer.model")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))
    texts = [file.read_bytes().decode() for file in files] + list(TEXTS)
    assert sum(map(len, texts)) > 500_000
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == stock.encode(text, add_special_tokens=False).ids
        assert ids.tolist() == model.encode_batch([text])[0].tolist()


@needs_llama
def test_llama_literal_special_strings_are_cut_as_sentencepiece_cuts_them() -> None:
    ours, model = load_tokenizer(LLAMA), load_tokenizer(LLAMA / "tokenizer.model")
    stock = tokenizers.Tokenizer.from_file(str(LLAMA / "tokenizer.json"))
    for text in WITH_SPECIALS:
        ids = ours.encode_batch([text])[0].tolist()
        assert ids == model.encode_batch([text])[0].tolist()
        assert ids != stock.encode(text, add_special_tokens=False).ids


@needs_llama
def test_llama_text_of_is_exact_for_every_token() -> None:
    tokenizer, model = load_tokenizer(LLAMA), load_tokenizer(LLAMA / "tokenizer.model")
    assert {i: tokenizer.text_of(i) for i in (869, 13, 29889)} == {869: " .", 13: "\n", 29889: "."}
    assert all(tokenizer.text_of(i) == model.text_of(i) for i in range(32000))
    assert_decodes_as_expected(tokenizer)
