"""Generation off the event loop: one thread generates one answer at a time, in the order of the requests."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from vectorclm.inference.chat import LanguageModel, TextDelta, reply
from vectorclm.inference.openai_errors import Refusal
from vectorclm.inference.openai_requests import Choice

WAITING = 64  # requests that may wait for their turn


class Engine:
    """Generates one answer at a time, in the order of the requests."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.waiting = 0  # requests that wait for their turn
        self._closed = False
        self._turn = asyncio.Lock()  # wakes waiters in their order
        self._thread = ThreadPoolExecutor(1, "generate")  # of its own, so that reading requests never delays an answer

    @property
    def is_busy(self) -> bool:
        """Whether an answer is being generated."""
        return self._turn.locked()

    def close(self) -> None:
        """End the answer that is being generated, and refuse all others, because the server shuts down."""
        self._closed = True

    def check_room(self) -> None:
        """Raise Refusal where too many requests wait."""
        if self.waiting >= WAITING:
            raise Refusal(f"{WAITING} requests wait already: try again later", 429, code="rate_limit_exceeded")

    async def answer(self, choice: Choice, *, first: bool = True) -> AsyncGenerator[TextDelta, None]:
        """Stream the pieces of an answer. Closing the stream ends the answer and lets the next request begin.

        A caller that reads slowly does not delay the next request. Raises Refusal when the engine is closed, and where
        too many requests wait, unless this is not the `first` answer of its request.
        """
        if first:
            self.check_room()
        self.waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.waiting -= 1
        deltas: asyncio.Queue[TextDelta | None] = asyncio.Queue()
        left, loop = threading.Event(), asyncio.get_running_loop()
        work = asyncio.ensure_future(self._in_thread(partial(self._generate, choice, deltas, left, loop)))
        try:
            while not self._closed and (delta := await deltas.get()) is not None:
                yield delta
            if self._closed:
                raise Refusal("the server shuts down", 503, code="shutting_down")
            await work  # raises the error of the thread
        finally:
            left.set()

    async def _in_thread(self, generate: Callable[[], None]) -> None:
        """Run in the engine's thread, and then let the next request begin."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, generate)
        finally:
            self._turn.release()

    def _generate(
        self,
        choice: Choice,
        deltas: "asyncio.Queue[TextDelta | None]",
        left: threading.Event,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        try:
            for delta in reply(
                self.model,
                choice.prompt,
                choice.max_new_tokens,
                sampling=choice.sampling,
                stop=choice.stop,
                ignore_eos=choice.ignore_eos,
            ):
                if left.is_set():
                    return
                loop.call_soon_threadsafe(deltas.put_nowait, delta)
        finally:
            loop.call_soon_threadsafe(deltas.put_nowait, None)
