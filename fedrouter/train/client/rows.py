"""Records to token ids and to what carries loss, as a server will render them; cut where they are too long.

A prompt is rendered by the chat template and tokenised whole, exactly as a server does it; the answer follows
token by token, and the end token. Earlier answers of a conversation are found in the rendered prompt and
carry loss there. Where the template writes them otherwise than they were generated (it drops their thoughts,
say), each answer gets a row of its own, with the prompt that a server would have seen.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedrouter.errors import DataError, ModelError
from fedrouter.models import render
from fedrouter.types import Record, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 512  # records tokenised together: quick, and little memory
LEAST_PROMPT = 4  # a row whose answer fills it keeps one token in so many of its prompt
THINK, THOUGHT = "<think>", "\n\n</think>\n\n"
SHARES = (0.95, 0.99, 1.0)  # of rows, whose lengths are told


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
    """A rendered prompt, where earlier answers stand in it, and the answer."""

    prompt: str
    spans: tuple[tuple[int, int], ...]  # characters of the prompt
    answer: str
    ended: bool  # the answer came out of the template, which may have written its end


@dataclass
class Told:
    """What there is to say of all rows."""

    lengths: list[int] = field(default_factory=list)
    num_cut_prompts: int = 0
    num_cut_answers: int = 0
    num_split: int = 0  # conversations with a row an answer
    num_thoughts: int = 0  # answers behind an empty thought
    hidden: Counter[str] = field(
        default_factory=Counter
    )  # roles whose turns the template does not show: rows
    first: dict[str, str] = field(default_factory=dict)  # where the first of them is

    def needed(self) -> list[tuple[float, int]]:
        """Return the lengths in tokens that hold 95, 99 and 100 % of the rows."""
        lengths = np.sort(self.lengths)
        return [(share, int(lengths[int(np.ceil(share * len(lengths))) - 1])) for share in SHARES]

    def lines(self, limit: int, why: str) -> Iterator[str]:
        """Yield one line for each thing that is not as one would expect."""
        if num := self.num_cut_prompts + self.num_cut_answers:
            held = ", ".join(f"{length} would hold {share:.0%}" for share, length in self.needed())
            yield (
                f"{num} of {len(self.lengths)} rows are longer than {why} = {limit} tokens: "
                f"{self.num_cut_prompts} lose the beginning of their prompt, {self.num_cut_answers} the end "
                f"of their answer (which learn no end token); {held}"
            )
        for role, number in self.hidden.items():
            yield (
                f"the chat template shows no {role} turn like those of {number} rows, the first "
                f"{self.first[role]}: neither training nor serving will"
            )
        if self.num_split:
            yield (
                f"{self.num_split} conversations train a row an answer: the chat template writes earlier "
                "answers otherwise than they are generated"
            )
        if self.num_thoughts:
            yield (
                f"the chat template opens {THINK} before the answer: {self.num_thoughts} answers are trained "
                "behind an empty thought"
            )


class Tokeniser:
    """Renders and tokenises records once; asked again it remembers.

    Parameters
    ----------
    max_length : of a row, in tokens.
    positions : how many the base has, if it says so; rows are cut to them too.
    last : only the last answer of a conversation carries loss.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        positions: int | None = None,
        last: bool = False,
    ):
        self.limit = min(max_length, positions or max_length)
        self._why = "train.max_length" if self.limit == max_length else "the base's positions"
        self._tokenizer, self._last = tokenizer, last
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self._known: dict[int, tuple[Record, list[TokenRow]]] = {}
        self.told = Told()

    def rows(self, records: Sequence[Record]) -> list[TokenRow]:
        """Return the records' rows, one a record as a rule.

        Raises
        ------
        DataError
            If the chat template refuses a record, or cannot show its tools; names file and row.
        """
        new = [record for record in records if id(record) not in self._known]
        for start in range(0, len(new), CHUNK):
            self._tokenise(new[start : start + CHUNK])
        return [row for record in records for row in self._known[id(record)][1]]

    def lines(self) -> list[str]:
        """Return what there is to say of all rows so far."""
        return list(self.told.lines(self.limit, self._why))

    def _tokenise(self, records: Sequence[Record]) -> None:
        pieces = [self._pieces(record) for record in records]
        flat = [piece for own in pieces for piece in own]
        prompts, answers = self._encoded([p.prompt for p in flat]), self._encoded([p.answer for p in flat])
        rows = iter([self._row(*one) for one in zip(flat, prompts, answers, strict=True)])
        for record, own in zip(records, pieces, strict=True):
            self._known[id(record)] = record, [next(rows) for _ in own]

    def _encoded(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if not self._tokenizer.is_fast:
            ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            return [np.array(one, dtype=np.int32) for one in ids]
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()  # the embedder may have set it
        backend.no_padding()
        found = backend.encode_batch_fast(texts, add_special_tokens=False)  # without places of tokens
        return [np.array(one.ids, dtype=np.int32) for one in found]

    def _row(self, piece: _Piece, prompt: NDArray[np.int32], answer: NDArray[np.int32]) -> TokenRow:
        if not (piece.ended and len(answer) and answer[-1] in self._special):
            answer = np.append(answer, np.int32(self._tokenizer.eos_token_id))
        learned = self._in_spans(piece, len(prompt))
        length = len(prompt) + len(answer)
        # The answer comes before the prompt's beginning; where it fills the row, some prompt stays.
        room = self.limit
        cuts_answer = len(answer) >= room
        if cuts_answer:
            answer = answer[: room - max(1, min(len(prompt), room // LEAST_PROMPT))]
        kept = max(0, len(prompt) - (room - len(answer)))
        cuts_prompt = kept > 0 and not cuts_answer
        self.told.lengths.append(length)
        self.told.num_cut_prompts += cuts_prompt
        self.told.num_cut_answers += cuts_answer
        return TokenRow(
            np.concatenate([prompt[kept:], answer]),
            np.concatenate([learned[kept:], np.ones(len(answer), dtype=bool)]),
            length,
            cuts_prompt,
            cuts_answer,
        )

    def _in_spans(self, piece: _Piece, num: int) -> NDArray[np.bool_]:
        """Tell which tokens of a prompt are of earlier answers, the token that ends each among them."""
        learned = np.zeros(num, dtype=bool)
        if not piece.spans:
            return learned
        found = self._tokenizer(piece.prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = np.array(found["input_ids"]), np.array(found["offset_mapping"])[:, 0]
        for begin, end in piece.spans:
            inside = np.flatnonzero((starts >= begin) & (starts < end))
            learned[inside] = True
            behind = int(inside[-1]) + 1 if len(inside) else int(np.searchsorted(starts, end))
            if behind < num and ids[behind] in self._special:
                learned[behind] = True
        return learned

    def _pieces(self, record: Record) -> list[_Piece]:
        turns = record.conversation
        targets = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
        targets = targets[-1:] if self._last else targets
        whole = self._piece(record, turns, targets[-1])
        self._look(record, turns[: targets[-1]], whole.prompt)
        spans = []
        for i in targets[:-1]:
            span = self._span(record, turns, i, whole.prompt)
            if span is None:
                self.told.num_split += 1
                return [*(self._piece(record, turns, j) for j in targets[:-1]), whole]
            spans.append(span)
        return [replace(whole, spans=tuple(spans))]

    def _piece(self, record: Record, turns: Sequence[Turn], i: int) -> _Piece:
        """Return turn ``i`` as an answer to what is before it."""
        prompt, turn = self._render(record, turns[:i]), turns[i]
        if "tool_calls" in turn.more or _thought(turn):
            written = self._render(record, turns[: i + 1], open_=False)
            if not written.startswith(prompt):
                raise self._refusal(
                    record, "it writes an answer's tool calls or thoughts apart from its prompt"
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
                self.told.num_thoughts += 1
        return _Piece(prompt, (), answer, ended=False)

    def _span(self, record: Record, turns: Sequence[Turn], i: int, prompt: str) -> tuple[int, int] | None:
        """Return where turn ``i`` stands in a later turn's prompt; None if it was generated otherwise."""
        if not self._tokenizer.is_fast:  # tells no places
            return None
        before, turn = self._render(record, turns[:i]), turns[i]
        if not prompt.startswith(before):
            return None
        if "tool_calls" in turn.more or _thought(turn):
            written = self._render(record, turns[: i + 1], open_=False).rstrip()
            return (len(before), len(written)) if prompt.startswith(written) else None
        rest = prompt[len(before) :]
        said = turn.content if rest.startswith(turn.content) else turn.content.strip()
        return (len(before), len(before) + len(said)) if rest.startswith(said) else None

    def _look(self, record: Record, turns: Sequence[Turn], prompt: str) -> None:
        """Look for what the chat template leaves out: tools are refused then, other turns are told."""
        if record.tools and prompt == self._render(replace(record, tools=()), turns):
            raise self._refusal(record, "it does not show tools")
        for i, turn in enumerate(turns):
            needed = turn.role == "tool" or "tool_calls" in turn.more
            if turn.content.strip() in prompt and not needed:
                continue
            calls = "tool_calls" in turn.more
            other = replace(turn, more={}) if calls else replace(turn, content=f"{turn.content}·")
            if self._render(record, [*turns[:i], other, *turns[i + 1 :]]) != prompt:
                continue
            if needed:
                what = "tool results" if turn.role == "tool" else "tool calls"
                raise self._refusal(record, f"it does not show {what}")
            self.told.hidden[turn.role] += 1
            self.told.first.setdefault(turn.role, _place(record))

    def _render(self, record: Record, turns: Sequence[Turn], open_: bool = True) -> str:
        try:
            return render(self._tokenizer, turns, record.tools, open_)
        except ModelError as error:
            raise self._refusal(record, str(error)) from error

    def _refusal(self, record: Record, reason: str) -> DataError:
        return DataError(f"{_place(record)}: the base's chat template cannot render this row: {reason}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A base's tokenizer, and the rows that it has rendered and tokenised."""

    path: Path  # of the base
    tokenizer: "PreTrainedTokenizerBase"
    tokeniser: Tokeniser


def positions_of(config: Any) -> int | None:
    """Return how many positions a base has, from its transformers configuration; None if it does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def labels_of(row: TokenRow, ignored: int) -> NDArray[np.int32]:
    """Return a row's ids where they carry loss, ``ignored`` elsewhere."""
    return np.where(row.learned, row.ids, np.int32(ignored))


def load_rows(tokeniser: Tokeniser, clients: Mapping[str, Sequence[Record]]) -> None:
    """Render and tokenise all clients' rows, before anything that takes long.

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


def _thought(turn: Turn) -> bool:
    return any(turn.more.get(key) for key in ("reasoning_content", "reasoning", "thinking"))


def _place(record: Record) -> str:
    return record.where or "a row"
