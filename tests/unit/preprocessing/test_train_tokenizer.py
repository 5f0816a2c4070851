"""Training a tokenizer: LLaMA's layout, two files that agree, and clear limits."""

import io
import json
import re
from pathlib import Path

import pytest
import sentencepiece

from megatron_bipe.data.segments import resolve_rule
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import DataError
from preprocessing import train_tokenizer as module
from preprocessing.document_tokenizer import HARD_TEXTS
from preprocessing.train_tokenizer import (
    STOP_PIECE,
    CheckSample,
    TrainOptions,
    check_agreement,
    cut_line,
    train_tokenizer,
)
from tests.helpers.errors import raises


def write_lines(file: Path, *texts: str) -> list[str]:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(file)]


def test_train_has_the_layout_of_llama(tokenizer_folder: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    assert [model.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [model.id_to_piece(3 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert model.get_piece_size() == 340
    tokenizer = load_tokenizer(tokenizer_folder)
    assert (tokenizer.text_of(13), tokenizer.vocab_size) == ("\n", 340)
    assert tokenizer.special_ids == {"bos": 1, "eos": 2, "unk": 0}
    assert set(resolve_rule("reference", tokenizer).token_ids) == {13, model.piece_to_id(STOP_PIECE)}


def test_train_both_files_and_hugging_face_give_the_same_ids(tokenizer_folder: Path, texts: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(tokenizer_folder)
    model = load_tokenizer(tokenizer_folder / "tokenizer.model")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tokenizer_folder))
    for text in (*texts, *HARD_TEXTS):
        ids = ours.encode_batch([text])[0].tolist()
        assert model.encode_batch([text])[0].tolist() == ids
        if "<s>" not in text:
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids
            assert theirs(text)["input_ids"] == [1, *ids]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


def test_train_text_without_a_full_stop_after_a_space_still_gets_its_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = write_lines(tmp_path / "in.jsonl", *["some words without any stop at all and more words"] * 9)
    tokenizer = load_tokenizer(train_tokenizer(TrainOptions(inputs, 290, tmp_path / "made")))
    assert "replaced the rarest merge" in caplog.text
    assert [tokenizer.text_of(int(i)) for i in tokenizer.encode_batch(["words .\n"])[0]][-2:] == [" .", "\n"]
    assert tokenizer.vocab_size == 290


def test_train_digits_stay_single_and_repeated_spaces_become_pieces(tmp_path: Path) -> None:
    inputs = write_lines(tmp_path / "in.jsonl", *["in 2024 .\n    in    2024 ."] * 30)
    tokenizer = load_tokenizer(train_tokenizer(TrainOptions(inputs, 273, tmp_path / "made")))
    texts = [tokenizer.text_of(i) or "" for i in range(259, 273)]
    assert not any(sum(char.isdigit() for char in text) > 1 for text in texts)
    assert "    " in texts


def test_train_same_input_gives_the_same_bytes_in_every_format(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made = []
    for kind, path in inputs.items():
        folder = train_tokenizer(TrainOptions([str(path)], 330, tmp_path / f"made-{kind}"))
        made.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert made[0] == made[1] == made[2] == made[3]
    assert made[0].keys() == {
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }


def size_in(remedy: str) -> int:
    found = re.search(r"--vocab-size (\d+)", remedy)
    assert found, remedy
    return int(found[1])


def test_train_vocabulary_too_large_names_the_largest_possible(tmp_path: Path) -> None:
    inputs = write_lines(tmp_path / "in.jsonl", "a few words .")
    with raises(DataError, 5000, location="--vocab-size", remedy="--vocab-size") as caught:
        train_tokenizer(TrainOptions(inputs, 5000, tmp_path / "made"))
    assert not (tmp_path / "made").exists()
    largest = size_in(caught.value.remedy)
    train_tokenizer(TrainOptions(inputs, largest, tmp_path / "made"))
    with raises(DataError, largest, largest + 1, location="--vocab-size", remedy=f"--vocab-size {largest}"):
        train_tokenizer(TrainOptions(inputs, largest + 1, tmp_path / "more"))


@pytest.mark.parametrize("size", [0, -1, 200, 262])
def test_train_vocabulary_too_small_is_an_error(tmp_path: Path, size: int) -> None:
    inputs = write_lines(tmp_path / "in.jsonl", "a few words .")
    with raises(DataError, size, location="--vocab-size", remedy="--vocab-size") as error:
        train_tokenizer(TrainOptions(inputs, size, tmp_path / "made"))
    assert size_in(error.value.remedy) > size


def test_train_without_room_for_a_merge_is_an_error(tmp_path: Path) -> None:
    inputs = write_lines(tmp_path / "in.jsonl", "a")
    with raises(DataError, location="--vocab-size", remedy="--vocab-size"):
        train_tokenizer(TrainOptions(inputs, 262, tmp_path / "made"))


def test_train_existing_tokenizer_is_kept_without_overwrite(tmp_path: Path) -> None:
    inputs = write_lines(tmp_path / "in.jsonl", "a few words .")
    options = TrainOptions(inputs, 270, tmp_path / "made")
    train_tokenizer(options)
    with raises(DataError, "tokenizer.model", location=tmp_path / "made", remedy="--overwrite"):
        train_tokenizer(options)
    train_tokenizer(TrainOptions(inputs, 271, tmp_path / "made", overwrite=True))
    assert load_tokenizer(tmp_path / "made").vocab_size == 271
    with raises(DataError, "a file", location=tmp_path / "in.jsonl"):
        train_tokenizer(TrainOptions(inputs, 271, tmp_path / "in.jsonl", overwrite=True))


def test_train_no_text_or_bad_lines_is_an_error(tmp_path: Path) -> None:
    with raises(DataError, "2 lines", "2 empty", location=tmp_path / "in.jsonl", remedy="--text-key"):
        train_tokenizer(TrainOptions(write_lines(tmp_path / "in.jsonl", "", ""), 300, tmp_path / "made"))
    (tmp_path / "bad.jsonl").write_text("bad\n" * 20)
    with raises(DataError, "20 of 20", location=tmp_path / "bad.jsonl", remedy="--max-malformed"):
        train_tokenizer(TrainOptions([str(tmp_path / "bad.jsonl")], 300, tmp_path / "made"))


def test_train_disagreeing_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write_lines(tmp_path / "in.jsonl", *["the words there, then the other words ."] * 5)
    make = module.sentencepiece_to_json

    def without_merges(model: bytes) -> bytes:
        content = json.loads(make(model))
        content["model"]["merges"] = []
        return json.dumps(content).encode()

    monkeypatch.setattr(module, "sentencepiece_to_json", without_merges)
    with raises(DataError, "tokenizer.model", "tokenizer.json", "three", location="tokenizer.json"):
        train_tokenizer(TrainOptions(inputs, 300, tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_check_agreement_compares_the_given_texts(tokenizer_folder: Path) -> None:
    model = (tokenizer_folder / "tokenizer.model").read_bytes()
    content = json.loads((tokenizer_folder / "tokenizer.json").read_bytes())
    piece = max(sentencepiece.SentencePieceProcessor(model_proto=model).encode("lazy", out_type=str), key=len)
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != piece]
    definition = json.dumps(content).encode()
    check_agreement(model, definition, ["nothing of its kind"])
    with raises(DataError, "tokenizer.model", "tokenizer.json", "lazy", location="tokenizer.json"):
        check_agreement(model, definition, ["nothing of its kind", "a lazy one"])


def test_check_sample_keeps_all_of_a_small_text_and_a_share_of_a_large_one() -> None:
    sample = CheckSample()
    texts = ["x" * 1000] * 100
    assert list(sample.collect(iter(texts))) == texts
    assert len(sample.texts) == 100
    sample = CheckSample()
    for _ in sample.collect("y" * 50_000 for _ in range(1000)):
        pass
    assert 490_000 <= sum(map(len, sample.texts)) <= 600_000


def test_train_sample_bytes_reads_from_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write_lines(tmp_path / f"{name}.jsonl", *[f"{name} words here\n"] * 2000)
    seen: list[bytes] = []
    train = sentencepiece.SentencePieceTrainer.train

    def spy(sentence_iterator: object, model_writer: io.BytesIO, **settings: object) -> None:
        seen.extend(sentence_iterator)
        train(sentence_iterator=iter(seen), model_writer=model_writer, **settings)

    monkeypatch.setattr(module.sentencepiece.SentencePieceTrainer, "train", spy)
    train_tokenizer(TrainOptions([str(tmp_path)], 275, tmp_path / "made", sample_bytes=3000))
    assert sum(len(line) + 1 for line in seen) == pytest.approx(3000, abs=60)
    assert {line[:1] for line in seen} == {b"a", b"b", b"c"}


def test_cut_line_loses_nothing_but_spaces_and_no_character_is_cut() -> None:
    line = ("word " * 50 + "\u4e2d" * 60 + " tail").encode()
    pieces = list(cut_line(line, 40))
    assert all(0 < len(piece) <= 40 for piece in pieces)
    assert b"".join(pieces).replace(b" ", b"") == line.replace(b" ", b"")
    assert all(piece.decode() for piece in pieces)
    assert list(cut_line(b"short", 40)) == [b"short"]


def test_train_long_lines_and_reserved_characters_are_not_dropped(tmp_path: Path) -> None:
    long = "zebra " * 3000  # one line of 18 kB, where SentencePiece would drop it
    inputs = write_lines(tmp_path / "in.jsonl", "a b .", long, "quagga \u2585 " * 50)
    tokenizer = load_tokenizer(train_tokenizer(TrainOptions(inputs, 285, tmp_path / "made")))
    assert len(tokenizer.encode_batch([" zebra"])[0]) <= 2
    assert len(tokenizer.encode_batch([" quagga"])[0]) <= 3
