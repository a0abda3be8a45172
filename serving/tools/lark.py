"""The grammar of an answer, rule by rule, in llguidance's Lark."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...engine.grammars import json_rule


class Lark:
    """A grammar that grows. Its methods add rules and give the expression that stands for them.

    tokens: texts that are one token of their own to the model; such a token, and no spelling of its text, is meant
    wherever the text stands.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self._any_token = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
        self._rules = [r"TEXT: /(.|\n)*/"]

    def rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def one_of(self, expressions: Sequence[str]) -> str:
        return expressions[0] if len(expressions) == 1 else self.rule(" | ".join(expressions))

    def literal(self, text: str) -> str:
        parts, at = [], 0
        for found in self._any_token.finditer(text):
            parts += [_quoted(text[at : found.start()]), token_range([self._tokens[found[0]]])]
            at = found.end()
        return " ".join(filter(None, [*parts, _quoted(text[at:])]))

    def json(self, schema: Mapping[str, Any], lenient: bool = False) -> str:
        """JSON that fulfils a schema; lenient: but for what of the schema cannot be enforced."""
        return self.rule(json_rule(schema, lenient))

    def up_to(self, text: str) -> str:
        """Any text that ends with this one, where it first comes."""
        token = self._any_token.search(text)
        if token is None:
            return self.rule(f"TEXT {_quoted(text)}", "[lazy]")
        return self.rule(f"TEXT {self.literal(text[token.start() :])}")

    def grammar(self, start: str) -> str:
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules])


def token_range(token_ids: Iterable[int]) -> str:
    return f"<[{','.join(map(str, token_ids))}]>"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
