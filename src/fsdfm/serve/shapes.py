"""Texts and drafts in the shapes that OpenAI's clients read."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fsdfm.generate.generator import Generator
from fsdfm.generate.layout import Composed
from fsdfm.generate.request import Result
from fsdfm.serve.batcher import Done, Moved
from fsdfm.serve.bodies import Asked, Chat
from fsdfm.serve.logprobs import begins, token_bytes

FINISH = {"end": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}


@dataclass(slots=True)
class Answer:
    """What is told of one request, text by text."""

    asked: Asked
    generator: Generator
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)
    given: dict[int, int] = field(default_factory=dict)
    """Tokens that are given of each text."""
    done: dict[int, Done] = field(default_factory=dict)
    sent: dict[int, str] = field(default_factory=dict)
    """What was streamed of each text."""

    @property
    def chat(self) -> bool:
        """Whether it is one of a conversation."""
        return isinstance(self.asked.body, Chat)

    def whole(self, waited: float) -> dict[str, Any]:
        """All texts in one object.

        Args:
            waited: seconds before the first call.
        """
        choices = [self._choice(self.done[index]) for index in sorted(self.done)]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {
            "choices": choices,
            "usage": self.usage(),
            "timings": self.timings(waited),
        }

    def chunk(self, index: int, text: str, **more: Any) -> dict[str, Any]:
        """Some text of a stream.

        Args:
            index: of the text.
            text: that is new.
            more: fields of the chunk.
        """
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        first = index not in self.sent
        self.sent[index] = self.sent.get(index, "") + text
        choice: dict[str, Any] = {"index": index, "finish_reason": None, "logprobs": None}
        if self.chat:
            new: dict[str, Any] = {"content": text} if text or first else {}
            choice["delta"] = new | ({"role": "assistant"} if first else {})
        else:
            choice["text"] = text
        return self._head(kind) | {"choices": [choice]} | more

    def fresh(self, update: Moved) -> str:
        """What has settled of a text and was not sent."""
        found, sent = self.shown(update.settled), self.sent.get(update.index, "")
        return found[len(sent) :] if found.startswith(sent) else ""

    def frame(self, update: Moved) -> dict[str, Any]:
        """A draft, as a chunk of no text."""
        assert update.draft is not None
        found: dict[str, Any] = {"type": "diffusion_frame", "step": update.step}
        found |= {"total": update.total, "text": self.shown(update.draft)}
        if update.shot is not None:
            found |= {"pieces": update.shot.pieces, "frozen": update.shot.frozen}
        chunk = self._head("chat.completion.chunk" if self.chat else "text_completion")
        choice: dict[str, Any] = {"index": update.index, "finish_reason": None, "logprobs": None}
        if self.chat:
            choice["delta"] = {}
        else:
            choice["text"] = ""
        return chunk | {"choices": [choice]} | found

    def last(self, done: Done) -> dict[str, Any]:
        """The chunk that ends a text."""
        text, sent = self._text(done.result), self.sent.get(done.index, "")
        chunk = self.chunk(done.index, text[len(sent) :])
        choice = self._choice(done)
        for name in ("message", "text"):
            choice.pop(name, None)
        chunk["choices"][0] |= choice
        return chunk

    def usage(self) -> dict[str, Any]:
        """Tokens: given once for each prompt, and written."""
        each = self.asked.body.n
        given = sum(self.given.get(index, 0) for index in sorted(self.done) if index % each == 0)
        written = sum(done.result.tokens for done in self.done.values())
        return {
            "prompt_tokens": given,
            "completion_tokens": written,
            "total_tokens": given + written,
        }

    def timings(self, waited: float) -> dict[str, Any]:
        """What it cost: passes are summed over the texts, which may have shared them."""
        calls = sum(done.result.calls for done in self.done.values())
        heads = sum(done.result.calls * done.draws for done in self.done.values())
        seconds = max((done.result.seconds for done in self.done.values()), default=0.0)
        written = sum(done.result.tokens for done in self.done.values())
        return {
            "body_passes": calls,
            "head_passes_at_most": heads,
            "queued_seconds": waited,
            "seconds": seconds,
            "tokens_per_second": written / seconds if seconds else 0.0,
        }

    def shown(self, composed: Composed) -> str:
        """What of a text is the answer."""
        return _view(self.asked.view, composed.text, composed.spans)

    def _text(self, result: Result) -> str:
        return _view(self.asked.view, result.text, result.spans)

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
        }

    def _choice(self, done: Done) -> dict[str, Any]:
        result, whole = done.result, self.asked.view == "whole"
        text = self._text(result)
        found: dict[str, Any] = {
            "index": done.index,
            "finish_reason": FINISH[result.finish],
            "logprobs": self._logprobs(done),
            "seed": result.seed,
        }
        if whole:
            found["spans"] = [list(span) for span in result.spans]
        if self.chat:
            return found | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return found | {"text": text}

    def _logprobs(self, done: Done) -> dict[str, Any] | None:
        wanted = self.asked.body.logprobs  # type: ignore[attr-defined]  # every endpoint's own
        if wanted is None or wanted is False:
            return None
        result, generator = done.result, self.generator
        pairs = enumerate(zip(result.token_ids, result.logprobs, strict=True))
        found = [(place, i, x) for place, (i, x) in pairs if x is not None]
        if self.chat:
            content = [
                {
                    "token": generator.piece(i),
                    "logprob": x,
                    "bytes": list(token_bytes(generator, i)),
                    "top_logprobs": [],
                }
                for _, i, x in found
            ]
            return {"content": content, "refusal": None}
        at = begins(result, done.layout, generator)
        start = 0 if self.asked.view == "whole" or not result.spans else result.spans[0][0]
        return {
            "tokens": [generator.piece(i) for _, i, _ in found],
            "token_logprobs": [x for _, _, x in found],
            "top_logprobs": None,
            "text_offset": [at[place] - start for place, _, _ in found],
        }


def _view(view: str, text: str, spans: Sequence[tuple[int, int]]) -> str:
    if view == "whole":
        return text
    if not spans:
        return ""
    written = text[slice(*spans[0])]
    return written.lstrip() if view == "turn" else written
