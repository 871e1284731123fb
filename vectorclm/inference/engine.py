"""Generation off the event loop: one thread generates the answers of all requests in one continuous batch."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from vectorclm.inference.batch import BatchSequence, ContinuousBatch, rows_that_fit
from vectorclm.inference.chat import LanguageModel
from vectorclm.inference.generate import Sampler
from vectorclm.inference.logprobs import TokenLogprob
from vectorclm.inference.openai_errors import Refusal
from vectorclm.inference.openai_requests import Choice
from vectorclm.inference.text_stream import TextDelta, TextStream

WAITING = 64  # requests that may wait for their turn

Piece = tuple[int, TextDelta]  # the number of an answer in its request, and its next piece


class Request:
    """The answers to one request, and the queue in which the client's task receives their pieces."""

    def __init__(self, model: LanguageModel, choices: Sequence[Choice]) -> None:
        self.answers = [Answer(self, index, choice, model) for index, choice in enumerate(choices)]
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.running = 0  # its answers in the batch
        self.has_begun = False
        self.has_left = False  # whether nobody reads the pieces any more


class Answer(BatchSequence):
    """One answer while it is generated: its tokens, how they are drawn, and the text that they make."""

    def __init__(self, request: Request, index: int, choice: Choice, model: LanguageModel) -> None:
        super().__init__(list(choice.prompt), all_logits=choice.scores_prompt)
        self.request, self.index, self.choice, self.model = request, index, choice, model
        self.text = TextStream(model.tokenizer, choice.stop, ignore_eos=choice.ignore_eos)
        grammar = None if choice.grammar is None else model.grammars.begin(choice.grammar)
        self.sampler = Sampler(choice.sampling, choice.prompt, grammar)
        self.left = choice.max_new_tokens
        self.scores: list[TokenLogprob] = []  # of the prompt's tokens
        if choice.scores_prompt:
            self.scores.append(model.names.of(choice.prompt[0], None))

    def take(self, logits_TV: Tensor) -> TextDelta | None:
        """Draw the next token from the newest logits, and return the answer's next piece.

        Returns None while logits of the prompt arrive, whose tokens need no drawing.
        """
        logprobs: list[TokenLogprob] = []
        if self.choice.scores_prompt and self.cached <= len(self.choice.prompt):
            first = self.cached - len(logits_TV) + 1  # the token that the first logits predict
            known = self.ids[first : self.cached + 1]
            self.scores += self._scored(logits_TV[: len(known)], known)
            if self.cached < len(self.ids):
                return None
            logprobs, self.scores = self.scores, []
        if self.left == 0:  # only the prompt's scores are asked for
            return replace(self.text.end(), logprobs=logprobs)
        token = self.sampler.draw(logits_TV[-1])
        self.ids.append(token)
        self.left -= 1
        if self.choice.logprobs is not None:
            logprobs += self._scored(logits_TV[-1:], [token])
        delta = self.text.add(token)
        if delta.finish is None and self.sampler.grammar is not None and self.sampler.grammar.is_complete:
            delta = _joined(delta, replace(self.text.end(), finish="stop"))
        elif delta.finish is None and self.left == 0:
            delta = _joined(delta, self.text.end())
        return replace(delta, logprobs=logprobs) if logprobs else delta

    def _scored(self, logits_TV: Tensor, tokens: Sequence[int]) -> list[TokenLogprob]:
        return self.model.names.scored(logits_TV, tokens, self.choice.logprobs or 0)


def _joined(delta: TextDelta, end: TextDelta) -> TextDelta:
    return replace(delta, text=delta.text + end.text, finish=end.finish)


def _put(pieces: Sequence[tuple[Request, Piece | Exception]]) -> None:
    for request, piece in pieces:
        request.pieces.put_nowait(piece)


def _shutting_down() -> Refusal:
    return Refusal("the server shuts down", 503, code="shutting_down")


