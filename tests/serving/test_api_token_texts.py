"""What single tokens spell, in byte-level BPE and in SentencePiece's way."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from meshlm.serving.api.logprobs import CompletionLogprobs
from meshlm.serving.api.token_texts import TokenTexts
from served import Server


@pytest.fixture(scope="module")
def like_llama() -> Any:
    """A space is ▁, one is put before the text, and unknown characters are bytes."""
    pieces = ["<s>", "<unk>", "▁", "H", "i", "▁H", "▁Hi", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "H"), ("▁H", "i")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("text", ["Hello, wörld", "日本語 😀", "a\n\tb  c", "<|im_end|>"])
def test_bytes_of_byte_level_tokens(server: Server, text: str) -> None:
    tokenizer = server.engine.tokenizer
    texts, token_ids = TokenTexts(tokenizer), tokenizer.encode(text)
    assert b"".join(map(texts.as_bytes, token_ids)) == text.encode()
    assert texts.joined(token_ids) == text


def test_every_token_spells_something(server: Server) -> None:
    """What is whole is what the tokenizer itself decodes."""
    tokenizer = server.engine.tokenizer
    texts = TokenTexts(tokenizer)
    for token_id in range(0, len(tokenizer), 7):
        assert texts.as_bytes(token_id).decode(errors="replace") == tokenizer.decode([token_id])


def test_bytes_of_pieces(like_llama: Any) -> None:
    texts, token_ids = TokenTexts(like_llama), like_llama.encode("Hi é")
    assert [texts.as_bytes(token_id) for token_id in token_ids] == [b" Hi", b" ", b"\xc3", b"\xa9"]
    assert texts.as_text(token_ids[2]) == "bytes:\\xc3"
    assert texts.as_bytes(like_llama.bos_token_id) == b"<s>" and texts.is_special(like_llama.bos_token_id)


def test_offsets_leave_out_what_the_tokenizer_adds(like_llama: Any) -> None:
    token_ids = [like_llama.bos_token_id, *like_llama.encode("Hi é")]
    told = CompletionLogprobs(TokenTexts(like_llama), 0, 0).of_prompt("Hi é", token_ids, [None] * len(token_ids))
    assert told["text_offset"] == [0, 0, 2, 3, 3]


def test_without_a_tokenizer() -> None:
    assert TokenTexts(None).joined([1, 2]) == ""
