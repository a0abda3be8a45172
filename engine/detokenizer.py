"""Text from token ids, one at a time."""

import copy
from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what decoding gives for a character whose bytes are not all there


class Detokenizer:
    """The text of one request's output: grows token by token, ends at a stop string.

    tokenizer: a transformers tokenizer; include_stop: the stop string is part of the text. `text` never holds part of a
    UTF-8 character, nor the beginning of what may become a stop string.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str], skip_special_tokens: bool, include_stop: bool = False
    ) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = self._new_stream() if self._backend is not None else None
        self._token_ids: list[int] = []
        self._decoded = ""  # all that is decoded, held back parts included
        self._stop, self._include_stop = tuple(stop), include_stop
        self.stopped_by: str | None = None
        self.text = ""

    def _new_stream(self) -> Any:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(skip_special_tokens=self._skip_special_tokens)

    def fork(self) -> "Detokenizer":
        """Another that has taken the same tokens. It decodes all of them each time: not every stream can be copied."""
        other = copy.copy(self)
        other._stream, other._token_ids = None, self._token_ids[:]
        return other

    def append(self, token_id: int, look_for_stop: bool) -> bool:
        """Takes one more token. True if the text has now reached a stop string: it ends before it, or after."""
        self._token_ids.append(token_id)
        before = len(self._decoded)
        self._decoded += self._decode_next(token_id)
        if look_for_stop and self._stop:
            # A stop string that is new must end within what was just decoded.
            found = [
                (place, stop)
                for stop in self._stop
                if (place := self._decoded.find(stop, max(0, before - len(stop) + 1))) >= 0
            ]
            if found:
                place, self.stopped_by = min(found)
                end = place + (len(self.stopped_by) if self._include_stop else 0)
                self.text = self._decoded = self._decoded[:end]
                return True
        self.text = self._decoded[: len(self._decoded) - self._held_back()] if self._stop else self._decoded
        return False

    def finish(self) -> None:
        """No more tokens come: what was held back for a stop string is text after all; half a character is not. A text
        that a stop string has ended stays as it is."""
        if self.stopped_by is not None:
            return
        rest = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        rest = rest.rstrip(_INCOMPLETE)
        if rest.startswith(self._decoded):
            self._decoded = rest
        self.text = self._decoded

    def _decode_next(self, token_id: int) -> str:
        if self._stream is not None:
            try:
                return self._stream.step(self._backend, token_id) or ""
            except Exception:  # the stream lost its place (tokenizers issue 1666): a new one goes on from here
                self._stream = self._new_stream()
                return self._stream.step(self._backend, token_id) or ""
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        return "" if whole.endswith(_INCOMPLETE) else whole[len(self._decoded) :]

    def _held_back(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max(len(stop) for stop in self._stop) - 1
        for length in range(min(longest, len(self._decoded)), 0, -1):
            end = self._decoded[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