class Engine:
    """Generates the answers of all requests together; each client's task receives the pieces of its own.

    A free place in the batch goes to the request with the fewest answers in the batch, and among these to the oldest: a
    request for many answers does not keep the others waiting.
    """

    def __init__(self, model: LanguageModel, parallel: int | None = None) -> None:
        self.model = model
        self.parallel = parallel or rows_that_fit(model.model)  # answers that are generated at once
        self._batch: ContinuousBatch[Answer] | None = None
        self._waiting: list[Answer] = []  # in the order of their arrival
        self._running: list[Answer] = []
        self._closed = self._working = False
        self._lock = threading.Lock()  # guards the fields above
        self._thread = ThreadPoolExecutor(1, "generate")

    @property
    def waiting(self) -> int:
        """Requests none of whose answers has begun."""
        with self._lock:
            return len({answer.request for answer in self._waiting if not answer.request.has_begun})

    @property
    def running(self) -> int:
        """Answers that are being generated."""
        with self._lock:
            return len(self._running)

    def close(self) -> None:
        """End all answers with an error, and refuse new ones, because the server shuts down."""
        with self._lock:
            self._closed = True
            requests = {answer.request for answer in (*self._waiting, *self._running)}
            self._waiting.clear()
        for request in requests:
            request.loop.call_soon_threadsafe(request.pieces.put_nowait, _shutting_down())

    def check_room(self) -> None:
        """Raise Refusal where too many requests wait, or the server shuts down."""
        if self._closed:
            raise _shutting_down()
        if self.waiting >= WAITING:
            raise Refusal(f"{WAITING} requests wait already: try again later", 429, code="rate_limit_exceeded")

    async def answers(self, choices: Sequence[Choice]) -> AsyncGenerator[Piece, None]:
        """Stream the pieces of all answers to a request, each with the number of its answer, as they are generated.

        Closing the stream ends the answers. A caller that reads slowly does not delay other requests. Raises Refusal
        where too many requests wait, and when the server shuts down; one answer's error ends the whole request.
        """
        self.check_room()
        request = Request(self.model, choices)
        with self._lock:
            self._waiting += request.answers
            start, self._working = not self._working, True
        if start:
            self._thread.submit(self._work)
        ended = 0
        try:
            while ended < len(choices):
                piece = await request.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                ended += piece[1].finish is not None
        finally:
            request.has_left = True

    def _work(self) -> None:
        """Generate in the engine's thread until no answer is left."""
        if self._batch is None:
            self._batch = ContinuousBatch(self.model.model.eval(), self.parallel)
        batch = self._batch
        while True:
            self._admit(batch)
            if not len(batch):
                with self._lock:
                    if not self._waiting or self._closed:
                        self._working = False
                        return
                continue
            try:
                stepped = batch.step()
            except Exception as error:  # of the whole step: no answer can go on
                self._deliver([self._failed(answer, error) for answer in self._running])
                batch = self._batch = ContinuousBatch(self.model.model, self.parallel)
                self._running.clear()
                continue
            self._deliver([piece for answer, logits_TV in stepped for piece in self._take(batch, answer, logits_TV)])

    def _take(
        self, batch: ContinuousBatch[Answer], answer: Answer, logits_TV: Tensor
    ) -> Iterator[tuple[Request, Piece | Exception]]:
        try:
            with torch.inference_mode():
                delta = answer.take(logits_TV)
        except Exception as error:
            with self._lock:
                self._leave(batch, answer)
            yield self._failed(answer, error)
            return
        if delta is not None:
            if delta.finish:
                with self._lock:
                    self._leave(batch, answer)
            yield answer.request, (answer.index, delta)

    def _failed(self, answer: Answer, error: Exception) -> tuple[Request, Exception]:
        answer.request.has_left = True
        return answer.request, error

    def _deliver(self, pieces: Sequence[tuple[Request, Piece | Exception]]) -> None:
        """Hand the pieces of one step to the tasks that wait for them, by one call for each event loop."""
        for loop in {request.loop for request, _ in pieces}:
            own = [(request, piece) for request, piece in pieces if request.loop is loop]
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_put, own)

    def _admit(self, batch: ContinuousBatch[Answer]) -> None:
        """Remove answers that nobody reads, and fill the free places."""
        with self._lock:
            self._waiting = [answer for answer in self._waiting if not answer.request.has_left]
            for answer in [one for one in self._running if one.request.has_left or self._closed]:
                self._leave(batch, answer)
            while self._waiting and len(batch) < batch.size and not self._closed:
                answer = min(self._waiting, key=lambda one: one.request.running)  # the first of equals
                self._waiting.remove(answer)
                self._running.append(answer)
                answer.request.running += 1
                answer.request.has_begun = True
                batch.add(answer)

    def _leave(self, batch: ContinuousBatch[Answer], answer: Answer) -> None:
        self._running.remove(answer)
        answer.request.running -= 1
        batch.remove(answer)
