"""Convert records to token ids and loss masks, rendered as a server renders them, and cut long rows.

The prompt is rendered by the chat template and tokenised as a whole, exactly as a server does; the answer's
tokens and the end token follow. Earlier answers of a conversation carry loss where they occur in the rendered
prompt. If the template changes earlier answers (for example, drops their thoughts), each answer gets its own
row, with the prompt that a server would have used.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedrouter.errors import DataError, ModelError
from fedrouter.layout import number_of
from fedrouter.models import render
from fedrouter.types import Record, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 512  # records tokenised together: fast, with little memory
LEAST_PROMPT = 4  # if an answer fills a row, 1 / LEAST_PROMPT of the row is kept for the prompt
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of turns
THINK, THOUGHT = "<think>", "\n\n</think>\n\n"
SHARES = (0.95, 0.99, 1.0)  # shares of the rows for which the needed length is reported


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row as the model sees it."""

    ids: NDArray[np.int32]  # (T,)
    learned: NDArray[np.bool_]  # (T,), which tokens carry loss
    length: int  # tokens before anything was cut
    cuts_prompt: bool
    cuts_answer: bool


@dataclass(frozen=True, slots=True)
class _Piece:
    """A rendered prompt, the positions of earlier answers in it, and the answer."""

    prompt: str
    spans: tuple[tuple[int, int], ...]  # character ranges of earlier answers in the prompt
    answer: str
    ended: bool  # the template rendered the answer and may have added an end token


@dataclass
class RowStatistics:
    """Lengths of all rows, and counts of rows that deserve a warning."""

    lengths: list[int] = field(default_factory=list)
    num_cut: int = 0
    num_cut_prompts: int = 0
    num_cut_answers: int = 0  # their prompts may be cut too
    num_split: int = 0  # conversations with one row per answer
    num_thoughts: int = 0  # answers trained after an empty thought
    hidden: Counter[str] = field(default_factory=Counter)  # what is not rendered, "system turns" → number
    first: dict[str, str] = field(default_factory=dict)  # what is not rendered → place of the first such row

    def needed(self) -> list[tuple[float, int]]:
        """Return for each of ``SHARES`` the limit in tokens at which this share of the rows is not cut."""
        lengths = np.sort(self.lengths)
        return [(share, int(lengths[int(np.ceil(share * len(lengths))) - 1])) for share in SHARES]

    def lines(self, limit: int, why: str) -> Iterator[str]:
        """Yield one line for each kind of warning.

        Parameters
        ----------
        why : the setting that gives ``limit``.
        """
        if self.num_cut:
            needed = ", ".join(f"{length} would hold {share:.0%}" for share, length in self.needed())
            yield (
                f"longer than {why} = {limit} tokens: {self.num_cut} of "
                f"{number_of(len(self.lengths), 'row')}; prompts that lose their beginning: "
                f"{self.num_cut_prompts}, answers that lose their end and end token: {self.num_cut_answers}; "
                f"{needed} of the rows"
            )
        for what, number in self.hidden.items():
            yield (
                f"the chat template does not show the {what} of {number_of(number, 'row')} (first: "
                f"{self.first[what]}), neither in training nor in serving"
            )
        if self.num_split:
            yield (
                f"one row per answer for {number_of(self.num_split, 'conversation')}: the chat template "
                "renders earlier answers differently from how they are generated"
            )
        if self.num_thoughts:
            yield (
                f"the chat template opens {THINK} before the answer: training "
                f"{number_of(self.num_thoughts, 'answer')} after an empty thought"
            )


