"""What single tokens spell. A token may be part of a character, which no text can hold, but bytes can."""

import json
from collections.abc import Iterable
from typing import Any


class TokenTexts:
    """Of one tokenizer; each token is looked up once. Without a tokenizer tokens spell nothing."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self._special: frozenset[int] = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self._decoders = _decoders(tokenizer)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def as_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def as_text(self, token_id: int) -> str:
        """Its text; of part of a character its bytes, in OpenAI's way of writing them."""
        known = self._texts.get(token_id)
        if known is None:
            spelt = self.as_bytes(token_id)
            try:
                known = spelt.decode()
            except UnicodeDecodeError:
                known = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)
            self._texts[token_id] = known
        return known

    def joined(self, token_ids: Iterable[int]) -> str:
        return b"".join(map(self.as_bytes, token_ids)).decode(errors="replace")

    def _spell(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return b""
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # an id that the model has and the tokenizer does not
            return b""
        if "ByteLevel" in self._decoders:
            with_bytes = [_BYTE_OF.get(letter) for letter in piece]
            if None not in with_bytes:
                return bytes(byte for byte in with_bytes if byte is not None)
        if "ByteFallback" in self._decoders and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        if self._decoders & {"Metaspace", "Replace"}:
            return piece.replace("▁", " ").encode()
        text: str = self._tokenizer.decode([token_id])
        return text.encode()


def _decoders(tokenizer: Any) -> frozenset[str]:
    """The kinds of decoders that a tokenizer of the tokenizers library has; none of another."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return frozenset()
    told = json.loads(backend.decoder.__getstate__())
    return frozenset(each["type"] for each in [told, *told.get("decoders", ())])


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes as: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