class Tokeniser:
    """Renders and tokenises each record once, and caches the rows.

    Parameters
    ----------
    max_length : maximum length of a row in tokens.
    positions : number of positions of the base model, if known; also limits the length.
    last : whether only the last answer of a conversation carries loss.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        positions: int | None = None,
        last: bool = False,
    ):
        self.limit = min(max_length, positions or max_length)
        self._limited_by = "train.max_length" if self.limit == max_length else "the base's context length"
        self._tokenizer, self._last = tokenizer, last
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self._cache: dict[int, tuple[Record, list[TokenRow]]] = {}
        self.statistics = RowStatistics()

    def rows(self, records: Sequence[Record]) -> list[TokenRow]:
        """Return the records' rows, usually one per record.

        Raises
        ------
        DataError
            If the chat template refuses a record, or cannot show its tools; names file and row.
        """
        new = [record for record in records if id(record) not in self._cache]
        for start in range(0, len(new), CHUNK):
            self._tokenise(new[start : start + CHUNK])
        return [row for record in records for row in self._cache[id(record)][1]]

    def lines(self) -> list[str]:
        """Return the warnings about all rows so far."""
        return list(self.statistics.lines(self.limit, self._limited_by))

    def _tokenise(self, records: Sequence[Record]) -> None:
        pieces = [self._pieces(record) for record in records]
        flat = [piece for record_pieces in pieces for piece in record_pieces]
        prompts, answers = self._encoded([p.prompt for p in flat]), self._encoded([p.answer for p in flat])
        rows = iter([self._row(*encoded) for encoded in zip(flat, prompts, answers, strict=True)])
        for record, record_pieces in zip(records, pieces, strict=True):
            self._cache[id(record)] = record, [next(rows) for _ in record_pieces]

    def _encoded(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if not self._tokenizer.is_fast:
            ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            return [np.array(text_ids, dtype=np.int32) for text_ids in ids]
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()  # the embedder may have turned truncation and padding on
        backend.no_padding()
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)  # skips token offsets
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _row(self, piece: _Piece, prompt: NDArray[np.int32], answer: NDArray[np.int32]) -> TokenRow:
        if not (piece.ended and len(answer) and answer[-1] in self._special):
            answer = np.append(answer, np.int32(self._tokenizer.eos_token_id))
        learned = self._in_spans(piece, len(prompt))
        length = len(prompt) + len(answer)
        # Cut the beginning of the prompt first; if the answer alone fills the row, keep some of the prompt.
        cuts_answer = len(answer) >= self.limit
        if cuts_answer:
            answer = answer[: self.limit - max(1, min(len(prompt), self.limit // LEAST_PROMPT))]
        start = max(0, len(prompt) - (self.limit - len(answer)))
        cuts_prompt = start > 0
        self.statistics.lengths.append(length)
        self.statistics.num_cut += cuts_prompt or cuts_answer
        self.statistics.num_cut_prompts += cuts_prompt
        self.statistics.num_cut_answers += cuts_answer
        return TokenRow(
            np.concatenate([prompt[start:], answer]),
            np.concatenate([learned[start:], np.ones(len(answer), dtype=bool)]),
            length,
            cuts_prompt,
            cuts_answer,
        )

    def _in_spans(self, piece: _Piece, num: int) -> NDArray[np.bool_]:
        """Return a mask of the prompt's tokens that belong to earlier answers, with their end tokens."""
        learned = np.zeros(num, dtype=bool)
        if not piece.spans:
            return learned
        found = self._tokenizer(piece.prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = np.array(found["input_ids"]), np.array(found["offset_mapping"])[:, 0]
        for begin, end in piece.spans:
            inside = np.flatnonzero((starts >= begin) & (starts < end))
            learned[inside] = True
            following = int(inside[-1]) + 1 if len(inside) else int(np.searchsorted(starts, end))
            if following < num and ids[following] in self._special:
                learned[following] = True
        return learned

    def _pieces(self, record: Record) -> list[_Piece]:
        turns = record.conversation
        targets = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
        targets = targets[-1:] if self._last else targets
        whole = self._piece(record, turns, targets[-1])
        self._check_shown(record, turns[: targets[-1]], whole.prompt, targets)
        spans = []
        for i in targets[:-1]:
            span = self._span(record, turns, i, whole.prompt)
            if span is None:
                self.statistics.num_split += 1
                return [*(self._piece(record, turns, j) for j in targets[:-1]), whole]
            spans.append(span)
        return [replace(whole, spans=tuple(spans))]

    def _piece(self, record: Record, turns: Sequence[Turn], i: int) -> _Piece:
        """Return turn ``i`` as the answer, with the turns before it as its prompt."""
        prompt, turn = self._render(record, turns[:i]), turns[i]
        if "tool_calls" in turn.more or _has_thought(turn):
            written = self._render(record, turns[: i + 1], open_=False)
            if not written.startswith(prompt):
                raise self._refusal(
                    record, "it does not render the answer's tool calls or thoughts after the same prompt"
                )
            bare = replace(turn, more={})
            if written == self._render(record, [*turns[:i], bare], open_=False):
                raise self._refusal(record, "it does not show the answer's tool calls or thoughts")
            return _Piece(prompt, (), written[len(prompt) :].rstrip(), ended=True)
        answer = turn.content
        if prompt.rstrip().endswith(THINK):
            thought = answer.lstrip()
            if thought.startswith(THINK):
                answer = thought.removeprefix(THINK).removeprefix("\n" if prompt.endswith("\n") else "")
            else:
                answer = THOUGHT[len(prompt) - len(prompt.rstrip()) :] + answer
                self.statistics.num_thoughts += 1
        return _Piece(prompt, (), answer, ended=False)

    def _span(self, record: Record, turns: Sequence[Turn], i: int, prompt: str) -> tuple[int, int] | None:
        """Return where turn ``i`` occurs in a later turn's prompt; None if it is rendered differently."""
        if not self._tokenizer.is_fast:  # it gives no token offsets
            return None
        before, turn = self._render(record, turns[:i]), turns[i]
        if not prompt.startswith(before):
            return None
        if "tool_calls" in turn.more or _has_thought(turn):
            piece = self._piece(record, turns, i)  # refuses what the template hides
            end = len(before) + len(piece.answer)
            return (len(before), end) if prompt.startswith(before + piece.answer) else None
        rest = prompt[len(before) :]
        text = turn.content if rest.startswith(turn.content) else turn.content.strip()
        return (len(before), len(before) + len(text)) if rest.startswith(text) else None

    def _check_shown(
        self, record: Record, turns: Sequence[Turn], prompt: str, targets: Sequence[int]
    ) -> None:
        """Check what the chat template leaves out: refuse hidden tools, and count what else is hidden.

        An id links a result to its call; thoughts of ``targets``, which carry loss, are checked where they
        are learned.
        """
        hidden: set[str] = set()
        if record.tools and prompt == self._render(replace(record, tools=()), turns):
            raise self._refusal(record, "it does not show tools")
        for i, turn in enumerate(turns):
            for key in turn.more.keys() - {"tool_calls", "tool_call_id"}:
                if key in THOUGHTS and i in targets:
                    continue
                less = replace(turn, more={k: v for k, v in turn.more.items() if k != key})
                if self._render(record, [*turns[:i], less, *turns[i + 1 :]]) == prompt:
                    hidden.add(f"{key} of {turn.role} turns")
            required = turn.role == "tool" or "tool_calls" in turn.more
            if turn.content.strip() in prompt and not required:
                continue
            calls = "tool_calls" in turn.more
            changed = replace(turn, more={}) if calls else replace(turn, content=f"{turn.content}·")
            if self._render(record, [*turns[:i], changed, *turns[i + 1 :]]) != prompt:
                continue
            if required:
                part = "tool results" if turn.role == "tool" else "tool calls"
                raise self._refusal(record, f"it does not show {part}")
            hidden.add(f"{turn.role} turns")
        for what in sorted(hidden):
            self.statistics.hidden[what] += 1
            self.statistics.first.setdefault(what, _place(record))

    def _render(self, record: Record, turns: Sequence[Turn], open_: bool = True) -> str:
        try:
            return render(self._tokenizer, turns, record.tools, open_)
        except ModelError as error:
            raise self._refusal(record, str(error)) from error

    def _refusal(self, record: Record, reason: str) -> DataError:
        return DataError(f"{_place(record)}: the base's chat template cannot render this row: {reason}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A base model's tokenizer and tokenised rows."""

    path: Path  # of the base model
    tokenizer: "PreTrainedTokenizerBase"
    tokeniser: Tokeniser


def positions_of(config: Any) -> int | None:
    """Return a base model's number of positions from its transformers configuration, or None."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def labels_of(row: TokenRow, ignored: int) -> NDArray[np.int32]:
    """Return a row's labels: its ids where they carry loss, ``ignored`` elsewhere."""
    return np.where(row.learned, row.ids, np.int32(ignored))


def load_rows(tokeniser: Tokeniser, clients: Mapping[str, Sequence[Record]]) -> None:
    """Render and tokenise all clients' rows.

    Raises
    ------
    DataError
        If a row cannot be rendered; names client, file and row.
    """
    for name, records in clients.items():
        try:
            tokeniser.rows(records)
        except DataError as error:
            raise DataError(f"client {name}: {error}") from error


def _has_thought(turn: Turn) -> bool:
    return any(turn.more.get(key) for key in THOUGHTS)


def _place(record: Record) -> str:
    return record.where or "a row"
